# shellcheck shell=bash disable=SC2034 # the scripts that source it use its variables
# Settings and functions of the scripts beside it, which source it.
#
# Settings are environment variables:
#   MDRL_TPU           name of the TPU and of its queued resource
#   MDRL_ZONE          e.g. us-west4-a; `gcloud compute tpus locations list` shows them
#   MDRL_PROJECT       default: the project of gcloud's configuration
#   MDRL_ACCELERATOR   v5litepod-16, v5p-16, v6e-16, ...
#   MDRL_RUNTIME       software of the machines; default: the one that Cloud documents for the accelerator and JAX
#   MDRL_SPOT          1: spot, cheaper, may be preempted (default); 0: on demand
#   MDRL_RESERVED      1: from the project's reservation, with MDRL_SPOT=0; default: 0
#   MDRL_BUCKET        bucket that every worker mounts at ~/mdrl/bucket with gcsfuse; default: none
#   MDRL_WORKDIR       work folder, on a file system that all workers share; default: mdrl/bucket/$MDRL_TPU.
#                      Relative paths begin at the home folder of the workers
#   MDRL_WHEEL         wheel to install instead of this checkout
#   MDRL_PASS          names of environment variables that the run gets, e.g. "HF_TOKEN MDRL_JUDGE_URL"
#   MDRL_PYTHON        Python of the workers, fetched where the image has another; default: 3.11
#   MDRL_PACKAGES_UNTIL  packages published later are not installed, so that a TPU created again has the same ones;
#                      default: the time of the checkout's commit; with a wheel, or if empty: no limit
#   MDRL_CREATE_FLAGS  more flags for creating, e.g. "--network=NAME --service-account=EMAIL"
#   MDRL_SSH_FLAGS     more flags for ssh and scp, e.g. "--internal-ip"
#   MDRL_RESTARTS      how often a run is started again at most; default: 20
#   MDRL_TRIES         how often a gcloud command is tried; default: 3
#   MDRL_POLL          seconds between two looks or tries; default: 30
#   MDRL_GRACE         seconds that a run has for saving when it is stopped; default: 120
#   MDRL_KEEP          1: run.sh leaves the TPU there when the run is over; default: 0
#
# Exit statuses: 0 done; 2 what you can put right (one line says what); 75 the TPU is lost, not to be had or not to be
# reached, so that trying again may help; 143 stopped, everything saved; any other is the run's own.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
exec 3>&1 # where --dry-run prints, also from within $(...)

: "${MDRL_TPU:=}" "${MDRL_ZONE:=}" "${MDRL_PROJECT:=}" "${MDRL_ACCELERATOR:=}" "${MDRL_RUNTIME:=}"
: "${MDRL_SPOT:=1}" "${MDRL_RESERVED:=0}" "${MDRL_BUCKET:=}" "${MDRL_WORKDIR:=}" "${MDRL_WHEEL:=}" "${MDRL_PASS:=}"
: "${MDRL_PYTHON:=3.11}" "${MDRL_CREATE_FLAGS:=}" "${MDRL_SSH_FLAGS:=}" "${MDRL_RESTARTS:=20}" "${MDRL_TRIES:=3}"
: "${MDRL_POLL:=30}" "${MDRL_GRACE:=120}" "${MDRL_KEEP:=0}" "${MDRL_DRY_RUN:=}"

say() { echo "mdrl: $*" >&2; }

fail() { # STATUS MESSAGE
  echo "mdrl: error: $2" >&2
  exit "$1"
}

usage() { # the comment at the head of the script, then the settings
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  echo
  sed -n '4,/^$/s/^# \{0,1\}//p' "$here/common.sh"
}

dry() { [ -n "$MDRL_DRY_RUN" ]; }

quoted() { # WORD...: as one line that a shell reads back as the same words
  local word escape="'\\''" space=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "%s'%s'" "$space" "${word//\'/$escape}" ;;
      *) printf '%s%s' "$space" "$word" ;;
    esac
    space=' '
  done
}

