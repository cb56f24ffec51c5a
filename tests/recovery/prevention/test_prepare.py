"""What a stage is given to keep earlier domains: whose samples, at which parameters, and what a step does with it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax import runtime, tree
from mdrl_jax.analysis import probe, samples
from mdrl_jax.config import Config, default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.recovery.prevention import prepare as prevention
from mdrl_jax.recovery.prevention.prepare import check, prepare, transforms
from mdrl_jax.rl.trainer import Transforms, init_state
from mdrl_jax.second_order import subspace
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stages import grpo

DOMAINS = ("code", "math", "qa")
ALL = {"protect": 1.0, "ewc": 0.5, "gradients": "agem", "vectors": 3}


@pytest.fixture(scope="module", autouse=True)
def one_quick_device() -> Iterator[None]:
    """Runs on one of the eight devices, and compiles every program of the module alike, to slower code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def configured(prevent: dict[str, Any], **analyze: Any) -> Config:
    """Three stages, of which the last prevents."""
    c = default()
    c.stages, c.scored_domains = DOMAINS, DOMAINS
    c.stage_overrides = {"qa": {"prevent": prevent}}
    c.train.update({"steps": 2, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-3})
    c.mesh.data = 1
    c.rewards.workers = 1
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.evaluate.batch = 8
    c.domains.n_train, c.domains.n_test, c.domains.n_validation = 64, 4, 4
    c.analyze.update({"prompts": 16, "batch": 4, "group_size": 2, "path_prompts": 4} | analyze)
    return parse(c)


def stages_of(prevent: dict[str, Any], **analyze: Any) -> tuple[Stage, ...]:
    return resolve_stages(configured(prevent, **analyze), DOMAINS)


@pytest.fixture(scope="module")
def built() -> Iterator[runtime.Runtime]:
    config = configured(ALL)
    with runtime.make_pool(config.rewards) as pool:
        made = runtime.build(config, pool)
        with jax.set_mesh(made.mesh):
            yield made


@pytest.fixture(scope="module")
def tools(built: runtime.Runtime) -> probe.Probe:
    return probe.build(built, built.config.train.grpo)


@pytest.fixture(scope="module")
def ends(built: runtime.Runtime) -> dict[str, Any]:
    """Parameters by stage."""
    base, rng = built.base_params(), np.random.default_rng(0)
    move = lambda x: x + 0.02 * x.std() * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return {"code": base, "math": jax.tree.map(move, base)}


@pytest.fixture(scope="module")
def prepared(tools: probe.Probe, ends: dict[str, Any]) -> tuple[Any, list[str]]:
    """What the last stage of `ALL` is given, and whose parameters were asked for."""
    asked = []
    stages = stages_of(ALL)

    def params(name: str) -> Any:
        asked.append(name)
        return ends[name]

    return prepare(tools, stages[-1], stages, params), asked


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_stage_that_asks_for_nothing_is_given_nothing():
    nobody: Any = None
    for prevent in ({}, {"replay": 0.5}):
        stages = stages_of(prevent)
        made = prepare(nobody, stages[-1], stages, nobody)
        assert made.transforms == Transforms() and made.extra(0, nobody) == {}
        check(nobody, stages[-1])


def test_transforms_are_those_of_the_section():
    for prevent, counts in (
        ({"ewc": 1.0}, (1, 0)),
        ({"gradients": "agem"}, (1, 0)),
        ({"gradients": "pcgrad"}, (1, 0)),
        ({"protect": 0.5}, (1, 1)),
        (ALL, (3, 1)),
    ):
        made = transforms(stages_of(prevent)[-1].train.prevent)
        assert (len(made.gradient), len(made.update)) == counts


