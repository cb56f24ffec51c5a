"""Distillation losses against sums over all completions of a policy with five tokens and completions of two."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.rl.distill import FORMS, DistillConfig, Targets, make_blank, make_distill_loss, make_teach
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig
from mdrl_jax.rl.policy import PolicyBatch
from mdrl_jax.stages.distill import _lowest

pytestmark = pytest.mark.usefixtures("fast_compile")

V, T = 5, 2
PROMPTS = np.array([[1, 2], [3, 0]])
TEMPERATURE = 0.7
ALL = np.array(list(itertools.product(range(V), repeat=T)))  # all completions [25, T]


@pytest.fixture(scope="module")
def policies(tiny_models) -> tuple[Decoder, Any, tuple[Any, Any]]:
    """A model, parameters of a student, and those of a teacher for each prompt."""
    sizes = {"vocab_size": V, "n_layers": 1, "d_model": 4, "d_mlp": 6, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4}
    model = Decoder(dataclasses.replace(tiny_models["llama"].config, **sizes))
    shapes, rng = nn.unbox(param_shapes(model)), np.random.default_rng(0)
    made = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes) for _ in range(3)]
    return model, made[0], (made[1], made[2])


def rows() -> np.ndarray:
    """Both prompts with all completions, [50, 2 + T]; the rows of a prompt follow each other."""
    return np.concatenate([np.concatenate([np.tile(p, (len(ALL), 1)), ALL], axis=1) for p in PROMPTS])


@functools.partial(jax.jit, static_argnums=0)
def log_policy(model: Decoder, params: Any, tokens_BT: Any) -> jax.Array:
    """log π of every token of the vocabulary at the positions of the completion [B, T, V], from the plain model."""
    logits = model.apply({"params": params}, jnp.asarray(tokens_BT), jnp.ones(tokens_BT.shape, bool))
    return jax.nn.log_softmax(logits[:, 1:-1] / TEMPERATURE, axis=-1)  # pyright: ignore


def chosen(logp_BTV: Any, tokens_BT: Any) -> np.ndarray:
    return np.take_along_axis(np.asarray(logp_BTV), tokens_BT[:, 2:, None], axis=-1)[:, :, 0]


def batch_of(tokens_BT: np.ndarray, sampler_BT: np.ndarray, teacher_B: np.ndarray, n: int = 5) -> PolicyBatch:
    """n micro-batches of rows without padding."""
    ones = np.ones((len(tokens_BT), T), np.float32)
    whole = PolicyBatch(
        tokens_BT.astype(np.int32), np.ones(tokens_BT.shape, bool),
        GRPOBatch(None, sampler_BT.astype(np.float32), None, np.zeros(len(tokens_BT), np.float32), ones),
        teacher_B.astype(np.int32),
    )  # fmt: skip
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(n, -1, *x.shape[1:])), whole)


@functools.cache
def programs(model: Decoder, form: str, top_k: int) -> Any:
    """What the stage has: the blank targets, a teacher's pass, and the gradient of the loss with its metrics."""
    mesh, config = make_mesh(MeshConfig(), jax.devices()[:1]), DistillConfig(form=form, top_k=top_k)
    loss = make_distill_loss(model, GRPOConfig(), config, TEMPERATURE, T, 1)

    def total(params: Any, batch: PolicyBatch, heads: Any) -> Any:
        sums, (_, metrics) = jax.lax.map(lambda micro: loss(params, micro, heads), batch)
        return sums.sum(), metrics

    made = make_blank(model, mesh, config, 1), make_teach(model, mesh, form, TEMPERATURE, 1)
    return *made, jax.jit(jax.grad(total, has_aux=True))


def taught(policies: Any, form: str, batch: PolicyBatch, teachers: Any, top_k: int = 2) -> tuple[PolicyBatch, Any]:
    """The batch with what the teachers say, and the extra argument of the loss."""
    model, student, _ = policies
    blank, teach, _ = programs(model, form, top_k)
    targets = blank(student, batch.tokens_BT, batch.valid_BT, 2)
    for i, params in enumerate(teachers):
        targets = teach(params, dataclasses.replace(batch, targets=targets), np.int32(i), 2)
    heads = tuple(model.apply({"params": p}, method="lm_head") for p in teachers)
    return dataclasses.replace(batch, targets=targets), heads


def gradient(policies: Any, form: str, batch: PolicyBatch, heads: Any, top_k: int = 2) -> tuple[Any, Any]:
    """The gradient of the sum of the loss over all micro-batches, and the metrics as means."""
    found, metrics = programs(policies[0], form, top_k)[2](policies[1], batch, heads)
    return found, {k: float(s.sum() / n.sum()) for k, (s, n) in metrics.items()}


