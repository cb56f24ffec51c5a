"""The published claims C1 to C5 on interference, judged by the rules fixed beforehand (definitions §0, §13).

Pure functions of figures as they stand in a run's records: {"estimate", "ci95", "null", "n", "unit"}, where a figure
that could not be measured has the estimate None and a "reason". Each returns a record with the verdict, the figure
that is printed with it, the published one and one line in plain words; `rows` lists every domain or pair.

Choices where the definitions leave room:
  * the figures are those of one run, so there is no verdict over seeds. Shares of entries (C1) are exact counts; their
    intervals are by jackknife over layers;
  * "every" is an AND: one contradicted case contradicts, one undecided case leaves undecided;
  * where a claim is about a pair, the headline is the pair with the largest measured damage, the others are listed
    with verdicts of their own. The largest of several noisy figures is biased up, so its own test against 0 is mild;
  * what has to hold before a question can be asked (reliability, a measurable loss) leaves "undecided" where it
    fails, never "contradicted", and so does a test of tensors that finds none.
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

MAX_REMAINDER = 0.2  # of the measured damage, for the expansion to count as local (C5)


@dataclasses.dataclass(frozen=True)
class Edit:
    """One domain's edit: `source` is "solo", or "sequential" where no solo stage was run."""

    domain: str
    source: str
    relative_share: Record  # share of entries with |δ|/|θ| < 1e-3
    participation: Record  # (Σδ²)² / (nΣδ⁴)


@dataclasses.dataclass(frozen=True)
class GradientPair:
    """Gradients of an earlier and a later domain at θ*_A; the counts are of tensors, by Benjamini–Hochberg at 0.05."""

    earlier: str
    later: str
    cosine: Record  # full model, disattenuated
    reliability: Mapping[str, Record]  # ρ of each domain
    conflicting: int
    synergistic: int
    damage: Record  # measured, of the earlier by the later


@dataclasses.dataclass(frozen=True)
class RoutePair:
    """The routes of two domains: their Jaccard and the 97.5th percentile of its permutation null."""

    domains: tuple[str, str]
    jaccard: Record
    null_high: float


@dataclasses.dataclass(frozen=True)
class CurveStep:
    """One α of the curve along θ* + αD: measured damage, what the prediction leaves of it, and the second-order share
    ½α²DᵀHD / (α g·D + ½α²DᵀHD) of the prediction."""

    alpha: float
    measured: Record
    remainder: Record
    second_share: Record


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective (expected reward, success NLL) of a pair: the curve in α and the record of `ladder.measure`.

    An objective that could not be measured has a `reason`, and the rest empty.
    """

    steps: Sequence[CurveStep] = ()
    ladder: Record = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class DamagePair:
    """Measured damage of the earlier domain by the later (α = 1, fresh samples), and its objectives by name."""

    earlier: str
    later: str
    damage: Record
    objectives: Mapping[str, Objective]


def c1(edits: Sequence[Edit]) -> Record:
    """Every domain's edit is sparse; the figure is the smallest share of small relative changes.

    Each domain has one edit: its solo edit, or its sequential one if there was no solo stage.
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
    """`mean` is the mean pairwise Jaccard with its chance value as null; `pairs` is printed as it is."""
    return judge("C2", under(mean, WEAK_OVERLAP, "mean pairwise Jaccard"), mean, rows=list(pairs))


def c3(pairs: Sequence[GradientPair]) -> Record:
    """Near-orthogonal in full, conflicting and synergistic in parts, harmful all the same."""
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
    """Shared routes, whose first-order effect tells the sign of transfer; `agreement` is from `rank_agreement`."""
    rows, conditions = [], []
    for pair in pairs:
        condition = above(pair.jaccard, pair.null_high, f"{' and '.join(pair.domains)}: route Jaccard")
        conditions.append(condition)
        rows.append({"pair": list(pair.domains), "verdict": condition.verdict, "jaccard": pair.jaccard})
    signs = above(agreement, 0.0, "rank correlation of −g·δ on the shared route with measured transfer")
    return judge("C4", every(every(*conditions), signs), agreement, rows=rows)


def c5(pairs: Sequence[DamagePair]) -> Record:
    """Mainly second-order and captured by S: for both objectives (an AND) of the pair most harmed.

    Measured damage above 0 comes first: without it the pair is undecided. Of an AND, an objective that is not
    measurable is an undecided member. c is that at the largest k, `analyze.vectors`.
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
    """The step of the largest α whose remainder is at most 20 % of the measured damage, by their estimates."""

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
