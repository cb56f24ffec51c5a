"""Verdicts on conditions, how they are joined, and the record of a claim (definitions §0, §13).

A figure is a record of a run, {"estimate", "ci95", "null", "n", "unit"}. A figure that could not be measured has the
estimate None and a "reason". A condition on a figure has a verdict and words that explain it. The verdict of a claim is
the AND of its conditions. A figure that lacks one of these fields raises KeyError where it is used.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mdrl_jax.claims.published import CLAIMS
from mdrl_jax.stats.estimate import Estimate, Record, figure_text, magnitude, missing, recorded


def exceeds(estimate: Estimate | None, bound: float) -> str:
    """Verdict on "x > bound": "supported" if the interval of x lies above the bound, "contradicted" if it lies below.

    If the interval includes the bound (its ends belong to it), or if x could not be measured, the verdict is
    "undecided".

    Args:
      estimate: x with its interval; None if it could not be measured.
      bound: the bound, in the unit of x.
    """
    if estimate is None:
        return "undecided"
    return "supported" if estimate.low > bound else "contradicted" if estimate.high < bound else "undecided"


def below(estimate: Estimate | None, bound: float) -> str:
    """Verdict on "x < bound": "supported" if the interval of x lies below the bound, "contradicted" if it lies above.

    If the interval includes the bound (its ends belong to it), or if x could not be measured, the verdict is
    "undecided".

    Args:
      estimate: x with its interval; None if it could not be measured.
      bound: the bound, in the unit of x.
    """
    return {"supported": "contradicted", "contradicted": "supported"}.get(exceeds(estimate, bound), "undecided")


def both(*verdicts: str) -> str:
    """Verdict on all conditions at once: contradicted if any is, supported if all are, else undecided.

    Args:
      *verdicts: "supported", "contradicted" or "undecided" of any number of conditions. Without one the result is
        "undecided".
    """
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of a rule.

    Attributes:
      verdict: "supported", "contradicted" or "undecided".
      words: the words that explain it.
      figures: the figures that decide: {"name", "estimate", "ci95", "unit", "asked", "verdict"}, where "asked" is the
        side of the bound that the rule asks for, such as "above 0.5". Empty if none was measured.
    """

    verdict: str
    words: str
    figures: tuple[Record, ...] = ()


def above(figure: Record, bound: float, name: str) -> Condition:
    """The condition "figure > bound", by the rule of `exceeds`.

    It is supported or contradicted if the whole interval lies on one side of the bound. Otherwise, and for a figure
    without an estimate or without an interval, it is undecided.

    Args:
      figure: the record of the figure.
      bound: the bound, in the unit of the figure.
      name: the name of the figure in the words of the condition.

    Returns:
      the condition, with the figure as its deciding figure unless it has no estimate.

    Raises:
      KeyError: if the figure lacks a field.
    """
    return _condition(figure, bound, name, exceeds, "above")


def under(figure: Record, bound: float, name: str) -> Condition:
    """The condition "figure < bound", by the rule of `below`.

    It is supported or contradicted if the whole interval lies on one side of the bound. Otherwise, and for a figure
    without an estimate or without an interval, it is undecided.

    Args:
      figure: the record of the figure.
      bound: the bound, in the unit of the figure.
      name: the name of the figure in the words of the condition.

    Returns:
      the condition, with the figure as its deciding figure unless it has no estimate.

    Raises:
      KeyError: if the figure lacks a field.
    """
    return _condition(figure, bound, name, below, "below")


def counted_above(value: float | None, bound: float, name: str) -> Condition:
    """The condition "value > bound" on an exact count of this run, which has no sampling interval.

    Args:
      value: the count or share; None if there is none.
      bound: the bound, in the unit of the value.
      name: the name of the value in the words of the condition.

    Returns:
      the condition: supported if the value is above the bound, contradicted if it is at or below it, undecided and
      without a deciding figure if there is no value.
    """
    return _counted(value, value is not None and value > bound, f"above {bound:.3g}", name)


def counted_under(value: float | None, bound: float, name: str) -> Condition:
    """The condition "value < bound" on an exact count of this run, which has no sampling interval.

    Args:
      value: the count or share; None if there is none.
      bound: the bound, in the unit of the value.
      name: the name of the value in the words of the condition.

    Returns:
      the condition: supported if the value is below the bound, contradicted if it is at or above it, undecided and
      without a deciding figure if there is no value.
    """
    return _counted(value, value is not None and value < bound, f"below {bound:.3g}", name)


def _counted(value: float | None, held: bool, what: str, name: str) -> Condition:
    if value is None:
        return Condition("undecided", f"{name} is not measurable")
    words = f"{name} {value:.3g} is {what if held else f'not {what}'}"
    verdict = "supported" if held else "contradicted"
    return Condition(verdict, words, (_decider(name, value, None, "", what, verdict),))


def size_under(figure: Record, bound: float, name: str) -> Condition:
    """The condition "|figure| < bound", with the interval of |figure| by `stats.estimate.magnitude`.

    That interval starts at 0 if the figure's own includes 0.

    Args:
      figure: the record of the figure, which may be negative.
      bound: the bound, in the unit of the figure.
      name: the name of |figure| in the words of the condition.

    Returns:
      the condition of `under` on |figure|.

    Raises:
      KeyError: if the figure lacks a field.
    """
    estimate = recorded(figure)
    return under(figure if estimate is None else magnitude(estimate).record(), bound, name)


