#!/usr/bin/env bash
# Runs an experiment from start to end: run.sh --config=FILE [--config.a=b ...] [--dry-run], arguments as for launch.sh
# It packs this checkout, creates the TPU, copies, installs, launches, keeps the run going (resume.sh), copies the work
# folder to runs/ and deletes the TPU. It deletes the TPU even if the run failed, unless MDRL_KEEP=1. The exit status
# is that of the run. --dry-run prints every command and runs none.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
needs_config
"$here/copy.sh" --pack
status=0
{ "$here/create.sh" && "$here/copy.sh" --again && "$here/install.sh" && "$here/launch.sh" "${arguments[@]}"; } ||
  status=$?
if ((status == 0 || status == 75)); then
  status=0
  "$here/resume.sh" "${arguments[@]}" || status=$?
else
  say "nothing was launched; tpu_scripts/delete.sh deletes $MDRL_TPU if it exists"
  exit "$status"
fi
((status != 130)) || exit 130
collected=0
"$here/collect.sh" || collected=$?
if ((collected)) || [ "$MDRL_KEEP" = 1 ]; then
  say "$MDRL_TPU is kept, and costs money, until tpu_scripts/delete.sh deletes it"
else
  "$here/delete.sh"
fi
((status)) || status=$collected
exit "$status"
