#!/usr/bin/env bash
# Installs what copy.sh copied, in an environment of its own on every worker, and mounts MDRL_BUCKET.
# install.sh [--dry-run]

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
on all "installing on $MDRL_TPU" "bash mdrl/worker.sh install"