# Arguments of the script that sourced this file: what is left of them is in `arguments`.
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

only_flags() { # of scripts without arguments
  ((${#arguments[@]} == 0)) || fail 2 "argument ${arguments[0]} is not known; there are --dry-run and --help"
}

needs_config() { # of scripts whose arguments go to the run
  local argument found=
  ((${#arguments[@]})) || fail 2 "--config=FILE is missing; the arguments are those of python -m mdrl_jax.main"
  for argument in "${arguments[@]}"; do
    case $argument in
      --workdir | --workdir=*) fail 2 "$argument is not taken here; set MDRL_WORKDIR, which all workers share" ;;
      --config=*) found=1 ;;
    esac
  done
  [ -n "$found" ] || fail 2 "--config=FILE is missing, e.g. --config=configs/paper_qwen3_4b.py"
}

[[ $MDRL_TPU =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail 2 "MDRL_TPU='$MDRL_TPU' is not a name for a TPU; small letters, digits and dashes, beginning with a letter"
[ -n "$MDRL_ZONE" ] || fail 2 "MDRL_ZONE is not set, e.g. us-west4-a; gcloud compute tpus locations list shows them"
if [ -z "$MDRL_WORKDIR" ]; then
  [ -n "$MDRL_BUCKET" ] || fail 2 "neither MDRL_BUCKET nor MDRL_WORKDIR is set; all workers have to share a work folder"
  MDRL_WORKDIR=mdrl/bucket/$MDRL_TPU
fi
# scp reads other characters differently in its old and its new protocol.
[[ $MDRL_WORKDIR =~ ^[A-Za-z0-9_./-]+$ ]] ||
  fail 2 "MDRL_WORKDIR='$MDRL_WORKDIR' has characters that scp may not take; letters, digits and _ . / - are safe"
for name in MDRL_RESTARTS MDRL_TRIES MDRL_GRACE MDRL_POLL; do
  [[ ${!name} =~ ^[0-9]+(\.[0-9]+)?$ && ($name == MDRL_POLL || ${!name} != *.*) ]] ||
    fail 2 "$name='${!name}' is not a number of times or seconds"
done
dry || command -v gcloud >/dev/null ||
  fail 2 "gcloud is not on the path; https://cloud.google.com/sdk/docs/install says how to install it"

stage=${XDG_CACHE_HOME:-$HOME/.cache}/mdrl/$MDRL_TPU # what was copied, kept so that a new TPU gets the same
place=(--zone="$MDRL_ZONE")
[ -z "$MDRL_PROJECT" ] || place+=(--project="$MDRL_PROJECT")
transport=("${place[@]}")
for flag in $MDRL_SSH_FLAGS; do transport+=("$flag"); done
alive=-oServerAliveInterval=15 # a machine that is taken away does not close its connections
ssh=(gcloud compute tpus tpu-vm ssh "$MDRL_TPU" "${transport[@]}" --ssh-flag="$alive")
errors=/dev/null
dry || errors=$(mktemp)
trap 'dry || rm -f "$errors"' EXIT

says() { grep -qiE "$1" "$errors"; }

diagnose() { # sets `verdict` to an exit status and `advice` to what to do, by what gcloud wrote; fails where it is new
  verdict=2
  if says 'no more capacity|insufficient .*capacity|capacity .*not available|stockout'; then
    verdict=75 advice="$MDRL_ZONE has no capacity now; wait and try again, or take another zone or accelerator"
  elif says 'quota limit|quota.* (exceeded|exhausted)|RESOURCE_EXHAUSTED'; then
    advice="ask for quota at https://console.cloud.google.com/iam-admin/quotas, or take another zone or accelerator"
  elif says 'ALREADY_EXISTS|already exists'; then
    advice="go on with tpu_scripts/resume.sh, or remove it with tpu_scripts/delete.sh"
  elif says "on 'locations/|location .* (is|was) not found|invalid zone"; then
    advice="MDRL_ZONE=$MDRL_ZONE is wrong or closed to the project; gcloud compute tpus locations list shows the zones"
  elif says 'accelerator.?type'; then
    advice="gcloud compute tpus accelerator-types list --zone=$MDRL_ZONE shows what MDRL_ACCELERATOR can be"
  elif says 'runtime.?version|software version'; then
    advice="gcloud compute tpus tpu-vm versions list --zone=$MDRL_ZONE shows what MDRL_RUNTIME can be"
  elif says 'SERVICE_DISABLED|has not been used in project'; then
    advice="switch the API on: gcloud services enable tpu.googleapis.com"
  elif says 'active account|auth login|reauthentication|invalid_grant'; then
    advice="log in: gcloud auth login"
  elif says 'required property \[project\]'; then
    advice="set MDRL_PROJECT"
  elif says 'SSH key is not present in the SSH agent'; then
    advice="run: ssh-add ~/.ssh/google_compute_engine"
  elif says 'PERMISSION_DENIED|does not have permission|forbidden'; then
    advice="the account needs roles/tpu.admin and roles/iam.serviceAccountUser in the project"
  elif says 'unrecognized arguments|invalid choice'; then
    advice="see MDRL_CREATE_FLAGS and MDRL_SSH_FLAGS, and gcloud components update"
  elif says 'NOT_FOUND|This TPU has (terminal )?state'; then
    verdict=75 advice="the TPU is gone; tpu_scripts/resume.sh creates it again"
  else
    return 1
  fi
}

reason() { # the last complaint, of gcloud or of what ran on a worker, on one line
  local line
  line=$(grep '^ERROR: ' "$errors" | tail -n 1 | sed 's/^ERROR: ([^)]*) //') || true
  [ -n "$line" ] || line=$(grep -vE '^(#####|SSH: |SCP: |Using s.. batch)' "$errors" | tail -n 1 | tr '\t' ' ') || true
  echo "${line:-what it wrote is above}"
}

complain() { # WHAT: the one line about a failure that `diagnose` knows
  echo "mdrl: error: $1: $(reason) -- $advice" >&2
}

call() { # WHAT COMMAND...: runs gcloud, again where that can help; --dry-run prints it
  # A failure ends in one line on standard error and the status of what ran on the worker, or 2 or 75 if gcloud failed.
  # With absent_is=TEXT that text is the output, and no error, where the TPU does not exist.
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
    # 255 is ssh's own; what a remote command wrote must not be taken for gcloud's words.
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
      "see that the firewall lets port 22 through; tpu_scripts/resume.sh creates a broken TPU again" >&2
  else
    advice="it did not pass in $try tries; look at https://status.cloud.google.com and try again"
    complain "$what"
  fi
  return 75
}

failed_workers() { # those that gcloud says a command failed on
  local numbers
  numbers=$(sed -n 's/^##### Command execution on worker \([0-9]*\) failed.*/\1/p' "$errors" | sort -n | tr '\n' ' ')
  echo "${numbers:+ on worker ${numbers% }}"
}

unreachable() { # COMMAND...: which workers the failed ssh or scp could not reach
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

queued_state() { # CREATING, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, ...; ABSENT; then why it failed
  absent_is=ABSENT call "looking for $MDRL_TPU" gcloud compute tpus queued-resources describe "$MDRL_TPU" \
    "${place[@]}" --format='value(state.state,state.failedData.error.message)' || return
  ! dry || echo ACTIVE
}

tpu_state() { # READY or another state of the TPU itself; that of the queued resource where that is not ACTIVE
  local state
  state=$(queued_state) || return
  if [ "${state%%[[:space:]]*}" = ACTIVE ]; then
    state=$(absent_is=ABSENT call "looking at $MDRL_TPU" gcloud compute tpus tpu-vm describe "$MDRL_TPU" \
      "${place[@]}" --format='value(state)') || return
  fi
  echo "${state%%[[:space:]]*}"
}
