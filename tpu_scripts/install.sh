#!/usr/bin/env bash
# Installs on every worker, in a virtual environment, the package that copy.sh copied, and mounts MDRL_BUCKET.
# install.sh [--dry-run]

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
on all "installing on $MDRL_TPU" "bash mdrl/worker.sh install"
