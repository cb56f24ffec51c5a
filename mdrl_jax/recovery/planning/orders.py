"""Forecasts the damage of every order of the domains from their solo edits, before any order is run (definitions §10).

The solo checkpoint θ°_i = θ_0 + δ°_i stands for the peak of domain i. The solo edits of the domains that are trained
after i are added to it. The damage of i is then, to second order,

    g_i · Σ_j δ°_j + ½ (Σ_j δ°_j)ᵀ H_i (Σ_j δ°_j),    j over the domains after i,

with g_i and H_i the gradient and the Hessian of the loss L_i at θ°_i. The first order is linear in the edits, and the
second is a quadratic form. The derivatives along the m − 1 single edits and the (m − 1)(m − 2)/2 sums of two edits
therefore give those of every subset, by polarisation. For four domains these are 24 derivatives, which serve all 24
orders.

The approximation ignores that an edit learnt after other domains differs from the solo edit.

Damage is forecast for both headline objectives of definitions §6: the expected reward in points, and the success NLL in
nats a completion. The NLL is measurable also at a saturated peak, where rewards hardly differ.

The baseline `bwt` needs no derivatives. Like arXiv 2507.14783 it orders domains by the backward transfer (BWT) of
scores between pairs of them. Here the pairs come from the solo stages: r_ij = S[solo j, i] / S[θ_0, i] is what training
j does to i's score, and the score of i after later domains is S[solo i, i] · Π_j r_ij, at most 1 [chosen]. So the
baseline takes transfers as factors that multiply, the same from θ_0 as from any later model.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdrl_jax.analysis.damage import uninformative
from mdrl_jax.analysis.expansion import NO_SUCCESS, Draws, Floats
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.progress import Track
from mdrl_jax.recovery.spent import spend
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from mdrl_jax.stats.bootstrap import bootstrap_t
from mdrl_jax.stats.estimate import POINTS, Record, independent_mean, missing, paired_difference
from mdrl_jax.stats.tests import rank_agreement

OBJECTIVES = {"reward": (POINTS, "points"), "success_nll": (1.0, "nats")}  # (factor to the unit of records, unit)
BWT = "bwt"
ORIGIN = ""  # key of θ_0 among the scores of the solo stages
Rewards = Mapping[str, np.ndarray]
Along = Callable[[tuple[str, ...]], DirectionalDerivatives]


class OrderTerms:
    """The terms from which the damage of one domain by any set of other domains' edits is computed, by prompt.

    Args:
      along: names of one or two domains -> derivatives of the damaged domain's loss along the sum of their solo edits.
      others: names of the other domains, at least one.

    Attributes:
      count_P: number of completions, or of successes, of each prompt, which the sums over prompts are divided by.
      first: other domain j -> g·δ_j, as a sum over each prompt's completions [P].
      own: other domain j -> δ_jᵀHδ_j, in the same form.
      crossed: (j, k), in alphabetical order -> δ_jᵀHδ_k, in the same form.
    """

    absent = NO_SUCCESS  # why a damage that is no number could not be measured

    def __init__(self, along: Along, others: Sequence[str]):
        names = sorted(others)
        single = {j: along((j,)) for j in names}
        self.count_P = next(iter(single.values())).count_P
        self.first = {j: x.first_P for j, x in single.items()}
        self.own = {j: x.second_P for j, x in single.items()}
        self.crossed = {
            (j, k): 0.5 * (along((j, k)).second_P - self.own[j] - self.own[k])
            for j, k in itertools.combinations(names, 2)
        }

    def damage(self, after: Sequence[str]) -> Floats:
        """The damage g·Σδ + ½ (Σδ)ᵀH(Σδ) by the edits of some domains, as a sum over each prompt's completions.

        The damage is the sum of these values over prompts divided by the sum of `count_P`.

        Args:
          after: the domains, each once, in any order; all of them must be in `others`. None of them: no damage.

        Returns:
          the sums [P], in rewards or nats.

        Raises:
          KeyError: if a domain is not in `others`.
        """
        total = np.zeros_like(self.count_P)
        for j in sorted(after):
            total = total + self.first[j] + 0.5 * self.own[j]
        for pair in itertools.combinations(sorted(after), 2):
            total = total + self.crossed[pair]
        return total

    def damage_R(self, after: Sequence[str], draws: Draws) -> Floats:
        """The damage by the edits of some domains as a figure of draws of prompts [R], in rewards or nats.

        Args:
          after: as in `damage`.
          draws: of the prompts.
        """
        return draws.ratio(self.damage(after), self.count_P)


class TransferTerms:
    """The scores from which the baseline `bwt` forecasts the damage of one domain.

    The unit is the prompt, or the group of prompts where prompts form groups.

    Args:
      own_P: rewards at the domain's solo checkpoint, summed over the prompts of each unit, [P].
      origin_P: the same at θ_0.
      others: name of another domain -> the same at that domain's solo checkpoint.
      count_P: the number of prompts of each unit.
    """

    absent = "the score at θ_0 is 0, and a transfer is a ratio to it"

    def __init__(self, own_P: Floats, origin_P: Floats, others: Mapping[str, Floats], count_P: Floats):
        self.count_P = count_P
        self._own_P, self._origin_P, self._others = own_P, origin_P, others

    def damage_R(self, after: Sequence[str], draws: Draws) -> Floats:
        """S[solo i, i] − min(1, S[solo i, i] · Π_j r_ij) over the later domains j, a figure of draws of prompts [R].

        Args:
          after: the later domains, each once, in any order; all of them must be in `others`. None of them: no damage.
          draws: of the prompts.

        Returns:
          the damage in rewards; NaN where no prompt has a reward at θ_0.
        """
        own_R, origin_R = (draws.ratio(x, self.count_P) for x in (self._own_P, self._origin_P))
        left_R = own_R.copy()
        for j in sorted(after):
            now_R = draws.ratio(self._others[j], self.count_P)
            left_R *= np.divide(now_R, origin_R, out=np.full(len(now_R), np.nan), where=origin_R > 0)
        return own_R - np.minimum(left_R, 1.0) if after else np.zeros(len(own_R))


def transfers(
    scores: Mapping[str, Rewards], domains: Sequence[str], groups: Mapping[str, np.ndarray] | None = None
) -> dict[str, TransferTerms]:
    """The terms of the baseline `bwt`, by domain.

    Args:
      scores: rewards [P, k] of every domain at θ_0 (key `ORIGIN`) and at each domain's solo checkpoint (key: the
        domain), all on the same prompts.
      domains: the domains.
      groups: the number of each prompt's group [P], of the domains whose prompts form groups.
    """
    found = {}
    for i in domains:
        mean_P = {at: np.asarray(by[i], float).mean(axis=1) for at, by in scores.items()}
        unit_P = (groups or {}).get(i, np.arange(len(mean_P[i])))
        _, unit_P, count_P = np.unique(unit_P, return_inverse=True, return_counts=True)
        sums = {at: np.bincount(unit_P, weights=x).astype(float) for at, x in mean_P.items()}
        found[i] = TransferTerms(sums[i], sums[ORIGIN], {j: sums[j] for j in domains if j != i}, count_P.astype(float))
    return found


def expand(
    probe: Probe,
    solo: Callable[[str], Any],
    base: Any,
    samples: Mapping[str, Sample],
    track: Track,
) -> dict[str, dict[str, OrderTerms]]:
    """Computes the derivatives along all single edits and pairs of edits.

    Args:
      probe: computes the derivatives.
      solo: domain -> parameters of its solo checkpoint. It is called several times for each domain.
      base: θ_0, the parameters that every solo checkpoint was trained from.
      samples: completions of each of at least two domains, sampled at its solo checkpoint, at least two of each prompt.
      track: reports progress.

    Returns:
      The terms, by objective (`OBJECTIVES`) and then by damaged domain.

    Raises:
      ValueError: if there is only one completion of each prompt.
      Stopped: after a SIGTERM, if `track` is that of a `Screen`.
    """
    domains = sorted(samples)
    others = {domain: [d for d in domains if d != domain] for domain in domains}
    sets = {d: [(j,) for j in others[d]] + list(itertools.combinations(others[d], 2)) for d in domains}
    found: dict[str, dict[str, OrderTerms]] = {name: {} for name in OBJECTIVES}
    done = 0
    with track("orders", sum(map(len, sets.values()))) as show:
        for domain in domains:
            point = solo(domain)
            made: dict[tuple[str, ...], Mapping[str, DirectionalDerivatives]] = {}
            for names in sets[domain]:
                show(done, f"{domain} along the solo edits of {' and '.join(names)}")
                v = probe.difference(solo(names[0]), base)
                for name in names[1:]:
                    v = probe.along(v, probe.difference(solo(name), base), np.float32(1))
                spend(probe.runtime, "jets", probe.rows(samples[domain]))
                made[names] = probe.derivatives(point, v, samples[domain])
                done += 1
            for objective in OBJECTIVES:
                along = {names: x[objective] for names, x in made.items()}
                found[objective][domain] = OrderTerms(along.__getitem__, others[domain])
    return found


def forecast(
    terms: Mapping[str, OrderTerms | TransferTerms], factor: float, unit: str, reasons: Mapping[str, str] | None = None
) -> list[Record]:
    """Forecasts the damage of every domain in every order, and ranks the orders.

    Args:
      terms: the terms of one objective, or of the baseline, by domain.
      factor: factor from the unit of the objective to `unit`, for example 100 from rewards to points.
      unit: of the figures.
      reasons: domain -> why its damage cannot be measured. Such a domain has this reason in place of figures, and the
        total is the sum over the others.

    Returns:
      One record for each of the m! orders of the m domains: "rank" from 1, "order", "total" damage over domains and
      "damage" by domain, 0 for the last domain of the order. The figures are records with intervals (bootstrap-t over
      prompts, null 0), and above 0 is harm. The least harmful order is first. Orders with equal totals are ranked by
      name. So are all orders if there is no total: if every domain has a reason, or if one of the others has no
      completion to measure on (no success).
    """
    domains, reasons = sorted(terms), dict(reasons or {})
    rows = []
    for order in itertools.permutations(domains):
        damage: Record = {}
        total_X, variance_X, n, absent = np.zeros(1), np.zeros(1), 0, ""
        for place, domain in enumerate(domains):
            own, draws = terms[domain], Draws(len(terms[domain].count_P))
            values_R = factor * own.damage_R(order[order.index(domain) + 1 :], draws)
            damage[domain] = draws.figure(values_R, unit, reasons.get(domain, ""))
            if domain not in reasons:
                if damage[domain]["estimate"] is None:
                    absent = damage[domain]["reason"] = own.absent
                value_X, stderr_X = draws.values(values_R), draws.stderrs(values_R)
                # `Draws` has a fixed seed and would draw the same prompt numbers in every domain. Domains must be
                # independent, so their draws are permuted; the first value is the sample itself.
                mixed = np.concatenate([[0], 1 + np.random.default_rng(place).permutation(len(value_X) - 1)])
                total_X, variance_X, n = total_X + value_X[mixed], variance_X + stderr_X[mixed] ** 2, n + draws.n
        if not n:
            total = missing("no domain's expansion is measurable", unit)
        elif not np.isfinite(total_X[0]):
            total = missing(absent, unit, n)
        else:
            total = bootstrap_t(total_X, np.sqrt(variance_X), n, unit).record(0.0)
        rows.append({"order": list(order), "total": total, "damage": damage})
    rows.sort(key=lambda r: (round(r["total"]["estimate"] or 0.0, 9), r["order"]))
    return [{"rank": rank} | row for rank, row in enumerate(rows, 1)]


def compare(
    rows: Sequence[Record],
    runs: Sequence[tuple[Sequence[str], Mapping[str, Rewards]]],
    groups: Mapping[str, np.ndarray] | None = None,
) -> Record:
    """Compares the forecast with the measured damage for the orders that were run.

    Args:
      rows: the result of `forecast`.
      runs: for each order that was run (the order, rewards): trained domain -> the rewards [P, k] of every domain after
        its stage. All rewards are on the same prompts.
      groups: the number of each prompt's group [P], of the domains whose prompts form groups.

    Returns:
      "runs", the forecast and the measured damage of each order (the forecast in its own unit, the measured damage in
      points), in total and for each domain but the last; and "spearman", their rank correlation over all pairs (order,
      domain) whose damage was forecast. It is missing with fewer than five pairs, for example without runs.

    Raises:
      KeyError: if an order has other domains than the forecast, or a reward is missing.
      ValueError: if the rewards of a domain are on different numbers of prompts.
    """
    foretold = {tuple(row["order"]): row for row in rows}
    checked = []
    for order, after in runs:
        row = foretold[tuple(order)]
        grouped = {d: (groups or {}).get(d) for d in order[:-1]}
        lost = {d: paired_difference(after[d][d], after[order[-1]][d], g).in_points() for d, g in grouped.items()}
        total = independent_mean(list(lost.values())).scaled(len(lost), "points").record(0.0)
        checked.append(
            {
                "order": list(order),
                "rank": row["rank"],
                "total": {"forecast": row["total"], "measured": total},
                "damage": {d: {"forecast": row["damage"][d], "measured": e.record(0.0)} for d, e in lost.items()},
            }
        )
    cells = [x for row in checked for x in row["damage"].values()]
    known = [c for c in cells if c["forecast"]["estimate"] is not None]
    pairs = [[c[name]["estimate"] for c in known] for name in ("forecast", "measured")]
    return {"runs": checked, "spearman": rank_agreement(*pairs)}


def run(
    probe: Probe,
    solo: Callable[[str], Any],
    base: Any,
    samples: Mapping[str, Sample],
    scores: Mapping[str, Rewards],
    runs: Sequence[tuple[Sequence[str], Mapping[str, Rewards]]],
    track: Track,
    groups: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] = ({}, {}),
) -> Record:
    """Forecasts all orders and checks the forecasts against the orders that were run.

    Args:
      probe: computes the derivatives.
      solo: domain -> parameters of its solo checkpoint.
      base: θ_0, the parameters that every solo checkpoint was trained from.
      samples: completions of each of at least two domains, sampled at its solo checkpoint, at least two of each prompt.
      scores: rewards at θ_0 and at the solo checkpoints, as for `transfers`, on other prompts than those of `runs`.
      runs: the orders that were run, as for `compare`; may be empty.
      track: reports progress.
      groups: the number of each prompt's group [P] by domain, for the prompts of `scores` and for those of `runs`.

    Returns:
      The record of `recovery/orders.json`: for each objective, and for the baseline `BWT`, "orders" (`forecast`) and
      "checked" (`compare`). Forecasts of "reward" and "bwt" are in points, those of "success_nll" in nats a completion;
      above 0 is harm. Where the reward's Hessian of a domain is not measurable (definitions §6), "reward" has no figure
      of this domain.

    Raises:
      KeyError: as in `compare`.
      ValueError: as in `compare` and `expand`.
      Stopped: after a SIGTERM, if `track` is that of a `Screen`.
    """
    record: Record = {}
    for objective, terms in expand(probe, solo, base, samples, track).items():
        reasons = {d: r for d, s in samples.items() if (r := uninformative(s))} if objective == "reward" else {}
        rows = forecast(terms, *OBJECTIVES[objective], reasons)
        record[objective] = {"orders": rows, "checked": compare(rows, runs, groups[1])}
    rows = forecast(transfers(scores, sorted(samples), groups[0]), POINTS, "points")
    record[BWT] = {"orders": rows, "checked": compare(rows, runs, groups[1])}
    return record
