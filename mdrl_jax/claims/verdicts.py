"""Verdicts: the published claims, conditions on figures, and how they join (definitions §0, §13).

A figure is a record of a run, {"estimate", "ci95", "null", "n", "unit"}; one that could not be measured has the
estimate None and a "reason". A condition has a verdict and the words for it; a claim's verdict is an AND of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mdrl_jax.stats.estimate import Estimate, magnitude, recorded

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What was published, and the rule it is judged by."""

    text: str
    published: str
    rule: str


CLAIMS = {
    "C1": Claim(
        "RL on one domain gives sparse, small edits",
        "77–89 % of parameters with |Δ| < 1e-7 and relative change < 1e-3",
        "share with relative change < 1e-3 above 0.5 and participation ratio below 0.3, for every solo edit",
    ),
    "C2": Claim(
        "the most-changed neurons of two domains overlap weakly",
        "mean Jaccard of the top 10 % below 0.19; two random sets give 0.053",
        "mean pairwise Jaccard of the top 10 % below 0.19",
    ),
    "C3": Claim(
        "full-model gradients are near-orthogonal although interference is real",
        "Math–QA cosine ≈ 0 over the full model",
        "full-model |cos| below 0.1 with reliability above 0.5, at least one tensor conflicting and one synergistic, "
        "and measured damage above 0",
    ),
    "C4": Claim(
        "domains share active routes, and the update on them decides synergy or conflict",
        "no figure",
        "route Jaccard above the null's 97.5 % for every pair, and Spearman of −g_A·δ_B on the shared route with "
        "measured transfer above 0",
    ),
    "C5": Claim(
        "damage is mainly second-order, in a low-dimensional shared conflict subspace",
        "Δ ≈ ½ δᵀHδ ≈ ½ (P_S δ)ᵀ H (P_S δ)",
        "at the largest α with |remainder| ≤ 20 % of measured: second-order share of predicted damage above ½, and "
        "c(16) above every baseline of equal k",
    ),
    "C6": Claim(
        "a brief refresh contracts the harmful component at little cost to the others",
        "Math 66.49 → 57.66 → 66.04 after Re-Math, a fraction of 0.949; average 64.25 → 66.39",
        "recovery fraction above 0.5 at ≤ 20 % of a stage's steps, collateral below 3 points, and ‖P_S e‖ contracts "
        "faster than ‖P_S⊥ e‖",
    ),
    "C7": Claim(
        "training-free rollback on a sparse proxy conflict coordinate set restores Math in part",
        "no figure",
        "A's gain at equal loss of B above each control's",
    ),
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of a rule with its verdict and the words for it."""

    verdict: str
    words: str


def above(figure: Record, bound: float, name: str) -> Condition:
    """figure > bound; undecided where it is not measurable."""
    return _condition(figure, bound, name, exceeds, ("above", "not above"))


def under(figure: Record, bound: float, name: str) -> Condition:
    """figure < bound; undecided where it is not measurable."""
    return _condition(figure, bound, name, below, ("below", "not below"))


def size_under(figure: Record, bound: float, name: str) -> Condition:
    """|figure| < bound; undecided where it is not measurable."""
    estimate = recorded(figure)
    return under(figure if estimate is None else magnitude(estimate).record(), bound, name)


def _condition(
    figure: Record, bound: float, name: str, rule: Callable[[Estimate, float], str], words: tuple[str, str]
) -> Condition:
    estimate = recorded(figure)
    if estimate is None:
        return Condition("undecided", f"{name} is not measurable: {figure['reason']}")
    verdict = rule(estimate, bound)
    which = {"supported": words[0], "contradicted": words[1], "undecided": "undecided against"}[verdict]
    interval = f"[{estimate.low:.3g}, {estimate.high:.3g}]" if figure["ci95"] else "without an interval"
    return Condition(verdict, f"{name} {estimate.value:.3g} {interval} is {which} {bound:.3g}")


def every(*conditions: Condition) -> Condition:
    """The AND; its words are those of the conditions that decide it."""
    if not conditions:
        return Condition("undecided", "not measurable: no figures")
    verdict = both(*(c.verdict for c in conditions))
    deciding = [c.words for c in conditions if c.verdict == verdict]
    return Condition(verdict, "; ".join(dict.fromkeys(deciding)))


def smallest(figures: Sequence[Record]) -> Record | None:
    """The measured figure with the smallest estimate."""
    return min((f for f in figures if f["estimate"] is not None), key=lambda f: f["estimate"], default=None)


def row_of(condition: Condition) -> Record:
    """A case in the `rows` of a claim."""
    return {"verdict": condition.verdict, "reason": condition.words}


def headline(claim: str, judged: Sequence[tuple[Any, Condition, Record | None]]) -> Record:
    """The verdict of the pair with the largest measured damage; all pairs as rows."""
    rows = [{"pair": [p.earlier, p.later], **row_of(c), "damage": p.damage} for p, c, _ in judged]
    known = [j for j in judged if j[0].damage["estimate"] is not None]
    if not known:
        return judge(claim, Condition("undecided", "not measurable: no pair has a measured damage"), None, rows)
    pair, condition, figure = max(known, key=lambda j: j[0].damage["estimate"])
    words = f"{pair.earlier} after {pair.later}: {condition.words}"
    return judge(claim, Condition(condition.verdict, words), figure, rows)


def judge(claim: str, condition: Condition, figure: Record | None, rows: list[Record]) -> Record:
    """The record of a claim: the verdict with the figure that speaks loudest."""
    figure = figure or {"estimate": None, "ci95": None, "null": None}
    described = CLAIMS[claim]
    return {
        "id": claim,
        "claim": described.text,
        "verdict": condition.verdict,
        "estimate": figure["estimate"],
        "ci95": figure["ci95"],
        "null": figure["null"],
        "published": described.published,
        "rule": described.rule,
        "reason": condition.words,
        "rows": rows,
    }


def exceeds(estimate: Estimate | None, bound: float) -> str:
    """Verdict on "x > bound" (definitions §13): "supported" where the interval lies above the bound,
    "contradicted" where it lies below, else, and for what could not be measured, "undecided".
    """
    if estimate is None:
        return "undecided"
    return "supported" if estimate.low > bound else "contradicted" if estimate.high < bound else "undecided"


def below(estimate: Estimate | None, bound: float) -> str:
    """Verdict on "x < bound", the mirror of `exceeds`."""
    return {"supported": "contradicted", "contradicted": "supported"}.get(exceeds(estimate, bound), "undecided")


def both(*verdicts: str) -> str:
    """Verdict on all conditions at once: contradicted if any is, supported if all are, else undecided."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"
