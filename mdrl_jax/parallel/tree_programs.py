"""Functions of `mdrl_jax.tree` as compiled programs, shared by the package so that each is compiled once per shape."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mdrl_jax import tree
from mdrl_jax.parallel.programs import program

norm = program("norm", tree.norm)
vdot = program("vdot", tree.vdot)


def difference(after: Any, before: Any) -> Any:
    """after − before, leaf by leaf; each result has the sharding of the leaf of `after`.

    The dtypes are promoted by JAX's rules.

    Args:
      after: a tree of arrays. For a leaf without a sharding (a NumPy array) the compiler chooses.
      before: a tree of the same structure and shapes. Other shapes are broadcast by NumPy's rules.

    Returns:
      the differences, a tree of device arrays; the arguments stay as they are.

    Raises:
      ValueError: if arrays lie on different devices.
      ValueError or TypeError: if the trees differ in structure, or if two shapes cannot be broadcast to one.
    """
    leaves, structure = jax.tree.flatten(after)
    return _difference(structure, tuple(getattr(x, "sharding", None) for x in leaves))(after, before)


@functools.cache
def _difference(structure: Any, shardings: tuple[Any, ...]) -> Callable[[Any, Any], Any]:
    return program("difference", tree.sub, out_shardings=structure.unflatten(shardings))
