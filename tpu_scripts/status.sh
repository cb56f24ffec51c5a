#!/usr/bin/env bash
# Shows the state of the TPU and of the run on each worker: status.sh [--dry-run]
# The state of a run is none, running, lost (it ended without an exit status), or its exit status.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
state=$(tpu_state)
dry || echo "$MDRL_TPU $state"
if [ "$state" = READY ] || dry; then
  on all "asking all workers of $MDRL_TPU" "bash mdrl/worker.sh state"
fi
