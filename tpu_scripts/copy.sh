#!/usr/bin/env bash
# Packs this checkout (without files that git ignores) or MDRL_WHEEL, and copies it to every worker: copy.sh [--dry-run]
# --pack  only packs, so that a TPU that is created later gets the present files
# --again only copies what was packed last, so that a run continues with the program it was started with

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
part=${arguments[*]:-}
case $part in --pack | --again) ;; *) only_flags ;; esac

# Packs the checkout $1 into the archive $2; files that git tracks but that were deleted are left out.
# shellcheck disable=SC2016 # the variables are expanded by the bash that runs it
pack='set -eo pipefail; cd "$1"; git ls-files -z --cached --others --exclude-standard |'\
' while IFS= read -r -d "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done | tar --null -T - -czf "$2"'

package=package.tar.gz
[ -z "$MDRL_WHEEL" ] || package=$(basename "$MDRL_WHEEL")

environment() { # prints the settings that worker.sh reads
  local name
  for name in $MDRL_PASS; do
    { [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && [ -n "${!name+set}" ]; } ||
      fail 2 "MDRL_PASS names $name, which is not set in the environment; set it, or take it out of MDRL_PASS"
  done
  printf 'export MDRL_PACKAGE=%s\n' "$(quoted "$package")"
  for name in MDRL_BUCKET MDRL_PYTHON MDRL_PACKAGES_UNTIL MDRL_GRACE $MDRL_PASS; do
    printf 'export %s=%s\n' "$name" "$(quoted "${!name}")"
  done
}

prepare() {
  umask 077 # the variables of MDRL_PASS may be secret
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
  dry || [ -f "$stage/mdrl/worker.sh" ] || fail 2 "nothing was packed for $MDRL_TPU yet; call copy.sh without --again"
  call "copying to $MDRL_TPU" gcloud compute tpus tpu-vm scp "$stage/mdrl" "$MDRL_TPU:" "${transport[@]}" \
    --scp-flag="$alive" --worker=all --recurse
fi
