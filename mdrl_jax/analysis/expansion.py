"""Second-order expansions of a loss, beside the measured change, as records with intervals (definitions §6).

Intervals come from drawing prompts with replacement. All figures share the draws, so that their differences are paired.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis.samples import Sample
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from mdrl_jax.stats.bootstrap import percentile, prompt_weights
from mdrl_jax.stats.estimate import Record, missing

Floats = NDArray[np.float64]


class Draws:
    """Ratios of sums over prompts: of the sample in entry 0, of the draws of `prompt_weights` in the others."""

    def __init__(self, n_prompts: int):
        self.n = n_prompts
        self.weights_RP = prompt_weights(n_prompts, np.random.default_rng(0))

    def ratio(self, part_P: Floats, count_P: Floats) -> Floats:
        """Σ part / Σ count; NaN where the count is 0."""
        count_R = self.weights_RP @ count_P
        return np.divide(self.weights_RP @ part_P, count_R, out=np.full(len(count_R), np.nan), where=count_R > 0)

    def figure(self, values_R: Floats, unit: str, reason: str = "") -> Record:
        """The record of a figure whose null is 0.

        It is missing if a `reason` is given, or if it is not finite on the sample or on more than half of the draws.
        """
        finite = values_R[np.isfinite(values_R)]
        if reason or not np.isfinite(values_R[0]) or len(finite) < len(values_R) / 2:
            return missing(reason or "nothing to measure on: no completion succeeded", unit, self.n)
        return percentile(float(values_R[0]), finite, self.n, unit).record(0.0)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Values over draws of prompts at one α of one objective."""

    alpha: float
    first_R: Floats
    second_R: Floats
    measured_R: Floats | None

    @property
    def predicted_R(self) -> Floats:
        """g·αD + ½ α² DᵀHD."""
        return self.first_R + self.second_R

    def record(self, draws: Draws, unit: str, reason: str = "") -> dict[str, Any]:
        """All terms with intervals; the share is ½α²DᵀHD / (α g·D + ½α²DᵀHD)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share_R = self.second_R / self.predicted_R
        figures = {
            "first": draws.figure(self.first_R, unit, reason),
            "second": draws.figure(self.second_R, unit, reason),
            "predicted": draws.figure(self.predicted_R, unit, reason),
            "second_share": draws.figure(share_R, "share", reason),
        }
        if self.measured_R is not None:
            figures["measured"] = draws.figure(self.measured_R, unit)
            figures["remainder"] = draws.figure(self.measured_R - self.predicted_R, unit, reason)
        return {"alpha": self.alpha} | figures


def expansion(order: DirectionalDerivatives, draws: Draws, alpha: float, measured_R: Floats | None) -> Expansion:
    """The second-order model of one objective at α."""
    first_R = draws.ratio(order.first_P, order.count_P)
    second_R = draws.ratio(order.second_P, order.count_P)
    return Expansion(alpha, alpha * first_R, 0.5 * alpha**2 * second_R, measured_R)


def reward_loss(before: Sample, after: Sample, draws: Draws) -> Floats:
    """Measured damage of the mean reward, paired by prompt."""
    lost_P = before.rewards_PG.mean(axis=1, dtype=np.float64) - after.rewards_PG.mean(axis=1, dtype=np.float64)
    return draws.ratio(lost_P, np.ones_like(lost_P))


def nll_rise(sample: Sample, before_PGT: np.ndarray, after_PGT: np.ndarray, draws: Draws) -> Floats:
    """Measured rise of −log π of the completions that succeeded at θ*, in nats a completion."""
    fall_PG = (before_PGT - after_PGT).sum(axis=2, dtype=np.float64)
    return draws.ratio((sample.success_PG * fall_PG).sum(axis=1), sample.success_PG.sum(axis=1))


def kl(sample: Sample, before_PGT: np.ndarray, after_PGT: np.ndarray, draws: Draws) -> Floats:
    """KL(π_θ* ‖ π_θ) by its unbiased estimate, the mean of log π_θ*/π_θ over samples of θ*."""
    fall_PG = (before_PGT - after_PGT).sum(axis=2, dtype=np.float64)
    return draws.ratio(fall_PG.sum(axis=1), np.full(len(fall_PG), float(fall_PG.shape[1])))


def curve(
    order: DirectionalDerivatives, measured: Mapping[float, Floats | None], draws: Draws, unit: str, reason: str = ""
) -> dict[str, Any]:
    """The terms at the largest α, with all of them as "curve" and where the model breaks down."""
    steps = [expansion(order, draws, alpha, at).record(draws, unit, reason) for alpha, at in measured.items()]
    return steps[-1] | {"curve": steps, "breaks_at": breakdown(steps)}


def segment_records(
    orders: Mapping[float, DirectionalDerivatives],
    counts: Sequence[int],
    measured_R: Floats,
    draws: Draws,
    unit: str,
    reasons: Mapping[float, str] | None = None,
) -> list[dict[str, Any]]:
    """Σ_j g_j·d + ½dᵀH_j d with d = D / n, for each number of segments n.

    `reasons`: α -> why what was expanded there cannot be measured, "" if it can; one such expansion is enough.
    """
    rows = []
    for n in counts:
        terms = [orders[j / n] for j in range(n)]
        why = next((found for j in range(n) if (found := (reasons or {}).get(j / n))), "")
        predicted_R = sum(
            (draws.ratio(o.first_P, o.count_P) / n + 0.5 * draws.ratio(o.second_P, o.count_P) / n**2 for o in terms),
            start=np.zeros(len(measured_R)),
        )
        rows.append(
            {
                "segments": n,
                "predicted": draws.figure(predicted_R, unit, why),
                "measured": draws.figure(measured_R, unit),
                "remainder": draws.figure(measured_R - predicted_R, unit, why),
            }
        )
    return rows


def breakdown(curve: Sequence[dict[str, Any]], share: float = 0.2) -> float | None:
    """The smallest α from which on the remainder is measurably not 0 and above `share` of the measured damage.

    None where the model still holds at the end of the curve, or nothing can be said.
    """
    broken = None
    for step in curve:
        measured, remainder = step.get("measured"), step.get("remainder")
        if measured is None or remainder is None or None in (measured["estimate"], remainder["estimate"]):
            return None
        low, high = remainder["ci95"]
        fails = (low > 0 or high < 0) and abs(remainder["estimate"]) > share * abs(measured["estimate"])
        broken = (step["alpha"] if broken is None else broken) if fails else None
    return broken


def segments_needed(rows: Sequence[dict[str, Any]], share: float = 0.1) -> int | None:
    """The fewest segments whose prediction is within `share` of the measured damage, by estimates; None if none is."""
    for row in rows:
        if row["measured"]["estimate"] is not None and row["predicted"]["estimate"] is not None:
            if abs(row["remainder"]["estimate"]) <= share * abs(row["measured"]["estimate"]):
                return row["segments"]
    return None
