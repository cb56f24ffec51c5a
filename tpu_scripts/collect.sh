#!/usr/bin/env bash
# Copies the work folder to this machine, to FOLDER/NAME-OF-WORK-FOLDER: collect.sh [FOLDER; default: runs] [--dry-run]
# A work folder in MDRL_BUCKET is copied from the bucket and needs no TPU; any other is copied from worker 0.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
((${#arguments[@]} <= 1)) || fail 2 "argument ${arguments[1]} is not known; collect.sh takes one folder"
folder=${arguments[0]:-runs}
target=$folder/$(basename "$MDRL_WORKDIR")
dry || mkdir -p "$target"
case $MDRL_BUCKET:$MDRL_WORKDIR in
  ?*:mdrl/bucket/*)
    project=()
    [ -z "$MDRL_PROJECT" ] || project=(--project="$MDRL_PROJECT")
    call "collecting $MDRL_WORKDIR" gcloud storage rsync "gs://$MDRL_BUCKET/${MDRL_WORKDIR#mdrl/bucket/}" "$target" \
      --recursive ${project[@]+"${project[@]}"}
    ;;
  *) call "collecting $MDRL_WORKDIR" gcloud compute tpus tpu-vm scp "$MDRL_TPU:$MDRL_WORKDIR" "$folder" \
    "${transport[@]}" --scp-flag="$alive" --worker=0 --recurse ;;
esac
dry || say "the work folder was copied to $target"
