"""The rules that judge the published claims C6 and C7, on recovery (definitions §0, §13).

They are pure functions of figures from the records of a run. `claims/README.md` says how often each of them errs. The
rules of the first edition, whose verdicts are printed beside, go with the next version. Choices where the definitions
leave room:

  * C6 is judged on a plain refresh. A variant (replay of other domains, another learning rate, other protection) has
    its parts in `rows`, but never decides the claim. Of several plain refreshes the one decides whose domain had lost
    most.
  * A refresh of more than 20 % of the steps of the domain's own stage leaves the claim undecided, because no brief
    refresh was tried. The steps are all that were trained, whether or not the last one was kept.
  * ‖P_S e‖ contracts if it shrinks, by a movement towards θ*, and faster than in random subspaces and than in the same
    refresh of every other domain, in every S that was found. Each half of the prompts and each objective has an S.
  * C7: a rollback gains more of A than each control, at equal loss of B, on test prompts. "Remove nothing" lies on
    every control's frontier, so a gain of A that is not above 0 cannot be above the frontier. For this reason §13 has
    no separate condition on the gain. The controls that know A's gradient are a part of their own: a set that beats
    only the others shows that A's gradient is informative, not that B's edit holds a conflict set.
  * A rollback is undecided if no set was chosen, or if A had not measurably lost anything.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mdrl_jax.claims.published import BRIEF, LEAST_FRACTION, SEE
from mdrl_jax.claims.verdicts import (
    Condition,
    Part,
    above,
    all_parts,
    every,
    judge,
    parts_record,
    row_of,
    smallest,
    under,
)
from mdrl_jax.stats.estimate import Record

# C6: the methods that the average after the refresh has to be compared with before the claim can be supported.
RIVALS = ("joint", "replay", "protect", "pcgrad")
BLIND = ("random", "matched", "largest", "whole")  # C7: controls that know nothing of A
INFORMED = ("matched_in_tensor", "permuted", "sign_step")  # C7: controls (i) to (iii) of definitions §9
OLD_C6 = (
    f"undecided unless the refresh took ≤ {100 * BRIEF:g} % of a stage's steps; then recovery fraction above "
    f"{LEAST_FRACTION:g} AND collateral below 3 points AND ‖P_S e‖ contracts faster than ‖P_S⊥ e‖ in every S that was "
    "found"
)
OLD_C7 = (
    "undecided unless A had measurably lost and a set was chosen; then A's gain at equal loss of B above that of "
    "random, matched, largest and whole controls and of sets outside the route"
)


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
      path: length of the refresh's path, Σ‖θ_t − θ_{t−1}‖; None if it was not recorded.
      variant: how it differs from a plain refresh, in words; "" for a plain one.
      rivals: for each other method, by name, the mean score over domains after the refresh minus that of the method, in
        points; without an estimate if the two had different budgets.
    """

    stage: str
    domain: str
    fraction: Record
    collateral: Record
    loss: Record
    steps: int
    stage_steps: int
    contraction: Sequence[Record] = ()
    path: float | None = None
    variant: str = ""
    rivals: Mapping[str, Record] = dataclasses.field(default_factory=dict)


def c6(refreshes: Sequence[Refreshed]) -> Record:
    """Judges C6: a brief plain refresh recovers, contracts the harmful component, and gives the best average.

    The parts of the rule are those of `refresh_parts`. The verdict and the printed recovery fraction are those of the
    plain refresh whose domain had lost most. Without one that has a measured loss the claim is undecided, and there is
    no figure.

    Args:
      refreshes: all refreshes of the run. Of those with equal losses the first one counts.

    Returns:
      The record of the claim (`verdicts.judge`), with all refreshes in `rows`: {"stage", "domain", "variant",
      "verdict", "reason", "parts", "fraction", "collateral", "share_of_steps", "path", "contraction", "rivals"}.
    """
    judged = [(r, refresh_parts(r)) for r in refreshes]
    rows = [
        {
            "stage": r.stage,
            "domain": r.domain,
            "variant": r.variant,
            **row_of(all_parts(parts)),
            "parts": parts_record(parts),
            "fraction": r.fraction,
            "collateral": r.collateral,
            "share_of_steps": r.steps / r.stage_steps,
            "path": r.path,
            "contraction": list(r.contraction),
            "rivals": dict(r.rivals),
        }
        for r, parts in judged
    ]
    old = OLD_C6, _old_c6(refreshes)
    plain = [x for x in judged if not x[0].variant]
    known = [x for x in plain if x[0].loss["estimate"] is not None]
    if not known:
        reason = "no refresh has a measured loss" if plain else "no refresh was run"
        if judged and not plain:
            reason = "; ".join(f"{r.stage} is no plain refresh: {r.variant}" for r in refreshes) + f" ({SEE})"
        return judge("C6", Condition("undecided", f"not measurable: {reason}"), None, rows, old=old)
    most, parts = max(known, key=lambda x: x[0].loss["estimate"])
    condition = all_parts(parts)
    named = Condition(condition.verdict, f"{most.stage}: {condition.words}")
    return judge("C6", named, most.fraction, rows, parts, old)


