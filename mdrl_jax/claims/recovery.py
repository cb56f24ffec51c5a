"""The rules that judge the published claims C6 and C7, on recovery (definitions §0, §13).

Like the rules of `claims/interference.py`, they were fixed before any run and are pure functions of figures from the
records of a run. Choices where the definitions leave room:
  * C6: a brief refresh contracts the harmful component. A refresh of more than 20 % of the steps of the domain's own
    stage leaves the claim undecided, because no brief refresh was tried. A loss that is not measurable leaves the
    recovery fraction undecided. The fraction is one member of an AND, so another member can still contradict the claim.
  * The steps of a refresh are all steps that were trained, whether or not the last one was kept.
  * ‖P_S e‖ must contract faster than ‖P_S⊥ e‖, which is taken over all parameters, in every S that was found. Each half
    of the prompts and each objective has an S. The intervals are over the steps of this refresh.
  * If there are several refreshes, the claim gets the verdict of the one whose domain had lost most. The others are
    listed with their own verdicts.
  * C7: a rollback gains more of A than each control, at equal loss of B, on test prompts. "Remove nothing" lies on
    every control's frontier, so a gain of A that is not above 0 cannot be above the frontier. For this reason §13 has
    no separate condition on the gain. Such a rollback is contradicted if a control does better, otherwise undecided.
  * A rollback is undecided if no set was chosen, or if A had not measurably lost anything.
"""

import dataclasses
from collections.abc import Sequence

from mdrl_jax.claims.published import BRIEF, LEAST_FRACTION
from mdrl_jax.claims.verdicts import Condition, above, every, judge, row_of, smallest, under
from mdrl_jax.stats.estimate import Record


@dataclasses.dataclass(frozen=True)
class Refreshed:
    """The gain and the cost of one refresh.

    Attributes:
      stage, domain: the refresh stage, and the domain that it refreshed.
      fraction: the recovery fraction, gain over loss.
      collateral: the largest drop of any other domain, in points.
      loss: what the domain had lost before the refresh, in points.
      steps: number of steps that the refresh trained, kept or not.
      stage_steps: number of steps of the domain's own stage, above 0.
      contraction: one record for each conflict subspace, as made by `recovery.refresh.contraction.contraction`; empty
        if no subspace was found.
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
    """Judges C6: a brief refresh recovers over half of the loss, costs others under 3 points, contracts faster in S.

    The verdict and the printed recovery fraction are those of the refresh whose domain had lost most. Without a refresh
    that has a measured loss the claim is undecided.

    Args:
      refreshes: all refreshes of the run. Of those with equal losses the first one counts.

    Returns:
      The record of the claim (`verdicts.judge`), with all refreshes in `rows`: {"stage", "domain", "verdict", "reason",
      "fraction", "collateral", "share_of_steps", "contraction"}.
    """
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
    """Judges one refresh by the rule of C6. A refresh that is not brief is undecided, whatever else it did."""
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
    """Judges C7: a rollback gains more of A than every control does at equal loss of B.

    The verdict is that of the rollback whose A had lost most, among those that chose a set if there is one. The printed
    figure is its smallest difference to a control, in points; there is none if it chose no set.

    Args:
      rollbacks: the records `recovery/rollback-A-B.json`.

    Returns:
      The record of the claim (`verdicts.judge`), with all rollbacks in `rows`: {"stage", "pair", "verdict", "reason"},
      and "gain", "loss" and "at_equal_loss" if a set was chosen. It is undecided without rollbacks.

    Raises:
      KeyError: if a record lacks a field.
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
    """Judges one rollback by the rule of C7, from its record `recovery/rollback-A-B.json`.

    Raises:
      KeyError: if the record lacks a field.
    """
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
