"""Causal attention that can be differentiated twice, in forward and in reverse (definitions §6).

`plain` holds all scores [B, H, T, T]; `blockwise` those of one block of queries at a time, in both passes. Fused
kernels (cuDNN, splash) have no jvp of their vjp, so curvature never takes them. Softmax in float32 at least.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdrl_jax.model.transformer import NEGATIVE, Attend, at_least_float32

BLOCK = 128  # queries whose scores are held at a time


def plain(valid_BT: jax.Array) -> Attend:
    """Attention of each token to valid tokens up to itself, all queries at once."""

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        return _attend(q_BTHh, k_BTKh, v_BTKh, valid_BT, jnp.int32(0)), None

    return attend


def blockwise(valid_BT: jax.Array, block: int = BLOCK) -> Attend:
    """The same, `block` queries at a time; scores are recomputed in a backward pass."""

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        batch, length = q_BTHh.shape[:2]
        padded = jnp.pad(q_BTHh, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape((batch, -1, block) + q_BTHh.shape[2:]), 1, 0)
        one = jax.checkpoint(lambda q, first: _attend(q, k_BTKh, v_BTKh, valid_BT, first))
        firsts = block * jnp.arange(blocks.shape[0], dtype=jnp.int32)
        out = jnp.moveaxis(jax.lax.map(lambda pair: one(*pair), (blocks, firsts)), 0, 1)
        return out.reshape(padded.shape)[:, :length], None

    return attend


def choose(rows: int, heads: int, length: int, limit_bytes: float) -> Callable[[jax.Array], Attend]:
    """`plain`, or `blockwise` where the float32 scores of one layer would take more than `limit_bytes`."""
    return plain if 4.0 * rows * heads * length * length <= limit_bytes else blockwise


def _attend(q_BQHh, k_BTKh, v_BTKh, valid_BT, first) -> jax.Array:
    """Queries at positions `first`, `first` + 1, ... over all keys."""
    batch, n_queries, n_heads, head_dim = q_BQHh.shape
    length, n_kv = k_BTKh.shape[1:3]
    q_BQKRh = q_BQHh.reshape(batch, n_queries, n_kv, n_heads // n_kv, head_dim)
    wide = at_least_float32(q_BQHh.dtype)
    scores = jnp.einsum("bqkrh,btkh->bkrqt", q_BQKRh, k_BTKh, preferred_element_type=wide) / math.sqrt(head_dim)
    causal_QT = jnp.arange(length)[None, :] <= first + jnp.arange(n_queries)[:, None]
    mask = causal_QT[None, None, None] & valid_BT[:, None, None, None, :]
    scores = jnp.where(mask, scores, NEGATIVE)
    # Else exp would be of a small difference of large numbers, and not a softmax at all where everything is masked.
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # The softmax, in a form whose repeated jvps XLA merges; of jax.nn.softmax it keeps both, and of all that follows.
    weights = jnp.exp(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)).astype(v_BTKh.dtype)
    return jnp.einsum("bkrqt,btkh->bqkrh", weights, v_BTKh).reshape(q_BQHh.shape)
