"""The device programs of the analysis: log-probs, jets, gradients, activity and Hessian products of a model.

`build` makes one `Probe` for a run. `damage.py`, `subspace/` and `checkpoint_figures.py` call its methods with the
completions of `samples.py`. A *jet* is (logp, u, w) of every token along a direction v: the log-prob, u = v·∇logp and
w = vᵀ∇²logp v (`second_order/jets.py`).

Every program takes parameters, directions and completions as arguments, so that it is compiled once. The host streams
completions to the devices one micro-batch at a time. All micro-batches have the same shape. Memory therefore holds one
micro-batch and the parameter trees that are in use.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.analysis import routes
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.model import attention
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel import distributed, tree_programs
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor, divisor, named, put, stacked
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.runtime import DTYPES, Runtime
from mdrl_jax.second_order import decoder_parts
from mdrl_jax.second_order.blocks import combine, products
from mdrl_jax.second_order.hvp import blocked, exact
from mdrl_jax.second_order.jets import jets
from mdrl_jax.second_order.objectives import CompletionBatch, DirectionalDerivatives, Forward, both_losses, reward_loss

AT_ONCE = 2  # directions of a route that are computed together if attention is blockwise


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """The compiled programs, and methods that stream a sample through them.

    A *route tree* has the weights of some MLP neurons: {"gate": [L, D, R], "up": [L, D, R], "down": [L, R, D]}. The
    arguments `index_LR` and `mask_LR` are those of `conflict.Route`. Methods return host arrays, except `gradient`
    and `hessian`. They compute a prompt once for all of its completions that a device has in a micro-batch. If several
    processes run the program, all of them must call the methods. Methods that return host arrays raise ValueError for a
    sample without prompts.

    Attributes:
      runtime: the model, the mesh and the configuration.
      attention_path: the attention of jets and Hessian products, "plain" or "blockwise". Both are differentiable twice.
      grpo: the settings of the trainer's loss.
      along: (x, v, α) -> x + αv, on trees of parameters.
      difference: (a, b) -> a − b, on trees of parameters.
      slice: (tree of parameters, index_LR, mask_LR) -> its route tree.
      fixed: (params, index_LR, mask_LR) -> the `fixed` argument of `route_jets` and `hessian`.
      lift: (route tree z, index_LR, mask_LR, params) -> z as a tree like `params`, with 0 off the route. The values of
        `params` do not matter.
      lift_block: `lift` for a block of route trees, leaves [b, ...].
      outside: (D, route tree z, index_LR, mask_LR) -> D − z, a tree of parameters; z counts as 0 off the route.
      split: (block of b trees of parameters, k orthonormal route trees, index_LR, mask_LR) -> (their inner products
        [k, b], the block without its projection onto the k route trees).
      neuron_products: (a, b) -> inner products of two trees of parameters by MLP neuron, [L, F].
      fused: log-probs as a function of all parameters, with the attention of training. They can be differentiated once,
        in reverse mode. Rows may be in any order; each is computed as a whole.
      row_log_probs: (params, rows) -> log π of completion tokens [B, Tc], 0 on padding; rows may be in any order.
    """

    runtime: Runtime
    attention_path: str
    grpo: GRPOConfig
    along: Callable[..., Any]
    difference: Callable[..., Any]
    slice: Callable[..., Any]
    fixed: Callable[..., Any]
    lift: Callable[..., Any]
    lift_block: Callable[..., Any]
    outside: Callable[..., Any]
    split: Callable[..., Any]
    neuron_products: Callable[..., Any]
    fused: Forward
    row_log_probs: Callable[..., Any]
    _log_probs: Callable[..., Any]
    _gradient: Callable[..., Any]
    _jets: Callable[..., Any]
    _route_jets: Callable[..., Any]
    _activity: Callable[..., Any]
    _add_hessian: Callable[..., Any]
    _add_whole_hessian: Callable[..., Any]

    @property
    def programs(self) -> Mapping[str, Callable[..., Any]]:
        """The programs of the methods, by name, for a caller that compiles them without running (command `fit`)."""
        return {
            "gradient": self._gradient,
            "jets": self._jets,
            "route_jets": self._route_jets,
            "activity": self._activity,
            "hessian": self._add_hessian,
            "whole_hessian": self._add_whole_hessian,
        }

    def rows(self, sample: Sample, batch: int | None = None, adv_PG: np.ndarray | None = None) -> list[CompletionBatch]:
        """A sample as micro-batches, on the host.

        Args:
          sample: the completions.
          batch: prompts per micro-batch; by default `analyze.batch`.
          adv_PG: advantages [P, G] to use in place of those of the sample.

        Returns:
          the micro-batches in order; the last is filled up with rows of weight 0.
        """
        return sample.rows(self.runtime.config.analyze.batch if batch is None else batch, adv_PG)

    def log_probs(self, params: Any, sample: Sample, batch: int | None = None) -> np.ndarray:
        """log π of the sample's completion tokens at `params`, in nats [P, G, Tc], 0 on padding.

        Args:
          params: the point, a tree of parameters.
          sample: the completions.
          batch: prompts per micro-batch; by default `analyze.batch`.

        Returns:
          a host array, float32.
        """
        return self._stream(lambda micro: self._log_probs(params, micro), self.rows(sample, batch), sample)

    def derivatives(self, params: Any, v: Any, sample: Sample) -> dict[str, DirectionalDerivatives]:
        """First and second orders of every objective along a direction, by prompt (`objectives.derivatives`).

        Args:
          params: the point, a tree of parameters.
          v: the direction, a tree like `params`.
          sample: the completions.

        Returns:
          by objective, the orders of each prompt.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        _, u, w = self.jets(params, v, sample)
        return self.orders(u, w, sample)

    def orders(self, u_PGT: np.ndarray, w_PGT: np.ndarray, sample: Sample) -> dict[str, DirectionalDerivatives]:
        """First and second orders of every objective, by prompt, from jets that are known (`Sample.derivatives`).

        Args:
          u_PGT, w_PGT: from `jets`, along the direction.
          sample: the completions.

        Returns:
          by objective, the orders of each prompt.

        Raises:
          ValueError: if there is only one completion of each prompt.
        """
        return sample.derivatives(u_PGT, w_PGT, self.grpo, self.runtime.config.rollout.completion_buckets[-1])

    def jets(self, params: Any, v: Any, sample: Sample, batch: int | None = None) -> np.ndarray:
        """logp, u and w of every token along a direction of all parameters.

        Args:
          params: the point, a tree of parameters.
          v: the direction, a tree like `params`.
          sample: the completions.
          batch: prompts per micro-batch; by default `analyze.batch`.

        Returns:
          [3, P, G, Tc]; logp is 0 on padding, u and w are not.
        """
        return self._stream(lambda micro: self._jets(params, v, micro), self.rows(sample, batch), sample)

    def route_jets(self, point: Any, fixed: Any, directions: Any, sample: Sample, batch: int) -> np.ndarray:
        """logp, u and w of every token along n directions of a route.

        Args:
          point: the route tree of the point.
          fixed: from `fixed`.
          directions: a route tree with a leading axis n.
          sample: the completions.
          batch: prompts per micro-batch.

        Returns:
          [3, n, P, G, Tc]; logp is 0 on padding, u and w are not.
        """
        one = lambda micro: self._route_jets(point, fixed, directions, micro)  # noqa: E731
        return self._stream(one, self.rows(sample, batch), sample)

    def gradient(self, params: Any, rows: CompletionBatch) -> Any:
        """The gradient of the `reward` loss on one micro-batch, averaged over its rows with weight.

        Args:
          params: the point, a tree of parameters.
          rows: the micro-batch on the host, from `rows`. Its advantages decide the loss.

        Returns:
          a tree like `params`, on the devices.
        """
        return self._gradient(params, self._put(rows))

    def activity(self, params: Any, sample: Sample) -> routes.Activity:
        """Sums of neuron and head activity at `params`; each micro-batch of `analyze.batch` prompts is one block."""
        made = distributed.gather([self._activity(params, self._put(micro)) for micro in self.rows(sample)])
        stacked = (np.stack([np.asarray(m[i], np.float64) for m in made]) for i in range(3))
        return routes.Activity(*stacked)

    def hessian(
        self, point: Any, fixed: Any, rows: list[CompletionBatch], count: float, support: Any = None
    ) -> Callable[[Any], Any]:
        """The Hessian H of `objectives.both_losses` on a route or on all parameters, as a function.

        Args:
          point: the route tree of the point, or the tree of all parameters.
          fixed: from `fixed`; () if the point has all parameters.
          rows: the completions, in micro-batches. They are copied to the devices at once and stay there.
          count: the number that the sum over completions is divided by.
          support: factors 0 or 1 that can be broadcast to the point (`routes.support`); the function is then that of
            P H P, with P the product with these factors. None: no factors.

        Returns:
          a function from a block of b trees like the point, with leading axis b, to their products with the Hessian.
          Without micro-batches the products are 0.
        """
        placed = [self._put(micro) for micro in rows]
        add = self._add_whole_hessian if fixed == () else self._add_hessian

        def operator(block: Any) -> Any:
            inside = block if support is None else routes.inside_block(block, support)
            total = tree.zeros_like(block)
            for micro in placed:
                total = add(point, inside, micro, fixed, np.float32(1 / count), total)
            return total if support is None else routes.inside_block(total, support)

        return operator

    def _put(self, rows: CompletionBatch) -> CompletionBatch:
        return put(rows, self.runtime.mesh)

    def _stream(
        self, function: Callable[[CompletionBatch], Any], rows: list[CompletionBatch], sample: Sample
    ) -> np.ndarray:
        """Results of all micro-batches on the host, [..., P, G, Tc], without the rows that fill up the last one.

        Args:
          function: a micro-batch on the devices -> [..., B, Tc].
          rows: the micro-batches of `sample`.
          sample: gives P, G and Tc.
        """
        made = [function(self._put(micro)) for micro in rows]
        joined = np.concatenate(distributed.gather(made), axis=-2)
        shape = sample.mask_PGT.shape
        return joined[..., : shape[0] * shape[1], :].reshape(joined.shape[:-2] + shape)


