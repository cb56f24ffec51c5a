"""Combines the units of an analysis into `analysis/*.json` and the verdicts of C1 to C5 (definitions §13).

`interference.py` calls `harmed` to choose the pairs whose conflict subspace is sought, and `assemble` at the end. The
keys of `Parts` are the names of the units (see there). The rules of the claims are in `claims/interference.py`; this
file selects the figures that they judge. A *record* of a figure is {"estimate", "ci95", "null", "n", "unit"}, with
"reason" if it has no estimate (`stats/estimate.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mdrl_jax.claims import assignment, interference
from mdrl_jax.claims.assignment import Assignment
from mdrl_jax.claims.inputs import CurveStep, DamagePair, Edit, GradientPair, Objective, RoutePair, Sparsity
from mdrl_jax.stats.bootstrap import N_RESAMPLES, expanded_percentile
from mdrl_jax.stats.estimate import Record, missing, paired_difference
from mdrl_jax.stats.overlap import mean_jaccard
from mdrl_jax.stats.tests import null_record, r_squared, rank_agreement, spearman_rho

Parts = Mapping[str, Any]
# For each objective whose prediction is compared with a measurement: the objective with the measured damage.
AGAINST = {"reward": "reward", "surrogate": "reward", "success_nll": "success_nll", "kl": "kl"}
CONFLICTS = ("reward", "success_nll")
FEWEST_PROMPTS = 3  # of two prompts every rank correlation is ±1


def starting(parts: Parts, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields (rest of the name, content) of each unit whose name starts with `prefix-`, in the order of the units.

    Args:
      parts: the units, by name.
      prefix: without the hyphen, such as "damage".
    """
    for name, part in parts.items():
        if name.startswith(f"{prefix}-"):
            yield name.removeprefix(f"{prefix}-"), part


def harmed(parts: Parts, most: int) -> list[tuple[str, str]]:
    """The pairs (domain, later stage) with the largest measured damage of the reward, largest first.

    Args:
      parts: the units so far, with all of damage.
      most: how many pairs at most, 0 or more. Only pairs whose interval of the damage lies above 0 count.

    Returns:
      (name of the domain, name of the later stage) of each pair. Of equal damages the name that is later in the
      alphabet comes first.

    Raises:
      KeyError: if a unit of damage lacks a field.
    """
    found = []
    for _, part in starting(parts, "damage"):
        measured = part["objectives"]["reward"]["measured"]
        if measured["estimate"] is not None and measured["ci95"] and measured["ci95"][0] > 0:
            found.append((measured["estimate"], part["domain"], part["stage"]))
    return [(domain, stage) for _, domain, stage in sorted(found, reverse=True)[:most]]


def assemble(parts: Parts, settings: Record) -> dict[str, Any]:
    """The content of every file of the analysis.

    Args:
      parts: all units, by name.
      settings: the settings of the analysis (`Analysis.settings`), with the list of "stages".

    Returns:
      by file name without ending:

      - "edits": the unit `edits` with "mean_jaccard", the mean Jaccard by layer over the pairs of domains.
      - "gradients": by checkpoint with comparisons, the figures of its unit by pair "a-b".
      - "peak_gradients": the unit `peak-gradients`, by pair; empty with fewer than two domains.
      - "solo_effects": {"pairs": those of the unit `solo-effects`, each with "spearman"; "agreement": the mean
        correlation} (`solo_agreement`); without pairs if there are fewer than two solo stages.
      - "routes": by such checkpoint, {"overlaps": figures by pair "a-b", "shared": figures by later domain}.
      - "damage": {"settings", "pairs": the units `damage-…`, "cross_terms": the units `cross-…`, "transfers": a record
        of `transfer` for each domain and later stage, "agreement": `predicted_against_measured`}.
      - "subspace": {"pairs": the units `conflict-…`}.
      - "claims": the list of `verdicts`.

    Raises:
      KeyError: if the unit `edits` or that of a checkpoint is missing, or a unit or the settings lack a field.
      ValueError: if a domain has different numbers of prompts at two checkpoints.
      StopIteration: if a unit of damage is of a stage that the settings do not list.
    """
    points = dict(starting(parts, "point"))
    pairs = [part for _, part in starting(parts, "damage")]
    stages = settings["stages"]
    transfers = [transfer(points, domain, stage, stages) for domain, stage in _later(stages)]
    solo_effects, test = solo_agreement(parts.get("solo-effects", {"pairs": []})["pairs"])
    found: dict[str, Any] = {
        "edits": parts["edits"] | {"mean_jaccard": _mean_jaccard(parts["edits"]["pairs"])},
        "gradients": {name: point["gradients"] for name, point in points.items() if "gradients" in point},
        "peak_gradients": parts.get("peak-gradients", {}),
        "solo_effects": solo_effects,
        "routes": {
            name: {"overlaps": point["routes"], "shared": point["shared"]}
            for name, point in points.items()
            if "routes" in point
        },
        "damage": {
            "settings": settings,
            "pairs": pairs,
            "cross_terms": [part for _, part in starting(parts, "cross")],
            "transfers": transfers,
            "agreement": predicted_against_measured(pairs),
        },
        "subspace": {"pairs": [part for _, part in starting(parts, "conflict")]},
    }
    found["claims"] = verdicts(found, stages, test)
    return found


