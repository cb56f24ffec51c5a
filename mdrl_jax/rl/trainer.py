"""The training step: sums gradients over micro-batches and makes one optimizer update.

The step is a compiled function from a state and a batch to the next state. Its loss function is an argument, so GRPO
(`policy.py`) and supervised fine-tuning (`sft.py`) run the same step, on one device or on many.

A loss function returns a sum and a count. With the loss l_m and the count n_m of micro-batch m, the step follows the
gradient Σ_m ∇l_m / max(Σ_m n_m, 1), which is the gradient of the mean over the whole batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mdrl_jax.errors import UserError
from mdrl_jax.model import flops
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named
from mdrl_jax.section import section

Pair = tuple[jax.Array, jax.Array]  # (sum, count)
LONG = 15.0  # seconds; a machine may be gone 30 seconds after its notice
# Operations per second and device, by JAX's name of the platform, that a training step reaches on slow hardware.
SPEED = {"cpu": 2e10, "gpu": 2e13, "tpu": 4e13}
# (params, micro-batch) -> (sum of the loss, (count, {name of a metric: (sum, count)}))
LossFn = Callable[..., tuple[jax.Array, tuple[jax.Array, dict[str, Pair]]]]
Cases = Callable[[Any], tuple[jax.Array, Sequence[Callable[[Any], Any]]]]  # see `make_train_step`


@section
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or plain gradient descent, after the gradient is clipped by its global norm.

    Attributes:
      name: "adamw", or "sgd" for gradient descent without momentum, which does not read `b1`, `b2` and `eps`.
      b1: decay rate of the mean of gradients.
      b2: decay rate of the mean of squared gradients.
      eps: added to the root of the mean of squared gradients.
      weight_decay: decoupled weight decay.
      clip_norm: largest norm of the gradient, over all parameters together; 0: no clipping.

    Raises:
      UserError: if the name is another, if b1 or b2 is not in [0, 1), or if another value is below 0.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise UserError(f"optimizer.name={self.name!r} is not known; known: adamw, sgd")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} is not valid; 0 <= {field} < 1")
        for field in ("eps", "weight_decay", "clip_norm"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{field}={getattr(self, field)} is not valid; it must be >= 0")


@struct.dataclass
class TrainState:
    """The arrays that a step changes. Trees of their shardings or of their shapes have this class too.

    Attributes:
      step: number of updates made, an int32 scalar.
      params: parameters of the model.
      opt_state: state of the optimizer.
    """

    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Gradient transformations that a stage adds to the optimizer (`recovery/prevention/`).

    They may take extra arguments (`optax.GradientTransformationExtraArgs`). Large arrays that are the same at every
    step, such as those of EWC, are passed in this way, so that they are neither constants of the compiled step nor part
    of checkpoints.

    Attributes:
      gradient: applied to the gradient before it is clipped.
      update: applied last, to the update, before it is multiplied by the learning rate.
    """

    gradient: tuple[optax.GradientTransformation, ...] = ()
    update: tuple[optax.GradientTransformation, ...] = ()


