"""The steps of a GRPO stage, as a generator that can start at any step.

`stages/train.py` runs the generator. A step samples completions of its prompts and scores them (`rl/rollouts.py`),
turns them into a batch (`make_batch`), and updates the parameters (`rl/trainer.py`). The loss is that of definitions
§15.

The state after a step depends only on the state before it and on (configuration, stage, number of the step). Prompts
and sampling keys are functions of the step, so a resumed stage continues exactly as if it had not been interrupted.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.sharding import batch_divisor, put
from mdrl_jax.rl import trainer
from mdrl_jax.rl.grpo import kl_estimate
from mdrl_jax.rl.policy import (
    PolicyBatch,
    cut_shapes,
    make_cases,
    make_grpo_loss,
    make_log_probs,
    policy_batch,
    row_order,
    shared_rows,
    trained,
)
from mdrl_jax.rl.random_signs import random_signs
from mdrl_jax.rl.rollouts import ScoredRollouts, prompts_at_once
from mdrl_jax.rl.trainer import (
    LossFn,
    TrainState,
    Transforms,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stages import dynamic_sampling
from mdrl_jax.stages.dynamic_sampling import Rows

Metrics = dict[str, Any]  # name -> figure of a step, a number; "rewards" is an array with all its rewards [P, G]
Extra = Callable[[int, Any], dict[str, Any]]  # (step, params) -> the optimizer's extra arguments
Teach = Callable[[PolicyBatch, Any], PolicyBatch]  # (batch, params) -> the batch with its teachers' targets


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a stage; stages with the same loss, optimizer and transforms share them.

    Attributes:
      optimizer: the optax optimizer, without the learning rate.
      shardings: shardings of the training state.
      step: the training step, from `make_train_step`: (state, batch, learning rate, extra) -> (next state, metrics).
      log_probs: from `make_log_probs`: (params, tokens, valid, start) -> log-probs of all rows of a batch.
      taught: of a distillation, its further programs (`stages/distill.py`).
    """

    optimizer: Any
    shardings: TrainState
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    log_probs: Callable[..., jax.Array]
    taught: Any = None


def make_programs(
    runtime: Runtime,
    stage: Stage,
    transforms: Transforms,
    name: str = "grpo_step",
    loss_fn: LossFn | None = None,
    given: Sequence[str] = (),
    shared: int | None = None,
    split: bool = False,
) -> Programs:
    """Makes the programs of a stage.

    Args:
      runtime: model, devices and configuration of the run.
      stage: the stage; its options of the loss and of the optimizer and `random_signs` are read.
      transforms: gradient transformations that protect other domains (`recovery/prevention/`).
      name: name of the training step.
      loss_fn: the loss; None: that of GRPO.
      given: names of the extra arguments that the loss takes (`make_train_step`).
      shared: completions that share one computation of their prompt; None: as many as in the stage (`shared_by`).
      split: whether the training step is one program for each micro-batch (`make_train_step`).

    Returns:
      New `Programs`, which are compiled when they are first called.
    """
    config, temperature = runtime.config, runtime.config.rollout.sampling.temperature
    chunk = config.model.logprob_chunk
    if stage.train.random_signs:
        transforms = Transforms(transforms.gradient, (*transforms.update, random_signs(config.seed)))
    optimizer = make_optimizer(stage.train.optimizer, transforms)
    shardings = state_shardings(optimizer, runtime.shapes, runtime.shardings, runtime.mesh)
    longest = config.rollout.completion_buckets[-1]
    shared = shared_by(runtime, stage) if shared is None else shared
    loss_fn = loss_fn or make_grpo_loss(runtime.model, stage.train.grpo, temperature, longest, chunk, shared)
    cases = make_cases(*_buckets(runtime, stage))
    return Programs(
        optimizer=optimizer,
        shardings=shardings,
        step=make_train_step(name, loss_fn, optimizer, shardings, runtime.mesh, cases, given, split),
        log_probs=make_log_probs(runtime.model, runtime.mesh, temperature, chunk, shared),
    )


def _buckets(runtime: Runtime, stage: Stage) -> tuple[Sequence[int], Sequence[int]]:
    """The lengths to which a micro-batch of prompts and completions may be cut.

    There are none for a single micro-batch: `make_batch` has cut it already.
    """
    rollout = runtime.config.rollout
    several = stage.train.grad_accum_steps > 1
    return (rollout.prompt_buckets, rollout.completion_buckets) if several else ((), ())


def shared_by(runtime: Runtime, stage: Stage) -> int:
    """Completions that share one computation of their prompt in a training step (`policy.shared_rows`)."""
    train = stage.train
    rows = train.prompts_per_step * train.group_size // train.grad_accum_steps
    return shared_rows(train.group_size, rows, batch_divisor(runtime.mesh))