def _later(stages: Sequence[Record]) -> list[tuple[str, Record]]:
    """All pairs (domain, later stage), in the order of the sequence; later means after the domain's last stage."""
    own = {s["domain"]: i for i, s in enumerate(stages)}
    return [(d, s) for d, i in sorted(own.items(), key=lambda x: x[1]) for s in stages[i + 1 :]]


def transfer(points: Parts, domain: str, stage: Record, stages: Sequence[Record]) -> Record:
    """The change of a domain's mean reward through one later stage, beside its first-order prediction (definitions §5).

    Args:
      points: the units `point-…`, by checkpoint.
      domain: the domain A whose reward changes.
      stage: the later stage, as in the settings.
      stages: all stages, as in the settings.

    Returns:
      {"domain", "stage", "measured", "effect"}: "measured" is the mean reward after the stage minus that before it, in
      rewards, as a record with Student's t over prompts; "effect" is −g_A·δ_B on the shared route and on its
      complement, {"route", "complement"}, in rewards; None if it was not measured. Both are above 0 if the stage helps
      A. "measured" has no interval if there is only one prompt.

    Raises:
      KeyError: if the unit of the stage, of its start or of the domain's peak is missing, or lacks a field.
      StopIteration: if none of the stages trained the domain.
      ValueError: if the domain has different numbers of prompts before and after the stage.
    """
    after, before = (np.asarray(points[name]["rewards"][domain]) for name in (stage["name"], stage["start"]))
    own = next(s["name"] for s in reversed(stages) if s["domain"] == domain)
    shared = points[own].get("shared", {}).get(stage["domain"])
    return {
        "domain": domain,
        "stage": stage["name"],
        "measured": paired_difference(after, before).record(0.0) | {"unit": "reward"},
        "effect": shared["effect"] if shared else None,
    }


def predicted_against_measured(pairs: Sequence[Record]) -> dict[str, Any]:
    """How well predicted and measured damage agree over the pairs of a run (`agreement` of definitions §6).

    Args:
      pairs: the units `damage-…`.

    Returns:
      by objective (the keys of `AGAINST`): {"n": number of pairs with both figures, "points": [[predicted, measured]],
      "spearman", "r_squared"}. Points are in the unit of the objective (`damage.UNITS`). R² is that of the line
      measured = predicted. Both are records. Spearman has no estimate with fewer than five points or if all predicted
      damages are equal (`rank_agreement`), R² with fewer than three points; neither has one if the measured damages are
      all equal. With three or four points R² has no interval.

    Raises:
      KeyError: if a pair lacks one of the objectives or a field.
    """
    out = {}
    for name, measure in AGAINST.items():
        points = [
            [pair["objectives"][name]["predicted"]["estimate"], pair["objectives"][measure]["measured"]["estimate"]]
            for pair in pairs
        ]
        points = [p for p in points if None not in p]
        out[name] = {"n": len(points), "points": points}
        predicted, measured = ([p[i] for p in points] for i in (0, 1))
        explained = r_squared(predicted, measured) if len(points) > 2 else None
        out[name]["spearman"] = rank_agreement(predicted, measured)
        out[name]["r_squared"] = explained.record(0.0) if explained else missing("too few pairs", n=len(points))
    return out


