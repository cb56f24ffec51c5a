"""What a stage does so as not to lose the domains it keeps: EWC, A-GEM, PCGrad and protect (definitions §10).

(Replay and the KL are the loop's.) A kept domain i is represented by completions of its own training prompts,
`analyze.prompts` × `analyze.group_size` of them, sampled at θ*_i, the end of the stage that trained it. They are drawn
once and with fixed keys: a resumed stage draws the same, so that checkpoints hold nothing of this.

- EWC: F_i is the Fisher diagonal of these completions at θ*_i (`second_order/fisher.py`).
- A-GEM and PCGrad: the reference is the gradient of −log π of these completions at the parameters of the step, on one
  micro-batch of `analyze.batch` prompts, the next one at every step, each completion weighted by its reward: where
  rewards are 0 or 1, of those that succeeded [chosen: at θ*_i most prompts have equal rewards, which leaves advantages
  hardly any gradient].
- protect: S_i is spanned by gradients, at the parameters of the step, of `prevent.vectors` of these completions that
  have a reward, the next ones at every step: first one of each prompt, then another of each.

The large arrays are extra arguments of the step: stages with equal `PreventSection`s and numbers of kept domains share
one compiled step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis import samples
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.config import PreventSection
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import put
from mdrl_jax.recovery.prevention.projections import agem, ewc, pcgrad
from mdrl_jax.recovery.prevention.protect import basis, gradients, protect
from mdrl_jax.recovery.rollback.evidence import fisher_of
from mdrl_jax.rl.trainer import Transforms
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.stage import Stage, peak

PROJECTIONS = {"agem": agem, "pcgrad": pcgrad}


@dataclasses.dataclass(frozen=True)
class Prevention:
    """What a stage adds to the optimizer, and the extra arguments of a step by its number and parameters."""

    transforms: Transforms = Transforms()
    extra: Callable[[int, Any], dict[str, Any]] = lambda step, params: {}


def transforms(prevent: PreventSection) -> Transforms:
    """EWC is part of the loss; conflicts are taken out of the gradient of that; protect has the last word on both."""
    protected = (protect(prevent.protect),) if prevent.protect else ()
    gradient = [ewc(prevent.ewc)] if prevent.ewc else []
    if prevent.gradients != "none":
        gradient.append(PROJECTIONS[prevent.gradients]())
    return Transforms((*gradient, *protected), protected)


def check(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage whose kept domains cannot be sampled.

    Raises:
      UserError: for prompts that are not training prompts, too few of them, or batches that the mesh does not divide.
    """
    if not stage.train.prevent.transforms:
        return
    split = runtime.config.analyze.split
    if split != "train":
        raise UserError(f"stage {stage.name} keeps domains by their training prompts, but analyze.split={split!r}")
    samples.check(runtime, stage.keeps, f"stage {stage.name}: ")


def prepare(probe: Probe, stage: Stage, stages: Sequence[Stage], params: Callable[[str], Any]) -> Prevention:
    """Samples the domains that a stage keeps, each at its θ*, and makes of that what the stage's transforms need.

    Nothing is done for a stage that asks for no transform.

    Args:
      probe: shared by the stages of a run, so that they share its programs.
      stages: of the run, those before this one at least.
      params: (name of a stage) -> the parameters at its end.

    Raises:
      UserError: if no completion of a kept domain has a reward.
    """
    prevent = stage.train.prevent
    if not prevent.transforms:
        return Prevention()
    mesh = probe.runtime.mesh
    anchors: list[tuple[Any, Any]] = []
    batches: list[list[CompletionBatch]] = []
    rewarded: list[CompletionBatch] = []
    for domain in stage.keeps:
        theta = params(_peak(domain, stage, stages))
        sample = kept(probe.runtime, theta, domain, stage.name)
        rows = probe.rows(sample, adv_PG=sample.rewards_PG)
        if prevent.ewc:
            anchors.append((fisher_of(probe)(theta, [put(micro, mesh) for micro in rows]), theta))
        if prevent.gradients != "none":
            batches.append(rows)
        if prevent.protect:
            rewarded.append(in_turn(sample))

    def extra(step: int, at: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if anchors:
            given["anchors"] = tuple(anchors)
        if batches:
            given["references"] = tuple(probe.gradient(at, rows[step % len(rows)]) for rows in batches)
        if rewarded:
            chosen = (_next(rows, step, prevent.vectors) for rows in rewarded)
            given["protected"] = basis([_gradients_of(probe)(at, put(rows, mesh, None)) for rows in chosen])
        return given

    return Prevention(transforms(prevent), extra)


def kept(runtime: Runtime, theta: Any, domain: str, stage: str) -> Sample:
    """Completions of a domain at θ*, padded to one length, with rewards not below 0.

    With rewards for advantages, the gradient of the reward loss (`Probe.gradient`) on them is that of −mean r log π.

    Raises:
      UserError: if all rewards are 0.
    """
    sample = samples.draw(runtime, theta, domain).padded(runtime.config.rollout.completion_buckets[-1])
    sample = dataclasses.replace(sample, rewards_PG=sample.rewards_PG.clip(0))
    if not sample.rewards_PG.any():
        raise UserError(f"stage {stage} is to keep {domain}, but none of its completions before has a reward above 0")
    return sample


def in_turn(sample: Sample) -> CompletionBatch:
    """The completions that have a reward, as rows: the first of each prompt, then the second of each, and so on."""
    (rows,) = sample.rows(sample.n_prompts)
    order = np.arange(sample.rewards_PG.size).reshape(sample.rewards_PG.shape).T.ravel()
    order = order[sample.rewards_PG.T.ravel() > 0]
    return jax.tree.map(lambda x: x[order], rows)


def _next(rows: CompletionBatch, step: int, k: int) -> CompletionBatch:
    """The k rows of a step, going round; never the same row twice: rows of weight 0 where there are fewer."""
    n = rows.weight_B.shape[0]
    at = step * min(k, n) + np.arange(k)
    taken = jax.tree.map(lambda x: x[at % n], rows)
    return dataclasses.replace(taken, weight_B=(np.arange(k) < n).astype(np.float32))


def _peak(domain: str, stage: Stage, stages: Sequence[Stage]) -> str:
    found = peak(domain, stage.start, tuple(stages))
    assert found is not None, "stage.plan refuses a stage that keeps what was never trained alone"
    return found.name


@functools.lru_cache(maxsize=1)
def _gradients_of(probe: Probe) -> Callable[[Any, CompletionBatch], Any]:
    """`protect.gradients` of the probe's model; compiled once a probe."""
    return gradients(probe.row_log_probs, probe.runtime.shardings)
