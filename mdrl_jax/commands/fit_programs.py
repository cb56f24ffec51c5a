"""The device programs that train and score, with the shapes that a run calls them with, for the command `fit`.

The functions that a run uses make the programs here and in `fit_analysis.py`, so `fit` compiles the same code. A stage
holds other arrays on the devices while a program runs, such as optimizer moments or a reference model. Their memory
(`Job.beside`) is counted here, mostly as a number of trees of the parameters' size. All prompts and completions are
assumed to be as long as the config allows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mdrl_jax.checkpoints import abstract
from mdrl_jax.config import SFTSection
from mdrl_jax.model import flops
from mdrl_jax.parallel.fit import bytes_a_device
from mdrl_jax.parallel.sharding import batch_divisor, divisor, named
from mdrl_jax.recovery.prevention import prepare
from mdrl_jax.rl.grpo import GRPOBatch
from mdrl_jax.rl.policy import PolicyBatch, shared_rows
from mdrl_jax.rl.rollout import cache_bytes, make_sampler
from mdrl_jax.rl.rollouts import prompts_at_once
from mdrl_jax.rl.sampling import SamplingConfig
from mdrl_jax.rl.sft import SFTBatch
from mdrl_jax.rl.trainer import TrainState
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.stage import Stage
from mdrl_jax.stages import distill, sft
from mdrl_jax.stages import grpo as loop

F32, I32 = jnp.float32, jnp.int32
ROWS, PROMPTS = "rows of a micro-batch", "prompts at once"


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
      name: name in the tables; of two jobs with the same name, the one with more memory held beside it is compiled.
      lower: (size) -> the lowered program, as from `jax.jit(f).lower(...)`; called under the mesh.
      beside: bytes of one device that arrays other than the program's own take, by name.
      size: configured size of the batch; 0 if the program has no size.
      what: the unit of `size`, e.g. "rows of a micro-batch".
      most: the largest size that is tried; sizes are multiples of the devices that rows are split over; 0 tries none.
      own: (size) -> the model's own count of FLOPs of one call, over all devices; None if there is no such count.
      trips: (size) -> iteration counts of loops whose end depends on the sampled text, innermost loop first.
      kv_bytes: (size) -> bytes of one device that the KV cache takes; None if there is no cache.
    """

    name: str
    lower: Callable[[int], Any]
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)
    size: int = 0
    what: str = ""
    most: int = 0
    own: Callable[[int], float] | None = None
    trips: Callable[[int], tuple[int, ...]] = lambda size: ()
    kv_bytes: Callable[[int], float] | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes and shardings of the arguments of programs.

    Attributes:
      runtime: model, mesh and configuration; it needs no arrays (`fit.abstract_runtime`).
    """

    runtime: Runtime

    @functools.cached_property
    def params(self) -> Any:
        """A tree of parameters or an edit: `jax.ShapeDtypeStruct`s with shape, dtype and sharding."""
        return abstract(self.runtime.shapes, self.runtime.shardings)

    def array(self, shape: tuple[int, ...], dtype: Any, *names: str | None) -> jax.ShapeDtypeStruct:
        """The shape and sharding of one array.

        Args:
          shape: its shape.
          dtype: its number format.
          *names: the logical axis of each dimension, a key of `sharding.RULES`; None for one that is not sharded.
            Further dimensions are not sharded.

        Raises:
          KeyError: if a name is not in `sharding.RULES`.
        """
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(self.runtime.mesh, *names))

    def trees(self, **counts: float) -> dict[str, float]:
        """Bytes of one device that trees of the parameters' size take.

        Args:
          **counts: number of trees by name.

        Returns:
          Bytes by name, with spaces in place of underscores; a name whose count is 0 is left out.
        """
        one = bytes_a_device(self.params)
        return {name.replace("_", " "): n * one for name, n in counts.items() if n}

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return self.runtime.config.rollout.prompt_buckets[-1]

    @property
    def new(self) -> int:
        """Tokens of the longest completion."""
        return self.runtime.config.rollout.completion_buckets[-1]

    def rows(self, n: int) -> CompletionBatch:
        """A micro-batch of n completions, as the analysis takes it."""
        row = functools.partial(self.array, (n,), F32, "batch")
        return CompletionBatch(
            tokens_BT=self.array((n, self.prompt + self.new), I32, "batch"),
            valid_BT=self.array((n, self.prompt + self.new), bool, "batch"),
            mask_BT=self.array((n, self.new), F32, "batch"),
            adv_B=row(),
            success_B=row(),
            weight_B=row(),
        )

    def masks(self) -> Any:
        """A set of coordinates: a boolean tree like the parameters."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool, sharding=x.sharding), self.params)

    def state(self, optimizer: Any, shardings: TrainState) -> TrainState:
        """The shapes and shardings of a training state.

        Args:
          optimizer: the optax optimizer, whose moments the state holds.
          shardings: a training state with a sharding in place of each array.
        """
        moments = jax.eval_shape(optimizer.init, self.runtime.shapes)
        step = jax.ShapeDtypeStruct((), I32, sharding=shardings.step)
        return TrainState(step, self.params, abstract(moments, shardings.opt_state))