@functools.lru_cache(maxsize=1)
def build(runtime: Runtime, grpo: GRPOConfig) -> Probe:
    """The probe of a run. The last one is cached, so that all stages of a run share its programs.

    Each program is compiled at its first call. Attention is plain if the float32 scores of one layer fit into
    `analyze.attention_logit_bytes` on each device, otherwise blockwise.

    Args:
      runtime: the model, the mesh and the configuration.
      grpo: the settings of the trainer's loss.

    Returns:
      the probe; the same object as at the last call if both arguments are equal.
    """
    config = runtime.config.analyze
    rows = config.batch * config.group_size
    longest = runtime.config.rollout.prompt_buckets[-1] + runtime.config.rollout.completion_buckets[-1]
    here = rows // batch_divisor(runtime.mesh)
    heads = runtime.model.config.n_heads // divisor(runtime.mesh, "heads")
    attend = attention.choose(here, heads, longest, config.attention_logit_bytes)
    model = Decoder(runtime.model.config, DTYPES[config.dtype], runtime.config.model.remat)
    temperature, chunk = runtime.config.rollout.sampling.temperature, runtime.config.model.logprob_chunk
    # Gradients differentiate once, so they may use the fused attention of training. It is used where plain attention
    # would take too much memory.
    once = attend if attend is attention.plain else runtime.model.attention
    whole, narrow = decoder_parts.whole(model, attend), decoder_parts.on_route(model, attend)
    grouped = functools.partial(
        Forward, temperature=temperature, chunk=chunk, share=True, devices=batch_divisor(runtime.mesh)
    )
    forward, on_route, fused = grouped(whole), grouped(narrow), grouped(decoder_parts.whole(model, once))
    row_forward, row_fused = (dataclasses.replace(x, share=False) for x in (forward, fused))
    like = {"out_shardings": runtime.shardings}

    def gradient(params: Any, rows: CompletionBatch) -> Any:
        return jax.grad(lambda p: jnp.divide(*reward_loss(fused)(p, rows, ())))(params)

    # If the attention scores do not fit into memory, the activations of all directions together do not fit either.
    over = jax.vmap if attend is attention.plain else _few_at_once

    def route_jets(point: Any, fixed: Any, directions: Any, rows: CompletionBatch) -> jax.Array:
        return jnp.moveaxis(over(lambda v: _jet_rows(on_route, point, fixed, v, rows))(directions), 0, 1)

    def adding(log_probs: Forward) -> Callable[..., Any]:
        product = blocked(exact(both_losses(log_probs)))

        def add_hessian(point: Any, block: Any, rows: CompletionBatch, fixed: Any, scale: jax.Array, total: Any) -> Any:
            return tree.axpy(scale, product(point, block, jax.tree.map(lambda x: x[None], rows), fixed), total)

        return add_hessian

    left = program(
        "analyze_fixed",
        lambda params, index_LR, mask_LR: decoder_parts.route_fixed(params, index_LR, mask_LR)["keep_LF"],
    )

    def fixed(params: Any, index_LR: jax.Array, mask_LR: jax.Array) -> Any:
        # Only `keep_LF` comes from a program: if the program also returned the parameters, it would copy them.
        return {"params": params, "keep_LF": left(params, index_LR, mask_LR)}

    def outside(displacement: Any, z: Any, index_LR: jax.Array, mask_LR: jax.Array) -> Any:
        return tree.sub(displacement, decoder_parts.lift(z, index_LR, mask_LR, displacement))

    def lift_block(block: Any, index_LR: jax.Array, mask_LR: jax.Array, params: Any) -> Any:
        return jax.vmap(lambda z: decoder_parts.lift(z, index_LR, mask_LR, params))(block)

    def split(block: Any, basis: Any, index_LR: jax.Array, mask_LR: jax.Array) -> tuple[jax.Array, Any]:
        on_route = jax.vmap(lambda x: decoder_parts.route_slice(x, index_LR, mask_LR))(block)
        weights_kb = products(basis, on_route)
        one = jax.tree.map(lambda x: x[0], block)
        return weights_kb, tree.sub(block, lift_block(combine(basis, weights_kb), index_LR, mask_LR, one))

    stacks = jax.tree.map(stacked, runtime.shardings)
    return Probe(
        runtime=runtime,
        attention_path=attend.__name__,
        grpo=grpo,
        along=program("analyze_along", lambda x, v, alpha: tree.axpy(alpha, v, x), **like),
        difference=tree_programs.difference,
        slice=program("analyze_slice", decoder_parts.route_slice),
        fixed=fixed,
        lift=program("analyze_lift", decoder_parts.lift, **like),
        lift_block=program("analyze_lift_block", lift_block, out_shardings=stacks),
        outside=program("analyze_outside", outside, **like),
        split=program("analyze_split", split, out_shardings=(named(runtime.mesh), stacks)),
        neuron_products=program("analyze_neuron_products", routes.neuron_products),
        fused=row_fused,
        _gradient=program("analyze_gradient", gradient, **like),
        row_log_probs=program("analyze_row_log_probs", lambda params, rows: row_forward(params, rows, ())),
        _log_probs=program("analyze_log_probs", lambda params, rows: forward(params, rows, ())),
        _jets=program("analyze_jets", lambda params, v, rows: _jet_rows(forward, params, (), v, rows)),
        _route_jets=program("analyze_route_jets", route_jets),
        _activity=program("analyze_activity", functools.partial(routes.activity, model, once)),
        _add_hessian=program("analyze_hessian", adding(on_route)),
        _add_whole_hessian=program("analyze_whole_hessian", adding(forward)),
    )


def _few_at_once(one: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`jax.vmap(one)`, but computed for `AT_ONCE` directions at a time."""
    return functools.partial(jax.lax.map, one, batch_size=AT_ONCE)


def _jet_rows(forward: Forward, point: Any, fixed: Any, v: Any, rows: CompletionBatch) -> jax.Array:
    """logp, u and w of the completion tokens of the rows, [3, B, Tc]; logp is 0 on padding."""
    start = rows.tokens_BT.shape[-1] - rows.mask_BT.shape[-1]
    logp, u, w = jets(
        forward.parts, point, fixed, v, rows.tokens_BT, rows.valid_BT,
        start=start, temperature=forward.temperature, chunk=forward.chunk, group=forward.shared(rows),
    )  # fmt: skip
    return jnp.stack([jnp.where(rows.mask_BT > 0, logp, 0.0), u, w])
