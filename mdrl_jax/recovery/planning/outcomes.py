"""Checks a plan: its forecasts against the outcomes of actions that were tried, on prompts that all of them share.

Three figures: the Spearman correlation of forecast and outcome over actions, the calibration of the intervals (the
share that holds the outcome), and the regret of the pick against the best action tried. `nothing` may be picked, but it
does not count as a forecast, because its outcome is known in advance.

The best of about ninety outcomes looks better than it is, because each has a sampling error. For the same reason an
action that is within the limit on validation prompts may be over it on others. The best action is therefore found in
two steps. The `FINALISTS` actions with the best outcomes within the limit on validation prompts are tried again,
together with the pick, on test prompts. The best action is the best of those that are within the limit on the test
prompts.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy.special import betaincinv

from mdrl_jax.stats.estimate import (
    LEVEL,
    POINTS,
    Estimate,
    Record,
    independent_mean,
    missing,
    paired_difference,
    t_quantile,
)
from mdrl_jax.stats.tests import rank_agreement

Rewards = Mapping[str, np.ndarray]
FINALISTS = 8


def outcomes(plan: Record, measured: Mapping[str, Rewards], judged: Mapping[str, Rewards]) -> Record:
    """Compares a plan with the outcomes of the actions that were tried.

    The interval of a forecast is for the expected score, but the outcome has a sampling error of its own. Two shares
    are therefore given: `held` counts the intervals that hold the measured outcome, and `held_with_error` those that
    hold it after they are widened by the outcome's error. Actions of one kind, domain and donor share their direction,
    so they are one cluster. The "n" of correlations is the number of clusters, and their intervals rest on it. Shares
    are over the forecasts that have an interval; their "n" is the number of these, or that of clusters if it is less.

    Args:
      plan: the record of `decision.decide`.
      measured: name of an action -> rewards [P, k] by domain after it, for `nothing` and all actions that were tried,
        on the same validation prompts.
      judged: the same for the `finalists`, on the test prompts.

    Returns:
      A record:

      - "actions", by rank, those of the plan that are in `measured`: "name", "allowed", "collateral" (the largest
        measured loss of another domain, in points; below 0 if all of them gained), and {"forecast", "measured"} as
        records in points in "average_change", and by domain in "changes".
      - "spearman" over actions of the mean over domains, and "spearman_by_domain" over pairs (action, domain).
      - "calibration", {"average" (over actions), "domain" (over pairs)}, each with the shares "held" and
        "held_with_error"; a share of no forecast has no estimate. "mean_error", the mean of |forecast − outcome| in
        points by the same two names; None without any action but `nothing`.
      - "regret", the gain of "best" minus that of "pick" on the test prompts, a record in points; None if `judged`
        lacks the pick. "best" is the action of `judged` with the largest gain within the limit, `nothing` included, or
        the pick if none is within it. So the regret is below 0 if the pick gained more than "best" but is over the
        limit. The record adds "pick_within_limit", and "judged": {"gain", "collateral"} in points by action.

    Raises:
      KeyError: if `measured`, or `judged` where it has the pick, lacks `nothing`, or an action lacks a domain.
      ValueError: if an action was tried on another number of prompts than `nothing`.
    """
    before, rows, cells, averages = measured["nothing"], [], [], []
    clusters: list[tuple[str, str, str]] = []
    for row in sorted(plan["actions"], key=lambda r: r["rank"]):
        if row["name"] not in measured:
            continue
        after = measured[row["name"]]
        changes = {d: paired_difference(after[d], before[d]).in_points() for d in sorted(before)}
        average = independent_mean(list(changes.values()))
        rows.append(
            {
                "name": row["name"],
                "allowed": row["allowed"],
                "collateral": collateral(before, after, row["domain"]),
                "average_change": {"forecast": row["average_change"], "measured": average.record(0.0)},
                "changes": {d: {"forecast": row["changes"][d], "measured": e.record(0.0)} for d, e in changes.items()},
            }
        )
        if row["kind"] != "nothing":
            averages.append((row["average_change"], average))
            cells += [(row["changes"][d], e) for d, e in changes.items()]
            clusters.append((row["kind"], row["domain"], row["donor"]))
    return {
        "actions": rows,
        "spearman": _agreement(averages, clusters),
        "spearman_by_domain": _agreement(cells, [c for c in clusters for _ in before]),
        "calibration": {
            name: {"held": _share(some, clusters, False), "held_with_error": _share(some, clusters, True)}
            for name, some in (("average", averages), ("domain", cells))
        },
        "mean_error": {
            name: float(np.mean([abs(f["estimate"] - e.value) for f, e in some])) if some else None
            for name, some in (("average", averages), ("domain", cells))
        },
        "regret": _regret(plan, judged),
    }


def finalists(plan: Record, measured: Mapping[str, Rewards]) -> list[str]:
    """Names of the actions to try on the test prompts.

    Args:
      plan: as in `outcomes`.
      measured: as in `outcomes`.

    Returns:
      `nothing`, the pick (tried or not), and the `FINALISTS` actions of the plan with the largest measured gain among
      those that were tried and are within the limit, the best first, those with equal gains by name; each name once.
      `nothing` and the pick may be among the `FINALISTS`, so that fewer others follow.

    Raises:
      KeyError: if `measured` lacks `nothing`, or an action lacks a domain.
    """
    tried = [row for row in plan["actions"] if row["name"] in measured]
    within = _within(plan["limit"], tried, measured)
    best = sorted(within, key=lambda name: (-gain(measured["nothing"], measured[name]), name))
    return list(dict.fromkeys(["nothing", plan["pick"], *best[:FINALISTS]]))


def gain(before: Rewards, after: Rewards) -> float:
    """The gain of the mean score over domains, in points.

    Args:
      before: rewards [P, k] by domain before the action.
      after: the same after it, on the same prompts.

    Raises:
      KeyError: if `after` lacks a domain of `before`.
    """
    return POINTS * float(np.mean([np.mean(after[d] - before[d]) for d in before]))


def _within(limit: float, rows: list[Record], measured: Mapping[str, Rewards]) -> list[str]:
    """Names of the actions whose collateral is at most the limit."""
    before = measured["nothing"]
    return [r["name"] for r in rows if collateral(before, measured[r["name"]], r["domain"]) <= limit]


def collateral(before: Rewards, after: Rewards, domain: str) -> float:
    """The largest loss of any domain but the action's own.

    Args:
      before: rewards [P, k] by domain before the action.
      after: the same after it, on the same prompts.
      domain: the action's own domain; "" for `nothing`, which has none.

    Returns:
      The loss in points: below 0 if all of these domains gained, 0 if there is no other domain.

    Raises:
      KeyError: if `after` lacks one of the other domains of `before`.
    """
    return max((POINTS * float(np.mean(before[d] - after[d])) for d in before if d != domain), default=0.0)


def _agreement(pairs: list[tuple[Record, Estimate]], clusters: list[tuple[str, str, str]]) -> Record:
    return rank_agreement([f["estimate"] for f, _ in pairs], [e.value for _, e in pairs], clusters)


def _share(pairs: list[tuple[Record, Estimate]], clusters: list[tuple[str, str, str]], widened: bool) -> Record:
    """The share of forecasts whose interval holds the outcome, of those that have one.

    Its interval has as many cases as there are clusters, or forecasts if they are fewer. With `widened`, each
    half-width is √(its square + the square of the outcome's own half-width).
    """
    held = []
    for figure, outcome in pairs:
        if figure["ci95"] is None:
            continue
        error = t_quantile(outcome.n - 1) * (outcome.stderr or 0.0) if widened else 0.0
        low, high = (figure["estimate"] - figure["ci95"][0], figure["ci95"][1] - figure["estimate"])
        off = outcome.value - figure["estimate"]
        held.append(-math.hypot(low, error) <= off <= math.hypot(high, error))
    if not held:
        return missing("no forecast has an interval", "share", null=LEVEL)
    cases = min(len(set(clusters)), len(held))
    return clopper_pearson(cases * sum(held) / len(held), cases).record(LEVEL)


def clopper_pearson(k: float, n: int) -> Estimate:
    """The share k/n with its exact binomial 95 % interval (Clopper and Pearson, 1934), for k of n cases.

    Args:
      k: number of cases, from 0 to n. If it is not whole, the interval lies between those of its neighbours.
      n: number of all cases, at least 1.

    Returns:
      The estimate, with n as its `n`. Its interval begins at 0 for k = 0, and ends at 1 for k = n.

    Raises:
      ZeroDivisionError: if n is 0.
    """
    tail = 0.5 * (1 - LEVEL)
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Estimate(k / n, low, high, n, "share")


def _regret(plan: Record, judged: Mapping[str, Rewards]) -> Record | None:
    """The gain of the best finalist minus that of the pick, on test prompts, paired by prompt; None without the pick.

    The best of several is biased up, so the regret is too large rather than too small. It can be below 0 if the pick
    went over the limit and gained more in this way.
    """
    pick = plan["pick"]
    if pick not in judged:
        return None
    before = judged["nothing"]
    rows = {row["name"]: row for row in plan["actions"] if row["name"] in judged}
    within = _within(plan["limit"], list(rows.values()), judged)
    best = max(within or [pick], key=lambda name: (gain(before, judged[name]), name))
    differences = [paired_difference(judged[best][d], judged[pick][d]).in_points() for d in sorted(before)]
    return independent_mean(differences).record(0.0) | {
        "pick": pick,
        "best": best,
        "pick_within_limit": pick in within,
        "judged": {
            name: {"gain": gain(before, judged[name]), "collateral": collateral(before, judged[name], row["domain"])}
            for name, row in rows.items()
        },
    }
