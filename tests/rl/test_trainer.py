"""Tests of the training step: against hand-written optax, with micro-batches, on meshes, and with several updates per
batch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mdrl_jax import config as config_module
from mdrl_jax import runtime as runtime_module
from mdrl_jax.errors import UserError
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named, param_shardings, put
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig
from mdrl_jax.rl.policy import PolicyBatch, make_cases, make_grpo_loss
from mdrl_jax.rl.sft import SFTBatch, make_sft_loss
from mdrl_jax.rl.trainer import (
    OptimizerConfig,
    TrainState,
    Transforms,
    init_state,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages import grpo
from tests.odd_pool import OddPool

B, PROMPT, COMPLETION, VOCAB = 8, 4, 6, 96
# The rows of the first half are longer, so the micro-batches' numbers of tokens differ.
LENGTHS = np.array([6, 6, 5, 6, 1, 0, 2, 1])
# With a large eps, Adam's update is nearly linear in the gradient. With a small one it would compare little but signs.
NEAR_LINEAR = OptimizerConfig(eps=1.0, clip_norm=0.05, weight_decay=0.01)
LOSSES = ("sft", "token", "sequence", "constant")


def draw(seed: int = 0) -> PolicyBatch:
    """Rows of unequal lengths, with random advantages, and log-probs near those of the policy."""
    rng = np.random.default_rng(seed)
    f32: Any = np.float32
    mask_BT: Any = (np.arange(COMPLETION) < LENGTHS[:, None]).astype(f32)
    prompt_BT = np.arange(PROMPT) >= rng.integers(0, PROMPT, B)[:, None]
    logp_BT = rng.normal(-4.5, 0.3, (3, B, COMPLETION)).astype(f32)
    return PolicyBatch(
        tokens_BT=rng.integers(1, VOCAB, (B, PROMPT + COMPLETION)).astype(np.int32),
        valid_BT=np.concatenate([prompt_BT, mask_BT > 0], axis=1),
        grpo=GRPOBatch(
            old_logp_BT=logp_BT[0],
            sampler_logp_BT=logp_BT[1],
            ref_logp_BT=logp_BT[2],
            adv_B=jnp.asarray(rng.normal(size=B), jnp.float32),
            mask_BT=mask_BT,
        ),
    )


class Bigram:
    """The smallest policy: a table with the next token's logits for each token.

    It has the methods of a decoder that the losses use, and it compiles fast.
    """

    def apply(self, variables: Any, *arrays: jax.Array, method: str) -> jax.Array | None:
        if method == "packed_hidden":
            return variables["params"]["table"][arrays[0]]
        return arrays[0] if method == "logits" else None

    @staticmethod
    def params() -> dict[str, jax.Array]:
        return {"table": 0.3 * jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))}


def setting(model: Any, loss: str) -> tuple[Any, Any]:
    """The loss function and a batch of rows, for "sft" or for GRPO with this aggregation."""
    batch = draw()
    if loss == "sft":
        mask_BT = np.concatenate([np.zeros((B, PROMPT), np.float32), batch.grpo.mask_BT], axis=1)
        return make_sft_loss(model), SFTBatch(batch.tokens_BT, batch.valid_BT, mask_BT)
    config = GRPOConfig(aggregation=loss, kl_coef=0.1)
    return make_grpo_loss(model, config, 1.0, COMPLETION, 0), batch


def make(
    loss_fn: Any,
    config: OptimizerConfig,
    params: Any,
    placed: Any,
    mesh: Mesh,
    cases: Any = None,
    split: bool = False,
) -> tuple[TrainState, Callable]:
    """The state before the first step, with these parameters, and the jitted step."""
    optimizer = make_optimizer(config)
    shardings = state_shardings(optimizer, jax.eval_shape(lambda: params), placed, mesh)
    state = init_state(optimizer, jax.device_put(params, placed), shardings)
    return state, make_train_step("test_step", loss_fn, optimizer, shardings, mesh, cases, split=split)


def make_bigram(loss_fn: Any, config: OptimizerConfig) -> tuple[TrainState, Callable]:
    """`make` for the bigram policy on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return make(loss_fn, config, Bigram.params(), {"table": named(mesh)}, mesh)


