"""Supervised training on the domains' demonstrations: the stage `pretrain`, which made the embedded base model.

A batch has equally many replies of every domain, up to a remainder. The loss is `rl/sft.py`; only tokens of the reply
enter it.
"""

import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdrl_jax.config import SFTSection
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.parallel.sharding import batch_divisor, put
from mdrl_jax.rl.sft import SFTBatch, make_sft_loss
from mdrl_jax.rl.trainer import TrainState, make_optimizer, make_train_step, micro_batches, state_shardings
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stages.grpo import Metrics


def learning_rate(section: SFTSection, step: int) -> float:
    """The learning rate at a step.

    It rises linearly over `warmup_steps`, stays constant at `learning_rate`, and falls linearly over the last share
    `decay` of the steps. It would reach 0 one step after the last one.

    Args:
      section: section `sft` of the configuration.
      step: number of the step, from 0.
    """
    rise = (step + 1) / section.warmup_steps if section.warmup_steps else 1.0
    fall = (section.steps - step) / (section.decay * section.steps) if section.decay else 1.0
    return section.learning_rate * min(1.0, rise, fall)


def demonstrations(runtime: Runtime, stage: Stage, step: int) -> SFTBatch:
    """The batch of one step: replies of all domains in turn, drawn from (seed, stage, step) alone.

    Args:
      runtime: domains, tokenizer and configuration of the run.
      stage: the supervised stage.
      step: number of the step, from 0; after `sft.noise_from` of the steps replies are wrong with probability
        `sft.noise`.

    Returns:
      An `SFTBatch` of NumPy arrays [B, T] with B = `sft.batch_size` and T = `sft.length`, padded on the left. Each
      reply ends with the end token. Row i has a reply of domain i modulo the number of domains, so the numbers of
      replies differ by at most 1.

    Raises:
      UserError: if a domain has no demonstrations, or a demonstration is longer than `sft.length` tokens.
    """
    section = runtime.config.sft
    rng = random.Random(f"{runtime.config.seed}/{stage.name}/{step}")
    noise = section.noise if step >= section.noise_from * section.steps else 0.0
    prompts, replies = [], []
    for i in range(section.batch_size):
        domain = runtime.domains[stage.domains[i % len(stage.domains)]]
        if domain.demonstrate is None or not domain.pretraining:
            raise UserError(f"domain {domain.name} has no demonstrations; only procedural domains can be pretrained on")
        problem = rng.choice(domain.pretraining)
        prompts.append(problem.prompt)
        replies.append(domain.demonstrate(problem, rng, noise))
    reply_ids = [[*ids, runtime.rollouts.eos_ids[0]] for ids in runtime.tokenizer(replies).input_ids]
    lengths = [len(ids) for ids in reply_ids]
    rows = [[*p, *r] for p, r in zip(runtime.tokenizer(prompts).input_ids, reply_ids, strict=True)]
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) > section.length:
        raise UserError(
            f"sft.length={section.length} is too short for the {len(rows[longest])} tokens of "
            f"{prompts[longest]!r} {replies[longest]!r}"
        )
    tokens_BT, valid_BT = tokens.left_pad(rows, section.length, tokens.pad_id(runtime.tokenizer))
    from_end = section.length - np.arange(section.length)[None, :]
    mask_BT = (from_end <= np.asarray(lengths)[:, None]).astype(np.float32)
    return SFTBatch(tokens_BT=tokens_BT, valid_BT=valid_BT, mask_BT=mask_BT)


def make_programs(runtime: Runtime) -> tuple[Any, TrainState, Any]:
    """The programs of a supervised stage; they depend on the configuration alone.

    Args:
      runtime: model, devices and configuration of the run.

    Returns:
      The optimizer, without the learning rate; the shardings of the training state; the jitted training step
      (`make_train_step`).
    """
    optimizer = make_optimizer(runtime.config.sft.optimizer)
    shardings = state_shardings(optimizer, runtime.shapes, runtime.shardings, runtime.mesh)
    loss_fn = make_sft_loss(runtime.model, runtime.config.model.logprob_chunk)
    return optimizer, shardings, make_train_step("sft_step", loss_fn, optimizer, shardings, runtime.mesh)


def sft_steps(
    runtime: Runtime, stage: Stage, step_fn: Any, state: TrainState, first: int
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Runs the steps of a supervised stage.

    Args:
      runtime: data, devices and configuration of the run.
      stage: the supervised stage.
      step_fn: the jitted step from `make_programs`.
      state: the training state after `first` steps. The first step reuses its memory.
      first: number of steps done before.

    Yields:
      After each step: the number of steps done (those before `first` included), the new state, and the step's metrics
      "loss", "nll" (both in nats a token) and "grad_norm". The next step reuses the memory of the state, so a caller
      that keeps it must copy it first.

    Raises:
      UserError: if the mesh does not divide the rows of a micro-batch, or as in `demonstrations`; it is raised when the
        first step, or the step concerned, is asked for.
    """
    section = runtime.config.sft
    rows = section.batch_size // section.grad_accum_steps
    if rows % batch_divisor(runtime.mesh):
        raise UserError(
            f"sft.batch_size / sft.grad_accum_steps = {rows} is not divisible by the mesh's data * fsdp = "
            f"{batch_divisor(runtime.mesh)}"
        )
    for step in range(first, section.steps):
        drawn = demonstrations(runtime, stage, step)
        runtime.rollouts.spent["trained"] += int(np.sum(drawn.valid_BT))
        batch = micro_batches(drawn, section.grad_accum_steps)
        batch = put(batch, runtime.mesh, None, "batch")
        state, logged = step_fn(state, batch, jnp.float32(learning_rate(section, step)), {})
        yield step + 1, state, {name: float(value) for name, value in logged.items()}
