"""The diagonal of domain A's empirical Fisher matrix, and the factor that turns it into curvature (definitions §9).

F_j = E_y (∂ log π(y) / ∂θ_j)², the mean over domain A's own completions y, sampled at the point where it is taken, of
squared derivatives of the log-probability in nats of the whole completion at the sampling temperature. Per completion
[chosen], not per token: vᵀFv is then to lowest order twice the KL in nats a completion, as second orders of the other
objectives are; sums over tokens would have the same expectation and less variance, at a gradient a token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mdrl_jax import tree
from mdrl_jax.model.transformer import BY_EMBED, Decoder, RMSNorm
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor, constrain, constrain_rows, over_rows
from mdrl_jax.second_order.objectives import CompletionBatch, Forward

LogProbs = Callable[[Any, CompletionBatch], jax.Array]


def fisher_diagonal(forward: Forward, shardings: Any = None) -> Callable[[Any, Iterable[CompletionBatch]], Any]:
    """(params, micro-batches) -> F, a float32 tree like the parameters; compiled once for rows of one shape.

    Rows of weight 0 count nothing. Each device takes the gradient of one completion at a time, and its squares are
    summed layer by layer as the backward pass meets them: memory and time are those of a gradient.

    Args:
      forward: of all parameters (`stack.whole`).
      shardings: of the parameters.

    Raises (the function):
      ValueError: if no row has weight.
    """
    add = squares_program(forward, shardings)

    def estimate(params: Any, batches: Iterable[CompletionBatch]) -> Any:
        total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        count = 0.0
        for rows in batches:
            total = add(total, params, rows)
            count += float(jnp.sum(rows.weight_B))
        if not count:
            raise ValueError("the Fisher diagonal needs at least one completion")
        return tree.scale(1 / count, total)

    return estimate


def squares_program(forward: Forward, shardings: Any) -> Callable[[Any, Any, CompletionBatch], Any]:
    """The jitted (total, params, rows) -> total + Σ_b weight_b (∇ log π(y_b))²; the total is donated."""
    options = {} if shardings is None else {"out_shardings": shardings}
    return program("fisher_diagonal", functools.partial(_add_squares, forward, shardings), donate_argnums=0, **options)


def completion_gradients(log_probs: LogProbs, params: Any, rows: CompletionBatch) -> Any:
    """∇ log π(y) of each row: trees like the parameters with a leading axis.

    Where batch rows are split over n devices, each completion is repeated n times, so that the model runs as it always
    does; the rows themselves are whole on all devices.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    copies = 1 if mesh.empty else batch_divisor(mesh)

    def gradient(row: CompletionBatch) -> Any:
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), row)
        return jax.grad(lambda p: jnp.sum(log_probs(p, repeated)) / copies)(params)

    return jax.vmap(gradient)(rows)


def fit_kappa(displacement: Any, fisher: Any, second: float) -> float:
    """κ such that κ · DᵀFD = DᵀHD.

    Args:
      displacement: D, a tree.
      fisher: F, a tree like it.
      second: DᵀHD (without the ½) of A's loss on training prompts, from the jets.

    Raises:
      ValueError: where the fit is not measurable: DᵀHD or DᵀFD is not above 0, or not finite.
    """
    quadratic = float(_quadratic(displacement, fisher))
    for name, value in (("DᵀFD", quadratic), ("DᵀHD", float(second))):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"κ is not measurable: {name} is {value:.3g}, not above 0")
    return float(second) / quadratic