def step_of_decoder(tiny: Any, loss: str, n: int, mesh: Mesh) -> tuple[TrainState, Any]:
    """The state and metrics of a transformer on a mesh after one step with `n` micro-batches."""
    loss_fn, batch = setting(tiny.model, loss)
    placed = param_shardings(mesh, param_shapes(tiny.model))
    with jax.set_mesh(mesh):
        state, step = make(loss_fn, NEAR_LINEAR, tiny.params, placed, mesh)
        return step(state, put(micro_batches(batch, n), mesh, None, "batch"), jnp.float32(1.0), {})


def assert_close(a: Any, b: Any, atol: float) -> None:
    """Checks that two trees are equal up to an absolute tolerance."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol), a, b)


def largest_move(params: Any, start: Any) -> float:
    """The largest absolute change of any parameter."""
    moves = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)))), params, start)
    return max(jax.tree.leaves(moves))


def whole_batch(loss: str) -> Callable[[Any], jax.Array]:
    """The bigram policy's mean loss on the whole batch, without micro-batches, as a function of parameters."""
    loss_fn, batch = setting(Bigram(), loss)

    def total(params: Any) -> jax.Array:
        loss_sum, (count, _) = loss_fn(params, jax.tree.map(jnp.asarray, batch))
        return loss_sum / count

    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_are_exact_and_the_update_is_hand_written_optax(loss: str):
    """The update is that of the whole batch, although micro-batches have unequal numbers of tokens.

    A mean of the micro-batches' means would be wrong (https://github.com/huggingface/trl/issues/5619).
    """
    start, c = Bigram.params(), NEAR_LINEAR
    value, grads = jax.jit(jax.value_and_grad(whole_batch(loss)))(start)
    oracle = optax.chain(
        optax.clip_by_global_norm(c.clip_norm), optax.adamw(1.0, c.b1, c.b2, c.eps, weight_decay=c.weight_decay)
    )
    updates, _ = oracle.update(grads, oracle.init(start), start)
    wanted = optax.apply_updates(start, updates)
    assert largest_move(wanted, start) > 1e-3
    assert float(optax.global_norm(grads)) > 2 * c.clip_norm
    for n in (1, 2, 4):
        loss_fn, batch = setting(Bigram(), loss)
        state, step = make_bigram(loss_fn, NEAR_LINEAR)
        state, logged = step(state, micro_batches(batch, n), jnp.float32(1.0), {})
        assert_close(state.params, wanted, 1e-6)
        assert float(logged["loss"]) == pytest.approx(float(value), abs=1e-6)
        assert float(logged["grad_norm"]) == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)


