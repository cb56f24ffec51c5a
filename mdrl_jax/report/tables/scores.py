"""Scores as they are recorded, from evaluations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdrl_jax.stats.estimate import clustered_mean


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `scores.jsonl`, in points, of what `evaluations/NN-stage.json` holds."""
    rows = []
    for domain, rewards in evaluation["rewards"].items():
        mean, stderr = clustered_mean(np.asarray(rewards))
        accuracy, accuracy_stderr = clustered_mean(np.asarray(evaluation["accuracy"][domain]))
        rows.append(
            {
                "stage": evaluation["stage"],
                "index": evaluation["index"],
                "domain": domain,
                "score": 100 * mean,
                "stderr": 100 * stderr,
                "n_prompts": len(rewards),
                "k": evaluation["k"],
                "step": evaluation["step"],
                "seed": evaluation["seed"],
                "accuracy": 100 * accuracy,
                "accuracy_stderr": 100 * accuracy_stderr,
            }
        )
    return rows
