#!/usr/bin/env bash
# Shows the output of worker 0 until the run ends, then exits with the run's exit status: follow.sh [--dry-run]
# Control-C ends this script, but not the run.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
trap 'say "the run continues; tpu_scripts/follow.sh shows it again, tpu_scripts/stop.sh stops it"; exit 130' INT
if dry; then
  on 0 "following $MDRL_TPU" "bash mdrl/worker.sh since 0"
  exit 0
fi
chunk=$(mktemp)
trap 'rm -f "$errors" "$chunk"' EXIT
offset=0
while true; do
  on 0 "following $MDRL_TPU" "bash mdrl/worker.sh since $offset" >"$chunk"
  read -r mark offset state <<<"$(tail -n 1 "$chunk")"
  [ "$mark" = mdrl-run ] || fail 75 "following $MDRL_TPU: the answer of worker 0 is incomplete; try again"
  # After a lost connection the output may hold the answer twice, the first one cut off; the last one counts.
  awk '/^mdrl-log / { n = 0; next } { lines[n++] = $0 } END { for (i = 0; i < n - 1; i++) print lines[i] }' "$chunk"
  [ "$state" = running ] || break
  sleep "$MDRL_POLL"
done
case $state in
  0 | 2 | 143) exit "$state" ;;
  none) fail 75 "no run was launched on $MDRL_TPU; launch one with tpu_scripts/launch.sh or tpu_scripts/resume.sh" ;;
  lost) fail 75 "the run on worker 0 of $MDRL_TPU ended without a status; the machine may have restarted" ;;
esac
# Worker 0 may have crashed because another worker ended, whose status then tells the cause.
on all "asking all workers of $MDRL_TPU" "bash mdrl/worker.sh state" >"$chunk" || exit "$state"
sed 's/^/mdrl: /' "$chunk" >&2
! grep -q ' 2$' "$chunk" || exit 2
exit "$state"