def sampling(shapes: Shapes, name: str, prompts: int, group: int, how: SamplingConfig, beside: Any) -> Job:
    """The job of the sampler: prefill, then decoding until every completion has ended.

    Args:
      shapes: shapes of the arguments.
      name: name of the job.
      prompts: number of prompts in one call.
      group: completions of each prompt.
      how: temperature, top-k and top-p.
      beside: bytes of one device that arrays other than the sampler's own take, by name.

    Returns:
      The job. Its size is the number of prompts that are decoded at once: as many as `rollout.cache_gib` has room for,
      or all of them. Its largest size is `prompts`.

    Raises:
      UserError: if `rollout.cache_gib` has no room for one prompt with `group` completions.
    """
    runtime, mesh = shapes.runtime, shapes.runtime.mesh
    room = prompts_at_once(runtime.config.rollout, runtime.model, mesh, group)
    one = cache_bytes(runtime.model, group, shapes.prompt, shapes.new) / divisor(mesh, "kv_heads")

    def lower(at_once: int) -> Any:
        sampler = make_sampler(
            runtime.model,
            name,
            group_size=group,
            max_new_tokens=shapes.new,
            eos_ids=runtime.rollouts.eos_ids,
            sampling=how,
            at_once=at_once,
            compact=False,  # all completions are as long as allowed, so the loops after a move would run no step
        )
        prompt = functools.partial(shapes.array, (prompts, shapes.prompt))
        key = shapes.array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
        ids = shapes.array((prompts, 3), jnp.uint32, "batch", None)
        return sampler.lower(shapes.params, prompt(I32, "batch"), prompt(bool, "batch"), key, ids)

    return Job(
        name=name,
        lower=lower,
        beside=beside,
        size=min(room, prompts) or prompts,
        what=PROMPTS,
        most=prompts,
        own=lambda _: flops.sampled(runtime.model.config, prompts, group, shapes.prompt, shapes.new),
        trips=lambda at_once: (shapes.new - 1, -(-prompts // at_once) - 1),
        kv_bytes=lambda at_once: one * at_once / batch_divisor(mesh),
    )


def training(shapes: Shapes, stage: Stage) -> Iterator[Job]:
    """Yields the programs of a GRPO stage.

    In this order: the sampler; the log-probs, if the stage needs a reference or updates more than once on a batch; of a
    distillation the pass that asks a teacher, and for "top_k" the one that finds the student's likeliest tokens; the
    training step; and, for a refresh, a distillation or a stage with a target, the sampler of its scores. If EWC,
    A-GEM, PCGrad or `protect` changes the step, the last two are not yielded.

    Args:
      shapes: shapes of the programs' arguments.
      stage: the stage.

    Raises:
      UserError: when a sampler is asked for, as in `sampling`.
    """
    runtime, train = shapes.runtime, stage.train
    total, length = train.prompts_per_step * train.group_size, shapes.prompt + shapes.new
    make = distill.make_programs if stage.prefix == "distill" else loop.make_programs

    @functools.cache
    def programs(rows: int) -> loop.Programs:
        """The programs with micro-batches of this many rows, on which it depends how many share their prompt."""
        shared = shared_rows(train.group_size, rows, batch_divisor(runtime.mesh))
        return make(runtime, stage, prepare.transforms(train.prevent), shared=shared)

    made = programs(total // train.grad_accum_steps)
    state = shapes.state(made.optimizer, made.shardings)
    reference, again = loop.needs_reference(stage), train.grpo.updates_per_batch > 1
    recovering = shapes.trees(best_step=1, last_step=1) if stage.recovers else {}
    held = shapes.trees(reference=reference, teacher=stage.taught) | recovering
    moments = {"optimizer": bytes_a_device(state.opt_state)}

    def arrays(rows: int) -> Any:
        def array(dtype: Any, *width: int) -> Any:
            return shapes.array((-(-total // rows), rows, *width), dtype, None, "batch")

        return array

    def policy_batch(rows: int) -> PolicyBatch:
        array = arrays(rows)
        logp = array(F32, shapes.new)
        fixed = stage.prefix == "distill" and not stage.taught
        grpo = GRPOBatch(
            old_logp_BT=logp if again else None,
            sampler_logp_BT=logp,
            ref_logp_BT=logp if train.grpo.kl_coef > 0 else None,
            adv_B=logp if fixed else array(F32),
            mask_BT=logp,
        )
        batch = PolicyBatch(tokens_BT=array(I32, length), valid_BT=array(bool, length), grpo=grpo)
        if not stage.taught:
            return batch
        blank = jax.eval_shape(
            functools.partial(made.taught.blank, start=shapes.prompt), shapes.params, batch.tokens_BT, batch.valid_BT
        )
        targets = jax.tree.map(lambda x: shapes.array(x.shape, x.dtype, None, "batch"), blank)
        return dataclasses.replace(batch, teacher_B=array(I32), targets=targets)

    def step(rows: int) -> Any:
        heads = {}
        if stage.taught and train.distill.form == "full":
            c, n = runtime.model.config, 1 if train.distill.teacher else len(stage.domains)
            heads = {distill.HEADS: n * (shapes.array((c.d_model, c.vocab_size), F32, None, "vocab_split"),)}
        return programs(rows).step.lower(state, policy_batch(rows), shapes.array((), F32), heads)

    def teach(rows: int) -> Any:
        index = jax.ShapeDtypeStruct((), I32)
        return programs(rows).taught.teach.lower(shapes.params, policy_batch(rows), index, shapes.prompt)

    def blank(rows: int) -> Any:
        batch = policy_batch(rows)
        return programs(rows).taught.blank.lower(shapes.params, batch.tokens_BT, batch.valid_BT, shapes.prompt)

    def log_probs(rows: int) -> Any:
        array = arrays(rows)
        return programs(rows).log_probs.lower(shapes.params, array(I32, length), array(bool, length), shapes.prompt)

    def own(rows: int) -> flops.Products:
        shared = shared_rows(train.group_size, rows, batch_divisor(runtime.mesh))
        prompts = -(-total // rows) * rows // shared
        return flops.groups(runtime.model.config, prompts, shared, shapes.prompt, shapes.new)

    rows = total // train.grad_accum_steps
    each = train.prompts_per_step // runtime.config.rollout.parts
    how = runtime.config.rollout.sampling
    yield sampling(shapes, f"sample, {train.group_size} a prompt", each, train.group_size, how, moments | held)
    if reference or again:
        beside = moments | held | ({} if reference else shapes.trees(parameters=1))
        yield Job("log-probs", log_probs, beside, rows, ROWS, own=lambda rows: own(rows).forward)
    if stage.taught:
        form, beside = train.distill.form, moments | recovering | shapes.trees(parameters=1)
        yield Job(f"teacher, {form}", teach, beside, rows, ROWS, own=lambda rows: own(rows).forward)
        if form == "top_k":
            beside = moments | recovering | shapes.trees(teacher=1)
            yield Job("student's top k", blank, beside, rows, ROWS, own=lambda rows: own(rows).forward)
    if train.prevent.transforms:
        return  # prevention adds arguments to the step whose shapes depend on earlier stages
    name = f"distillation step, {train.distill.form}" if stage.prefix == "distill" else "GRPO step"
    yield Job(name, step, held, rows, ROWS, total, lambda rows: own(rows).gradient)
    if recovering or train.target:
        yield looking(shapes, moments | held)


def looking(shapes: Shapes, beside: Mapping[str, float]) -> Job:
    """The job of the sampler of validation scores while a stage trains.

    Its prompts are `evaluate.batch` in one call, its completions `recover.samples` of each.

    Args:
      shapes: shapes of the programs' arguments.
      beside: bytes of one device that the stage holds meanwhile, by name.

    Raises:
      UserError: as in `sampling`.
    """
    settings, evaluated = shapes.runtime.config.recover, shapes.runtime.config.evaluate
    name = f"sample scores, {settings.samples} a prompt"
    return sampling(shapes, name, evaluated.batch, settings.samples, evaluated.sampling, beside)


def supervised(shapes: Shapes, sections: Sequence[SFTSection]) -> Iterator[Job]:
    """Yields the programs of supervised stages: the largest training step; and, if one of them has a target, a sampler.

    The largest step is that with the most tokens in a micro-batch. The sampler is that of scores (`looking`).

    Args:
      shapes: shapes of the programs' arguments.
      sections: the settings of the stages, at least one.

    Raises:
      ValueError: at the first step, if there are no sections.
      UserError: when the sampler is asked for, as in `sampling`.
    """
    section = max(sections, key=lambda s: s.batch_size // s.grad_accum_steps * s.length)
    config = shapes.runtime.model.config
    optimizer, shardings, step = sft.make_programs(shapes.runtime, section.optimizer)

    def lower(rows: int) -> Any:
        def array(dtype: Any) -> Any:
            return shapes.array((section.batch_size // rows, rows, section.length), dtype, None, "batch")

        batch = SFTBatch(tokens_BT=array(I32), valid_BT=array(bool), mask_BT=array(F32))
        return step.lower(state, batch, shapes.array((), F32), {})

    state = shapes.state(optimizer, shardings)
    rows = section.batch_size // section.grad_accum_steps
    own = flops.sequences(config, section.batch_size, section.length, section.length - 1).gradient
    yield Job("SFT step", lower, {}, rows, ROWS, section.batch_size, lambda _: own)
    if any(s.target for s in sections):
        yield looking(shapes, {"optimizer": bytes_a_device(state.opt_state)})


def scoring(shapes: Shapes) -> Iterator[Job]:
    """Yields one job, the sampler that scores the parameters at the end of a stage.

    Its prompts are `evaluate.batch` in one call, its completions `evaluate.samples` of each.

    Raises:
      UserError: when it is asked for, as in `sampling`.
    """
    section = shapes.runtime.config.evaluate
    name = f"sample scores, {section.samples} a prompt"
    yield sampling(shapes, name, section.batch, section.samples, section.sampling, {})
