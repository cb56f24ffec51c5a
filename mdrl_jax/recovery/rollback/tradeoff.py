"""A's gain against B's loss, and two ways of removing coordinates compared at equal loss (definitions §9, §12, C7).

Each setting that is tried gives A a gain and B a loss. The settings of one control differ in the size of the set or in
the strength. The frontier of a control at a loss ℓ is the largest mean gain of A over mixtures of its settings and of
removing nothing, among the mixtures with a mean loss of B of at most ℓ. In the plane of loss and gain this is the least
concave, non-decreasing curve above all settings and (0, 0) [chosen]. The mixture can be realised by drawing one of two
models for each prompt.

The comparison is strict with the chosen set: noise only raises a maximum, and a set that costs B nothing or less is
compared with the frontier at 0. Two things would favour the set: settings that are far apart, because their mixture is
worse than a setting in between, and a frontier that ends before the set's loss, because beyond its end it is flat.
Therefore `comparison.py` tries settings close to the set's loss and on either side of it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.stats.bootstrap import expanded_percentile, prompt_weights
from mdrl_jax.stats.estimate import LEVEL, POINTS, Estimate, Record, paired_difference, student

Floats = NDArray[np.float64]
Rewards = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The effect of a rollback, by prompt.

    Attributes:
      gain_P: reward after − reward before on each prompt of A.
      loss_P: reward before − reward after on each prompt of B.
    """

    gain_P: Floats
    loss_P: Floats

    def joined(self, other: "Outcome", share: float) -> "Outcome":
        """The outcome over the completions of both, which are of the same prompts; `share` of all are `other`'s."""
        pairs = zip((self.gain_P, self.loss_P), (other.gain_P, other.loss_P), strict=True)
        return Outcome(*((1 - share) * mine + share * more for mine, more in pairs))

    @property
    def gain(self) -> float:
        """A's mean gain, in rewards."""
        return float(self.gain_P.mean())

    @property
    def loss(self) -> float:
        """B's mean loss, in rewards."""
        return float(self.loss_P.mean())

    def affordable(self, limit: float) -> bool:
        """Whether B's mean loss is at most `limit`, in rewards, up to rounding."""
        return within(self.loss_P, limit)

    def record(self) -> dict[str, Any]:
        """Gain and loss in points, with intervals over prompts."""
        return {"gain": mean_in_points(self.gain_P), "loss": mean_in_points(self.loss_P)}


def outcome(before: Rewards, after: Rewards, domain: str, donor: str) -> Outcome:
    """The outcome from the rewards before and after a rollback.

    Args:
      before: rewards [P, k] by domain at θ_T.
      after: rewards [P, k] by domain after the rollback, on the same prompts with the same sampling keys.
      domain: A.
      donor: B.

    Returns:
      Gain and loss of each prompt, in rewards.

    Raises:
      KeyError: if the rewards of A or of B are missing.
      ValueError: if rewards before and after are on different numbers of prompts.
    """
    gain_PG, loss_PG = after[domain] - before[domain], before[donor] - after[donor]
    return Outcome(gain_PG.mean(axis=1, dtype=np.float64), loss_PG.mean(axis=1, dtype=np.float64))


def within(loss_P: Floats, limit: float) -> bool:
    """Whether the mean of a loss over prompts [P] is at most `limit` + 1e-9, in the same unit; False if P is 0."""
    return float(loss_P.mean()) <= limit + 1e-9


def mean_in_points(difference_P: Floats) -> Record:
    """The mean of one paired difference for each prompt [P], in rewards, as a record in points.

    The record (`Estimate.record`) has the interval of `paired_difference`, none for a single prompt, and the null 0.

    Raises:
      ValueError: if there are no prompts.
    """
    return paired_difference(difference_P, np.zeros_like(difference_P)).in_points().record(0.0)


