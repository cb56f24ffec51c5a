"""Edits as they are stored: what changed and where, leaf by leaf, where that is smaller; the round trip is exact."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree

INDEX, VALUES, SHAPE = ":index", ":values", ":shape"


def compress(edit: Any) -> dict[str, NDArray[Any]]:
    """Arrays by name, on the host, ready for `numpy.savez`.

    A leaf at path p is either `p` itself or `p:index`, flat positions in ascending order, `p:values` and `p:shape`,
    whichever is smaller. A negative zero is a value.
    """
    stored: dict[str, NDArray[Any]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(edit):
        name, dense = tree.path(keys), np.asarray(leaf)
        flat = np.ascontiguousarray(dense).reshape(-1)
        index = np.flatnonzero(flat.view(f"u{dense.itemsize}"))
        index = index.astype(np.uint32 if flat.size <= 2**32 else np.uint64)
        values = flat[index]
        shape = np.array(dense.shape, np.int64)
        if index.nbytes + values.nbytes + shape.nbytes < dense.nbytes:
            stored |= {name + INDEX: index, name + VALUES: values, name + SHAPE: shape}
        else:
            stored[name] = dense
    return stored


def expand(stored: Mapping[str, NDArray[Any]], like: Any) -> Any:
    """The edit of `compress`, as a tree with the shapes, dtypes and shardings of `like` (arrays or abstract ones).

    Raises:
      ValueError: if a leaf of `like` is absent, or has another shape or dtype.
    """

    def leaf(keys: Any, wanted: Any) -> jax.Array:
        name = tree.path(keys)
        if name in stored:
            dense = stored[name]
        elif name + INDEX in stored:
            dense = np.zeros(stored[name + SHAPE], stored[name + VALUES].dtype)
            dense.reshape(-1)[stored[name + INDEX]] = stored[name + VALUES]
        else:
            raise ValueError(f"the stored edit has no {name}")
        if dense.shape != wanted.shape or dense.dtype != wanted.dtype:
            raise ValueError(
                f"the stored edit of {name} is {dense.dtype}{list(dense.shape)}, not {wanted.dtype}{list(wanted.shape)}"
            )
        return jax.device_put(dense, wanted.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)
