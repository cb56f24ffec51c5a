#!/usr/bin/env bash
# Starts `python -m mdrl_jax.main` on every worker, in the background.
# launch.sh --config=FILE [--config.a=b ...] [--dry-run]
# The arguments are those of the command `run`; the work folder is MDRL_WORKDIR. It does not end with a lost
# connection; follow.sh shows its output.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
needs_config
id=$(date -u +%Y%m%d-%H%M%S)-$$ # a launch that is tried again on all workers starts once on each
on all "launching on $MDRL_TPU" "bash mdrl/worker.sh launch $id $(quoted "$MDRL_WORKDIR" "${arguments[@]}")"