def test_shardings_of_a_state_are_made_without_a_device():
    """`fit` asks for them while the mesh has devices that cannot run anything."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shapes, optimizer = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, make_optimizer(OptimizerConfig())
    with jax.transfer_guard("disallow"):
        shardings = state_shardings(optimizer, shapes, {"w": named(mesh)}, mesh)
    assert jax.tree.structure(shardings.opt_state) == jax.tree.structure(jax.eval_shape(optimizer.init, shapes))


def test_micro_batches_that_are_not_needed_are_not_computed():
    """The update is the same, and the loss runs for those with a trained token alone."""
    loss_fn, batch = setting(Bigram(), "token")
    half = batch.grpo.mask_BT.shape[0] // 2
    mask_BT = np.array(batch.grpo.mask_BT)
    mask_BT[half:] = 0
    batch = dataclasses.replace(batch, grpo=dataclasses.replace(batch.grpo, mask_BT=mask_BT))
    runs: list[int] = []

    def counted(params: Any, micro: Any) -> Any:
        jax.debug.callback(lambda: runs.append(1))
        return loss_fn(params, micro)

    found = []
    for cases, expected in ((None, 4), (make_cases(), 2)):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        state, step = make(counted, NEAR_LINEAR, Bigram.params(), {"table": named(mesh)}, mesh, cases)
        runs.clear()
        state, logged = step(state, micro_batches(batch, 4), jnp.float32(1.0), {})
        found.append(jax.device_get((state.params, logged)))
        jax.effects_barrier()
        assert len(runs) == expected
    assert_close(*found, 1e-7)
    assert largest_move(found[1][0], Bigram.params()) > 1e-3


def test_micro_batches_are_cut_to_the_real_tokens_of_their_trained_rows():
    """The update is the same, and each micro-batch is computed at the smallest lengths that hold its trained rows."""
    loss_fn, batch = setting(Bigram(), "token")
    rows = batch.tokens_BT.shape[0] // 4
    mask_BT, valid_BT = (np.array(x) for x in (batch.grpo.mask_BT, batch.valid_BT))
    for micro, (prompt, completion) in enumerate(((2, 1), (3, 2), (1, 3), (4, 6))):
        own = slice(micro * rows, (micro + 1) * rows)
        valid_BT[own, : PROMPT - prompt] = False
        valid_BT[own, PROMPT - prompt :] = np.arange(prompt + COMPLETION) < prompt + completion
        mask_BT[own] = np.arange(COMPLETION) < completion
    valid_BT[0] = True  # a long row without a trained token does not keep its micro-batch long
    mask_BT[0] = 0
    batch = dataclasses.replace(batch, valid_BT=valid_BT, grpo=dataclasses.replace(batch.grpo, mask_BT=mask_BT))
    assert rows > 1
    shapes: list[tuple[int, int]] = []

    def counted(params: Any, micro: Any) -> Any:
        completion = micro.grpo.mask_BT.shape[1]
        shape = micro.tokens_BT.shape[1] - completion, completion
        assert micro.valid_BT.shape == micro.tokens_BT.shape and micro.grpo.adv_B.shape == (rows,)
        jax.debug.callback(lambda: shapes.append(shape))
        return loss_fn(params, micro)

    found = []
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for cases in (None, make_cases((2, 9), (2, 9))):
        state, step = make(counted, NEAR_LINEAR, Bigram.params(), {"table": named(mesh)}, mesh, cases)
        shapes.clear()
        state, logged = step(state, micro_batches(batch, 4), jnp.float32(1.0), {})
        found.append(jax.device_get((state.params, logged)))
        jax.effects_barrier()
    assert sorted(shapes) == [(2, 2), (2, 6), (4, 2), (4, 6)]
    assert_close(*found, 1e-7)
    assert largest_move(found[1][0], Bigram.params()) > 1e-3


def test_a_step_in_parts_is_the_same_and_is_dropped_with_its_state_untouched(monkeypatch: pytest.MonkeyPatch):
    loss_fn, batch = setting(Bigram(), "token")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found, steps = [], []
    for split in (False, True):
        state, step = make(loss_fn, NEAR_LINEAR, Bigram.params(), {"table": named(mesh)}, mesh, None, split)
        steps.append(step)
        found.append(jax.device_get(step(state, micro_batches(batch, 4), jnp.float32(1.0), {})))
    assert_close(*found, 1e-7)
    assert largest_move(found[1][0].params, Bigram.params()) > 1e-3

    waits: list[int] = []

    def drop(tree: Any) -> None:
        waits.append(1)
        if len(waits) == 3:
            raise preemption.Dropped

    monkeypatch.setattr(preemption, "until_ready", drop)
    state, _ = make(loss_fn, NEAR_LINEAR, Bigram.params(), {"table": named(mesh)}, mesh)
    with pytest.raises(preemption.Dropped):
        steps[1](state, micro_batches(batch, 4), jnp.float32(1.0), {})
    assert largest_move(state.params, Bigram.params()) == 0 and int(state.step) == 0
    waits.clear()
    monkeypatch.undo()
    after, _ = steps[1](state, micro_batches(batch, 4), jnp.float32(1.0), {})
    assert np.array_equal(after.params["table"], found[1][0].params["table"])


@pytest.mark.parametrize("loss", ["sft", "token"])
def test_a_mean_of_micro_batch_means_would_be_another_update(loss: str):
    """The test above can tell the two, because its micro-batches have unequal numbers of tokens."""
    loss_fn, batch = setting(Bigram(), loss)
    total, (count, _) = jax.jit(jax.vmap(loss_fn, (None, 0)))(Bigram.params(), micro_batches(batch, 2))
    right, wrong = float(total.sum() / count.sum()), float(jnp.mean(total / count))
    assert abs(right - wrong) > 1e-3


def test_several_steps_are_hand_written_adamw():
    loss_fn, batch = setting(Bigram(), "sft")
    rates = [0.01, 0.03, 0.02]
    config = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-2, weight_decay=0.1, clip_norm=0.0)
    state, step = make_bigram(loss_fn, config)
    for rate in rates:
        state, _ = step(state, micro_batches(batch, 2), jnp.float32(rate), {})
    assert int(state.step) == len(rates)
    gradient = jax.jit(jax.grad(whole_batch("sft")))
    p = Bigram.params()["table"]
    m = v = jnp.zeros_like(p)
    for t, rate in enumerate(rates, 1):
        g = gradient({"table": p})["table"]
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        adam = m / (1 - 0.8**t) / (jnp.sqrt(v / (1 - 0.9**t)) + 1e-2)
        p = p - rate * (adam + 0.1 * p)
    assert_close(state.params["table"], p, 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_learning_rate_zero_changes_no_bit(decay: float):
    loss_fn, batch = setting(Bigram(), "token")
    state, step = make_bigram(loss_fn, OptimizerConfig(weight_decay=decay))
    for _ in range(2):
        state, logged = step(state, micro_batches(batch, 2), jnp.float32(0.0), {})
    assert logged["grad_norm"] > 0
    assert np.asarray(state.params["table"]).tobytes() == np.asarray(Bigram.params()["table"]).tobytes()


def test_the_old_state_is_really_freed():
    loss_fn, batch = setting(Bigram(), "sft")
    start = Bigram.params()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, step = make(loss_fn, OptimizerConfig(), start, {"table": named(mesh)}, mesh)
    new, _ = step(state, micro_batches(batch, 1), jnp.float32(0.1), {})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, start)))


@pytest.mark.parametrize(
    ("loss", "sizes", "n"),
    [
        ("token", (2, 2, 2), 2),
        pytest.param("token", (8, 1, 1), 1, marks=pytest.mark.slow),  # the case above has data parallelism, too
        pytest.param("sft", (2, 2, 2), 2, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_do_what_one_does(
    tiny_models: dict[str, Any], fast_compile: None, loss: str, sizes: tuple[int, int, int], n: int
):
    """With all three kinds of parallelism at once and two micro-batches, and with data parallelism alone."""
    llama = tiny_models["llama"]
    one, logged_one = step_of_decoder(llama, loss, 1, llama.mesh)
    assert largest_move(one.params, llama.params) > 1e-4
    eight, logged = step_of_decoder(llama, loss, n, make_mesh(MeshConfig(*sizes)))
    assert_close(eight.params, one.params, 2e-6)
    assert {k: float(v) for k, v in logged.items()} == pytest.approx(
        {k: float(v) for k, v in logged_one.items()}, rel=1e-4, abs=1e-6
    )


def test_moments_lie_where_their_parameters_lie(mesh8: Mesh):
    loss_fn, batch = setting(Bigram(), "sft")
    wanted = named(mesh8, "vocab", "embed")
    with jax.set_mesh(mesh8):
        state, step = make(loss_fn, OptimizerConfig(), Bigram.params(), {"table": wanted}, mesh8)
        after, _ = step(state, put(micro_batches(batch, 1), mesh8, None, "batch"), jnp.float32(0.1), {})
    assert not wanted.is_fully_replicated
    adam = next(part for part in after.opt_state if isinstance(part, optax.ScaleByAdamState))
    moments: Any = (after.params, adam.mu, adam.nu)
    for tree in moments:
        assert tree["table"].sharding.is_equivalent_to(wanted, 2)
    count: Any = adam.count
    assert count.sharding.is_fully_replicated and after.step.sharding.is_fully_replicated


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="8 rows cannot be divided into 3"):
        micro_batches({"x": np.zeros((8, 2))}, 3)


# --- the loop of steps in stages/grpo.py ------------------------------------------------------------------------------


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> Runtime:
    """A runtime for the single stage `qa`, on one device; `train` changes fields of its section."""
    monkeypatch.setattr(runtime_module, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    fields = {
        "stages": ("qa",),
        "scored_domains": ("qa",),
        "model": {"path": str(folder), "weights": "random"},
        "rollout": {"prompt_buckets": (4,), "completion_buckets": (4,)},
        "train": {"prompts_per_step": 4, "group_size": 4, "steps": 2, "learning_rate": 0.05, "grad_accum_steps": 2}
        | train,
    }
    pool: Any = OddPool()
    return runtime_module.build(config_module.parse(fields), pool)


def walk(made: Runtime, watch: Callable[[TrainState, Any], None] | None = None) -> list[dict[str, float]]:
    """Metrics of the stage's steps. `watch` is called with the state and the batch before every update."""
    stage = resolve_stages(made.config, ("qa",))[0]
    with jax.set_mesh(made.mesh):
        programs = grpo.make_programs(made, stage, Transforms())
        if watch is not None:
            inner = programs.step

            def watched(state: TrainState, batch: Any, rate: jax.Array, extra: Any) -> Any:
                watch(state, batch)
                return inner(state, batch, rate, extra)

            programs = dataclasses.replace(programs, step=watched)
        start = made.base_params()
        state = init_state(programs.optimizer, start, programs.shardings)
        reference = start if grpo.needs_reference(stage) else None
        steps = grpo.grpo_steps(made, stage, programs, state, reference, 0, lambda step, params: {})
        return [metrics for _, _, metrics in steps]


