"""The decoder: all families of `families.py` as one Flax Linen module, pure `apply({"params": params}, ...)`.

Four entry points share one `Block`: `hidden` (whole sequences: training, log-probs), `prefill` (prompts; it returns
their keys and values), `decode` (one token of each completion, after a prompt that a group of completions shares) and
`through_heads` (whole sequences; it returns the output of every attention head, and the caller may change it). They
differ only in how a layer attends, so the block gets its attention as an argument, an `Attend`. For whole
sequences and prompts the run chooses between `causal_attention`, which holds all scores, and the forms of
`model/attention.py`.

Sequences are left-padded: `valid_BT` marks real tokens, positions count real tokens from 0, and no token attends to
padding. Layers are stacked along a leading axis and run under `nn.scan`. Master weights are float32. Matrix products
run in `dtype`; norms, softmax, RoPE and logits are computed in float32.

One layer of Llama is x + attention(RMSNorm(x)), then x + W_down(silu(W_gate y) ⊙ W_up y) with y = RMSNorm(x). Other
families add or move norms, and in some the layers differ: by RoPE, or because a layer attends to a window of tokens
only. The scan over layers then also runs over a `Kind` for each layer. Letters of shapes are in definitions §1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mdrl_jax.model.families import ModelConfig, RopeScaling
from mdrl_jax.parallel.hlo_text import EQUALLY
from mdrl_jax.parallel.sharding import constrain

NEGATIVE = -1e30  # finite, so that a fully masked row (padding) gives no NaN

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # (q, k, v) -> (output, value to keep)
# (`valid_BT`, `window=`) -> attention of whole left-padded sequences, which keeps None. A window, an int32 scalar, is
# given only if layers differ in it: each token then attends to itself and to the window − 1 tokens before it.
Attention = Callable[..., Attend]
# (outputs of a layer's heads [B, T, H, h], the layer's slice of the caller's arrays) -> the outputs that replace them
ChangeHeads = Callable[[jax.Array, Any], jax.Array]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Axes = tuple[str | None, ...]
# Two shardings of activations [B, T, D], for many and for few rows (`parallel/sharding.py`).
BY_BATCH: Axes = ("batch", None, None)
BY_EMBED: Axes = ("rows", None, "embed")

# A cache of at least `LONG` tokens is read in one of `PARTS` lengths, so that early tokens do not read an empty tail.
LONG, PARTS = 512, 8
KEPT = "attention"  # checkpoint name of attention outputs: if they are kept, the backward pass need not recompute them
_named = jax.checkpoint_policies.save_only_these_names(KEPT)
REMAT: dict[str, Callable[..., Any] | None] = {
    "full": _named,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _named
    ),
}


@struct.dataclass
class Prefix:
    """Keys and values of prompts of Tp tokens; all completions of a prompt (its group) read the same ones.

    Attributes:
      k_LPTKh: keys [L, P, Tp, K, h].
      v_LPTKh: values [L, P, Tp, K, h].
      valid_PT: True at real tokens of the prompts [P, Tp].
    """

    k_LPTKh: jax.Array
    v_LPTKh: jax.Array
    valid_PT: jax.Array


@struct.dataclass
class Cache:
    """Keys and values of completions, of which row b belongs to prompt b // G (B = P · G).

    The cache is a ring: the token that is decoded at step s lies in slot s mod Tc. It may have more rows than are
    decoded; then the first ones count.

    Attributes:
      k_LBTKh: keys [L, B, Tc, K, h].
      v_LBTKh: values [L, B, Tc, K, h].
    """

    k_LBTKh: jax.Array
    v_LBTKh: jax.Array


@struct.dataclass
class Kind:
    """In what a layer differs from others; of all layers together, each array has a leading axis L.

    Attributes:
      frequencies: the RoPE frequencies of the layer [h/2]; 0 rotates nothing.
      window: how many tokens, itself included, a token attends to, an int32 scalar; None if no layer slides.
    """

    frequencies: jax.Array
    window: jax.Array | None


def kinds(config: ModelConfig) -> Kind | None:
    """The kinds of all layers, with a leading axis L; None if all layers are alike and see all earlier tokens."""
    if not config.sliding and not config.no_rope:
        return None
    usual = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    local = rope_frequencies(config.head_dim, config.local_theta, None) if config.local_theta else usual
    layers = range(config.n_layers)
    chosen = [(local if config.slides(i) else usual) * float(config.rotates(i)) for i in layers]
    whole = jnp.iinfo(jnp.int32).max
    windows = jnp.array([config.window if config.slides(i) else whole for i in layers], jnp.int32)
    return Kind(jnp.stack(chosen), windows if config.sliding else None)


def of_kind(attention: Attention, kind: Kind | None) -> Attention:
    """The attention of one layer.

    Args:
      attention: the attention of layers that see all earlier tokens.
      kind: the layer's kind; None if the layers of the model do not differ.

    Returns:
      `attention`, with the layer's window given if layers differ in it.
    """
    return attention if kind is None or kind.window is None else functools.partial(attention, window=kind.window)


def at_least_float32(dtype: Any) -> Any:
    """float32 for all dtypes but float64, which stays float64 (some tests compute in it)."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32  # not promote_types: strict promotion refuses bfloat16


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """The frequencies of RoPE (arXiv 2104.09864): θ^(−2i/h) for i = 0, …, h/2 − 1.

    Args:
      head_dim: h, an even number.
      theta: the base θ, above 0.
      scaling: None: none. Linear scaling divides all frequencies by `factor`. Llama-3 scaling (arXiv 2407.21783)
        divides those of long wavelengths by it; those of short wavelengths stay, and those between are multiplied by a
        factor that is linear in 1 / wavelength.

    Returns:
      radians per position [h/2], float32.

    Raises:
      ZeroDivisionError: if `low_freq_factor` or `high_freq_factor` of the scaling is 0.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.power(jnp.float32(theta), exponent)
    if scaling is None:
        return frequency
    if scaling.linear:
        return frequency / scaling.factor
    wavelength = 2 * jnp.pi / frequency
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    mixed = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = jnp.where(wavelength > low, frequency / scaling.factor, mixed)
    return jnp.where(wavelength < high, frequency, scaled)


def rotate(x_BTHh: jax.Array, positions_BT: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Applies RoPE to heads, in Hugging Face's layout: coordinate i is paired with coordinate i + h/2.

    Args:
      x_BTHh: queries or keys [B, T, H, h], with an even h.
      positions_BT: position of each token [B, T].
      frequencies: from `rope_frequencies` [h/2].

    Returns:
      rotated queries or keys [B, T, H, h], in the dtype of `x_BTHh`: with a = position · frequency i, the pair (x, y)
      becomes (x cos a − y sin a, y cos a + x sin a).
    """
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    a, b = jnp.split(x_BTHh.astype(at_least_float32(x_BTHh.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)


def positions_of(valid_BT: jax.Array) -> jax.Array:
    """Position of each token: the number of valid tokens before it. Padding on the left gets 0, like the first token.

    Args:
      valid_BT: mask [B, T]: True at real tokens, False at the padding on the left.

    Returns:
      positions [B, T], int32.
    """
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=-1) - 1, 0)


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


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Rows of a left-padded prompt and a completion; several in succession share the computation of their prompt.

    The layers then run packed rows: each holds a prompt and, one after the other, the completions of `group` rows. A
    completion attends to the prompt and to itself, as if the packed row held no other completion. With a group of 1 a
    packed row is a row as it is. Letters of shapes: R = B / G packed rows of S = Tp + G · Tc tokens, with G = `group`
    and Tp = `start`.

    Attributes:
      valid_BT: True at real tokens, False at padding [B, Tp + Tc].
      start: length of the padded prompts, at least 1: nothing predicts the first token of a row.
      group: number of rows in succession that have the same prompt; it divides B.

    Raises:
      ValueError: if `start` is below 1, or `group` does not divide B.
    """

    valid_BT: jax.Array
    start: int
    group: int = 1

    def __post_init__(self) -> None:
        rows = self.valid_BT.shape[0]
        if self.start < 1:
            raise ValueError(f"start is {self.start}; allowed: 1 or more, because nothing predicts a row's first token")
        if rows % self.group:
            raise ValueError(f"{rows} rows cannot be divided into groups of {self.group} with the same prompt")

    def pack(self, tokens_BT: jax.Array) -> jax.Array:
        """The packed rows of token ids [R, S]."""
        if self.group == 1:
            return tokens_BT
        shared_RT, own_BT = tokens_BT[:: self.group, : self.start], tokens_BT[:, self.start :]
        return jnp.concatenate([shared_RT, own_BT.reshape(shared_RT.shape[0], -1)], axis=1)

    def positions(self) -> jax.Array:
        """Position of each token of the packed rows in its own sequence [R, S], int32."""
        if self.group == 1:
            return positions_of(self.valid_BT)
        valid_RT = self.valid_BT[:: self.group, : self.start]
        own_T = jnp.arange(self.valid_BT.shape[1] - self.start, dtype=jnp.int32)
        own_RT = jnp.sum(valid_RT, axis=1, keepdims=True, dtype=jnp.int32) + own_T[None]
        return jnp.concatenate([positions_of(valid_RT), jnp.tile(own_RT, (1, self.group))], axis=1)

    def attend(self, attention: Attention) -> Attend:
        """Attention in packed rows.

        Args:
          attention: attention of whole sequences.

        Returns:
          an `Attend`: (q [R, S, H, h], k [R, S, K, h], v [R, S, K, h]) -> (output [R, S, H, h], None). It raises what
          `attention` raises.
        """
        if self.group == 1:
            return attention(self.valid_BT)
        rows, start = self.valid_BT.shape[0], self.start
        valid_RT = self.valid_BT[:: self.group, :start]
        whole_BT = jnp.concatenate([self.valid_BT[:, :start], jnp.ones_like(self.valid_BT[:, start:])], axis=1)

        def split(x_RSHh: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Prompts [R, Tp, H, h], and completions [B, Tc, H, h]."""
            own = x_RSHh[:, start:]
            return x_RSHh[:, :start], own.reshape((rows, -1) + own.shape[2:])

        def attend(q_RSHh: jax.Array, k_RSKh: jax.Array, v_RSKh: jax.Array):
            (q, own_q), (k, own_k), (v, own_v) = map(split, (q_RSHh, k_RSKh, v_RSKh))
            both = [jnp.concatenate([jnp.repeat(x, self.group, axis=0), own], 1) for x, own in ((k, own_k), (v, own_v))]
            out, _ = attention(valid_RT)(q, k, v)
            own_out, _ = attention(whole_BT)(own_q, *both)
            own_out = own_out.reshape((out.shape[0], -1) + out.shape[2:])
            return jnp.concatenate([out, own_out], axis=1), None

        return attend

    def predicting(self, x_RSD: jax.Array) -> jax.Array:
        """The hidden states that the tokens of completions are predicted from [B, Tc, D].

        The first is that of the prompt's last token, the others are those of the completion's tokens but the last.
        """
        if self.group == 1:
            return x_RSD[:, self.start - 1 : -1]
        rows, width = self.valid_BT.shape[0], x_RSD.shape[-1]
        own_BTD = x_RSD[:, self.start :].reshape(rows, -1, width)[:, :-1]
        last_B1D = jnp.repeat(x_RSD[:, self.start - 1 : self.start], self.group, axis=0)
        return jnp.concatenate([last_B1D, own_BTD], axis=1)


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


