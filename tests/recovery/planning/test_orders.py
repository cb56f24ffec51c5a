"""Orders foretold from solo edits: polarisation against expanding every order itself, ranks, the check by runs."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdrl_jax.recovery.planning import orders
from mdrl_jax.recovery.planning.orders import (
    ORIGIN,
    OrderTerms,
    TransferTerms,
    compare,
    expand,
    forecast,
    transfers,
)
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from tests.told import Told

DOMAINS = ("code", "cw", "math", "qa")
N, P = 5, 12
RNG = np.random.default_rng(0)
SOLO = {d: RNG.normal(size=N) for d in DOMAINS}  # from a base at 0, so these are the edits too
G_P = {d: RNG.normal(0.1, 0.3, (P, N)) for d in DOMAINS}
H_P = {d: (lambda a: a + a.swapaxes(1, 2))(RNG.normal(0.1, 0.3, (P, N, N))) for d in DOMAINS}
COUNT_P = {d: RNG.integers(1, 5, P).astype(float) for d in DOMAINS}


def derivatives(domain: str, v: np.ndarray) -> DirectionalDerivatives:
    """Of quadratic losses, one a prompt, at the solo checkpoint."""
    first_P, second_P = G_P[domain] @ v, np.einsum("i,pij,j->p", v, H_P[domain], v)
    return DirectionalDerivatives(COUNT_P[domain] * first_P, COUNT_P[domain] * second_P, COUNT_P[domain])


def terms(domain: str) -> OrderTerms:
    return OrderTerms(
        lambda names: derivatives(domain, np.sum([SOLO[j] for j in names], axis=0)),
        [d for d in DOMAINS if d != domain],
    )


TERMS = {d: terms(d) for d in DOMAINS}


def direct(domain: str, order: tuple[str, ...]) -> float:
    """The damage of a domain in an order, expanded along the sum of what comes after."""
    after = order[order.index(domain) + 1 :]
    order2 = derivatives(domain, np.sum([SOLO[j] for j in after], axis=0) if after else np.zeros(N))
    return 100 * (order2.first + 0.5 * order2.second)


def test_polarisation_gives_all_orders_that_direct_expansions_give():
    rows = forecast(TERMS, 100.0, "points")
    assert sorted(r["order"] for r in rows) == sorted(list(o) for o in itertools.permutations(DOMAINS))
    for row in rows:
        expected = {d: direct(d, tuple(row["order"])) for d in DOMAINS}
        for domain, value in expected.items():
            assert row["damage"][domain]["estimate"] == pytest.approx(value)
        assert row["total"]["estimate"] == pytest.approx(sum(expected.values()))
        assert row["total"]["n"] == len(DOMAINS) * P
    totals = [row["total"]["estimate"] for row in rows]
    assert totals == sorted(totals) and [row["rank"] for row in rows] == list(range(1, 25))


def test_the_last_domain_is_not_damaged():
    for row in forecast(TERMS, 100.0, "points"):
        last = row["damage"][row["order"][-1]]
        assert (last["estimate"], last["ci95"]) == (0, [0, 0])


def test_pairs_and_singles_are_all_that_is_asked_for():
    asked: list[tuple[str, ...]] = []

    def along(names: tuple[str, ...]) -> DirectionalDerivatives:
        asked.append(names)
        return derivatives("math", np.sum([SOLO[j] for j in names], axis=0))

    OrderTerms(along, ["qa", "code", "cw"])
    assert asked == [("code",), ("cw",), ("qa",), ("code", "cw"), ("code", "qa"), ("cw", "qa")]


def test_intervals_are_by_prompt_and_domains_are_independent():
    """Against the variance of a ratio of means, by the delta method, and the sum of them over domains."""
    row = forecast(TERMS, 1.0, "reward")[0]
    variances = {}
    for domain in DOMAINS:
        parts_P = TERMS[domain].damage(row["order"][row["order"].index(domain) + 1 :])
        count_P = COUNT_P[domain]
        rest_P = (parts_P - parts_P.sum() / count_P.sum() * count_P) / count_P.mean()
        variances[domain] = rest_P.var(ddof=1) / P
    # Bootstrap-t intervals are about as wide as Student's with 11 degrees of freedom, and wider for skewed terms.
    widths = {d: np.diff(row["damage"][d]["ci95"])[0] / (2 * 2.2) for d in DOMAINS}
    for domain in row["order"][:-1]:
        assert widths[domain] == pytest.approx(math.sqrt(variances[domain]), rel=0.3)
    total = np.diff(row["total"]["ci95"])[0] / (2 * 2.05)
    assert total == pytest.approx(math.sqrt(sum(variances.values())), rel=0.25)


def test_no_order_of_inputs_matters_and_ties_go_by_name():
    rows = forecast(TERMS, 100.0, "points")
    backwards = {d: TERMS[d] for d in reversed(DOMAINS)}
    assert json.dumps(forecast(backwards, 100.0, "points"), sort_keys=True) == json.dumps(rows, sort_keys=True)
    zeros = DirectionalDerivatives(np.zeros(P), np.zeros(P), np.ones(P))
    equal = {d: OrderTerms(lambda names: zeros, [j for j in DOMAINS if j != d]) for d in DOMAINS}
    ranked = [tuple(row["order"]) for row in forecast(equal, 100.0, "points")]
    assert ranked == sorted(ranked)


def test_a_domain_that_cannot_be_measured_is_left_out_of_the_sum_and_says_so():
    rows = forecast(TERMS, 100.0, "points", {"qa": "only 3% of the prompts"})
    for row in rows:
        assert row["damage"]["qa"]["estimate"] is None and row["damage"]["qa"]["reason"] == "only 3% of the prompts"
        rest = [direct(d, tuple(row["order"])) for d in DOMAINS if d != "qa"]
        assert row["total"]["estimate"] == pytest.approx(sum(rest))
    none = forecast(TERMS, 100.0, "points", dict.fromkeys(DOMAINS, "saturated"))
    assert none[0]["total"]["estimate"] is None and "no domain" in none[0]["total"]["reason"]
    json.dumps(none, allow_nan=False)


SOLO_POINTS = {  # mean rewards of each domain at θ_0 and at the solo checkpoints
    ORIGIN: {"code": 0.6, "cw": 0.7, "math": 0.4, "qa": 0.3},
    "code": {"code": 0.95, "cw": 0.7, "math": 0.5, "qa": 0.3},
    "cw": {"code": 0.6, "cw": 0.9, "math": 0.3, "qa": 0.4},
    "math": {"code": 0.7, "cw": 0.6, "math": 0.9, "qa": 0.15},
    "qa": {"code": 0.65, "cw": 0.8, "math": 0.2, "qa": 0.7},
}
SPREAD = np.linspace(-0.05, 0.05, 40)
SCORES = {
    at: {d: x + np.random.default_rng((i, j)).permutation(SPREAD).reshape(20, 2) for j, (d, x) in enumerate(by.items())}
    for i, (at, by) in enumerate(SOLO_POINTS.items())
}


def test_backward_transfer_multiplies_over_later_domains():
    rows = forecast(transfers(SCORES, DOMAINS), 100.0, "points")
    totals = {}
    for order in itertools.permutations(DOMAINS):
        lost = {}
        for i, domain in enumerate(order):
            kept = SOLO_POINTS[domain][domain]
            for later in order[i + 1 :]:
                kept *= SOLO_POINTS[later][domain] / SOLO_POINTS[ORIGIN][domain]
            lost[domain] = 100 * (SOLO_POINTS[domain][domain] - min(kept, 1.0))
        row = next(r for r in rows if r["order"] == list(order))
        assert {d: x["estimate"] for d, x in row["damage"].items()} == pytest.approx(lost)
        totals[order] = sum(lost.values())
    assert rows[0]["order"] == list(min(totals, key=lambda o: totals[o]))
    # math → qa halves math: 90 · 0.2 / 0.4 = 45; the order of what comes after does not matter.
    both = {tuple(r["order"]): r["damage"]["math"] for r in rows}
    assert both["code", "cw", "math", "qa"]["estimate"] == pytest.approx(45)
    assert both["math", "cw", "qa", "code"] == both["math", "qa", "code", "cw"]
    assert both["code", "cw", "qa", "math"]["ci95"] == [0, 0]


def test_transfer_from_a_score_of_zero_is_not_measurable():
    dead = {at: by | {"qa": np.zeros((20, 2))} if at == ORIGIN else by for at, by in SCORES.items()}
    rows = forecast(transfers(dead, DOMAINS), 100.0, "points")
    for row in rows:
        later = row["order"][-1] != "qa"
        assert (row["damage"]["qa"]["estimate"] is None) == later == (row["total"]["estimate"] is None)
        assert not later or row["total"]["reason"] == row["damage"]["qa"]["reason"] == TransferTerms.absent
    json.dumps(rows, allow_nan=False)


def test_transfers_of_grouped_prompts_have_the_group_as_the_unit():
    """Copies of a prompt in its group change no estimate and no interval."""
    twice = {at: {d: np.repeat(x, 2, axis=0) for d, x in by.items()} for at, by in SCORES.items()}
    groups = {d: np.repeat(np.arange(20), 2) for d in DOMAINS}
    alone, grouped = (forecast(transfers(x, DOMAINS, g), 100.0, "points") for x, g in ((SCORES, {}), (twice, groups)))
    for a, b in zip(alone, grouped, strict=True):
        assert a["order"] == b["order"] and a["total"]["n"] == b["total"]["n"]
        for figure in ("total", "damage"):
            one, other = ([x["total"]] if figure == "total" else list(x["damage"].values()) for x in (a, b))
            for left, right in zip(one, other, strict=True):
                assert (left["estimate"], *left["ci95"]) == pytest.approx((right["estimate"], *right["ci95"]))


def rewards(level: float, seed: int) -> np.ndarray:
    return level + np.random.default_rng(seed).normal(0, 0.01, (30, 2))


def run_of(order: tuple[str, ...], lost: dict[str, float]) -> tuple[Any, Any]:
    """Rewards by domain after each stage; each domain peaks at 0.9 and ends that much lower."""
    after = {d: {d: rewards(0.9, i)} for i, d in enumerate(order)}
    after[order[-1]] |= {d: after[d][d] - x for d, x in lost.items()}
    return order, after


def test_what_was_foretold_is_held_against_the_runs():
    rows = forecast(TERMS, 100.0, "points")
    by_order = {tuple(r["order"]): r for r in rows}
    order, back = DOMAINS, DOMAINS[::-1]
    lost = {o: {d: by_order[o]["damage"][d]["estimate"] / 100 for d in o[:-1]} for o in (order, back)}
    found = compare(rows, [run_of(o, lost[o]) for o in (order, back)])
    for row, o in zip(found["runs"], (order, back), strict=True):
        assert row["order"] == list(o) and row["rank"] == by_order[o]["rank"]
        for d in o[:-1]:
            assert row["damage"][d]["measured"]["estimate"] == pytest.approx(100 * lost[o][d])
        assert row["total"]["measured"]["estimate"] == pytest.approx(100 * sum(lost[o].values()))
        assert row["total"]["forecast"] == by_order[o]["total"]
    assert found["spearman"]["estimate"] == pytest.approx(1) and found["spearman"]["n"] == 6
    opposite = {o: {d: -x for d, x in lost[o].items()} for o in lost}
    turned = compare(rows, [run_of(o, opposite[o]) for o in (order, back)])
    assert turned["spearman"]["estimate"] == pytest.approx(-1)
    assert compare(rows, [])["spearman"]["estimate"] is None


def test_expansions_are_taken_at_solo_checkpoints_along_solo_edits(monkeypatch):
    """The probe's part: points, directions, and both objectives of each; then the whole record."""
    seen: list[tuple[str, np.ndarray]] = []
    base = np.full(N, 2.0)
    solo = {d: base + SOLO[d] for d in DOMAINS}

    def taken(point: np.ndarray, v: np.ndarray, sample: Any) -> dict[str, DirectionalDerivatives]:
        seen.append((sample.domain, v))
        np.testing.assert_array_equal(point, solo[sample.domain])
        made = derivatives(sample.domain, v)
        return {
            "reward": made,
            "success_nll": DirectionalDerivatives(2 * made.first_P, 2 * made.second_P, made.count_P),
        }

    probe: Any = SimpleNamespace(
        difference=lambda a, b: a - b, along=lambda x, v, alpha: x + alpha * v, derivatives=taken,
        rows=lambda sample: [SimpleNamespace(valid_BT=np.ones((2, 5)), weight_B=np.ones(2))],
        runtime=SimpleNamespace(rollouts=SimpleNamespace(spent=Counter())),
    )  # fmt: skip
    samples: Any = {d: SimpleNamespace(domain=d, informative=0.1 if d == "qa" else 0.9) for d in DOMAINS}
    told = Told()
    found = expand(probe, solo.__getitem__, base, samples, told)
    assert probe.runtime.rollouts.spent == {"jets": 24 * 10}
    assert len(seen) == 24 == told.totals["orders"] and told.counted("orders")
    after = ("code", "qa")
    np.testing.assert_allclose(found["reward"]["math"].damage(after), TERMS["math"].damage(after), atol=1e-9)
    np.testing.assert_allclose(found["success_nll"]["math"].damage(after), 2 * TERMS["math"].damage(after))
    runs = [run_of(DOMAINS, dict.fromkeys(DOMAINS[:-1], 0.1))]
    record = orders.run(probe, solo.__getitem__, base, samples, SCORES, runs, Told())
    assert set(record) == {"reward", "success_nll", "bwt"} and len(record["bwt"]["orders"]) == 24
    totals = [record[name]["checked"]["runs"][0]["total"]["measured"] for name in ("bwt", "reward")]
    assert totals[0] == totals[1]
    assert record["reward"]["orders"][0]["damage"]["qa"]["estimate"] is None  # below 20 % informative prompts
    assert record["success_nll"]["orders"][0]["damage"]["qa"]["unit"] == "nats"
    assert record["success_nll"]["checked"]["runs"][0]["order"] == list(DOMAINS)
    json.dumps(record, allow_nan=False)
