"""What happened to single answers between two checkpoints, and pass@k (definitions §2).

An answer is one completion of one prompt. It is right if its reward reaches a threshold. Checkpoints are scored on the
same prompts with the same sampling keys, so answer j of a prompt before and answer j after belong together. The unit of
all intervals is the prompt, or its group.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.estimate import Estimate

Answers = NDArray[np.bool_]
ROUNDING = 1e-6  # of a float32 reward


def right(rewards_PG: ArrayLike, threshold: float) -> Answers:
    """Which answers are right, bool [P, G]: those with a reward of at least `threshold`, up to float32 rounding."""
    return np.asarray(rewards_PG, float) >= threshold - ROUNDING


def pass_at_k(right_PG: Answers, k: int) -> NDArray[np.float64]:
    """The probability that one of k answers of a prompt is right, without bias: 1 − C(n − c, k) / C(n, k).

    Args:
      right_PG: which of the n = G answers of each prompt are right; c is their number.
      k: number of answers, from 1 to G. With G it is 1 if any answer is right.

    Returns:
      One value for each prompt [P], in [0, 1] (Chen et al., arXiv 2107.03374).

    Raises:
      ValueError: if `k` is below 1 or above G.
    """
    n = right_PG.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 to {n} answers of a prompt")
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in right_PG.sum(axis=1).tolist()])


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The answers of one domain that changed between two checkpoints, as shares of all its answers, in points.

    Attributes:
      lost: right before and wrong after.
      gained: wrong before and right after.
      net: gained minus lost, which is the change of pass@1.
      resampled: the null of `lost` and of `gained`: the share of pairs of two answers of one prompt, both drawn before,
        of which the first is right and the second wrong. It is what other sampling keys change at one checkpoint. None
        with a single answer a prompt.
      lost_beyond: `lost` minus `resampled`, paired by prompt; None as that.
      gained_beyond: the same of `gained`.
    """

    lost: Estimate
    gained: Estimate
    net: Estimate
    resampled: Estimate | None
    lost_beyond: Estimate | None
    gained_beyond: Estimate | None


def transitions(before_PG: Answers, after_PG: Answers, groups: ArrayLike | None = None) -> Transitions:
    """Compares the answers at two checkpoints, prompt by prompt and sample by sample.

    Shares have the interval of scores (`estimate.score`: Wilson's, with the prompt as the cluster), differences that of
    paired differences (`estimate.paired_difference`).

    Args:
      before_PG, after_PG: which answers are right, G of each of P prompts.
      groups: number of each prompt's group [P]; None if every prompt is a group of its own.

    Returns:
      The shares and their differences, in points. With a single answer a prompt there is no null: `resampled`,
      `lost_beyond` and `gained_beyond` are None.

    Raises:
      ValueError: if the two do not have the same shape, or there are no answers.
    """
    if before_PG.shape != after_PG.shape:
        raise ValueError(f"transitions need the same prompts and samples: {before_PG.shape} against {after_PG.shape}")
    lost_PG, gained_PG = before_PG & ~after_PG, ~before_PG & after_PG
    n, right_P = before_PG.shape[1], before_PG.sum(axis=1)
    resampled = lost_beyond = gained_beyond = None
    if n > 1:
        # Of the n(n − 1) ordered pairs of a prompt's answers, c(n − c) begin right and end wrong.
        resampled_P = right_P * (n - right_P) / (n * (n - 1))
        resampled = statistics.score(resampled_P, groups)
        lost_beyond, gained_beyond = (
            statistics.paired_difference(share_PG, resampled_P, groups).in_points() for share_PG in (lost_PG, gained_PG)
        )
    return Transitions(
        lost=statistics.score(lost_PG, groups),
        gained=statistics.score(gained_PG, groups),
        net=statistics.paired_difference(after_PG, before_PG, groups).in_points(),
        resampled=resampled,
        lost_beyond=lost_beyond,
        gained_beyond=gained_beyond,
    )
