#!/usr/bin/env bash
# Stops the run on every worker: it saves and ends, or is killed after MDRL_GRACE seconds: stop.sh [--dry-run]
# Launching it again with the same arguments continues it.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
on all "stopping the run on $MDRL_TPU" "[ ! -e mdrl/worker.sh ] || bash mdrl/worker.sh stop"
