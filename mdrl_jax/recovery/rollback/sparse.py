"""The stored form of an edit: each leaf is stored whole or as its nonzero entries, whichever is smaller.

`expand` gives back exactly the edit that `compress` was given. Small edits change few entries, so most leaves shrink.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree

INDEX, VALUES, SHAPE = ":index", ":values", ":shape"


def compress(edit: Any) -> dict[str, NDArray[Any]]:
    """The arrays to store of an edit (a tree of arrays), by name, on the host, for `numpy.savez`.

    A leaf at path p (`tree.path`) becomes either one array `p`, or three arrays: `p:index` with the flat positions of
    its nonzero entries in ascending order, `p:values` and `p:shape`. A negative zero counts as nonzero, so that it
    survives. Dtypes that are not NumPy's own, such as bfloat16, do not survive a file of `numpy.savez`.
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
    """The edit that `compress` stored.

    Args:
      stored: the arrays of `compress`, by name. Arrays of other leaves are ignored.
      like: a tree of arrays, or of abstract arrays, with the shapes, dtypes and shardings that the edit must have.

    Returns:
      The edit, a tree like `like`.

    Raises:
      ValueError: if a leaf of `like` is not stored, or was stored with another shape or dtype.
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
