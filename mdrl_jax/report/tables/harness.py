"""Reads results of lm-evaluation-harness, so that they stand beside ours in a score table.

`lm_eval --output_path=FOLDER` writes `FOLDER/MODEL/results_DATE.json`. Its field `results` has by task the metrics,
named "METRIC,FILTER", and their standard errors.
"""

import math
from pathlib import Path
from typing import Any

from mdrl_jax import records
from mdrl_jax.errors import UserError


def read(path: str | Path) -> list[dict[str, Any]]:
    """The score of each task: the first metric that the harness lists for it, of those for which more is better.

    Args:
      path: a results file, or a folder of them, of which the newest is read.

    Returns:
      For each task {"domain": its name, "metric", "score" and "stderr" in points (100 × the metric), "n_prompts"}, in
      the order of the file. The standard error is infinite, and the number of prompts 0, if the file has no number
      there.

    Raises:
      UserError: if there is no results file, it has another form, or none of its tasks has a metric from 0 to 1 for
        which more is better.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError(f"{path} has no results_*.json of lm-evaluation-harness; run lm_eval with --output_path")
        path = found[-1]
    if not path.exists():
        raise UserError(f"{path} does not exist; give what lm_eval wrote by --output_path")
    whole = records.json_object(path)
    results = whole.get("results")
    if not isinstance(results, dict) or not all(isinstance(task, dict) for task in results.values()):
        raise UserError(f'{path} is no results file of lm-evaluation-harness: it has no object "results" of tasks')
    rows = [row for name, task in results.items() if (row := _row(name, task, whole))]
    if not rows:
        raise UserError(f"{path} has no task with a metric from 0 to 1 for which more is better")
    return rows


def _about(whole: dict[str, Any], field: str, name: str) -> dict[str, Any]:
    """Returns the section of a task in a field of the file; {} if there is none."""
    by_task = whole.get(field)
    found = by_task.get(name) if isinstance(by_task, dict) else None
    return found if isinstance(found, dict) else {}


def _row(name: str, task: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    better, counts = (_about(whole, field, name) for field in ("higher_is_better", "n-samples"))
    for key, value in task.items():
        metric, _, filtered = key.partition(",")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not filtered or metric.endswith("_stderr") or better.get(metric) is False or not number:
            continue
        if not 0 <= value <= 1:
            continue
        error = task.get(f"{metric}_stderr,{filtered}")
        stderr = 100 * error if isinstance(error, int | float) and math.isfinite(error) else math.inf
        n = counts.get("effective")
        n = n if isinstance(n, int) and not isinstance(n, bool) else 0
        return {"domain": name, "metric": key, "score": 100 * value, "stderr": stderr, "n_prompts": n}
    return None
