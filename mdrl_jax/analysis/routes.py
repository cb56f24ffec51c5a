"""Active routes: the MLP neurons and attention heads that a domain uses (definitions §5, claim C4).

`probe.py` compiles `activity` and `neuron_products`; `checkpoint_figures.py` turns their results into figures.

The score of neuron c of a layer on a domain is a_c = E_tokens |h_c| · ‖W_down[c,:]‖ [chosen]. The score of an attention
head is E_tokens ‖o_h W_O^h‖. The expectation is over the positions that predict the tokens of the model's own
completions, for all completions and for those that succeeded. The route of a domain is the top 10 % of each layer.
Activity is summed by block of prompts, so that routes of half of the blocks can be compared too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mdrl_jax.model.rope import positions_of
from mdrl_jax.model.transformer import Block, Decoder, Projection, kinds, of_kind
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order.objectives import CompletionBatch

SHARE = 0.1
WHICH = ("all", "correct")  # which completions count: all, or those with the full reward


@dataclasses.dataclass(frozen=True)
class Activity:
    """Sums of activity over tokens, for each of M blocks of prompts and each of `WHICH`.

    Attributes:
      neurons: Σ |h_c| · ‖W_down[c,:]‖ of each neuron, [M, 2, L, F].
      heads: Σ ‖o_h W_O^h‖ of each head, [M, 2, L, H].
      tokens: the number of tokens that the sums are over, [M, 2].
    """

    neurons: np.ndarray
    heads: np.ndarray
    tokens: np.ndarray

    def scores(self, which: str, kind: str, keep_M: np.ndarray | None = None) -> np.ndarray:
        """The score of every neuron or head: its mean activity over the tokens of some completions.

        Args:
          which: the completions, one of `WHICH`.
          kind: "neurons" or "heads".
          keep_M: true for the blocks of prompts that count; None for all.

        Returns:
          the scores of all neurons [L, F] or heads [L, H]; zeros if there are no tokens.

        Raises:
          ValueError: if `which` is not one of `WHICH`.
          AttributeError: if `kind` is neither of the two.
        """
        keep = np.ones(self.tokens.shape[0], bool) if keep_M is None else keep_M
        w = WHICH.index(which)
        total = getattr(self, kind)[keep, w].sum(axis=0)
        return total / max(float(self.tokens[keep, w].sum()), 1.0)


def activity(model: Decoder, attend: Any, params: Any, rows: CompletionBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of activity over the completion tokens of one block of prompts.

    Args:
      model: the decoder.
      attend: valid_BT -> the attention of whole sequences, for example `attention.plain`.
      params: its parameters.
      rows: the completions of the block.

    Returns:
      Σ |h_c|·‖W_down[c,:]‖ of each neuron [2, L, F], Σ ‖o_h W_O^h‖ of each head [2, L, H], and the number of tokens
      that the sums are over [2]. The first axis is `WHICH`: all completions, and those that succeeded. Each token
      counts at the position that predicts it. Rows of weight 0 do not count.
    """
    reach_LF = jnp.sqrt(jnp.sum(jnp.square(params["layers"]["down"]["kernel"]), axis=2))
    weights_BT = rows.mask_BT * rows.weight_B[:, None]
    weights_2BT = jnp.stack([weights_BT, weights_BT * rows.success_B[:, None]])
    n = rows.mask_BT.shape[1]
    neurons, heads = _layers(model, attend, params, rows.tokens_BT, rows.valid_BT, weights_2BT, n)
    return jnp.moveaxis(neurons, 0, 1) * reach_LF[None], jnp.moveaxis(heads, 0, 1), jnp.sum(weights_2BT, (1, 2))


