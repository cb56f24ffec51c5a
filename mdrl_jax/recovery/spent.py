"""Measures what a stage costs, also the derivatives that a recovery or a prevention takes (definitions §10)."""

import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import CompletionBatch


def spend(runtime: Runtime, kind: str, batches: Iterable[CompletionBatch]) -> None:
    """Adds the tokens of completions to the counter `runtime.rollouts.spent[kind]`.

    A prompt counts once for each of its completions, also where these share its computation. Padding does not count,
    nor do rows of weight 0, which only fill up a batch.

    Args:
      runtime: of the run.
      kind: what is computed of these tokens, a key of `model.flops.FORWARDS`, which is not checked.
      batches: the completions, on the host or on devices; none add nothing.
    """
    tokens = [np.sum(np.asarray(b.valid_BT).sum(axis=1) * (np.asarray(b.weight_B) > 0)) for b in batches]
    runtime.rollouts.spent[kind] += int(sum(tokens))


def metered(runtime: Runtime) -> Callable[[], dict[str, float]]:
    """Starts a meter of seconds and tokens.

    Args:
      runtime: the run whose `rollouts.spent` is read.

    Returns:
      A function without arguments that gives the amounts since the start: "seconds" of wall-clock time, and "tokens_"
      followed by each kind of `Rollouts.spent`, e.g. "tokens_sampled". A kind of which there was none is absent.
      "operations" is the number of operations on parameters that `spent` counts.
    """
    started, before = time.monotonic(), Counter(runtime.rollouts.spent)

    def read() -> dict[str, float]:
        amounts = {k: v - before[k] for k, v in runtime.rollouts.spent.items() if v > before[k]}
        named = {k if k == "operations" else f"tokens_{k}": n for k, n in amounts.items()}
        return {"seconds": time.monotonic() - started, **named}

    return read
