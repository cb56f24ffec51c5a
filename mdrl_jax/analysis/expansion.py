"""Turns derivatives and measurements by prompt into records of predicted and measured damage (definitions §6).

`damage.py` supplies the inputs: `DirectionalDerivatives` of an objective along the displacement D (first and second
order of each prompt), and log-probs or rewards at both ends. The prediction at θ* + αD is α g·D + ½ α² DᵀHD.

Intervals are bootstrap-t over 2,000 draws of prompts with replacement, and Fieller's for shares. All figures of a
sample use the same draws, so that their differences and ratios are paired. An array with the axis R is a figure of
these draws (`stats.bootstrap.Draws`): it holds the figure of the sample in entry 0, and beside those of the draws also
those of the sample and of each draw without one of its prompts. A *record* of a figure is
{"estimate", "ci95", "null", "n", "unit"}, with "reason" if it has no estimate (`stats/estimate.py`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis.samples import Sample
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from mdrl_jax.stats import bootstrap
from mdrl_jax.stats.estimate import Record, missing

Floats = NDArray[np.float64]
OPEN = "the interval of the denominator includes 0"
NO_SUCCESS = "nothing to measure on: no completion succeeded"


class Draws(bootstrap.Draws):
    """Draws of prompts with replacement, and the records of figures that are made with them."""

    def ratio(self, part_P: Floats, count_P: Floats) -> Floats:
        """Σ part / Σ count over prompts, as a figure of these draws [R]; NaN where Σ count is 0."""
        part_R, count_R = self.total(part_P), self.total(count_P)
        return np.divide(part_R, count_R, out=np.full(len(count_R), np.nan), where=count_R > 0)

    def figure(self, values_R: Floats, unit: str, reason: str = "") -> Record:
        """The record of a figure whose null is 0.

        The figure is missing if a `reason` is given, or if it is not finite on the sample or on more than half of the
        draws.

        Args:
          values_R: the figure.
          unit: of the figure.
          reason: why the figure cannot be measured; "" if it can.

        Returns:
          the record, with a bootstrap-t interval. A missing figure has the estimate None and the reason.
        """
        return self._missing(values_R, unit, reason) or self.interval(values_R, unit).record(0.0)

    def share(self, part_R: Floats, whole_R: Floats, unit: str, reason: str = "") -> Record:
        """The record of part / whole with Fieller's interval; its null is 0.

        Args:
          part_R, whole_R: two figures.
          unit: of the share.
          reason: why the share cannot be measured; "" if it can.

        Returns:
          the record. It has the estimate None and a reason if one is given, if one of the two figures is missing as in
          `figure`, or if the interval of `whole_R` includes 0.
        """
        absent = self._missing(part_R, unit, reason) or self._missing(whole_R, unit, reason)
        found = None if absent else self.fieller(part_R, whole_R, unit)
        return absent or (found.record(0.0) if found else missing(OPEN, unit, self.n, 0.0))

    def _missing(self, values_R: Floats, unit: str, reason: str) -> Record | None:
        if not reason:
            value_X = self.values(values_R)
            if np.isfinite(value_X[0]) and np.isfinite(value_X).mean() >= 0.5:
                return None
        return missing(reason or NO_SUCCESS, unit, self.n)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The expansion of one objective at one α, on the sample and on each draw of prompts.

    Attributes:
      alpha: α.
      first_R: α g·D.
      second_R: ½ α² DᵀHD.
      measured_R: the measured damage at α; None if the objective has none.
    """

    alpha: float
    first_R: Floats
    second_R: Floats
    measured_R: Floats | None

    @property
    def predicted_R(self) -> Floats:
        """α g·D + ½ α² DᵀHD."""
        return self.first_R + self.second_R

    def record(self, draws: Draws, unit: str, reason: str = "") -> dict[str, Any]:
        """The terms as records with intervals.

        Args:
          draws: the draws that the arrays were made with.
          unit: of the objective.
          reason: why the predicted terms cannot be measured; "" if they can.

        Returns:
          {"alpha", "first", "second", "predicted", "second_share"}, and with a measured damage "measured" and
          "remainder" = measured − predicted. "second_share" is ½α²DᵀHD / (α g·D + ½α²DᵀHD), missing where the interval
          of the prediction includes 0.
        """
        figures = {
            "first": draws.figure(self.first_R, unit, reason),
            "second": draws.figure(self.second_R, unit, reason),
            "predicted": draws.figure(self.predicted_R, unit, reason),
            "second_share": draws.share(self.second_R, self.predicted_R, "share", reason),
        }
        if self.measured_R is not None:
            figures["measured"] = draws.figure(self.measured_R, unit)
            figures["remainder"] = draws.figure(self.measured_R - self.predicted_R, unit, reason)
        return {"alpha": self.alpha} | figures


