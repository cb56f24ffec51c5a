"""Decoders small enough for a dense Hessian, in float64."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.model import attention
from mdrl_jax.model.transformer import Decoder, param_shapes

SIZES = {"vocab_size": 5, "n_layers": 2, "d_model": 4, "d_mlp": 6, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4}


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def decoder64(x64: None, tiny_models: dict[str, Any]) -> Callable[..., tuple[Decoder, Any]]:
    """(family, sizes other than `SIZES`) -> (a Decoder of 324 to 412 parameters, these)."""

    def make(family: str, **sizes: int) -> tuple[Decoder, Any]:
        config = dataclasses.replace(tiny_models[family].config, **(SIZES | sizes))
        # The library takes the softmax of attention in float32 at any dtype.
        model = Decoder(config, jnp.float64, attention=attention.plain)
        rng = np.random.default_rng(0)
        shapes = nn.unbox(param_shapes(model))
        return model, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)

    return make
