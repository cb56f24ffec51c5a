# shellcheck shell=bash disable=SC2034 # the scripts that source it use its variables
# Settings and functions shared by the scripts in this folder, which source this file.
#
# Settings are environment variables:
#   MDRL_TPU           name of the TPU and of its queued resource
#   MDRL_ZONE          zone, e.g. us-west4-a; `gcloud compute tpus locations list` shows all zones
#   MDRL_PROJECT       Google Cloud project; default: the project of gcloud's configuration
#   MDRL_ACCELERATOR   type of the TPU: v5litepod-16, v5p-16, v6e-16, ...
#   MDRL_RUNTIME       software image of the machines; default: the one that Google Cloud documents for the type and JAX
#   MDRL_SPOT          1: a spot TPU, which is cheaper but may be preempted (default); 0: on demand
#   MDRL_RESERVED      1: a TPU from the project's reservation, needs MDRL_SPOT=0; default: 0
#   MDRL_BUCKET        bucket that every worker mounts at ~/mdrl/bucket with gcsfuse; default: none
#   MDRL_WORKDIR       work folder, on a file system that all workers share; default: mdrl/bucket/$MDRL_TPU.
#                      Relative paths start at the home folder of the workers
#   MDRL_WHEEL         wheel to install instead of this checkout
#   MDRL_PASS          names of environment variables to pass on to the run, e.g. "HF_TOKEN MDRL_JUDGE_URL"
#   MDRL_PYTHON        Python version on the workers, downloaded if the image has another; default: 3.11
#   MDRL_PACKAGES_UNTIL  install no package published after this time, so that a TPU created again gets the same
#                      packages; default: the time of the checkout's commit; empty, or with a wheel: no limit
#   MDRL_CREATE_FLAGS  more flags for creating the TPU, e.g. "--network=NAME --service-account=EMAIL"
#   MDRL_SSH_FLAGS     more flags for ssh and scp, e.g. "--internal-ip"
#   MDRL_RESTARTS      largest number of times that a run is started again; default: 20
#   MDRL_TRIES         largest number of times that a gcloud command is tried; default: 3
#   MDRL_POLL          seconds between two checks or tries; default: 30
#   MDRL_GRACE         seconds that a stopped run has to save before it is killed; default: 120
#   MDRL_KEEP          1: run.sh does not delete the TPU at the end; default: 0
#
# Exit statuses: 0 done; 2 an error that you can put right, described in one line; 75 the TPU is lost, not available or
# not reachable, so trying again may help; 143 stopped, everything is saved; any other status is that of the run.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
exec 3>&1 # --dry-run prints here, because standard output may be captured by $(...)

: "${MDRL_TPU:=}" "${MDRL_ZONE:=}" "${MDRL_PROJECT:=}" "${MDRL_ACCELERATOR:=}" "${MDRL_RUNTIME:=}"
: "${MDRL_SPOT:=1}" "${MDRL_RESERVED:=0}" "${MDRL_BUCKET:=}" "${MDRL_WORKDIR:=}" "${MDRL_WHEEL:=}" "${MDRL_PASS:=}"
: "${MDRL_PYTHON:=3.11}" "${MDRL_CREATE_FLAGS:=}" "${MDRL_SSH_FLAGS:=}" "${MDRL_RESTARTS:=20}" "${MDRL_TRIES:=3}"
: "${MDRL_POLL:=30}" "${MDRL_GRACE:=120}" "${MDRL_KEEP:=0}" "${MDRL_DRY_RUN:=}"

say() { echo "mdrl: $*" >&2; }

fail() { # STATUS MESSAGE
  echo "mdrl: error: $2" >&2
  exit "$1"
}

usage() { # prints the comment at the head of the script, then the settings
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  echo
  sed -n '4,/^$/s/^# \{0,1\}//p' "$here/common.sh"
}

dry() { [ -n "$MDRL_DRY_RUN" ]; }

quoted() { # WORD...: prints one line that a shell reads back as the same words
  local word escape="'\\''" space=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "%s'%s'" "$space" "${word//\'/$escape}" ;;
      *) printf '%s%s' "$space" "$word" ;;
    esac
    space=' '
  done
}

# Handles --help and --dry-run of the script that sourced this file; its other arguments go to `arguments`.
arguments=()
for argument; do
  case $argument in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run) export MDRL_DRY_RUN=1 ;;
    *) arguments+=("$argument") ;;
  esac
done

