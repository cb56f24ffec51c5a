"""Makes the device programs of the package and counts how often each is compiled.

A recompilation inside a loop, caused by a new shape or a new static value, is the most common way to lose time on a TPU
without noticing. Therefore the jitted functions of the package are made here (except the two that initialise parameters
and optimizer state once), and the line that ends a training stage shows the total of `compilations`.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

compilations: Counter[str] = Counter()


def program(name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **jit_options)`, with a counter of its traces.

    Args:
      name: the key in `compilations`; functions of one name are counted together.
      function: a function of JAX arrays.
      **jit_options: options of `jax.jit`.

    Returns:
      the jitted function. Each trace adds 1 to `compilations[name]`: the first call, and each call with a new tree
      structure, new shapes, dtypes or static values, or in another mesh. A trace by `lower` or within another jitted
      function counts, too. If JAX compiles without a new trace, as for another sharding on the same mesh, nothing is
      added.

    Raises:
      TypeError: if `jax.jit` has no such option.
      ValueError: if an option does not fit the function, such as a static argument that it does not have.
    """

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        compilations[name] += 1
        return function(*args, **kwargs)

    counted.__name__ = counted.__qualname__ = name.replace(" ", "_")  # what profiles and compilation logs show
    return jax.jit(counted, **jit_options)
