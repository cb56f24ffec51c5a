"""What a change of parameters does to a score, from completions drawn before it: importance weights.

A completion o of a prompt q that was drawn at θ has, at θ', the weight w = π_θ'(o | q) / π_θ(o | q) of the whole
completion, and the score at θ' is Σ w r / Σ w (self-normalised; Owen, Monte Carlo theory, methods and examples, §9.2).
Nothing is sampled at θ': a change costs one forward pass. It has no order: what bends on the way is in it, where the
slope of `slopes` goes straight on. But it sees only what was drawn: with weights of few completions it knows little,
and long completions whose every token changes have such weights. `effective` says how many there are.

It foretells; damage is never measured so (definitions §1).
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from mdrl_jax.recovery.planning.forecast import Floats, Shift, log_odds_of_sum
from mdrl_jax.stats.bootstrap import jackknife

ENOUGH = 32.0  # effective completions: with fewer a forecast is by slope [chosen]


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """What weights say of one domain after a change.

    Attributes:
      effective: completions that count, (Σ w)² / Σ w² (Kong, 1992).
      shift: of its log-odds, with the sampling error over prompts; None where fewer than `ENOUGH` count.
    """

    effective: float
    shift: Shift | None


def reweighted(log_ratio_PG: ArrayLike, rewards_PG: ArrayLike) -> Reweighted:
    """The shift of a domain's log-odds; its error leaves out one prompt at a time.

    Args:
      log_ratio_PG: ln π_θ'(o | q) − ln π_θ(o | q) of G completions of each of P prompts, drawn at θ.
      rewards_PG: their rewards.

    >>> reweighted([[0.0, 0.0]] * 50, [[1.0, 0.0]] * 50)
    Reweighted(effective=100.0, shift=Shift(value=0.0, stderr=0.0))
    """
    ratio_PG, rewards_PG = np.asarray(log_ratio_PG, float), np.asarray(rewards_PG, float)
    w_PG = np.exp(ratio_PG - ratio_PG.max())
    effective = float(w_PG.sum() ** 2 / np.sum(w_PG * w_PG))
    if effective < ENOUGH:
        return Reweighted(effective, None)
    # Sums by prompt: those without it are those of all less its own.
    sums_SP = np.stack([x.sum(axis=1) for x in (w_PG, w_PG * rewards_PG, rewards_PG, np.ones_like(w_PG))])
    total_S = sums_SP.sum(axis=1)
    without_P = _shift(*(total_S[:, None] - sums_SP))
    return Reweighted(effective, Shift(float(_shift(*total_S)), jackknife(0.0, without_P).stderr or 0.0))


def _shift(w: Floats, w_r: Floats, r: Floats, n: Floats) -> Floats:
    return log_odds_of_sum(n * w_r / w, n) - log_odds_of_sum(r, n)
