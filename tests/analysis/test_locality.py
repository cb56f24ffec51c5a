"""One expansion against edits of several sizes: laws of R² in a quadratic world, and of small edits of the model."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mdrl_jax import runtime
from mdrl_jax.analysis import locality, samples
from mdrl_jax.analysis.probe import build
from mdrl_jax.analysis.subspace import removal
from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.records import write_json
from mdrl_jax.report.figures import locality as shown
from mdrl_jax.report.folder import Records
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from tests.analysis.test_interference import edited
from tests.odd_pool import OddPool

pytestmark = pytest.mark.usefixtures("fast_compile")


def order(first_P: np.ndarray, second_P: np.ndarray, count_P: np.ndarray) -> DirectionalDerivatives:
    return DirectionalDerivatives(first_P * count_P, second_P * count_P, count_P)


def test_a_quadratic_damage_is_explained_in_full_and_a_permuted_one_is_not():
    rng = np.random.default_rng(0)
    first_P, second_P, count_P = rng.normal(size=40), rng.normal(size=40), rng.integers(0, 4, 40).astype(float)
    truth_P = first_P + 0.5 * second_P
    exact = locality.explained(order(first_P, second_P, count_P), truth_P * count_P)
    assert exact["estimate"] == pytest.approx(1.0) and exact["n"] == (count_P > 0).sum()
    assert exact["null"][1] < 0.3
    noisy = truth_P + rng.normal(0, truth_P.std(), 40)
    half = locality.explained(order(first_P, second_P, count_P), noisy * count_P)
    known = count_P > 0
    m, q = noisy[known], truth_P[known]
    expected = 1 - ((m - q) ** 2).sum() / ((m - m.mean()) ** 2).sum()
    assert half["estimate"] == pytest.approx(expected)
    assert half["ci95"][0] < expected < half["ci95"][1] < 1 and exact["ci95"] is None
    mean = locality.explained(order(np.full(40, m.mean()), np.zeros(40), np.ones(40)), np.where(known, noisy, m.mean()))
    assert mean["estimate"] == pytest.approx(0.0, abs=1e-9)


def test_without_successes_or_without_differences_there_is_no_share():
    few = order(np.ones(9), np.ones(9), np.array([1.0, 1.0, *np.zeros(7)]))
    assert "fewer than three" in locality.explained(few, np.ones(9))["reason"]
    alike = locality.explained(order(np.ones(9), np.ones(9), np.ones(9)), np.ones(9))
    assert alike["estimate"] is None and alike["reason"]


@pytest.fixture
def built(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> runtime.Runtime:
    """A runtime of the small random model on one device; its rewards are a function of the text."""
    monkeypatch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    fields = {
        "scored_domains": ("math",),
        "stages": ("math",),
        "model": {"path": str(small_folder), "weights": "random"},
        "rollout": {"prompt_buckets": (12,), "completion_buckets": (8,)},
        "domains": {"n_test": 8, "n_validation": 8},
        "evaluate": {"batch": 8},
        "analyze": {"prompts": 16, "group_size": 4, "batch": 4, "path_prompts": 4, "vectors": 2, "lanczos_block": 2}
        | {"lanczos_steps": 4},
    }
    pool: Any = OddPool()
    return runtime.build(parse(fields), pool)


@pytest.mark.slow  # 20 s; test_damage.py has the expansion
def test_the_smaller_the_edit_the_better_one_expansion_tells_its_damage(built, tmp_path, monkeypatch):
    monkeypatch.setattr(locality, "SEGMENTS", (1, 2))
    monkeypatch.setattr(removal, "N_RANDOM", 1)
    base = built.base_params()
    ends = {"near": edited(base, 1, 0.002), "far": edited(base, 1, 0.1)}
    with jax.set_mesh(built.mesh):
        sample = samples.draw(built, base, "math")
        probe = build(built, built.config.train.grpo)
        rows = locality.measure(probe, base, list(ends), ends.__getitem__, sample, lambda text: None)
        near, far = rows
    assert [near["stage"], far["stage"]] == ["near", "far"]
    assert near["norm"] == pytest.approx(far["norm"] / 50, rel=1e-3)
    assert near["unchanged"]["estimate"] > far["unchanged"]["estimate"]
    assert near["r2"]["estimate"] > 0.98
    assert near["predicted"]["estimate"] == pytest.approx(near["damage"]["estimate"], rel=0.05)
    assert far["r2"]["estimate"] < near["r2"]["estimate"]
    # S depends on the peak alone, so the same vectors are removed from both edits, which have one direction.
    assert near["removal"]["eigenvalues"] == far["removal"]["eigenvalues"]
    assert near["removal"]["share_of_norm"] == pytest.approx(far["removal"]["share_of_norm"], rel=1e-3)
    for row, lost, by in ((near, 1.0, "GRPO, adamw"), (far, 30.0, "SFT, sgd")):
        row["lost"] = {"estimate": lost, "ci95": [lost - 1, lost + 1], "null": 0.0, "n": 9, "unit": "points"}
        row |= {"scores": {"qa": row["lost"]}, "by": by, "domains": ["qa"], "learning_rate": 0.1, "steps": 3}
    write_json(tmp_path / "analysis" / "locality-code.json", {"domain": "code", "stage": "code", "edits": [far, near]})
    figure, table = shown.locality(Records(tmp_path))
    assert [row[0] for row in table.rows] == ["near", "far"]
    assert table.rows[1][1] == "SFT, sgd on qa, learning rate 0.1, 3 steps"
    assert {r["by"] for r in figure.rows} == {"GRPO, adamw", "SFT, sgd"}
    assert all(r["drawn_estimate"] is None or r["drawn_estimate"] >= -1 for r in figure.rows)
    figure.chart.to_dict()
    both = shown.over_seeds([tmp_path, tmp_path])
    assert both is not None and both.rows == figure.rows * 2 and "of 2 seeds" in both.caption
    (tmp_path / "other").mkdir()
    assert shown.over_seeds([tmp_path / "other"]) is None
    with pytest.raises(UserError, match=r"other has no analysis/locality-"):
        shown.over_seeds([tmp_path, tmp_path / "other"])
