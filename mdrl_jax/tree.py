"""Vector arithmetic on trees of parameters, and the names of the tensors in them.

A tree is never flattened into one long vector. On a mesh, a sum over its entries is therefore an all-reduce of scalars,
and no leaf is gathered. Inner products are computed in float32 whatever the dtype of the leaves, or in float64 if the
leaves are float64.

`vdot`, `add`, `sub` and `axpy` raise ValueError if their trees differ in structure. Where a leaf of the first tree
meets a subtree of the second one, the error is a TypeError, of `vdot` an AttributeError.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """float32 for all dtypes but float64, which stays float64 (some tests compute in it)."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32  # not promote_types: strict promotion refuses bfloat16


def vdot(a: Any, b: Any) -> jax.Array:
    """The inner product ⟨a, b⟩ over all leaves together, a scalar; float32, or float64 if a leaf is.

    The trees have one structure, and their leaves the same shapes. Trees without leaves give 0.
    """
    parts = jax.tree.map(lambda x, y: jnp.sum(_wide(x) * _wide(y)), a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(parts), jnp.float32(0))


def norm(a: Any) -> jax.Array:
    """The norm ‖a‖₂ over all leaves together, a scalar; float32, or float64 if a leaf is. Without leaves it is 0."""
    return jnp.sqrt(vdot(a, a))


def add(a: Any, b: Any) -> Any:
    """a + b, leaf by leaf, for two trees of one structure; the dtypes are promoted by JAX's rules."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: Any, b: Any) -> Any:
    """a − b, leaf by leaf, for two trees of one structure; the dtypes are promoted by JAX's rules."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(alpha: Any, x: Any) -> Any:
    """alpha · x; each leaf keeps its dtype.

    Args:
      alpha: a scalar for all leaves: a number or an array without axes, traced or not.
      x: a tree of arrays.
    """
    return jax.tree.map(lambda leaf: (alpha * leaf).astype(leaf.dtype), x)


def axpy(alpha: Any, x: Any, y: Any) -> Any:
    """alpha · x + y; each leaf has the dtype of y's leaf.

    Args:
      alpha: a scalar for all leaves: a number or an array without axes, traced or not.
      x: a tree of arrays.
      y: a tree of the same structure and shapes.

    Returns:
      a tree like `y`.
    """
    return jax.tree.map(lambda a, b: (alpha * a + b).astype(b.dtype), x, y)


def zeros_like(a: Any) -> Any:
    """A tree of zeros with the shapes and dtypes of a's leaves."""
    return jax.tree.map(jnp.zeros_like, a)


def path(keys: Any) -> str:
    """The path of a leaf as text, such as `layers/gate/kernel`; "" for a tree that is a single leaf.

    Args:
      keys: the leaf's key path, as `jax.tree_util.tree_flatten_with_path` gives it. A key of a dictionary, or an index
        of a list or tuple, becomes one part of the text; an attribute, as of a NamedTuple, becomes a part such as
        `.mu`.
    """
    return "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)


def is_stacked(name: str) -> bool:
    """Whether the leading axis of the parameter at this path is the axis of layers: the path begins with `layers/`."""
    return name.startswith("layers/")


def kind(name: str) -> str:
    """The kind of the tensor at a path (`path`): the first part of the path, or the next one after `layers/`.

    If `bias` is all that follows this part, the kind ends in `_bias`. So it is `gate` for `layers/gate/kernel`,
    `q_bias` for `layers/q/bias`, and `embedding` for `embedding`.
    """
    stem, _, last = name.removeprefix("layers/").partition("/")
    return f"{stem}_bias" if last == "bias" else stem


def label(name: str, layer: int | None) -> str:
    """The name of one tensor: `layers/gate/kernel[2]` for layer 2, or the path alone if `layer` is None.

    Args:
      name: the path of the leaf (`path`).
      layer: number of the layer, from 0; None for a leaf that is not stacked by layer.
    """
    return name if layer is None else f"{name}[{layer}]"


def per_tensor(function: Callable[..., jax.Array], *trees: Any) -> dict[str, jax.Array]:
    """Computes one number for each tensor.

    A tensor is one layer's slice of a leaf that is stacked by layer, or the whole leaf otherwise (definitions §4).

    Args:
      function: maps one tensor of each tree, in the order of the trees, to a scalar JAX array.
      *trees: one tree or more, all of one structure, which is not checked.

    Returns:
      path of a leaf (`path`) -> the numbers of its tensors: [L] for leaves that are stacked by layer, [1] for others.
      The paths are in the order of the leaves.

    Raises:
      IndexError: if there is no tree, or a tree has fewer leaves than the first one.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(trees[0])
    others = [jax.tree.leaves(t) for t in trees[1:]]
    out = {}
    for i, (keys, leaf) in enumerate(flat):
        name = path(keys)
        leaves = (leaf, *(o[i] for o in others))
        out[name] = jax.vmap(function)(*leaves) if is_stacked(name) else function(*leaves)[None]
    return out


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def changed(x: jax.Array, change: jax.Array) -> jax.Array:
    """x + change, in x's dtype; where the change is 0, x stays as it is bit for bit (−0 + 0 would be +0).

    Args:
      x: an array.
      change: the difference to add, of x's shape. The sum is computed in the dtype of `change` and rounded to x's.
    """
    return jnp.where(change == 0, x, (x.astype(change.dtype) + change).astype(x.dtype))
