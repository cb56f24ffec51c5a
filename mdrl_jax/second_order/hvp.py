"""Multiplies vectors with the Hessian or the Gauss–Newton matrix of a loss, on trees (definitions §6).

`analysis/probe.py` uses `blocked(exact(loss))` with the losses of `objectives.py`, and `lanczos.py` finds eigenvectors
with it. `gauss_newton` serves benchmarks and tests.

**Signature.** Every operator is `operator(point, v, batch, *fixed) -> Hv`. Derivatives are taken with respect to
`point`; `v` and `Hv` are trees like it. Leaves of `batch` are [micro-batches, rows, ...]. `fixed` are further
arguments, which are not differentiated. A loss is `loss(point, micro, *fixed) -> (sum, count)`. Its value on a batch is
Σ sum / Σ count over micro-batches, so a product does not depend on how rows are divided into micro-batches.

**Precision.** The point (master weights), vectors and sums are float32. Everything in between has the dtype in which
the loss computes.

**Compilation.** The operators are pure functions and are not jitted. The caller jits them with
`parallel.programs.program`. If `shardings` (those of `point`) are given, the product is summed in these shardings.

**Sources.** `exact`: Pearlmutter 1994 (doi 10.1162/neco.1994.6.1.147). `gauss_newton`: Schraudolph 2002
(doi 10.1162/08997660260028683).

**Cost**, in dense products of a weight matrix with the tokens, without rematerialisation. A gradient is 3 products: one
forward and two backward. A tangent of y = W x is W x₁ + V x, two more products, and so on:

| operator | products | in gradients |
|---|---|---|
| `exact` | forward 1, its tangent 2, backward 1, its tangent 4 | 8/3 = 2.67 |
| `blocked(exact)`, each further vector | tangents only: 2 + 4 | 6/3 = 2.00 |
| `gauss_newton` | forward 1, its tangent 2, the transpose of the tangent 2 | 5/3 = 1.67 |
| `blocked(gauss_newton)`, each further vector | 2 + 2 | 4/3 = 1.33 |
| `exact` on a narrow slice of the weights | forward 1, its tangent 1, backward 1, its tangent 1 | 4/3 = 1.33 |

`exact` needs one backward product less than a gradient, because the gradient of W itself is not asked for. On a narrow
slice almost all weights have no tangent and no gradient.
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
    """The Hessian of a loss: Hv = d/dε ∇loss(point + εv) at ε = 0, by forward over reverse (`jax.jvp` of `jax.grad`).

    Args:
      loss: (point, micro, *fixed) -> (sum, count). It must be differentiable twice (definitions §6).
      shardings: those of `point`; None: the compiler chooses.

    Returns:
      the operator. Its products are float32 (float64 if the point is). If the counts do not add up to more than 0, the
      sum is not divided, so it is 0 where nothing counts. The operator raises TypeError or ValueError if `v` does not
      have the structure, the shapes and the dtypes of `point`.
    """

    def operator(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        def product(micro: Any) -> tuple[Any, jax.Array]:
            def gradient(at: Any) -> tuple[Any, jax.Array]:
                return jax.grad(loss, has_aux=True)(at, micro, *fixed)

            _, hv, count = jax.jvp(gradient, (point,), (v,), has_aux=True)
            return hv, count

        return _mean(product, point, batch, shardings)

    return operator


def gauss_newton(
    outputs: Callable[..., Any],
    output_curvature: Callable[[Any, Any, Any], tuple[Any, jax.Array]],
    shardings: Any = None,
) -> Operator:
    """The generalized Gauss–Newton matrix Jᵀ H_z J, with J = ∂z/∂point and H_z the Hessian of the loss in z.

    z are outputs of the model, such as logits. The matrix is positive semidefinite if H_z is. One linearization gives
    J and its transpose, so there is one forward pass. Sums and counts are added over micro-batches as for a loss.

    Args:
      outputs: (point, micro, *fixed) -> z.
      output_curvature: (z, dz, micro) -> (H_z dz, count), where H_z belongs to the sum of the loss over rows. For
        logits it can use `softmax_curvature`.
      shardings: those of `point`; None: the compiler chooses.

    Returns:
      the operator. Dtypes, a count of 0 and errors are as for `exact`.
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


def softmax_curvature(logits: jax.Array, tangent: jax.Array, weights: jax.Array) -> jax.Array:
    """w (diag p − p pᵀ) dz with p = softmax(logits): the Hessian of −log p(token) in the logits, times a vector.

    This Hessian is the same for every token that could have been sampled. It is also the Fisher matrix of p.

    Args:
      logits: logits that were divided by the temperature [..., V].
      tangent: dz [..., V].
      weights: w, one for each position [...].

    Returns:
      the products [..., V], float32 or wider.
    """
    p = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    dz = tangent.astype(p.dtype)
    mean = jnp.sum(p * dz, axis=-1, keepdims=True)
    return weights[..., None].astype(p.dtype) * p * (dz - mean)


def blocked(operator: Operator) -> Operator:
    """The same operator for a block of b vectors: leaves of `v` and of the product are [b, ...].

    `jax.vmap` computes what does not depend on v only once. A call therefore runs the loss and its gradient once, and
    the tangents b times. Tangents of activations take b times the memory of one. Nothing is kept between calls.

    Args:
      operator: an operator (module docstring) of a single vector.

    Returns:
      the operator of a block.
    """

    def block(point: Any, v: Any, batch: Any, *fixed: Any) -> Any:
        return jax.vmap(lambda one: operator(point, one, batch, *fixed))(v)

    return block


def symmetry_defect(apply: Callable[[Any], Any], v: Any, w: Any) -> float:
    """How far a Hessian product is from symmetric: |wᵀHv − vᵀHw| / scale.

    The analysis records it for every conflict subspace. A correct product in float32 gives about 1e-5 or less.

    The scale is the larger of |wᵀHv| and |vᵀHw|. If both are small only because of cancellation, rounding errors would
    look like a defect. The scale is therefore at least the size that random directions give, ‖w‖‖Hv‖/√n or
    ‖v‖‖Hw‖/√n, for vectors with n entries.

    Args:
      apply: v -> Hv, for one vector. It is called twice, with `v` and with `w`.
      v: a vector, as a tree.
      w: another vector, a tree like `v`.

    Returns:
      the relative defect; 0 if Hv and Hw are both 0, NaN if one of them has a NaN.
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
    """Sums products and counts over micro-batches, and divides.

    Args:
      product: (micro) -> (product, count).
      like: a tree with the shapes of the product.
      batch: micro-batches along the leading axis.
      shardings: those of `like`, or None.

    Returns:
      Σ product / Σ count, a tree like `like`, in float32 (float64 if `like` is); zeros if the count is 0.
    """

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        one, count = product(micro)
        if shardings is not None:
            # Pin the product's sharding; otherwise XLA may choose another and reshard activations to match it.
            one = jax.lax.with_sharding_constraint(one, shardings)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (one, count)), None

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(like))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like), jnp.zeros((), dtype)
    (total, count), _ = jax.lax.scan(add, empty, batch)
    count = jnp.where(count > 0, count, 1.0)  # a batch in which nothing counts has no curvature
    return jax.tree.map(lambda t: t / count, total)
