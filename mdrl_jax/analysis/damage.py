"""Damage of an earlier domain by later stages: predicted to second order, measured, and what remains (definitions §6).

With D = θ_t − θ*_i and the loss L_i at θ*_i the prediction is g·D + ½DᵀHD. First order, second order, their sum, the
measured damage and the remainder are reported apart, at D and along αD, in one segment of the path and in 2, 4 and 8
(re-expanded at each end). Every figure is a loss, in the unit of its objective: reward, or nats a completion.

Measured: `reward` by fresh samples at each point; `success_nll` and `kl` of the completions sampled at θ*_i, whose
log-probs at any point are exact. `surrogate` and `grpo` have predictions only, held against the measured reward.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mdrl_jax.analysis.expansion import (
    Draws,
    curve,
    expansion,
    kl,
    nll_rise,
    reward_loss,
    segment_records,
    segments_needed,
)
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.second_order.objectives import DirectionalDerivatives

UNITS = {"reward": "reward", "surrogate": "reward", "grpo": "advantage", "success_nll": "nats", "kl": "nats"}
MEASURED = ("reward", "success_nll", "kl")
SEGMENTS = (1, 2, 4, 8)
ALPHAS = tuple(j / 8 for j in range(1, 9))
REWARD_ALPHAS = (0.25, 0.5, 0.75, 1.0)  # each costs a set of samples
INFORMATIVE = 0.2  # least share of prompts with reward variance for the reward's Hessian (definitions §6)


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
    blind = {0.0: uninformative(sample)}
    sample, draws = sample.take(few), Draws(few.size)
    fixed: dict[float, dict[str, DirectionalDerivatives]] = {}
    fresh: dict[float, DirectionalDerivatives] = {}
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
            there = draw(at)
            blind[at] = uninformative(there)
            fresh[at] = probe.derivatives(point, displacement, there.take(few))["reward"]
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
            fresh, SEGMENTS[:-1], reward_loss(sample, draw(1.0).take(few), draws), draws, "reward", blind
        ),
    }
    return curves, segments


def uninformative(sample: Sample) -> str:
    """Why the reward's second derivative cannot be measured on a sample; "" if it can."""
    if sample.informative >= INFORMATIVE:
        return ""
    return f"only {sample.informative:.0%} of the prompts have completions with different rewards"


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
