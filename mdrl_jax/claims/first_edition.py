"""The first edition's rules for C1 to C5, whose verdicts are printed beside those of `interference.py`.

Noise could meet some of them, and others could never be met. They stay for one version, so that verdicts of older runs
can be compared, and go with the next one. Each function takes what the present rule takes and returns a condition.
"""

from collections.abc import Sequence

from mdrl_jax.claims.inputs import CurveStep, DamagePair, Edit, GradientPair, Objective, RoutePair
from mdrl_jax.claims.published import WEAK_OVERLAP
from mdrl_jax.claims.verdicts import Condition, above, every, size_under, under
from mdrl_jax.stats.estimate import Record

EARLIER = {
    "C1": "share with relative change < 1e-3 above 0.5 and participation ratio below 0.3, for every domain",
    "C2": f"mean pairwise Jaccard of the top 10 % below {WEAK_OVERLAP:g}",
    "C3": "undecided unless both gradients at A's peak have a reliability above 0.5; then full-model |cos| below 0.1, "
    "at least one tensor conflicting and one synergistic, and measured damage above 0",
    "C4": "route Jaccard above the null's 97.5 % for every pair, and Spearman over pairs of −g_A·δ_B on the shared "
    "route with measured transfer above 0",
    "C5": "undecided unless measured damage is above 0; then, for mean reward and success NLL, at the largest α with "
    "|remainder| ≤ 20 % of measured: second-order share of predicted damage above ½, and c(k) at k = analyze.vectors "
    "above every baseline of equal k",
}
MAX_REMAINDER = 0.2  # share of the measured damage; the expansion counts as local up to it (C5)


def c1(edits: Sequence[Edit]) -> Condition:
    """C1: every domain's share of small relative changes is above 0.5 and its participation ratio below 0.3.

    Both are compared with their intervals. Without edits the condition is undecided.
    """
    conditions = []
    for edit in edits:
        name = f"{edit.domain} ({edit.source} edit)"
        conditions.append(above(edit.relative_share, 0.5, f"{name}: share of small changes"))
        conditions.append(under(edit.participation, 0.3, f"{name}: participation ratio"))
    return every(*conditions)


def c2(mean: Record) -> Condition:
    """C2: the mean Jaccard index is below the published bound, 0.19; compared with its interval (`verdicts.under`)."""
    return under(mean, WEAK_OVERLAP, "mean pairwise Jaccard")


def c3(pair: GradientPair) -> Condition:
    """C3: near-orthogonal gradients at A's peak, a conflicting and a synergistic tensor, and damage.

    The condition is undecided unless the reliabilities of both gradients lie above 0.5 by their intervals. Then it is
    the AND of: |cos| below 0.1; measured damage above 0, both by their intervals; and at least one tensor of each kind,
    whose absence is undecided and not contradicted.
    """
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


def c4(pairs: Sequence[RoutePair], agreement: Record) -> Condition:
    """C4: every pair's routes overlap above their null, and effects agree with transfers over pairs.

    The Jaccard of each pair is compared with the 97.5th percentile of its null, and the agreement with 0, by their
    intervals. Without pairs the condition is undecided, unless the agreement contradicts it.

    Args:
      pairs: the routes of every pair of an earlier and a later domain.
      agreement: Spearman's correlation over these pairs (`stats.tests.rank_agreement`).
    """
    shared = [above(p.jaccard, p.null_high, f"{' and '.join(p.domains)}: route Jaccard") for p in pairs]
    signs = above(agreement, 0.0, "rank correlation of −g·δ on the shared route with measured transfer")
    return every(every(*shared), signs)


def c5(pair: DamagePair) -> Condition:
    """C5: harm is mainly second order where the expansion is local, and S captures more of it than every baseline.

    The condition is undecided unless the measured damage of the pair is above 0. Then it is the AND over the pair's
    objectives. Of each, at the step of `local_step`: the second-order share is above ½, and the margin of c(k) over
    each baseline is above 0. An objective is undecided if it has no subspace or no local step, or if the measured
    damage at that step is not above 0. All comparisons are by intervals.
    """
    harmed = above(pair.damage, 0.0, "measured damage")
    if harmed.verdict != "supported":
        return Condition("undecided", harmed.words)
    conditions = [(name, _objective(o)) for name, o in pair.objectives.items()]
    return every(*(Condition(c.verdict, f"{name}: {c.words}") for name, c in conditions))


def local_step(steps: Sequence[CurveStep]) -> CurveStep | None:
    """The step with the largest α at which the expansion is local; None if there is none.

    Local means |remainder| ≤ 20 % of |measured damage|, by the estimates. Steps with α ≤ 0, or without one of the two
    estimates, do not count. A step with a smaller α need not be local.
    """

    def local(step: CurveStep) -> bool:
        remainder, measured = step.remainder["estimate"], step.measured["estimate"]
        return None not in (remainder, measured) and abs(remainder) <= MAX_REMAINDER * abs(measured)

    return max((s for s in steps if s.alpha > 0 and local(s)), key=lambda s: s.alpha, default=None)


def _objective(objective: Objective) -> Condition:
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