def make_optimizer(
    config: OptimizerConfig, transforms: Transforms = Transforms()
) -> optax.GradientTransformationExtraArgs:
    """The optax chain of a stage, without the learning rate and without its minus sign.

    The training step subtracts (learning rate × update) from the parameters. The learning rate is an argument of the
    step, so that one compilation serves all its values.

    Args:
      config: the optimizer's constants, and the clipping.
      transforms: what the stage adds.

    Returns:
      the chain, in this order: `transforms.gradient`, clipping, Adam (unless it is plain gradient descent), weight
      decay (weight_decay × parameter is added), `transforms.update`. Its `update` needs the parameters.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(
        *transforms.gradient,
        clip,
        adam if config.name == "adamw" else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        *transforms.update,
    )


def state_shardings(optimizer: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh):
    """Shardings of a `TrainState`: the optimizer's moments are split like the parameters that they belong to.

    So is every other tree in the optimizer's state that has the structure of the parameters.

    Args:
      optimizer: from `make_optimizer`.
      shapes: tree of the parameters' shapes and dtypes (`jax.ShapeDtypeStruct`, or arrays).
      shardings: tree of the same structure with a sharding for every parameter.
      mesh: the devices; all other arrays are replicated over them.

    Returns:
      a `TrainState` with a sharding in place of every array.
    """
    replicated, found = named(mesh), []

    def trace() -> None:
        found.append(
            optax.tree_map_params(
                optimizer,
                lambda _, sharding: sharding,
                jax.eval_shape(optimizer.init, shapes),
                shardings,
                transform_non_params=lambda _: replicated,
            )
        )

    # Optax makes arrays on the way. Under a trace they are never computed, so the devices may be those of `fit`.
    jax.eval_shape(trace)
    (opt_state,) = found
    return TrainState(step=replicated, params=shardings, opt_state=opt_state)


def init_state(optimizer: optax.GradientTransformation, params: Any, shardings: TrainState) -> TrainState:
    """The state before the first step.

    It has a copy of `params`, because the first step frees the memory of the state that it is given.

    Args:
      optimizer: from `make_optimizer`.
      params: parameters to start from; they stay valid.
      shardings: from `state_shardings`.

    Returns:
      the state with step 0, the copied parameters and the optimizer's initial state, placed by `shardings`.
    """

    def init(params: Any) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(init, out_shardings=shardings)(params)


def takes_long(config: ModelConfig, tokens: int, mesh: Mesh) -> bool:
    """Whether an update may take longer than `LONG` seconds, by its operations and `SPEED`.

    It measures no time, so that a run that resumes on the same kind of device computes with the same programs.

    Args:
      config: sizes of the model.
      tokens: the largest number of tokens in the rows of an update.
      mesh: the devices; a platform that `SPEED` does not have counts as "gpu".

    Returns:
      True if (operations / number of devices / `SPEED`) is above `LONG`.
    """
    speed = SPEED.get(mesh.devices.flat[0].platform, SPEED["gpu"])
    return flops.of_tokens(config, {"trained": tokens}) / mesh.size / speed > LONG


def make_train_step(
    name: str,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
    cases: Cases | None = None,
    given: Sequence[str] = (),
    split: bool = False,
) -> Callable[[TrainState, Any, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step as a compiled program; the first call compiles it.

    A split step is several programs: one for each micro-batch and one for the update. A run that must end then waits
    for one of them at most, not for the whole step. Both forms add up the gradients of the micro-batches in the same
    order, but their results may differ in the last bits.

    Args:
      name: name of the program, under which its compilations are counted.
      loss_fn: (params, micro-batch) -> (sum of the loss, (count, metrics)); each metric is a (sum, count).
      optimizer: from `make_optimizer`.
      shardings: from `state_shardings`.
      mesh: the devices.
      cases: (micro-batch) -> (case, cuts). The case is an integer scalar. 0 says that the micro-batch is not computed,
        because its loss, count and metrics are 0; i says that cuts[i − 1](micro-batch) gives the same loss, count and
        metrics from smaller arrays. Each cut is compiled. None: every micro-batch is computed as it is.
      given: names of entries of `extra` that the loss function takes, after the micro-batch and in this order.
      split: whether the step is split into several programs.

    Returns:
      the jitted function (state, batch, learning_rate, extra) -> (next state, metrics). The memory of the given state
      is reused for the next one, so the given state cannot be read afterwards. Leaves of `batch` are [micro-batches,
      rows, ...] (`micro_batches`). `learning_rate` is a scalar, by which the optimizer's update is multiplied before it
      is subtracted; the optimizer also gets it as an extra argument. `extra` is a dictionary of the optimizer's other
      extra arguments by name, {} if it takes none; names that it does not take are ignored. The metrics are scalars by
      name: the means of the loss function's metrics over the whole batch, "loss" (the mean loss before the update), and
      "grad_norm", the norm of its gradient over all parameters together, before transforms and clipping. If the count
      of a batch is 0, loss and gradient are 0, but Adam's moments and the weight decay still change the parameters.
      The function raises ValueError if the mesh cannot split the rows of a micro-batch evenly, TypeError if an extra
      argument of the optimizer is missing, and KeyError if `extra` lacks a name of `given`. A split step is not jitted
      as a whole. It also raises `preemption.Dropped` if the run must end, before the update and with the given state
      untouched, and HostLost as `preemption.until_ready` does.
    """
    takes_extra = optax.with_extra_args_support(optimizer)

    def added(params: Any, total: Any, micro: Any, shared: Any) -> Any:
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (count, metrics)), grads = gradient(params, micro, *shared)
        # Pin the gradient's sharding; otherwise XLA may choose another and reshard activations to match it.
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        return jax.tree.map(jnp.add, total, (grads, (loss, count), metrics))

    def add(params: Any, total: Any, micro: Any, shared: Any) -> Any:
        if cases is None:
            return added(params, total, micro, shared)
        case, cuts = cases(micro)
        computed = [lambda total, micro, cut=cut: added(params, total, cut(micro), shared) for cut in cuts]
        return jax.lax.switch(case, [lambda total, _: total, *computed], total, micro)

    def empty(params: Any, batch: Any, shared: Any) -> Any:
        first = jax.tree.map(lambda x: x[0], batch)
        _, (_, metric_shapes) = jax.eval_shape(loss_fn, params, first, *shared)
        zero = jnp.float32(0)
        return jax.tree.map(jnp.zeros_like, params), (zero, zero), jax.tree.map(lambda _: zero, metric_shapes)

    def update(state: TrainState, total: Any, learning_rate: jax.Array, extra: Any):
        grads, (loss, count), metrics = total
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = takes_extra.update(
            grads, state.opt_state, state.params, **{"learning_rate": learning_rate, **extra}
        )
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        logged = {k: s / jnp.maximum(n, 1.0) for k, (s, n) in metrics.items()}
        logged |= {"loss": loss / count, "grad_norm": optax.global_norm(grads)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), logged

    def step(state: TrainState, batch: Any, learning_rate: jax.Array, extra: Any):
        shared = [extra[name] for name in given]
        one = lambda total, micro: (add(state.params, total, micro, shared), None)  # noqa: E731
        summed, _ = jax.lax.scan(one, empty(state.params, batch, shared), batch)
        return update(state, summed, learning_rate, extra)

    replicated, rows = named(mesh), named(mesh, None, "batch")
    after = shardings, replicated
    if not split:
        arguments = shardings, rows, replicated, None
        return program(name, step, in_shardings=arguments, out_shardings=after, donate_argnums=0)
    total = shardings.params, replicated, replicated
    nth = lambda batch, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)  # noqa: E731
    begin = program(f"{name} zeros", empty, in_shardings=(shardings.params, rows, None), out_shardings=total)
    accumulate = program(
        f"{name} gradient",
        lambda params, total, batch, i, shared: add(params, total, nth(batch, i), shared),
        in_shardings=(shardings.params, total, rows, replicated, None),
        out_shardings=total,
        donate_argnums=1,
    )
    finish = program(
        f"{name} update",
        update,
        in_shardings=(shardings, total, replicated, None),
        out_shardings=after,
        donate_argnums=0,
    )

    def in_parts(state: TrainState, batch: Any, learning_rate: jax.Array, extra: Any):
        shared = [extra[name] for name in given]
        summed = begin(state.params, batch, shared)
        for i in range(len(jax.tree.leaves(batch)[0])):
            summed = accumulate(state.params, summed, batch, jnp.int32(i), shared)
            preemption.until_ready(summed)
        return finish(state, summed, learning_rate, extra)

    return in_parts


def micro_batches(batch: Any, n: int) -> Any:
    """Divides a batch into n micro-batches: reshapes every leaf from [B, ...] to [n, B / n, ...].

    Args:
      batch: a tree of arrays whose first axis is that of rows; B is the same for all leaves.
      n: number of micro-batches, at least 1. The first one gets the first B / n rows, and so on.

    Returns:
      the tree with the reshaped leaves.

    Raises:
      UserError: if B is not a multiple of n.
      ZeroDivisionError: if n is 0.
    """

    def divide(x: Any) -> Any:
        if x.shape[0] % n:
            raise UserError(f"{x.shape[0]} rows cannot be divided into {n} equal micro-batches")
        return x.reshape((n, x.shape[0] // n) + x.shape[1:])

    return jax.tree.map(divide, batch)
