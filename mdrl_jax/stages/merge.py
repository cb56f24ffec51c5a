"""The stages `average`, `arithmetic`, `ties`, `ram` and `dare`, which merge the solo models of all domains.

With the base model θ_0 and the solo edits τ_i (definitions §10; `recovery/merging.py` has the merges and their
sources):

| stage | merged parameters |
|---|---|
| `average` | the mean of the solo models θ_0 + τ_i; that is `arithmetic` with λ = 1 / number of domains |
| `arithmetic` | θ_0 + λ Σ_i τ_i |
| `ties` | θ_0 + λ · the mean of the largest entries of the τ_i that agree in sign |
| `ram` | θ_0 + λ · in each coordinate the mean of those τ_i that exceed a threshold, in units of the rms of τ_i |
| `dare` | θ_0 + λ Σ_i τ_i, after each τ_i has lost a random share of its entries and the rest is scaled up |

All merges but `average` are tried at every λ of `recover.scales`, `ram` also at every threshold (`recover.thresholds`),
and `dare` at every share to drop (`recover.drop_rates`). The merge with the best average over domains on validation
prompts is kept.
"""

import functools
import itertools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.evaluate import validation_rewards
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.tree_programs import difference
from mdrl_jax.progress import Track
from mdrl_jax.recovery.merging import average, changed_entries, dare, ram, task_arithmetic, ties
from mdrl_jax.runtime import Runtime
from mdrl_jax.stats import estimate

SWEPT = {"ram": "threshold", "dare": "rate"}  # what is swept beside λ


def merge(runtime: Runtime, name: str, base: Any, solos: Mapping[str, Any], track: Track) -> tuple[Any, dict[str, Any]]:
    """Merges the solo models, and chooses λ, threshold and rate if the merge has them.

    Args:
      runtime: configuration, model and prompts of the run.
      name: "average", "arithmetic", "ties", "ram" or "dare".
      base: θ_0, a tree of parameters; "average" does not read it.
      solos: domain -> parameters after its solo stage (the parameters themselves, not the edits); at least one.
      track: shows the progress over the merges that are tried.

    Returns:
      the merged parameters; and the record. "method" is the name. "points" has a row for each merge that was tried:
      "scale", the λ; for "ram" its "threshold" and for "dare" its "rate"; "scores", by domain the score on validation
      prompts; and "average", that of the domains; scores and average are records in points (`Estimate.record`).
      "points" is empty for the merge "average". "chosen" is the λ of the row with the best average, the first of equal
      ones; None for "average". With "ram" the record also has "threshold", and with "dare" "rate", of the same row.
      "ram" also has "changed": for each threshold the share of entries that each domain changed ("domains"), that
      exactly one domain changed ("one"), and that several did ("several").

    Raises:
      UserError, RuntimeError: if scoring fails (`Rollouts.sample`), for example because too many rewards fail.
      KeyError: if `name` is no merge.
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
    key = jax.random.fold_in(jax.random.key(runtime.config.seed), zlib.crc32(b"dare"))
    combine = {
        "arithmetic": lambda: program("merge_arithmetic", task_arithmetic, **like),
        "ties": lambda: lambda base, edits, scale: ties(base, edits, section.density, scale),
        "ram": lambda: program("merge_ram", ram, **like),
        "dare": lambda: program("merge_dare", functools.partial(dare, key=key), **like),
    }[name]()
    swept = SWEPT.get(name, "")
    values = {"ram": section.thresholds, "dare": section.drop_rates}.get(name, (None,))
    settings = list(itertools.product(values, section.scales))
    tried, best = [], None
    with track(name, len(settings)) as show:
        for value, scale in settings:
            show(len(tried), f"λ = {scale:g}" + (f", {swept} {value:g}" if swept else ""))
            more = (np.float32(value),) if swept else ()
            params = combine(base, edits, *more, np.float32(scale))
            rewards = validation_rewards(runtime, params)
            score = {domain: estimate.score(x) for domain, x in rewards.items()}
            mean = estimate.independent_mean(list(score.values()))
            row: dict[str, Any] = {"scale": scale} | ({swept: value} if swept else {})
            tried.append(row | {"average": mean.record(), "scores": {d: e.record() for d, e in score.items()}})
            if best is None or mean.value > best[0]:
                best = mean.value, params, scale, value
    assert best is not None  # `config.parse` refuses an empty `recover.scales`
    record = {"method": name, "points": tried, "chosen": best[2]} | ({swept: best[3]} if swept else {})
    if name == "ram":
        record["changed"] = [_changed(dict(zip(solos, edits, strict=True)), t) for t in section.thresholds]
    return best[1], record


def _changed(edits: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The shares of entries that count as changed at a threshold."""
    found = _counts(list(edits.values()), np.float32(threshold))
    n = sum(x.size for x in jax.tree.leaves(next(iter(edits.values()))))
    each, one, several = (np.asarray(x, np.float64) / n for x in found)
    domains = dict(zip(edits, each.tolist(), strict=True))
    return {"threshold": threshold, "domains": domains, "one": float(one), "several": float(several)}


def _count(edits: list[Any], threshold: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers of entries, in float32, that each edit changed, that exactly one did, and that several did."""
    sets = [changed_entries(edit, threshold) for edit in edits]

    def total(masks: Any) -> jax.Array:
        return functools.reduce(jnp.add, [jnp.sum(m, dtype=jnp.float32) for m in jax.tree.leaves(masks)])

    by = jax.tree.map(lambda *masks: sum(m.astype(jnp.int32) for m in masks), *sets)
    one, several = (jax.tree.map(test, by) for test in (lambda n: n == 1, lambda n: n > 1))
    return jnp.stack([total(s) for s in sets]), total(one), total(several)


_counts = program("merge_changed", _count)