def refresh_parts(refreshed: Refreshed) -> list[Part]:
    """Judges one refresh by the parts of C6, whether or not it is a plain one.

    Returns:
      The parts "recovery" (by their intervals the recovery fraction is above 0.5 and the collateral below 3 points),
      "contraction" (`contracts`) and "best average" (`best_average`), each with its condition. A refresh of more than
      20 % of the steps of the domain's own stage has a single part instead, "brief", which is undecided.
    """
    share = refreshed.steps / refreshed.stage_steps
    if share > BRIEF:
        words = f"{refreshed.steps} of {refreshed.stage_steps} steps are {share:.0%}, above {BRIEF:.0%}"
        return [("brief", Condition("undecided", f"not brief: {words}"))]
    path = "" if refreshed.path is None else f" and path length {refreshed.path:.3g}"
    recovery = every(
        above(refreshed.fraction, LEAST_FRACTION, f"recovery fraction at {share:.0%} of a stage's steps{path}"),
        under(refreshed.collateral, 3.0, "collateral in points"),
    )
    return [
        ("recovery", recovery),
        ("contraction", contracts(refreshed.contraction)),
        ("best average", best_average(refreshed.rivals)),
    ]


def contracts(contraction: Sequence[Record]) -> Condition:
    """Judges whether the displacement contracts in every conflict subspace S (definitions §8).

    In every S the figures "shrinks", "than_random", "toward" and each of "than_other" have to be below 0, by their
    intervals. The condition is the AND of all. It cannot be supported if "than_other" is empty, because no other domain
    was refreshed, or if a record is of an earlier version, without "shrinks".

    Args:
      contraction: one record for each S, as made by `recovery.refresh.contraction.contraction`. Without records the
        condition is undecided.
    """
    if not contraction:
        return Condition("undecided", "not measurable: no conflict subspace was found")
    return every(*(_contracts_in(c) for c in contraction))


def _contracts_in(c: Record) -> Condition:
    place = f"({c['objective']}, half {c['half'] + 1})"
    if "shrinks" not in c:
        return Condition("undecided", f"not measurable: the record is of an earlier version {place}")
    others = c["than_other"]
    streams = f"over {c['streams']} streams" if c["streams"] > 1 else "over the steps of one stream"
    apart = [under(figure, 0.0, f"that less the rate by a refresh of {d} {place}") for d, figure in others.items()]
    if not others:
        apart = [Condition("undecided", f"no refresh of another domain to compare with: recover.streams is 1 ({SEE})")]
    return every(
        under(c["shrinks"], 0.0, f"log factor of ‖P_S e‖ a step {streams} {place}"),
        under(c["than_random"], 0.0, f"that less the rate in random subspaces {place}"),
        under(c["toward"], 0.0, f"movement in S along P_S e, a share a step {place}"),
        *apart,
    )


def best_average(rivals: Mapping[str, Record]) -> Condition:
    """Judges whether the mean over domains after the refresh is above that of every other method at equal budget.

    Each difference is compared with 0 by its interval, and the condition is the AND of all.

    Args:
      rivals: as in `Refreshed`. A method of another budget, whose record has no estimate, is left out. If a method of
        `RIVALS` has no estimate or is absent, the condition cannot be supported.
    """
    compared = [
        above(figure, 0.0, f"average minus that of {name}")
        for name, figure in rivals.items()
        if figure["estimate"] is not None or name in RIVALS
    ]
    absent = [name for name in RIVALS if name not in rivals]
    if absent:
        compared.append(Condition("undecided", f"not run: {', '.join(absent)} ({SEE})"))
    return every(*compared)


def _old_c6(refreshes: Sequence[Refreshed]) -> Condition:
    known = [r for r in refreshes if r.loss["estimate"] is not None]
    if not known:
        return Condition("undecided", "not measurable: no refresh has a measured loss")
    most = max(known, key=lambda r: r.loss["estimate"])
    if most.steps / most.stage_steps > BRIEF:
        return Condition("undecided", f"{most.stage}: not brief")
    faster = [
        under(c["faster"], 0.0, f"log contraction of S less that of S⊥ ({c['objective']}, half {c['half'] + 1})")
        for c in most.contraction
    ] or [Condition("undecided", "contraction is not measurable: no conflict subspace was found")]
    condition = every(
        above(most.fraction, LEAST_FRACTION, "recovery fraction"),
        under(most.collateral, 3.0, "collateral in points"),
        *faster,
    )
    return Condition(condition.verdict, f"{most.stage}: {condition.words}")


