"""The decoder: all families of `families.py` as one Flax Linen module, pure `apply({"params": params}, ...)`.

Four entry points share one `Block`: `hidden` (whole sequences: training, log-probs), `prefill` (prompts; it returns
their keys and values), `decode` (one token of each completion, after a prompt that a group of completions shares) and
`through_heads` (packed rows; it returns the output of every attention head, and the caller may change it). They
differ only in how a layer attends, so the block gets its attention as an argument, an `Attend`. For whole
sequences and prompts the run chooses one of the forms of `model/attention.py`; a decoded token attends to the cache of
`model/cache.py`.

Sequences are left-padded: `valid_BT` marks real tokens, positions count real tokens from 0, and no token attends to
padding. Layers are stacked along a leading axis and run under `nn.scan`. Master weights are float32. Matrix products
run in `dtype`; norms, softmax, RoPE and logits are computed in float32.

One layer of Llama is x + attention(RMSNorm(x)), then x + W_down(silu(W_gate y) ⊙ W_up y) with y = RMSNorm(x). Other
families add or move norms, and in some the layers differ: by RoPE, or because a layer attends to a window of tokens
only. The scan over layers then also runs over a `Kind` for each layer. Letters of shapes are in definitions §1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mdrl_jax.model.attention import KEPT, Attend, Attention, ChangeHeads, after, causal_attention, changing, keeping
from mdrl_jax.model.cache import Cache, Prefix, cached_attention
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.rope import positions_of, rope_frequencies, rotate
from mdrl_jax.parallel.sharding import constrain
from mdrl_jax.tree import at_least_float32

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Axes = tuple[str | None, ...]
# Two shardings of activations [B, T, D], for many and for few rows (`parallel/sharding.py`).
BY_BATCH: Axes = ("batch", None, None)
BY_EMBED: Axes = ("rows", None, "embed")

_named = jax.checkpoint_policies.save_only_these_names(KEPT)
REMAT: dict[str, Callable[..., Any] | None] = {
    "full": _named,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _named
    ),
}


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
        self,
        x_RQD: jax.Array,
        rows: Grouped,
        change: ChangeHeads | None = None,
        given: Any = None,
        before: Prefix | None = None,
        first: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Runs packed rows, returns the output of every head, and lets the caller change it.

        The output of a head is o_h, before its part of the output projection W_O. Later layers see the changed outputs.

        Args:
          x_RQD: the input of layer `first`, of the tokens from `Grouped.pack` that `before` lacks; that of layer 0 is
            from `embed`.
          rows: how the whole rows are packed.
          change: called once a layer with the outputs of its heads and the layer's slice of `given`; None: none.
          given: a tree of arrays with a leading axis L, or None.
          before: keys and values of the first tokens of the packed rows, from `prefill`; None: x has all tokens.
          first: index of the first layer that is run, a scalar; None: layer 0.

        Returns:
          hidden states after the final norm [R, Q, D], the outputs of the heads after the change [L, R, Q, H, h] (None
          if `first` is given), and the inputs of the layers [L, R, Q, D]. All are in `dtype`; those at padding have no
          meaning.

        Raises:
          KeyError: if `remat` is neither "none" nor a key of `REMAT`.
        """
        positions_RQ = rows.positions()[:, -x_RQD.shape[1] :]
        earlier = None if before is None else (before.k_LPTKh, before.v_LPTKh)

        def body(block: Block, x_RQD: jax.Array, xs: tuple[Any, Kind | None]) -> tuple[jax.Array, Any]:
            (given, earlier, runs), kind = xs
            attend = changing(after(earlier, rows.attend(of_kind(self.attention, kind))), change, given)
            run = lambda block, x_RQD: block(x_RQD, positions_RQ, attend, kind=kind)  # noqa: E731
            if runs is None:
                out_RQD, heads_RQHh = run(block, x_RQD)
                return out_RQD, (heads_RQHh, x_RQD)
            out_RQD = nn.cond(runs, lambda block, x_RQD: run(block, x_RQD)[0], lambda _, x_RQD: x_RQD, block, x_RQD)
            return out_RQD, (None, x_RQD)

        if self.remat != "none":
            body = nn.remat(body, prevent_cse=False, policy=REMAT[self.remat])
        runs = None if first is None else jnp.arange(self.config.n_layers) >= first
        x_RQD, (heads_LRQHh, inputs_LRQD) = self._scan(body, x_RQD, (given, earlier, runs))
        return self.norm(x_RQD), heads_LRQHh, inputs_LRQD

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
