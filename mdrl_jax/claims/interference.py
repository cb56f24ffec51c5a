"""The rules that judge the published claims C1 to C5, on interference (definitions §0, §13).

The rules were fixed before any run. Each is a pure function of figures from the records of a run: {"estimate", "ci95",
"null", "n", "unit"}. A figure that could not be measured has the estimate None and a "reason". Each rule returns the
record of `verdicts.judge`: the verdict, the figure printed with it, the published figure and one line with the reason
of the verdict. Its `rows` list every domain or pair.

Choices where the definitions leave room:
  * The rules judge the figures of one run, so there is no verdict over seeds. Shares of entries (C1) are exact counts;
    their intervals come from a jackknife over layers.
  * "Every" is an AND. One contradicted case contradicts the claim. Otherwise one undecided case leaves it undecided.
  * A claim about one pair of domains (C3, C5) gets the verdict of the pair with the largest measured damage. The other
    pairs are listed with their own verdicts. The largest of several noisy figures is biased up, so its own test
    against 0 is mild.
  * If a precondition fails (a reliable gradient, a measurable loss), the case is undecided, never contradicted. The
    same holds if a test of tensors finds none (C3).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mdrl_jax.claims.published import WEAK_OVERLAP
from mdrl_jax.claims.verdicts import (
    Condition,
    above,
    every,
    headline,
    judge,
    row_of,
    size_under,
    smallest,
    under,
)
from mdrl_jax.stats.estimate import Record

MAX_REMAINDER = 0.2  # share of the measured damage; the expansion counts as local up to it (C5)


@dataclasses.dataclass(frozen=True)
class Edit:
    """The edit of one domain.

    Attributes:
      domain: the trained domain.
      source: "solo", or "sequential" if there was no solo stage.
      relative_share: share of entries with |δ|/|θ| < 1e-3.
      participation: participation ratio (Σδ²)² / (nΣδ⁴).
    """

    domain: str
    source: str
    relative_share: Record
    participation: Record


@dataclasses.dataclass(frozen=True)
class GradientPair:
    """The gradients of an earlier domain A and a later domain B at A's peak θ*_A.

    Attributes:
      earlier, later: the names of A and B.
      cosine: cosine over the full model, corrected for noise (disattenuated).
      reliability: ρ of each domain's gradient, by domain.
      conflicting, synergistic: number of tensors whose inner product is measurably below 0 and above 0, by
        Benjamini–Hochberg at q = 0.05.
      damage: measured damage of A's reward by B.
    """

    earlier: str
    later: str
    cosine: Record
    reliability: Mapping[str, Record]
    conflicting: int
    synergistic: int
    damage: Record


@dataclasses.dataclass(frozen=True)
class RoutePair:
    """The routes of two domains.

    Attributes:
      domains: names of the two.
      jaccard: their Jaccard index.
      null_high: the 97.5th percentile of its null, random sets of equal sizes.
    """

    domains: tuple[str, str]
    jaccard: Record
    null_high: float


@dataclasses.dataclass(frozen=True)
class CurveStep:
    """One α of the damage curve along θ* + αD.

    Attributes:
      alpha: the share of the displacement D.
      measured: measured damage at α.
      remainder: measured minus predicted damage.
      second_share: share of the prediction that is second order, ½α²DᵀHD / (α g·D + ½α²DᵀHD).
    """

    alpha: float
    measured: Record
    remainder: Record
    second_share: Record


@dataclasses.dataclass(frozen=True)
class Objective:
    """The damage of one pair by one objective (expected reward or success NLL).

    Attributes:
      steps: the damage curve, one entry for each α.
      ladder: the record of the conflict subspace that `analysis.captured.measure` makes.
      reason: why the objective could not be measured; then the other two are empty.
    """

    steps: Sequence[CurveStep] = ()
    ladder: Record = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class DamagePair:
    """The damage that a later domain does to an earlier one.

    Attributes:
      earlier, later: names of the two domains.
      damage: measured damage of the reward at α = 1, with fresh samples.
      objectives: the prediction by each objective, by name.
    """

    earlier: str
    later: str
    damage: Record
    objectives: Mapping[str, Objective]


def c1(edits: Sequence[Edit]) -> Record:
    """Judges C1: the edit of every domain is sparse. The printed figure is the smallest `relative_share`.

    Args:
      edits: one edit for each domain: its solo edit, or its sequential one if there was no solo stage. Without edits
        the claim is undecided.

    Returns:
      The record of the claim (`verdicts.judge`), with one row for each domain: {"domain", "source", "verdict"}.
    """
    rows, conditions = [], []
    for edit in edits:
        name = f"{edit.domain} ({edit.source} edit)"
        condition = every(
            above(edit.relative_share, 0.5, f"{name}: share of small changes"),
            under(edit.participation, 0.3, f"{name}: participation ratio"),
        )
        conditions.append(condition)
        rows.append({"domain": edit.domain, "source": edit.source, "verdict": condition.verdict})
    shares = [edit.relative_share for edit in edits]
    return judge("C1", every(*conditions), smallest(shares), rows=rows)


def c2(mean: Record, pairs: Sequence[Record] = ()) -> Record:
    """Judges C2: the most-changed neurons of two domains overlap weakly. The printed figure is `mean`.

    Args:
      mean: mean Jaccard over the pairs of domains, with its chance value as null.
      pairs: records of the pairs, which become the `rows` as they are.

    Returns:
      The record of the claim (`verdicts.judge`).
    """
    return judge("C2", under(mean, WEAK_OVERLAP, "mean pairwise Jaccard"), mean, rows=list(pairs))


def c3(pairs: Sequence[GradientPair]) -> Record:
    """Judges C3: the full-model gradients are near-orthogonal, yet some tensors conflict, others agree, and B harms A.

    Args:
      pairs: every pair of an earlier and a later domain. Without pairs the claim is undecided.

    Returns:
      The record of the claim (`verdicts.headline`): verdict and cosine of the pair with the largest measured damage,
      and a row for each pair.
    """
    return headline("C3", [(p, _gradient_condition(p), p.cosine) for p in pairs])


def _gradient_condition(pair: GradientPair) -> Condition:
    for domain, figure in pair.reliability.items():
        reliable = above(figure, 0.5, f"reliability of the {domain} gradient")
        if reliable.verdict != "supported":
            return Condition("undecided", f"the cosine is not measurable: {reliable.words}")
    tensors = f"{pair.conflicting} tensors conflict and {pair.synergistic} are synergistic"
    found = pair.conflicting > 0 and pair.synergistic > 0
    return every(
        size_under(pair.cosine, 0.1, "full-model |cos|"),
        Condition("supported" if found else "undecided", tensors),
        above(pair.damage, 0.0, "measured damage"),
    )


def c4(pairs: Sequence[RoutePair], agreement: Record) -> Record:
    """Judges C4: domains share active routes, and the effect of an edit on the shared route predicts the transfer.

    Args:
      pairs: the routes of every pair of an earlier and a later domain. Without pairs the claim is undecided, or
        contradicted if `agreement` contradicts it.
      agreement: Spearman correlation over these pairs of the first-order effect −g_A·δ_B on the shared route with the
        measured transfer, as made by `stats.tests.rank_agreement`.

    Returns:
      The record of the claim (`verdicts.judge`), with `agreement` as the printed figure and a row for each pair:
      {"pair", "verdict", "jaccard"}.
    """
    rows, conditions = [], []
    for pair in pairs:
        condition = above(pair.jaccard, pair.null_high, f"{' and '.join(pair.domains)}: route Jaccard")
        conditions.append(condition)
        rows.append({"pair": list(pair.domains), "verdict": condition.verdict, "jaccard": pair.jaccard})
    signs = above(agreement, 0.0, "rank correlation of −g·δ on the shared route with measured transfer")
    return judge("C4", every(every(*conditions), signs), agreement, rows=rows)


def c5(pairs: Sequence[DamagePair]) -> Record:
    """Judges C5: damage is mainly second-order, and the conflict subspace S captures it.

    The verdict is that of the pair with the largest measured damage. A pair whose measured damage is not supported to
    be above 0 is undecided. Otherwise both objectives must hold (AND); an objective that is not measurable is an
    undecided member. The printed figure is the smaller c(k) of the two objectives at the largest k
    (`analyze.vectors`).

    Args:
      pairs: every pair of an earlier and a later domain.

    Returns:
      The record of the claim (`verdicts.headline`). Each row also has "objectives", a list of {"objective", "alpha",
      "verdict", "reason"}; "alpha" is the α of `local_step`, None if there is no such step.
    """
    judged = []
    for pair in pairs:
        by_objective = {name: _objective_condition(o) for name, o in pair.objectives.items()}
        named = [Condition(c.verdict, f"{name}: {c.words}") for name, c in by_objective.items()]
        harmed = above(pair.damage, 0.0, "measured damage")
        condition = every(*named) if harmed.verdict == "supported" else Condition("undecided", harmed.words)
        figures = [o.ladder["captured"][-1]["share"] for o in pair.objectives.values() if o.ladder]
        judged.append((pair, condition, smallest(figures)))
    record = headline("C5", judged)
    for row, pair in zip(record["rows"], pairs, strict=True):
        row["objectives"] = [
            {"objective": name, "alpha": (s := local_step(o.steps)) and s.alpha, **row_of(_objective_condition(o))}
            for name, o in pair.objectives.items()
        ]
    return record


def local_step(steps: Sequence[CurveStep]) -> CurveStep | None:
    """The step with the largest α at which the expansion is local; None if there is none.

    Local means |remainder| ≤ 20 % of |measured damage|, by the estimates. Steps with α = 0, or without one of the two
    estimates, do not count.
    """

    def local(step: CurveStep) -> bool:
        remainder, measured = step.remainder["estimate"], step.measured["estimate"]
        return None not in (remainder, measured) and abs(remainder) <= MAX_REMAINDER * abs(measured)

    return max((s for s in steps if s.alpha > 0 and local(s)), key=lambda s: s.alpha, default=None)


def _objective_condition(objective: Objective) -> Condition:
    if objective.reason or not objective.ladder:
        return Condition("undecided", f"not measurable: {objective.reason or 'no subspace was found'}")
    step = local_step(objective.steps)
    if step is None:
        return Condition("undecided", "not measurable: at no α is the remainder within 20 % of the measured damage")
    harmed = above(step.measured, 0.0, f"measured damage at α = {step.alpha:g}")
    if harmed.verdict != "supported":
        return Condition("undecided", f"not measurable: {harmed.words}")
    return every(
        above(step.second_share, 0.5, f"second-order share at α = {step.alpha:g}"),
        *(above(b["margin"], 0.0, f"c({b['k']}) minus that of {b['name']}") for b in objective.ladder["baselines"]),
    )
