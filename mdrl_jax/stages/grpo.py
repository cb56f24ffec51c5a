"""One GRPO stage: sample, judge, update, as a generator of steps that can start anywhere.

The state after step s depends on (config, stage, s) and the state before it alone: prompts and keys are functions
of the step, so a resumed stage goes on exactly as it would have.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.domains.prompts import visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.parallel.sharding import batch_divisor, put
from mdrl_jax.rl.grpo import GRPOBatch, group_advantages, kl_estimate, loss_mask
from mdrl_jax.rl.policy import PolicyBatch, join, make_grpo_loss, make_log_probs
from mdrl_jax.rl.rollouts import ScoredRollouts, prompts_at_once
from mdrl_jax.rl.trainer import (
    TrainState,
    Transforms,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage

Metrics = dict[str, Any]  # figures of a step; "rewards" are those of all its completions, [P, G]
Extra = Callable[[int, Any], dict[str, Any]]  # (step, params) -> the optimizer's extra arguments


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a stage compiles: stages with the same loss, optimizer and shapes share one."""

    optimizer: Any
    shardings: TrainState
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    log_probs: Callable[..., jax.Array]


def make_programs(runtime: Runtime, stage: Stage, transforms: Transforms) -> Programs:
    """The stage's optimizer and jitted functions."""
    config, temperature = runtime.config, runtime.config.rollout.sampling.temperature
    chunk = config.model.logprob_chunk
    optimizer = make_optimizer(stage.train.optimizer, transforms)
    shardings = state_shardings(optimizer, runtime.shapes, runtime.shardings, runtime.mesh)
    longest = config.rollout.completion_buckets[-1]
    loss_fn = make_grpo_loss(runtime.model, stage.train.grpo, temperature, longest, chunk)
    return Programs(
        optimizer=optimizer,
        shardings=shardings,
        step=make_train_step("grpo_step", loss_fn, optimizer, shardings, runtime.mesh),
        log_probs=make_log_probs(runtime.model, runtime.mesh, temperature, chunk),
    )