def _condition(figure: Record, bound: float, name: str, rule: Callable[[Estimate, float], str], side: str) -> Condition:
    estimate = recorded(figure)
    if estimate is None:
        return Condition("undecided", f"{name} is not measurable: {figure['reason']}")
    verdict = rule(estimate, bound)
    which = {"supported": side, "contradicted": f"not {side}", "undecided": "undecided against"}[verdict]
    shown = figure_text(estimate.value, figure["ci95"], ".3g", "without an interval")
    asked = f"{side} {bound:.3g}"
    decider = _decider(name, estimate.value, figure["ci95"], figure.get("unit", ""), asked, verdict)
    return Condition(verdict, f"{name} {shown} is {which} {bound:.3g}", (decider,))


def _decider(name: str, value: float, ci95: list[float] | None, unit: str, asked: str, verdict: str) -> Record:
    head = {"name": name.rstrip(","), "estimate": value, "ci95": ci95, "unit": unit}
    return head | {"asked": asked, "verdict": verdict}


def every(*conditions: Condition) -> Condition:
    """The AND of all conditions: contradicted if any is, supported if all are, else undecided.

    Without conditions it is undecided. Its words and figures are those of the conditions that have the resulting
    verdict. Conditions with the same words count once; "; " stands between the words.
    """
    if not conditions:
        return Condition("undecided", "not measurable: no figures")
    verdict = both(*(c.verdict for c in conditions))
    deciding = [c for c in conditions if c.verdict == verdict]
    once = {c.words: c for c in deciding}
    return Condition(verdict, "; ".join(once), tuple(figure for c in once.values() for figure in c.figures))


def smallest(figures: Sequence[Record]) -> Record | None:
    """The measured figure with the smallest estimate, the first of equal ones; None if none was measured."""
    return min((f for f in figures if f["estimate"] is not None), key=lambda f: f["estimate"], default=None)


Part = tuple[str, Condition]  # the name of one part of a rule, and its condition


def judge(
    claim: str,
    condition: Condition,
    figure: Record | None,
    rows: list[Record],
    parts: Sequence[Part] = (),
    old: tuple[str, Condition] | None = None,
) -> Record:
    """The record of a claim for `claims.json`.

    Args:
      claim: its id, a key of `CLAIMS`.
      condition: the verdict with its reason. For a rule of several parts it is `every` of their conditions.
      figure: the figure that is printed with the verdict; None if there is none.
      rows: a record for each case (domain, pair or stage).
      parts: the name and the condition of each part of the rule; empty for a rule of one part.
      old: the text of the rule that the present one replaces, and its condition on the same run; None if there is none.

    Returns:
      "id", "claim" (its text), "verdict", "estimate", "ci95" and "null" of the figure (None without one), "published",
      "rule", "reason", "rows", "parts" (`parts_record`) and "old_rule" ({"rule", "verdict", "reason"} or None).

    Raises:
      KeyError: if `CLAIMS` has no such claim.
    """
    figure = figure or missing(condition.words)
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
        "parts": parts_record(parts),
        "old_rule": {"rule": old[0], **row_of(old[1])} if old else None,
    }


def parts_record(parts: Sequence[Part]) -> list[Record]:
    """The parts of a rule as records: {"part": name, "verdict", "words", "figures": as of `Condition`}."""
    return [{"part": name, "verdict": c.verdict, "words": c.words, "figures": list(c.figures)} for name, c in parts]


def all_parts(parts: Sequence[Part]) -> Condition:
    """The AND of the parts of a rule (`every`); undecided without parts.

    Its words are those of the parts that decide, each after the name of its part and a colon.
    """
    return every(*(dataclasses.replace(c, words=f"{name}: {c.words}") for name, c in parts))


def row_of(condition: Condition) -> Record:
    """The verdict and the reason of one case, for the `rows` of a claim: {"verdict", "reason"}."""
    return {"verdict": condition.verdict, "reason": condition.words}


@dataclasses.dataclass(frozen=True)
class Judged:
    """One pair of domains, judged by a rule.

    Attributes:
      earlier, later: names of the two domains.
      damage: measured damage of the earlier domain's reward.
      parts: the name and the condition of each part of the rule.
      figure: the figure that is printed if the claim gets this pair's verdict; None if there is none.
      old: the condition by the rule that the present one replaces.
    """

    earlier: str
    later: str
    damage: Record
    parts: Sequence[Part]
    figure: Record | None
    old: Condition


def headline(claim: str, judged: Sequence[Judged], old_rule: str) -> Record:
    """The record of a claim that gets the verdict of the pair with the largest measured damage.

    Args:
      claim: its id, a key of `CLAIMS`.
      judged: every pair.
      old_rule: the text of the rule that the present one replaces.

    Returns:
      The record of `judge`, with all pairs in `rows` ({"pair", "verdict", "reason", "damage", "parts"}), in the given
      order. Verdict, parts and figure are those of the pair whose damage has the largest estimate, the first of equal
      ones; the reason begins with its name, "A after B: ". The claim is undecided, without a figure, if no pair has a
      measured damage.

    Raises:
      KeyError: if `CLAIMS` has no such claim.
    """
    rows = [
        {"pair": [j.earlier, j.later], **row_of(all_parts(j.parts)), "damage": j.damage, "parts": parts_record(j.parts)}
        for j in judged
    ]
    known = [j for j in judged if j.damage["estimate"] is not None]
    if not known:
        none = Condition("undecided", "not measurable: no pair has a measured damage")
        return judge(claim, none, None, rows, old=(old_rule, none))
    worst = max(known, key=lambda j: j.damage["estimate"])
    named, old = (
        Condition(c.verdict, f"{worst.earlier} after {worst.later}: {c.words}")
        for c in (all_parts(worst.parts), worst.old)
    )
    return judge(claim, named, worst.figure, rows, worst.parts, (old_rule, old))