def _layers(model: Decoder, attend: Any, params: Any, tokens_BT: Any, valid_BT: Any, weights_2BT: Any, n: int) -> Any:
    """Σ_tokens |h| [L, 2, F] and Σ_tokens ‖o_h W_O^h‖ [L, 2, H], over the positions that predict the last n tokens."""
    block = Block(model.config, model.dtype)
    positions_BT = positions_of(valid_BT)

    def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, kind = layer
        seen: dict[str, jax.Array] = {}

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, Projection):
                seen[str(context.module.name)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            attends = of_kind(attend, kind)(valid_BT)
            out: Any = block.apply({"params": weights}, x_BTD, positions_BT, attends, kind=kind)
        h_BTF = jnp.abs(seen["down"][:, -n - 1 : -1].astype(jnp.float32))
        o_BTHh = seen["o"][:, -n - 1 : -1].astype(jnp.float32)
        # ‖o W‖² = o (W Wᵀ) oᵀ needs no array of shape [B, T, H, D].
        kernel_HhD = weights["o"]["kernel"]
        gram_Hhh = jnp.einsum("hid,hjd->hij", kernel_HhD, kernel_HhD)
        size_BTH = jnp.sqrt(jnp.maximum(jnp.einsum("bthi,hij,bthj->bth", o_BTHh, gram_Hhh, o_BTHh), 0.0))
        neurons = jnp.einsum("wbt,btf->wf", weights_2BT, h_BTF)
        return out[0], (neurons, jnp.einsum("wbt,bth->wh", weights_2BT, size_BTH))

    x_BTD: Any = model.apply({"params": params}, tokens_BT, method="embed")
    return jax.lax.scan(body, x_BTD, (params["layers"], kinds(model.config)))[1]


def support(params: Any, neurons_LF: np.ndarray, heads_LH: np.ndarray) -> Any:
    """Which parameters belong to a route of MLP neurons and attention heads, as factors 0 or 1.

    The weights of a head are those of its query and its output. Those of a key-value head belong to the route if one of
    the heads that it serves does [chosen]. Norms and the embedding belong to no route.

    Args:
      params: a tree of all parameters, or of their shapes.
      neurons_LF: true for the neurons of the route.
      heads_LH: true for the heads of the route.

    Returns:
      a tree like `params` of float32 arrays that can be broadcast to its leaves; a scalar 0 for a leaf without part.
    """
    out = jax.tree.map(lambda _: np.zeros((), np.float32), params)
    layers = dict(out["layers"])
    n_layers, n_heads = heads_LH.shape
    kv_heads = params["layers"]["k"]["kernel"].shape[2]
    kv_LK = heads_LH.reshape(n_layers, kv_heads, n_heads // kv_heads).any(axis=2)
    wide = {"gate": (neurons_LF, 2), "up": (neurons_LF, 2), "down": (neurons_LF, 1)}
    wide |= {"q": (heads_LH, 2), "k": (kv_LK, 2), "v": (kv_LK, 2), "o": (heads_LH, 1)}
    for name, (chosen, axis) in wide.items():
        for part, leaf in params["layers"][name].items():
            # The neurons or heads are at `axis` of a kernel, and right after the layers in a bias (of q, k or v).
            at = axis if part == "kernel" else 1
            others = tuple(i for i in range(1, len(leaf.shape)) if i != at)
            layers[name] = layers[name] | {part: np.expand_dims(chosen.astype(np.float32), others)}
    return out | {"layers": layers}


def _inside(x: Any, support: Any) -> Any:
    return jax.tree.map(jnp.multiply, x, support)


# (tree of parameters, support) -> the tree with zeros off the support; and the same for a block, leaves [b, ...].
inside = program("route_inside", _inside)
inside_block = program("route_inside_block", jax.vmap(_inside, in_axes=(0, None)))


def neuron_products(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ of two trees of parameters over the weights of each MLP neuron, [L, F].

    The weights of a neuron are its columns of gate and up, and its row of down.

    Args:
      a, b: two trees like the parameters, such as a gradient and an edit.
    """

    def product(name: str, axis: int) -> jax.Array:
        return jnp.sum(a["layers"][name]["kernel"] * b["layers"][name]["kernel"], axis=axis)

    return product("gate", 1) + product("up", 1) + product("down", 2)