def check_divides(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage whose batches the mesh does not divide, or whose completions a device has no room for.

    Raises:
      UserError: naming the stage, the size and the mesh; or what one prompt takes.
    """
    prompts_at_once(runtime.config.rollout, runtime.model, runtime.mesh, stage.train.group_size)
    divisor, train, parts = batch_divisor(runtime.mesh), stage.train, runtime.config.rollout.parts
    sizes = {
        "prompts_per_step" if parts == 1 else "prompts_per_step / rollout.parts": train.prompts_per_step // parts,
        "prompts_per_step * group_size / grad_accum_steps": train.prompts_per_step
        * train.group_size
        // train.grad_accum_steps,
    }
    for what, size in sizes.items():
        if size % divisor:
            raise UserError(
                f"stage {stage.name}: {what} = {size} is not divisible by the mesh's data * fsdp = {divisor}"
            )


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant."""
    return stage.train.learning_rate * stage.train.lr_scale(step)


def grpo_steps(
    runtime: Runtime, stage: Stage, programs: Programs, state: TrainState, reference: Any, first: int, extra: Extra
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Yields (steps done, state, metrics) after each step from `first`; the yielded state is donated to the next.

    `reference` are the parameters that the KL is taken to; None where nothing needs them. `extra` makes the
    optimizer's extra arguments for a step.
    """
    train = stage.train
    for step in range(first, train.steps):
        started = time.monotonic()
        sets = []
        for domain, count in shares(stage).items():
            prompts = runtime.prompts[domain, "train"]
            order = visit_order(runtime.config.seed, stage.stream, domain, len(prompts), step * count, count)
            sets.append((prompts, order))
        scored = runtime.rollouts.sample(
            state.params,
            sets,
            (runtime.config.seed, stage.stream, step),
            train.group_size,
            runtime.config.rollout.sampling,
            runtime.config.rollout.parts,
        )
        sampled = time.monotonic()
        batch, metrics = make_batch(runtime, stage, programs, state.params, reference, scored, step)
        rate = jnp.float32(learning_rate(stage, step))
        updates = []
        for _ in range(train.grpo.updates_per_batch):
            state, logged = programs.step(state, batch, rate, extra(step, state.params))
            updates.append(logged)
        for name in updates[0]:
            metrics[name] = float(np.mean([float(u[name]) for u in updates]))
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = time.monotonic() - sampled
        yield step + 1, state, metrics


def shares(stage: Stage) -> dict[str, int]:
    """Prompts a step of each domain: the stage's own, and those replayed of the domains it keeps."""
    train = stage.train
    each = round(train.prompts_per_step * train.prevent.replay / len(stage.keeps)) if stage.keeps else 0
    replayed = {domain: each for domain in stage.keeps if each}
    own = train.prompts_per_step - sum(replayed.values())
    return {domain: own // len(stage.domains) for domain in stage.domains} | replayed


def needs_reference(stage: Stage) -> bool:
    """Whether a stage computes log-probs under a reference policy."""
    return stage.train.grpo.kl_coef > 0 or stage.train.kl_every > 0


def make_batch(
    runtime: Runtime,
    stage: Stage,
    programs: Programs,
    params: Any,
    reference: Any,
    scored: ScoredRollouts,
    step: int,
) -> tuple[PolicyBatch, Metrics]:
    """Scored completions as the loss's micro-batches on the devices, and what they say of the policy."""
    train, grpo = stage.train, stage.train.grpo
    done = scored.completions
    adv_PG, informative_P = jax.device_get(group_advantages(jnp.asarray(scored.rewards_PG), scale=grpo.scale))
    longest = int(done.length_PG.max())
    length = tokens.bucket(longest, runtime.config.rollout.completion_buckets, "a completion")
    mask_PGT = scored.mask_PGT[:, :, :length]
    rows = adv_PG.size

    def flat(x_PGT: np.ndarray) -> np.ndarray:
        return x_PGT[:, :, :length].reshape(rows, length)

    tokens_BT, valid_BT = join(scored.prompts_PT, scored.valid_PT, done.tokens_PGT[:, :, :length], mask_PGT)
    informative_B = jnp.asarray(np.repeat(informative_P, train.group_size))
    truncated_B = jnp.asarray(~done.ended_PG.reshape(-1))
    mask_BT = np.asarray(loss_mask(jnp.asarray(flat(mask_PGT)), informative_B, truncated_B, grpo))
    arrays = micro_batches(
        {
            "tokens": np.asarray(tokens_BT),
            "valid": np.asarray(valid_BT),
            "sampler_logp": flat(done.logp_PGT),
            "adv": adv_PG.reshape(-1),
            "mask": mask_BT,
        },
        train.grad_accum_steps,
    )
    arrays = put(arrays, runtime.mesh, None, "batch")
    start = scored.prompts_PT.shape[1]
    log_probs = lambda p: programs.log_probs(p, arrays["tokens"], arrays["valid"], start)  # noqa: E731
    old = log_probs(params) if grpo.updates_per_batch > 1 else None
    ref = log_probs(reference) if grpo.kl_coef > 0 else None
    batch = PolicyBatch(
        tokens_BT=arrays["tokens"],
        valid_BT=arrays["valid"],
        grpo=GRPOBatch(
            old_logp_BT=old,
            sampler_logp_BT=arrays["sampler_logp"],
            ref_logp_BT=ref,
            adv_B=arrays["adv"],
            mask_BT=arrays["mask"],
        ),
    )
    n_tokens = float(scored.mask_PGT.sum())
    prompt_tokens = float(scored.valid_PT.sum()) * train.group_size
    metrics = {
        "tokens": n_tokens + prompt_tokens,
        "tokens_sampled": n_tokens,
        "rewards": scored.rewards_PG,
        "reward": float(scored.rewards_PG.mean()),
        "accuracy": float(scored.accuracy_PG.mean()),
        "length": float(done.length_PG.mean()),
        "ended": float(done.ended_PG.mean()),
        "informative": float(informative_P.mean()),
        "dropped_groups": float((~informative_P).sum()) if grpo.drop_zero_variance else 0.0,
        "entropy": float(-(done.logp_PGT * scored.mask_PGT).sum() / n_tokens),
        "reward_errors": float(sum(scored.errors.values())),
        **{f"reward_errors/{kind}": float(n) for kind, n in scored.errors.items()},
    }
    if ref is None and train.kl_every and step % train.kl_every == 0:
        kl_BT = kl_estimate(log_probs(params), log_probs(reference), "k3")
        whole_BT = put(micro_batches(flat(mask_PGT), train.grad_accum_steps), runtime.mesh, None, "batch")
        metrics["kl"] = float(jnp.sum(kl_BT * whole_BT) / jnp.sum(whole_BT))
    return batch, metrics
