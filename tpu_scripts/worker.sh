#!/usr/bin/env bash
# The other scripts run this one on a worker. copy.sh puts it in the home folder there: bash mdrl/worker.sh VERB ...
#   install                      installs the package and what it needs
#   launch ID WORKDIR ARGUMENTS  starts a run in the background; does nothing if this ID was started before
#   state                        prints the host and none, running, lost or the exit status of the last run
#   since BYTES                  prints the last run's output after this number of bytes, between the lines
#                                `mdrl-log BYTES` and `mdrl-run BYTES STATE`
#   stop                         stops the last run
# ~/mdrl holds the archive or wheel, environment, code/, venv/, bucket/, and a folder with log and status of each run.

set -euo pipefail
home=$HOME/mdrl
run=$home/run # a symbolic link to the folder of the last run

fail() {
  echo "$(hostname): $2" >&2
  exit "$1"
}

leftovers() { # prints the process ids of the last run, including its reward workers
  [ ! -s "$run/leader" ] || pgrep -g "$(cat "$run/leader")" -f mdrl || true
}

state() {
  if [ ! -e "$run" ]; then
    echo none
  elif [ ! -s "$run/status" ] && [ -n "$(leftovers)" ]; then
    echo running
  elif [ -s "$run/status" ]; then # checked again, because the run may have ended between the two checks above
    cat "$run/status"
  else
    echo lost
  fi
}

idle() { [ "$(state)" != running ] || fail 2 "a run is going on; tpu_scripts/stop.sh ends it"; }

mount_bucket() {
  [ -n "$MDRL_BUCKET" ] || return 0
  ! mountpoint -q "$home/bucket" || return 0
  local archive=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc codename
  if ! command -v gcsfuse >/dev/null; then
    codename=$(source /etc/os-release && echo "$VERSION_CODENAME")
    curl -fsSL "$archive/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $archive gcsfuse-$codename main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    packages gcsfuse
  fi
  mkdir -p "$home/bucket"
  # A worker must see at once what another has written, so no metadata is cached, not even that a file does not exist.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=1000000 \
    "$MDRL_BUCKET" "$home/bucket"
}

packages() { # installs Ubuntu packages; waits, because another process may hold the lock just after the machine started
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y "$@"
}

install() {
  idle
  command -v bwrap >/dev/null || packages bubblewrap # the sandbox in which rewards run programs
  mount_bucket
  [ -x "$home/bin/uv" ] || curl -fsSL https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$home/bin" sh
  rm -rf "$home/code"
  mkdir "$home/code"
  local source=$home/code until=()
  case $MDRL_PACKAGE in
    *.whl) source=$home/$MDRL_PACKAGE ;;
    *) tar -xzf "$home/$MDRL_PACKAGE" -C "$home/code" ;;
  esac
  [ -z "$MDRL_PACKAGES_UNTIL" ] || until=(--exclude-newer "$MDRL_PACKAGES_UNTIL")
  "$home/bin/uv" venv --quiet --allow-existing --python "$MDRL_PYTHON" "$home/venv"
  "$home/bin/uv" pip install --quiet --python "$home/venv/bin/python" "${until[@]}" --reinstall-package mdrl-jax \
    "mdrl-jax[tpu] @ file://$source"
  echo "$(hostname): installed"
}

launch() { # ID WORKDIR ARGUMENTS
  local folder=$home/run-$1 workdir=$2
  shift 2
  [ ! -e "$folder" ] || return 0
  idle
  [ -x "$home/venv/bin/python" ] || fail 2 "nothing is installed; call tpu_scripts/install.sh first"
  stop # processes left by a crashed run would hold the devices
  mount_bucket
  case $workdir in /*) ;; *) workdir=$HOME/$workdir ;; esac
  mkdir "$folder"
  ln -sfn "$folder" "$run"
  setsid nohup bash "$home/worker.sh" supervise "$folder" "$workdir" "$@" </dev/null >"$folder/log" 2>&1 &
  until [ -s "$folder/leader" ]; do sleep 0.1; done
}

supervise() { # FOLDER WORKDIR ARGUMENTS
  local folder=$1 workdir=$2 status=0
  shift 2
  echo $$ >"$folder/leader"
  cd "$home/code"
  # Without this, JAX would silently use the CPU if the TPU is not available.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
  export PYTHONUNBUFFERED=1 # so that follow.sh shows each line as soon as it is written
  "$home/venv/bin/python" -m mdrl_jax.main --workdir="$workdir" "$@" &
  echo $! >"$folder/process"
  wait $! || status=$?
  if [ -d "$workdir" ]; then # so that collect.sh copies the logs of all workers too
    mkdir -p "$workdir/launches"
    cp "$folder/log" "$workdir/launches/$(basename "$folder")-$(hostname).txt" || true
  fi
  echo "$status" >"$folder/status.new"
  mv "$folder/status.new" "$folder/status"
}

since() { # BYTES
  local now size=$1
  now=$(state) # read before the log, so that the log of a run that has ended is complete
  printf '\nmdrl-log %s\n' "$1"
  if [ -e "$run/log" ]; then
    size=$(stat -c %s "$run/log")
    tail -c "+$(($1 + 1))" "$run/log" | head -c "$((size - $1))" | sed -e "\$a\\" # adds a final newline if missing
  fi
  echo "mdrl-run $size $now"
}

stop() {
  local second
  if [ "$(state)" = running ] && [ -s "$run/process" ]; then
    kill -TERM "$(cat "$run/process")" 2>/dev/null || true
    for ((second = 0; second < MDRL_GRACE; second++)); do
      [ "$(state)" = running ] || break
      sleep 1
    done
  fi
  local left
  left=$(leftovers)
  # shellcheck disable=SC2086 # several process ids
  [ -z "$left" ] || kill -KILL $left 2>/dev/null || true
}

main() {
  local verb=$1
  # shellcheck source=/dev/null
  source "$home/environment"
  shift
  case $verb in
    install) install 2>&1 ;;
    launch) launch "$@" ;;
    supervise) supervise "$@" ;;
    since) since "$@" ;;
    stop) stop ;;
    state) echo "$(hostname) $(state)" ;;
    *) fail 2 "verb $verb is not known; known are install, launch, state, since and stop" ;;
  esac
}

# Both commands are on one line, so that bash does not read on in a file that copy.sh has replaced meanwhile.
main "$@"; exit $?
