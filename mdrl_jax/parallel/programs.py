"""Device programs by name, with a count of how often each was compiled.

A recompilation in the loop is the commonest way to lose a TPU's time unseen (a new shape, a new static value),
so every jitted function of the package is made here and `compilations` is logged at each stage's end.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

compilations: Counter[str] = Counter()


def program(name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **jit_options)` that counts its traces under `name`."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        compilations[name] += 1
        return function(*args, **kwargs)

    return jax.jit(counted, **jit_options)
