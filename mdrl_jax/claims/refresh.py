"""Claim C6, judged by the rule fixed beforehand (definitions §13): a brief refresh contracts the harmful component.

A pure function of figures as they stand in a run's records, like those of `claims/interference.py`. Chosen where the
definitions leave it open:
  * a refresh that took more than 20 % of its stage's steps leaves the claim undecided, as does a loss that is not
    measurable: what was asked was not tried;
  * the steps are all that were trained, whether or not the last was kept;
  * ‖P_S e‖ has to contract faster than ‖P_S⊥ e‖ over all parameters in every S that was found (both halves of the
    prompts, each objective); the intervals are over the steps of this refresh;
  * of several refreshes the one whose domain had lost most is the headline; the others are listed.
"""

import dataclasses
from collections.abc import Sequence

from mdrl_jax.claims.verdicts import Condition, Record, above, every, judge, row_of, under

BRIEF = 0.2  # of a stage's steps


@dataclasses.dataclass(frozen=True)
class Refreshed:
    """What one refresh won and cost.

    Attributes:
      stage, domain: its name, and the domain refreshed.
      fraction, collateral: records of the recovery fraction, and of the largest drop of another domain in points.
      loss: the record of what the domain had lost, in points.
      steps: of the refresh, all that were trained.
      stage_steps: of the domain's own stage.
      contraction: of each conflict subspace, as `contraction.contraction` makes it; none where none was found.
    """

    stage: str
    domain: str
    fraction: Record
    collateral: Record
    loss: Record
    steps: int
    stage_steps: int
    contraction: Sequence[Record] = ()


def c6(refreshes: Sequence[Refreshed]) -> Record:
    """Recovers above half at ≤ 20 % of a stage's steps, costs less than 3 points, and contracts in S above all."""
    judged = [(r, refresh_condition(r)) for r in refreshes]
    rows = [
        {
            "stage": r.stage,
            "domain": r.domain,
            **row_of(condition),
            "fraction": r.fraction,
            "collateral": r.collateral,
            "share_of_steps": r.steps / r.stage_steps,
            "contraction": list(r.contraction),
        }
        for r, condition in judged
    ]
    known = [x for x in judged if x[0].loss["estimate"] is not None]
    if not known:
        reason = "no refresh has a measured loss" if judged else "no refresh was run"
        return judge("C6", Condition("undecided", f"not measurable: {reason}"), None, rows)
    most, condition = max(known, key=lambda x: x[0].loss["estimate"])
    named = Condition(condition.verdict, f"{most.stage}: {condition.words}")
    return judge("C6", named, most.fraction, rows)


def refresh_condition(refreshed: Refreshed) -> Condition:
    """The rule for one refresh."""
    share = refreshed.steps / refreshed.stage_steps
    if share > BRIEF:
        words = f"not brief: {refreshed.steps} of {refreshed.stage_steps} steps are {share:.0%}, above {BRIEF:.0%}"
        return Condition("undecided", words)
    return every(
        above(refreshed.fraction, 0.5, f"recovery fraction at {share:.0%} of a stage's steps"),
        under(refreshed.collateral, 3.0, "collateral in points"),
        _contracts(refreshed.contraction),
    )


def _contracts(contraction: Sequence[Record]) -> Condition:
    if not contraction:
        return Condition("undecided", "contraction is not measurable: no conflict subspace was found")
    return every(
        *(
            under(c["faster"], 0.0, f"log contraction of S less that of S⊥ ({c['objective']}, half {c['half'] + 1})")
            for c in contraction
        )
    )
