"""What the rules of a rollback are told of domain A: gradients, Fisher diagonals, κ, shared route (definitions §9).

All of it is of A's training prompts, with completions drawn at the point where it is taken: θ*_A for rule "adding", θ_T
for "removing". The loss is that of expected reward; where fewer than 20 % of the prompts have completions with
different rewards, as at a saturated peak, its gradient is noise, and it is the negative log-likelihood of the own
completions that succeeded [chosen], by the threshold that the analysis has for the reward's Hessian. κ takes the
Fisher diagonal to that loss's curvature along D = θ_T − θ*_A; where it cannot be fitted the rule is first order only,
and the record says so.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mdrl_jax import records, tree
from mdrl_jax.analysis import checkpoint_figures, samples
from mdrl_jax.analysis.damage import uninformative
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import put
from mdrl_jax.recovery.rollback.rules import SCORES, Evidence, edit_between, route_mask
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.fisher import fisher_diagonal, fit_kappa
from mdrl_jax.second_order.objectives import CompletionBatch

PEAK, NOW = "peak", "now"  # θ*_A, θ_T
NEEDS_DATA = {"adding": PEAK, "removing": NOW}  # rules, and the point whose completions they need


@dataclasses.dataclass(frozen=True)
class Ends:
    """Parameters and edits that a rollback is between.

    Attributes:
      now: θ_T, which the edit is taken out of.
      peak: θ*_A.
      edit: δ_B.
      own_edit: δ_A, None where it is not known.
    """

    now: Any
    peak: Any
    edit: Any
    own_edit: Any = None


def scores(probe: Probe | None, rule: str, ends: Ends, sample: Callable[[str], Sample]) -> tuple[Any, dict[str, Any]]:
    """The scores of a rule, a tree, and what went into them, as a record.

    Args:
      probe: None suffices for rules that need no data.
      sample: "peak" or "now" -> A's completions drawn there.

    Raises:
      ValueError: where the rule's gradient is not measurable, or δ_A is needed and not known.
    """
    displacement = edit_between(ends.now, ends.peak)
    evidence = Evidence(ends.edit, own_edit=ends.own_edit, displacement=displacement)
    record: dict[str, Any] = {}
    if rule in NEEDS_DATA:
        assert probe is not None
        point = NEEDS_DATA[rule]
        found, record = _of_domain(probe, ends.peak if point == PEAK else ends.now, displacement, sample(point))
        name = "peak_gradient" if point == PEAK else "gradient"
        evidence = dataclasses.replace(evidence, **{name: found[0], "fisher": found[1], "kappa": np.float32(found[2])})
    return PROGRAMS[rule](evidence), record


def _of_domain(
    probe: Probe, params: Any, displacement: Any, sample: Sample
) -> tuple[tuple[Any, Any, float], dict[str, Any]]:
    """(gradient, Fisher diagonal or None, κ) of A's loss at `params`, and what they are."""
    objective = "success_nll" if uninformative(sample) else "reward"
    record: dict[str, Any] = {"objective": objective, "informative": sample.informative, "kappa": None}
    gradient = mean_gradient(probe, params, sample, objective)
    record["second"] = probe.derivatives(params, displacement, sample)[objective].second
    if not record["second"] > 0:
        record["reason"] = f"first order only: DᵀHD is {record['second']:.3g}, not above 0"
        return (gradient, None, 0.0), record
    fisher = fisher_of(probe)(params, [put(rows, probe.runtime.mesh) for rows in probe.rows(sample)])
    try:
        record["kappa"] = fit_kappa(displacement, fisher, record["second"])
    except ValueError as e:
        record["reason"] = f"first order only: {e}"
        return (gradient, None, 0.0), record
    return (gradient, fisher, record["kappa"]), record


def mean_gradient(probe: Probe, params: Any, sample: Sample, objective: str) -> Any:
    """∇ of the loss "reward" or "success_nll" over all completions of a sample.

    The latter is the former with advantages of 1 / (share of successes) where a completion succeeded, and 0 elsewhere.

    Raises:
      ValueError: for "success_nll" where no completion succeeded.
    """
    adv_PG = None
    if objective == "success_nll":
        if not sample.success_PG.any():
            raise ValueError("A's gradient is not measurable: rewards do not differ, and no completion succeeded")
        adv_PG = sample.success_PG / sample.success_PG.mean()
    total, count = None, 0.0
    for rows in probe.rows(sample, adv_PG=adv_PG):
        n = float(np.sum(rows.weight_B))
        part = tree.scale(n, probe.gradient(params, rows))
        total, count = part if total is None else tree.add(total, part), count + n
    return tree.scale(1 / count, total)


@functools.lru_cache(maxsize=1)
def fisher_of(probe: Probe) -> Callable[[Any, list[CompletionBatch]], Any]:
    """`fisher_diagonal` of the probe's model; compiled once a probe."""
    return fisher_diagonal(probe.fused, probe.runtime.shardings)


def kept_sample(runtime: Runtime, folder: Path, point: str, domain: str, params: Callable[[str], Any]) -> Sample:
    """Completions of a domain's training prompts at a stage's end: the analysis's where it has them, else own ones.

    Sets drawn with other settings than the run has now are drawn anew; own ones are kept in `recovery/samples/`.
    """
    settings = _settings(runtime)
    name = f"{point}-{domain}.npz"
    for place in (folder / "analysis", folder / "recovery" / "samples"):
        found = place / "settings.json"
        file = folder / "analysis" / "samples" / name if place.name == "analysis" else place / name
        if found.exists() and file.exists():
            recorded = records.read_json(found)
            if {k: recorded.get(k) for k in settings} == settings:
                return samples.load(file)
    own = folder / "recovery" / "samples"
    if not (own / "settings.json").exists() or records.read_json(own / "settings.json") != settings:
        for file in own.glob("*.npz"):
            file.unlink()
        records.write_json(own / "settings.json", settings)
    samples.save(own / name, samples.draw(runtime, params(point), domain))
    return samples.load(own / name)


def shared_route(probe: Probe, peak: Any, own: Sample, donor: Sample) -> tuple[Any, dict[str, Any]]:
    """ℛ of both domains at θ*_A, as a mask of its neurons' weights, and its size in neurons."""
    route_LF = checkpoint_figures.shared_route(probe.activity(peak, own), probe.activity(peak, donor))
    return route_mask(peak, route_LF), {"neurons": int(route_LF.sum()), "of": int(route_LF.size)}


def _settings(runtime: Runtime) -> dict[str, Any]:
    config = runtime.config
    return {
        "seed": config.seed,
        "analyze": dataclasses.asdict(config.analyze),
        "temperature": config.rollout.sampling.temperature,
    }


PROGRAMS = {name: program(f"rollback_scores_{name}", rule) for name, rule in SCORES.items()}
