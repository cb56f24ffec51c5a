"""The published claims C6 and C7 on recovery, judged by the rules fixed beforehand (definitions §0, §13).

Like those of `claims/interference.py`, the rules are pure functions of figures as they stand in a run's records.
Choices where the definitions leave room:
  * C6, a brief refresh contracts the harmful component. A refresh that took more than 20 % of its stage's steps leaves
    the claim undecided, because a brief one was not tried. A loss that is not measurable leaves the recovery fraction
    undecided, and the fraction is one member of an AND: another member can still contradict the claim;
  * the steps are all that were trained, whether or not the last was kept;
  * ‖P_S e‖ has to contract faster than ‖P_S⊥ e‖ over all parameters in every S that was found (both halves of the
    prompts, each objective); the intervals are over the steps of this refresh;
  * of several refreshes the one whose domain had lost most is the headline; the others are listed;
  * C7, a rollback wins more of A at equal loss of B than each control. The figures are those of the test prompts.
    "Remove nothing" lies on every control's frontier, so a gain of A that is not above 0 cannot be above a control's,
    and §13 has no separate condition on the gain: such a rollback is contradicted if a control does better, else
    undecided;
  * a rollback is undecided if no set was found, or if A had not measurably lost anything.
"""

import dataclasses
from collections.abc import Sequence

from mdrl_jax.claims.published import BRIEF, LEAST_FRACTION
from mdrl_jax.claims.verdicts import Condition, above, every, judge, row_of, smallest, under
from mdrl_jax.stats.estimate import Record


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
        above(refreshed.fraction, LEAST_FRACTION, f"recovery fraction at {share:.0%} of a stage's steps"),
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


def c7(rollbacks: Sequence[Record]) -> Record:
    """A's gain at equal loss of B above each control's, of the rollback whose A had lost most; all of them as rows.

    `rollbacks` are the records of rollback stages; the figure is the smallest difference.
    """
    judged = [(r, rollback_condition(r)) for r in rollbacks]
    rows = [_rollback_row(r, c) for r, c in judged]
    asked = [(r, c) for r, c in judged if r["chosen"] is not None] or judged
    if not asked:
        return judge("C7", Condition("undecided", "not measurable: there is no rollback"), None, rows)
    record, condition = max(asked, key=lambda j: j[0]["test"]["lost"]["estimate"] if "test" in j[0] else 0.0)
    words = f"{record['domain']} after {record['donor']}: {condition.words}"
    figure = smallest(list(record["test"]["at_equal_loss"].values())) if "test" in record else None
    return judge("C7", Condition(condition.verdict, words), figure, rows)


def rollback_condition(record: Record) -> Condition:
    """The rule for one rollback."""
    if record["chosen"] is None:
        return Condition("undecided", f"no set within {record['limit']:g} points of loss gains anything")
    test = record["test"]
    lost = above(test["lost"], 0.0, f"loss of {record['domain']} to win back")
    if lost.verdict != "supported":
        return Condition("undecided", lost.words)
    price = f"at {test['loss']['estimate']:.3g} points of {record['donor']}"
    return every(
        *(
            above(figure, 0.0, f"gain {price} minus that of the control {name}")
            for name, figure in test["at_equal_loss"].items()
        )
    )


def _rollback_row(record: Record, condition: Condition) -> Record:
    head = {"stage": record["stage"], "pair": [record["domain"], record["donor"]], **row_of(condition)}
    if record["chosen"] is None:
        return head
    test = record["test"]
    against = {name: {k: v for k, v in f.items() if k != "settings"} for name, f in test["at_equal_loss"].items()}
    return head | {"gain": test["gain"], "loss": test["loss"], "at_equal_loss": against}