def cached_attention(prefix_k, prefix_v, prefix_valid_PT, cache: Cache, layer, step, start_P, window=None) -> Attend:
    """Attention of one new token in each row to the prompt of its group and to its own completion.

    It writes the new keys and values into slot step mod Tc of the layer's cache; this happens in place if the caller's
    loop carries the cache. All rows share the slot although their completions began at different steps: RoPE has put
    the position into the keys, so the slot need not encode it. Of a completion of more than Tc tokens, only the
    last Tc are attended to. If Tc is at least `LONG`, slots that no step has filled yet are not read, to within
    Tc / `PARTS`.

    Args:
      prefix_k: keys of the prompts in this layer [P, Tp, K, h].
      prefix_v: values of the prompts in this layer [P, Tp, K, h].
      prefix_valid_PT: True at real tokens of the prompts [P, Tp].
      cache: keys and values of the completions in all layers, with Tc of 1 or more.
      layer: index of this layer, from 0, a scalar of the dtype of `step`.
      step: the current step of the decoding loop, from 0, an int32 scalar.
      start_P: the step at which each prompt's completions began [P], at most `step`.
      window: how many tokens, itself included, the token attends to, an int32 scalar; None: all.

    Returns:
      an `Attend`: (q [B, 1, H, h], k [B, 1, K, h], v [B, 1, K, h]) -> (output [B, 1, H, h], the new cache). All have
      the dtype of the cache and of the prompts' keys and values. Row b belongs to prompt b // G, with G = B / P, and
      to row b of the cache, which has B rows or more.
    """
    n_prompts, length = prefix_valid_PT.shape[0], cache.k_LBTKh.shape[2]
    scale = prefix_k.shape[-1] ** -0.5

    def grouped(x_BXX: jax.Array) -> jax.Array:
        return x_BXX.reshape((n_prompts, -1) + x_BXX.shape[1:])

    def over(filled: int, q_PGKRh: jax.Array, k_LBTKh: jax.Array, v_LBTKh: jax.Array) -> jax.Array:
        """The output [P, G, K, R, h], read from the first `filled` slots; the others must be empty."""
        zero = jnp.zeros_like(step)
        sizes = (1, q_PGKRh.shape[0] * q_PGKRh.shape[1], filled, *k_LBTKh.shape[3:])
        of_layer = (layer, zero, zero, zero, zero)
        k_BTKh = jax.lax.dynamic_slice(k_LBTKh, of_layer, sizes)[0]
        v_BTKh = jax.lax.dynamic_slice(v_LBTKh, of_layer, sizes)[0]
        f32 = jnp.float32
        prompt_PGKRS = jnp.einsum("pgkrh,pskh->pgkrs", q_PGKRh, prefix_k, preferred_element_type=f32)
        own_PGKRT = jnp.einsum("pgkrh,pgtkh->pgkrt", q_PGKRh, grouped(k_BTKh), preferred_element_type=f32)
        seen_PS = prefix_valid_PT
        age_T = (step - jnp.arange(filled)) % length
        written_PT = age_T[None, :] <= (step - start_P)[:, None]
        if window is not None:
            ages_S = jnp.arange(prefix_k.shape[1], 0, -1, dtype=jnp.int32)  # of the prompt, at a completion's 1st token
            seen_PS = seen_PS & (ages_S[None, :] + (step - start_P)[:, None] < window)
            written_PT = written_PT & (age_T < window)[None, :]
        prompt_PGKRS = jnp.where(seen_PS[:, None, None, None, :], prompt_PGKRS, NEGATIVE)
        own_PGKRT = jnp.where(written_PT[:, None, None, None, :], own_PGKRT, NEGATIVE)
        weights = jax.nn.softmax(jnp.concatenate([prompt_PGKRS, own_PGKRT], axis=-1), axis=-1)
        weights = weights.astype(q_PGKRh.dtype)
        on_prompt, on_own = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
        return jnp.einsum("pgkrs,pskh->pgkrh", on_prompt, prefix_v) + jnp.einsum(
            "pgkrt,pgtkh->pgkrh", on_own, grouped(v_BTKh)
        )

    def attend(q_B1Hh: jax.Array, k_B1Kh: jax.Array, v_B1Kh: jax.Array):
        zero = jnp.zeros_like(step)
        at = (layer, zero, step % length, zero, zero)
        k_LBTKh = jax.lax.dynamic_update_slice(cache.k_LBTKh, k_B1Kh[None], at)
        v_LBTKh = jax.lax.dynamic_update_slice(cache.v_LBTKh, v_B1Kh[None], at)
        n_kv, head_dim = k_LBTKh.shape[3:]
        q_PGKRh = grouped(q_B1Hh.reshape(q_B1Hh.shape[0], n_kv, -1, head_dim)) * scale
        if length < LONG:
            out_PGKRh = over(length, q_PGKRh, k_LBTKh, v_LBTKh)
        else:
            parts = [functools.partial(over, -(-length * n // PARTS)) for n in range(1, PARTS + 1)]
            filled = jnp.minimum(step + 1, length)  # before the ring is full, its first `step + 1` slots
            with jax.named_scope(EQUALLY):
                out_PGKRh = jax.lax.switch((filled * PARTS - 1) // length, parts, q_PGKRh, k_LBTKh, v_LBTKh)
        return out_PGKRh.reshape(q_B1Hh.shape), Cache(k_LBTKh=k_LBTKh, v_LBTKh=v_LBTKh)

    return attend


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) * (offset + scale) over the last axis or axes (arXiv 1910.07467).

    It is computed in float32, and the result has the dtype of x.

    Attributes:
      eps: what is added to the mean square.
      axes: logical axes of the parameter `scale`, as many as the last axes of x that are normalised together
        (`parallel/sharding.py`).
      offset: what is added to `scale`, whose initial value is 1 − `offset`.
    """

    eps: float
    axes: Axes
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = len(self.axes)
        init = nn.with_logical_partitioning(nn.initializers.constant(1.0 - self.offset), self.axes)
        scale: Any = self.param("scale", init, x.shape[x.ndim - n :], jnp.float32)
        if self.offset:
            scale = self.offset + scale
        y = x.astype(at_least_float32(x.dtype))
        together = tuple(range(x.ndim - n, x.ndim))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=together, keepdims=True) + self.eps)
        return (y * scale.reshape((1,) * (x.ndim - n) + scale.shape)).astype(x.dtype)


class Projection(nn.Module):
    """A linear map: contracts the last axes of x, of sizes `inputs`, with a kernel of shape `inputs + outputs`.

    Attributes:
      inputs: sizes of the contracted axes.
      outputs: sizes of the new axes.
      axes: logical axes of the kernel (`parallel/sharding.py`).
      dtype: dtype of the matrix product.
      bias: whether a bias of shape `outputs` is added.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: Axes
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n_in, n_out, rows = math.prod(self.inputs), math.prod(self.outputs), x.shape[: x.ndim - len(self.inputs)]
        init = nn.initializers.normal(0.02)
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            self.inputs + self.outputs,
            jnp.float32,
        )
        # Multiply reshaped matrices: with separate axes, XLA on CPU transposes and copies both operands of the kernel's
        # gradient, which is a sum over [B, T].
        y = x.astype(self.dtype).reshape(-1, n_in) @ kernel.astype(self.dtype).reshape(n_in, n_out)
        y = y.reshape(rows + self.outputs)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.inputs) :])
            bias: Any = self.param("bias", zeros, self.outputs, jnp.float32)
            bias = bias.astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class Block(nn.Module):
    """One layer: attention, then the gated MLP, each with its norms, added to the residual stream.

    A call takes x [B, T, D], positions [B, T], an `Attend`, the logical axes of x, and the layer's `Kind` if layers
    differ. It returns x [B, T, D] and the value that the `Attend` keeps. The axes decide what is gathered over `fsdp`:
    with `BY_BATCH` the weights are, with `BY_EMBED` x is.

    Attributes:
      config: sizes of the model.
      dtype: dtype of matrix products.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        attend: Attend,
        axes: Axes = BY_BATCH,
        kind: Kind | None = None,
    ):
        c = self.config
        project = functools.partial(Projection, dtype=self.dtype)
        norm = functools.partial(RMSNorm, c.norm_eps, offset=c.norm_offset)
        y_BTD = norm(("embed",), name="attn_norm")(x_BTD) if c.pre_norm else x_BTD
        heads, kv_heads = (c.n_heads, c.head_dim), (c.n_kv_heads, c.head_dim)
        qkv_axes, kv_axes = ("embed", "heads", None), ("embed", "kv_heads", None)
        q_BTHh = project((c.d_model,), heads, qkv_axes, bias=c.qkv_bias, name="q")(y_BTD)
        k_BTKh = project((c.d_model,), kv_heads, kv_axes, bias=c.qkv_bias, name="k")(y_BTD)
        v_BTKh = project((c.d_model,), kv_heads, kv_axes, bias=c.qkv_bias, name="v")(y_BTD)
        if c.qk_norm:
            q_BTHh = norm(("heads", None) if c.qk_norm_joint else (None,), name="q_norm")(q_BTHh)
            k_BTKh = norm(("kv_heads", None) if c.qk_norm_joint else (None,), name="k_norm")(k_BTKh)
        if c.query_scalar and c.query_scalar != c.head_dim:  # every `Attend` divides scores by √h
            q_BTHh = q_BTHh * jnp.asarray(math.sqrt(c.head_dim / c.query_scalar), q_BTHh.dtype)
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling) if kind is None else kind.frequencies
        q_BTHh = constrain(rotate(q_BTHh, positions_BT, frequencies), "batch", None, "heads", None)
        k_BTKh = rotate(k_BTKh, positions_BT, frequencies)
        out_BTHh, kept = attend(q_BTHh, k_BTKh, v_BTKh)
        out_BTHh = constrain(out_BTHh, "batch", None, "heads", None)
        o_axes = ("heads", None, "embed")
        y_BTD = project(heads, (c.d_model,), o_axes, name="o")(out_BTHh)
        if c.post_norm:
            y_BTD = norm(("embed",), name="attn_post_norm")(y_BTD)
        x_BTD = constrain(x_BTD + y_BTD, *axes)
        y_BTD = norm(("embed",), name="mlp_norm")(x_BTD) if c.pre_norm else x_BTD
        gate_BTF = project((c.d_model,), (c.d_mlp,), ("embed", "mlp"), name="gate")(y_BTD)
        up_BTF = project((c.d_model,), (c.d_mlp,), ("embed", "mlp"), name="up")(y_BTD)
        h_BTF = constrain(ACTIVATIONS[c.activation](gate_BTF) * up_BTF, axes[0], None, "mlp")
        y_BTD = project((c.d_mlp,), (c.d_model,), ("mlp", "embed"), name="down")(h_BTF)
        if c.post_norm:
            y_BTD = norm(("embed",), name="mlp_post_norm")(y_BTD)
        return constrain(x_BTD + y_BTD, *axes), kept


class Decoder(nn.Module):
    """The language model.

    Attributes:
      config: sizes of the model.
      dtype: dtype of matrix products, hidden states and the KV cache.
      remat: the activations of `hidden` that are saved for its backward pass. "none": all. "full": the input of each
        layer, and the attention outputs named `KEPT`. "dots": also the results of matrix products without batch axes.
      attention: attention of whole sequences and of prompts.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: Attention = causal_attention

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (c.vocab_size, c.d_model),
            jnp.float32,
        )
        self.layers = Block(c, self.dtype)
        self.norm = RMSNorm(c.norm_eps, ("embed",), c.norm_offset)
        if not c.tied:
            self.unembedding: Any = self.param(
                "unembedding",
                nn.with_logical_partitioning(init, ("embed", "vocab")),
                (c.d_model, c.vocab_size),
                jnp.float32,
            )

    def _scan(self, body: Callable[..., Any], carry: Any, xs: Any = None) -> tuple[Any, Any]:
        """Scans `body(block, carry, (x, kind))` over the layers; x is the layer's slice of `xs`, `kind` its `Kind`."""
        return nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.layers, carry, (xs, kinds(self.config)))

    def embed(self, tokens_BT: jax.Array, axes: Axes = BY_BATCH) -> jax.Array:
        """Embeds tokens.

        Args:
          tokens_BT: token ids [B, T], from 0 to V − 1; an id of V or more gives NaN.
          axes: logical axes of the result.

        Returns:
          the input of the first layer [B, T, D], in `dtype`.
        """
        # Without these constraints XLA gathers x over `data`. With a tied lm_head, whose gradient is split by
        # vocabulary, it also gathers the gradient of x in order to scatter it by vocabulary.
        table_VD = constrain(self.embedding, "vocab", "embed")
        x_BTD = jnp.take(table_VD, constrain(tokens_BT, "rows", None), axis=0).astype(self.dtype)
        if self.config.scaled_embedding:
            x_BTD = x_BTD * jnp.asarray(math.sqrt(self.config.d_model), self.dtype)
        return constrain(constrain(x_BTD, *BY_EMBED), *axes)

    def __call__(self, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """Logits of the next token at every position of whole left-padded sequences.

        Args:
          tokens_BT: token ids [B, T].
          valid_BT: mask [B, T]: True at real tokens, False at padding.

        Returns:
          logits [B, T, V], float32 (float64 if `dtype` is); those at padding have no meaning.

        Raises:
          KeyError: if `remat` is neither "none" nor a key of `REMAT`.
        """
        return self.logits(self.hidden(tokens_BT, valid_BT))

    def hidden(self, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """Hidden states after the final norm, of whole left-padded sequences.

        Args:
          tokens_BT: token ids [B, T].
          valid_BT: mask [B, T]: True at real tokens, False at padding.

        Returns:
          hidden states [B, T, D], in `dtype`; those at padding have no meaning.

        Raises:
          KeyError: if `remat` is neither "none" nor a key of `REMAT`.
        """
        return self.packed_hidden(tokens_BT, Grouped(valid_BT, valid_BT.shape[1]))

    def packed_hidden(self, tokens_RS: jax.Array, rows: Grouped) -> jax.Array:
        """Hidden states after the final norm, of packed rows.

        Args:
          tokens_RS: token ids, from `Grouped.pack`.
          rows: how the rows are packed.

        Returns:
          hidden states [R, S, D], in `dtype`; those at padding have no meaning.

        Raises:
          KeyError: if `remat` is neither "none" nor a key of `REMAT`.
        """
        positions_RS = rows.positions()

        def body(block: Block, x_RSD: jax.Array, xs: tuple[None, Kind | None]) -> tuple[jax.Array, None]:
            x_RSD, _ = block(x_RSD, positions_RS, rows.attend(of_kind(self.attention, xs[1])), kind=xs[1])
            return x_RSD, None

        if self.remat != "none":
            body = nn.remat(body, prevent_cse=False, policy=REMAT[self.remat])
        x_RSD, _ = self._scan(body, self.embed(tokens_RS))
        return self.norm(x_RSD)

    def through_heads(
        self, x_BTD: jax.Array, valid_BT: jax.Array, change: ChangeHeads | None = None, given: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs whole left-padded sequences, returns the output of every head, and lets the caller change it.

        The output of a head is o_h, before its part of the output projection W_O. Later layers see the changed outputs.

        Args:
          x_BTD: the input of the first layer, from `embed`.
          valid_BT: mask [B, T]: True at real tokens, False at padding.
          change: called once a layer with the outputs of its heads and the layer's slice of `given`; None: none.
          given: a tree of arrays with a leading axis L, or None.

        Returns:
          hidden states after the final norm [B, T, D], and the outputs of the heads, after the change
          [L, B, T, H, h]. Both are in `dtype`; those at padding have no meaning.

        Raises:
          KeyError: if `remat` is neither "none" nor a key of `REMAT`.
        """
        positions_BT = positions_of(valid_BT)

        def body(block: Block, x_BTD: jax.Array, xs: tuple[Any, Kind | None]) -> tuple[jax.Array, jax.Array]:
            attend = changing(of_kind(self.attention, xs[1])(valid_BT), change, xs[0])
            return block(x_BTD, positions_BT, attend, kind=xs[1])

        if self.remat != "none":
            body = nn.remat(body, prevent_cse=False, policy=REMAT[self.remat])
        x_BTD, heads_LBTHh = self._scan(body, x_BTD, given)
        return self.norm(x_BTD), heads_LBTHh

    def lm_head(self) -> jax.Array:
        """The unembedding matrix [D, V], float32.

        A caller that computes logits in a loop makes it once, before the loop.
        """
        kernel_DV = self.embedding.T if self.config.tied else self.unembedding
        return constrain(kernel_DV, None, "vocab_split")

    def logits(self, x_BTD: jax.Array, lm_head_DV: jax.Array | None = None) -> jax.Array:
        """Logits of hidden states after the final norm.

        Hidden states are gathered over `fsdp`, and each device computes the logits of its part of the vocabulary. The
        matrix and its gradient stay where they are, because they are many times larger than a chunk of hidden states.

        Args:
          x_BTD: hidden states [..., D]; in a mesh they have at least one axis before D.
          lm_head_DV: the matrix that `lm_head` made; None: it is made here.

        Returns:
          logits [..., V], float32 (float64 if `dtype` is).

        Raises:
          ValueError: in a mesh, if the hidden states have no axis before D.
        """
        kernel_DV = self.lm_head() if lm_head_DV is None else lm_head_DV
        whole = (None,) * (x_BTD.ndim - 1)
        x_XD = constrain(x_BTD.astype(self.dtype), "rows", *whole).reshape(-1, x_BTD.shape[-1])
        wide = at_least_float32(self.dtype)
        logits_XV = jax.lax.dot(x_XD, kernel_DV.astype(self.dtype), preferred_element_type=wide)
        logits_BTV = logits_XV.reshape(x_BTD.shape[:-1] + kernel_DV.shape[1:])
        return constrain(logits_BTV, "rows", *whole[1:], "vocab_split")

    def normed_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of hidden states before the final norm.

        Args:
          x_BTD: the output of the last layer [B, T, D].

        Returns:
          logits [B, T, V], float32 (float64 if `dtype` is).
        """
        return self.logits(self.norm(x_BTD))

    def prefill(self, tokens_PT: jax.Array, valid_PT: jax.Array) -> tuple[jax.Array, Prefix]:
        """Runs prompts.

        Args:
          tokens_PT: left-padded prompts, token ids [P, Tp].
          valid_PT: True at real tokens [P, Tp].

        Returns:
          the hidden state of the last token after the final norm [P, D], and the keys, which RoPE has rotated, and
          values (`Prefix`). All are in `dtype`.
        """
        positions_PT = positions_of(valid_PT)

        def body(block: Block, x_PTD: jax.Array, xs: tuple[None, Kind | None]):
            return block(x_PTD, positions_PT, keeping(of_kind(self.attention, xs[1])(valid_PT)), kind=xs[1])

        x_PTD, (k, v) = self._scan(body, self.embed(tokens_PT))
        return self.norm(x_PTD[:, -1]), Prefix(k_LPTKh=k, v_LPTKh=v, valid_PT=valid_PT)

    def decode(
        self, tokens_B: jax.Array, step: jax.Array, start_P: jax.Array, prefix: Prefix, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs one token of every completion.

        Args:
          tokens_B: the token ids [B], by prompt: row b belongs to prompt b // G, with G = B / P. A row's token has the
            index step − start in its completion, counted from 0.
          step: the current step of the decoding loop, from 0, an int32 scalar.
          start_P: the step at which each prompt's completions began [P], at most `step`.
          prefix: keys and values of the prompts.
          cache: keys and values of the completions so far, in its first B rows.

        Returns:
          the hidden state of the token after the final norm [B, D], in `dtype`, and the cache with the token in it.

        Raises:
          TypeError: if B is not a multiple of P, or if the cache has no slots.
        """
        group = tokens_B.shape[0] // prefix.valid_PT.shape[0]
        length_P = jnp.sum(prefix.valid_PT, axis=-1, dtype=jnp.int32)
        positions_B1 = jnp.repeat(length_P + step - start_P, group)[:, None]

        def body(block: Block, carry: Any, xs: Any):
            x_B1D, cache, layer = carry
            (prefix_k, prefix_v), kind = xs
            window = None if kind is None else kind.window
            attend = cached_attention(prefix_k, prefix_v, prefix.valid_PT, cache, layer, step, start_P, window)
            x_B1D, cache = block(x_B1D, positions_B1, attend, BY_EMBED, kind)
            return (x_B1D, cache, layer + 1), None

        carry = (self.embed(tokens_B[:, None], BY_EMBED), cache, jnp.zeros_like(step))
        (x_B1D, cache, _), _ = self._scan(body, carry, (prefix.k_LPTKh, prefix.v_LPTKh))
        return self.norm(x_B1D[:, 0]), cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of zeros, in `dtype`.

        Args:
          batch: number of completions B.
          length: tokens of the longest completion Tc, 1 or more.
        """
        c = self.config
        shape = (c.n_layers, batch, length, c.n_kv_heads, c.head_dim)
        zeros = constrain(jnp.zeros(shape, self.dtype), None, "batch", None, "kv_heads", None)
        return Cache(k_LBTKh=zeros, v_LBTKh=zeros)


def param_shapes(model: Decoder) -> Any:
    """Shapes of the parameters; nothing is computed.

    Returns:
      the parameter tree of `jax.ShapeDtypeStruct`s, float32, each in a `LogicallyPartitioned` box with its logical
      axes. `flax.linen.unbox` takes the boxes off. Parameters of layers have a leading axis L.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(model.init, tokens_BT=tokens, valid_BT=tokens == 0)
    return jax.eval_shape(init, jax.random.key(0))["params"]