def test_later_updates_per_batch_compare_with_the_policy_that_sampled(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, fast_compile: None
):
    made = built(small_folder, monkeypatch, grpo={"updates_per_batch": 2})
    stage = resolve_stages(made.config, ("qa",))[0]
    log_probs = grpo.make_programs(made, stage, Transforms()).log_probs
    gaps = []

    def watch(state: TrainState, batch: PolicyBatch) -> None:
        now = log_probs(state.params, batch.tokens_BT, batch.valid_BT, 4)
        old: Any = batch.grpo.old_logp_BT
        gap = jnp.abs(jnp.exp(now - old) - 1) * batch.grpo.mask_BT
        gaps.append(float(gap.max()))

    assert len(walk(made, watch)) == 2
    assert len(gaps) == 4
    assert max(gaps[0::2]) < 1e-5  # first updates: π_old is the policy itself
    assert min(gaps[1::2]) > 1e-2


@pytest.mark.parametrize("train, computes", [({}, False), ({"kl_every": 2}, True)])
def test_a_reference_is_computed_only_where_something_needs_it(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, fast_compile: None, train: dict[str, Any], computes: bool
):
    before = compilations.copy()
    metrics = walk(built(small_folder, monkeypatch, **train))
    compiled = compilations - before
    assert (compiled["log_probs"] > 0) == computes
    assert compiled["grpo_step"] == 1
    assert ("kl" in metrics[0]) == computes
    if computes:
        assert abs(metrics[0]["kl"]) < 1e-5  # the policy is still the reference


def test_a_stage_that_the_mesh_does_not_divide_is_refused(small_folder: Path):
    fields = {"stages": ("qa",), "model": {"path": str(small_folder)}, "evaluate": {"batch": 8}}
    pool: Any = OddPool()
    made = runtime_module.build(config_module.parse(fields | {"train": {"prompts_per_step": 4, "group_size": 4}}), pool)
    with pytest.raises(UserError, match=r"stage qa: prompts_per_step = 4 .* data \* fsdp = 8"):
        grpo.check_divides(made, resolve_stages(made.config, ("qa", "math", "code", "cw"))[0])