def _add_squares(forward: Forward, shardings: Any, total: Any, params: Any, rows: CompletionBatch) -> Any:
    """total + Σ_b weight_b (∇ log π(y_b))²."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    at_once = 1 if mesh.empty else batch_divisor(mesh)

    def step(total: Any, some: CompletionBatch) -> tuple[Any, None]:
        squares = _squares(forward, params, some)
        if shardings is not None:
            squares = jax.lax.with_sharding_constraint(squares, shardings)
        return tree.add(total, squares), None

    # Of each device's rows the first, then the second, and so on: no row moves.
    turns = jax.tree.map(lambda x: jnp.moveaxis(x.reshape((at_once, -1) + x.shape[1:]), 1, 0), rows)
    return jax.lax.scan(step, total, turns)[0]


def _squares(forward: Forward, params: Any, rows: CompletionBatch) -> Any:
    """Σ_b weight_b (∇ log π(y_b))², a tree like the parameters.

    Of a layer's weights every row gets a copy, whose gradients are squared and summed where a sum of them would be
    (`_copies`): they exist for one layer at a time. What is outside the layers stays where it is and has its gradients
    by row from taps: a table that is read at both ends has to be squared after both.
    """
    outside = {name: weights for name, weights in params.items() if name != "layers"}
    weight_B = rows.weight_B
    by_row = jax.tree.map(lambda x: jnp.zeros(weight_B.shape + x.shape, jnp.float32), outside)

    def total(layers: Any, by_row: Any) -> jax.Array:
        return jnp.sum(_log_probs_by_row(forward, outside, layers, by_row, rows))

    layers, gradients = jax.grad(total, argnums=(0, 1))(params["layers"], by_row)
    return {"layers": layers} | jax.tree.map(functools.partial(_sum_of_squares, weight_B), gradients)


def _log_probs_by_row(forward: Forward, outside: Any, layers: Any, by_row: Any, rows: CompletionBatch) -> jax.Array:
    """log π of completion tokens [B, Tc], as `forward`, with copies of the layers and taps outside of them."""
    part = forward.stack
    taps: set[str] = set()

    def at(name: str) -> Any:
        taps.add(name)
        return by_row[name]

    def layer(weights: Any, fixed: Any, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda w: _copies(w, rows.weight_B), weights)
        run = over_rows(lambda own, x_TD, valid_T: part.layer(own, fixed, x_TD[None], valid_T[None])[0])
        return run(own, x_BTD, valid_BT)

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, out = context.module, call(*args, **kwargs)
        if isinstance(module, RMSNorm) and module.name == "norm":
            ones = {"params": {"scale": jnp.ones(out.shape[-1])}}
            return _scaled(out, RMSNorm(module.eps, module.axes).apply(ones, args[0]), at("norm")["scale"])
        if isinstance(module, Decoder) and context.method_name == "embed":
            return _looked_up(out, args[0], at("embedding"))
        if isinstance(module, Decoder) and context.method_name == "logits":
            table = at("embedding") if module.config.tied else jnp.swapaxes(at("unembedding"), 1, 2)
            return _multiplied(out, args[0], table)
        return out

    def tapped(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(point: Any, *rest: Any) -> jax.Array:
            with nn.intercept_methods(tap):
                return function(outside, *rest)

        return run

    by_rows = dataclasses.replace(part, embed=tapped(part.embed), layer=layer, head=tapped(part.head))
    logp_BT = dataclasses.replace(forward, stack=by_rows)({"layers": layers}, rows, ())
    assert taps == set(outside), f"of {set(outside) - taps} there would be no squares"
    return logp_BT


@jax.custom_vjp
def _copies(x: jax.Array, weight_B: jax.Array) -> jax.Array:
    """x for each row, [B, ...]; backward Σ_b weight_b g_b² of the rows' gradients g_b, where a sum of them would be."""
    return constrain_rows(jnp.broadcast_to(x, weight_B.shape + x.shape))


def _copies_forward(x: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _copies(x, weight_B), weight_B


def _copies_backward(weight_B: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return _sum_of_squares(weight_B, constrain_rows(g)).astype(g.dtype), None


_copies.defvjp(_copies_forward, _copies_backward)


def _tap(pull_back: Callable[[Any, jax.Array, tuple[int, ...]], jax.Array]) -> Callable[..., jax.Array]:
    """(out, partner, by_row) -> out; backward `by_row` gets `pull_back(partner, gradient of out, its own shape)`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def tap(out: jax.Array, partner: jax.Array, by_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return out

    def forward(out: Any, partner: Any, by_row: Any, shape: Any) -> tuple[jax.Array, jax.Array]:
        return out, partner

    def backward(shape: Any, partner: Any, g: jax.Array) -> tuple[jax.Array, None, jax.Array]:
        return g, None, pull_back(partner, g, shape)

    tap.defvjp(forward, backward)
    return lambda out, partner, by_row: tap(out, jax.lax.stop_gradient(partner), by_row, by_row.shape)


@_tap
def _looked_up(tokens_BT: jax.Array, g_BTD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of a table [B, V, D] whose rows are taken."""
    add = jax.vmap(lambda tokens_T, g_TD: jnp.zeros(shape[1:], jnp.float32).at[tokens_T].add(_wide(g_TD)))
    return constrain(add(tokens_BT, constrain(g_BTD, *BY_EMBED)), "rows", "vocab", "embed")


@_tap
def _multiplied(x_BCD: jax.Array, g_BCV: jax.Array, _: tuple[int, ...]) -> jax.Array:
    """Of a table [B, V, D] whose transpose hidden states are multiplied with."""
    g_BVD = jnp.einsum("bcv,bcd->bvd", _wide(g_BCV), constrain(_wide(x_BCD), "rows", None, None))
    return constrain(g_BVD, "rows", "vocab_split", None)


@_tap
def _scaled(y_BCD: jax.Array, g_BCD: jax.Array, _: tuple[int, ...]) -> jax.Array:
    """Of a scale [B, D] of what is normed."""
    return jnp.sum(_wide(y_BCD) * _wide(g_BCD), axis=1)


def _sum_of_squares(weight_B: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(weighted(weight_B, jnp.square(_wide(g))), axis=0)


def weighted(weight_B: jax.Array, x: jax.Array) -> jax.Array:
    """weight_B · x, row by row, in float32."""
    return _wide(weight_B).reshape((-1,) + (1,) * (x.ndim - 1)) * _wide(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


_quadratic = program(
    "fisher_quadratic", lambda d, fisher: tree.vdot(jax.tree.map(lambda x: jnp.square(_wide(x)), d), fisher)
)
