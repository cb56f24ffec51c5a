"""Four forms of causal attention of whole sequences: they differ in memory and in which derivatives they have.

All are functions of `valid_BT` and plug into `Decoder.attention` (`model/transformer.py`). "Scores" here are the
attention logits q·k / √h.

| | scores in memory at a time | derivatives | runs on |
|---|---|---|---|
| `causal_attention` | all of a layer, [B, H, T, T] | any order, forward and reverse mode | any device |
| `plain` | the same; nested derivatives share what they compute twice | the same (definitions §6) | any device |
| `blockwise` | those of one block of queries, in both passes | any order, forward and reverse mode | any device |
| `splash` | those of one block of queries and keys, on chip | first order, reverse mode only | TPU |

Second derivatives never use `splash`, nor do models with sliding layers. All compute the softmax in float32 or wider.
At a padding token the output is finite, and it does not reach any valid token.
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

from mdrl_jax.parallel.sharding import by_device
from mdrl_jax.tree import at_least_float32

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # (q, k, v) -> (output, value to keep)
# (`valid_BT`, `window=`) -> attention of whole left-padded sequences, which keeps None. A window, an int32 scalar, is
# given only if layers differ in it: each token then attends to itself and to the window − 1 tokens before it.
Attention = Callable[..., Attend]
# (outputs of a layer's heads [B, T, H, h], the layer's slice of the caller's arrays) -> the outputs that replace them
ChangeHeads = Callable[[jax.Array, Any], jax.Array]

NEGATIVE = -1e30  # finite, so that a fully masked row (padding) gives no NaN
KEPT = "attention"  # checkpoint name of attention outputs: if they are kept, the backward pass need not recompute them
BLOCK = 128  # queries whose scores `blockwise` holds at a time
PARTS = 10  # with 10 parts `blockwise` computes 55 % of all scores; the causal mask keeps 50 %
LANES = 128  # `splash` requires lengths that are multiples of this
SPLASH_BLOCK = 512  # queries in a block of `splash`, and keys in a block of its forward pass
SPLASH_BACKWARD = 1024  # keys in a block of its backward pass, which makes one partial dq per block of keys


def causal_attention(valid_BT: jax.Array, window: jax.Array | None = None) -> Attend:
    """Attention of each token to itself and to earlier valid tokens; all scores are held at once.

    It uses the XLA implementation because that can be differentiated twice (definitions §6).

    Args:
      valid_BT: mask [B, T]: True at real tokens, False at the padding on the left.
      window: how many tokens, itself included, a token attends to; None: all.

    Returns:
      an `Attend`: (q [B, Q, H, h], k [B, T, K, h], v [B, T, K, h]) -> (output [B, Q, H, h], None). The queries are
      those of the last Q tokens, Q <= T. It raises ValueError if q, k and v differ in dtype, which is also that of the
      output, or if H is not a multiple of K.
    """
    length = valid_BT.shape[1]

    def attend(q_BQHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        n_queries = q_BQHh.shape[1]
        causal_QT = jnp.tril(jnp.ones((n_queries, length), bool), length - n_queries)
        if window is not None:
            at_T = jnp.arange(length, dtype=jnp.int32)
            causal_QT = causal_QT & (at_T[length - n_queries :, None] - at_T[None, :] < window)
        mask_B1QT = causal_QT[None, None, :, :] & valid_BT[:, None, None, :]
        out = jax.nn.dot_product_attention(q_BQHh, k_BTKh, v_BTKh, mask=mask_B1QT, implementation="xla")
        return out, None

    return attend


def plain(valid_BT: jax.Array, window: jax.Array | None = None) -> Attend:
    """Attention of each token to itself and to earlier valid tokens, for all queries at once.

    The output is softmax(q·k / √h) v, with the softmax over these tokens.

    Args:
      valid_BT: mask [B, T], with T of 1 or more: True at real tokens, False at the padding on the left.
      window: how many tokens, itself included, a token attends to; None: all.

    Returns:
      an `Attend`: (q [B, Q, H, h], k [B, T, K, h], v [B, T, K, h]) -> (output [B, Q, H, h] in the dtype of v, None).
      The queries are those of the last Q tokens. Head i of q reads head i // (H / K) of k and v. It raises TypeError if
      H is not a multiple of K.
    """

    def attend(q_BQHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        return _attend(q_BQHh, k_BTKh, v_BTKh, valid_BT, jnp.int32(k_BTKh.shape[1] - q_BQHh.shape[1]), window), None

    return attend


def blockwise(valid_BT: jax.Array, block: int = BLOCK, window: jax.Array | None = None) -> Attend:
    """The same function as `plain`, computed for `block` queries at a time.

    The backward pass recomputes the scores. Queries are divided into at most `PARTS` parts, and each part reads only
    the keys up to its own end. The output is named `KEPT`, so that a policy of `transformer.REMAT` can keep it. At
    padding, where outputs have no meaning, they differ from those of `plain`.

    Args:
      valid_BT: mask [B, T], with T of 1 or more: True at real tokens, False at the padding on the left.
      block: number of queries, 1 or more; it need not divide T.
      window: as in `plain`. Scores outside the window are computed all the same.

    Returns:
      an `Attend`: (q [B, Q, H, h], k [B, T, K, h], v [B, T, K, h]) -> (output [B, Q, H, h] in the dtype of v, None).
      The queries are those of the last Q tokens. It raises TypeError if H is not a multiple of K.
    """

    def attend(q_BQHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        batch, n_queries = q_BQHh.shape[:2]
        before = k_BTKh.shape[1] - n_queries
        padded = jnp.pad(q_BQHh, ((0, 0), (0, -n_queries % block), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape((batch, -1, block) + q_BQHh.shape[2:]), 1, 0)
        n = blocks.shape[0]

        def part(first: int, last: int) -> jax.Array:
            keys = slice(0, before + last * block)
            one = jax.checkpoint(
                lambda q, at: _attend(q, k_BTKh[:, keys], v_BTKh[:, keys], valid_BT[:, keys], at, window)
            )
            starts = before + block * jnp.arange(first, last, dtype=jnp.int32)
            return jax.lax.map(lambda pair: one(*pair), (blocks[first:last], starts))

        bounds = sorted({n * i // PARTS for i in range(PARTS + 1)})
        out = jnp.concatenate([part(*pair) for pair in itertools.pairwise(bounds)])
        out = jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :n_queries]
        return checkpoint_name(out, KEPT), None

    return attend


def splash(valid_BT: jax.Array, interpret: bool = False) -> Attend:
    """The same function as `plain`, by JAX's TPU kernel `splash_attention`.

    Each device runs the kernel on its own rows and heads. The output and the log-sum-exp are named `KEPT`, so that a
    policy of `transformer.REMAT` can keep them. At padding, where outputs have no meaning, they differ from those of
    `plain`.

    Args:
      valid_BT: mask [B, T], with T of 1 or more: True at real tokens, False at the padding on the left.
      interpret: whether the kernel is interpreted: slowly, but on any platform.

    Returns:
      an `Attend`: (q [B, Q, H, h], k [B, T, K, h], v [B, T, K, h]) -> (output [B, Q, H, h] in the dtype of q, None).
      The queries are those of the last Q tokens. It raises ValueError if H is not a multiple of K, if the mesh does not
      divide B, H and K evenly, or if it runs on a CPU without `interpret`. Forward-mode derivatives raise TypeError.
    """

    def attend(q_BQHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        n_queries, length, scale = q_BQHh.shape[1], k_BTKh.shape[1], q_BQHh.shape[-1] ** -0.5

        def by_head(x_BTHh: jax.Array) -> jax.Array:
            padding = padded_length(x_BTHh.shape[1]) - x_BTHh.shape[1]
            return jnp.moveaxis(jnp.pad(x_BTHh, ((0, 0), (0, padding), (0, 0), (0, 0))), 2, 1)

        def run(q_BHQh: jax.Array, k_BKTh: jax.Array, v_BKTh: jax.Array, segments_BT: jax.Array) -> jax.Array:
            heads, lengths = q_BHQh.shape[1], (q_BHQh.shape[2], k_BKTh.shape[2])
            kernel = _splash_kernel(heads, *lengths, length - n_queries, interpret)
            queries_BQ = jnp.pad(segments_BT[:, length - n_queries : length], ((0, 0), (0, lengths[0] - n_queries)))
            return jax.vmap(kernel)(q_BHQh, k_BKTh, v_BKTh, kernels.SegmentIds(queries_BQ, segments_BT))

        # Tokens and padding form two segments, and the kernel lets no token attend to another segment.
        segments_BT = jnp.pad(valid_BT.astype(jnp.int32), ((0, 0), (0, padded_length(length) - length)))
        heads, kv_heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
        run = by_device(run, (heads, kv_heads, kv_heads, ("batch", None)), heads)
        out_BHQh = run(by_head(q_BQHh * scale), by_head(k_BTKh), by_head(v_BTKh), segments_BT)
        return jnp.moveaxis(out_BHQh, 1, 2)[:, :n_queries], None

    return attend


def keeping(attend: Attend) -> Attend:
    """The same attention, but the value that it keeps is (k, v), the keys and values that it is called with.

    What `attend` itself keeps is dropped.
    """

    def and_keep(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        return attend(q_BTHh, k_BTKh, v_BTKh)[0], (k_BTKh, v_BTKh)

    return and_keep


def changing(attend: Attend, change: ChangeHeads | None, given: Any) -> Attend:
    """The same attention with changed outputs, which are also the value that it keeps.

    Args:
      attend: the attention; what it keeps itself is dropped.
      change: makes the new outputs [B, T, H, h] of the outputs and of `given`; None: they stay.
      given: the second argument of `change`.
    """

    def and_change(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array):
        out_BTHh = attend(q_BTHh, k_BTKh, v_BTKh)[0]
        out_BTHh = out_BTHh if change is None else change(out_BTHh, given)
        return out_BTHh, out_BTHh

    return and_change


def after(earlier: tuple[jax.Array, jax.Array] | None, attend: Attend) -> Attend:
    """Attention of the last tokens of rows whose first tokens were run before.

    Args:
      earlier: keys and values of the first tokens [R, Ts, K, h]; None: no token was run before.
      attend: attention of the whole rows. Its queries may be those of their last tokens alone.

    Returns:
      an `Attend`: (q [R, Q, H, h], k [R, Q, K, h], v [R, Q, K, h]), of the last Q tokens -> what `attend` gives for
      these queries, with the earlier keys and values before k and v.
    """
    if earlier is None:
        return attend

    def attend_all(q_RQHh: jax.Array, k_RQKh: jax.Array, v_RQKh: jax.Array):
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(earlier, (k_RQKh, v_RQKh), strict=True))
        return attend(q_RQHh, k, v)

    return attend_all


def padded_length(length: int) -> int:
    """The length in tokens to which `splash` pads sequences of `length` tokens.

    It is the smallest multiple, at least `length`, of 128 if `length` is at most 512, and of 1024 otherwise.
    """
    block = SPLASH_BACKWARD if length > SPLASH_BLOCK else LANES
    return -(-length // block) * block


def block_sizes(queries: int, length: int) -> kernels.BlockSizes:
    """The block sizes, in tokens, that `splash` uses.

    Args:
      queries: number of queries after padding, a result of `padded_length`; this is not checked.
      length: number of keys after padding, likewise.

    Returns:
      JAX's `BlockSizes`, for the forward pass and the fused backward pass.
    """
    block_q, block_kv, backward = min(SPLASH_BLOCK, queries), min(SPLASH_BLOCK, length), min(SPLASH_BACKWARD, length)
    return kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=backward,
        block_kv_dkv_compute=block_kv,
        use_fused_bwd_kernel=True,  # 5 matrix products a block; separate kernels for dq and for (dk, dv) need 7
    )


def _splash_kernel(heads: int, queries: int, length: int, before: int, interpret: bool) -> Callable[..., Any]:
    causal = masks.CausalMask((queries, length), offset=before)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([causal] * heads),
        block_sizes=block_sizes(queries, length),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def choose(
    rows: int, heads: int, length: int, limit_bytes: float, short: Attention = plain, long: Attention = blockwise
) -> Attention:
    """Chooses an attention by the memory of its scores, which takes 4 · rows · heads · length² bytes in float32.

    Args:
      rows: sequences on one device.
      heads: attention heads on one device.
      length: tokens of a sequence.
      limit_bytes: bytes of one device that the scores of one layer may take.
      short: attention that holds all scores, such as `plain` or `causal_attention`.
      long: attention that never holds all scores.

    Returns:
      `short` if the scores of one layer take at most `limit_bytes`, otherwise `long`.
    """
    return short if 4.0 * rows * heads * length * length <= limit_bytes else long


def _attend(q_BQHh, k_BTKh, v_BTKh, valid_BT, first, window) -> jax.Array:
    """Attention [B, Q, H, h] of queries at the positions `first`, `first` + 1, ... over all keys."""
    batch, n_queries, n_heads, head_dim = q_BQHh.shape
    length, n_kv = k_BTKh.shape[1:3]
    q_BQKRh = q_BQHh.reshape(batch, n_queries, n_kv, n_heads // n_kv, head_dim)
    wide = at_least_float32(q_BQHh.dtype)
    scores = jnp.einsum("bqkrh,btkh->bkrqt", q_BQKRh, k_BTKh, preferred_element_type=wide) / math.sqrt(head_dim)
    before_QT = first + jnp.arange(n_queries)[:, None] - jnp.arange(length)[None, :]
    causal_QT = before_QT >= 0
    if window is not None:
        causal_QT = causal_QT & (before_QT < window)
    mask = causal_QT[None, None, None] & valid_BT[:, None, None, None, :]
    scores = jnp.where(mask, scores, NEGATIVE)
    # Subtract the maximum first: otherwise `scores - logsumexp` is a small difference of large numbers. In a row where
    # all scores are NEGATIVE it would round to 0, and the weights would not sum to 1.
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # This form of the softmax lets XLA merge the equal computations of nested jvps. With jax.nn.softmax it keeps both
    # copies, also of everything that is computed from the weights.
    weights = jnp.exp(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)).astype(v_BTKh.dtype)
    return jnp.einsum("bkrqt,btkh->bqkrh", weights, v_BTKh).reshape(q_BQHh.shape)