def test_each_kept_domain_speaks_from_its_own_peak(prepared: Any, ends: dict[str, Any]):
    made, asked = prepared
    assert asked == ["code", "math"]
    given = made.extra(0, ends["math"])
    assert set(given) == {"anchors", "references", "protected"}
    for (fisher, peak), name in zip(given["anchors"], asked, strict=True):
        same(peak, ends[name])
        assert all(x.min() >= 0 for x in jax.tree.leaves(fisher)) and tree.norm(fisher) > 0
    assert len(given["references"]) == 2
    assert subspace.size(given["protected"]) == 2 * 3
    sizes = np.sqrt(sum(np.square(x).sum(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(given["protected"])))
    np.testing.assert_allclose(sizes, 1, atol=1e-4)


def test_a_resumed_stage_is_given_the_same(prepared: Any, tools: probe.Probe, ends: dict[str, Any]):
    stages = stages_of(ALL)
    before = dict(compilations)
    again = prepare(tools, stages[-1], stages, ends.__getitem__)
    same(again.extra(3, ends["math"]), prepared[0].extra(3, ends["math"]))
    assert dict(compilations) == before


def test_references_are_gradients_of_rewarded_log_probabilities_at_the_step(
    prepared: Any, tools: probe.Probe, ends: dict[str, Any]
):
    made, _ = prepared
    now = jax.tree.map(lambda x: 1.01 * x, ends["math"])
    sample = samples.draw(tools.runtime, ends["code"], "code").padded(16)
    assert sample.rewards_PG.any()
    micro = sample.take(np.arange(4, 8))  # the second of four micro-batches
    (rows,) = micro.rows(4)

    def loss(params: Any) -> jax.Array:
        log_BT = tools.row_log_probs(params, rows)
        return -jnp.mean(jnp.sum(log_BT, axis=1) * micro.rewards_PG.reshape(-1))

    expected = jax.grad(loss)(now)
    for step in (1, 5):
        found = made.extra(step, now)["references"][0]
        assert tree.norm(tree.sub(found, expected)) < 1e-3 * tree.norm(expected)
    other = made.extra(2, now)["references"][0]
    assert tree.norm(tree.sub(other, expected)) > 0.1 * tree.norm(expected)


def test_protected_are_gradients_of_rewarded_completions_at_the_step_in_turn(
    prepared: Any, tools: probe.Probe, ends: dict[str, Any]
):
    made, _ = prepared
    now = jax.tree.map(lambda x: 1.01 * x, ends["math"])
    sample = samples.draw(tools.runtime, ends["code"], "code").padded(16)
    order = [(p, g) for g in range(2) for p in range(16) if sample.rewards_PG[p, g] > 0]
    assert len(order) > 6
    (rows,) = sample.rows(16)

    def logp(params: Any, p: int, g: int) -> jax.Array:
        row = jax.tree.map(lambda x: x[2 * p + g : 2 * p + g + 1], rows)
        return jnp.sum(tools.row_log_probs(params, row))

    for step in (0, 1):
        protected = made.extra(step, now)["protected"]
        for i in range(6):
            expected = jax.grad(logp)(now, *order[i])
            outside = float(tree.norm(tree.sub(expected, subspace.project(protected, expected))))
            assert (outside < 2e-3 * float(tree.norm(expected))) == (i // 3 == step)


def test_completions_go_round_and_none_is_taken_twice_in_a_step(tools: probe.Probe, ends: dict[str, Any]):
    sample = samples.draw(tools.runtime, ends["code"], "code")
    rewards = np.zeros_like(sample.rewards_PG)
    rewards[[3, 5, 3], [0, 1, 1]] = 1, 0.5, 1
    rows = prevention.in_turn(dataclasses.replace(sample, rewards_PG=rewards))
    (whole,) = sample.rows(16)
    np.testing.assert_array_equal(rows.tokens_BT, whole.tokens_BT[[6, 7, 11]])
    second = prevention._next(rows, 1, 2)
    np.testing.assert_array_equal(second.tokens_BT, whole.tokens_BT[[11, 6]])
    assert second.weight_B.tolist() == [1, 1]
    more = prevention._next(rows, 1, 5)
    np.testing.assert_array_equal(more.tokens_BT[:3], rows.tokens_BT)
    assert more.weight_B.tolist() == [1, 1, 1, 0, 0]


def test_a_step_of_the_loop_leaves_the_protected_subspace_alone(built: Any, prepared: Any, ends: dict[str, Any]):
    made, _ = prepared
    stage = stages_of(ALL)[-1]
    programs = grpo.make_programs(built, stage, made.transforms)
    state = init_state(programs.optimizer, ends["math"], programs.shardings)
    steps = grpo.grpo_steps(built, stage, programs, state, None, 0, made.extra)
    for number, before in enumerate([ends["math"], None]):
        before = jax.tree.map(jnp.copy, state.params) if before is None else before
        _, state, metrics = next(steps)
        assert np.isfinite(metrics["loss"])
        moved = tree.sub(state.params, before)
        inside = subspace.project(made.extra(number, before)["protected"], moved)
        assert float(tree.norm(moved)) > 0.1
        assert float(tree.norm(inside)) < 1e-3 * float(tree.norm(moved))


def test_a_domain_without_any_reward_is_refused(
    tools: probe.Probe, ends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def nothing(built: Any, params: Any, domain: str) -> samples.Sample:
        found = drawn(built, params, domain)
        return dataclasses.replace(found, rewards_PG=-np.abs(found.rewards_PG))

    drawn = samples.draw
    monkeypatch.setattr(prevention.samples, "draw", nothing)
    stages = stages_of({"protect": 1.0})
    with pytest.raises(UserError, match="stage qa cannot keep code: none of its completions at its peak has a reward"):
        prepare(tools, stages[-1], stages, ends.__getitem__)


@pytest.mark.parametrize(
    ("analyze", "message"),
    [
        ({"prompts": 80}, "analyze.prompts=80, but code has 64 train prompts"),
    ],
)
def test_what_cannot_be_sampled_is_refused(built: runtime.Runtime, analyze: dict[str, Any], message: str):
    config = configured(ALL, **analyze)
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(built, config=config), resolve_stages(config, DOMAINS)[-1])


def test_batches_that_the_mesh_does_not_divide_are_refused(built: runtime.Runtime, mesh8: Any):
    odd = configured(ALL, batch=2, prompts=16, group_size=3)
    stage = resolve_stages(odd, DOMAINS)[-1]
    with pytest.raises(
        UserError, match=r"stage qa: analyze.batch \* group_size = 6 is not divisible by the mesh's .* = 4"
    ):
        check(dataclasses.replace(built, config=odd, mesh=mesh8), stage)
