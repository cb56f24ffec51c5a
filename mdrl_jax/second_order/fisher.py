"""Computes the diagonal of the empirical Fisher matrix of a policy on its own completions (definitions §9).

`recovery/rollback/evidence.py` uses it, with the factor κ of `fit_kappa`, as the curvature of the loss of domain A that
a rollback is to restore. `recovery/prevention/prepare.py` uses it for EWC (arXiv 1612.00796).

**Definition.** The diagonal has the entries

    F_j = E_y (∂ log π(y) / ∂θ_j)².

The mean is over completions y that the policy at θ itself sampled. log π(y) is that of a whole completion, in nats, at
the sampling temperature. The derivative of a whole completion is squared, not that of each token [chosen]. vᵀFv with
the full matrix F is then, to lowest order, twice the KL in nats per completion, the unit of the other objectives.
Squares of each token's derivative have the same expectation and a smaller variance, but need a gradient a token.

**Method.** The square of every completion's own gradient is needed, and a gradient of a sum over completions would mix
them. `_squares` therefore gives each row its own copy of the layers' weights (`_copies`), and squares and sums the
gradients of the copies where backpropagation would sum them. Each device holds one completion at a time, and the copies
of one layer at a time.

**Cost.** Memory and time are those of a gradient of the same completions, one a device at a time.

Letters of shapes: B rows at once, one on each part of the mesh that splits batch rows; C positions of a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mdrl_jax import tree
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.transformer import BY_EMBED, Decoder, RMSNorm
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor, constrain, constrain_rows, over_rows
from mdrl_jax.second_order.objectives import CompletionBatch, Forward

LogProbs = Callable[[Any, CompletionBatch], jax.Array]


def fisher_diagonal(forward: Forward, shardings: Any = None) -> Callable[[Any, Iterable[CompletionBatch]], Any]:
    """Makes the function that computes the Fisher diagonal F; it is compiled once for rows of one shape.

    Args:
      forward: computes the log-probs, with all parameters as the point (`decoder_parts.whole`).
      shardings: those of the parameters; None: the compiler chooses.

    Returns:
      (params, micro-batches) -> F, a float32 tree like the parameters: the mean over rows, weighted by `weight_B`. The
      function raises ValueError if no row has weight or there is no micro-batch, TypeError if the mesh does not divide
      the rows of a micro-batch, and AssertionError if there are parameters outside the layers that are neither an
      embedding, an unembedding nor the final norm.
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
    """The program that adds the squared gradients of one micro-batch to a total.

    Args:
      forward: as in `fisher_diagonal`.
      shardings: as in `fisher_diagonal`.

    Returns:
      the jitted function (total, params, rows) -> total + Σ_b weight_b (∇ log π(y_b))². The memory of the given total
      is reused, so the given total cannot be read afterwards. The function raises TypeError and AssertionError as in
      `fisher_diagonal`.
    """
    options = {} if shardings is None else {"out_shardings": shardings}
    return program("fisher_diagonal", functools.partial(_add_squares, forward, shardings), donate_argnums=0, **options)


