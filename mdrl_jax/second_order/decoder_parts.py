"""Splits the decoder into three functions, embed, layer and head, so that derivatives can work inside its layer scan.

`Decoder` scans over its layers by itself, so a caller of it cannot reach a single layer. With the functions of this
file, `jets.py` pushes tangents through one layer at a time, and `log_probs` can be differentiated with respect to a few
neurons. `objectives.py` makes the losses from `log_probs`.

Every function takes two trees. Derivatives are taken with respect to the `point`; what is in `fixed` is constant.

- `whole`: the point is the tree of all parameters, and `fixed` is ().
- `on_route`: the point has the weights of up to R MLP neurons of each layer, the neurons of a route (`route_slice`,
  definitions §5). `fixed` has all parameters, and marks the neurons that are not in the slice (`route_fixed`).

`on_route` uses that the output of a gated MLP is a sum over its neurons c, here with the activation silu,

    MLP(y) = Σ_c silu(y·W_gate[:, c]) (y·W_up[:, c]) W_down[c, :].

The full MLP runs with the neurons of the slice set to zero, and a narrow MLP adds their part. Gradients, Hessian
products and Lanczos vectors then have only the 3·L·D·R entries of the slice, and no derivative is scattered into an
array as large as the parameters.

Letters of shapes beyond those of definitions §1: R neurons of a slice, C positions of a chunk, X rows times positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mdrl_jax.model import attention
from mdrl_jax.model.attention import Attention
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.transformer import ACTIVATIONS, BY_BATCH, REMAT, Block, Decoder, Kind, Projection, kinds, of_kind
from mdrl_jax.parallel.sharding import Names, constrain, dividing
from mdrl_jax.rl.logprobs import SLOPE, over_chunks

Tree = Any


@dataclasses.dataclass(frozen=True)
class DecoderParts:
    """The pieces of a decoder, from `whole` or `on_route`.

    Attributes:
      embed: (point, fixed, tokens_BT) -> the input of the first layer, x_BTD.
      layers: (point, fixed) -> two trees with a leading axis L, which the layer scan runs over: the part of the point
        that belongs to each layer, and the part of `fixed` that does.
      layer: (layer of the point, layer of `fixed`, x_RSD, rows) -> the output of the layer, x_RSD; `rows`, a `Grouped`,
        says how the rows are packed.
      head: (point, fixed, x_BCD, targets_BC, temperature) -> log-probs of the target tokens [B, C], in nats, from
        outputs of the last layer.
      policy: a policy of `jax.checkpoint`. It says what a layer keeps for the backward pass besides its input. None:
        the layer keeps everything.
      fixed_head: True if the head does not depend on the point. `log_probs` then differentiates the head in the forward
        pass (`_by_slope`).
    """

    embed: Callable[..., jax.Array]
    layers: Callable[..., tuple[Tree, Tree]]
    layer: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    policy: Callable[..., Any] | None
    fixed_head: bool = False


# Checkpoint name of what attention adds to the residual stream. From it and the layer's input, the backward pass gets
# the input of the MLP without running attention forward again.
MIDDLE = "middle"
_middle = jax.checkpoint_policies.save_only_these_names(MIDDLE)


def whole(model: Decoder, attend: Attention = attention.plain) -> DecoderParts:
    """The decoder as a function of all its parameters, which are the point; `fixed` is ().

    Args:
      model: the decoder; its `remat` decides what layers keep for the backward pass.
      attend: valid_BT -> the attention of whole sequences, for example `attention.plain`. It takes the place of the
        model's own attention, and must be differentiable twice if second derivatives are taken (definitions §6).

    Returns:
      the pieces. Their point is a tree like the parameters.
    """
    block = Block(model.config, model.dtype)

    def layer(point: Tree, fixed: Tree, x_BTD: jax.Array, rows: Grouped) -> jax.Array:
        return _run(block, point, x_BTD, rows, attend, fixed)

    return DecoderParts(
        embed=lambda point, fixed, tokens_BT: _embed(model, point, tokens_BT),
        layers=lambda point, fixed: (point["layers"], kinds(model.config)),
        layer=layer,
        head=lambda point, fixed, *rest: _head(model, point, *rest),
        policy=REMAT.get(model.remat),
    )


def on_route(model: Decoder, attend: Attention = attention.plain) -> DecoderParts:
    """The decoder as a function of some MLP neurons: the point is a `route_slice`, and `fixed` is a `route_fixed`.

    The two arrays that a layer keeps under `remat` "full", its input and `MIDDLE`, are split along D over the devices
    that share the MLP neurons, if these divide D.

    Args:
      model: the decoder; its `remat` decides what layers keep for the backward pass.
      attend: as in `whole`.

    Returns:
      the pieces.
    """
    block = Block(model.config, model.dtype)

    def split(x_BTD: jax.Array) -> jax.Array:
        return constrain(x_BTD, "batch", None, dividing("mlp", x_BTD.shape[-1]))

    def layer(point: Tree, fixed: Tree, x_BTD: jax.Array, rows: Grouped) -> jax.Array:
        weights, keep_F, kind = fixed
        entered: dict[str, jax.Array] = {}

        def around(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = context.module.name if isinstance(context.module, Projection) else None
            if name == "gate":
                entered["mlp"] = args[0]
            if name == "o":
                # Constrain the sum over devices to whole rows first, and split it then. If it is constrained to the
                # split form directly, XLA (jaxlib 0.10) returns rows in the wrong places.
                return checkpoint_name(split(constrain(call(*args, **kwargs), *BY_BATCH)), MIDDLE)
            if name != "down":
                return call(*args, **kwargs)
            rest = call(args[0] * keep_F.astype(args[0].dtype)[None, None, :])
            return rest + _narrow(point, entered["mlp"], model.config.activation)

        with nn.intercept_methods(around):
            # Constrain twice: with one constraint XLA all-gathers the saved activation.
            return split(_run(block, weights, constrain(split(x_BTD), *BY_BATCH), rows, attend, kind))

    return DecoderParts(
        embed=lambda point, fixed, tokens_BT: split(_embed(model, fixed["params"], tokens_BT)),
        layers=lambda point, fixed: (point, (fixed["params"]["layers"], fixed["keep_LF"], kinds(model.config))),
        layer=layer,
        head=lambda point, fixed, *rest: _head(model, fixed["params"], *rest),
        policy=_middle if model.remat == "full" else REMAT.get(model.remat),
        fixed_head=True,
    )


def route_slice(tree: Tree, index_LR: jax.Array, mask_LR: jax.Array) -> Tree:
    """Takes the weights of some MLP neurons out of a tree.

    A route can have a different number of neurons in each layer, so shorter layers are padded. A padded place has zero
    weights in all three tensors. The model's first and second derivatives with respect to these weights are zero too,
    because each neuron's output is a product of all three.

    Args:
      tree: parameters, or a tree like them, such as an edit.
      index_LR: the neurons of each layer, any number at padded places. No neuron may occur twice in a layer; this is
        not checked.
      mask_LR: 1 for neurons, 0 at padded places.

    Returns:
      {"gate": [L, D, R], "up": [L, D, R], "down": [L, R, D]}, in the wider dtype of weights and mask, sharded by
      `route_axes`.
    """
    layers = tree["layers"]
    mask_L1R, mask_LR1 = mask_LR[:, None, :], mask_LR[:, :, None]
    columns = jax.vmap(lambda kernel_DF, index_R: kernel_DF[:, index_R])
    gate, up = (columns(layers[name]["kernel"], index_LR) * mask_L1R for name in ("gate", "up"))
    down = jax.vmap(lambda kernel_FD, index_R: kernel_FD[index_R])(layers["down"]["kernel"], index_LR) * mask_LR1
    axes, slices = route_axes(index_LR.shape[1]), {"gate": gate, "up": up, "down": down}
    return {name: constrain(x, *axes[name]) for name, x in slices.items()}


def route_support(part: Tree, mask_LR: np.ndarray) -> Tree:
    """A tree like a `route_slice`, on the host: 1 at the weights of neurons and 0 at padded places.

    Args:
      part: a route slice, or a tree of its shapes.
      mask_LR: as in `route_slice`.

    Returns:
      the tree, NumPy arrays with the dtype of the mask. They are read-only views of the mask.
    """
    masks = {"gate": mask_LR[:, None, :], "up": mask_LR[:, None, :], "down": mask_LR[:, :, None]}
    return {name: np.broadcast_to(masks[name], x.shape) for name, x in part.items()}


def route_axes(width: int) -> dict[str, Names]:
    """Logical axes of a `route_slice` with `width` neurons a layer.

    The axis D is "embed". The axis R of the neurons is "mlp" if the current mesh divides `width`; otherwise, and
    outside a mesh, it is not split.

    Returns:
      "gate", "up" or "down" -> one logical axis for each of the tensor's three axes, a name or None: not split.
    """
    neurons = dividing("mlp", width)
    into = (None, "embed", neurons)
    return {"gate": into, "up": into, "down": (None, neurons, "embed")}


def lift(point: Tree, index_LR: jax.Array, mask_LR: jax.Array, like: Tree) -> Tree:
    """Puts a route slice into a tree of zeros like the parameters; this is the adjoint of `route_slice`.

    Entries at padded places, which the model does not use, are dropped.

    Args:
      point: a tree like a `route_slice`.
      index_LR: as in `route_slice`.
      mask_LR: as in `route_slice`.
      like: a tree of arrays with the shapes and dtypes of the parameters; its values are not used.

    Returns:
      a tree like `like`: the slice at the weights of its neurons, and 0 everywhere else.
    """
    zeros = jax.tree.map(jnp.zeros_like, like)
    columns = jax.vmap(lambda x_DF, index_R, mask_R, z_DR: x_DF.at[:, index_R].add(z_DR * mask_R[None, :]))
    rows = jax.vmap(lambda x_FD, index_R, mask_R, z_RD: x_FD.at[index_R].add(z_RD * mask_R[:, None]))
    put = {"gate": columns, "up": columns, "down": rows}
    layers = dict(zeros["layers"])
    for name, add in put.items():
        layers[name] = {**layers[name], "kernel": add(layers[name]["kernel"], index_LR, mask_LR, point[name])}
    return {**zeros, "layers": layers}


def route_fixed(params: Tree, index_LR: jax.Array, mask_LR: jax.Array) -> Tree:
    """What `on_route` holds constant.

    Args:
      params: all parameters.
      index_LR: as in `route_slice`.
      mask_LR: as in `route_slice`.

    Returns:
      {"params": the parameters, "keep_LF": 1 for each neuron that is not in the slice, and 0 for the others, float32}.
    """
    n_layers, _, width = params["layers"]["gate"]["kernel"].shape
    taken = jax.vmap(lambda index_R, mask_R: jnp.zeros(width, jnp.float32).at[index_R].max(mask_R))(index_LR, mask_LR)
    return {"params": params, "keep_LF": constrain(1.0 - taken, None, "mlp")}


def log_probs(
    parts: DecoderParts, point: Tree, fixed: Tree, tokens_BT: jax.Array, valid_BT: jax.Array,
    *, start: int, temperature: float, chunk: int = 0, group: int = 1,
) -> jax.Array:  # fmt: skip
    """log π(token_t | tokens before t) for all t >= `start`, like `rl.logprobs.token_log_probs`.

    Args:
      parts: the pieces of the decoder.
      point: what derivatives may be taken with respect to.
      fixed: what is constant.
      tokens_BT: token ids of left-padded rows.
      valid_BT: True at real tokens, False at padding.
      start: the first position t, at least 1.
      temperature: divides the logits; above 0.
      chunk: number of positions whose logits are computed at a time; 0: all positions at once.
      group: number of rows, in succession, that have the same first `start` tokens, which are computed once for them.

    Returns:
      log-probs in nats [B, T - start]. At padding their values have no meaning. With the pieces of `on_route` they have
      no forward mode: `jax.jvp` raises TypeError, but `jax.grad`, and `jax.jvp` of `jax.grad`, work.

    Raises:
      ValueError: if `start` is below 1, or `group` does not divide the number of rows.
    """
    scanned, rows = parts.layers(point, fixed), Grouped(valid_BT, start, group)

    def body(x_RSD: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        return parts.layer(*layer, x_RSD, rows), None

    if parts.policy is not None:
        body = jax.checkpoint(body, prevent_cse=False, policy=parts.policy)
    x_RSD, _ = jax.lax.scan(body, parts.embed(point, fixed, rows.pack(tokens_BT)), scanned)
    head = functools.partial(_by_slope, parts.head) if parts.fixed_head else parts.head
    one = lambda x_BCD, targets_BC: head(point, fixed, x_BCD, targets_BC, temperature)  # noqa: E731
    return over_chunks(one, (rows.predicting(x_RSD), tokens_BT[:, start:]), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _by_slope(
    head: Any, point: Tree, fixed: Tree, x_BCD: jax.Array, targets_BC: jax.Array, temperature: float
) -> jax.Array:
    """`head`, with its derivative with respect to the hidden states computed in the forward pass.

    A log-prob depends on a single hidden state, so its derivative is one vector, the slope [D], and the backward pass
    is slope times incoming gradient. This takes two products with the lm_head. A backward pass that recomputes the
    logits takes three. The gradients with respect to `point` and `fixed` are taken to be zero.

    Second derivatives must be taken as forward over reverse (`jax.jvp` of `jax.grad`), because a `custom_vjp` has no
    forward mode of its own.
    """
    return head(point, fixed, x_BCD, targets_BC, temperature)


def _slope_forward(head: Any, point: Tree, fixed: Tree, x_BCD: Any, targets_BC: Any, temperature: float) -> Any:
    logp_BC, pull_back = jax.vjp(lambda x: head(point, fixed, x, targets_BC, temperature), x_BCD)
    (slope_BCD,) = pull_back(jnp.ones_like(logp_BC))
    return logp_BC, checkpoint_name(slope_BCD, SLOPE)


def _slope_backward(head: Any, temperature: float, slope_BCD: jax.Array, g_BC: jax.Array) -> Any:
    return None, None, g_BC[:, :, None].astype(slope_BCD.dtype) * slope_BCD, None


_by_slope.defvjp(_slope_forward, _slope_backward)


def _run(
    block: Block, weights: Tree, x_BTD: jax.Array, rows: Grouped, attend: Attention, kind: Kind | None
) -> jax.Array:
    attends = rows.attend(of_kind(attend, kind))
    out: Any = block.apply({"params": weights}, x_BTD, rows.positions(), attends, kind=kind)
    return out[0]


def _narrow(point: Tree, y_BTD: jax.Array, activation: str) -> jax.Array:
    """The part of the MLP's output that comes from the neurons of a slice; y is the MLP's input."""
    gate, up, down = (point[name].astype(y_BTD.dtype) for name in ("gate", "up", "down"))
    y_XD = y_BTD.reshape(-1, y_BTD.shape[-1])  # multiply matrices, for the reason given in `Projection`
    return ((ACTIVATIONS[activation](y_XD @ gate) * (y_XD @ up)) @ down).reshape(y_BTD.shape)


def _embed(model: Decoder, params: Tree, tokens_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens_BT, method="embed")  # type: ignore


def _head(model: Decoder, params: Tree, x_BCD: jax.Array, targets_BC: jax.Array, temperature: float) -> jax.Array:
    logits_BCV: Any = model.apply({"params": params}, x_BCD, method="normed_logits")
    logits_BCV = logits_BCV / temperature
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
