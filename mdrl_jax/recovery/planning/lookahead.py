"""Measures the effect of candidate changes, to first order, on every domain's mean reward, and rehearses refreshes.

A direction v is a change of the parameters. `measure` computes ∇J·v for many directions: one gradient for each block of
prompts serves all of them, so another candidate costs only inner products. `OffPolicyLookahead` makes the directions of
refreshes from stored completions.

A direction that was made from completions of a domain fits their noise. This holds for the first step of a refresh, and
for the coordinates of a rollback that are chosen to help the domain. On the same completions its first order is up to
several times too large. Every domain is therefore measured on prompts that no direction was made from (`unseen`). There
are more of these prompts than directions are made from, because candidates differ by small differences of their first
orders.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis import samples
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.config import TrainSection
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed, tree_programs
from mdrl_jax.progress import Show
from mdrl_jax.recovery.planning.forecast import Shift, shift
from mdrl_jax.recovery.spent import spend
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.policy import PolicyBatch, make_grpo_loss, policy_batch
from mdrl_jax.rl.trainer import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    state_shardings,
)
from mdrl_jax.runtime import Runtime

Floats = NDArray[np.float64]
Direction = Callable[[], Any]
UNCLIPPED = 1e6  # an upper clip that no ratio reaches


@dataclasses.dataclass(frozen=True)
class Found:
    """The measured effect of a direction v.

    Attributes:
      shifts: shift of the log-odds of each domain, to first order.
      norm: ‖v‖.
    """

    shifts: dict[str, Shift]
    norm: float


def at_hand(runtime: Runtime, stored: Sample) -> Sample:
    """A sample with its completions padded to one length, so that all samples share one compiled program.

    Args:
      runtime: of the run. The length is the last, longest one of `rollout.completion_buckets`.
      stored: the completions, at most that long. They are not changed.

    Raises:
      ValueError: if the completions are longer.
    """
    return stored.padded(runtime.config.rollout.completion_buckets[-1])


def unseen(runtime: Runtime, params: Any, domain: str) -> Sample:
    """Samples completions of prompts that no direction is made from.

    These are the `recover.forecast_prompts` prompts of `analyze.split` that follow, in the same shuffle, those of the
    stored samples.

    Args:
      runtime: of the run.
      params: the parameters to sample at.
      domain: the domain to sample, a scored one.

    Returns:
      The completions with their rewards, `analyze.group_size` of each prompt, padded as by `at_hand`.

    Raises:
      UserError: if the split has too few prompts.
      UserError, RuntimeError: if sampling fails (`samples.draw`).
      ValueError: if `recover.forecast_prompts` is no positive multiple of `analyze.batch`.
      KeyError: if the domain is not scored.
    """
    stored, split = runtime.config.analyze.prompts, runtime.config.analyze.split
    n, there = runtime.config.recover.forecast_prompts, runtime.prompts[domain, split].n_independent
    if there < stored + n:
        raise UserError(
            f"a forecast needs analyze.prompts + recover.forecast_prompts = {stored} + {n} {split} prompts of "
            f"{domain} (of different groups, if they form groups), which has {there}"
        )
    return at_hand(runtime, samples.draw(runtime, params, domain, n, first=stored))


def measure(
    probe: Probe,
    params: Any,
    looked: Mapping[str, Sample],
    directions: Sequence[Direction],
    show: Show,
) -> list[Found | None]:
    """Measures the effect of each direction on every domain, to first order.

    At most `analyze.held` directions are in memory at a time. If there are more, the gradients are computed again for
    each group of them (`rounds`). The tokens of the gradients are added to `rollouts.spent`.

    Args:
      probe: computes the gradients.
      params: the parameters from which the directions lead.
      looked: completions of each domain sampled at `params` (`unseen`). Their number of prompts has to be a multiple of
        `analyze.batch`.
      directions: functions that make the directions, trees like the parameters, or return None if that is impossible.
      show: is told the number of finished rounds and the present work.

    Returns:
      The effect of each direction, in their order; None for a direction that could not be made.

    Raises:
      The errors of the directions and of `show`.
    """
    held = probe.runtime.config.analyze.held
    found: list[Found | None] = [None] * len(directions)
    for first in range(0, len(directions), held):
        done = first // held
        show(done, "directions")
        made = {i: directions[i]() for i in range(first, min(first + held, len(directions)))}
        some = [i for i, direction in made.items() if direction is not None]
        trees = [made[i] for i in some]
        shifts: list[dict[str, Shift]] = [{} for _ in some]
        for domain, sample in looked.items():
            tell = functools.partial(show, done)
            gain_MV = _gains(probe, params, sample, trees, lambda t, d=domain, tell=tell: tell(f"gradient of {d}, {t}"))
            rewards_MB = sample.rewards_PG.reshape(len(gain_MV), -1)
            for at in range(len(some)):
                shifts[at][domain] = shift(gain_MV[:, at], rewards_MB)
        for at, i in enumerate(some):
            found[i] = Found(shifts[at], float(tree_programs.norm(trees[at])))
    return found


def rounds(n_directions: int, held: int) -> int:
    """The number of times that `measure` computes all gradients: n_directions / held, rounded up.

    Args:
      n_directions: number of directions to measure.
      held: number of directions in memory at a time, at least 1.
    """
    return -(-n_directions // held)


def _gains(probe: Probe, params: Any, sample: Sample, trees: list[Any], progress: Callable[[str], None]) -> Floats:
    """∇J·v, in rewards, for each block of prompts and each direction: [blocks, directions]."""
    blocks = probe.rows(sample)
    spend(probe.runtime, "gradient", blocks)
    out = np.zeros((len(blocks), len(trees)))
    for m, rows in enumerate(blocks):
        progress(f"block {m + 1} of {len(blocks)}")
        gradient = probe.gradient(params, rows)
        out[m] = [-float(x) for x in distributed.gather([tree_programs.vdot(v, gradient) for v in trees])]
    return out


class OffPolicyLookahead:
    """Rehearses a refresh on stored completions: the trainer's own step from a fresh optimizer, without new samples.

    A refresh is plain training (definitions §8). The transforms by which some stages keep other domains are therefore
    left out.

    Args:
      probe: of the run; it gives the model, and the log-probs of the stored completions.
    """

    def __init__(self, probe: Probe):
        self.probe, self.runtime = probe, probe.runtime

    @functools.cache  # noqa: B019  (the cache keeps the object alive, but a plan makes only one)
    def _program(self, grpo: GRPOConfig, optimizer: OptimizerConfig) -> tuple[Any, Any, Any]:
        config = self.runtime.config
        made = make_optimizer(optimizer)
        shardings = state_shardings(made, self.runtime.shapes, self.runtime.shardings, self.runtime.mesh)
        longest = config.rollout.completion_buckets[-1]
        temperature, chunk = config.rollout.sampling.temperature, config.model.logprob_chunk
        # A refresh samples anew at every step. The rehearsal uses the same completions again, so their ratios move
        # away from 1, and clipping would stop it early.
        free = dataclasses.replace(grpo, clip_low=1.0, clip_high=UNCLIPPED)
        loss = make_grpo_loss(self.runtime.model, free, temperature, longest, chunk)
        return made, shardings, make_train_step("planner_step", loss, made, shardings, self.runtime.mesh)

    def first(self, params: Any, sample: Sample, train: TrainSection) -> Any:
        """The change of the parameters by the first step of a refresh with learning rate 1.

        Args:
          params: the parameters to start from. They are not changed.
          sample: completions of the domain sampled there, padded as by `at_hand`, at least two for each prompt.
          train: settings of the stage; its loss and optimizer are used, its learning rate is not.

        Returns:
          The change by a single update, parameters after − before, a tree like the parameters.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        optimizer, shardings, step = self._program(train.grpo, train.optimizer)
        batch = self._batch(params, sample, train)
        spend(self.runtime, "trained", self.probe.rows(sample))
        state, _ = step(init_state(optimizer, params, shardings), batch, jnp.float32(1), {})
        return self.probe.difference(state.params, params)

    def walk(self, params: Any, sample: Sample, train: TrainSection, steps: int) -> Iterator[Any]:
        """Rehearses the first steps of a refresh.

        All steps use the same completions. From the second step on the policy differs from the one that sampled them,
        and the loss weights each token by its ratio.

        Args:
          params: the parameters to start from. They are not changed.
          sample: completions of the domain sampled there, padded as by `at_hand`, at least two for each prompt.
          train: settings of the stage: loss, optimizer, learning rate with warm-up, and updates of each step.
          steps: number of steps.

        Yields:
          The parameters after each step, the first one included. They are valid only until the next ones are asked for.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        optimizer, shardings, step = self._program(train.grpo, train.optimizer)
        batch, state = self._batch(params, sample, train), init_state(optimizer, params, shardings)
        for done in range(steps):
            for _ in range(train.grpo.updates_per_batch):
                spend(self.runtime, "trained", self.probe.rows(sample))
                state, _ = step(state, batch, jnp.float32(train.learning_rate * train.lr_scale(done)), {})
            yield state.params

    def _batch(self, params: Any, sample: Sample, train: TrainSection) -> PolicyBatch:
        spend(self.runtime, "forward", self.probe.rows(sample))
        batch = policy_batch(
            sample.prompts_PT, sample.valid_PT, sample.tokens_PGT, sample.mask_PGT,
            self.probe.log_probs(params, sample).astype(np.float32), sample.trained(train.grpo),
            sample.n_prompts // self.runtime.config.analyze.batch, self.runtime.mesh,
        )  # fmt: skip
        # At the first step the sampler, the trainer and the reference are the same policy: every ratio is 1, the KL 0.
        logp = batch.grpo.sampler_logp_BT
        ref = logp if train.grpo.kl_coef > 0 else None
        return dataclasses.replace(batch, grpo=dataclasses.replace(batch.grpo, old_logp_BT=logp, ref_logp_BT=ref))


def path_length(train: TrainSection, steps: int) -> float:
    """The learning rate summed over all updates of the first steps of a stage, with its warm-up: the size of a refresh.

    Args:
      train: settings of the stage. Each step counts once for each of its `grpo.updates_per_batch` updates.
      steps: number of steps.
    """
    total = sum(train.lr_scale(step) for step in range(steps))
    return train.learning_rate * total * train.grpo.updates_per_batch