def completion_gradients(log_probs: LogProbs, params: Any, rows: CompletionBatch) -> Any:
    """The gradient ∇ log π(y) of each row; memory is that of one gradient a row.

    The current mesh splits batch rows into n parts, so the model needs a number of rows that n divides. Each completion
    is therefore repeated n times, and the gradient of the sum is divided by n. Unlike in other functions, every device
    must have all rows.

    Args:
      log_probs: (params, rows) -> log-probs of completion tokens [B, Tc], 0 on padding; called with n rows.
      params: the parameters.
      rows: B completions. Their `weight_B` is not used, so rows that only fill up a batch get a gradient too.

    Returns:
      a tree like the parameters with their dtypes, leaves [B, ...].
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    copies = 1 if mesh.empty else batch_divisor(mesh)

    def gradient(row: CompletionBatch) -> Any:
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), row)
        return jax.grad(lambda p: jnp.sum(log_probs(p, repeated)) / copies)(params)

    return jax.vmap(gradient)(rows)


def fit_kappa(displacement: Any, fisher: Any, second: float) -> float:
    """The factor κ with κ · DᵀFD = DᵀHD, which turns the Fisher diagonal into a curvature of A's loss (definitions §9).

    Args:
      displacement: D, a tree.
      fisher: the diagonal F, a tree like D.
      second: DᵀHD, without the ½, of A's loss on the same prompts, from `jets`.

    Returns:
      κ, a positive number without unit.

    Raises:
      ValueError: if κ is not measurable, because DᵀHD or DᵀFD is not finite or not above 0.
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

    # Turn i takes the i-th row of each device's part of the rows, so that no row moves between devices.
    turns = jax.tree.map(lambda x: jnp.moveaxis(x.reshape((at_once, -1) + x.shape[1:]), 1, 0), rows)
    return jax.lax.scan(step, total, turns)[0]


def _squares(forward: Forward, params: Any, rows: CompletionBatch) -> Any:
    """Σ_b weight_b (∇ log π(y_b))², with one gradient for each row b.

    Weights of layers: each row gets its own copy, and the gradients of the copies are squared and summed inside the
    backward pass (`_copies`). They exist for one layer at a time.

    Weights outside the layers (embedding, final norm, unembedding) are not copied. Taps (`_tap`) compute their
    gradients by row. These are squared at the end, because a tied embedding is used twice, to look up tokens and to
    make logits, and its two gradients must be added before they are squared.

    Args:
      forward: as in `fisher_diagonal`.
      params: the parameters.
      rows: completions, one for each part of the mesh.

    Returns:
      a tree like the parameters.
    """
    outside = {name: weights for name, weights in params.items() if name != "layers"}
    weight_B = rows.weight_B
    by_row = jax.tree.map(lambda x: jnp.zeros(weight_B.shape + x.shape, jnp.float32), outside)

    def total(layers: Any, by_row: Any) -> jax.Array:
        return jnp.sum(_log_probs_by_row(forward, outside, layers, by_row, rows))

    layers, gradients = jax.grad(total, argnums=(0, 1))(params["layers"], by_row)
    return {"layers": layers} | jax.tree.map(functools.partial(_sum_of_squares, weight_B), gradients)


