"""The teachers of a distillation: reads them one after the other and asks each about the rows of a batch.

`stages/train.py` makes a `Teaching` for a stage `distill-`, and `stages/grpo.py` calls it after each rollout.
Everything else is as in GRPO: prompts, sampling, rewards (which are only shown), micro-batches and the training step.
The losses are in `rl/distill.py` (definitions §10).

At most one teacher is in memory. A stage with one teacher keeps it; one with several reads each of them again at every
step. Of each teacher the form "full" keeps the unembedding, with which the loss turns its hidden states into logits.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named
from mdrl_jax.rl.distill import make_blank, make_distill_loss, make_teach
from mdrl_jax.rl.policy import PolicyBatch
from mdrl_jax.rl.trainer import Transforms
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, teachers
from mdrl_jax.stages import grpo

HEADS = "teacher_heads"  # name of the argument of the training step with the unembeddings of the teachers


@dataclasses.dataclass(frozen=True)
class Asked:
    """Further programs of a distillation; None where its form needs none.

    Attributes:
      blank: from `make_blank`.
      teach: from `make_teach`.
      head: (params of a teacher) -> its unembedding [D, V].
      lowest: (batch) -> the batch with the advantages of the form "fixed".
      tokens: (batch, N) -> the number of real tokens that N teachers compute, an integer scalar. Each teacher computes
        the whole micro-batches that have a row of its own. With N = 0 it is the number of all real tokens of the batch.
        A prompt counts once for the rows that share its computation.
    """

    blank: Callable[..., Any] | None
    teach: Callable[..., Any] | None
    head: Callable[[Any], jax.Array] | None
    lowest: Callable[[PolicyBatch], PolicyBatch] | None
    tokens: Callable[..., jax.Array]


def make_programs(
    runtime: Runtime, stage: Stage, transforms: Transforms, shared: int | None = None, split: bool = False
) -> grpo.Programs:
    """Makes the programs of a distillation.

    Args:
      runtime: model, devices and configuration of the run.
      stage: the stage; its options of the loss, of the optimizer and of the distillation are read.
      transforms: gradient transformations that protect other domains (`recovery/prevention/`).
      shared, split: as in `grpo.make_programs`.

    Returns:
      New `Programs`, which are compiled when they are first called; `taught` is an `Asked`.
    """
    config, model, mesh, distill = runtime.config, runtime.model, runtime.mesh, stage.train.distill
    temperature, chunk = config.rollout.sampling.temperature, config.model.logprob_chunk
    longest = config.rollout.completion_buckets[-1]
    shared = grpo.shared_by(runtime, stage) if shared is None else shared
    loss_fn = make_distill_loss(model, stage.train.grpo, distill, temperature, longest, chunk, shared)
    full, taught = distill.form == "full", stage.taught
    whole = {"out_shardings": named(mesh)}
    asked = Asked(
        blank=make_blank(model, mesh, distill, chunk, shared) if taught else None,
        teach=make_teach(model, mesh, distill.form, temperature, chunk, shared) if taught else None,
        head=program("teacher_head", lambda params: model.apply({"params": params}, method="lm_head"))
        if full
        else None,
        lowest=None if taught else _lowest(distill.lowest, distill.advantage, mesh),
        tokens=program("teacher_tokens", functools.partial(_tokens, shared), static_argnums=1, **whole),
    )
    heads = (HEADS,) if full else ()
    made = grpo.make_programs(runtime, stage, transforms, "distill_step", loss_fn, heads, shared, split)
    return dataclasses.replace(made, taught=asked)


def _lowest(share: float, advantage: float, mesh: Any) -> Callable[[PolicyBatch], PolicyBatch]:
    """The form "fixed": `advantage` for the `share` of trained tokens that were the least likely, 0 for the others."""

    def pushed(logp_MBT: jax.Array, mask_MBT: jax.Array) -> jax.Array:
        known_MBT = jnp.where(mask_MBT > 0, logp_MBT, jnp.nan)
        return jnp.where(known_MBT <= jnp.nanquantile(known_MBT, share), jnp.float32(advantage), 0.0)

    found = program("lowest_tokens", pushed, out_shardings=named(mesh, None, "batch"))

    def changed(batch: PolicyBatch) -> PolicyBatch:
        adv = found(batch.grpo.sampler_logp_BT, batch.grpo.mask_BT)
        return dataclasses.replace(batch, grpo=dataclasses.replace(batch.grpo, adv_B=adv))

    return changed


def _tokens(shared: int, batch: PolicyBatch, n: int) -> jax.Array:
    start = batch.tokens_BT.shape[-1] - batch.grpo.mask_BT.shape[-1]
    prompts, own = batch.valid_BT[:, ::shared, :start], batch.valid_BT[:, :, start:]
    real_M = jnp.sum(prompts, axis=(1, 2)) + jnp.sum(own, axis=(1, 2))
    if not n:
        return jnp.sum(real_M)
    asked_MN = jnp.any(batch.teacher_B[:, :, None] == jnp.arange(n)[None, None], axis=1)
    return jnp.sum(real_M[:, None] * asked_MN)


class Teaching:
    """Asks the teachers of one stage.

    Attributes:
      heads: extra arguments of the training step: the teachers' unembeddings for the form "full", otherwise none.

    Args:
      runtime: of the run; the tokens of every pass are added to `rollouts.spent["forward"]`.
      stage: the distillation.
      stages: stages of the run, at least those before this one.
      asked: its programs.
      params_after: (name of a stage, or "base") -> the parameters at its end. It is called whenever a teacher is needed
        that is not in memory. For the form "full" each teacher is read once when the object is made.

    Raises:
      The errors of `params_after`.
    """

    def __init__(
        self, runtime: Runtime, stage: Stage, stages: Sequence[Stage], asked: Asked, params_after: Callable[[str], Any]
    ):
        self._runtime, self._asked, self._params_after = runtime, asked, params_after
        self._names = list(dict.fromkeys(teachers(stage, stages).values()))
        self._held: tuple[str, Any] | None = None
        self.heads: dict[str, Any] = {}
        if asked.head:
            self.heads = {HEADS: tuple(asked.head(self._teacher(name)) for name in self._names)}

    def __call__(self, batch: PolicyBatch, params: Any) -> PolicyBatch:
        """The batch with what its teachers say, or with the advantages of the form "fixed".

        Args:
          batch: the micro-batches of a step, on the devices.
          params: parameters of the student that sampled it.

        Returns:
          the same batch with `targets` (with the advantages `grpo.adv_B` for the form "fixed").

        Raises:
          The errors of `params_after`.
        """
        asked, spent = self._asked, self._runtime.rollouts.spent
        if asked.lowest:
            return asked.lowest(batch)
        assert asked.blank and asked.teach  # a stage without these has `lowest`
        start = batch.tokens_BT.shape[-1] - batch.grpo.mask_BT.shape[-1]
        blank = asked.blank(params, batch.tokens_BT, batch.valid_BT, start)
        if blank.ids_BTK is not None:  # the student was asked for its likeliest tokens
            spent["forward"] += int(asked.tokens(batch, 0))
        batch = dataclasses.replace(batch, targets=blank)
        for i, name in enumerate(self._names):
            targets = asked.teach(self._teacher(name), batch, np.int32(i), start)
            batch = dataclasses.replace(batch, targets=targets)
        spent["forward"] += int(asked.tokens(batch, len(self._names)))
        return batch

    def _teacher(self, name: str) -> Any:
        if self._held is None or self._held[0] != name:
            self._held = None  # frees the memory of the teacher before
            self._held = name, self._params_after(name)
        return self._held[1]
