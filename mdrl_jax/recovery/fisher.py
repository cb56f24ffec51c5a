"""The diagonal of domain A's empirical Fisher matrix, and the factor that turns it into curvature (definitions §9).

F_j = E_y (∂ log π(y) / ∂θ_j)², the mean over domain A's own completions y, sampled at the point where it is taken, of
squared derivatives of the log-probability in nats of the whole completion at the sampling temperature. Per completion
[chosen], not per token: vᵀFv is then to lowest order twice the KL in nats a completion, as second orders of the other
objectives are; sums over tokens would have the same expectation and less variance, at a gradient a token.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.analysis.objectives import Rows
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor

LogProbs = Callable[[Any, Rows], jax.Array]


def fisher_diagonal(log_probs: LogProbs, width: int = 1, shardings: Any = None) -> Callable[[Any, Iterable[Rows]], Any]:
    """(params, micro-batches) -> F, a float32 tree like the parameters; compiled once for rows of one shape.

    Rows of weight 0 count nothing. Gradients are taken `width` completions at a time: memory is F and `width` trees.
    Where batch rows are split over n devices, each completion is repeated n times, so that the model runs as it
    always does: time is that of n completions, the result that of one.

    Args:
      log_probs: (params, rows) -> log π of completion tokens [B, Tc], 0 on padding.
      width: divides the rows of a micro-batch.
      shardings: of the parameters.

    Raises (the function):
      ValueError: if no row has weight.
    """
    add = squares_program(log_probs, width, shardings)

    def estimate(params: Any, batches: Iterable[Rows]) -> Any:
        total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        count = 0.0
        for rows in batches:
            total = add(total, params, rows)
            count += float(jnp.sum(rows.weight_B))
        if not count:
            raise ValueError("the Fisher diagonal needs at least one completion")
        return tree.scale(1 / count, total)

    return estimate


def squares_program(log_probs: LogProbs, width: int, shardings: Any) -> Callable[[Any, Any, Rows], Any]:
    """The jitted (total, params, rows) -> total + Σ_b weight_b (∇ log π(y_b))²; the total is donated."""
    options = {} if shardings is None else {"out_shardings": shardings}
    return program(
        "fisher_diagonal", functools.partial(_add_squares, log_probs, width, shardings), donate_argnums=0, **options
    )


def completion_gradients(log_probs: LogProbs, params: Any, rows: Rows) -> Any:
    """∇ log π(y) of each row: trees like the parameters with a leading axis.

    Where batch rows are split over n devices, each completion is repeated n times, so that the model runs as it always
    does; the rows themselves are whole on all devices.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    copies = 1 if mesh.empty else batch_divisor(mesh)

    def gradient(row: Rows) -> Any:
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


def _add_squares(log_probs: LogProbs, width: int, shardings: Any, total: Any, params: Any, rows: Rows) -> Any:
    """total + Σ_b weight_b (∇ log π(y_b))²."""
    n = rows.weight_B.shape[0]
    if n % width:
        raise ValueError(f"{n} rows a micro-batch cannot be taken {width} at a time")

    def step(total: Any, some: Rows) -> tuple[Any, None]:
        gradients = completion_gradients(log_probs, params, some)
        squares = jax.tree.map(lambda g: jnp.sum(weighted(some.weight_B, jnp.square(_wide(g))), axis=0), gradients)
        if shardings is not None:
            squares = jax.lax.with_sharding_constraint(squares, shardings)
        return tree.add(total, squares), None

    blocks = jax.tree.map(lambda x: x.reshape((n // width, width) + x.shape[1:]), rows)
    return jax.lax.scan(step, total, blocks)[0]


def weighted(weight_B: jax.Array, x: jax.Array) -> jax.Array:
    """weight_B · x, row by row, in float32."""
    return _wide(weight_B).reshape((-1,) + (1,) * (x.ndim - 1)) * _wide(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


_quadratic = program(
    "fisher_quadratic", lambda d, fisher: tree.vdot(jax.tree.map(lambda x: jnp.square(_wide(x)), d), fisher)
)
