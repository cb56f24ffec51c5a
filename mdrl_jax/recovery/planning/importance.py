"""Forecasts a score after a change of the parameters by importance weights on completions sampled before it.

A completion o of a prompt q was sampled at θ. At the changed parameters θ' it has the weight
w = π_θ'(o | q) / π_θ(o | q), the ratio for the whole completion. The score at θ' is estimated by Σ w r / Σ w
(self-normalised; Owen, Monte Carlo theory, methods and examples, §9.2). Nothing is sampled at θ', so a change costs one
forward pass.

Unlike the first order of `lookahead.py`, this forecast includes curvature of every order. Its weakness is that it
only knows the completions that were sampled. If few of them carry most of the weight, the forecast is uncertain. This
happens with long completions in which every token's probability changes. `effective` is the number of completions that
count.

Weights serve forecasts only. Damage is never measured with them (definitions §1).
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from mdrl_jax.recovery.planning.forecast import Floats, Shift, log_odds_of_sum
from mdrl_jax.stats.bootstrap import jackknife

ENOUGH = 32.0  # with fewer effective completions, the first-order forecast is used instead [chosen]


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """The effect of a change on one domain, as estimated by importance weights.

    Attributes:
      effective: effective number of completions, (Σ w)² / Σ w² (Kong, 1992).
      shift: shift of the domain's log-odds, with its sampling error over prompts; None if `effective` is below
        `ENOUGH`.
    """

    effective: float
    shift: Shift | None


def reweighted(log_ratio_PG: ArrayLike, rewards_PG: ArrayLike) -> Reweighted:
    """The importance-weighted shift of a domain's log-odds. Its error is a jackknife over prompts.

    The shift is the log-odds of Σ w r / Σ w minus that of the mean reward, each with half a success and half a failure
    added (`forecast.log_odds`).

    Args:
      log_ratio_PG: ln π_θ'(o | q) − ln π_θ(o | q), in nats, of G completions of each of P prompts, sampled at θ.
      rewards_PG: rewards in [0, 1] of these completions, an array of the same shape.

    Returns:
      The shift, with the effective number of completions; no shift if that number is below `ENOUGH`. The standard error
      is infinite if there is only one prompt.

    Raises:
      ValueError: if there are no completions, or if the two arrays do not have the same shape.

    >>> reweighted([[0.0, 0.0]] * 50, [[1.0, 0.0]] * 50)
    Reweighted(effective=100.0, shift=Shift(value=0.0, stderr=0.0))
    """
    ratio_PG, rewards_PG = np.asarray(log_ratio_PG, float), np.asarray(rewards_PG, float)
    if ratio_PG.shape != rewards_PG.shape:
        raise ValueError(f"log-ratios of shape {ratio_PG.shape}, but rewards of shape {rewards_PG.shape}")
    w_PG = np.exp(ratio_PG - ratio_PG.max())
    effective = float(w_PG.sum() ** 2 / np.sum(w_PG * w_PG))
    if effective < ENOUGH:
        return Reweighted(effective, None)
    # Sums of each prompt. The sums without a prompt are the total sums minus its own.
    sums_SP = np.stack([x.sum(axis=1) for x in (w_PG, w_PG * rewards_PG, rewards_PG, np.ones_like(w_PG))])
    total_S = sums_SP.sum(axis=1)
    without_P = _shift(*(total_S[:, None] - sums_SP))
    return Reweighted(effective, Shift(float(_shift(*total_S)), jackknife(0.0, without_P).stderr or 0.0))


def _shift(w: Floats, w_r: Floats, r: Floats, n: Floats) -> Floats:
    return log_odds_of_sum(n * w_r / w, n) - log_odds_of_sum(r, n)
