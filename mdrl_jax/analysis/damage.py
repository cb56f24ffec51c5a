"""Damage of an earlier domain by later stages: predicted to second order, measured, and what remains (definitions §6).

With D = θ_t − θ*_i and the loss L_i at θ*_i the prediction is g·D + ½DᵀHD. First order, second order, their sum, the
measured damage and the remainder are reported apart, at D and along αD, in one segment of the path and in 2, 4 and 8
(re-expanded at each end). Every figure is a loss, in the unit of its objective: reward, or nats a completion.

Measured: `reward` by fresh samples at each point; `success_nll` and `kl` of the completions sampled at θ*_i, whose
log-probs at any point are exact. `surrogate` and `grpo` have predictions only, held against the measured reward.
Intervals draw prompts with replacement, the same draws for every figure of a pair, so that differences are paired.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis.objectives import Order2
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.statistics import percentile

Floats = NDArray[np.float64]
UNITS = {"reward": "reward", "surrogate": "reward", "grpo": "advantage", "success_nll": "nats", "kl": "nats"}
MEASURED = ("reward", "success_nll", "kl")
SEGMENTS = (1, 2, 4, 8)
ALPHAS = tuple(j / 8 for j in range(1, 9))
REWARD_ALPHAS = (0.25, 0.5, 0.75, 1.0)  # each costs a set of samples
INFORMATIVE = 0.2  # least share of prompts with reward variance for the reward's Hessian (definitions §6)
N_RESAMPLES = 2000


class Draws:
    """Means over prompts, [1 + N_RESAMPLES]: entry 0 is the sample's, the rest those of prompts drawn again."""

    def __init__(self, n_prompts: int):
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), N_RESAMPLES)
        self.n = n_prompts
        self.weights_RP = np.concatenate([np.ones((1, n_prompts)), drawn])

    def ratio(self, part_P: Floats, count_P: Floats) -> Floats:
        """Σ part / Σ count; NaN where the count is 0."""
        count_R = self.weights_RP @ count_P
        return np.divide(self.weights_RP @ part_P, count_R, out=np.full(len(count_R), np.nan), where=count_R > 0)

    def figure(self, values_R: Floats, unit: str, reason: str = "") -> dict[str, Any]:
        """The record of a figure whose null is 0; None with the reason where it is not a number."""
        finite = values_R[np.isfinite(values_R)]
        if reason or not np.isfinite(values_R[0]) or len(finite) < len(values_R) / 2:
            empty = {"estimate": None, "ci95": None, "null": None, "n": self.n, "unit": unit}
            return empty | {"reason": reason or "nothing to measure on: no completion succeeded"}
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


def expansion(order: Order2, draws: Draws, alpha: float, measured_R: Floats | None) -> Expansion:
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


