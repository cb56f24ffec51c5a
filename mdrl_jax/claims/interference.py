"""The rules that judge the published claims C1 to C5, on interference (definitions §0, §13).

The rules are the same for every run. Each is a pure function of the figures in `inputs.py` and returns the record of
`verdicts.judge`: the verdict, the verdict of each part of the rule, the figure printed with it, the published figure,
one line with the reason, and the verdict by the rule of the first edition (`first_edition.py`). Its `rows` list every
domain or pair. How often each rule is right in simulated runs is in `claims/README.md`.

Choices where the definitions leave room:
  * The rules judge the figures of one run, so there is no verdict over seeds. Shares of weights (C1) and overlaps of
    neurons (C2) are exact counts: they are compared without an interval, and the verdict is of this run.
  * "Every" is an AND. One contradicted case contradicts the claim. Otherwise one undecided case leaves it undecided.
  * A part without evidence is undecided, and its reason names the configuration that gathers it.
  * A claim about one pair of domains (C3, C5) gets the verdict of the pair with the largest measured damage. The other
    pairs are listed with their own verdicts. The largest of several noisy figures is biased up, so its own test
    against 0 is mild.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mdrl_jax.claims import first_edition
from mdrl_jax.claims.assignment import Assignment
from mdrl_jax.claims.inputs import DamagePair, Edit, GradientPair, Objective, RoutePair, Sparsity
from mdrl_jax.claims.published import SEE, WEAK_OVERLAP
from mdrl_jax.claims.verdicts import (
    Condition,
    Judged,
    Part,
    above,
    all_parts,
    counted_above,
    counted_under,
    every,
    headline,
    judge,
    parts_record,
    size_under,
    smallest,
    under,
)
from mdrl_jax.stats.estimate import Record, missing

LEVEL = 0.05  # of the one-sided exact test of C4
FEWEST_ASSIGNMENTS = round(1 / LEVEL)  # with fewer, no p-value can be below the level


def _old(claim: str, condition: Condition) -> tuple[str, Condition]:
    return first_edition.EARLIER[claim], condition


def c1(edits: Sequence[Edit]) -> Record:
    """Judges C1: the edit of every domain is sparse, and sparser than SFT and random signs make it.

    The parts of the rule, each an AND over domains: "unchanged weights", the share of weights whose bfloat16 value did
    not change is above 0.5; "sparser than SFT" and "sparser than random signs", the scale-free share of small entries
    is above, and the participation ratio within tensors below, that of the compared edit. All are exact counts, so they
    are compared without intervals. A missing comparison is undecided. The printed figure is the smallest share of
    unchanged weights of a domain.

    Args:
      edits: one edit for each domain: its solo edit, or its sequential one if there was no solo stage. Without edits
        the claim is undecided.

    Returns:
      The record of the claim (`verdicts.judge`), with a row for each domain: {"domain", "source", "verdict", "parts"}.
    """
    rows, by_part = [], {}
    for edit in edits:
        parts = _sparsity_parts(edit)
        for name, condition in parts:
            by_part.setdefault(name, []).append(condition)
        verdict = all_parts(parts).verdict
        rows.append({"domain": edit.domain, "source": edit.source, "verdict": verdict, "parts": parts_record(parts)})
    parts = [(name, every(*conditions)) for name, conditions in by_part.items()]
    old = _old("C1", first_edition.c1(edits))
    return judge("C1", all_parts(parts), smallest([e.rl.unchanged for e in edits]), rows, parts, old)


def _sparsity_parts(edit: Edit) -> list[Part]:
    name = f"{edit.domain} ({edit.source} edit)"
    trained = f"SFT of {edit.sft_note}" if edit.sft and edit.sft_note else "SFT"
    nulls = "; ".join(
        f"{who}: {_text(x.unchanged['estimate'])}" if x else f"{who}: not measured"
        for who, x in (("random signs", edit.random_signs), (trained, edit.sft))
    )
    share = counted_above(edit.rl.unchanged["estimate"], 0.5, f"{name}: share unchanged in bfloat16")
    figures = edit.rl.small, edit.rl.participation
    own, gaussian = (
        " and ".join(map(_text, x)) for x in ([f["estimate"] for f in figures], [f["null"] for f in figures])
    )
    unmatched = edit.sft_note or f"no SFT to the same score has run; {SEE}"
    unrecorded = (
        "the updates of its steps were not recorded; scale-free share and participation ratio are "
        f"{own}, and {gaussian} for equal steps with random signs; {SEE}"
    )
    return [
        ("unchanged weights", dataclasses.replace(share, words=f"{share.words} ({nulls})")),
        ("sparser than SFT", _sparser(name, edit.rl, edit.sft, unmatched)),
        ("sparser than random signs", _sparser(name, edit.rl, edit.random_signs, unrecorded)),
    ]


def _sparser(name: str, rl: Sparsity, other: Sparsity | None, absent: str) -> Condition:
    if other is None:
        return Condition("undecided", f"{name}: {absent}")
    known = [x["estimate"] for x in (other.small, other.participation)]
    if None in known:
        return Condition("undecided", f"{name}: what it is compared with changed nothing")
    return every(
        counted_above(rl.small["estimate"], known[0], f"{name}: scale-free share"),
        counted_under(rl.participation["estimate"], known[1], f"{name}: participation ratio within tensors"),
    )


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def c2(mean: Record, pairs: Sequence[Record] = (), again: Sequence[Record] = ()) -> Record:
    """Judges C2: the most-changed neurons of two domains overlap weakly, compared with one domain trained twice.

    J is the mean Jaccard over pairs of domains, and J' that of one domain trained twice, the ceiling. The printed
    figure is (J − chance)/(J' − chance), with the mean over domains in the denominator. The claim is supported if it is
    below ½, otherwise contradicted; J is an exact count, so there is no interval.

    If there is no ceiling, the printed figure is J. J at or above the published bound, 0.19, contradicts the claim, and
    J below it leaves it undecided, because two random sets would be below it too. The claim is also undecided if J is
    not measured, or, then without a figure, if a J' is not above the upper end of its null.

    Args:
      mean: J, with its chance as the null: {"mean", "low", "high"}.
      pairs: records of the pairs, which become the `rows` as they are.
      again: for each domain with two solo stages, {"domain", "by_layer": its J' with such a null}.

    Returns:
      The record of the claim (`verdicts.judge`). Its `rows` are `pairs` and then `again`.
    """
    old = _old("C2", first_edition.c2(mean))
    if not again or mean["estimate"] is None:
        published = counted_under(mean["estimate"], WEAK_OVERLAP, "mean pairwise Jaccard")
        if mean["estimate"] is None:
            published = Condition("undecided", f"mean pairwise Jaccard is not measurable: {mean['reason']}")
        weak = Condition("undecided", f"weak: no ceiling measured; {SEE}")
        parts = [("published bound", published), ("below half of the ceiling", weak)]
        return judge("C2", _named_weak(published, weak), mean, [*pairs, *again], parts, old)
    ceilings = [x["by_layer"] for x in again]
    low = [x["domain"] for x in again if not (x["by_layer"]["estimate"] or 0.0) > x["by_layer"]["null"]["high"]]
    if low:
        words = f"not measurable: two solo stages of {', '.join(low)} overlap no more than random sets"
        condition = Condition("undecided", words)
        return judge("C2", condition, None, [*pairs, *again], [("below half of the ceiling", condition)], old)
    ceiling = float(np.mean([c["estimate"] - c["null"]["mean"] for c in ceilings]))
    share = (mean["estimate"] - mean["null"]["mean"]) / ceiling
    condition = counted_under(share, 0.5, "overlap above chance, as a share of that of one domain trained twice,")
    figure = {"estimate": share, "ci95": None, "null": 0.0, "n": mean["n"], "unit": "share"}
    return judge("C2", condition, figure, [*pairs, *again], [("below half of the ceiling", condition)], old)


def _named_weak(published: Condition, weak: Condition) -> Condition:
    if published.verdict == "contradicted":
        return published
    return Condition("undecided", f"{weak.words}; {published.words}")


def c3(pairs: Sequence[GradientPair], at_peaks: Sequence[GradientPair]) -> Record:
    """Judges C3: the full-model gradients are near-orthogonal, because tensors cancel, and yet B harms A.

    The parts of the rule, all judged by intervals: "near-orthogonal", |cos| below 0.1, undecided unless both gradients
    have a reliability above 0.5; "tensors cancel", the sum of positive products of tensors above 0 and that of negative
    ones below 0, supported or undecided; and "harm", measured damage above 0.

    Args:
      pairs: every pair of an earlier and a later domain, with success-NLL gradients at θ_0 of completions sampled at
        each domain's own peak. Without pairs the claim is undecided.
      at_peaks: the same pairs with reward gradients at θ*_A, for the rule of the first edition.

    Returns:
      The record of the claim (`verdicts.headline`): verdict and cosine of the pair with the largest measured damage,
      and a row for each pair.
    """
    first = {(p.earlier, p.later): first_edition.c3(p) for p in at_peaks}
    none = Condition("undecided", "not measurable: the gradients at the peak were not compared")
    judged = [
        Judged(p.earlier, p.later, p.damage, _gradient_parts(p), p.cosine, first.get((p.earlier, p.later), none))
        for p in pairs
    ]
    return headline("C3", judged, first_edition.EARLIER["C3"])


def _gradient_parts(pair: GradientPair) -> list[Part]:
    reliable = every(*(above(f, 0.5, f"reliability of the {d} gradient") for d, f in pair.reliability.items()))
    orthogonal = size_under(pair.cosine, 0.1, "full-model |cos|")
    if reliable.verdict != "supported":
        orthogonal = Condition("undecided", f"the cosine is not measurable: {reliable.words}")
    cancelling = every(
        above(pair.positive, 0.0, "sum of the positive products of tensors"),
        under(pair.negative, 0.0, "sum of the negative products of tensors"),
    )
    if cancelling.verdict == "contradicted":  # a sum of positive products below 0 is noise, and says nothing
        cancelling = Condition("undecided", cancelling.words)
    return [
        ("near-orthogonal", orthogonal),
        ("tensors cancel", cancelling),
        ("harm", above(pair.damage, 0.0, "measured damage")),
    ]


def c4(
    pairs: Sequence[RoutePair], test: Assignment | None, effects: Sequence[Record], agreement: Record, figure: Record
) -> Record:
    """Judges C4: domains share active routes, and the update on the shared route decides which prompts gain or lose.

    The parts of the rule: "shared routes", by its interval the route Jaccard of every pair is above the 97.5th
    percentile of its null; and "the edit predicts", by the exact test: supported if p < 0.05, contradicted if the
    opposite p < 0.05. A part is undecided without pairs, or without a test or with one of fewer than 20 assignments.

    Args:
      pairs: the routes of every pair of an earlier and a later domain.
      test: the exact test over all ordered pairs of solo edits; None if there are not enough solo stages.
      effects: a record for each ordered pair of solo edits, which become `rows` as they are.
      agreement: Spearman correlation over pairs of the effect on the shared route with the measured transfer, for the
        rule of the first edition (`stats.tests.rank_agreement`).
      figure: the mean correlation over ordered pairs, which is printed.

    Returns:
      The record of the claim (`verdicts.judge`), with a row for each pair of routes, {"pair", "verdict", "jaccard"},
      and then `effects`.
    """
    shared = [(p, above(p.jaccard, p.null_high, f"{' and '.join(p.domains)}: route Jaccard")) for p in pairs]
    rows = [{"pair": list(p.domains), "verdict": c.verdict, "jaccard": p.jaccard} for p, c in shared]
    parts = [("shared routes", every(*(c for _, c in shared))), ("the edit predicts", _predicts(test))]
    old = _old("C4", first_edition.c4(pairs, agreement))
    return judge("C4", all_parts(parts), figure, [*rows, *effects], parts, old)


def _predicts(test: Assignment | None) -> Condition:
    if test is None or test.means.size < FEWEST_ASSIGNMENTS:
        return Condition("undecided", f"not measurable: it needs solo stages of all four domains; {SEE}")
    words = (
        f"mean rank correlation {test.statistic:.3g} of predicted with measured change of a prompt's NLL: exact "
        f"p = {test.p:.3g} over {test.means.size} assignments of edits"
    )
    verdict = "supported" if test.p < LEVEL else "contradicted" if test.p_opposite < LEVEL else "undecided"
    if verdict == "contradicted":
        words += f", opposite p = {test.p_opposite:.3g}"
    name = f"exact p of a mean rank correlation of {test.statistic:.3g}"
    figure = {"name": name, "estimate": test.p, "ci95": None, "unit": "", "asked": f"below {LEVEL:g}"}
    return Condition(verdict, words, (figure | {"verdict": verdict},))


def c5(pairs: Sequence[DamagePair]) -> Record:
    """Judges C5: damage is mainly curvature, and removing its part in the conflict subspace S undoes most of it.

    The parts of the rule, all judged by intervals: "mainly curvature", the curvature share of the predicted damage is
    above ½; "concentrated in S", removal of P_S D undoes more than removal of every other piece of equal norm; and
    "mainly in S", it undoes more than ½ of the damage. The verdict is that of the pair with the largest measured
    damage. All parts of a pair whose measured damage is not above 0 by its interval are undecided, and so are parts
    whose figure was not measured. Success NLL decides; mean reward is only listed. The printed figure is the share of
    damage that removal undoes, or the curvature share if there was no removal.

    Args:
      pairs: every pair of an earlier and a later domain. Without pairs the claim is undecided.

    Returns:
      The record of the claim (`verdicts.headline`). Each row also has "reward", the parts judged by mean reward, as
      `verdicts.parts_record`.
    """
    judged = []
    for pair in pairs:
        deciding = pair.objectives.get("success_nll", Objective())
        figure = deciding.removal.get("undone") or deciding.curvature
        parts = _damage_parts(pair, deciding)
        judged.append(Judged(pair.earlier, pair.later, pair.damage, parts, figure, first_edition.c5(pair)))
    record = headline("C5", judged, first_edition.EARLIER["C5"])
    for row, pair in zip(record["rows"], pairs, strict=True):
        row["reward"] = parts_record(_damage_parts(pair, pair.objectives.get("reward", Objective())))
    return record


def _damage_parts(pair: DamagePair, objective: Objective) -> list[Part]:
    names = ("mainly curvature", "concentrated in S", "mainly in S")
    harmed = above(pair.damage, 0.0, "measured damage")
    if harmed.verdict != "supported":
        return [(name, Condition("undecided", f"not measurable: {harmed.words}")) for name in names]
    none = missing("the prediction along the path was not computed")
    curved = above(objective.curvature or none, 0.5, "curvature share of the damage predicted along the path")
    if not objective.removal:
        why = objective.reason or f"the removal test has not run; {SEE}"
        left = Condition("undecided", f"not measurable: {why}")
        return [(names[0], curved), (names[1], left), (names[2], left)]
    removal = objective.removal
    size = f" (k = {removal['k']}, share of ‖D‖² {removal['share_of_norm']:.3g})"
    beyond = every(*(above(m["margin"], 0.0, f"share undone minus that of {m['name']}") for m in removal["margins"]))
    most = above(removal["undone"], 0.5, "share of damage undone by removing P_S D")
    return [(names[0], curved), (names[1], beyond), (names[2], dataclasses.replace(most, words=most.words + size))]
