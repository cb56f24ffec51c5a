"""Merges of solo edits: what is merged, and by which factor."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.stages import merge
from tests.told import Told

pytestmark = pytest.mark.usefixtures("fast_compile")

BASE = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
EDITS = {
    "math": {"a": jnp.array([1.0, 0.0, -2.0, 0.5]), "b": jnp.full((2, 3), 0.25)},
    "qa": {"a": jnp.array([1.0, 2.0, 2.0, 0.0]), "b": jnp.zeros((2, 3))},
}
SOLOS = {d: jax.tree.map(jnp.add, BASE, e) for d, e in EDITS.items()}


@pytest.fixture
def runtime(monkeypatch):
    """One that scores parameters by how near `a` is to base + 0.5 · Σ edits, in two domains."""
    section = default()
    section.recover.scales = (0.25, 0.5, 1.0)
    section.recover.density = 1.0
    target = BASE["a"] + 0.5 * (EDITS["math"]["a"] + EDITS["qa"]["a"])

    def rewards(made, params):
        score = float(jnp.exp(-jnp.sum((params["a"] - target) ** 2)))
        return {d: np.clip(np.full((6, 2), score) + np.arange(6)[:, None] * 1e-3, 0, 1) for d in SOLOS}

    monkeypatch.setattr(merge, "validation_rewards", rewards)
    return types.SimpleNamespace(config=parse(section), shardings=jax.tree.map(lambda x: x.sharding, BASE))


def test_the_average_is_the_mean_of_the_models(runtime):
    merged, record = merge.merge(runtime, "average", BASE, SOLOS, Told())
    jax.tree.map(lambda m, x, y: np.testing.assert_allclose(m, (x + y) / 2, rtol=1e-6), merged, *SOLOS.values())
    assert record["chosen"] is None


def test_the_factor_is_the_one_with_the_best_validation_average(runtime):
    told = Told()
    merged, record = merge.merge(runtime, "arithmetic", BASE, SOLOS, told)
    assert told.totals == {"arithmetic": 3} and told.counted("arithmetic")
    assert record["chosen"] == 0.5 and [p["scale"] for p in record["points"]] == [0.25, 0.5, 1.0]
    averages = [p["average"]["estimate"] for p in record["points"]]
    assert averages[1] == max(averages) and record["points"][1]["average"]["ci95"] is not None
    expected = jax.tree.map(lambda b, x, y: b + 0.5 * (x + y), BASE, *EDITS.values())
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-6), merged, expected)


@pytest.mark.parametrize(("name", "swept", "values"), [("ram", "threshold", (0.0, 1.0)), ("dare", "rate", (0.0, 0.5))])
def test_the_threshold_of_ram_and_the_rate_of_dare_are_chosen_with_the_factor(runtime, name, swept, values):
    field = {"threshold": "thresholds", "rate": "drop_rates"}[swept]
    runtime.config = dataclasses.replace(
        runtime.config, recover=dataclasses.replace(runtime.config.recover, **{field: values})
    )
    told = Told()
    merged, record = merge.merge(runtime, name, BASE, SOLOS, told)
    assert told.counted(name) and [(p[swept], p["scale"]) for p in record["points"]] == [
        (value, scale) for value in values for scale in (0.25, 0.5, 1.0)
    ]
    best = max(record["points"], key=lambda p: p["average"]["estimate"])
    assert (record["chosen"], record[swept]) == (best["scale"], best[swept])
    if name == "dare":  # without dropping it is task arithmetic, whose best factor is 0.5
        assert (record["rate"], record["chosen"]) == (0.0, 0.5)
    else:  # a[3] and b are of math alone, a[1] of qa alone; a[0] and a[2] are changed by both
        assert [c["threshold"] for c in record["changed"]] == [0.0, 1.0]
        assert record["changed"][0] | {"threshold": 0} == {
            "threshold": 0, "domains": {"math": 0.9, "qa": 0.3}, "one": 0.8, "several": 0.2,
        }  # fmt: skip
        if record["threshold"] == 0.0:
            moved = (merged["a"] - BASE["a"]) / record["chosen"]
            np.testing.assert_allclose(moved, [1.0, 2.0, 0.0, 0.5], rtol=1e-6)
    assert merge.merge(runtime, name, BASE, SOLOS, Told())[1] == record  # the draws are functions of the seed


def test_ties_leaves_out_what_loses_the_election_of_signs(runtime):
    merged, record = merge.merge(runtime, "ties", BASE, SOLOS, Told())
    # a[2] has edits −2 and 2, whose sum is 0; a[0] has 1 twice: the mean of those that agree is 1.
    moved = (merged["a"] - BASE["a"]) / record["chosen"]
    np.testing.assert_allclose(moved[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(moved[1], 2.0, rtol=1e-6)
