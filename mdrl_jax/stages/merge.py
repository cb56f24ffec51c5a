"""Stages that merge the solo edits of all domains: `average`, `arithmetic`, `ties` (definitions §10).

The average of the solo models is task arithmetic with λ = 1 / number of domains; the factor λ of the other two is the
one of `recover.scales` with the best average over domains on validation prompts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdrl_jax.evaluate import validation_rewards
from mdrl_jax.parallel.programs import program
from mdrl_jax.progress import Track
from mdrl_jax.recovery.merging import average, task_arithmetic, ties
from mdrl_jax.runtime import Runtime
from mdrl_jax.stats import estimate
from mdrl_jax.tree import sub


def merge(runtime: Runtime, name: str, base: Any, solos: Mapping[str, Any], track: Track) -> tuple[Any, dict[str, Any]]:
    """The merged parameters, and the record of what was tried.

    Args:
      name: "average", "arithmetic" or "ties".
      base: θ_0.
      solos: parameters after each domain's solo stage.
    """
    section = runtime.config.recover
    like = {"out_shardings": runtime.shardings}
    if name == "average":
        merged = program("merge_average", average, **like)(list(solos.values()))
        return merged, {"method": name, "points": [], "chosen": None}
    edit = program("merge_edit", sub, **like)
    edits = [edit(x, base) for x in solos.values()]
    if name == "arithmetic":
        combine = program("merge_arithmetic", task_arithmetic, **like)
    else:
        combine = lambda base, edits, scale: ties(base, edits, section.density, scale)  # noqa: E731
    tried, best = [], None
    with track(name, len(section.scales)) as show:
        for scale in section.scales:
            show(len(tried), f"factor {scale:g}")
            params = combine(base, edits, np.float32(scale))
            rewards = validation_rewards(runtime, params)
            score = {domain: estimate.clustered(x).scaled(100, "points") for domain, x in rewards.items()}
            mean = estimate.independent_mean(list(score.values()))
            row = {"scale": scale, "average": mean.record(), "scores": {d: e.record() for d, e in score.items()}}
            tried.append(row)
            if best is None or mean.value > best[0]:
                best = mean.value, params, scale
    assert best is not None  # `config.check` wants at least one factor
    return best[1], {"method": name, "points": tried, "chosen": best[2]}
