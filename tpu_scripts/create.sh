#!/usr/bin/env bash
# Requests the TPU as a queued resource and waits until it is active: create.sh [--dry-run]

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
[ -n "$MDRL_ACCELERATOR" ] || fail 2 "MDRL_ACCELERATOR is not set, e.g. v5litepod-16, v5p-16 or v6e-16"
if [ -z "$MDRL_RUNTIME" ]; then
  case $MDRL_ACCELERATOR in
    v6e-*) MDRL_RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) MDRL_RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) MDRL_RUNTIME=v2-alpha-tpuv5-lite ;;
    v[234]-*) MDRL_RUNTIME=tpu-ubuntu2204-base ;;
    *) fail 2 "MDRL_ACCELERATOR=$MDRL_ACCELERATOR is not known; use v5litepod-16, v5p-16, ...; or set MDRL_RUNTIME" ;;
  esac
fi

flags=(--node-id="$MDRL_TPU" "${place[@]}" --accelerator-type="$MDRL_ACCELERATOR" --runtime-version="$MDRL_RUNTIME")
case $MDRL_SPOT$MDRL_RESERVED in
  10) flags+=(--spot) ;;
  01) flags+=(--reserved) ;;
  00) ;;
  *) fail 2 "MDRL_SPOT=$MDRL_SPOT with MDRL_RESERVED=$MDRL_RESERVED is not possible; each is 0 or 1, and not both 1" ;;
esac
for flag in $MDRL_CREATE_FLAGS; do flags+=("$flag"); done

call "creating $MDRL_TPU" gcloud compute tpus queued-resources create "$MDRL_TPU" "${flags[@]}"
before=
while true; do
  line=$(queued_state)
  state=${line%%[[:space:]]*}
  [ "$state" = "$before" ] || dry || say "$MDRL_TPU is $state"
  before=$state
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) break ;;
  esac
  sleep "$MDRL_POLL"
done
echo "${line:-$state}" >"$errors"
diagnose || verdict=75 advice="wait and try again: tpu_scripts/resume.sh"
complain "creating $MDRL_TPU"
exit "$verdict"
