"""The training step: sums over micro-batches, one optimizer update, state in and state out.

The loss function is an argument, so SFT and GRPO, on one device or a pod, run the same step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mdrl_jax.errors import UserError
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named
from mdrl_jax.section import section

Pair = tuple[jax.Array, jax.Array]
# (params, micro_batch) -> (loss sum, (count, metrics as (sum, count)))
LossFn = Callable[[Any, Any], tuple[jax.Array, tuple[jax.Array, dict[str, Pair]]]]


@section
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) after clipping by global norm; clip_norm 0 leaves gradients whole."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} is not valid; 0 <= {field} < 1")
        for field in ("eps", "weight_decay", "clip_norm"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{field}={getattr(self, field)} is not valid; it is >= 0")


@struct.dataclass
class TrainState:
    """Everything a step changes; also a tree of the shardings or shapes of these."""

    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Transforms:
    """What a stage adds to the optimizer: changes of the gradient before it is clipped, and of the update last.

    They may take extra arguments (`optax.GradientTransformationExtraArgs`): large arrays that are the same at every
    step, as EWC's, are arguments of the step, neither closed over nor part of checkpoints.
    """

    gradient: tuple[optax.GradientTransformation, ...] = ()
    update: tuple[optax.GradientTransformation, ...] = ()


def make_optimizer(
    config: OptimizerConfig, transforms: Transforms = Transforms()
) -> optax.GradientTransformationExtraArgs:
    """The optax chain without its learning rate, which is an argument of the step (one compilation for all)."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        *transforms.gradient,
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        *transforms.update,
    )


def state_shardings(optimizer: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh):
    """Shardings of a TrainState: optimizer moments lie where their parameters lie."""
    replicated = named(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(step=replicated, params=shardings, opt_state=opt_state)


def init_state(optimizer: optax.GradientTransformation, params: Any, shardings: TrainState) -> TrainState:
    """A fresh optimizer at `params`, which are copied: the first step donates the state it is given."""

    def init(params: Any) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(init, out_shardings=shardings)(params)


def make_train_step(
    name: str, loss_fn: LossFn, optimizer: optax.GradientTransformation, shardings: TrainState, mesh: Mesh
) -> Callable[[TrainState, Any, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, batch, learning_rate, extra) -> (state, metrics); the state is donated.

    Leaves of `batch` are [micro-batches, rows, ...]; `extra` are the optimizer's extra arguments by name. The
    gradient is that of Σ loss sums / Σ counts over all micro-batches, so it does not depend on how rows are divided
    among them.
    """
    takes_extra = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Any, learning_rate: jax.Array, extra: Any):
        def add(total: Any, micro: Any) -> tuple[Any, None]:
            gradient = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (count, metrics)), grads = gradient(state.params, micro)
            # Else XLA may keep the sum as some use of a parameter left it, and move activations to it.
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
            return jax.tree.map(jnp.add, total, (grads, (loss, count), metrics)), None

        first = jax.tree.map(lambda x: x[0], batch)
        _, (_, metric_shapes) = jax.eval_shape(loss_fn, state.params, first)
        zero = jnp.float32(0)
        empty = (
            jax.tree.map(jnp.zeros_like, state.params),
            (zero, zero),
            jax.tree.map(lambda _: zero, metric_shapes),
        )
        (grads, (loss, count), metrics), _ = jax.lax.scan(add, empty, batch)
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = takes_extra.update(grads, state.opt_state, state.params, **extra)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        logged = {k: s / jnp.maximum(n, 1.0) for k, (s, n) in metrics.items()}
        logged |= {"loss": loss / count, "grad_norm": optax.global_norm(grads)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), logged

    replicated = named(mesh)
    return program(
        name,
        step,
        in_shardings=(shardings, named(mesh, None, "batch"), replicated, None),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def micro_batches(batch: Any, n: int) -> Any:
    """Reshapes rows [B, ...] to [n, B / n, ...].

    Raises:
      UserError: if the rows do not divide.
    """

    def divide(x: Any) -> Any:
        if x.shape[0] % n:
            raise UserError(f"{x.shape[0]} rows cannot be divided into {n} micro-batches")
        return x.reshape((n, x.shape[0] // n) + x.shape[1:])

    return jax.tree.map(divide, batch)
