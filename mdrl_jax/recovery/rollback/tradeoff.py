"""What is won for what is paid, and two ways of paying compared at equal price (definitions §9, §12, C7).

A setting that was tried is a point: A's gain against B's loss. Settings of one control, a set's size or a strength,
are points of one curve. Its frontier at a loss ℓ is the most that A gains in the mean over a mixture of its settings,
and of removing nothing, with a mean loss of B of ℓ at most: the least concave, non-decreasing curve above the points
and (0, 0) [chosen]. It can be had, by drawing one of two models for each prompt, and it is hard on the set: noise only
raises a maximum, and a set that costs B nothing or less is held against the frontier at 0. Two things would favour the
set: settings far apart, whose mixture is worse than a setting in between, and a frontier that ends before the set's
loss, beyond which it is flat; `comparison.py` looks for settings close by and on either side.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.stats.bootstrap import percentile
from mdrl_jax.stats.estimate import Estimate, paired_difference

N_RESAMPLES = 2000
POINTS = 100.0  # in a reward of 1
Floats = NDArray[np.float64]
Rewards = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Differences to θ_T by prompt, in rewards: gains of A, and losses of B, each on its own prompts."""

    gain_P: Floats
    loss_P: Floats

    @property
    def gain(self) -> float:
        """A's mean gain, in rewards."""
        return float(self.gain_P.mean())

    @property
    def loss(self) -> float:
        """B's mean loss, in rewards."""
        return float(self.loss_P.mean())

    def affordable(self, limit: float) -> bool:
        """Whether B's mean loss is within a limit, in rewards."""
        return within(self.loss_P, limit)

    def record(self) -> dict[str, Any]:
        """Gain and loss in points, with intervals over prompts."""
        return {"gain": points(self.gain_P), "loss": points(self.loss_P)}


def outcome(before: Rewards, after: Rewards, domain: str, donor: str) -> Outcome:
    """Rewards [P, k] of both domains, before and after, on the same prompts with the same keys."""
    gain_PG, loss_PG = after[domain] - before[domain], before[donor] - after[donor]
    return Outcome(gain_PG.mean(axis=1, dtype=np.float64), loss_PG.mean(axis=1, dtype=np.float64))


def within(loss_P: Floats, limit: float) -> bool:
    """Whether a mean loss is within a limit; it may be just that, up to rounding."""
    return float(loss_P.mean()) <= limit + 1e-9


def points(difference_P: Floats) -> dict[str, Any]:
    """The mean of paired differences in rewards, as a record in points."""
    return paired_difference(difference_P, np.zeros_like(difference_P)).scaled(POINTS, "points").record(0.0)


def frontier(loss_RN: Floats, gain_RN: Floats, at_R: Floats) -> Floats:
    """The frontier of N settings at losses `at_R` (those below 0 count as 0), for R sets of points at once."""
    nothing = np.zeros((loss_RN.shape[0], 1))
    loss_RN, gain_RN = np.concatenate([nothing, loss_RN], axis=1), np.concatenate([nothing, gain_RN], axis=1)
    at_R = np.maximum(at_R, 0.0)
    best_R = np.where(loss_RN <= at_R[:, None], gain_RN, -np.inf).max(axis=1)
    for i, j in itertools.permutations(range(loss_RN.shape[1]), 2):
        between = (loss_RN[:, i] <= at_R) & (at_R < loss_RN[:, j])
        width_R = np.where(between, loss_RN[:, j] - loss_RN[:, i], 1.0)
        chord_R = gain_RN[:, i] + (gain_RN[:, j] - gain_RN[:, i]) * (at_R - loss_RN[:, i]) / width_R
        best_R = np.where(between, np.maximum(best_R, chord_R), best_R)
    return best_R


def carriers(settings: Sequence[Outcome], at: float) -> list[int]:
    """The one or two settings that the frontier rests on at a loss; of settings that gain nothing, the nearest."""
    if not settings:
        return []

    def height(chosen: Sequence[int]) -> float:
        return float(frontier(*_means([settings[i] for i in chosen]), np.array([at]))[0])

    groups = [c for n in (1, 2) for c in itertools.combinations(range(len(settings)), n)]
    best = max(groups, key=lambda c: (height(c), -len(c)))
    if height(best) > 0:
        return list(best)
    return [min(range(len(settings)), key=lambda i: abs(settings[i].loss - at))]


def at_equal_loss(ours: Outcome, control: Sequence[Outcome]) -> tuple[Estimate, float]:
    """A's gain minus the control's frontier at our loss of B, in points; and the frontier there.

    The interval is of a bootstrap that draws A's prompts and B's prompts, each with its group, and takes everything
    anew: gains, losses and frontier. All outcomes are on the same prompts.
    """
    everything = [ours, *control]

    def difference(gain_RN: Floats, loss_RN: Floats) -> tuple[Floats, Floats]:
        height_R = frontier(loss_RN[:, 1:], gain_RN[:, 1:], loss_RN[:, 0])
        return gain_RN[:, 0] - height_R, height_R

    loss_RN, gain_RN = _means(everything)
    value_R, height_R = difference(gain_RN, loss_RN)
    rng = np.random.default_rng(0)

    def drawn(values_NP: Floats) -> Floats:
        n = values_NP.shape[1]
        return rng.multinomial(n, np.full(n, 1 / n), N_RESAMPLES) @ values_NP.T / n

    gains, losses = (drawn(np.stack([getattr(o, name) for o in everything])) for name in ("gain_P", "loss_P"))
    n = min(ours.gain_P.size, ours.loss_P.size)
    estimate = percentile(float(value_R[0]), difference(gains, losses)[0], n)
    return estimate.scaled(POINTS, "points"), POINTS * float(height_R[0])


def _means(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """Losses and gains, [1, N] each."""
    return np.array([[o.loss for o in outcomes]]), np.array([[o.gain for o in outcomes]])
