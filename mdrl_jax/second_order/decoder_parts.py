"""The decoder as three functions, embed, layer and head, for what has to work inside its layer scan.

A derivative is taken with respect to a `point`, while `fixed` stays as it is; both are arguments everywhere:

- `whole`: the point is the parameter tree, nothing is fixed;
- `on_route`: the point is a slice of MLP neurons, `route_slice(params, route)`, and fixed is `route_fixed(...)`.
  An MLP is a sum over its neurons, so the slice runs as a narrow MLP of its own beside the rest: gradients,
  Hessian products and Lanczos vectors are as narrow as the slice, and no large array is scattered into.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mdrl_jax.model import attention
from mdrl_jax.model.transformer import BY_BATCH, REMAT, Attend, Block, Decoder, Projection, positions_of
from mdrl_jax.parallel.sharding import Names, constrain, dividing
from mdrl_jax.rl.logprobs import SLOPE, over_chunks

Tree = Any


@dataclasses.dataclass(frozen=True)
class DecoderParts:
    """A decoder in pieces; `layers` gives what the layer scan runs over (leading axis L).

    Attributes:
      embed: (point, fixed, tokens_BT) -> x_BTD.
      layers: (point, fixed) -> (layers of the point, layers of what is fixed).
      layer: (point of the layer, fixed of the layer, x_BTD, valid_BT) -> x_BTD.
      head: (point, fixed, x_BCD, targets_BC, temperature) -> log-probs of the targets [B, C].
      policy: of `jax.checkpoint`: what is kept of a layer beside its input; None: everything.
      fixed_head: whether the head has nothing of the point: its slopes are then taken in the forward pass.
    """

    embed: Callable[..., jax.Array]
    layers: Callable[..., tuple[Tree, Tree]]
    layer: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    policy: Callable[..., Any] | None
    fixed_head: bool = False


MIDDLE = "middle"  # what attention adds to the stream, projected: of a narrow slice's layer no more need be kept
_middle = jax.checkpoint_policies.save_only_these_names(MIDDLE)


def whole(model: Decoder, attend: Callable[[jax.Array], Attend] = attention.plain) -> DecoderParts:
    """All parameters are the point; `fixed` is ()."""
    block = Block(model.config, model.dtype)

    def layer(point: Tree, fixed: Tree, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
        return _run(block, point, x_BTD, valid_BT, attend)

    return DecoderParts(
        embed=lambda point, fixed, tokens_BT: _embed(model, point, tokens_BT),
        layers=lambda point, fixed: (point["layers"], ()),
        layer=layer,
        head=lambda point, fixed, *rest: _head(model, point, *rest),
        policy=REMAT.get(model.remat),
    )


def on_route(model: Decoder, attend: Callable[[jax.Array], Attend] = attention.plain) -> DecoderParts:
    """The point is a `route_slice`; `fixed` are the whole parameters and the neurons left to them.

    What is kept of a layer, its input and `MIDDLE`, is split over the devices that a layer is split over.
    """
    block = Block(model.config, model.dtype)

    def split(x_BTD: jax.Array) -> jax.Array:
        return constrain(x_BTD, "batch", None, dividing("mlp", x_BTD.shape[-1]))

    def layer(point: Tree, fixed: Tree, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
        weights, keep_F = fixed
        entered: dict[str, jax.Array] = {}

        def around(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = context.module.name if isinstance(context.module, Projection) else None
            if name == "gate":
                entered["mlp"] = args[0]
            if name == "o":
                # Gathered, then split: asked for a sum over devices already split, XLA (jaxlib 0.10) mixes up rows.
                return checkpoint_name(split(constrain(call(*args, **kwargs), *BY_BATCH)), MIDDLE)
            if name != "down":
                return call(*args, **kwargs)
            return call(args[0] * keep_F.astype(args[0].dtype)[None, None, :]) + _narrow(point, entered["mlp"])

        with nn.intercept_methods(around):
            # Said twice how it lies: else what is kept of it is gathered.
            return split(_run(block, weights, constrain(split(x_BTD), *BY_BATCH), valid_BT, attend))

    return DecoderParts(
        embed=lambda point, fixed, tokens_BT: split(_embed(model, fixed["params"], tokens_BT)),
        layers=lambda point, fixed: (point, (fixed["params"]["layers"], fixed["keep_LF"])),
        layer=layer,
        head=lambda point, fixed, *rest: _head(model, fixed["params"], *rest),
        policy=_middle if model.remat == "full" else REMAT.get(model.remat),
        fixed_head=True,
    )


def route_slice(tree: Tree, index_LR: jax.Array, mask_LR: jax.Array) -> Tree:
    """The MLP neurons `index_LR` of parameters, or of an edit: {"gate", "up"} [L, D, R], {"down"} [L, R, D].

    Layers differ in their number of neurons: places where `mask_LR` is 0 hold zeros in all three, at which the first
    and second derivatives of the model are zero too.
    """
    layers = tree["layers"]
    mask_L1R, mask_LR1 = mask_LR[:, None, :], mask_LR[:, :, None]
    columns = jax.vmap(lambda kernel_DF, index_R: kernel_DF[:, index_R])
    gate, up = (columns(layers[name]["kernel"], index_LR) * mask_L1R for name in ("gate", "up"))
    down = jax.vmap(lambda kernel_FD, index_R: kernel_FD[index_R])(layers["down"]["kernel"], index_LR) * mask_LR1
    axes, parts = route_axes(index_LR.shape[1]), {"gate": gate, "up": up, "down": down}
    return {name: constrain(x, *axes[name]) for name, x in parts.items()}


def route_axes(width: int) -> dict[str, Names]:
    """Logical axes of a `route_slice` of so many neurons, under the mesh at hand."""
    neurons = dividing("mlp", width)
    into = (None, "embed", neurons)
    return {"gate": into, "up": into, "down": (None, neurons, "embed")}


def lift(point: Tree, index_LR: jax.Array, mask_LR: jax.Array, like: Tree) -> Tree:
    """A route slice as a whole parameter tree, zero elsewhere: the adjoint of `route_slice`.

    What a vector holds in padded places, where the model does not see it, reaches no neuron.
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
    """What `on_route` keeps fixed: the parameters, and 1 for each neuron [L, F] that is not in the slice."""
    n_layers, _, width = params["layers"]["gate"]["kernel"].shape
    taken = jax.vmap(lambda index_R, mask_R: jnp.zeros(width, jnp.float32).at[index_R].max(mask_R))(index_LR, mask_LR)
    return {"params": params, "keep_LF": constrain(1.0 - taken, None, "mlp")}


