"""The stages `average`, `arithmetic` and `ties`, which merge the solo models of all domains (definitions §10).

With the base model θ_0 and the solo edits τ_i (`recovery/merging.py` has the merges and their sources):

| stage | merged parameters |
|---|---|
| `average` | the mean of the solo models θ_0 + τ_i; that is `arithmetic` with λ = 1 / number of domains |
| `arithmetic` | θ_0 + λ Σ_i τ_i |
| `ties` | θ_0 + λ · the mean of the largest entries of the τ_i that agree in sign |

λ is chosen among `recover.scales`: the one whose merged model has the best average over domains on validation prompts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdrl_jax.evaluate import validation_rewards
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.tree_programs import difference
from mdrl_jax.progress import Track
from mdrl_jax.recovery.merging import average, task_arithmetic, ties
from mdrl_jax.runtime import Runtime
from mdrl_jax.stats import estimate


def merge(runtime: Runtime, name: str, base: Any, solos: Mapping[str, Any], track: Track) -> tuple[Any, dict[str, Any]]:
    """Merges the solo models, and chooses λ if the merge has one.

    Args:
      runtime: configuration, model and prompts of the run.
      name: "average", "arithmetic" or "ties".
      base: θ_0, a tree of parameters; "average" does not read it.
      solos: domain -> parameters after its solo stage (the parameters themselves, not the edits); at least one.
      track: shows the progress over the values of λ.

    Returns:
      the merged parameters; and the record. "method" is the name. "points" has a row for each λ in the order of
      `recover.scales`: "scale"; "scores", by domain the score on validation prompts; and "average", that of the
      domains; scores and average are records in points (`Estimate.record`). It is empty for "average". "chosen" is the
      λ with the best average, the first of equal ones; None for "average".

    Raises:
      UserError, RuntimeError: if scoring fails (`Rollouts.sample`), for example because too many rewards fail.
      ValueError: for "ties", if `recover.density` is not above 0 and at most 1, which `config.parse` refuses.
      AssertionError: for a merge with a λ, if `recover.scales` is empty, which `config.parse` refuses.
      Stopped: after a SIGTERM; nothing of a merge is saved.
    """
    section = runtime.config.recover
    like = {"out_shardings": runtime.shardings}
    if name == "average":
        merged = program("merge_average", average, **like)(list(solos.values()))
        return merged, {"method": name, "points": [], "chosen": None}
    edits = [difference(x, base) for x in solos.values()]
    if name == "arithmetic":
        combine = program("merge_arithmetic", task_arithmetic, **like)
    else:
        combine = lambda base, edits, scale: ties(base, edits, section.density, scale)  # noqa: E731
    tried, best = [], None
    with track(name, len(section.scales)) as show:
        for scale in section.scales:
            show(len(tried), f"λ = {scale:g}")
            params = combine(base, edits, np.float32(scale))
            rewards = validation_rewards(runtime, params)
            score = {domain: estimate.score(x) for domain, x in rewards.items()}
            mean = estimate.independent_mean(list(score.values()))
            row = {"scale": scale, "average": mean.record(), "scores": {d: e.record() for d, e in score.items()}}
            tried.append(row)
            if best is None or mean.value > best[0]:
                best = mean.value, params, scale
    assert best is not None  # `config.check` refuses an empty `recover.scales`
    return best[1], {"method": name, "points": tried, "chosen": best[2]}
