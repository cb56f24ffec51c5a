"""The benchmark `bench curvature`: the cost of second-order products in units of one gradient, on a random decoder.

`commands/bench.py` runs the tasks that this file makes (`whole_tasks`, `route_tasks`) beside those of other libraries
(`peers.py`), and `measure.py` turns their figures into the table of `LINES`.

All tasks use the same loss, −log π of completions at temperature 1, without rematerialisation and with the logits of
all positions at once. The gradient, the unit, is `jax.value_and_grad` of this loss. The route is a random tenth of each
layer's MLP neurons.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.bench.measure import Line, Task, compiled
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.second_order import decoder_parts, hvp
from mdrl_jax.second_order.jets import jets
from mdrl_jax.second_order.lanczos import Spectrum, block_lanczos, random_block
from mdrl_jax.second_order.objectives import CompletionBatch, Forward, success_nll

HEAD_DIM, SHARE = 32, 0.1
BLOCK = 4  # vectors of the block product
LANCZOS = 16  # steps of the solver, with one vector each
GRADIENT, HV, GGN, ON_ROUTE = "gradient", "Hv", "GGN product", "Hv on the route"
IN_GRADIENTS = {GRADIENT: 1.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder and of the batch.

    Attributes:
      layers: number of layers.
      width: embedding size, a multiple of 32. Heads have size 32, and the MLP is four times as wide.
      rows: sequences in the batch.
      length: tokens of a sequence.
      completion: number of tokens at its end that are the completion, fewer than `length`; only these are in the loss.
      vocabulary: size of the vocabulary.

    Raises:
      UserError: if the width is not a multiple of 32.
    """

    layers: int = 6
    width: int = 256
    rows: int = 32
    length: int = 64
    completion: int = 48
    vocabulary: int = 2048

    def __post_init__(self) -> None:
        if self.width % HEAD_DIM:
            raise UserError(f"--width={self.width} is not valid; it must be a multiple of {HEAD_DIM}")

    def __str__(self) -> str:
        return f"{self.layers} layers, width {self.width}, batch {self.rows} x {self.length}, float32"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A random decoder on one device, with a batch and a direction.

    Attributes:
      sizes: sizes of the decoder and of the batch.
      model: the decoder.
      params: its parameters.
      rows: the batch, leaves [1, B, ...]: one micro-batch.
      v: the direction, a tree like `params`.
    """

    sizes: Sizes
    model: Decoder
    params: Any
    rows: CompletionBatch
    v: Any

    @property
    def micro(self) -> CompletionBatch:
        """The batch without its axis of micro-batches, leaves [B, ...]."""
        return jax.tree.map(lambda x: x[0], self.rows)

    def loss(self, parts: decoder_parts.DecoderParts | None = None) -> hvp.Loss:
        """The loss (point, rows, fixed) -> (sum, count): −log π of the completions, in nats (`success_nll`).

        Args:
          parts: the pieces of the decoder, which decide what the point is; None: the point is all parameters, and
            `fixed` is ().
        """
        return success_nll(Forward(parts or decoder_parts.whole(self.model), temperature=1.0))


def problem(sizes: Sizes, seed: int = 0) -> Problem:
    """The problem of these sizes, with parameters, tokens and direction drawn from `seed`; on the first JAX device.

    All tokens are valid, and every row has weight, advantage and success 1. The direction has standard normal entries.
    """
    heads = sizes.width // HEAD_DIM
    config = ModelConfig("llama", sizes.vocabulary, sizes.layers, sizes.width, 4 * sizes.width, heads, heads, HEAD_DIM)
    model = Decoder(config)
    params = huggingface.random_params(model, make_mesh(MeshConfig(), jax.devices()[:1]), seed)
    rng = np.random.default_rng(seed)
    ones_B = np.ones((1, sizes.rows), np.float32)
    rows = CompletionBatch(
        tokens_BT=rng.integers(0, sizes.vocabulary, (1, sizes.rows, sizes.length), np.int32),
        valid_BT=np.ones((1, sizes.rows, sizes.length), bool),
        mask_BT=np.ones((1, sizes.rows, sizes.completion), np.float32),
        adv_B=ones_B,
        success_B=ones_B,
        weight_B=ones_B,
    )
    v = jax.tree.map(lambda x: x[0], random_block(jax.random.key(seed), params, 1))
    return Problem(sizes, model, params, jax.tree.map(jnp.asarray, rows), v)


def logits(given: Problem) -> Callable[..., jax.Array]:
    """The model of a problem as a function to its logits, through the same layers as the loss.

    Args:
      given: the problem.

    Returns:
      the function (params, rows) -> logits that predict the completion tokens, float32 [B, Tc, V]. Rows are a
      micro-batch, leaves [B, ...].
    """
    model, sizes = given.model, given.sizes

    def head(params: Any, fixed: Any, x_BCD: jax.Array, *_: Any) -> jax.Array:
        return model.apply({"params": params}, x_BCD, method="normed_logits")  # type: ignore

    parts = dataclasses.replace(decoder_parts.whole(model), head=head)

    def outputs(params: Any, rows: CompletionBatch) -> jax.Array:
        start = sizes.length - sizes.completion
        return decoder_parts.log_probs(parts, params, (), rows.tokens_BT, rows.valid_BT, start=start, temperature=1.0)

    return outputs


def second_order(given: Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The directional derivatives of the loss, computed from (u, w) of every token (`jets.py`).

    Args:
      given: the problem.

    Returns:
      the function (params, v, rows) -> (v·∇L, vᵀ∇²L v), two scalars in nats a completion; v is a tree like `params`,
      and rows are a micro-batch, leaves [B, ...].
    """
    parts, start = decoder_parts.whole(given.model), given.sizes.length - given.sizes.completion

    def derivatives(params: Any, v: Any, rows: CompletionBatch) -> tuple[jax.Array, jax.Array]:
        _, u_BT, w_BT = jets(parts, params, (), v, rows.tokens_BT, rows.valid_BT, start=start, temperature=1.0)
        return -jnp.sum(u_BT) / given.sizes.rows, -jnp.sum(w_BT) / given.sizes.rows

    return derivatives


