"""Damage of an earlier domain by a later stage: predicted to second order, measured, and their difference.

`interference.py` calls `pair` for each domain i and later stage t, and `cross_terms` for each domain (definitions §6).
`probe.py` computes the derivatives on devices; `expansion.py` turns them into records with intervals.

With the displacement D = θ_t − θ*_i, and g and H the gradient and the Hessian of the loss L_i at θ*_i, the predicted
damage at θ*_i + αD is

    α g·D + ½ α² DᵀHD.

The record has both orders, their sum, the measured damage and the remainder, at α = 1 and along the path. A further
prediction divides the path into 2, 4 or 8 segments and expands again at the start of each. Every figure is a loss, so a
positive number is harm. Its unit is that of the objective (`UNITS`); nats are per completion.

| objective | measured damage |
|---|---|
| `reward`, `surrogate` | fall of the mean reward, from fresh samples at each point |
| `success_nll`, `kl` | exact log-probs, at each point, of the completions sampled at θ*_i |
| `grpo` | none: prediction only |

A *record* of a figure is {"estimate", "ci95", "null", "n", "unit"}, with "reason" if it has no estimate
(`stats/estimate.py`).
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
REWARD_ALPHAS = (0.25, 0.5, 0.75, 1.0)  # fewer than `ALPHAS`, because each needs fresh samples
# The reward's Hessian is not measurable if a smaller share of the prompts has different rewards (definitions §6).
INFORMATIVE = 0.2


def pair(
    probe: Probe,
    start: Any,
    displacement: Any,
    sample: Sample,
    draw: Callable[[float], Sample],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The damage of one domain i by one later stage, for every objective.

    Figures are over all prompts, except those of `path`, which use the first `analyze.path_prompts`.

    Args:
      probe: the compiled device programs.
      start: θ*_i, a tree of parameters.
      displacement: D, a tree like `start`.
      sample: completions of domain i sampled at θ*_i, at least two for each prompt.
      draw: α -> completions sampled at θ*_i + αD, on the same prompts. It is called twice for each α of
        `REWARD_ALPHAS` (¼, ½, ¾, 1), so it should keep what it sampled.
      progress: told what is being computed.

    Returns:
      {objective: terms} for the keys of `UNITS`. The terms are those at α = 1, "first", "second", "predicted",
      "second_share" and, except for `grpo`, "measured" and "remainder" (`Expansion.record`); with "curve", the same
      terms at every α, and "breaks_at" (`breakdown`). `reward` and `success_nll` add "segments" (`segment_records`) and
      "segments_needed". If too few prompts have different rewards (`uninformative`), the predicted terms of `reward`,
      `surrogate` and `grpo` have a reason in place of an estimate.

    Raises:
      IndexError: if `sample` has fewer prompts than `analyze.path_prompts`.
      ValueError: if there is only one completion of each prompt.
      The errors of `draw`, such as UserError if sampling fails.
    """
    draws = Draws(sample.n_prompts)
    progress("expansion")
    at_start, u, w = probe.jets(start, displacement, sample)
    orders = probe.orders(u, w, sample)
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
    """Figures on the first `analyze.path_prompts` prompts: curves, and predictions in several segments.

    They use fewer prompts because every point of the path costs a pass over the completions. The reward has at most
    4 segments, because the completions of each of its expansions have to be sampled at the point of the expansion.

    Args:
      probe: the compiled device programs.
      start: θ*_i, a tree of parameters.
      displacement: D, a tree like `start`.
      sample: completions of domain i sampled at θ*_i, at least two for each prompt.
      draw: α -> completions sampled at θ*_i + αD, on the same prompts; called once for each α of ¼, ½, ¾ and 1.
      progress: told what is being computed.

    Returns:
      the curves of `success_nll` and `kl` at α = ⅛, ¼, …, 1 (`expansion.curve`), and the records of 1, 2, 4 and for
      `success_nll` 8 segments of `success_nll` and `reward` (`expansion.segment_records`), both by objective. A
      prediction of `reward` has a reason in place of an estimate if one of its points is `uninformative`.

    Raises:
      IndexError: if `sample` has fewer prompts than `analyze.path_prompts`.
      ValueError: if there is only one completion of each prompt.
      The errors of `draw`.
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
        fixed[at] = probe.orders(u, w, sample)
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
    """The reason why the reward's Hessian cannot be measured on a sample; "" if it can (definitions §6).

    It can if at least 20 % of the prompts have completions with different rewards.
    """
    if sample.informative >= INFORMATIVE:
        return ""
    return f"only {sample.informative:.0%} of the prompts have completions with different rewards"


def cross_terms(
    probe: Probe, start: Any, edits: dict[str, Any], sample: Sample, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """δ_uᵀHδ_v at θ*_i for every two later stages u and v (definitions §6).

    Above 0 the two edits compound: together they do more damage to second order than one by one. Below 0 they cancel.
    The null is 0. The product comes from polarisation, ½[(δ_u+δ_v)ᵀH(δ_u+δ_v) − δ_uᵀHδ_u − δ_vᵀHδ_v].

    Args:
      probe: the compiled device programs.
      start: θ*_i, a tree of parameters.
      edits: the edit of each later stage, by name of the stage.
      sample: completions of domain i sampled at θ*_i; the first `analyze.path_prompts` prompts are used.
      progress: told what is being computed.

    Returns:
      for each pair and each headline objective (`reward`, `success_nll`): {"stages": [u, v], "objective", "product":
      record}, in the unit of the objective (`UNITS`). Empty if there are fewer than two later stages. The product has a
      reason in place of an estimate if it cannot be measured (`uninformative`; no completion succeeded).

    Raises:
      IndexError: if `sample` has fewer prompts than `analyze.path_prompts`.
      ValueError: if there is only one completion of each prompt.
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
