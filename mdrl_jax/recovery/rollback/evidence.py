"""Measures the quantities that the rules of a rollback need: gradients, Fisher diagonals, κ, the shared route.

Definitions §9. Everything is measured on prompts of A from `analyze.split` (the training prompts, by default). The
completions are sampled at the point where the gradient is taken: θ*_A for rule `adding`, θ_T for rule `removing`.

The loss is that of the expected reward. Its gradient is mostly noise if fewer than 20 % of the prompts have completions
with different rewards, as at a saturated peak. In that case the loss is the negative log-likelihood of A's own
completions that succeeded [chosen]. The analysis uses the same threshold for the reward's Hessian.

κ scales the Fisher diagonal to the curvature of that loss along D = θ_T − θ*_A. If κ cannot be fitted, the rule uses
the first order only, and the record says so.

The tokens of gradients, jets and activities are added to `rollouts.spent`.
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
from mdrl_jax.parallel.tree_programs import difference
from mdrl_jax.recovery.rollback.rules import SCORES, Evidence, route_mask
from mdrl_jax.recovery.spent import spend
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.fisher import fisher_diagonal, fit_kappa
from mdrl_jax.second_order.objectives import CompletionBatch

PEAK, NOW = "peak", "now"  # θ*_A, θ_T
NEEDS_DATA = {"adding": PEAK, "removing": NOW}  # the rules that need completions, and the point to sample them at


@dataclasses.dataclass(frozen=True)
class Ends:
    """The parameters and edits of a rollback, as trees.

    Attributes:
      now: θ_T, the parameters that the edit is taken out of.
      peak: θ*_A, the parameters at A's peak.
      edit: δ_B, the parameters after stage B minus those before it.
      own_edit: δ_A, the same for A's stage; None if it is not known.
    """

    now: Any
    peak: Any
    edit: Any
    own_edit: Any = None


def scores(probe: Probe | None, rule: str, ends: Ends, sample: Callable[[str], Sample]) -> tuple[Any, dict[str, Any]]:
    """The score of every coordinate by a rule, with a record of the evidence behind it.

    Args:
      probe: measures gradients and curvature; may be None for a rule that needs no completions (`NEEDS_DATA`).
      rule: name of the rule, a key of `rules.SCORES`.
      ends: the parameters and edits of the rollback.
      sample: "peak" or "now" -> A's completions sampled at θ*_A or at θ_T. Only called for a rule that needs them.

    Returns:
      (scores, record). The scores are a tree like the parameters. The record of a rule with completions has "objective"
      ("reward" or "success_nll"), "informative" (the share of prompts whose completions have different rewards),
      "second" (DᵀHD) and "kappa" (κ, or None), with a "reason" if the rule is first order only. Otherwise it is empty.

    Raises:
      ValueError: if the rule's gradient is not measurable (`mean_gradient`), or if the rule needs δ_A and it is not
        known.
      KeyError: if no rule has this name.
      AssertionError: if the rule needs completions and there is no probe.
      The errors of `sample`.
    """
    displacement = difference(ends.now, ends.peak)
    evidence = Evidence(ends.edit, own_edit=ends.own_edit, displacement=displacement)
    record: dict[str, Any] = {}
    if rule in NEEDS_DATA:
        assert probe is not None
        point = NEEDS_DATA[rule]
        found, record = _of_domain(probe, ends.peak if point == PEAK else ends.now, displacement, sample(point))
        name = "peak_gradient" if point == PEAK else "gradient"
        evidence = dataclasses.replace(evidence, **{name: found[0], "fisher": found[1], "kappa": np.float32(found[2])})
    return PROGRAMS[rule](evidence), record


def gradient_now(probe: Probe, now: Any, sample: Sample) -> tuple[Any, str]:
    """A's gradient at θ_T for the controls that know it, by the loss that rule `removing` uses.

    Args:
      probe: computes gradients.
      now: θ_T.
      sample: A's completions sampled at θ_T.

    Returns:
      (gradient, reason): a tree like the parameters and ""; or None and the reason why it is not measurable.
    """
    try:
        return mean_gradient(probe, now, sample, _objective(sample)), ""
    except ValueError as e:
        return None, str(e)


def _objective(sample: Sample) -> str:
    """The loss of A whose gradient is taken (module docstring)."""
    return "success_nll" if uninformative(sample) else "reward"


def _of_domain(
    probe: Probe, params: Any, displacement: Any, sample: Sample
) -> tuple[tuple[Any, Any, float], dict[str, Any]]:
    """The evidence about A's loss at one point.

    Args:
      probe: measures gradients and curvature.
      params: the point.
      displacement: D = θ_T − θ*_A, the direction that κ is fitted along.
      sample: A's completions sampled at the point.

    Returns:
      ((gradient, Fisher diagonal, κ), record). The Fisher diagonal is None and κ is 0 if κ cannot be fitted.
    """
    objective = _objective(sample)
    record: dict[str, Any] = {"objective": objective, "informative": sample.informative, "kappa": None}
    gradient = mean_gradient(probe, params, sample, objective)
    spend(probe.runtime, "jets", probe.rows(sample))
    record["second"] = probe.derivatives(params, displacement, sample)[objective].second
    if not record["second"] > 0:
        record["reason"] = f"first order only: DᵀHD is {record['second']:.3g}, not above 0"
        return (gradient, None, 0.0), record
    spend(probe.runtime, "gradient", probe.rows(sample))
    fisher = fisher_of(probe)(params, [put(rows, probe.runtime.mesh) for rows in probe.rows(sample)])
    try:
        record["kappa"] = fit_kappa(displacement, fisher, record["second"])
    except ValueError as e:
        record["reason"] = f"first order only: {e}"
        return (gradient, None, 0.0), record
    return (gradient, fisher, record["kappa"]), record


def mean_gradient(probe: Probe, params: Any, sample: Sample, objective: str) -> Any:
    """The gradient of a loss, averaged over all completions of a sample.

    The gradient of "success_nll" is that of "reward" with other advantages: 1 / (share of successes) for a completion
    that succeeded, and 0 for the others.

    Args:
      probe: computes the gradient of each micro-batch.
      params: the point at which the gradient is taken.
      sample: completions sampled there, of at least one prompt.
      objective: "reward" or "success_nll".

    Returns:
      The gradient of the loss, a tree like the parameters. A step against it helps the domain.

    Raises:
      ValueError: for "success_nll" if no completion succeeded.
    """
    adv_PG = None
    if objective == "success_nll":
        if not sample.success_PG.any():
            raise ValueError("A's gradient is not measurable: rewards do not differ, and no completion succeeded")
        adv_PG = sample.success_PG / sample.success_PG.mean()
    total, count = None, 0.0
    spend(probe.runtime, "gradient", probe.rows(sample))
    for rows in probe.rows(sample, adv_PG=adv_PG):
        n = float(np.sum(rows.weight_B))
        part = tree.scale(n, probe.gradient(params, rows))
        total, count = part if total is None else tree.add(total, part), count + n
    return tree.scale(1 / count, total)


@functools.lru_cache(maxsize=1)
def fisher_of(probe: Probe) -> Callable[[Any, list[CompletionBatch]], Any]:
    """The function (params, micro-batches on the devices) -> Fisher diagonal of the probe's model.

    It is that of `fisher.fisher_diagonal`, with its errors. It is cached, so that one probe compiles it once.
    """
    return fisher_diagonal(probe.fused, probe.runtime.shardings)


def kept_sample(runtime: Runtime, folder: Path, point: str, domain: str, params: Callable[[str], Any]) -> Sample:
    """Completions of a domain at the end of a stage, reused from the work folder if possible.

    Completions that the analysis sampled (`analysis/samples/`) come first, then those in `recovery/samples/`. They are
    reused if the `settings.json` beside them (that of the analysis is in `analysis/`) has the run's seed, section
    `analyze` and rollout temperature. Nothing else is compared, neither other settings nor the parameters of the stage;
    `WorkFolder.open` refuses a changed configuration. Otherwise completions are sampled and saved in
    `recovery/samples/`, and those there with outdated settings are deleted. All processes must call this.

    Args:
      runtime: of the run.
      folder: work folder of the run.
      point: name of the stage, or "base".
      domain: the domain; its prompts are the first `analyze.prompts` of a shuffle of `analyze.split`.
      params: name of a stage -> parameters at its end. Only called if completions must be sampled.

    Returns:
      The completions with their rewards in [0, 1], `analyze.group_size` of each of `analyze.prompts` prompts.

    Raises:
      UserError: if `analysis/settings.json` or `recovery/samples/settings.json` is read and is not valid JSON.
      UserError, RuntimeError, KeyError: if completions must be sampled and that fails (`samples.draw`).
      The errors of `samples.load`, if the file of the completions is damaged, and of `params`.
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
            file.unlink(missing_ok=True)
        records.write_json(own / "settings.json", settings)
    samples.save(own / name, samples.draw(runtime, params(point), domain))
    return samples.load(own / name)


def shared_route(probe: Probe, peak: Any, own: Sample, donor: Sample) -> tuple[Any, dict[str, Any]]:
    """The shared route ℛ of A and B at θ*_A.

    Args:
      probe: measures the activity of neurons.
      peak: θ*_A.
      own: completions of A at θ*_A.
      donor: completions of B's domain at θ*_A.

    Returns:
      (mask, record): a tree of booleans like the parameters, true on the weights of the route's MLP neurons; and
      {"neurons", "of"}, the number of neurons in the route, which may be 0, and in the model.
    """
    spend(probe.runtime, "forward", [*probe.rows(own), *probe.rows(donor)])
    route_LF = checkpoint_figures.shared_route(probe.activity(peak, own), probe.activity(peak, donor))
    return route_mask(peak, route_LF), {"neurons": int(route_LF.sum()), "of": int(route_LF.size)}


def _settings(runtime: Runtime) -> dict[str, Any]:
    """The settings that completions depend on."""
    config = runtime.config
    return {
        "seed": config.seed,
        "analyze": records.as_read(dataclasses.asdict(config.analyze)),
        "temperature": config.rollout.sampling.temperature,
    }


PROGRAMS = {name: program(f"rollback_scores_{name}", rule) for name, rule in SCORES.items()}
