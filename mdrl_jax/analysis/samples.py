"""The completions that the analysis works on: completions of one domain, sampled at one point, with their rewards.

`interference.py` draws a `Sample` for each point and domain that it needs, and keeps it in `analysis/samples/`, so that
a resumed analysis reads it. `recovery/` draws its own with the same function.

The prompts are the first `analyze.prompts` of a shuffle of `analyze.split`. Where prompts form groups, such as the
questions about one text, they are of different groups, so that halves and draws of prompts are independent. Prompts and
sampling keys are the same at every point, so differences between points are paired. Every point has its own samples:
damage of the reward is never measured by importance weights (definitions §1).
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import records
from mdrl_jax.domains.prompts import groups_apart, visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import batch_divisor
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.policy import Trained, join, trained
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import (
    SUCCESS,
    CompletionBatch,
    DirectionalDerivatives,
    derivatives,
    leave_one_out,
    token_weights,
)

STAGE_OF_KEYS = "analyze"  # the stage name in all sampling keys of the analysis (definitions §14)


@dataclasses.dataclass(frozen=True)
class Sample:
    """G completions of each of P prompts, on the host.

    Attributes:
      prompts_PT: prompt tokens, padded on the left.
      valid_PT: whether a prompt token is not padding.
      tokens_PGT: completion tokens, all of the length of one bucket.
      mask_PGT: 1 on completion tokens, 0 on padding.
      rewards_PG: rewards in [0, 1].
      ended_PG: whether a completion ended before the length limit.
    """

    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    tokens_PGT: np.ndarray
    mask_PGT: np.ndarray
    rewards_PG: np.ndarray
    ended_PG: np.ndarray

    @property
    def n_prompts(self) -> int:
        """The number of prompts, P."""
        return self.rewards_PG.shape[0]

    @property
    def adv_PG(self) -> np.ndarray:
        """The reward minus the mean reward of the prompt's other completions; 0 if there is no other completion."""
        if self.rewards_PG.shape[1] == 1:
            return np.zeros(self.rewards_PG.shape)
        return leave_one_out(self.rewards_PG.astype(np.float64))

    @property
    def success_PG(self) -> np.ndarray:
        """1.0 for completions with the full reward, otherwise 0.0."""
        return (self.rewards_PG >= SUCCESS).astype(np.float64)

    @property
    def informative(self) -> float:
        """The share of prompts whose completions have different rewards.

        Below 0.2 the Hessian of the reward is not measurable (definitions §6).
        """
        return float((np.ptp(self.rewards_PG, axis=1) > 0).mean())

    def take(self, prompts: np.ndarray) -> "Sample":
        """The sample of only the prompts with these indices, in their order; an index may occur several times.

        Raises:
          IndexError: if an index is not below the number of prompts.
        """
        return Sample(*(getattr(self, f.name)[prompts] for f in dataclasses.fields(self)))

    def completions(self, chosen_P: np.ndarray) -> "Sample":
        """The sample with one completion of each prompt (G = 1).

        Args:
          chosen_P: for each prompt, the index of its completion in the group, from 0.
        """
        at = np.arange(self.n_prompts)
        grouped = ("tokens_PGT", "mask_PGT", "rewards_PG", "ended_PG")
        return dataclasses.replace(self, **{name: getattr(self, name)[at, chosen_P][:, None] for name in grouped})

    def padded(self, length: int) -> "Sample":
        """The sample with completions padded on the right to `length` tokens, so that samples share a compiled program.

        Raises:
          ValueError: if the completions are already longer.
        """
        widths = ((0, 0), (0, 0), (0, length - self.mask_PGT.shape[2]))
        longer = {name: np.pad(getattr(self, name), widths) for name in ("tokens_PGT", "mask_PGT")}
        return dataclasses.replace(self, **longer)

    def rows(self, batch: int, adv_PG: np.ndarray | None = None) -> list[CompletionBatch]:
        """The completions as rows, in micro-batches on the host. The last is filled up with rows of weight 0.

        Args:
          batch: prompts per micro-batch, at least 1.
          adv_PG: advantages [P, G] to use in place of `Sample.adv_PG`.

        Returns:
          the micro-batches, of batch · G rows each, prompt by prompt; none if there are no prompts.
        """
        filled = np.arange(-(-self.n_prompts // batch) * batch)
        real = filled < self.n_prompts
        filled = np.where(real, filled, 0)
        whole = self.take(filled)
        tokens_BT, valid_BT = join(whole.prompts_PT, whole.valid_PT, whole.tokens_PGT, whole.mask_PGT)
        adv_PG = (self.adv_PG if adv_PG is None else adv_PG)[filled]
        group = adv_PG.shape[1]

        def flat(x_PG: np.ndarray) -> np.ndarray:
            return x_PG.reshape((-1,) + x_PG.shape[2:]).astype(np.float32)

        rows = CompletionBatch(
            tokens_BT=tokens_BT.astype(np.int32),
            valid_BT=valid_BT,
            mask_BT=flat(whole.mask_PGT),
            adv_B=flat(adv_PG),
            success_B=flat(whole.success_PG),
            weight_B=np.repeat(real, group).astype(np.float32),
            group=group,
        )
        size = batch * group
        return [jax.tree.map(lambda x, i=i: x[i : i + size], rows) for i in range(0, len(filled) * group, size)]

    def derivatives(
        self, u_PGT: np.ndarray, w_PGT: np.ndarray, grpo: GRPOConfig, longest: int
    ) -> dict[str, DirectionalDerivatives]:
        """First and second orders of every objective, by prompt (`objectives.derivatives`).

        Args:
          u_PGT, w_PGT: first and second derivatives of the log-prob of each token along a direction.
          grpo: the settings of the trainer's loss, which give the objective `grpo` its advantages, tokens and mean.
          longest: the longest completion allowed, in tokens; the trainer's mean may divide by it.

        Returns:
          name of the objective -> its orders.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        kept, success_PG = self.trained(grpo), self.success_PG
        mean = token_weights(kept.mask_PGT, grpo.aggregation, longest)
        return dict(derivatives(u_PGT, w_PGT, self.mask_PGT, self.adv_PG, success_PG, kept.adv_PG, *mean))

    def trained(self, grpo: GRPOConfig) -> Trained:
        """The advantages and the trained tokens that the trainer would use for these completions.

        Args:
          grpo: the settings of the trainer's loss.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        return trained(self.rewards_PG, self.mask_PGT, self.ended_PG, grpo)


def check(runtime: Runtime, domains: Sequence[str], who: str = "") -> None:
    """Checks, before anything runs, that samples of these domains can be drawn and divided over the mesh.

    Args:
      runtime: the prompts, the mesh and the configuration.
      domains: the domains to be sampled.
      who: the beginning of the error message, for example "stage ewc-qa: ".

    Raises:
      UserError: if the mesh does not divide the rows of a micro-batch or the prompts that are sampled at once, or if a
        domain has too few prompts, or too few groups of prompts.
      KeyError: if the run has no prompts of a domain.
    """
    config, parts = runtime.config.analyze, batch_divisor(runtime.mesh)
    at_once = sampled_at_once(config.prompts, config.batch, runtime.config.evaluate.batch)
    for what, size in (
        ("analyze.batch * group_size", config.batch * config.group_size),
        ("number of prompts sampled at once (from analyze.prompts, analyze.batch, evaluate.batch)", at_once),
    ):
        if size % parts:
            raise UserError(f"{who}{what} = {size} is not divisible by the mesh's data * fsdp = {parts}")
    for domain in domains:
        there = runtime.prompts[domain, config.split]
        if there.n_independent < config.prompts:
            what = "prompts" if there.groups is None else "groups (group_by) of prompts, of which one of each is used"
            raise UserError(
                f"{who}analyze.prompts={config.prompts}, but {domain} has {there.n_independent} {config.split} {what}"
            )


def draw(runtime: Runtime, params: Any, domain: str, n_prompts: int | None = None, first: int = 0) -> Sample:
    """Samples `analyze.group_size` completions of each prompt.

    The prompts and the sampling keys depend only on the configuration and on `domain`, `n_prompts` and `first`, so the
    same parameters give the same completions.

    Args:
      runtime: the model, prompts, rewards and configuration.
      params: the parameters that are sampled from.
      domain: whose prompts are used.
      n_prompts: the number of prompts, a positive multiple of `analyze.batch`; None for `analyze.prompts`.
      first: how many prompts at the beginning of the shuffle are left out. Beyond the last prompt, prompts come
        again in a new order; the caller checks that there are enough (`PromptSet.n_independent`).

    Returns:
      the completions with their rewards, cut to the smallest bucket of lengths that holds them.

    Raises:
      UserError, RuntimeError: as in `Rollouts.sample`, for example if too many rewards fail.
      ValueError: if the number of prompts is not a positive multiple of `analyze.batch`.
      KeyError: if the run has no prompts of the domain.
    """
    config = runtime.config.analyze
    prompts = runtime.prompts[domain, config.split]
    last = first + (config.prompts if n_prompts is None else n_prompts)
    order = visit_order(runtime.config.seed, STAGE_OF_KEYS, domain, len(prompts), 0, max(last, len(prompts)))
    chosen = groups_apart(order, prompts.groups)[first:last]
    key_path = (runtime.config.seed, STAGE_OF_KEYS, 0)
    parts = len(chosen) // sampled_at_once(len(chosen), config.batch, runtime.config.evaluate.batch)
    sampling = runtime.config.rollout.sampling
    scored = runtime.rollouts.sample(params, [(prompts, chosen)], key_path, config.group_size, sampling, parts)
    scored = scored.cut(runtime.config.rollout.completion_buckets)
    return Sample(
        prompts_PT=scored.prompts_PT,
        valid_PT=scored.valid_PT,
        tokens_PGT=scored.completions.tokens_PGT,
        mask_PGT=scored.mask_PGT,
        rewards_PG=scored.rewards_PG,
        ended_PG=scored.completions.ended_PG,
    )


def sampled_at_once(prompts: int, batch: int, most: int) -> int:
    """How many prompts are sampled at once: the largest multiple of `batch`, up to `most`, that divides `prompts`.

    Args:
      prompts: the number of prompts, a positive multiple of `batch`.
      batch: prompts per micro-batch of the analysis, at least 1. The result is never below it, even if `most` is.
      most: how many prompts may be sampled at once.

    Returns:
      the number, at least `batch`.

    Raises:
      ValueError: if `prompts` is not a positive multiple of `batch`.
    """
    if prompts < 1 or prompts % batch:
        raise ValueError(f"{prompts} prompts cannot be sampled in batches of {batch}; it must be a positive multiple")
    sizes = range(batch, max(most, batch) + 1, batch)
    return max(size for size in sizes if prompts % size == 0)


def load(file: Path) -> Sample:
    """Reads a sample that `save` wrote.

    Raises:
      OSError: if the file cannot be read.
      ValueError, EOFError or zipfile.BadZipFile: if it is damaged.
      KeyError: if it lacks an array of a sample.
    """
    with np.load(file) as arrays:
        return Sample(**{f.name: arrays[f.name] for f in dataclasses.fields(Sample)})


def save(file: Path, sample: Sample) -> None:
    """Writes a sample to a file (`.npz`), as `records.write_bytes` does: whole or not at all, by process 0."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)})
    records.write_bytes(file, buffer.getvalue())