def close(found: Any, expected: Any, atol: float = 2e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol), found, expected)


def divergence(model: Decoder, params: Any, tokens_BT: Any, teacher_BTV: Any) -> jax.Array:
    """KL(π_θ ‖ π_T) at the prefix of each position [B, T]."""
    logp_BTV = log_policy(model, params, tokens_BT)
    return jnp.sum(jnp.exp(logp_BTV) * (logp_BTV - teacher_BTV), axis=-1)


@pytest.fixture(scope="module")
def enumerated(policies) -> Any:
    """(rows, teacher of each, teachers' log policy, student's, probability of each row, expected gradient)."""
    model, student, teachers = policies
    tokens_BT, teacher_B = rows(), np.repeat([0, 1], len(ALL))
    each = [np.asarray(log_policy(model, p, tokens_BT)) for p in teachers]
    teacher_BTV = np.where((teacher_B == 0)[:, None, None], *each)
    logp_BTV = np.asarray(log_policy(model, student, tokens_BT))
    p_B = np.exp(chosen(logp_BTV, tokens_BT).sum(axis=1))
    kl = lambda params: jnp.sum(p_B[:, None] * divergence(model, params, tokens_BT, teacher_BTV))  # noqa: E731
    return tokens_BT, teacher_B, teacher_BTV, logp_BTV, p_B, jax.jit(jax.grad(kl))(student)


def test_the_gradient_of_the_full_form_is_that_of_the_kl_at_the_sampled_prefixes(policies, enumerated):
    model, student, teachers = policies
    tokens_BT, teacher_B, teacher_BTV, logp_BTV, *_ = enumerated
    some = np.random.default_rng(1).integers(0, 50, 50)  # of both teachers, in one micro-batch too
    batch, heads = taught(policies, "full", batch_of(tokens_BT[some], np.zeros((50, T)), teacher_B[some]), teachers)
    found, metrics = gradient(policies, "full", batch, heads)
    kl = lambda params: divergence(model, params, tokens_BT[some], teacher_BTV[some]).sum()  # noqa: E731
    value, expected = jax.jit(jax.value_and_grad(kl))(student)
    close(found, expected)
    assert metrics["kl"] == pytest.approx(float(value) / (50 * T), rel=1e-4)


@pytest.mark.parametrize("form", ["sampled", "top_k"])
def test_the_other_forms_have_this_gradient_in_expectation(policies, enumerated, form):
    """Each row has the importance weight π(y), so that the sum over all rows is the expectation."""
    tokens_BT, teacher_B, teacher_BTV, logp_BTV, p_B, expected = enumerated
    sampler_BT = chosen(logp_BTV, tokens_BT) - np.log(p_B)[:, None]
    batch, heads = taught(policies, form, batch_of(tokens_BT, sampler_BT, teacher_B), policies[2], V)
    found, metrics = gradient(policies, form, batch, heads, V)
    if form == "sampled":
        close(found, expected)
        assert metrics["importance"] == pytest.approx(p_B.mean(), rel=1e-4)
        np.testing.assert_allclose(
            np.asarray(batch.targets.logp_BT).reshape(50, T), chosen(teacher_BTV, tokens_BT), atol=1e-5
        )
    else:  # with the whole vocabulary in K, the sum is the KL itself
        close(found, gradient(policies, "full", *taught(policies, "full", batch, policies[2]))[0])
        assert metrics["kl_left_out"] == 0


def test_what_top_k_leaves_out_is_estimated_without_bias(policies, enumerated):
    tokens_BT, teacher_B, teacher_BTV, logp_BTV, p_B, _ = enumerated
    batch, _ = taught(policies, "top_k", batch_of(tokens_BT, np.zeros((50, T)), teacher_B), policies[2])
    ids_BTK = np.asarray(batch.targets.ids_BTK).reshape(50, T, 2)
    np.testing.assert_array_equal(np.sort(ids_BTK), np.sort(np.argsort(-logp_BTV)[:, :, :2]))
    student, teacher = (np.take_along_axis(x, ids_BTK, axis=-1) for x in (logp_BTV, teacher_BTV))
    np.testing.assert_allclose(np.asarray(batch.targets.logp_BTK).reshape(50, T, 2), teacher, atol=1e-5)
    terms = np.exp(student) * (student - teacher) - np.exp(student) + np.exp(teacher)
    whole = np.sum(np.exp(logp_BTV) * (logp_BTV - teacher_BTV), axis=-1)
    assert (terms >= -1e-6).all() and (terms.sum(axis=-1) < whole).all()
    # The rows are all completions, once each: counted by their probabilities they are the expectation.
    d_BT = chosen(teacher_BTV, tokens_BT) - chosen(logp_BTV, tokens_BT)
    outside_BT = ~np.any(ids_BTK == tokens_BT[:, 2:, None], axis=-1)
    estimate = np.sum(p_B[:, None] * outside_BT * (np.expm1(d_BT) - d_BT))
    assert estimate == pytest.approx(np.sum(p_B[:, None] * (whole - terms.sum(axis=-1))), rel=1e-4)
    _, metrics = gradient(policies, "top_k", batch, ())
    assert metrics["kl"] == pytest.approx(terms.sum(axis=-1).mean(), rel=1e-4)
    assert metrics["kl_left_out"] == pytest.approx(np.mean(outside_BT * (np.expm1(d_BT) - d_BT)), rel=1e-4)


