"""The Fisher diagonal of a tiny decoder against gradients one by one; the fit of κ against numpy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax.model import attention
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import param_shardings, put
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.second_order import decoder_parts
from mdrl_jax.second_order.fisher import fisher_diagonal, fit_kappa
from mdrl_jax.second_order.objectives import CompletionBatch, Forward

pytestmark = pytest.mark.usefixtures("fast_compile")

SIZES = {"vocab_size": 8, "n_layers": 2, "d_model": 8, "d_mlp": 8, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
PROMPT, COMPLETION, TEMPERATURE = 3, 4, 0.7


@pytest.fixture(scope="module", params=["mixed", "qwen3"])
def small(request: Any, tiny_models: Any) -> tuple[Decoder, Any]:
    """One with the parts of all families whose readout is its embedding, and one with qk-norm that has both."""
    model = Decoder(dataclasses.replace(tiny_models[request.param].config, **SIZES))
    rng = np.random.default_rng(0)
    shapes = nn.unbox(param_shapes(model))
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


def batches(n: int = 2, rows: int = 4) -> list[CompletionBatch]:
    """Micro-batches of completions of unequal lengths; the last row only fills up."""
    rng = np.random.default_rng(1)
    out = []
    for i in range(n):
        lengths = rng.integers(1, COMPLETION + 1, rows)
        mask_BT = (np.arange(COMPLETION)[None, :] < lengths[:, None]).astype(np.float32)
        padding_BT = np.arange(PROMPT)[None, :] >= rng.integers(0, PROMPT, rows)[:, None]
        weight_B = np.ones(rows, np.float32)
        if i == n - 1:
            weight_B[-1] = 0
        out.append(
            CompletionBatch(
                tokens_BT=rng.integers(0, SIZES["vocab_size"], (rows, PROMPT + COMPLETION)).astype(np.int32),
                valid_BT=np.concatenate([padding_BT, mask_BT > 0], axis=1),
                mask_BT=mask_BT,
                adv_B=np.zeros(rows, np.float32),
                success_B=np.ones(rows, np.float32),
                weight_B=weight_B,
            )
        )
    return out


def forward(model: Decoder) -> Forward:
    return Forward(decoder_parts.whole(model), TEMPERATURE)


def frugal(model: Decoder) -> Forward:
    """The same with as little kept and held as can be."""
    in_blocks = functools.partial(attention.blockwise, block=2)
    return Forward(decoder_parts.whole(dataclasses.replace(model, remat="full"), in_blocks), TEMPERATURE, chunk=3)


def one_by_one(model: Decoder, params: Any, given: list[CompletionBatch]) -> Any:
    """Mean of squared gradients of whole completions' log-probs, by the trainer's own log-probs."""

    @jax.jit
    def gradient(params: Any, tokens_T: jax.Array, valid_T: jax.Array, mask_T: jax.Array) -> Any:
        def logp(params: Any) -> jax.Array:
            found_BT: Any = token_log_probs(
                model, params, tokens_T[None], valid_T[None], start=PROMPT, temperature=TEMPERATURE
            )
            return jnp.sum(found_BT[0] * mask_T)

        return jax.grad(logp)(params)

    total, n = jax.tree.map(lambda x: np.zeros(x.shape), params), 0
    for rows in given:
        for b in np.flatnonzero(rows.weight_B):
            g = gradient(params, rows.tokens_BT[b], rows.valid_BT[b], rows.mask_BT[b])
            total = jax.tree.map(lambda t, x: t + np.asarray(x, np.float64) ** 2, total, g)
            n += 1
    return jax.tree.map(lambda t: t / n, total)


def assert_close(found: Any, expected: Any) -> None:
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6 * scale), found, expected)


def test_the_diagonal_is_that_of_gradients_one_by_one(small: Any):
    model, params = small
    before = compilations["fisher_diagonal"]
    estimate = fisher_diagonal(forward(model))
    found = estimate(params, batches())
    assert_close(found, one_by_one(model, params, batches()))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    again = estimate(jax.tree.map(lambda x: 2 * x, params), batches())
    assert compilations["fisher_diagonal"] == before + 1
    assert not np.allclose(again["embedding"], found["embedding"])


def test_eight_devices_equal_gradients_one_by_one_and_keep_the_shardings(small: Any, mesh8: Mesh):
    """Two completions a device, one after the other."""
    model, params = small
    given, shardings = batches(rows=8), param_shardings(mesh8, param_shapes(model))
    params8 = jax.tree.map(jax.device_put, params, shardings)
    with jax.set_mesh(mesh8):
        estimate = fisher_diagonal(frugal(model), shardings)
        found = estimate(params8, [put(rows, mesh8) for rows in given])
    assert_close(found, one_by_one(model, params, given))
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, shardings)
    assert all(jax.tree.leaves(same)), same


def test_what_cannot_be_taken_is_refused(small: Any):
    model, params = small
    with pytest.raises(ValueError, match="at least one completion"):
        fisher_diagonal(forward(model))(params, [])


def test_kappa_matches_the_quadratic_forms():
    rng = np.random.default_rng(2)
    d, f = rng.normal(size=(2, 24)).astype(np.float32)
    as_tree = lambda x: {"a": x[:4], "layers": {"b": x[4:].reshape(2, 10)}}  # noqa: E731
    kappa = fit_kappa(as_tree(d), as_tree(f**2), 0.37)
    assert kappa * np.sum(f.astype(float) ** 2 * d.astype(float) ** 2) == pytest.approx(0.37, rel=1e-5)
    for second, name in ((-0.1, "DᵀHD is -0.1"), (0.0, "DᵀHD is 0"), (float("nan"), "DᵀHD is nan")):
        with pytest.raises(ValueError, match=f"κ is not measurable: {name}, not above 0"):
            fit_kappa(as_tree(d), as_tree(f**2), second)
    with pytest.raises(ValueError, match="DᵀFD is 0, not above 0"):
        fit_kappa(as_tree(0 * d), as_tree(f**2), 0.37)
