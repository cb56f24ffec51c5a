#!/usr/bin/env bash
# Packs this checkout, without what git ignores, or MDRL_WHEEL, and copies it to every worker: copy.sh [--dry-run]
# --pack  only packs, so that a TPU that comes later gets what is here now
# --again only copies what was packed the last time, so that a run that goes on meets the program it began with

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
part=${arguments[*]:-}
case $part in --pack | --again) ;; *) only_flags ;; esac

# From the checkout $1 to the archive $2; files that are tracked but deleted are left out.
# shellcheck disable=SC2016 # expanded where it runs
pack='set -eo pipefail; cd "$1"; git ls-files -z --cached --others --exclude-standard |'\
' while IFS= read -r -d "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done | tar --null -T - -czf "$2"'

package=package.tar.gz
[ -z "$MDRL_WHEEL" ] || package=$(basename "$MDRL_WHEEL")

environment() { # what the worker's script reads
  local name
  for name in $MDRL_PASS; do
    { [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && [ -n "${!name+set}" ]; } ||
      fail 2 "MDRL_PASS names $name, which is not in the environment"
  done
  printf 'export MDRL_PACKAGE=%s\n' "$(quoted "$package")"
  for name in MDRL_BUCKET MDRL_PYTHON MDRL_PACKAGES_UNTIL MDRL_GRACE $MDRL_PASS; do
    printf 'export %s=%s\n' "$name" "$(quoted "${!name}")"
  done
}

prepare() {
  umask 077 # what is passed on may be secret
  if [ -n "$MDRL_WHEEL" ]; then
    [ -f "$MDRL_WHEEL" ] || fail 2 "MDRL_WHEEL=$MDRL_WHEEL is not a file"
    : "${MDRL_PACKAGES_UNTIL=}"
  else
    git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
      fail 2 "$root is not a git checkout; clone it with git, or set MDRL_WHEEL"
    : "${MDRL_PACKAGES_UNTIL=$(git -C "$root" log -1 --format=%cI)}"
  fi
  rm -rf "$stage"
  mkdir -p "$stage/mdrl"
  environment >"$stage/mdrl/environment"
  cp "$here/worker.sh" "$stage/mdrl/"
}

if [ "$part" != --again ]; then
  dry || prepare
  if [ -n "$MDRL_WHEEL" ]; then
    step=(cp "$MDRL_WHEEL" "$stage/mdrl/$package")
  else
    step=(bash -c "$pack" pack "$root" "$stage/mdrl/$package")
  fi
  if dry; then
    printf '%s\n' "$(quoted "${step[@]}")"
  else
    "${step[@]}"
  fi
fi
if [ "$part" != --pack ]; then
  dry || [ -f "$stage/mdrl/worker.sh" ] || fail 2 "nothing was packed for $MDRL_TPU; call copy.sh without --again"
  call "copying to $MDRL_TPU" gcloud compute tpus tpu-vm scp "$stage/mdrl" "$MDRL_TPU:" "${transport[@]}" \
    --scp-flag="$alive" --worker=all --recurse
fi
