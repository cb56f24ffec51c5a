"""Turns what is known of candidate actions into forecasts, ranks the actions and picks one (definitions §10).

`planner.py` measures the inputs; the functions here are pure. Actions within the collateral limit come first, by the
expected mean score over domains. Of equal ones the cheaper comes first: `nothing`, then rollbacks, then refreshes by
their steps. After that their names decide.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdrl_jax.recovery.planning.forecast import (
    Forecast,
    Known,
    Model,
    Shift,
    fit,
    forecast,
    log_odds,
    together,
    unchanged,
)
from mdrl_jax.recovery.planning.importance import Reweighted
from mdrl_jax.stats.estimate import POINTS, Record, figure_text

Rewards = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Action:
    """A candidate: do nothing, refresh a domain, or roll back a later stage's edit for a domain.

    Attributes:
      kind: "nothing", "refresh" or "rollback".
      domain: the domain to win back; "" for nothing.
      steps: steps of a refresh; 0 otherwise.
      donor: the domain whose edit a rollback takes back; "" otherwise.
      rule: a rollback's rule.
      fraction: size of a rollback's set, as a share of all coordinates.
      strength: β of a rollback.
    """

    kind: str = "nothing"
    domain: str = ""
    steps: int = 0
    donor: str = ""
    rule: str = ""
    fraction: float = 0.0
    strength: float = 0.0

    @property
    def name(self) -> str:
        """The name in records: `nothing`, `refresh-math-4`, `rollback-math-qa-removing-0.003-1`."""
        if self.kind == "nothing":
            return self.kind
        if self.kind == "refresh":
            return f"refresh-{self.domain}-{self.steps}"
        return f"rollback-{self.domain}-{self.donor}-{self.rule}-{self.fraction:g}-{self.strength:g}"

    @property
    def words(self) -> str:
        """The action in plain words."""
        if self.kind == "nothing":
            return "do nothing"
        if self.kind == "refresh":
            return f"refresh {self.domain} for {self.steps} step{'s' if self.steps > 1 else ''}"
        return (
            f"for {self.domain}, roll back {self.fraction:g} of the coordinates of {self.donor}'s edit "
            f"({self.rule}, strength {self.strength:g})"
        )


@dataclasses.dataclass(frozen=True)
class Outlook:
    """The measurements that an action is forecast from, made before it is taken.

    Attributes:
      action: the action.
      shifts: shift of the log-odds of each scored domain, to first order.
      size: size of the change (`forecast.py`).
      mover: the domain refreshed, or the donor of a rollback. Its own forecasts and those of the other domains have
        separate error models.
      reweighted: importance-weighted shift of each domain (`importance.py`); empty if it was not computed.
    """

    action: Action
    shifts: Mapping[str, Shift]
    size: float
    mover: str
    reweighted: Mapping[str, Reweighted] = dataclasses.field(default_factory=dict)


def decide(point: str, current: Rewards, outlooks: Sequence[Outlook], known: Sequence[Known], limit: float) -> Record:
    """Forecasts all actions, ranks them and picks the first.

    A domain is forecast from the importance-weighted shift of the outlook if it has one, and otherwise to first order.
    `nothing` is forecast to change nothing, whatever its shifts are.

    Args:
      point: name of the stage whose end is θ_T.
      current: rewards [P, k] of each domain at θ_T. Every outlook must have shifts of these domains.
      outlooks: the measurements of each action, one or more.
      known: past changes whose outcome is known; the error models are fitted to those with a size above 0. A forecast
        has no interval with fewer than two of these of the action's kind and of the domain's role (`Known.own`), unless
        it is that of a rollback from importance weights.
      limit: points that each domain other than the action's own may be expected to lose; exactly this loss is allowed.

    Returns:
      The record of `recovery/plan.json`: "actions", from the first rank on; "models", the error models; "history", the
      past changes; "pick", the name of the first action; and "reason", why it was picked. "point", "limit" and
      "current" (scores in points) repeat what was given.

      Each of "actions" has the fields of `Action`, its "name" and "words", and its "rank", from 1. Forecasts are
      records in points: "average", the mean score over domains after the action, and "average_change"; "scores" and
      "changes" by domain. "collateral" is {"domain", "change"} of the other domain that is expected to fare worst, None
      without another; "allowed" says whether it is within the limit; "risk" is the chance, in [0, 1], that some other
      domain loses more than the limit, None if there is no other or one of them has no interval. "size", "shifts" and
      "weighed" (`Outlook.reweighted`) repeat the outlook.

    Raises:
      KeyError: if an outlook lacks the shift of a domain.
    """
    domains = sorted(current)
    models = {
        (kind, own): fit([k for k in known if (k.kind, k.own) == (kind, own)])
        for kind in ("refresh", "rollback")
        for own in (True, False)
    }
    rows = []
    for outlook in outlooks:
        changes = {}
        for place, domain in enumerate(domains):
            n = len(current[domain])
            if outlook.action.kind == "nothing":
                changes[domain] = unchanged(n)
                continue
            model = models[outlook.action.kind, domain == outlook.mover]
            shift, model = _said(outlook, domain, model, n)
            changes[domain] = forecast(log_odds(current[domain]), shift, outlook.size, model, place, n)
        looked = {d: dataclasses.asdict(outlook.shifts[d]) for d in domains}
        reweighted = {d: dataclasses.asdict(w) for d, w in sorted(outlook.reweighted.items())}
        row = {"size": outlook.size, "shifts": looked, "weighed": reweighted}
        rows.append(_row(outlook.action, changes, current, limit) | row)
    rows.sort(key=_order)
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
    record = {
        "point": point,
        "limit": limit,
        "current": {d: POINTS * float(np.mean(current[d])) for d in domains},
        "actions": rows,
        "models": [{"kind": kind, "own": own} | model.record() for (kind, own), model in models.items()],
        "history": [dataclasses.asdict(k) for k in known],
    }
    return record | {"pick": rows[0]["name"], "reason": reason(record)}


def _said(outlook: Outlook, domain: str, model: Model, n: int) -> tuple[Shift, Model]:
    """The shift to forecast a domain from, and the model of its error.

    The shift is that of the importance weights if they have enough effective completions, and the first order
    otherwise.

    Args:
      outlook: the measurements of the action.
      domain: the domain.
      model: error model of the first order.
      n: number of prompts of the current score, the degrees of freedom plus 1 of a rollback's interval. With a single
        prompt there is no such interval.
    """
    by = outlook.reweighted.get(domain)
    if by is None or by.shift is None:
        return outlook.shifts[domain], model
    # The parameters after a rollback are known exactly, so only the sampling error of the weights remains.
    if outlook.action.kind == "rollback":
        return by.shift, Model(0.0, 0.0 if n > 1 else math.inf, outlook.size, n)
    return by.shift, dataclasses.replace(model, bend=0.0)


def best(record: Record) -> Action:
    """The action that a plan, the record of `decide`, picks: the first of its "actions"."""
    return action_of(record["actions"][0])


def promising(record: Record, n: int) -> list[Action]:
    """The actions with the highest expected mean over domains, whether or not they are within the limit.

    Args:
      record: a plan, the record of `decide`.
      n: number of actions, 0 or more; fewer are returned if the plan has fewer.

    Returns:
      The actions, the best first, and equal ones by name. `nothing` is left out.
    """
    tried = [row for row in record["actions"] if row["kind"] != "nothing"]
    tried.sort(key=lambda row: (-row["average_change"]["estimate"], row["name"]))
    return [action_of(row) for row in tried[:n]]


def action_of(row: Record) -> Action:
    """The action that a row describes, one of "actions" in the record of `decide`; KeyError if it lacks a field."""
    return Action(**{field.name: row[field.name] for field in dataclasses.fields(Action)})


def _row(action: Action, changes: Mapping[str, Forecast], current: Rewards, limit: float) -> Record:
    base = {d: POINTS * float(np.mean(current[d])) for d in changes}
    mean = float(np.mean(list(base.values())))
    average = together(list(changes.values()))
    others = [d for d in changes if d != action.domain]
    worst = min(others, key=lambda d: (changes[d].value, d), default=None)
    allowed = worst is None or POINTS * changes[worst].value >= -limit
    return {
        "name": action.name,
        "words": action.words,
        **dataclasses.asdict(action),
        "rank": 0,
        "allowed": allowed,
        "average": average.estimate(mean).record(mean),
        "average_change": average.estimate().record(0.0),
        "scores": {d: c.estimate(base[d]).record(base[d]) for d, c in changes.items()},
        "changes": {d: c.estimate().record(0.0) for d, c in changes.items()},
        "collateral": worst and {"domain": worst, "change": changes[worst].estimate().record(0.0)},
        "risk": _risk([changes[d] for d in others], limit),
    }


def _risk(others: Sequence[Forecast], limit: float) -> float | None:
    """The chance that at least one other domain loses more than the limit; None if a forecast has no interval."""
    if not others or any(f.change_R.size == 1 for f in others):
        return None
    lowest_R = np.min([f.change_R for f in others], axis=0)
    return float(np.mean(POINTS * lowest_R < -limit))


def _order(row: Record) -> tuple[Any, ...]:
    kinds = ("nothing", "rollback", "refresh")  # the cheapest first
    expected = round(row["average_change"]["estimate"], 6)
    return not row["allowed"], -expected, kinds.index(row["kind"]), row["steps"], row["name"]


def reason(record: Record) -> str:
    """Why the first of the ranked actions was picked, in one or more sentences of plain words.

    The text has the expected means over domains before and after the action, in points, and the other domain that is
    expected to fare worst; for `nothing` the present mean alone. If actions over the limit are expected to do better on
    average, the best of these follows.

    Args:
      record: a plan, the record of `decide`; only "actions" (ranked) and "limit" are read.
    """
    row, limit = record["actions"][0], record["limit"]
    average, change = row["average"], row["average_change"]
    if row["kind"] == "nothing":
        text = f"Do nothing: no allowed action is expected to raise the mean of {average['null']:.1f} points."
    else:
        text = (
            f"{row['words'][0].upper()}{row['words'][1:]}: the mean over domains is expected to go from "
            f"{average['null']:.1f} to {average['estimate']:.1f} points ({_signed(change)})"
            f"; {row['domain']} {_signed(row['changes'][row['domain']])}."
        )
        if row["collateral"]:
            worst = row["collateral"]
            text += f" Of the others {worst['domain']} fares worst: {_signed(worst['change'])}, limit −{limit:g}"
            text += "." if row["risk"] is None else f"; chance that one of them loses more: {row['risk']:.0%}."
    rejected = [r for r in record["actions"] if not r["allowed"]]
    more = [r for r in rejected if r["average_change"]["estimate"] > change["estimate"]]
    if more:
        first = max(more, key=lambda r: (r["average_change"]["estimate"], r["name"]))
        worst = first["collateral"]
        text += (
            f" More on average was expected of this: {first['words']} ({_signed(first['average_change'])}), but "
            f"{worst['domain']} would be expected to lose {-worst['change']['estimate']:.1f}, over the limit."
        )
    return text


def _signed(figure: Record) -> str:
    return figure_text(figure["estimate"], figure["ci95"], "+.1f", "(error not known)")
