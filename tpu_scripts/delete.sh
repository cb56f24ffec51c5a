#!/usr/bin/env bash
# Deletes the TPU and its queued resource, but no work folder in a bucket or on NFS: delete.sh [--dry-run]

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
only_flags
absent_is="mdrl: $MDRL_TPU does not exist" call "deleting $MDRL_TPU" \
  gcloud compute tpus queued-resources delete "$MDRL_TPU" "${place[@]}" --force --quiet
