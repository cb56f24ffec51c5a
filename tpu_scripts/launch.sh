#!/usr/bin/env bash
# Starts `python -m mdrl_jax.main` on every worker, in the background.
# launch.sh --config=FILE [--config.a=b ...] [--dry-run]
# The arguments are those of the command `run`; the work folder is MDRL_WORKDIR. The run does not end if the connection
# is lost; follow.sh shows its output.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
needs_config
id=$(date -u +%Y%m%d-%H%M%S)-$$ # if `call` repeats the launch, workers that have started this id do not start again
on all "launching on $MDRL_TPU" "bash mdrl/worker.sh launch $id $(quoted "$MDRL_WORKDIR" "${arguments[@]}")"
