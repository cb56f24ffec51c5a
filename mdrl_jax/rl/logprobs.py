"""Log-probs of given tokens, in chunks of time so that [B, T, V] logits need never exist whole."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from mdrl_jax.model.transformer import Decoder


def token_log_probs(
    model: Decoder,
    params: Any,
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
    *,
    start: int,
    temperature: float = 1.0,
    chunk: int = 0,
) -> jax.Array:
    """log π(token_t | tokens before t) for t >= `start` (>= 1): float32 [B, T - start], in nats.

    π is the policy at `temperature`, without top-k or top-p (definitions §1). `chunk` > 0 computes logits for
    that many positions at a time and recomputes them in the backward pass; 0 takes all at once.
    """
    apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
    hidden_BTD = apply(tokens_BT, valid_BT, method="hidden")
    hidden_BTD, targets_BT = hidden_BTD[:, start - 1 : -1], tokens_BT[:, start:]
    readout_DV = apply(method="readout")

    def log_probs(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = apply(hidden_BCD, readout_DV, method="logits") / temperature
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    length = targets_BT.shape[1]
    if chunk == 0 or chunk >= length:
        return log_probs(hidden_BTD, targets_BT)
    padding = -length % chunk
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))

    def by_chunk(x: jax.Array) -> jax.Array:
        split = x.reshape((x.shape[0], -1, chunk) + x.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.checkpoint(log_probs)(*pair)

    logp_NBC = jax.lax.map(one, (by_chunk(hidden_BTD), by_chunk(targets_BT)))
    return jnp.moveaxis(logp_NBC, 0, 1).reshape(targets_BT.shape)[:, :length]