def frontier(loss_RN: Floats, gain_RN: Floats, at_R: Floats) -> Floats:
    """The frontier of N settings at a given loss, for R draws at once.

    Args:
      loss_RN: B's mean loss by each setting, in each draw.
      gain_RN: A's mean gain by each setting, in each draw.
      at_R: the loss at which the frontier of each draw is read; a loss below 0 counts as 0. All are in one unit.

    Returns:
      The largest mean gain [R] of a mixture of the settings and of removing nothing whose mean loss is at most `at_R`,
      at least 0; 0 without settings.
    """
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
    """The settings whose mixture reaches the frontier at a loss.

    Args:
      settings: outcomes of the settings.
      at: B's loss, in rewards.

    Returns:
      Positions in `settings` of one or two settings, in ascending order; one if it reaches the frontier alone or mixed
      with removing nothing. If no mixture gains anything, the position of the setting whose loss is nearest to `at`.
      Empty if there are no settings.
    """
    if not settings:
        return []

    def height(chosen: Sequence[int]) -> float:
        return float(frontier(*_means([settings[i] for i in chosen]), np.array([at]))[0])

    groups = [c for n in (1, 2) for c in itertools.combinations(range(len(settings)), n)]
    best = max(groups, key=lambda c: (height(c), -len(c)))
    if height(best) > 0:
        return list(best)
    return [min(range(len(settings)), key=lambda i: abs(settings[i].loss - at))]


def at_equal_loss(ours: Outcome, draws: Sequence[Sequence[Outcome]], level: float = LEVEL) -> tuple[Estimate, float]:
    """A's gain by the chosen set minus the control's frontier at the loss of B that the chosen set causes.

    A control may be random. The frontier is then the mean over K draws of the frontier of each.

    Interval: a bootstrap that draws A's prompts and B's prompts, each prompt with its completions, 2,000 times from a
    fixed seed. Gains, losses and frontiers are recomputed in each replicate, and the interval lies between expanded
    percentiles (`expanded_percentile`); for a single prompt it is the whole line. With K > 1 the half-width h of the
    interval on either side becomes √(h² + t² s²/K), with s² the variance of the differences over draws and t the
    quantile of Student's t with K − 1 degrees of freedom.

    Args:
      ours: outcome of the chosen set.
      draws: for each draw of the control, the outcomes of its settings on the same prompts; one draw of a control that
        is not random.
      level: coverage of the interval, above 0 and below 1.

    Returns:
      (difference, frontier): the difference with its interval, and the control's mean frontier at that loss, both in
      points. The n of the difference is the smaller number of prompts, of A or of B.

    Raises:
      ValueError: if an outcome of the control is on another number of prompts, or there is no draw.
    """
    if not draws:
        raise ValueError("a control has at least one draw")
    everything = [ours, *itertools.chain(*draws)]
    ends = 1 + np.cumsum([0, *map(len, draws)])

    def heights(gain_RN: Floats, loss_RN: Floats) -> Floats:
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        return np.stack([frontier(loss_RN[:, s], gain_RN[:, s], loss_RN[:, 0]) for s in parts])

    loss_RN, gain_RN = _means(everything)
    height_K = heights(gain_RN, loss_RN)[:, 0]
    value = float(gain_RN[0, 0] - height_K.mean())
    rng = np.random.default_rng(0)

    def drawn(values_NP: Floats) -> Floats:
        n = values_NP.shape[1]
        # Row 0 of the weights is the sample itself, which `_means` covers; a matrix product would round it differently.
        return prompt_weights(n, rng)[1:] @ values_NP.T / n

    gains, losses = (drawn(np.stack([getattr(o, name) for o in everything])) for name in ("gain_P", "loss_P"))
    n = min(ours.gain_P.size, ours.loss_P.size)
    estimate = expanded_percentile(value, gains[:, 0] - heights(gains, losses).mean(axis=0), n, level=level)
    if len(draws) > 1:
        luck = (
            student(value, float(height_K.std(ddof=1)) / math.sqrt(len(draws)), len(draws) - 1, n, level=level).high
            - value
        )
        low, high = (math.hypot(end - value, luck) for end in (estimate.low, estimate.high))
        estimate = dataclasses.replace(estimate, low=value - low, high=value + high)
    return estimate.in_points(), POINTS * float(height_K.mean())


def _means(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """Losses and gains, [1, N] each."""
    return np.array([[o.loss for o in outcomes]]), np.array([[o.gain for o in outcomes]])
