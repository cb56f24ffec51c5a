"""Prepares a stage that keeps earlier domains by EWC, A-GEM, PCGrad, MGS or protect (definitions §10).

The transforms themselves are in `projections.py` and `protect.py`. This file samples the completions that represent the
kept domains, and computes the extra arguments of the transforms at every step. Replay and the KL to a reference need
nothing of this and are part of the training loop (`stages/grpo.py`).

A kept domain i is represented by `analyze.prompts` × `analyze.group_size` completions of its own training prompts. They
are sampled once, at its peak θ*_i, the end of the stage that trained it. Their sampling keys are fixed, so a resumed
stage samples the same completions and checkpoints need not store them.

- EWC: F_i is the Fisher diagonal of these completions at θ*_i (`second_order/fisher.py`).
- A-GEM, PCGrad and MGS: the reference is the gradient of −log π at the parameters of the step, on one micro-batch of
  `analyze.batch` prompts. Each step uses the next micro-batch. Each completion is weighted by its reward, so with
  rewards of 0 and 1 only successes count. Advantages would leave hardly any gradient, because at θ*_i the completions
  of most prompts have equal rewards [chosen].
- protect: S_i is spanned by the gradients of log π at the parameters of the step, of `prevent.vectors` completions with
  a reward above 0. Each step uses the next ones: first one completion of each prompt, then a second one of each.

These large arrays are arguments of the compiled step. Stages with equal `PreventSection`s and equally many kept domains
therefore share one compiled step.
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
from mdrl_jax.recovery.prevention.projections import agem, ewc, mgs, pcgrad
from mdrl_jax.recovery.prevention.protect import basis, gradients, protect
from mdrl_jax.recovery.rollback.evidence import fisher_of
from mdrl_jax.recovery.spent import spend
from mdrl_jax.rl.trainer import Transforms
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.stage import Stage, peak

PROJECTIONS = {
    "agem": lambda prevent: agem(),
    "pcgrad": lambda prevent: pcgrad(),
    "mgs": lambda prevent: mgs(prevent.module),
}


@dataclasses.dataclass(frozen=True)
class Prevention:
    """The additions of a stage to its optimizer.

    Attributes:
      transforms: the optax transforms.
      extra: (number of the step, parameters at its start) -> the extra arguments of the transforms, by name: "anchors"
        for EWC, "references" for A-GEM, PCGrad and MGS, "protected" for protect; only those that the stage needs.
    """

    transforms: Transforms = Transforms()
    extra: Callable[[int, Any], dict[str, Any]] = lambda step, params: {}


def transforms(prevent: PreventSection) -> Transforms:
    """The transforms that a stage asks for, in their order.

    EWC comes first; it adds the gradient of its penalty, which is part of the loss. A-GEM, PCGrad or MGS then acts on
    the gradient of the whole loss. Protect comes last, on the gradient and again on the update, because Adam moves the
    update back into S_i.

    Args:
      prevent: settings of the stage. `ewc` above 0 asks for EWC, `gradients` other than "none" for that method, and
        `protect` above 0 for protect.

    Returns:
      The transforms of the gradient and of the update; two empty tuples if the settings ask for none.

    Raises:
      KeyError: if `prevent.gradients` is no known name, which `config.parse` refuses.
    """
    protected = (protect(prevent.protect),) if prevent.protect else ()
    gradient = [ewc(prevent.ewc)] if prevent.ewc else []
    if prevent.gradients != "none":
        gradient.append(PROJECTIONS[prevent.gradients](prevent))
    return Transforms((*gradient, *protected), protected)


def check(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage whose kept domains cannot be sampled. A stage without transforms always passes.

    Raises:
      UserError: if a kept domain has too few prompts, or a batch is not divisible by the mesh.
    """
    if not stage.train.prevent.transforms:
        return
    samples.check(runtime, stage.keeps, f"stage {stage.name}: ")


