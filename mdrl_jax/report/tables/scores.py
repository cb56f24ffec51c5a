"""The rows of `scores.jsonl`, from the record of an evaluation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdrl_jax.stats.estimate import clustered_mean
from mdrl_jax.stats.transitions import right


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of one stage.

    Args:
      evaluation: the content of `evaluations/NN-stage.json`.

    Returns:
      A row of `scores.jsonl` for each domain: "stage", "index", "domain", "score", "stderr", "n_prompts", "k" (samples
      of a prompt), "step", "seed", "accuracy", "accuracy_stderr", "pass_at_k" and "right_from". Scores, accuracies,
      pass@k and standard errors are in points. pass@k is the share of prompts with a right answer among their k; a
      right one has a reward of at least "right_from" (`Domain.right_from`; 1 where the record does not say). The
      standard error is that of the prompts, or of their groups where the record has any, and infinite for a single one.

    Raises:
      KeyError: if the record lacks a field, or a domain has rewards but no accuracy.
      ValueError: if a domain has no prompts, its prompts differ in their number of samples, or its groups have another
        number of prompts.
    """
    rows, groups = [], evaluation.get("groups", {})
    for domain, rewards in evaluation["rewards"].items():
        threshold = evaluation.get("right_from", {}).get(domain, 1.0)
        mean, stderr = clustered_mean(np.asarray(rewards), groups.get(domain))
        accuracy, accuracy_stderr = clustered_mean(np.asarray(evaluation["accuracy"][domain]), groups.get(domain))
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
                "pass_at_k": 100 * float(right(rewards, threshold).any(axis=1).mean()),
                "right_from": threshold,
            }
        )
    return rows
