"""The distribution that tokens are drawn from against its definition in float64, and draws against its inverse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.sharding import named
from mdrl_jax.rl import sampling as under_test
from mdrl_jax.rl.sampling import SamplingConfig, draw, sampling_log_probs

pytestmark = pytest.mark.usefixtures("fast_compile")

PLAIN = SamplingConfig()
MIXES = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.6),
    SamplingConfig(top_k=5),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=1000),
    SamplingConfig(top_p=0.6),
    SamplingConfig(top_p=1e-6),
    SamplingConfig(temperature=0.7, top_k=9, top_p=0.8),
    SamplingConfig(temperature=2.0, top_k=4, top_p=0.5),
]


def oracle(logits_V, sampling):
    """Log-probs of the sampling distribution, from its definition in float64; -inf for excluded tokens."""
    if sampling.temperature == 0:
        return np.where(np.arange(len(logits_V)) == np.argmax(logits_V), 0.0, -np.inf)
    scaled_V = np.asarray(logits_V, np.float64) / sampling.temperature
    order = np.argsort(-scaled_V)
    kept = order[: sampling.top_k or None]
    p = np.exp(scaled_V[kept] - scaled_V[kept].max())
    p /= p.sum()
    n, mass = 0, 0.0
    while n < len(kept) and (n == 0 or (mass < sampling.top_p)):
        mass, n = mass + p[n], n + 1
    logp_V = np.full(len(logits_V), -np.inf)
    logp_V[kept[:n]] = np.log(p[:n] / p[:n].sum())
    return logp_V


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.0), PLAIN, *MIXES], ids=str)
def test_sampling_log_probs_equal_the_oracle(sampling):
    logits_BV = 3 * np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    ours_BV = np.asarray(sampling_log_probs(jnp.asarray(logits_BV), sampling))
    theirs_BV = np.stack([oracle(row, sampling) for row in logits_BV])
    inside = np.isfinite(theirs_BV)
    np.testing.assert_allclose(ours_BV[inside], theirs_BV[inside], atol=2e-5)
    assert (ours_BV[~inside] < -1e29).all() and not np.isnan(ours_BV).any()


def test_greedy_takes_the_first_of_equals():
    logp_BV = sampling_log_probs(jnp.array([[1.0, 3.0, 3.0]]), SamplingConfig(temperature=0.0))
    np.testing.assert_allclose(np.exp(logp_BV), [[0, 1, 0]])


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(temperature=0.0), SamplingConfig(), SamplingConfig(top_k=2), SamplingConfig(top_p=0.9)]
)
def test_a_token_from_logits_that_are_not_finite_has_no_log_prob(sampling: SamplingConfig):
    rows = [[0.0, 1.0, 2.0], [0.0, np.nan, 2.0], [0.0, np.inf, 2.0], [np.nan] * 3]
    _, logp_B = draw(jnp.asarray(rows), jnp.full(4, 0.5), sampling)
    assert np.isfinite(logp_B).tolist() == [True, False, False, False]
    if sampling.temperature:
        cold = dataclasses.replace(sampling, temperature=1e-38)
        _, logp_B = draw(jnp.asarray([[0.0, 10.0, 20.0]]), jnp.full(1, 0.5), cold)
        assert not np.isfinite(logp_B).any()


@pytest.mark.parametrize(("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)])
def test_bad_sampling_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        SamplingConfig(**{field: value})


# --- top-p ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.95, 0.999, float(np.nextafter(np.float32(1), np.float32(0)))])
@pytest.mark.parametrize("vocab", [1, 2, 5000])
def test_top_p_keeps_what_a_sort_keeps(vocab: int, top_p: float):
    rng = np.random.default_rng(1)
    scales = np.array([0.0, 1e-4, 1.0, 5.0, 30.0])[:, None]  # from equal logits to one that has all the mass
    logits_BV = (scales * rng.normal(size=(5, vocab)) - 3).astype(np.float32)
    logits_BV[2, ::2] = logits_BV[2, 0]  # ties
    kept_BV = np.asarray(sampling_log_probs(jnp.asarray(logits_BV), SamplingConfig(top_p=top_p))) > -1e29
    for kept_V, logits_V in zip(kept_BV, logits_BV.astype(np.float64), strict=True):
        p_V = np.exp(logits_V - logits_V.max())
        p_V /= p_V.sum()
        lowest = logits_V[kept_V].min()
        assert (kept_V == (logits_V >= lowest)).all() and kept_V.any()
        assert p_V[kept_V].sum() >= top_p - 1e-6  # enough is kept, and without the least likely it would not be
        assert p_V[logits_V > lowest].sum() < top_p + 1e-6


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
@pytest.mark.parametrize("sampling", [PLAIN, SamplingConfig(0.7, 5, 0.9), SamplingConfig(temperature=0.0)], ids=str)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(vocab: int, sampling: SamplingConfig):
    logits_BV = (3 * np.random.default_rng(2).normal(size=(400, vocab))).astype(np.float32)
    uniform_B = jax.random.uniform(jax.random.key(3), (400,))
    token_B, logp_B = map(np.asarray, draw(jnp.asarray(logits_BV), uniform_B, sampling))
    expected_BV = np.asarray(sampling_log_probs(jnp.asarray(logits_BV), sampling))
    np.testing.assert_allclose(logp_B, np.take_along_axis(expected_BV, token_B[:, None], 1)[:, 0], atol=1e-5)
    if sampling.temperature == 0:
        np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))
        return
    end_BV = np.cumsum(np.exp(expected_BV.astype(np.float64)), axis=1)
    uniform_B = np.asarray(uniform_B, np.float64)
    rows = np.arange(400)
    start_B = np.where(token_B > 0, end_BV[rows, token_B - 1], 0.0)
    assert (start_B <= uniform_B + 1e-6).all() and (uniform_B <= end_BV[rows, token_B] + 1e-6).all()
    assert vocab < 3 or len(set(token_B)) > 1


def test_tokens_of_weight_0_are_never_drawn():
    """Also for the smallest and the largest uniform number, where rounding may miss every token."""
    rng = np.random.default_rng(4)
    weight_BV = rng.random((200, 300)).astype(np.float32) * (rng.random((200, 300)) < 0.02)
    weight_BV[:, 0] = weight_BV[:, -1] = 0
    weight_BV[rng.random(200) < 0.5, 150] = 1e-20
    weight_BV[:, 20] = 0.1
    for uniform in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0))), 1.0):
        token_B, chosen_B = under_test._inverse(jnp.asarray(weight_BV), jnp.full(200, uniform, jnp.float32))
        np.testing.assert_array_equal(chosen_B, weight_BV[np.arange(200), np.asarray(token_B)])
        assert (np.asarray(chosen_B) > 0).all()


def test_a_vocabulary_over_several_devices_is_not_gathered(mesh8: Mesh):
    """Its draws are those of one device, and sums of blocks are the largest arrays that travel."""
    logits_BV = (3 * np.random.default_rng(5).normal(size=(8, 4096))).astype(np.float32)
    uniform_B, sampling = jax.random.uniform(jax.random.key(6), (8,)), SamplingConfig(top_p=0.9)
    program = jax.jit(lambda logits, uniform: draw(logits, uniform, sampling))
    sharded = jax.device_put(logits_BV, named(mesh8, "batch", "vocab"))
    one, eight = program(logits_BV, uniform_B), program(sharded, uniform_B)
    np.testing.assert_array_equal(one[0], eight[0])
    np.testing.assert_allclose(one[1], eight[1], atol=1e-6)
    found = hlo.collectives(program.lower(sharded, uniform_B).compile().as_text(), unknown_trips=30)
    assert found and max(c.bytes for c in found) <= 4 * 8 * 64  # [B, √V] and not [B, V]