def log_probs(
    stack: DecoderParts, point: Tree, fixed: Tree, tokens_BT: jax.Array, valid_BT: jax.Array,
    *, start: int, temperature: float, chunk: int = 0,
) -> jax.Array:  # fmt: skip
    """log π(token_t | tokens before t) for t >= `start`, as `rl.logprobs.token_log_probs`: [B, T - start]."""
    scanned = stack.layers(point, fixed)

    def body(x_BTD: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        return stack.layer(*layer, x_BTD, valid_BT), None

    if stack.policy is not None:
        body = jax.checkpoint(body, prevent_cse=False, policy=stack.policy)
    x_BTD, _ = jax.lax.scan(body, stack.embed(point, fixed, tokens_BT), scanned)
    head = functools.partial(_by_slope, stack.head) if stack.fixed_head else stack.head
    one = lambda x_BCD, targets_BC: head(point, fixed, x_BCD, targets_BC, temperature)  # noqa: E731
    return over_chunks(one, (x_BTD[:, start - 1 : -1], tokens_BT[:, start:]), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _by_slope(
    head: Any, point: Tree, fixed: Tree, x_BCD: jax.Array, targets_BC: jax.Array, temperature: float
) -> jax.Array:
    """`head`, each of whose log-probs depends on one hidden state: two products with the lm_head, where a backward pass
    that makes the logits again has three. Differentiable twice as forward over reverse.
    """
    return head(point, fixed, x_BCD, targets_BC, temperature)


def _slope_forward(head: Any, point: Tree, fixed: Tree, x_BCD: Any, targets_BC: Any, temperature: float) -> Any:
    logp_BC, pull_back = jax.vjp(lambda x: head(point, fixed, x, targets_BC, temperature), x_BCD)
    (slope_BCD,) = pull_back(jnp.ones_like(logp_BC))
    return logp_BC, checkpoint_name(slope_BCD, SLOPE)


def _slope_backward(head: Any, temperature: float, slope_BCD: jax.Array, g_BC: jax.Array) -> Any:
    return None, None, g_BC[:, :, None].astype(slope_BCD.dtype) * slope_BCD, None


_by_slope.defvjp(_slope_forward, _slope_backward)


def _run(block: Block, weights: Tree, x_BTD: jax.Array, valid_BT: jax.Array, attend: Any) -> jax.Array:
    out: Any = block.apply({"params": weights}, x_BTD, positions_of(valid_BT), attend(valid_BT))
    return out[0]


def _narrow(point: Tree, y_BTD: jax.Array) -> jax.Array:
    """SwiGLU of the sliced neurons."""
    gate, up, down = (point[name].astype(y_BTD.dtype) for name in ("gate", "up", "down"))
    y_XD = y_BTD.reshape(-1, y_BTD.shape[-1])  # a matrix, as in `Projection`
    return ((jax.nn.silu(y_XD @ gate) * (y_XD @ up)) @ down).reshape(y_BTD.shape)


def _embed(model: Decoder, params: Tree, tokens_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens_BT, method="embed")  # type: ignore


def _head(model: Decoder, params: Tree, x_BCD: jax.Array, targets_BC: jax.Array, temperature: float) -> jax.Array:
    logits_BCV: Any = model.apply({"params": params}, x_BCD, method="normed_logits")
    logits_BCV = logits_BCV / temperature
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