def pair(
    probe: Probe,
    start: Any,
    displacement: Any,
    sample: Sample,
    draw: Callable[[float], Sample],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The damage record of one (domain, later stage), by objective: terms at D, the curve along αD, and segments.

    Everything is over all prompts, but for the curves of `success_nll` and `kl` and all segments, which are over the
    first `analyze.path_prompts`: their points cost an expansion each.

    Args:
      start: θ*_i.
      displacement: D.
      sample: completions of domain i sampled at θ*_i.
      draw: α -> completions sampled at θ*_i + αD, on the same prompts.
    """
    draws = Draws(sample.n_prompts)
    progress("expansion")
    at_start, u, w = probe.jets(start, displacement, sample)
    orders = sample.derivatives(u, w, probe.grpo)
    at_end = probe.log_probs(probe.along(start, displacement, np.float32(1)), sample)
    lost = {}
    for alpha in REWARD_ALPHAS:
        progress(f"reward at α = {alpha:g}")
        lost[alpha] = reward_loss(sample, draw(alpha), draws)
    measured = {"success_nll": nll_rise(sample, at_start, at_end, draws), "kl": kl(sample, at_start, at_end, draws)}
    reason = uninformative(sample)
    record: dict[str, Any] = {}
    for name in ("reward", "surrogate", "grpo"):
        against = {alpha: None if name == "grpo" else lost[alpha] for alpha in REWARD_ALPHAS}
        record[name] = curve(orders[name], against, draws, UNITS[name], reason)
    for name, at_one in measured.items():
        record[name] = expansion(orders[name], draws, 1.0, at_one).record(draws, UNITS[name])
    curves, segments = path(probe, start, displacement, sample, draw, progress)
    for name, found in curves.items():
        record[name] |= {"curve": found["curve"], "breaks_at": found["breaks_at"]}
    for name, rows in segments.items():
        record[name] |= {"segments": rows, "segments_needed": segments_needed(rows)}
    return record


def curve(
    order: Order2, measured: dict[float, Floats | None], draws: Draws, unit: str, reason: str = ""
) -> dict[str, Any]:
    """The terms at the largest α, with all of them as "curve" and where the model breaks down."""
    steps = [expansion(order, draws, alpha, at).record(draws, unit, reason) for alpha, at in measured.items()]
    return steps[-1] | {"curve": steps, "breaks_at": breakdown(steps)}


def path(
    probe: Probe,
    start: Any,
    displacement: Any,
    sample: Sample,
    draw: Callable[[float], Sample],
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Curves of the objectives whose completions stay, and damage by expansions at the ends of 1, 2, 4, 8 segments.

    Of the reward, each of whose expansions needs its own samples, up to 4 segments.
    """
    few = np.arange(probe.runtime.config.analyze.path_prompts)
    sample, draws = sample.take(few), Draws(few.size)
    fixed: dict[float, dict[str, Order2]] = {}
    fresh: dict[float, Order2] = {}
    logp = {}
    for j in range(SEGMENTS[-1]):
        at = j / SEGMENTS[-1]
        progress(f"expansion at α = {at:g}")
        point = probe.along(start, displacement, np.float32(at)) if j else start
        logp[at], u, w = probe.jets(point, displacement, sample)
        fixed[at] = sample.derivatives(u, w, probe.grpo)
        if at == 0:
            fresh[at] = fixed[at]["reward"]
        elif at in REWARD_ALPHAS:
            there = draw(at).take(few)
            fresh[at] = there.derivatives(*probe.jets(point, displacement, there)[1:], probe.grpo)["reward"]
    logp[1.0] = probe.log_probs(probe.along(start, displacement, np.float32(1)), sample)
    measures = {"success_nll": nll_rise, "kl": kl}
    curves = {
        name: curve(fixed[0.0][name], {a: f(sample, logp[0.0], logp[a], draws) for a in ALPHAS}, draws, UNITS[name])
        for name, f in measures.items()
    }
    nll = {at: orders["success_nll"] for at, orders in fixed.items()}
    segments = {
        "success_nll": segment_records(nll, SEGMENTS, nll_rise(sample, logp[0.0], logp[1.0], draws), draws, "nats"),
        "reward": segment_records(
            fresh, SEGMENTS[:-1], reward_loss(sample, draw(1.0).take(few), draws), draws, "reward"
        ),
    }
    return curves, segments


def segment_records(
    orders: dict[float, Order2], counts: Sequence[int], measured_R: Floats, draws: Draws, unit: str
) -> list[dict[str, Any]]:
    """Σ_j g_j·d + ½dᵀH_j d with d = D / n, for each number of segments n."""
    rows = []
    for n in counts:
        terms = [orders[j / n] for j in range(n)]
        predicted_R = sum(
            (draws.ratio(o.first_P, o.count_P) / n + 0.5 * draws.ratio(o.second_P, o.count_P) / n**2 for o in terms),
            start=np.zeros(len(measured_R)),
        )
        rows.append(
            {
                "segments": n,
                "predicted": draws.figure(predicted_R, unit),
                "measured": draws.figure(measured_R, unit),
                "remainder": draws.figure(measured_R - predicted_R, unit),
            }
        )
    return rows


def uninformative(sample: Sample) -> str:
    """Why the reward's second derivative cannot be measured on a sample; "" if it can."""
    if sample.informative >= INFORMATIVE:
        return ""
    return f"only {sample.informative:.0%} of the prompts have completions with different rewards"


def breakdown(curve: Sequence[dict[str, Any]], share: float = 0.2) -> float | None:
    """The smallest α from which on the remainder is measurably not 0 and above `share` of the measured damage.

    None where the model still holds at the end of the curve, or nothing can be said.
    """
    broken = None
    for step in curve:
        measured, remainder = step.get("measured"), step.get("remainder")
        if not measured or None in (measured["estimate"], remainder["estimate"]):
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


def cross_terms(
    probe: Probe, start: Any, edits: dict[str, Any], sample: Sample, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """δ_uᵀHδ_v for every two later stages at θ*_i, by polarisation: above 0 the edits compound, below they cancel.

    On the first `analyze.path_prompts` prompts; the null is 0, edits that do not see each other.
    """
    few = np.arange(probe.runtime.config.analyze.path_prompts)
    sample, draws = sample.take(few), Draws(few.size)
    names = list(edits)
    alone = {}
    if len(names) > 1:
        for name in names:
            progress(f"edit of {name}")
            alone[name] = probe.derivatives(start, edits[name], sample)
    rows = []
    for i, u in enumerate(names):
        for v in names[i + 1 :]:
            progress(f"edits of {u} and {v}")
            both = probe.derivatives(start, probe.along(edits[u], edits[v], np.float32(1)), sample)
            for name in ("reward", "success_nll"):
                part_P = both[name].second_P - alone[u][name].second_P - alone[v][name].second_P
                value_R = 0.5 * draws.ratio(part_P, both[name].count_P)
                why = uninformative(sample) if name == "reward" else ""
                rows.append({"stages": [u, v], "objective": name, "product": draws.figure(value_R, UNITS[name], why)})
    return rows