def solo_agreement(pairs: Sequence[Record]) -> tuple[dict[str, Any], Assignment | None]:
    """How well the predicted effect of a solo edit agrees with the measured one, prompt by prompt (C4).

    Args:
      pairs: those of the unit `solo-effects`: every ordered pair of some domains, with "domain" (A), and in "predicted"
        and "measured" one value for each of A's prompts.

    Returns:
      ({"pairs", "agreement"}, test). "pairs" has the same records with "spearman", the rank correlation over the
      prompts of A, which has no estimate with fewer than three prompts or if it is undefined. "agreement" is the mean
      of these correlations, with the assignments of `test` as its null; an undefined one, of a constant prediction,
      counts as 0, and "n" is the number of prompts of all A together. Intervals are expanded percentiles over draws of
      prompts, from a fixed seed; the edits of one A share their draws. `test` is the exact test over assignments of
      edits (`assignment.exact`). An A with fewer than three prompts counts neither in "agreement" nor in `test`.
      Without any other A "agreement" has no estimate and `test` is None.

    Raises:
      KeyError: if a pair lacks a field.
      ValueError: if the pairs of one A have different numbers of prompts.
    """
    if not pairs:
        return {"pairs": [], "agreement": missing("fewer than two domains have a solo stage", "Spearman")}, None
    rng, rows, correlations, draws = np.random.default_rng(0), [], [], []
    for domain in dict.fromkeys(p["domain"] for p in pairs):
        own = [p for p in pairs if p["domain"] == domain]
        predicted_KP, measured_KP = (np.array([p[key] for p in own], float) for key in ("predicted", "measured"))
        n = predicted_KP.shape[1]
        if n < FEWEST_PROMPTS:
            few = missing(f"{n} prompts with a success: too few", "Spearman", n, 0.0)
            rows += [pair | {"spearman": few} for pair in own]
            continue
        correlations.append(np.array([spearman_rho(x, measured_KP) for x in predicted_KP]))
        drawn_RP = rng.integers(0, n, (N_RESAMPLES, n))
        for k, pair in enumerate(own):
            draws_R = spearman_rho(predicted_KP[k][drawn_RP], measured_KP[k][drawn_RP])
            draws.append(np.nan_to_num(draws_R))
            rho = float(correlations[-1][k, k])
            known = draws_R[np.isfinite(draws_R)]
            if np.isfinite(rho):
                figure = expanded_percentile(rho, known, n, "Spearman").record(0.0)
            else:
                figure = missing("a figure is the same for all prompts with a success", "Spearman", n, 0.0)
            rows.append(pair | {"spearman": figure})
    if not correlations:
        why = f"no domain with a solo stage has {FEWEST_PROMPTS} prompts with a success"
        return {"pairs": rows, "agreement": missing(why, "Spearman")}, None
    test = assignment.exact(correlations)
    counts = {p["domain"]: len(p["predicted"]) for p in pairs}
    n = sum(count for count in counts.values() if count >= FEWEST_PROMPTS)
    mean = expanded_percentile(test.statistic, np.mean(draws, axis=0), n, "Spearman").record(null_record(test.means))
    return {"pairs": rows, "agreement": mean}, test


def verdicts(found: Mapping[str, Any], stages: Sequence[Record], test: Assignment | None) -> list[Record]:
    """The verdicts of C1 to C5, as records.

    Args:
      found: the other contents made by `assemble`, by file name.
      stages: all stages, as in the settings.
      test: the exact test of `solo_agreement`, or None.

    Returns:
      one record (`claims.verdicts.judge`) for each of the five claims, C1 first.

    Raises:
      KeyError: if a content lacks a field.
      StopIteration: if a pair of "damage" has a stage that is not in `stages`.
    """
    edits, damage = found["edits"], {(p["domain"], p["stage"]): p for p in found["damage"]["pairs"]}
    own = {s["domain"]: s["name"] for s in stages}
    each = [
        Edit(
            d,
            e["source"],
            _sparsity(e["all"]),
            _sparsity(e["sft"]["all"]) if "all" in e.get("sft", {}) else None,
            _sparsity(e["random_signs"]["all"]) if "random_signs" in e else None,
            e["all"]["fp32"]["relative"],
            e["all"]["participation"],
            _sft_note(e["sft"]) if "sft" in e else "",
        )
        for d, e in edits["domains"].items()
    ]
    solo_effects = found["solo_effects"]
    effects = [t for t in found["damage"]["transfers"] if t["effect"]]
    agreed = rank_agreement(
        [t["effect"]["route"]["estimate"] for t in effects], [t["measured"]["estimate"] for t in effects]
    )
    gradient_pairs, at_peaks, route_pairs = [], [], []
    for (domain, stage), pair in damage.items():
        other = next(s["domain"] for s in stages if s["name"] == stage)
        measured = pair["objectives"]["reward"]["measured"]
        for pairs, comparisons in (
            (gradient_pairs, found["peak_gradients"]),
            (at_peaks, found["gradients"].get(own[domain], {})),
        ):
            if figures := _between(comparisons, domain, other):
                pairs.append(_gradient_pair(domain, other, figures, measured))
        routes = _between(found["routes"].get(own[domain], {}).get("overlaps", {}), domain, other)
        if routes:
            overlap = routes["neurons"]["all"]
            route_pairs.append(RoutePair((domain, other), overlap, overlap["null"]["high"]))
    return [
        interference.c1(each),
        interference.c2(edits["mean_jaccard"], edits["pairs"], edits["again"]),
        interference.c3(gradient_pairs, at_peaks),
        interference.c4(route_pairs, test, _without_prompts(solo_effects["pairs"]), agreed, solo_effects["agreement"]),
        interference.c5([_conflict(key, damage[key], found["subspace"]["pairs"]) for key in damage]),
    ]


