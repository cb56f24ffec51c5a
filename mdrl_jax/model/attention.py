"""Causal attention in other forms than the decoder's own: blocks of scores at a time, a fused kernel, differentiable.

| | scores held | derivatives |
|---|---|---|
| `plain` | all, [B, H, T, T] | any order, forward and reverse (definitions §6) |
| `blockwise` | of one block of queries, in both passes | any order, forward and reverse |
| `splash` | of one block of queries and keys, on chip | first, reverse: curvature never takes it; TPU |

Softmax in float32 at least. What a token of padding gives is finite, and no one's.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from mdrl_jax.model.transformer import KEPT, NEGATIVE, Attend, Attention, at_least_float32
from mdrl_jax.parallel.sharding import by_device

BLOCK = 128  # queries whose scores `blockwise` holds at a time
PARTS = 10  # so 55 % of all scores are computed, where a causal mask leaves half of them
LANES = 128  # `splash` wants lengths in multiples of it
SPLASH_BLOCK = 512  # queries, and keys, of a block of `splash`
SPLASH_BACKWARD = 1024  # keys of a block of its backward pass, which makes a partial dq for each


def plain(valid_BT: jax.Array) -> Attend:
    """Attention of each token to valid tokens up to itself, all queries at once."""

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        return _attend(q_BTHh, k_BTKh, v_BTKh, valid_BT, jnp.int32(0)), None

    return attend


def blockwise(valid_BT: jax.Array, block: int = BLOCK) -> Attend:
    """The same, `block` queries at a time; scores are recomputed in a backward pass.

    Queries are in `PARTS` parts, each of which looks at the keys up to its own end. Under `jax.checkpoint` the output
    can be kept by name (`transformer.REMAT`).
    """

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        batch, length = q_BTHh.shape[:2]
        padded = jnp.pad(q_BTHh, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape((batch, -1, block) + q_BTHh.shape[2:]), 1, 0)
        n = blocks.shape[0]

        def part(first: int, last: int) -> jax.Array:
            keys = slice(0, last * block)
            one = jax.checkpoint(lambda q, at: _attend(q, k_BTKh[:, keys], v_BTKh[:, keys], valid_BT[:, keys], at))
            starts = block * jnp.arange(first, last, dtype=jnp.int32)
            return jax.lax.map(lambda pair: one(*pair), (blocks[first:last], starts))

        bounds = sorted({n * i // PARTS for i in range(PARTS + 1)})
        out = jnp.concatenate([part(*pair) for pair in itertools.pairwise(bounds)])
        out = jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]
        return checkpoint_name(out, KEPT), None

    return attend


def splash(valid_BT: jax.Array, interpret: bool = False) -> Attend:
    """The same by the TPU kernel (JAX's `splash_attention`), each device its own rows and heads.

    Under `jax.checkpoint` its output and log-sum-exp can be kept by name (`transformer.REMAT`). `interpret`: on any
    platform, slowly.
    """

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        length, scale = q_BTHh.shape[1], q_BTHh.shape[-1] ** -0.5
        kernel_length = padded_length(length)

        def by_head(x_BTHh: jax.Array) -> jax.Array:
            return jnp.moveaxis(jnp.pad(x_BTHh, ((0, 0), (0, kernel_length - length), (0, 0), (0, 0))), 2, 1)

        def run(q_BHTh: jax.Array, k_BKTh: jax.Array, v_BKTh: jax.Array, segments_BT: jax.Array) -> jax.Array:
            kernel = _splash_kernel(q_BHTh.shape[1], kernel_length, interpret)
            segments = kernels.SegmentIds(segments_BT, segments_BT)
            return jax.vmap(kernel)(q_BHTh, k_BKTh, v_BKTh, segments)

        # Tokens and padding are two segments: neither looks at the other.
        segments_BT = jnp.pad(valid_BT.astype(jnp.int32), ((0, 0), (0, kernel_length - length)))
        heads, kv_heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
        run = by_device(run, (heads, kv_heads, kv_heads, ("batch", None)), heads)
        out_BHTh = run(by_head(q_BTHh * scale), by_head(k_BTKh), by_head(v_BTKh), segments_BT)
        return jnp.moveaxis(out_BHTh, 1, 2)[:, :length], None

    return attend


def padded_length(length: int) -> int:
    """The length that `splash` pads sequences to: whole blocks."""
    block = SPLASH_BACKWARD if length > SPLASH_BLOCK else LANES
    return -(-length // block) * block


def block_sizes(length: int) -> kernels.BlockSizes:
    """Blocks of `splash` for a padded length."""
    block, backward = min(SPLASH_BLOCK, length), min(SPLASH_BACKWARD, length)
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=backward,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,  # five products a block, where two kernels for dq and dk, dv take seven
    )


def _splash_kernel(heads: int, length: int, interpret: bool) -> Callable[..., Any]:
    causal = masks.CausalMask((length, length))
    return kernels.make_splash_mha(
        masks.MultiHeadMask([causal] * heads),
        block_sizes=block_sizes(length),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def choose(
    rows: int, heads: int, length: int, limit_bytes: float, short: Attention = plain, long: Attention = blockwise
) -> Attention:
    """`short`, or `long` where the float32 scores of one layer would take more than `limit_bytes`."""
    return short if 4.0 * rows * heads * length * length <= limit_bytes else long


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