def expansion(order: DirectionalDerivatives, draws: Draws, alpha: float, measured_R: Floats | None) -> Expansion:
    """The expansion of one objective at α.

    Args:
      order: first and second orders of each prompt along D.
      draws: of the prompts.
      alpha: α, the share of the way along D.
      measured_R: the measured damage there, with the same draws; None if the objective has none.

    Returns:
      `first_R` = α g·D and `second_R` = ½ α² DᵀHD, of the sample and each draw, NaN where the objective counts nothing;
      with `alpha` and `measured_R`.
    """
    first_R = draws.ratio(order.first_P, order.count_P)
    second_R = draws.ratio(order.second_P, order.count_P)
    return Expansion(alpha, alpha * first_R, 0.5 * alpha**2 * second_R, measured_R)


def reward_loss(before: Sample, after: Sample, draws: Draws) -> Floats:
    """Measured fall of the mean reward from `before` to `after`, paired by prompt, on the sample and each draw.

    Args:
      before, after: completions of the same prompts, sampled at the two points.
      draws: of the prompts.

    Returns:
      the fall in rewards [R]; above 0 if `after` has lower rewards.
    """
    lost_P = before.rewards_PG.mean(axis=1, dtype=np.float64) - after.rewards_PG.mean(axis=1, dtype=np.float64)
    return draws.ratio(lost_P, np.ones_like(lost_P))


def nll_rise(sample: Sample, before_PGT: np.ndarray, after_PGT: np.ndarray, draws: Draws) -> Floats:
    """Measured rise of −log π of the completions that succeeded at θ*, averaged over them, in nats a completion.

    Args:
      sample: completions sampled at θ*.
      before_PGT, after_PGT: log-probs of their tokens at θ* and at the other point, 0 on padding.
      draws: of the prompts.

    Returns:
      the rise as a figure of these draws [R], above 0 if successes became less likely. It also has entries for the
      sample and each draw without one of its prompts; `Draws.values` and `Draws.interval` read it. An entry in which no
      completion succeeded is NaN.
    """
    fall_PG = (before_PGT - after_PGT).sum(axis=2, dtype=np.float64)
    return draws.ratio((sample.success_PG * fall_PG).sum(axis=1), sample.success_PG.sum(axis=1))


def kl(sample: Sample, before_PGT: np.ndarray, after_PGT: np.ndarray, draws: Draws) -> Floats:
    """KL(π_θ* ‖ π_θ) by its unbiased estimate, the mean of log π_θ*/π_θ over samples of θ*, in nats a completion.

    Args:
      sample: completions sampled at θ*; not read, because all of them count.
      before_PGT, after_PGT: log-probs of their tokens at θ* and at θ, 0 on padding.
      draws: of the prompts.

    Returns:
      the KL as a figure of these draws [R]; an entry may be negative.
    """
    fall_PG = (before_PGT - after_PGT).sum(axis=2, dtype=np.float64)
    return draws.ratio(fall_PG.sum(axis=1), np.full(len(fall_PG), float(fall_PG.shape[1])))