only_flags() { # for scripts that take no arguments
  ((${#arguments[@]} == 0)) || fail 2 "argument ${arguments[0]} is not known; known are --dry-run and --help"
}

needs_config() { # for scripts whose arguments go to the run
  local argument found=
  ((${#arguments[@]})) || fail 2 "--config=FILE is missing; the arguments are those of python -m mdrl_jax.main run"
  for argument in "${arguments[@]}"; do
    case $argument in
      --workdir | --workdir=*) fail 2 "$argument is not allowed here; set MDRL_WORKDIR, which all workers share" ;;
      --config=*) found=1 ;;
    esac
  done
  [ -n "$found" ] || fail 2 "--config=FILE is missing, e.g. --config=configs/paper_qwen3_4b.py"
}

[[ $MDRL_TPU =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail 2 "MDRL_TPU='$MDRL_TPU' is not a valid name; use small letters, digits and dashes, with a letter first"
[ -n "$MDRL_ZONE" ] || fail 2 "MDRL_ZONE is not set, e.g. us-west4-a; gcloud compute tpus locations list shows them"
if [ -z "$MDRL_WORKDIR" ]; then
  [ -n "$MDRL_BUCKET" ] || fail 2 "neither MDRL_BUCKET nor MDRL_WORKDIR is set; all workers must share a work folder"
  MDRL_WORKDIR=mdrl/bucket/$MDRL_TPU
fi
# The old and the new protocol of scp treat other characters differently.
[[ $MDRL_WORKDIR =~ ^[A-Za-z0-9_./-]+$ ]] ||
  fail 2 "MDRL_WORKDIR='$MDRL_WORKDIR' has characters that scp may not accept; use letters, digits and _ . / -"
for name in MDRL_RESTARTS MDRL_TRIES MDRL_GRACE MDRL_POLL; do
  [[ ${!name} =~ ^[0-9]+(\.[0-9]+)?$ && ($name == MDRL_POLL || ${!name} != *.*) ]] ||
    fail 2 "$name='${!name}' is not a number; give a whole number, or seconds such as 0.5 in MDRL_POLL"
done
dry || command -v gcloud >/dev/null ||
  fail 2 "gcloud is not on the path; install it as in https://cloud.google.com/sdk/docs/install"

stage=${XDG_CACHE_HOME:-$HOME/.cache}/mdrl/$MDRL_TPU # the packed program, kept so that a new TPU gets the same one
place=(--zone="$MDRL_ZONE")
[ -z "$MDRL_PROJECT" ] || place+=(--project="$MDRL_PROJECT")
transport=("${place[@]}")
for flag in $MDRL_SSH_FLAGS; do transport+=("$flag"); done
alive=-oServerAliveInterval=15 # a preempted machine does not close its connections, so ssh must notice by itself
ssh=(gcloud compute tpus tpu-vm ssh "$MDRL_TPU" "${transport[@]}" --ssh-flag="$alive")
errors=/dev/null
dry || errors=$(mktemp)
trap 'dry || rm -f "$errors"' EXIT

says() { grep -qiE "$1" "$errors"; }

diagnose() { # sets `verdict` (exit status) and `advice` from gcloud's error text; fails if the error is not a known one
  verdict=2
  if says 'no more capacity|insufficient .*capacity|capacity .*not available|stockout'; then
    verdict=75 advice="$MDRL_ZONE has no capacity now; wait and try again, or use another zone or accelerator"
  elif says 'quota limit|quota.* (exceeded|exhausted)|RESOURCE_EXHAUSTED'; then
    advice="ask for quota at https://console.cloud.google.com/iam-admin/quotas, or use another zone or accelerator"
  elif says 'ALREADY_EXISTS|already exists'; then
    advice="continue with tpu_scripts/resume.sh, or delete it with tpu_scripts/delete.sh"
  elif says "on 'locations/|location .* (is|was) not found|invalid zone"; then
    advice="MDRL_ZONE=$MDRL_ZONE is wrong or closed to the project; gcloud compute tpus locations list shows the zones"
  elif says 'accelerator.?type'; then
    advice="gcloud compute tpus accelerator-types list --zone=$MDRL_ZONE shows the values of MDRL_ACCELERATOR"
  elif says 'runtime.?version|software version'; then
    advice="gcloud compute tpus tpu-vm versions list --zone=$MDRL_ZONE shows the values of MDRL_RUNTIME"
  elif says 'SERVICE_DISABLED|has not been used in project'; then
    advice="enable the API: gcloud services enable tpu.googleapis.com"
  elif says 'active account|auth login|reauthentication|invalid_grant'; then
    advice="log in: gcloud auth login"
  elif says 'required property \[project\]'; then
    advice="set MDRL_PROJECT"
  elif says 'SSH key is not present in the SSH agent'; then
    advice="run: ssh-add ~/.ssh/google_compute_engine"
  elif says 'PERMISSION_DENIED|does not have permission|forbidden'; then
    advice="the account needs roles/tpu.admin and roles/iam.serviceAccountUser in the project"
  elif says 'unrecognized arguments|invalid choice'; then
    advice="check MDRL_CREATE_FLAGS and MDRL_SSH_FLAGS, or run: gcloud components update"
  elif says 'NOT_FOUND|This TPU has (terminal )?state'; then
    verdict=75 advice="the TPU is gone; tpu_scripts/resume.sh creates it again"
  else
    return 1
  fi
}

reason() { # prints the last error, of gcloud or of the command on a worker, on one line
  local line
  line=$(grep '^ERROR: ' "$errors" | tail -n 1 | sed 's/^ERROR: ([^)]*) //') || true
  [ -n "$line" ] || line=$(grep -vE '^(#####|SSH: |SCP: |Using s.. batch)' "$errors" | tail -n 1 | tr '\t' ' ') || true
  echo "${line:-its output is above}"
}

complain() { # WHAT: prints the one line about a failure, with the advice
  echo "mdrl: error: $1: $(reason) -- $advice" >&2
}

call() { # WHAT COMMAND...: runs a gcloud command and repeats it if that may help; with --dry-run, only prints it
  # On failure it prints one line to standard error and returns the status of the command on the worker, or 2 or 75 if
  # gcloud itself failed. If absent_is=TEXT is set and the TPU does not exist, it prints TEXT and succeeds.
  local what=$1 try status
  shift
  if dry; then
    printf '%s\n' "$(quoted "$@")" >&3
    return 0
  fi
  for ((try = 1; ; try++)); do
    status=0
    "$@" </dev/null 2>"$errors" || status=$?
    ((status)) || return 0
    if [ -n "${absent_is:-}" ] && says NOT_FOUND; then
      echo "$absent_is"
      return 0
    fi
    # Status 255 comes from ssh itself. The text of a remote command must not be mistaken for an error of gcloud.
    if ((status != 255)) && ! says '^ERROR: \(gcloud'; then
      echo "mdrl: error: $what: status $status$(failed_workers); $(reason)" >&2
      return "$status"
    elif ((status != 255)) && diagnose; then
      complain "$what"
      return "$verdict"
    fi
    ((try < MDRL_TRIES)) || break
    say "$what: $(reason); trying again in $MDRL_POLL s"
    sleep "$MDRL_POLL"
  done
  if ((status == 255)); then
    echo "mdrl: error: $what: $(unreachable "$@") by ssh after $try tries --" \
      "check that the firewall allows port 22; tpu_scripts/resume.sh replaces a broken TPU" >&2
  else
    advice="it failed in $try tries; look at https://status.cloud.google.com and try again"
    complain "$what"
  fi
  return 75
}

failed_workers() { # prints the workers on which, by gcloud's error text, a command failed
  local numbers
  numbers=$(sed -n 's/^##### Command execution on worker \([0-9]*\) failed.*/\1/p' "$errors" | sort -n | tr '\n' ' ')
  echo "${numbers:+ on worker ${numbers% }}"
}

unreachable() { # COMMAND...: prints which workers the failed ssh or scp could not reach
  local word workers='' i missing=
  for word; do case $word in --worker=*) workers=${word#--worker=} ;; esac done
  if [ "$workers" = all ]; then
    workers=$(gcloud compute tpus tpu-vm describe "$MDRL_TPU" "${place[@]}" \
      --format='value(networkEndpoints.len())' </dev/null 2>/dev/null) || workers=0
    for ((i = 0; i < workers; i++)); do
      "${ssh[@]}" --worker="$i" --command=true </dev/null >/dev/null 2>&1 || missing="$missing $i"
    done
    workers=${missing# }
  fi
  echo "worker ${workers:-(not known which)} of $MDRL_TPU cannot be reached"
}

on() { # WORKERS WHAT COMMAND: runs a command line on one worker or on `all`
  call "$2" "${ssh[@]}" --worker="$1" --command="$3"
}

queued_state() { # prints WAITING_FOR_RESOURCES, ACTIVE or another state, or ABSENT; then the reason of a failure
  absent_is=ABSENT call "looking for $MDRL_TPU" gcloud compute tpus queued-resources describe "$MDRL_TPU" \
    "${place[@]}" --format='value(state.state,state.failedData.error.message)' || return
  ! dry || echo ACTIVE
}

tpu_state() { # prints the state of the TPU, e.g. READY; if the queued resource is not ACTIVE, the state of that
  local state
  state=$(queued_state) || return
  if [ "${state%%[[:space:]]*}" = ACTIVE ]; then
    state=$(absent_is=ABSENT call "looking at $MDRL_TPU" gcloud compute tpus tpu-vm describe "$MDRL_TPU" \
      "${place[@]}" --format='value(state)') || return
  fi
  echo "${state%%[[:space:]]*}"
}