def _sparsity(figures: Record) -> Sparsity:
    """The sparsity of one edit, from its figures over all tensors."""
    return Sparsity(
        figures["bf16"]["unchanged"], figures["scale_free"]["small"], figures["scale_free"]["participation"]
    )


def _sft_note(compared: Record) -> str:
    """How the supervised training that an edit is compared with was matched, or why it cannot be compared."""
    if "reason" in compared:
        return compared["reason"]
    matched = compared["matched"]
    return f"{matched['step']} steps of learning rate {matched['learning_rate']:g}"


def _gradient_pair(earlier: str, later: str, figures: Record, damage: Record) -> GradientPair:
    """The input of C3 from the comparison of two gradients (`gradients.compare`)."""
    return GradientPair(
        earlier,
        later,
        figures["model"]["disattenuated"],
        dict(zip(figures["domains"], figures["model"]["reliability"], strict=True)),
        figures["cancellation"]["positive"],
        figures["cancellation"]["negative"],
        len(figures["conflicting"]["tensors"]),
        len(figures["synergistic"]["tensors"]),
        damage,
    )


def _without_prompts(pairs: Sequence[Record]) -> list[Record]:
    """The records of `solo_agreement` without the values of single prompts."""
    return [{k: v for k, v in p.items() if k not in ("predicted", "measured")} for p in pairs]


def _conflict(key: tuple[str, str], pair: Record, subspaces: Sequence[Record]) -> DamagePair:
    """The input of C5 for the pair `key` = (domain, later stage): its damage, and its subspace for each objective."""
    objectives = {}
    for name in CONFLICTS:
        figures = pair["objectives"][name]
        curvature = max(figures["segments"], key=lambda row: row["segments"])["curvature_share"]
        record = next((s for s in subspaces if (s["domain"], s["stage"], s["objective"]) == (*key, name)), None)
        if record is None or "reason" in record:
            reason = record["reason"] if record else "its subspace was not sought (analyze.conflicts)"
            objectives[name] = Objective(curvature, reason=reason)
            continue
        steps = [CurveStep(s["alpha"], s["measured"], s["remainder"], s["second_share"]) for s in figures["curve"]]
        objectives[name] = Objective(curvature, record.get("removal", {}), steps, record)
    return DamagePair(*key, pair["objectives"]["reward"]["measured"], objectives)


def _between(figures: Mapping[str, Any], a: str, b: str) -> Any:
    """The figures of the pair of domains a and b, in either order; None if there are none."""
    return figures.get(f"{a}-{b}") or figures.get(f"{b}-{a}")


def _mean_jaccard(pairs: Sequence[Record]) -> Record:
    """The mean Jaccard by layer over pairs of domains; its null is the average of the pairs' nulls (definitions §3)."""
    known = {tuple(p["domains"]): [p["by_layer"]["estimate"]] for p in pairs if p["by_layer"]["estimate"] is not None}
    if not known:
        return missing("fewer than two domains were trained")
    if len(known) < len(pairs):
        return missing("two of the domains changed no neuron")
    nulls = [p["by_layer"]["null"] for p in pairs if p["by_layer"]["estimate"] is not None]
    return mean_jaccard(known).record({k: float(np.mean([n[k] for n in nulls])) for k in ("mean", "low", "high")})