def curve(
    order: DirectionalDerivatives, measured: Mapping[float, Floats | None], draws: Draws, unit: str, reason: str = ""
) -> dict[str, Any]:
    """One expansion compared with the measured damage at several α.

    Args:
      order: first and second orders of each prompt along D.
      measured: α -> measured damage [R], or None if the objective has none; at least one α, in ascending order.
      draws: of the prompts.
      unit: of the objective.
      reason: why the predicted terms cannot be measured; "" if they can.

    Returns:
      the record at the last α, {"alpha", "first", "second", "predicted", "second_share"} and, with a measured damage,
      "measured" and "remainder" (`Expansion.record`); with "curve", the list of the records at all α, and "breaks_at"
      (`breakdown`), None without a measured damage.
    """
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
    """Predictions that expand again at the start of each of n equal segments: Σ_j g_j·d + ½dᵀH_j d with d = D/n.

    Args:
      orders: α -> first and second orders along D (not d), expanded at θ* + αD; every j/n is needed, for j < n.
      counts: the numbers of segments n, each at least 1.
      measured_R: the measured damage at α = 1.
      draws: of the prompts.
      unit: of the objective.
      reasons: α -> why the expansion at α cannot be measured, "" if it can. A prediction is missing if any of its
        expansions cannot be measured.

    Returns:
      for each n: {"segments": n, "predicted", "measured", "remainder": measured − predicted, "curvature_share"}, all
      but n records. "curvature_share" is 1 − g(θ*)·D / predicted, the part of the predicted damage that the gradient at
      θ* does not explain; it is missing where the interval of the prediction includes 0.

    Raises:
      KeyError: if `orders` lacks an α that is needed.
    """
    rows = []
    for n in counts:
        terms = [orders[j / n] for j in range(n)]
        why = next((found for j in range(n) if (found := (reasons or {}).get(j / n))), "")
        predicted_R = sum(
            (draws.ratio(o.first_P, o.count_P) / n + 0.5 * draws.ratio(o.second_P, o.count_P) / n**2 for o in terms),
            start=np.zeros(len(measured_R)),
        )
        curved_R = predicted_R - draws.ratio(orders[0.0].first_P, orders[0.0].count_P)
        rows.append(
            {
                "segments": n,
                "predicted": draws.figure(predicted_R, unit, why),
                "measured": draws.figure(measured_R, unit),
                "remainder": draws.figure(measured_R - predicted_R, unit, why),
                "curvature_share": draws.share(curved_R, predicted_R, "share", why),
            }
        )
    return rows


def breakdown(curve: Sequence[dict[str, Any]], share: float = 0.2) -> float | None:
    """The α at which the expansion breaks down: from there to the end of the curve it fails at every α.

    It fails at an α if the interval of the remainder does not include 0 and |remainder| > `share` · |measured|. A
    remainder without an interval does not fail.

    Args:
      curve: records of `Expansion.record`, in ascending order of α.
      share: the largest remainder that is tolerated, as a share of the measured damage.

    Returns:
      the smallest α from which on it fails at every α. None if the expansion does not fail at the end of the curve, if
      "measured" or "remainder" is missing or has no estimate at one α, or if the curve is empty.
    """
    broken = None
    for step in curve:
        measured, remainder = step.get("measured"), step.get("remainder")
        if measured is None or remainder is None or None in (measured["estimate"], remainder["estimate"]):
            return None
        low, high = remainder["ci95"] or (-math.inf, math.inf)
        fails = (low > 0 or high < 0) and abs(remainder["estimate"]) > share * abs(measured["estimate"])
        broken = (step["alpha"] if broken is None else broken) if fails else None
    return broken


def segments_needed(rows: Sequence[dict[str, Any]], share: float = 0.1) -> int | None:
    """The smallest number of segments with |remainder| ≤ `share` · |measured|, by estimates; None if there is none.

    Rows without an estimate of "measured" or "predicted" are skipped.

    Args:
      rows: records of `segment_records`, in ascending order of the number of segments.
      share: the largest remainder that is tolerated, as a share of the measured damage.
    """
    for row in rows:
        if row["measured"]["estimate"] is not None and row["predicted"]["estimate"] is not None:
            if abs(row["remainder"]["estimate"]) <= share * abs(row["measured"]["estimate"]):
                return row["segments"]
    return None