def whole_tasks(given: Problem) -> dict[str, Task]:
    """Compiles the tasks on all parameters.

    Args:
      given: the problem.

    Returns:
      the tasks, with their FLOPs and memory, by name: "gradient", "Hv" (a Hessian product), "Hv of a block" (of 4
      vectors), "GGN product" (a Gauss–Newton product) and "jets" (`second_order`).
    """
    params, v, rows = given.params, given.v, given.rows
    block = random_block(jax.random.key(1), params, BLOCK)
    hessian = hvp.exact(given.loss())

    def curved(z: jax.Array, dz: jax.Array, micro: CompletionBatch) -> tuple[jax.Array, jax.Array]:
        return hvp.softmax_curvature(z, dz, micro.mask_BT), jnp.sum(micro.weight_B)

    made = {
        GRADIENT: (jax.value_and_grad(given.loss(), has_aux=True), params, given.micro, ()),
        HV: (hessian, params, v, rows, ()),
        "Hv of a block": (hvp.blocked(hessian), params, block, rows, ()),
        GGN: (hvp.gauss_newton(logits(given), curved), params, v, rows),
        "jets": (second_order(given), params, v, given.micro),
    }
    return {name: compiled(f"bench {name}", *made[name])[0] for name in made}


@dataclasses.dataclass(frozen=True)
class Route:
    """The problem restricted to a random tenth of each layer's MLP neurons.

    Attributes:
      point: the weights of these neurons (`decoder_parts.route_slice`).
      fixed: what is not differentiated (`decoder_parts.route_fixed`).
      block: a block of one random vector like `point`, at which Lanczos starts.
      loss: the loss as a function of (point, rows, fixed).
    """

    point: Any
    fixed: Any
    block: Any
    loss: hvp.Loss


def route(given: Problem, seed: int = 0) -> Route:
    """The problem on a route whose neurons and start block are drawn from `seed`.

    The route has a tenth of the MLP neurons of each layer, rounded, and at least one.
    """
    config = given.model.config
    width = max(1, round(SHARE * config.d_mlp))
    order = np.argsort(np.random.default_rng(seed).random((config.n_layers, config.d_mlp)), axis=1)
    index_LR = jnp.asarray(np.sort(order[:, :width], axis=1), jnp.int32)
    mask_LR = jnp.ones(index_LR.shape, jnp.float32)
    point = program("bench route slice", decoder_parts.route_slice)(given.params, index_LR, mask_LR)
    fixed = program("bench route fixed", decoder_parts.route_fixed)(given.params, index_LR, mask_LR)
    block = random_block(jax.random.key(seed), point, 1)
    return Route(point, fixed, block, given.loss(decoder_parts.on_route(given.model)))


def route_tasks(given: Problem, on: Route) -> dict[str, Task]:
    """Compiles the tasks on the route.

    Args:
      given: the problem on all parameters.
      on: the problem on the route.

    Returns:
      by name: "Hv on the route", one Hessian product, with its FLOPs and memory; and "Lanczos", 16 steps with this
      product, of which only the time is known.
    """
    operator = hvp.blocked(hvp.exact(on.loss))
    product, apply = compiled("bench route", operator, on.point, on.block, given.rows, on.fixed)

    def solve() -> Spectrum:
        operate = lambda block: apply(on.point, block, given.rows, on.fixed)  # noqa: E731
        spectrum = block_lanczos(operate, on.block, LANCZOS, LANCZOS)
        jax.block_until_ready(spectrum.vectors)
        return spectrum

    return {ON_ROUTE: product, "Lanczos": Task(solve)}


LINES = (
    Line(GRADIENT, {GRADIENT: 1}, IN_GRADIENTS),
    Line(
        "vᵀHv of every token, forward only",
        {"jets": 1}, IN_GRADIENTS, 5 / 3, {"flops": 1.8, "time": 1.3, "memory": 0.4},
    ),
    Line(HV, {HV: 1}, IN_GRADIENTS, 8 / 3, {"flops": 2.8}),
    Line(
        "Hv, each further vector of a block",
        {"Hv of a block": 1 / (BLOCK - 1), HV: -1 / (BLOCK - 1)}, IN_GRADIENTS, 2.0,
    ),
    Line(GGN, {GGN: 1}, IN_GRADIENTS, 5 / 3, {"flops": 1.8}),
    Line("Hv on a route of 10 %", {ON_ROUTE: 1}, IN_GRADIENTS, 4 / 3, {"flops": 1.6}),
    Line(
        f"Lanczos of {LANCZOS} on the route / {LANCZOS + 1} products",
        {"Lanczos": 1}, {ON_ROUTE: LANCZOS + 1}, None, {"time": 1.15},
    ),
)  # fmt: skip
