"""Log-probs of given tokens, in chunks of time so that [B, T, V] logits need never exist whole."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from mdrl_jax.model.transformer import Decoder

SLOPE = "slope"  # the derivative of a token's log-prob by its hidden state: with it no logits are made again
_slopes = jax.checkpoint_policies.save_only_these_names(SLOPE)


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
    lm_head_DV = apply(method="lm_head")

    def log_probs(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = apply(hidden_BCD, lm_head_DV, method="logits") / temperature
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    return over_chunks(log_probs, (hidden_BTD, targets_BT), chunk)


def over_chunks(function: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """`function` of arrays [B, T, ...], `chunk` positions at a time, recomputed in a backward pass; 0: all at once.

    What `function` gives, an array or a tree of arrays [B, C], comes back as [B, T]. What it names `SLOPE` is kept.
    """
    length = arrays[0].shape[1]
    if chunk == 0 or chunk >= length:
        return function(*arrays)

    def by_chunk(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        split = x.reshape((x.shape[0], -1, chunk) + x.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def whole(out_NBC: jax.Array) -> jax.Array:
        out_BNC = jnp.moveaxis(out_NBC, 0, 1)
        return out_BNC.reshape(out_BNC.shape[0], -1)[:, :length]

    def one(parts: tuple[jax.Array, ...]) -> Any:
        return jax.checkpoint(function, policy=_slopes)(*parts)

    return jax.tree.map(whole, jax.lax.map(one, tuple(map(by_chunk, arrays))))