def prepare(probe: Probe, stage: Stage, stages: Sequence[Stage], params: Callable[[str], Any]) -> Prevention:
    """Samples the domains that a stage keeps, each at its θ*, and prepares the stage's transforms.

    Nothing is sampled for a stage that asks for no transform. A stage that asks for one has to keep a domain, which
    `stage.resolve_stages` ensures. Tokens of the gradients, and the operations of the transforms (`operations`), are
    added to `rollouts.spent`.

    Args:
      probe: of the run; its stages share one, so that they share its compiled programs.
      stage: the stage to prepare, a GRPO stage.
      stages: stages of the run, at least those before this one.
      params: name of a stage -> the parameters at its end.

    Returns:
      The transforms, and the function that computes their extra arguments at every step.

    Raises:
      UserError: if no completion of a kept domain has a reward above 0.
      UserError, RuntimeError: if sampling fails (`samples.draw`).
      AssertionError: if no stage on the way to the stage's start trained a kept domain alone, which
        `stage.resolve_stages` refuses.
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
            spend(probe.runtime, "gradient", rows)
            anchors.append((fisher_of(probe)(theta, [put(micro, mesh) for micro in rows]), theta))
        if prevent.gradients != "none":
            batches.append(rows)
        if prevent.protect:
            rewarded.append(in_turn(sample))

    n = sum(x.size for x in jax.tree.leaves(probe.runtime.shapes))
    each = operations(prevent, len(stage.keeps)) * n

    def extra(step: int, at: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}
        probe.runtime.rollouts.spent["operations"] += each
        if anchors:
            given["anchors"] = tuple(anchors)
        if batches:
            now = [rows[step % len(rows)] for rows in batches]
            spend(probe.runtime, "gradient", now)
            given["references"] = tuple(probe.gradient(at, rows) for rows in now)
        if rewarded:
            chosen = [_next(rows, step, prevent.vectors) for rows in rewarded]
            spend(probe.runtime, "gradient", chosen)
            given["protected"] = basis([_gradients_of(probe)(at, put(rows, mesh, None)) for rows in chosen])
        return given

    return Prevention(transforms(prevent), extra)


def operations(prevent: PreventSection, kept: int) -> int:
    """Operations for each parameter that the transforms of a stage take in one step; multiplications and additions.

    - EWC: 4 for each kept domain (a difference, two products, a sum).
    - A-GEM: one for each kept domain for the mean of the references, and 6: 2 for each of two inner products, 2 for the
      difference. PCGrad and MGS: 6 for each kept domain.
    - protect, with k vectors of all kept domains together: 8 k² for their orthonormal basis (twice their inner products
      and their combinations) and 4 k for each projection, of the gradient and of the update.

    Args:
      prevent: settings of the stage.
      kept: number of domains that it keeps.
    """
    k = kept * prevent.vectors
    gradients = {"none": 0, "agem": kept + 6, "pcgrad": 6 * kept, "mgs": 6 * kept}[prevent.gradients]
    return (4 * kept if prevent.ewc else 0) + gradients + (8 * k**2 + 8 * k if prevent.protect else 0)


def kept(runtime: Runtime, theta: Any, domain: str, stage: str) -> Sample:
    """Samples completions of a domain at θ*, padded to one length, with negative rewards set to 0.

    These are `analyze.group_size` completions of each of `analyze.prompts` prompts (`samples.draw`), padded to the last
    of `rollout.completion_buckets`. If their rewards r are passed as advantages, the gradient of the reward loss
    (`Probe.gradient`) is that of −mean r log π.

    Args:
      runtime: of the run.
      theta: θ*, the parameters to sample at.
      domain: the domain to sample.
      stage: name of the stage that keeps it, for the error message.

    Returns:
      The completions with their rewards, all at least 0.

    Raises:
      UserError: if no reward is above 0.
      UserError, RuntimeError, KeyError: if sampling fails (`samples.draw`).
    """
    sample = samples.draw(runtime, theta, domain).padded(runtime.config.rollout.completion_buckets[-1])
    sample = dataclasses.replace(sample, rewards_PG=sample.rewards_PG.clip(0))
    if not sample.rewards_PG.any():
        raise UserError(f"stage {stage} cannot keep {domain}: none of its completions at its peak has a reward above 0")
    return sample


def in_turn(sample: Sample) -> CompletionBatch:
    """The completions with a reward above 0, as rows on the host, all of weight 1.

    The first completion of each prompt comes first, then the second of each, and so on. There are no rows if no
    completion has a reward above 0.

    Args:
      sample: the completions, of at least one prompt.
    """
    (rows,) = sample.rows(sample.n_prompts)
    order = np.arange(sample.rewards_PG.size).reshape(sample.rewards_PG.shape).T.ravel()
    order = order[sample.rewards_PG.T.ravel() > 0]
    return jax.tree.map(lambda x: x[order], rows)


def _next(rows: CompletionBatch, step: int, k: int) -> CompletionBatch:
    """The k rows that a step uses. Successive steps go through all rows in turn and start again at the end.

    No row is used twice in a step. If there are fewer than k rows, the rest of the k have weight 0.
    """
    n = rows.weight_B.shape[0]
    at = step * min(k, n) + np.arange(k)
    taken = jax.tree.map(lambda x: x[at % n], rows)
    return dataclasses.replace(taken, weight_B=(np.arange(k) < n).astype(np.float32))


def _peak(domain: str, stage: Stage, stages: Sequence[Stage]) -> str:
    found = peak(domain, stage.start, tuple(stages))
    assert found is not None, "stage.resolve_stages refuses a stage that keeps what was never trained alone"
    return found.name


@functools.lru_cache(maxsize=1)
def _gradients_of(probe: Probe) -> Callable[[Any, CompletionBatch], Any]:
    """`protect.gradients` of the probe's model. The result is cached, so that one probe compiles it once."""
    return gradients(probe.row_log_probs, probe.runtime.shardings)