def takes_long(runtime: Runtime, stage: Stage) -> bool:
    """Whether an update of a GRPO stage may take long (`trainer.takes_long`)."""
    train, rollout = stage.train, runtime.config.rollout
    length = rollout.prompt_buckets[-1] + rollout.completion_buckets[-1]
    return trainer.takes_long(runtime.model.config, train.prompts_per_step * train.group_size * length, runtime.mesh)


def check_divides(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage whose batches the mesh cannot split evenly, or that has too few prompts or too little memory.

    Raises:
      UserError: if a size is not divisible by the mesh, if a domain has fewer training prompts than a step takes, or if
        a device has no room for the completions of one prompt. The message names the sizes.
    """
    for domain, count in visits(stage).items():
        if (domain, "train") not in runtime.prompts:
            continue  # the command `fit` reads no data
        have = len(runtime.prompts[domain, "train"])
        if have < count:
            raise UserError(
                f"stage {stage.name}: a step takes {count} prompts of {domain}, which has {have} train prompts; raise "
                "domains.n_train or lower train.prompts_per_step"
            )
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
    """The learning rate of a step: linear warm-up over `train.warmup_steps`, then constant at `train.learning_rate`.

    Args:
      stage: a GRPO stage.
      step: number of the step, from 0.
    """
    return stage.train.learning_rate * stage.train.lr_scale(step)


def grpo_steps(
    runtime: Runtime,
    stage: Stage,
    programs: Programs,
    state: TrainState,
    reference: Any,
    first: int,
    extra: Extra,
    teach: Teach = lambda batch, params: batch,
    rows: Rows = MappingProxyType({}),
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Runs the steps of a stage.

    Args:
      runtime: model, devices, prompts and rewards of the run.
      stage: the stage.
      programs: its compiled programs.
      state: the training state after `first` steps. The first step reuses its memory.
      reference: parameters of the reference policy of the KL; None if `needs_reference` is false.
      first: number of steps that were done before.
      extra: (step, params) -> the optimizer's extra arguments by name for an update; the step is counted from 0.
      teach: of a distillation, adds what the teachers say to a batch: (batch, params of the student) -> batch.
      rows: domain -> the rows of its training prompts that may be visited. Of a domain that it lacks, all may be.

    Yields:
      after each step: the number of steps done (those before `first` included), the training state, and the metrics.
      The next step reuses the memory of the state, so a caller that keeps it must copy it first. The metrics are

      - those of `make_batch`;
      - "rounds" and "groups": numbers of rounds and of groups that were sampled. With more than one round,
        "informative" and "tokens_sampled" are those of all rounds, and the metrics of `_sampled` are those of the
        first, which was not chosen by its rewards;
      - the means over the step's updates of those of the training step (`make_train_step` with `grpo_loss`);
      - "seconds_sampling" (rewards included) and "seconds_training".

    Raises:
      UserError: if too many rewards of a step fail (`Rollouts.sample`), or as in `make_batch`. All errors are raised
        when the step concerned is asked for.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      ValueError: as in `make_batch`.
      Dropped: if the run must end (`preemption`). The state that was yielded last is whole, because a step changes
        it only in its first update, which is not dropped once it has begun, and neither are the ones after it.
    """
    train = stage.train
    for step in range(first, train.steps):
        started = time.monotonic()
        scored, rounds = dynamic_sampling.draw(runtime, stage, state.params, shares(stage, step), rows, step)
        sampled = time.monotonic()
        batch, metrics = make_batch(runtime, stage, programs, state.params, reference, scored, step)
        batch = teach(batch, state.params)
        metrics |= _drawn(rounds)
        rate = jnp.float32(learning_rate(stage, step))
        updates = []
        for update in range(train.grpo.updates_per_batch):
            # From the second update on, the state before the step is gone, so the step is brought to its end.
            with preemption.whole() if update else contextlib.nullcontext():
                state, logged = programs.step(state, batch, rate, extra(step, state.params))
            runtime.rollouts.spent["trained"] += int(metrics["tokens_trained"])
            updates.append(logged)
        for name in updates[0]:
            metrics[name] = float(np.mean([float(u[name]) for u in updates]))
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = time.monotonic() - sampled
        yield step + 1, state, metrics


def shares(stage: Stage, step: int = 0) -> dict[str, int]:
    """Number of prompts of each domain in a step.

    The own domain of a step of `alternate-` is the one whose turn it is; other stages have the same own domains in all
    steps. The kept domains get the share `prevent.replay` of the prompts in equal parts, each rounded to a whole
    number, a half to the even one. The stage's own domains get the rest in equal parts; what is left over goes to the
    first of them, one prompt each, so the sum is `prompts_per_step`.

    Args:
      stage: a GRPO stage.
      step: number of the step, from 0.

    Returns:
      domain -> number of prompts; the stage's own domains first. Kept domains that get none are left out. Without
      `prevent.replay` there are only the stage's own.
    """
    train = stage.train
    each = round(train.prompts_per_step * train.prevent.replay / len(stage.keeps)) if stage.keeps else 0
    replayed = {domain: each for domain in stage.keeps if each}
    own = train.prompts_per_step - sum(replayed.values())
    domains = stage.domains
    if stage.prefix == "alternate":
        domains = (domains[step // train.turn % len(domains)],)
    part, left = divmod(own, len(domains))
    return {domain: part + (i < left) for i, domain in enumerate(domains)} | replayed


def visits(stage: Stage) -> dict[str, int]:
    """Number of prompts of each domain in a step that visits it: `shares` of a step of every turn."""
    turns = len(stage.domains) if stage.prefix == "alternate" else 1
    return {d: n for i in range(turns) for d, n in shares(stage, i * stage.train.turn).items()}


def taught_by(stage: Stage) -> np.ndarray | None:
    """The number of the teacher of each prompt of a step, from 0; None without teachers.

    A distillation has one teacher for each of its domains, or the one that `distill.teacher` names for all prompts.
    """
    if not stage.taught:
        return None
    counts = list(shares(stage).values())
    return np.repeat(np.arange(len(counts)) * (not stage.train.distill.teacher), counts)


def needs_reference(stage: Stage) -> bool:
    """Whether a stage computes log-probs under a reference policy, as a penalty or only to measure the KL."""
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
    """Makes the batch of a training step from scored completions.

    The tokens of every pass for log-probs are added to `runtime.rollouts.spent["forward"]`.

    Args:
      runtime: configuration and devices.
      stage: the stage; its options of the loss are read.
      programs: its compiled programs.
      params: parameters that the completions were sampled with.
      reference: parameters of the reference policy; None if `needs_reference` is false.
      scored: the completions with their rewards.
      step: number of the step, from 0; it decides whether the KL is measured (`train.kl_every`).

    Returns:
      the micro-batches on the devices, with log-probs of the old policy if `grpo.updates_per_batch` is above 1 and of
      the reference if `grpo.kl_coef` is above 0; and the metrics, numbers except "rewards":

      - "rewards": all rewards, an array [P, G].
      - "reward", "accuracy" (both in [0, 1]), "length" (tokens) and "ended" (share): means over completions.
      - "tokens": tokens of all rows; "tokens_sampled": tokens of the completions alone; "tokens_trained": tokens of the
        rows with a trained token. A prompt counts once for the rows that share its computation (`policy.shared_rows`).
      - "real": "tokens_trained" divided by the number of positions that an update computes; 0 if it computes none.
      - "informative": share of prompts whose rewards differ; "trained_groups", "equal_groups": numbers of prompts of
        the batch, and of those whose rewards do not differ; "dropped_groups": number of these that are left out of the
        loss.
      - "entropy": mean of −log p of a sampled token, in nats, under the distribution that it was drawn from.
      - "reward_errors": number of rewards that failed; "reward_errors/KIND": the same for each kind of error that
        occurred.
      - "kl": mean k3 estimate of the KL to the reference, in nats a token; only if this step measures it and the loss
        has no KL.

    Raises:
      UserError: if the completions cannot be divided into `train.grad_accum_steps` equal micro-batches, or one is
        longer than the last of `rollout.completion_buckets`.
      ValueError: if a prompt has a single completion, or the mesh cannot split the rows of a micro-batch evenly.
    """
    train, grpo, shared, teacher_P = stage.train, stage.train.grpo, shared_by(runtime, stage), taught_by(stage)
    cut = scored.cut(runtime.config.rollout.completion_buckets)
    kept = trained(cut.rewards_PG, cut.mask_PGT, cut.completions.ended_PG, grpo)
    batch = policy_batch(
        cut.prompts_PT, cut.valid_PT, cut.completions.tokens_PGT, cut.mask_PGT, cut.completions.logp_PGT, kept,
        train.grad_accum_steps, runtime.mesh, shared, teacher_P,
    )  # fmt: skip
    start = scored.prompts_PT.shape[1]
    n_tokens = float(scored.mask_PGT.sum())
    whole = n_tokens + float(scored.valid_PT.sum()) * train.group_size / shared

    def log_probs(p: Any) -> jax.Array:
        runtime.rollouts.spent["forward"] += int(whole)
        return programs.log_probs(p, batch.tokens_BT, batch.valid_BT, start)

    old = log_probs(params) if grpo.updates_per_batch > 1 else None
    ref = log_probs(reference) if grpo.kl_coef > 0 else None
    batch = dataclasses.replace(batch, grpo=dataclasses.replace(batch.grpo, old_logp_BT=old, ref_logp_BT=ref))
    n_rows, n_prompt_P = kept.adv_PG.size, cut.valid_PT.sum(axis=1)
    order_B = row_order(kept.mask_PGT, n_prompt_P[:, None] + cut.mask_PGT.sum(axis=-1), shared, teacher_P)
    n_trained, computed = _computed(
        np.repeat(n_prompt_P, train.group_size)[order_B],
        cut.mask_PGT.sum(axis=-1).reshape(n_rows)[order_B],
        kept.mask_PGT.any(axis=-1).reshape(n_rows)[order_B],
        train.grad_accum_steps,
        shared,
        cut_shapes(cut.prompts_PT.shape[1], cut.mask_PGT.shape[-1], *_buckets(runtime, stage)),
    )
    metrics = {
        "tokens": whole,
        "tokens_trained": n_trained,
        "real": n_trained / max(computed, 1),
        "tokens_sampled": n_tokens,
        "informative": float(kept.informative_P.mean()),
        "trained_groups": float(kept.informative_P.size),
        "equal_groups": float((~kept.informative_P).sum()),
        "dropped_groups": float((~kept.informative_P).sum()) if grpo.drop_zero_variance else 0.0,
        **_sampled(scored),
        "reward_errors": float(sum(scored.errors.values())),
        **{f"reward_errors/{kind}": float(n) for kind, n in scored.errors.items()},
    }
    if ref is None and train.kl_every and step % train.kl_every == 0:
        kl_BT = kl_estimate(log_probs(params), log_probs(reference), "k3")
        whole_BT = cut.mask_PGT.reshape(n_rows, -1)[order_B]
        whole_BT = put(micro_batches(whole_BT, train.grad_accum_steps), runtime.mesh, None, "batch")
        metrics["kl"] = float(jnp.sum(kl_BT * whole_BT) / jnp.sum(whole_BT))
    return batch, metrics


def _sampled(scored: ScoredRollouts) -> Metrics:
    """The metrics of completions, whatever is trained on them: rewards, accuracy, length, ended and entropy."""
    done = scored.completions
    return {
        "rewards": scored.rewards_PG,
        "reward": float(scored.rewards_PG.mean()),
        "accuracy": float(scored.accuracy_PG.mean()),
        "length": float(done.length_PG.mean()),
        "ended": float(done.ended_PG.mean()),
        "entropy": float(-(done.logp_PGT * scored.mask_PGT).sum() / float(scored.mask_PGT.sum())),
    }


def _drawn(rounds: Sequence[ScoredRollouts]) -> Metrics:
    """The metrics of all rounds of a step (`grpo_steps`)."""
    counts = {"rounds": float(len(rounds)), "groups": float(sum(len(r.rewards_PG) for r in rounds))}
    if len(rounds) == 1:
        return counts
    teaches = np.concatenate([dynamic_sampling.informative(r) for r in rounds])
    sampled = {"informative": float(teaches.mean()), "tokens_sampled": float(sum(r.mask_PGT.sum() for r in rounds))}
    return counts | sampled | _sampled(rounds[0])


def _computed(
    prompt_B: np.ndarray,
    completion_B: np.ndarray,
    trained_B: np.ndarray,
    n: int,
    shared: int,
    shapes: Sequence[tuple[int, int]],
) -> tuple[float, int]:
    """Counts the positions that an update computes. Lengths are chosen as on the devices (`policy.make_cases`).

    Args:
      prompt_B, completion_B: real tokens of the prompt and of the completion of each row.
      trained_B: True if a token of the row is trained.
      n: number of micro-batches.
      shared: rows that share one computation of their prompt.
      shapes: the lengths to which a micro-batch may be cut (`policy.cut_shapes`).

    Returns:
      (real tokens of the rows with a trained token, where a prompt counts once for the rows that share it; positions
      that the update computes).
    """
    real = positions = 0
    for prompts, completions, trained_rows in zip(
        *(np.split(x, n) for x in (prompt_B, completion_B, trained_B)), strict=True
    ):
        if trained_rows.any():
            longest = prompts[trained_rows].max(), completions[trained_rows].max()
            p, c = next(shape for shape in shapes if longest[0] <= shape[0] and longest[1] <= shape[1])
            positions += len(prompts) // shared * p + len(prompts) * c
            blocks = trained_rows.reshape(-1, shared).any(axis=1)
            real += prompts[::shared][blocks].sum() + completions[trained_rows].sum()
    return float(real), positions
