"""Vector arithmetic on pytrees that stay pytrees: sums over leaves are all-reduces, never gathers.

Products are accumulated in float32 whatever the leaves are kept in.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def vdot(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ over all leaves, a float scalar."""
    parts = jax.tree.map(lambda x, y: jnp.sum(_wide(x) * _wide(y)), a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(parts), jnp.float32(0))


def norm(a: Any) -> jax.Array:
    """‖a‖₂ over all leaves."""
    return jnp.sqrt(vdot(a, a))


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: Any, b: Any) -> Any:
    """a − b."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(alpha: Any, x: Any) -> Any:
    """alpha · x, each leaf in its own dtype."""
    return jax.tree.map(lambda leaf: (alpha * leaf).astype(leaf.dtype), x)


def axpy(alpha: Any, x: Any, y: Any) -> Any:
    """alpha · x + y."""
    return jax.tree.map(lambda a, b: (alpha * a + b).astype(b.dtype), x, y)


def zeros_like(a: Any) -> Any:
    """The zero vector of a's space."""
    return jax.tree.map(jnp.zeros_like, a)


def path(keys: Any) -> str:
    """`layers/gate/kernel` for a leaf's key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)


def is_stacked(name: str) -> bool:
    """Whether a parameter's leading axis counts layers."""
    return name.startswith("layers/")


def kind(name: str) -> str:
    """The kind of tensor at a leaf path: `gate` of `layers/gate/kernel`, `q_bias` of `layers/q/bias`."""
    stem, _, last = name.removeprefix("layers/").partition("/")
    return f"{stem}_bias" if last == "bias" else stem


def label(name: str, layer: int | None) -> str:
    """`layers/gate/kernel[2]`, or the path itself of a leaf that is not stacked by layer."""
    return name if layer is None else f"{name}[{layer}]"


def per_tensor(function: Callable[..., jax.Array], *trees: Any) -> dict[str, jax.Array]:
    """`function` of each tensor of the trees, by leaf path: [L] for leaves stacked by layer, [1] for others.

    A tensor is one layer's slice of a stacked leaf (definitions §4); `function` maps such slices to a scalar.
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
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def changed(x: jax.Array, change: jax.Array) -> jax.Array:
    """x + change in x's dtype; x itself, −0 too, where the change is 0."""
    return jnp.where(change == 0, x, (x.astype(change.dtype) + change).astype(x.dtype))
