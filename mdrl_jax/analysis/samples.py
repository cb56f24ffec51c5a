"""Completions that the analysis looks at: of one domain, sampled at one point, with their rewards.

The prompts are the first `analyze.prompts` of a shuffle of `analyze.split`, the same at every point and drawn with the
same keys, so that differences between points are paired. Every point has its own samples: no damage is ever measured
by importance weights (definitions §1). Sets are kept in `analysis/samples/`, so that a resumed analysis reads them.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import records
from mdrl_jax.domains.prompts import visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.sharding import batch_divisor
from mdrl_jax.rl.grpo import GRPOConfig, group_advantages, loss_mask
from mdrl_jax.rl.policy import join
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import (
    SUCCESS,
    CompletionBatch,
    DirectionalDerivatives,
    derivatives,
    leave_one_out,
)

STAGE_OF_KEYS = "analyze"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Completions of P prompts, G each, on the host; prompts are left-padded, completions cut to a bucket's length."""

    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    tokens_PGT: np.ndarray
    mask_PGT: np.ndarray
    rewards_PG: np.ndarray
    ended_PG: np.ndarray

    @property
    def n_prompts(self) -> int:
        """P."""
        return self.rewards_PG.shape[0]

    @property
    def adv_PG(self) -> np.ndarray:
        """Reward minus the mean of the other completions of the prompt; 0 where there is no other."""
        if self.rewards_PG.shape[1] == 1:
            return np.zeros(self.rewards_PG.shape)
        return leave_one_out(self.rewards_PG.astype(np.float64))

    @property
    def success_PG(self) -> np.ndarray:
        """1.0 where the reward is the full one."""
        return (self.rewards_PG >= SUCCESS).astype(np.float64)

    @property
    def informative(self) -> float:
        """Share of prompts whose rewards differ: below 0.2 the reward's Hessian is not measurable (definitions §6)."""
        return float((np.ptp(self.rewards_PG, axis=1) > 0).mean())

    def take(self, prompts: np.ndarray) -> "Sample":
        """The sample of some of its prompts."""
        return Sample(*(getattr(self, f.name)[prompts] for f in dataclasses.fields(self)))

    def completions(self, chosen_P: np.ndarray) -> "Sample":
        """One completion of each prompt: groups of 1."""
        at = np.arange(self.n_prompts)
        grouped = ("tokens_PGT", "mask_PGT", "rewards_PG", "ended_PG")
        return dataclasses.replace(self, **{name: getattr(self, name)[at, chosen_P][:, None] for name in grouped})

    def padded(self, length: int) -> "Sample":
        """Completions padded to `length` tokens, so that samples of several domains share one compiled program."""
        widths = ((0, 0), (0, 0), (0, length - self.mask_PGT.shape[2]))
        longer = {name: np.pad(getattr(self, name), widths) for name in ("tokens_PGT", "mask_PGT")}
        return dataclasses.replace(self, **longer)

    def rows(self, batch: int, adv_PG: np.ndarray | None = None) -> list[CompletionBatch]:
        """On the host, in micro-batches of `batch` prompts; the last is filled up with rows of weight 0."""
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
        )
        size = batch * group
        return [jax.tree.map(lambda x, i=i: x[i : i + size], rows) for i in range(0, len(filled) * group, size)]

    def derivatives(self, u_PGT: np.ndarray, w_PGT: np.ndarray, grpo: GRPOConfig) -> dict[str, DirectionalDerivatives]:
        """`objectives.derivatives` with this sample's rewards; `grpo` gives the trainer's own advantages."""
        trained_PG, informative_P = distributed.gather(group_advantages(jnp.asarray(self.rewards_PG), scale=grpo.scale))
        group = self.rewards_PG.shape[1]
        mask_BT = self.mask_PGT.reshape(-1, self.mask_PGT.shape[-1])
        kept_BT = loss_mask(
            jnp.asarray(mask_BT),
            jnp.asarray(np.repeat(informative_P, group)),
            jnp.asarray(~self.ended_PG.reshape(-1)),
            grpo,
        )
        kept_PGT = np.asarray(kept_BT).reshape(self.mask_PGT.shape)
        return dict(derivatives(u_PGT, w_PGT, self.mask_PGT, self.adv_PG, self.success_PG, trained_PG, kept_PGT))


def check(runtime: Runtime, domains: Sequence[str], who: str = "") -> None:
    """Refuses what cannot be drawn and streamed; `who`: "stage ewc-qa: ", for whom.

    Raises:
      UserError: for micro-batches that the mesh does not divide, or too few prompts.
    """
    config, parts = runtime.config.analyze, batch_divisor(runtime.mesh)
    at_once = sampled_at_once(config.prompts, config.batch, runtime.config.evaluate.batch)
    for what, size in (
        ("analyze.batch * group_size", config.batch * config.group_size),
        ("analyze.prompts at once", at_once),
    ):
        if size % parts:
            raise UserError(f"{who}{what} = {size} is not divisible by the mesh's data * fsdp = {parts}")
    for domain in domains:
        n = len(runtime.prompts[domain, config.split])
        if n < config.prompts:
            raise UserError(f"{who}analyze.prompts={config.prompts}, but {domain} has {n} {config.split} prompts")


def draw(runtime: Runtime, params: Any, domain: str, n_prompts: int | None = None, first: int = 0) -> Sample:
    """Samples `analyze.group_size` completions of each prompt at `params`, the `first` prompts left out.

    Raises:
      UserError: if rewards fail (`Runtime.sample`).
    """
    config = runtime.config.analyze
    prompts = runtime.prompts[domain, config.split]
    last = first + (n_prompts or config.prompts)
    chosen = visit_order(runtime.config.seed, STAGE_OF_KEYS, domain, len(prompts), 0, last)[first:]
    key_path = (runtime.config.seed, STAGE_OF_KEYS, 0)
    parts = len(chosen) // sampled_at_once(len(chosen), config.batch, runtime.config.evaluate.batch)
    sampling = runtime.config.rollout.sampling
    scored = runtime.rollouts.sample(params, [(prompts, chosen)], key_path, config.group_size, sampling, parts)
    done = scored.completions
    longest = int(done.length_PG.max())
    length = tokens.bucket(longest, runtime.config.rollout.completion_buckets, "a completion")
    return Sample(
        prompts_PT=scored.prompts_PT,
        valid_PT=scored.valid_PT,
        tokens_PGT=done.tokens_PGT[:, :, :length],
        mask_PGT=scored.mask_PGT[:, :, :length],
        rewards_PG=scored.rewards_PG,
        ended_PG=done.ended_PG,
    )


def sampled_at_once(prompts: int, batch: int, most: int) -> int:
    """The largest multiple of `batch`, up to `most` prompts, that divides the prompts; at least `batch`."""
    sizes = range(batch, max(most, batch) + 1, batch)
    return max(size for size in sizes if prompts % size == 0)


def load(file: Path) -> Sample:
    """A set written by `save`."""
    with np.load(file) as arrays:
        return Sample(**{f.name: arrays[f.name] for f in dataclasses.fields(Sample)})


def save(file: Path, sample: Sample) -> None:
    """Writes a set whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)})
    records.write_bytes(file, buffer.getvalue())
