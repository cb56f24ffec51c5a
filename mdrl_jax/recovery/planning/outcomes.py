"""How good a plan was: forecasts against what the actions did, on prompts that all of them share.

Ranks (Spearman over actions), calibration of the intervals (share that hold the outcome), and the regret of the pick
against the best action tried. `nothing`, known in advance, counts as an action to pick but not as a forecast.

The best of some ninety outcomes, each with its sampling error, looks better than it is, and one within the limit there
may not be. So the `FINALISTS` with the best outcomes within the limit on validation prompts are judged, with the pick,
on test prompts; the best is the best of those that are within the limit there.
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
    """A record of every action tried, and the figures of the module docstring.

    The interval of a forecast is of the expected score; the outcome has a sampling error of its own. `held` asks
    whether the interval holds the outcome as measured, `held_with_error` whether one widened by the outcome's error
    does. Cells (action × domain) are not independent: their share's interval takes them as if they were, so it is too
    narrow.

    Args:
      plan: of `decision.decide`.
      measured: rewards [P, k] by domain after each action tried, by its name, all on the same prompts, with `nothing`.
      judged: rewards on test prompts after `nothing`, the pick and the `finalists`.
    """
    before, rows, cells, averages = measured["nothing"], [], [], []
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
    return {
        "actions": rows,
        "spearman": _agreement(averages),
        "spearman_by_domain": _agreement(cells),
        "calibration": {
            name: {"held": _share(some, False), "held_with_error": _share(some, True)}
            for name, some in (("average", averages), ("domain", cells))
        },
        "mean_error": {
            name: float(np.mean([abs(f["estimate"] - e.value) for f, e in some])) if some else None
            for name, some in (("average", averages), ("domain", cells))
        },
        "regret": _regret(plan, judged),
    }


def finalists(plan: Record, measured: Mapping[str, Rewards]) -> list[str]:
    """What is judged on test prompts: `nothing`, the pick, and the best outcomes within the limit, first ones first."""
    tried = [row for row in plan["actions"] if row["name"] in measured]
    within = _within(plan["limit"], tried, measured)
    best = sorted(within, key=lambda name: (-gain(measured["nothing"], measured[name]), name))
    return list(dict.fromkeys(["nothing", plan["pick"], *best[:FINALISTS]]))


def gain(before: Rewards, after: Rewards) -> float:
    """Points gained by the mean over domains."""
    return POINTS * float(np.mean([np.mean(after[d] - before[d]) for d in before]))


def _within(limit: float, rows: list[Record], measured: Mapping[str, Rewards]) -> list[str]:
    before = measured["nothing"]
    return [r["name"] for r in rows if collateral(before, measured[r["name"]], r["domain"]) <= limit]


def collateral(before: Rewards, after: Rewards, domain: str) -> float:
    """Points lost by the domain, other than the action's own, that lost most; below 0 where all gained."""
    return max((POINTS * float(np.mean(before[d] - after[d])) for d in before if d != domain), default=0.0)


def _agreement(pairs: list[tuple[Record, Estimate]]) -> Record:
    return rank_agreement([f["estimate"] for f, _ in pairs], [e.value for _, e in pairs])


def _share(pairs: list[tuple[Record, Estimate]], widened: bool) -> Record:
    """Share of forecasts with an interval that holds the outcome."""
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
    return clopper_pearson(sum(held), len(held)).record(LEVEL)


def clopper_pearson(k: int, n: int) -> Estimate:
    """The share k/n with its exact binomial interval (Clopper and Pearson, 1934)."""
    tail = 0.5 * (1 - LEVEL)
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Estimate(k / n, low, high, n, "share")


def _regret(plan: Record, judged: Mapping[str, Rewards]) -> Record | None:
    """What the best finalist gained on the pick, on test prompts, paired by prompt; None where that was not tried.

    The best of a few is biased up, so the regret is too large rather than too small; below 0 where the pick itself
    went over the limit, and gained by it.
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
