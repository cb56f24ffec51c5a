"""Counts the tokens whose derivatives a recovery or a prevention computes beside training (definitions §10)."""

from collections.abc import Iterable

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
