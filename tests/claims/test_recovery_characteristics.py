"""How often the rules of C6 and C7 err in simulated worlds, at the sizes of `configs/claims.py`.

The slow tests print the table of `mdrl_jax/claims/README.md`; the fast ones have the same bounds on fewer draws.
"""

import collections
from collections.abc import Callable

import numpy as np
import pytest

from mdrl_jax.claims.recovery import Refreshed, c6, c7, contracts
from mdrl_jax.stats import bootstrap
from tests.claims import recovery_worlds as worlds

Simulate = Callable[[int], dict[str, float]]  # number of draws -> share of each verdict
VERDICTS = ("supported", "undecided", "contradicted")
FEW, MANY = 60, 400
FEW_ROLLBACKS, MANY_ROLLBACKS, RESAMPLES = 10, 200, 500  # a rollback takes seven bootstraps, so they have fewer draws


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "N_RESAMPLES", RESAMPLES)


def counted(found: list[str]) -> dict[str, float]:
    counts = collections.Counter(found)
    return {v: counts[v] / len(found) for v in VERDICTS}


def contraction(world: str, streams: int, draws: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    return counted([contracts([worlds.refresh(rng, world, streams)]).verdict for _ in range(draws)])


def refreshed(world: str, walk: str, draws: int) -> dict[str, float]:
    rng, found = np.random.default_rng(1), []
    for _ in range(draws):
        one = worlds.scores(rng, world) | {"contraction": [worlds.refresh(rng, walk, 8)]}
        found.append(c6([Refreshed("refresh-math", "math", steps=4, stage_steps=22, **one)])["verdict"])
    return counted(found)


def rolled_back(world: str, draws: int) -> dict[str, float]:
    rng = np.random.default_rng(2)
    return counted([c7([worlds.rollback(rng, world)])["verdict"] for _ in range(draws)])


CASES = [
    *((f"contraction, {w}", lambda n, w=w: contraction(w, 8, n), w == "true") for w in worlds.WALKS),
    *((f"C6, {w}", lambda n, w=w: refreshed(w, "true", n), w == "true") for w in worlds.SCORES),
    ("C6, random signs", lambda n: refreshed("true", "random signs", n), False),
    *((f"C7, {w}", lambda n, w=w: rolled_back(w, n), w == "true") for w in worlds.GAINS),
]


def holds(name: str, rates: dict[str, float], true: bool, draws: int) -> bool:
    """Power ≥ 80 % and P(contradicted) ≤ 5 % where the claim is true, P(supported) ≤ 5 % where it is not.

    Each with two standard errors for the number of draws. A limit shows where the power is lost.
    """
    slack = lambda p: 2 * np.sqrt(p * (1 - p) / draws)  # noqa: E731
    if "limit" in name:
        return rates["contradicted"] <= 0.05 + slack(0.05)
    if true:
        return rates["supported"] >= 0.8 - slack(0.8) and rates["contradicted"] <= 0.05 + slack(0.05)
    return rates["supported"] <= 0.05 + slack(0.05)


@pytest.mark.parametrize(("name", "simulate", "true"), CASES, ids=[c[0] for c in CASES])
def test_the_rules_rarely_err(name: str, simulate: Simulate, true: bool):
    draws = FEW_ROLLBACKS if name.startswith("C7") else FEW
    assert holds(name, rates := simulate(draws), true, draws), rates


@pytest.mark.slow
@pytest.mark.parametrize(("name", "simulate", "true"), CASES, ids=[c[0] for c in CASES])
def test_the_table_of_the_readme(name: str, simulate: Simulate, true: bool):
    draws = MANY_ROLLBACKS if name.startswith("C7") else MANY
    rates = simulate(draws)
    print(f"\n| {name} | {draws} | " + " | ".join(f"{rates[v]:.1%}" for v in VERDICTS) + " |")
    assert holds(name, rates, true, draws), rates