def c7(rollbacks: Sequence[Record]) -> Record:
    """Judges C7: a rollback gains more of A than every control does at equal loss of B.

    The parts of the rule are those of `rollback_parts`. The verdict is that of the rollback whose A had lost most,
    among those that chose a set if there is one. The printed figure is its smallest difference to a control, in points;
    there is none if it chose no set.

    Args:
      rollbacks: the records `recovery/rollback-A-B.json`.

    Returns:
      The record of the claim (`verdicts.judge`), with all rollbacks in `rows`: {"stage", "pair", "verdict", "reason",
      "parts"}, and "gain", "loss" and "at_equal_loss" if a set was chosen. It is undecided without rollbacks.

    Raises:
      KeyError: if a record lacks a field.
    """
    judged = [(r, rollback_parts(r)) for r in rollbacks]
    rows = [_rollback_row(r, parts) for r, parts in judged]
    asked = [(r, c) for r, c in judged if r["chosen"] is not None] or judged
    if not asked:
        none = Condition("undecided", "not measurable: there is no rollback")
        return judge("C7", none, None, rows, old=(OLD_C7, none))
    record, parts = max(asked, key=lambda j: j[0]["test"]["lost"]["estimate"] if "test" in j[0] else 0.0)
    pair, condition, old = f"{record['domain']} after {record['donor']}", rollback_condition(parts), _old_c7(record)
    figure = smallest(list(record["test"]["at_equal_loss"].values())) if "test" in record else None
    named, before = (Condition(c.verdict, f"{pair}: {c.words}") for c in (condition, old))
    return judge("C7", named, figure, rows, parts, (OLD_C7, before))


def rollback_parts(record: Record) -> list[Part]:
    """Judges one rollback by the parts of C7, from its record `recovery/rollback-A-B.json`.

    Returns:
      Two parts: "against blind controls" and "against A's gradient". By their intervals, the rollback's gain minus that
      of each control of this kind at equal loss of B is above 0. The second is undecided if a control of `INFORMED` is
      absent and none contradicts it. A rollback that cannot be judged has a single, undecided part instead: "a set was
      chosen" if none was, or "loss to win back" if A's loss is not above 0 by its interval.

    Raises:
      KeyError: if the record lacks a field.
    """
    if record["chosen"] is None:
        words = f"no set within {record['limit']:g} points of loss gains anything"
        return [("a set was chosen", Condition("undecided", words))]
    test = record["test"]
    lost = above(test["lost"], 0.0, f"loss of {record['domain']} to win back")
    if lost.verdict != "supported":
        return [("loss to win back", Condition("undecided", lost.words))]
    price, found = f"at {test['loss']['estimate']:.3g} points of {record['donor']}", test["at_equal_loss"]

    def beaten(names: Sequence[str], wanted: Sequence[str]) -> Condition:
        against = [above(found[name], 0.0, f"gain {price} minus that of the control {name}") for name in names]
        absent = [name for name in wanted if name not in found]
        if absent:
            reason = record.get("left_out", "the record is of an earlier version")
            against.append(Condition("undecided", f"not compared with {', '.join(absent)}: {reason}"))
        return every(*against)

    informed = [name for name in found if name not in BLIND]
    return [
        ("against blind controls", beaten([name for name in BLIND if name in found], ())),
        ("against A's gradient", beaten(informed, INFORMED)),
    ]


def rollback_condition(parts: Sequence[Part]) -> Condition:
    """The AND of the parts of `rollback_parts`.

    Its words have the name of each deciding part. If the blind controls are beaten but not those that know A's
    gradient, they begin with "supported against blind controls, not against A's gradient".
    """
    condition = all_parts(parts)
    if len(parts) == 2 and parts[0][1].verdict == "supported" and condition.verdict != "supported":
        return Condition(
            condition.verdict, f"supported against blind controls, not against A's gradient: {parts[1][1].words}"
        )
    return condition


def _old_c7(record: Record) -> Condition:
    if record["chosen"] is None:
        return Condition("undecided", "no set was chosen")
    test = record["test"]
    lost = above(test["lost"], 0.0, "loss to win back")
    if lost.verdict != "supported":
        return Condition("undecided", lost.words)
    known = [(name, f) for name, f in test["at_equal_loss"].items() if name not in INFORMED]
    return every(*(above(f, 0.0, f"gain at equal loss minus that of the control {name}") for name, f in known))


def _rollback_row(record: Record, parts: Sequence[Part]) -> Record:
    head = {
        "stage": record["stage"],
        "pair": [record["domain"], record["donor"]],
        **row_of(rollback_condition(parts)),
        "parts": parts_record(parts),
    }
    if record["chosen"] is None:
        return head
    test = record["test"]
    against = {name: {k: v for k, v in f.items() if k != "settings"} for name, f in test["at_equal_loss"].items()}
    return head | {"gain": test["gain"], "loss": test["loss"], "at_equal_loss": against}
