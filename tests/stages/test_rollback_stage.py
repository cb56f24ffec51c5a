"""The stage on the embedded model: gradients against jets, samples that are kept, and a record that remakes it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mdrl_jax import evaluate, records, runtime, tree
from mdrl_jax.analysis import probe as probes
from mdrl_jax.analysis import samples
from mdrl_jax.config import default, parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.recovery.rollback import evidence
from mdrl_jax.recovery.rollback.evidence import Ends
from mdrl_jax.recovery.rollback.rules import SCORES, Evidence
from mdrl_jax.second_order.fisher import _quadratic
from mdrl_jax.stage import peak, resolve_stages
from mdrl_jax.stages import rollback
from tests.conftest import compiling_fast
from tests.told import Told


@pytest.fixture(scope="module")
def built() -> Iterator[runtime.Runtime]:
    """Runs on one of the eight devices; all programs of the module are compiled fast."""
    c = default()
    c.scored_domains = ("math", "qa", "cw")
    c.stages = ("math", "qa", "cw", "rollback-math-qa")
    c.mesh.data = c.rewards.workers = 1
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.evaluate.batch = 8
    c.domains.n_test = c.domains.n_validation = 8
    c.analyze.update({"prompts": 16, "group_size": 4, "batch": 4, "path_prompts": 4})
    c.recover.update(
        {"prompts": 8, "limit": 50.0, "rules": ("removing", "magnitude"), "random_sets": 1, "control_draws": 2}
    )
    c.recover.fractions, c.recover.strengths = (0.6, 0.95), (1.0,)
    # At the first look three controls have half-widths of at most 22 points, and the others 25 to 40. The tokens
    # suffice for the second look and not for the fourth.
    c.recover.control_half_width, c.recover.control_tokens = 23.5, 30_000
    config = parse(c)
    with pytest.MonkeyPatch.context() as patch, runtime.make_pool(config.rewards) as pool, compiling_fast():
        patch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        yield runtime.build(config, pool)


@pytest.fixture(scope="module")
def points(built: runtime.Runtime) -> dict[str, Any]:
    """Parameters by stage: math is the base model, qa spoils it, cw hardly moves."""
    rng = np.random.default_rng(0)

    def moved(params: Any, size: float) -> Any:
        return jax.tree.map(lambda x: x + size * x.std() * rng.normal(size=x.shape).astype(np.float32), params)

    base = built.base_params()
    qa = moved(base, 0.3)
    return {"base": base, "math": base, "qa": qa, "cw": moved(qa, 0.001)}


@pytest.fixture(scope="module")
def probe(built: runtime.Runtime) -> probes.Probe:
    return probes.build(built, built.config.train.grpo)


@pytest.fixture(scope="module")
def drawn(built: runtime.Runtime, points: dict[str, Any]) -> samples.Sample:
    with jax.set_mesh(built.mesh):
        return samples.draw(built, points["math"], "math")


def test_another_number_draws_other_completions_of_the_same_prompts(built: Any, points: Any):
    with jax.set_mesh(built.mesh):
        first, same, other = (
            evaluate.held_out_rewards(built, points["math"], ("math",), *again)["math"] for again in ((), (0,), (1,))
        )
    np.testing.assert_array_equal(first, same)
    assert first.shape == other.shape and (first != other).any()


@pytest.mark.slow  # on the embedded model what tests/second_order shows on small ones
def test_gradients_and_kappa_agree_with_forward_mode(built: Any, points: Any, probe: Any, drawn: Any):
    """⟨∇L, D⟩ and κDᵀFD are the first and second orders of the jets, of either loss."""
    with jax.set_mesh(built.mesh):
        d = probe.difference(points["qa"], points["math"])
        orders = probe.derivatives(points["math"], d, drawn)
        for objective in ("reward", "success_nll"):
            gradient = evidence.mean_gradient(probe, points["math"], drawn, objective)
            assert float(tree.vdot(gradient, d)) == pytest.approx(orders[objective].first, rel=2e-3, abs=2e-4)
        failed = dataclasses.replace(drawn, rewards_PG=np.zeros_like(drawn.rewards_PG))
        with pytest.raises(ValueError, match="no completion succeeded"):
            evidence.mean_gradient(probe, points["math"], failed, "success_nll")
        ends = Ends(points["qa"], points["math"], d)
        equal = dataclasses.replace(drawn, rewards_PG=np.ones_like(drawn.rewards_PG))
        for sample, objective in ((drawn, "reward"), (equal, "success_nll")):
            scores, record = evidence.scores(probe, "adding", ends, {"peak": sample}.__getitem__)
            assert record["objective"] == objective
            gradient = evidence.mean_gradient(probe, points["math"], sample, objective)
            if record["kappa"] is None:
                assert "first order only" in record["reason"]
                told = Evidence(d, peak_gradient=gradient)
            else:
                f = evidence.fisher_of(probe)(points["math"], [jax.device_put(r) for r in probe.rows(sample)])
                second = probe.derivatives(points["math"], d, sample)[objective].second
                assert record["kappa"] * float(_quadratic(d, f)) == pytest.approx(second, rel=1e-4)
                told = Evidence(d, peak_gradient=gradient, fisher=f, kappa=record["kappa"])
            for a, b in zip(*map(jax.tree.leaves, (scores, SCORES["adding"](told))), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_samples_are_the_analysis_ones_where_it_has_them_and_kept_where_not(
    built: Any, points: Any, drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draws = []
    monkeypatch.setattr(samples, "draw", lambda runtime, params, domain: draws.append(domain) or drawn)
    settings = evidence._settings(built)
    samples.save(tmp_path / "analysis" / "samples" / "math-math.npz", drawn.take(np.arange(3)))

    def kept(name: str) -> samples.Sample:
        return evidence.kept_sample(built, tmp_path, name, "math", points.__getitem__)

    records.write_json(tmp_path / "analysis" / "settings.json", settings | {"stages": []})
    assert kept("math").n_prompts == 3 and not draws
    assert kept("cw").n_prompts == kept("cw").n_prompts == 16 and draws == ["math"]
    records.write_json(tmp_path / "analysis" / "settings.json", settings | {"seed": 7})
    assert kept("math").n_prompts == 16 and len(draws) == 2
    own = tmp_path / "recovery" / "samples"
    records.write_json(own / "settings.json", settings | {"seed": 7})  # drawn with other settings
    assert kept("cw").n_prompts == 16 and len(draws) == 3
    assert sorted(p.name for p in own.iterdir()) == ["cw-math.npz", "settings.json"]


@pytest.mark.slow  # 55 s; test_recovery_stages.py runs a rollback and judges it
def test_a_stage_takes_back_what_its_record_says_and_is_remade_from_it(
    built: Any, points: Any, probe: Any, tmp_path: Path
):
    stages = resolve_stages(built.config, tuple(DOMAINS))
    stage = stages[-1]
    ends = [peak(d, stage.start, stages[:-1]) for d in ("math", "qa")]
    assert stage.start == "cw" and all(ends)
    told = Told()

    def run(params: Any) -> Any:
        with jax.set_mesh(built.mesh):
            return rollback.run(built, stage, *ends, params, probe, tmp_path, told)

    found = run(points.__getitem__)
    record = records.read_json(tmp_path / "recovery" / "rollback-math-qa.json")
    chosen = record["chosen"]
    assert chosen["gain"]["estimate"] > 0 and set(chosen["others"]) == {"cw"}
    # The cost of the rollback leaves out the comparison with controls, which samples on test prompts.
    assert 0 < record["costs"]["tokens_sampled"] < record["costs_with_controls"]["tokens_sampled"]
    parts = ("evidence", "sweep", "choice", "random sets", "controls", "test")
    parts = (*parts, "test of controls", "more completions")
    assert list(told.totals) == [f"rollback-math-qa: {part}" for part in parts]
    assert all(told.counted(f"rollback-math-qa: {part}") for part in ("evidence", "random sets", "test"))
    assert len(told.reports["rollback-math-qa: sweep"]) == len(record["points"])
    assert set(record["evidence"]) == {"removing", "magnitude"} and record["coordinates"] == sum(
        x.size for x in jax.tree.leaves(found)
    )
    assert {p["rule"] for p in record["points"]} == {"removing", "magnitude"}
    assert set(record["test"]["at_equal_loss"]) >= {"random", "matched", "largest", "whole"}
    times = {f["completions"] // built.config.recover.samples for f in record["test"]["at_equal_loss"].values()}
    assert {1} < times <= {1, 2, 4}
    assert record["test"]["prompts"] == 8 and "rollback-math-qa" in rollback.summary(record)
    changed = 0
    for a, now, after, before in zip(
        *map(jax.tree.leaves, (found, *(points[n] for n in ("cw", "qa", "math")))), strict=True
    ):
        moved = np.asarray(a) != np.asarray(now)
        expected = np.asarray(now) - np.float32(chosen["strength"]) * (np.asarray(after) - np.asarray(before))
        np.testing.assert_allclose(np.asarray(a)[moved], expected[moved], rtol=1e-6, atol=1e-7)
        changed += int(moved.sum())
    assert 0.999 * chosen["size"] <= changed <= chosen["size"]
    told.totals.clear()
    again = run(lambda name: points["cw"] if name == "cw" else pytest.fail(f"{name} was read again"))
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert not told.totals
    records.write_json(tmp_path / "recovery" / "rollback-math-qa.json", record | {"chosen": None})
    assert run(points.__getitem__) is points["cw"] and "nothing was taken back" in rollback.summary(
        record | {"chosen": None}
    )
