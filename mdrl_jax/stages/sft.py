"""The steps of a supervised stage: training on the replies that one domain, or several, demonstrate.

`stages/train.py` runs them. Rows and replies of a step are drawn from (seed, stage, step) alone, so a resumed stage
draws the same ones. A step of several domains has equally many rows of each, up to a remainder. The loss is
`rl/sft.py`; only tokens of the reply enter it, its end token included.
"""

import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdrl_jax.config import SFTSection
from mdrl_jax.domains.demonstrations import Demonstrations
from mdrl_jax.domains.prompts import check_ids
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.parallel.sharding import batch_divisor, put
from mdrl_jax.rl.rollouts import RolloutConfig
from mdrl_jax.rl.sft import SFTBatch, make_sft_loss
from mdrl_jax.rl.trainer import (
    OptimizerConfig,
    TrainState,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stages.grpo import Metrics


def check(runtime: Runtime, stage: Stage) -> dict[str, Any]:
    """Refuses a supervised stage that cannot run, before any stage runs.

    Args:
      runtime: model, devices, domains and configuration of the run.
      stage: the supervised stage.

    Returns:
      name of a domain -> which rows of it were left out, for `data.json` (`Demonstrations.record`); of data sets only.

    Raises:
      UserError: if a domain has no replies or none that fits, rows are longer than the model allows, or the mesh does
        not divide the rows of a micro-batch.
    """
    check_sizes(runtime, stage.sft, f"stage {stage.name}: ")
    return {s.domain.name: dict(s.record) for s in shown(runtime, stage) if s.record}


def check_sizes(runtime: Runtime, section: SFTSection, who: str = "") -> None:
    """Refuses settings whose micro-batches the mesh cannot split evenly, or whose rows are too long for the model.

    Args:
      runtime: its model and mesh are used.
      section: the settings of a supervised stage.
      who: the beginning of the error message, for example "stage sft-math: ".

    Raises:
      UserError: if rows are longer than the model allows, or the mesh does not divide the rows of a micro-batch.
    """
    rows, most = section.batch_size // section.grad_accum_steps, runtime.model.config.max_positions
    if rows % batch_divisor(runtime.mesh):
        raise UserError(
            f"{who}sft.batch_size / sft.grad_accum_steps = {rows} is not divisible by the mesh's "
            f"data * fsdp = {batch_divisor(runtime.mesh)}"
        )
    if section.length > most:
        raise UserError(f"{who}sft.length={section.length}, but the model allows {most} tokens; lower it")


def shown(runtime: Runtime, stage: Stage) -> list[Demonstrations]:
    """The rows of each domain of a supervised stage, in the order of its domains.

    Args:
      runtime: domains, tokenizer and configuration of the run.
      stage: the supervised stage.

    Raises:
      UserError: as in `Runtime.demonstrations`; the message begins with the stage.
    """
    try:
        return [runtime.demonstrations(d, stage.sft.length, stage.name == "pretrain") for d in stage.domains]
    except UserError as e:
        raise UserError(f"stage {stage.name}: {e}") from e


def learning_rate(section: SFTSection, step: int) -> float:
    """The learning rate at a step.

    It rises linearly over `warmup_steps`, stays constant at `learning_rate`, and falls linearly over the last share
    `decay` of the steps. It would reach 0 one step after the last one. Where rise and fall overlap, the smaller rate
    applies. Without warm-up, or without decay, that part is left out.

    Args:
      section: the settings of the stage.
      step: number of the step, from 0.
    """
    rise = (step + 1) / section.warmup_steps if section.warmup_steps else 1.0
    fall = (section.steps - step) / (section.decay * section.steps) if section.decay else 1.0
    return section.learning_rate * min(1.0, rise, fall)


def lengths(rollout: RolloutConfig, longest: int) -> tuple[int, ...]:
    """The lengths that rows may be padded to: `longest`, and the sums of a prompt and a completion bucket below it.

    Args:
      rollout: section `rollout` of the configuration.
      longest: the largest length, `sft.length`.

    Returns:
      The lengths in tokens, in ascending order.
    """
    sums = {p + c for p in rollout.prompt_buckets for c in rollout.completion_buckets}
    return (*sorted(n for n in sums if n < longest), longest)


def batch(runtime: Runtime, stage: Stage, step: int) -> SFTBatch:
    """The batch of one step: replies of all domains in turn, drawn from (seed, stage, step) alone.

    Args:
      runtime: domains, tokenizer and configuration of the run.
      stage: the supervised stage.
      step: number of the step, from 0. From the share `sft.noise_from` of the steps on, replies of procedural domains
        are wrong with probability `sft.noise`.

    Returns:
      An `SFTBatch` of NumPy arrays [B, T] with B = `sft.batch_size`, padded on the left to T, the smallest of `lengths`
      that holds the longest row. Each reply ends with the end token. Row i has a prompt and a reply of the stage's
      domain number i modulo the number of domains, so the numbers of rows of two domains differ by at most 1.

    Raises:
      UserError: if a domain has no demonstrations, a procedural one is longer than `sft.length` tokens, or one has a
        token that the model's vocabulary lacks.
    """
    section, tokenizer, eos_ids = stage.sft, runtime.tokenizer, runtime.rollouts.eos_ids
    rng = random.Random(f"{runtime.config.seed}/{stage.stream}/{step}")
    noise = section.noise if step >= section.noise_from * section.steps else 0.0
    sources = shown(runtime, stage)
    drawn = [sources[i % len(sources)].draw(rng, noise, tokenizer, eos_ids) for i in range(section.batch_size)]
    rows = [[*prompt, *reply] for prompt, reply in drawn]
    longest = max(rows, key=len)
    if len(longest) > section.length:
        raise UserError(
            f"stage {stage.name}: sft.length={section.length} is too short for the {len(longest)} tokens of "
            f"{tokenizer.decode(longest)!r}"
        )
    vocabulary = runtime.model.config.vocab_size
    check_ids([i for row in rows for i in row], vocabulary, f"stage {stage.name}: a demonstration")
    length = tokens.bucket(len(longest), lengths(runtime.config.rollout, section.length), "a demonstration")
    tokens_BT, valid_BT = tokens.left_pad(rows, length, runtime.rollouts.pad_id)
    from_end = length - np.arange(length)[None, :]
    mask_BT = (from_end <= np.asarray([len(reply) for _, reply in drawn])[:, None]).astype(np.float32)
    return SFTBatch(tokens_BT=tokens_BT, valid_BT=valid_BT, mask_BT=mask_BT)


def make_programs(runtime: Runtime, config: OptimizerConfig, split: bool = False) -> tuple[Any, TrainState, Any]:
    """The programs of a supervised stage; stages with the same optimizer share them.

    Args:
      runtime: model, devices and configuration of the run.
      config: `sft.optimizer` of the stage.
      split: as in `make_train_step`.

    Returns:
      The optimizer, without the learning rate; the shardings of the training state; the jitted training step
      (`make_train_step`), which is compiled once for each length of rows.
    """
    optimizer = make_optimizer(config)
    shardings = state_shardings(optimizer, runtime.shapes, runtime.shardings, runtime.mesh)
    loss_fn = make_sft_loss(runtime.model, runtime.config.model.logprob_chunk)
    step = make_train_step("sft_step", loss_fn, optimizer, shardings, runtime.mesh, split=split)
    return optimizer, shardings, step


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
      UserError: as in `batch`; it is raised when the step concerned is asked for.
    """
    section = stage.sft
    for step in range(first, section.steps):
        drawn = batch(runtime, stage, step)
        runtime.rollouts.spent["trained"] += int(np.sum(drawn.valid_BT))
        divided = put(micro_batches(drawn, section.grad_accum_steps), runtime.mesh, None, "batch")
        state, logged = step_fn(state, divided, jnp.float32(learning_rate(section, step)), {})
        yield step + 1, state, {name: float(value) for name, value in logged.items()}
