#!/usr/bin/env bash
# Keeps a run going until it is done: resume.sh --config=FILE [--config.a=b ...] [--dry-run], arguments as for launch.sh
# The script follows the run. If the TPU was preempted, failed or does not answer, it is deleted and created again, with
# the same program. If only the run stopped or crashed, only the run is started again. In both cases the run continues
# from its work folder, at most MDRL_RESTARTS times. A run that ended with status 2 is never started again.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
needs_config

ready() { # makes sure that there is a TPU without a run on it: the present one, or else a new one
  local state stopped=0
  while true; do
    state=$(tpu_state) || return
    case $state in
      # The TPU is coming up, from the queue or after maintenance.
      ACCEPTED | CREATING | WAITING_FOR_RESOURCES | PROVISIONING | STARTING | RESTARTING | REIMAGING | REPAIRING) ;;
      *) break ;;
    esac
    sleep "$MDRL_POLL"
  done
  if [ "$state" = READY ]; then
    "$here/stop.sh" || stopped=$?
    ((stopped == 75)) || return "$stopped"
  fi
  "$here/delete.sh" && "$here/create.sh"
}

again() { ready && "$here/copy.sh" --again && "$here/install.sh" && "$here/launch.sh" "${arguments[@]}"; }

status=0
"$here/follow.sh" || status=$?
if dry; then
  echo "# after a preemption, at most $MDRL_RESTARTS times:"
  again
  "$here/follow.sh"
  exit 0
fi
for ((restart = 1; status != 0 && status != 2 && status != 130; restart++)); do
  ((restart <= MDRL_RESTARTS)) ||
    fail "$status" "ended with status $status after $MDRL_RESTARTS restarts; MDRL_RESTARTS allows more"
  say "ended with status $status; restart $restart of at most $MDRL_RESTARTS"
  status=0
  again || status=$?
  if ((status)); then
    sleep "$MDRL_POLL"
  else
    "$here/follow.sh" || status=$?
  fi
done
exit "$status"