def _log_probs_by_row(forward: Forward, outside: Any, layers: Any, by_row: Any, rows: CompletionBatch) -> jax.Array:
    """The log-probs of `forward`, with a copy of the layers for each row, and with taps outside the layers.

    Args:
      forward: as in `fisher_diagonal`.
      outside: the weights outside the layers.
      layers: the weights of the layers.
      by_row: zeros like `outside` with a leading axis B. Their gradients are those of `outside` by row.
      rows: completions, one for each part of the mesh.

    Returns:
      log π of completion tokens in nats [B, Tc].
    """
    parts = forward.parts
    taps: set[str] = set()

    def at(name: str) -> Any:
        taps.add(name)
        return by_row[name]

    def layer(weights: Any, fixed: Any, x_BTD: jax.Array, packed: Grouped) -> jax.Array:
        def one(own: Any, x_TD: jax.Array, valid_T: jax.Array) -> jax.Array:
            return parts.layer(own, fixed, x_TD[None], Grouped(valid_T[None], packed.start))[0]

        own = jax.tree.map(lambda w: _copies(w, rows.weight_B), weights)
        return over_rows(one)(own, x_BTD, packed.valid_BT)

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, out = context.module, call(*args, **kwargs)
        if isinstance(module, RMSNorm) and module.name == "norm":
            ones = {"params": {"scale": jnp.ones(out.shape[-1])}}
            return _scaled(out, RMSNorm(module.eps, module.axes).apply(ones, args[0]), at("norm")["scale"])
        if isinstance(module, Decoder) and context.method_name == "embed":
            factor = math.sqrt(module.config.d_model) if module.config.scaled_embedding else 1.0
            return _looked_up(out, args[0], factor * at("embedding"))
        if isinstance(module, Decoder) and context.method_name == "logits":
            table = at("embedding") if module.config.tied else jnp.swapaxes(at("unembedding"), 1, 2)
            return _multiplied(out, args[0], table)
        return out

    def tapped(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(point: Any, *rest: Any) -> jax.Array:
            with nn.intercept_methods(tap):
                return function(outside, *rest)

        return run

    by_rows = dataclasses.replace(parts, embed=tapped(parts.embed), layer=layer, head=tapped(parts.head))
    logp_BT = dataclasses.replace(forward, parts=by_rows)({"layers": layers}, rows, ())
    assert taps == set(outside), f"parameters without a tap, whose squares would be 0: {set(outside) - taps}"
    return logp_BT


@jax.custom_vjp
def _copies(x: jax.Array, weight_B: jax.Array) -> jax.Array:
    """A copy of x for each row [B, ...]; in the backward pass x gets Σ_b weight_b g_b² in place of Σ_b g_b.

    g_b is the gradient with respect to the copy of row b.
    """
    return constrain_rows(jnp.broadcast_to(x, weight_B.shape + x.shape))


def _copies_forward(x: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _copies(x, weight_B), weight_B


def _copies_backward(weight_B: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return _sum_of_squares(weight_B, constrain_rows(g)).astype(g.dtype), None


_copies.defvjp(_copies_forward, _copies_backward)


def _tap(pull_back: Callable[[Any, jax.Array, tuple[int, ...]], jax.Array]) -> Callable[..., jax.Array]:
    """Makes a tap: a function that returns `out` unchanged, and computes a gradient by row in the backward pass.

    Args:
      pull_back: (partner, gradient of `out`, shape of `by_row`) -> the gradient of a weight for each row. `partner` is
        what the weight was combined with, such as the input of a product.

    Returns:
      (out, partner, by_row) -> out. In the backward pass `by_row`, whose values are not used, gets the result of
      `pull_back`.
    """

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
    """The gradient by row of a table in which tokens are looked up [B, V, D]."""
    add = jax.vmap(lambda tokens_T, g_TD: jnp.zeros(shape[1:], jnp.float32).at[tokens_T].add(_wide(g_TD)))
    return constrain(add(tokens_BT, constrain(g_BTD, *BY_EMBED)), "rows", "vocab", "embed")


@_tap
def _multiplied(x_BCD: jax.Array, g_BCV: jax.Array, _: tuple[int, ...]) -> jax.Array:
    """The gradient by row of a table [B, V, D] that makes logits x·tableᵀ from hidden states x."""
    g_BVD = jnp.einsum("bcv,bcd->bvd", _wide(g_BCV), constrain(_wide(x_BCD), "rows", None, None))
    return constrain(g_BVD, "rows", "vocab_split", None)


@_tap
def _scaled(y_BCD: jax.Array, g_BCD: jax.Array, _: tuple[int, ...]) -> jax.Array:
    """The gradient by row of the scale of a norm [B, D]; y is the input divided by its root mean square."""
    return jnp.sum(_wide(y_BCD) * _wide(g_BCD), axis=1)


def _sum_of_squares(weight_B: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(weighted(weight_B, jnp.square(_wide(g))), axis=0)


def weighted(weight_B: jax.Array, x: jax.Array) -> jax.Array:
    """Each row of x [B, ...] times its weight, a float32 array like x."""
    return _wide(weight_B).reshape((-1,) + (1,) * (x.ndim - 1)) * _wide(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


_quadratic = program(
    "fisher_quadratic", lambda d, fisher: tree.vdot(jax.tree.map(lambda x: jnp.square(_wide(x)), d), fisher)
)
