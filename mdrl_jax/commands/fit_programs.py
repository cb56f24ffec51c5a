"""The device programs that train and score, with the shapes a run calls them with, for `fit`.

They are made by the functions that a run makes them by, as are those of `fit_analysis.py`. What lies on a device beside
a program (`beside`) is counted here, in trees of the parameters' size, from what a stage holds at that moment; all
prompts and completions are taken to be of the longest.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mdrl_jax.checkpoints import abstract
from mdrl_jax.model import flops
from mdrl_jax.parallel.fit import bytes_a_device
from mdrl_jax.parallel.sharding import batch_divisor, divisor, named
from mdrl_jax.recovery.prevention import prepare
from mdrl_jax.rl.grpo import GRPOBatch
from mdrl_jax.rl.policy import PolicyBatch
from mdrl_jax.rl.rollout import SamplingConfig, cache_bytes, make_sampler
from mdrl_jax.rl.rollouts import prompts_at_once
from mdrl_jax.rl.sft import SFTBatch
from mdrl_jax.rl.trainer import TrainState
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.stage import Stage
from mdrl_jax.stages import grpo as loop
from mdrl_jax.stages import sft

F32, I32 = jnp.float32, jnp.int32
ROWS, PROMPTS = "rows of a micro-batch", "prompts at once"


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
      name: unique; of two jobs of the same name the one with more beside it is compiled.
      lower: (size) -> what `jax.jit(f).lower(...)` gives; under the mesh.
      size, what: as configured, and what it is a size of; 0: it has none.
      most: sizes up to this are tried, in multiples of the devices that rows are split over; 0: none.
      own: (size) -> the model's own count of operations of a call, over all devices; None: not a function of the model.
      beside: bytes of a device that other things take, by name.
      trips: of loops whose end depends on what is sampled: of innermost ones, and of those around them.
      kv_bytes: (size) -> bytes of a device that keys and values take.
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
    """Shapes of what programs take, with where it lies."""

    runtime: Runtime

    @functools.cached_property
    def params(self) -> Any:
        """The parameters, or an edit."""
        return abstract(self.runtime.shapes, self.runtime.shardings)

    def array(self, shape: tuple[int, ...], dtype: Any, *names: str | None) -> jax.ShapeDtypeStruct:
        """An array with these logical axes."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(self.runtime.mesh, *names))

    def trees(self, **counts: float) -> dict[str, float]:
        """Bytes of so many trees of the parameters' size each, by name."""
        one = bytes_a_device(self.params)
        return {name.replace("_", " "): n * one for name, n in counts.items() if n}

    @property
    def prompt(self) -> int:
        """The longest prompt."""
        return self.runtime.config.rollout.prompt_buckets[-1]

    @property
    def new(self) -> int:
        """The longest completion."""
        return self.runtime.config.rollout.completion_buckets[-1]

    def rows(self, n: int) -> CompletionBatch:
        """Rows of the analysis."""
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
        """A set of coordinates."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool, sharding=x.sharding), self.params)

    def state(self, optimizer: Any, shardings: TrainState) -> TrainState:
        """A training state."""
        moments = jax.eval_shape(optimizer.init, self.runtime.shapes)
        step = jax.ShapeDtypeStruct((), I32, sharding=shardings.step)
        return TrainState(step, self.params, abstract(moments, shardings.opt_state))


def sampling(shapes: Shapes, name: str, prompts: int, group: int, how: SamplingConfig, beside: Any) -> Job:
    """A sampler: prefill, and decoding until every completion has ended."""
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
        )
        prompt = functools.partial(shapes.array, (prompts, shapes.prompt))
        key = shapes.array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
        ids = shapes.array((prompts,), I32, "batch")
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
    """What a GRPO stage runs: sampler, log-probs, step."""
    runtime, train = shapes.runtime, stage.train
    made = loop.make_programs(runtime, stage, prepare.transforms(train.prevent))
    state = shapes.state(made.optimizer, made.shardings)
    reference, again = loop.needs_reference(stage), train.grpo.updates_per_batch > 1
    refreshed = shapes.trees(best_step=1) if stage.prefix == "refresh" else {}
    held = shapes.trees(reference=reference) | refreshed
    moments = {"optimizer": bytes_a_device(state.opt_state)}
    total, length = train.prompts_per_step * train.group_size, shapes.prompt + shapes.new

    def arrays(rows: int) -> Any:
        def array(dtype: Any, *width: int) -> Any:
            return shapes.array((-(-total // rows), rows, *width), dtype, None, "batch")

        return array

    def step(rows: int) -> Any:
        array = arrays(rows)
        logp = array(F32, shapes.new)
        grpo = GRPOBatch(
            old_logp_BT=logp if again else None,
            sampler_logp_BT=logp,
            ref_logp_BT=logp if train.grpo.kl_coef > 0 else None,
            adv_B=array(F32),
            mask_BT=logp,
        )
        batch = PolicyBatch(tokens_BT=array(I32, length), valid_BT=array(bool, length), grpo=grpo)
        return made.step.lower(state, batch, shapes.array((), F32), {})

    def log_probs(rows: int) -> Any:
        array = arrays(rows)
        return made.log_probs.lower(shapes.params, array(I32, length), array(bool, length), shapes.prompt)

    def own(rows: int) -> flops.Products:
        return flops.sequences(runtime.model.config, -(-total // rows) * rows, length, shapes.new)

    rows = total // train.grad_accum_steps
    each = train.prompts_per_step // runtime.config.rollout.parts
    how = runtime.config.rollout.sampling
    yield sampling(shapes, f"sample, {train.group_size} a prompt", each, train.group_size, how, moments | held)
    if reference or again:
        beside = moments | held | ({} if reference else shapes.trees(parameters=1))
        yield Job("log-probs", log_probs, beside, rows, ROWS, own=lambda rows: own(rows).forward)
    if train.prevent.transforms:
        return  # what it adds are arguments that depend on earlier stages
    yield Job("GRPO step", step, held, rows, ROWS, total, lambda rows: own(rows).gradient)
    if refreshed:
        settings, evaluated = runtime.config.recover, runtime.config.evaluate
        name = f"sample scores, {settings.samples} a prompt"
        yield sampling(shapes, name, evaluated.batch, settings.samples, evaluated.sampling, moments | held)


def supervised(shapes: Shapes) -> Iterator[Job]:
    """What a supervised stage runs."""
    section, config = shapes.runtime.config.sft, shapes.runtime.model.config
    optimizer, shardings, step = sft.make_programs(shapes.runtime)

    def lower(rows: int) -> Any:
        def array(dtype: Any) -> Any:
            return shapes.array((section.batch_size // rows, rows, section.length), dtype, None, "batch")

        batch = SFTBatch(tokens_BT=array(I32), valid_BT=array(bool), mask_BT=array(F32))
        return step.lower(shapes.state(optimizer, shardings), batch, shapes.array((), F32), {})

    rows = section.batch_size // section.grad_accum_steps
    own = flops.sequences(config, section.batch_size, section.length, section.length - 1).gradient
    yield Job("SFT step", lower, {}, rows, ROWS, section.batch_size, lambda _: own)


def scoring(shapes: Shapes) -> Iterator[Job]:
    """The scores at the end of a stage."""
    section = shapes.runtime.config.evaluate
    name = f"sample scores, {section.samples} a prompt"
    yield sampling(shapes, name, section.batch, section.samples, section.sampling, {})
