"""Products of curvature matrices with vectors, on pytrees (definitions §6).

Every operator has one signature, `operator(point, v, batch, *fixed) -> Hv`: `point` is what is differentiated,
`v` and `Hv` are trees like it, leaves of `batch` are [micro-batches, rows, ...], `fixed` are further arrays that
are not differentiated. A loss is `loss(point, micro, *fixed) -> (sum, count)`; its value on a batch is
Σ sum / Σ count over micro-batches, so no product depends on how rows are divided among them. Point and vectors are
float32 (the master weights), as are all sums; what lies between them is in the dtype the loss computes in.

With `shardings` (those of `point`) the accumulated product is kept where the parameters lie. The functions are
pure and not jitted: `parallel.programs.program` does that once, for the caller.

Costs are in units of one gradient, 3 dense products of a weight matrix with the tokens (one forward, two
backward), without rematerialisation:

| operator | products | gradients |
|---|---|---|
| `exact` | 1 + 2 forward, 1 + 4 backward (the gradient itself is not needed) | 2.67 |
| `blocked(exact)`, each further vector | 2 + 4: the linearized apply | 2.00 |
| `gauss_newton`, `fisher` | 1 + 2 forward, 2 backward | 1.67 |
| the same `blocked`, each further vector | 2 + 2 | 1.33 |
| `finite_difference` | two gradients | 2.00 |
| `exact` where only a narrow slice of the weights is differentiated | 1 + 1 forward, 1 + 1 backward | 1.33 |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.parallel.programs import program

Loss = Callable[..., tuple[jax.Array, jax.Array]]
Operator = Callable[..., Any]


def exact(loss: Loss, shardings: Any = None) -> Operator:
    """The Hessian, ∂/∂ε ∇loss(point + ε v): forward over reverse, `jax.jvp` of `jax.grad`."""

    def operator(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        def product(micro: Any) -> tuple[Any, jax.Array]:
            def gradient(at: Any) -> tuple[Any, jax.Array]:
                return jax.grad(loss, has_aux=True)(at, micro, *fixed)

            _, hv, count = jax.jvp(gradient, (point,), (v,), has_aux=True)
            return hv, count

        return _mean(product, point, batch, shardings)

    return operator


def finite_difference(loss: Loss, step: float | None = None, shardings: Any = None) -> Operator:
    """(∇loss(point + εv) − ∇loss(point − εv)) / 2ε: the check of `exact`, and the fallback where attention has no
    forward mode.

    ε = step · max(‖point‖, 1) / ‖v‖, with step = eps^(1/3) of the point's dtype unless given: truncation falls as
    ε², rounding grows as eps / ε. The floor of 1 [chosen] is for points that are small deltas added to weights of
    ordinary size, zero among them. Only for losses computed in the point's own dtype.
    """

    def operator(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        length = tree.norm(v)
        relative = float(jnp.finfo(length.dtype).eps) ** (1 / 3) if step is None else step
        epsilon = relative * jnp.maximum(tree.norm(point), 1.0) / jnp.where(length > 0, length, 1.0)

        def product(micro: Any) -> tuple[Any, jax.Array]:
            def gradient(sign: float) -> tuple[Any, jax.Array]:
                return jax.grad(loss, has_aux=True)(tree.axpy(sign * epsilon, v, point), micro, *fixed)

            (above, count), (below, _) = gradient(1.0), gradient(-1.0)
            return tree.scale(0.5 / epsilon, tree.sub(above, below)), count

        return _mean(product, point, batch, shardings)

    return operator


def gauss_newton(
    outputs: Callable[..., Any],
    output_curvature: Callable[[Any, Any, Any], tuple[Any, jax.Array]],
    shardings: Any = None,
) -> Operator:
    """JᵀH_zJ v, positive semidefinite where H_z is: `outputs(point, micro, *fixed)` gives z (say, logits), and
    `output_curvature(z, dz, micro)` gives (H_z dz summed over rows, count), such as `softmax_curvature`.

    One linearization serves J and its transpose, so that the forward pass is made once.
    """

    def operator(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        def product(micro: Any) -> tuple[Any, jax.Array]:
            z, forward = jax.linearize(lambda at: outputs(at, micro, *fixed), point)
            curved, count = output_curvature(z, forward(v), micro)
            curved = jax.tree.map(lambda c, like: c.astype(like.dtype), curved, z)
            (gv,) = jax.linear_transpose(forward, point)(curved)
            return gv, count

        return _mean(product, point, batch, shardings)

    return operator


def fisher(
    log_probs: Callable[..., jax.Array],
    weights: Callable[[Any], tuple[jax.Array, jax.Array]],
    shardings: Any = None,
) -> Operator:
    """Σ_t w_t ∇logp_t (∇logp_t · v) / count: the Fisher matrix of given tokens, token by token (definitions §6).

    `log_probs(point, micro, *fixed)` gives logp of the sampled tokens at the sampling temperature, of any shape;
    `weights(micro)` gives (w of the same shape, the mask or advantages squared, and the count to divide by).
    With weights 1 and count the number of sequences, vᵀFv is the mean of Σ_t u_t².
    """

    def output_curvature(_: Any, u: jax.Array, micro: Any) -> tuple[jax.Array, jax.Array]:
        w, count = weights(micro)
        return w * u, count

    return gauss_newton(log_probs, output_curvature, shardings)


def softmax_curvature(logits: jax.Array, tangent: jax.Array, weights: jax.Array) -> jax.Array:
    """w (diag p − p pᵀ) dz [..., V], float32: the curvature of −logp of any token in the logits [..., V].

    The logits are those that are sampled from, already divided by the temperature; `weights` [...] weighs tokens.
    """
    p = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    dz = tangent.astype(p.dtype)
    mean = jnp.sum(p * dz, axis=-1, keepdims=True)
    return weights[..., None].astype(p.dtype) * p * (dz - mean)


def blocked(operator: Operator) -> Operator:
    """The same signature for a block: leaves of `v` and of the product are [b, ...].

    `jax.vmap` leaves what does not depend on v outside the block, so one call linearizes once at `point` and
    applies b times; nothing is kept between calls. Memory for tangents of activations is b-fold.
    """

    def block(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        return jax.vmap(lambda one: operator(point, one, batch, *fixed))(v)

    return block


def symmetry_defect(apply: Callable[[Any], Any], v: Any, w: Any) -> float:
    """|wᵀHv − vᵀHw| over the larger of the two; logged in every run, about 1e-5 or less for a sound Hv in float32.

    For directions that H leaves almost orthogonal the scale is instead what random ones give, ‖w‖‖Hv‖/√n, so that
    cancellation is not taken for a defect.
    """
    return float(_defect(v, w, apply(v), apply(w)))


def _symmetry_defect(v: Any, w: Any, hv: Any, hw: Any) -> jax.Array:
    a, b = tree.vdot(w, hv), tree.vdot(v, hw)
    size = np.sqrt(sum(x.size for x in jax.tree.leaves(v)))
    random = jnp.maximum(tree.norm(w) * tree.norm(hv), tree.norm(v) * tree.norm(hw)) / size
    scale = jnp.maximum(jnp.maximum(jnp.abs(a), jnp.abs(b)), random)
    return jnp.abs(a - b) / jnp.where(scale > 0, scale, 1.0)


_defect = program("symmetry_defect", _symmetry_defect)


def _mean(product: Callable[[Any], tuple[Any, jax.Array]], like: Any, batch: Any, shardings: Any) -> Any:
    """Σ product / Σ count over the leading axis of `batch`, a tree like `like` in float32 (float64 if it is)."""

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        one, count = product(micro)
        if shardings is not None:
            # Else XLA may keep the sum as some use of a parameter left it, and move activations to it.
            one = jax.lax.with_sharding_constraint(one, shardings)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (one, count)), None

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(like))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like), jnp.zeros((), dtype)
    (total, count), _ = jax.lax.scan(add, empty, batch)
    count = jnp.where(count > 0, count, 1.0)  # a batch without a single token has no curvature
    return jax.tree.map(lambda t: t / count, total)