@pytest.mark.parametrize("form", ["sampled", "top_k", "full"])
def test_a_student_that_is_its_teacher_stays(policies, enumerated, form):
    tokens_BT, teacher_B, _, logp_BTV, *_ = enumerated
    batch = batch_of(tokens_BT, chosen(logp_BTV, tokens_BT), teacher_B)
    found, metrics = gradient(policies, form, *taught(policies, form, batch, (policies[1], policies[1])))
    close(found, jax.tree.map(jnp.zeros_like, found), 2e-4)
    assert abs(metrics["kl"]) < 1e-6


def test_only_the_right_teacher_wins_the_reward_back(policies):
    """The reward is 1 for the completions that are likelier under the first prompt's teacher than under the other."""
    model, student, teachers = policies
    tokens_BT = rows()[: len(ALL)]
    each = [chosen(log_policy(model, p, tokens_BT), tokens_BT) for p in teachers]
    rewarded_B = each[0].sum(axis=1) > each[1].sum(axis=1)
    loss = make_distill_loss(model, GRPOConfig(), DistillConfig(), TEMPERATURE, T, 0)

    def step(params: Any, teacher_BT: Any) -> tuple[Any, Any]:
        logp_BTV = log_policy(model, params, tokens_BT)
        logp_BT = jnp.take_along_axis(logp_BTV, jnp.asarray(tokens_BT)[:, 2:, None], axis=-1)[:, :, 0]
        total_B1 = logp_BT.sum(axis=1, keepdims=True)  # weights of π(y) again, so that the step is the expected one
        ones_BT = jnp.ones(tokens_BT.shape, bool)
        grpo = GRPOBatch(None, logp_BT - total_B1, None, jnp.zeros(len(ALL)), jnp.ones(logp_BT.shape))
        batch = PolicyBatch(jnp.asarray(tokens_BT), ones_BT, grpo, None, Targets(teacher_BT))
        grads = jax.grad(lambda x: loss(x, batch)[0])(params)
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, grads), jnp.exp(total_B1[:, 0]) @ rewarded_B

    walk = jax.jit(lambda teacher_BT: jax.lax.scan(lambda p, _: step(p, teacher_BT), student, None, 200)[1])
    start, right, wrong = float(walk(each[0])[0]), float(walk(each[0])[-1]), float(walk(each[1])[-1])
    peak = float(np.exp(each[0].sum(axis=1))[rewarded_B].sum())
    assert peak - start > 0.2 and right - start > 0.7 * (peak - start) and wrong < start, (start, right, wrong, peak)


def test_the_control_without_a_teacher_pushes_the_least_likely_tokens():
    rng = np.random.default_rng(0)
    logp, mask = rng.normal(size=(2, 5, 4)), (rng.random((2, 5, 4)) < 0.7).astype(np.float32)
    batch = dataclasses.replace(
        batch_of(np.ones((10, 2 + T), int), np.zeros((10, T)), np.zeros(10)),
        grpo=GRPOBatch(None, jnp.asarray(logp, jnp.float32), None, jnp.zeros((2, 5)), jnp.asarray(mask)),
    )
    found = np.asarray(_lowest(0.2, -0.5, make_mesh(MeshConfig(), jax.devices()[:1]))(batch).grpo.adv_B)
    real = np.sort(logp[mask > 0])
    lowest = (logp <= np.quantile(real, 0.2)) & (mask > 0)
    np.testing.assert_array_equal(found, np.where(lowest, np.float32(-0.5), np.float32(0)))
    assert abs(lowest.sum() / mask.sum() - 0.2) < 1 / mask.sum()


def test_values_that_are_not_allowed_are_refused():
    for wrong, told in (
        ({"form": "ful"}, "sampled, top_k, full, fixed"),
        ({"top_k": 0}, "top_k"),
        ({"lowest": 0.0}, "lowest"),
    ):
        with pytest.raises(ValueError, match=told):
            DistillConfig(**wrong)
    assert {DistillConfig(form=form).form for form in FORMS} == set(FORMS)
