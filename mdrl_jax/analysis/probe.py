"""What the analysis runs on devices: log-probs, jets, gradients, activity and curvature of a model, compiled once.

Parameters, directions and rows are arguments of every program. Rows are streamed from the host, one micro-batch at a
time and all of one shape, so memory is that of one micro-batch and of the trees at hand, and little is compiled.
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
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor, divisor, put
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.runtime import DTYPES, Runtime
from mdrl_jax.second_order import decoder_parts
from mdrl_jax.second_order.hvp import blocked, exact
from mdrl_jax.second_order.jets import jets
from mdrl_jax.second_order.objectives import CompletionBatch, DirectionalDerivatives, Forward, both_losses, reward_loss

AT_ONCE = 2  # directions on a route, where sequences are long


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Built once an analysis by `build`; `attention_path`, of jets and curvature, is "plain" or "blockwise"."""

    runtime: Runtime
    attention_path: str
    grpo: GRPOConfig
    along: Callable[..., Any]
    difference: Callable[..., Any]
    slice: Callable[..., Any]
    fixed: Callable[..., Any]
    outside: Callable[..., Any]
    neuron_products: Callable[..., Any]
    fused: Forward  # of all parameters, attending as training does: differentiable once, in reverse
    row_log_probs: Callable[..., Any]  # (params, rows) -> log π of completion tokens [B, Tc], 0 on padding
    _gradient: Callable[..., Any]
    _jets: Callable[..., Any]
    _route_jets: Callable[..., Any]
    _activity: Callable[..., Any]
    _add_hessian: Callable[..., Any]

    @property
    def programs(self) -> Mapping[str, Callable[..., Any]]:
        """What its methods run on devices, for those who compile it without running."""
        return {
            "gradient": self._gradient,
            "jets": self._jets,
            "route_jets": self._route_jets,
            "activity": self._activity,
            "hessian": self._add_hessian,
        }

    def rows(self, sample: Sample, batch: int | None = None, adv_PG: np.ndarray | None = None) -> list[CompletionBatch]:
        """The sample in micro-batches of `batch` prompts (`analyze.batch`), on the host."""
        return sample.rows(self.runtime.config.analyze.batch if batch is None else batch, adv_PG)

    def log_probs(self, params: Any, sample: Sample) -> np.ndarray:
        """log π of the sample's tokens [P, G, Tc], 0 on padding."""
        return self._stream(lambda micro: self.row_log_probs(params, micro), self.rows(sample), sample)

    def derivatives(self, params: Any, v: Any, sample: Sample) -> dict[str, DirectionalDerivatives]:
        """First and second orders of every objective along `v`, by prompt (`objectives.derivatives`)."""
        _, u, w = self.jets(params, v, sample)
        return sample.derivatives(u, w, self.grpo)

    def jets(self, params: Any, v: Any, sample: Sample, batch: int | None = None) -> np.ndarray:
        """logp, u and w of every token along `v`: [3, P, G, Tc]."""
        return self._stream(lambda micro: self._jets(params, v, micro), self.rows(sample, batch), sample)

    def route_jets(self, point: Any, fixed: Any, directions: Any, sample: Sample, batch: int) -> np.ndarray:
        """logp, u and w of every token along directions [n, ...] of a route: [3, n, P, G, Tc]."""
        one = lambda micro: self._route_jets(point, fixed, directions, micro)  # noqa: E731
        return self._stream(one, self.rows(sample, batch), sample)

    def gradient(self, params: Any, rows: CompletionBatch) -> Any:
        """∇L of the reward loss on one micro-batch."""
        return self._gradient(params, self._put(rows))

    def activity(self, params: Any, sample: Sample) -> routes.Activity:
        """Sums of neuron and head activity by block of prompts."""
        made = distributed.gather([self._activity(params, self._put(micro)) for micro in self.rows(sample)])
        stacked = (np.stack([np.asarray(m[i], np.float64) for m in made]) for i in range(3))
        return routes.Activity(*stacked)

    def hessian(self, point: Any, fixed: Any, rows: list[CompletionBatch], count: float) -> Callable[[Any], Any]:
        """A block [b, ...] of route vectors -> Σ over rows of the Hessian products of `both_losses` / count."""
        placed = [self._put(micro) for micro in rows]

        def operator(block: Any) -> Any:
            total = tree.zeros_like(block)
            for micro in placed:
                total = self._add_hessian(point, block, micro, fixed, np.float32(1 / count), total)
            return total

        return operator

    def _put(self, rows: CompletionBatch) -> CompletionBatch:
        return put(rows, self.runtime.mesh)

    def _stream(
        self, function: Callable[[CompletionBatch], Any], rows: list[CompletionBatch], sample: Sample
    ) -> np.ndarray:
        """Results [..., B, Tc] of each micro-batch, joined to [..., P, G, Tc]; rows that fill up are dropped."""
        made = [function(self._put(micro)) for micro in rows]
        joined = np.concatenate(distributed.gather(made), axis=-2)
        shape = sample.mask_PGT.shape
        return joined[..., : shape[0] * shape[1], :].reshape(joined.shape[:-2] + shape)


@functools.lru_cache(maxsize=1)
def build(runtime: Runtime, grpo: GRPOConfig) -> Probe:
    """Chooses the attention path, once, and makes the programs: one probe for all stages of a run.

    Raises:
      UserError: if a micro-batch does not divide over the mesh.
    """
    config = runtime.config.analyze
    rows = config.batch * config.group_size
    longest = runtime.config.rollout.prompt_buckets[-1] + runtime.config.rollout.completion_buckets[-1]
    here = rows // batch_divisor(runtime.mesh)
    heads = runtime.model.config.n_heads // divisor(runtime.mesh, "heads")
    attend = attention.choose(here, heads, longest, config.attention_logit_bytes)
    model = Decoder(runtime.model.config, DTYPES[config.dtype], runtime.config.model.remat)
    temperature, chunk = runtime.config.rollout.sampling.temperature, runtime.config.model.logprob_chunk
    # A gradient may attend as training does, by a fused kernel.
    once = attend if attend is attention.plain else runtime.model.attention
    whole, narrow = decoder_parts.whole(model, attend), decoder_parts.on_route(model, attend)
    forward, fused, on_route = (
        Forward(s, temperature, chunk) for s in (whole, decoder_parts.whole(model, once), narrow)
    )
    take_jets = functools.partial(_jet_rows, temperature=temperature, chunk=chunk)
    like = {"out_shardings": runtime.shardings}

    def gradient(params: Any, rows: CompletionBatch) -> Any:
        return jax.grad(lambda p: jnp.divide(*reward_loss(fused)(p, rows, ())))(params)

    # Where the scores of attention are too many to hold, so are the activations of many directions.
    over = jax.vmap if attend is attention.plain else _few_at_once

    def route_jets(point: Any, fixed: Any, directions: Any, rows: CompletionBatch) -> jax.Array:
        return jnp.moveaxis(over(lambda v: take_jets(narrow, point, fixed, v, rows))(directions), 0, 1)

    product = blocked(exact(both_losses(on_route)))

    def add_hessian(point: Any, block: Any, rows: CompletionBatch, fixed: Any, scale: jax.Array, total: Any) -> Any:
        return tree.axpy(scale, product(point, block, jax.tree.map(lambda x: x[None], rows), fixed), total)

    left = program(
        "analyze_fixed",
        lambda params, index_LR, mask_LR: decoder_parts.route_fixed(params, index_LR, mask_LR)["keep_LF"],
    )

    def fixed(params: Any, index_LR: jax.Array, mask_LR: jax.Array) -> Any:
        # Parameters that went through a program would be a copy.
        return {"params": params, "keep_LF": left(params, index_LR, mask_LR)}

    def outside(displacement: Any, z: Any, index_LR: jax.Array, mask_LR: jax.Array) -> Any:
        return tree.sub(displacement, decoder_parts.lift(z, index_LR, mask_LR, displacement))

    return Probe(
        runtime=runtime,
        attention_path=attend.__name__,
        grpo=grpo,
        along=program("analyze_along", lambda x, v, alpha: tree.axpy(alpha, v, x), **like),
        difference=program("analyze_difference", tree.sub, **like),
        slice=program("analyze_slice", decoder_parts.route_slice),
        fixed=fixed,
        outside=program("analyze_outside", outside, **like),
        neuron_products=program("analyze_neuron_products", routes.neuron_products),
        fused=fused,
        _gradient=program("analyze_gradient", gradient, **like),
        row_log_probs=program("analyze_log_probs", lambda params, rows: forward(params, rows, ())),
        _jets=program("analyze_jets", lambda params, v, rows: take_jets(whole, params, (), v, rows)),
        _route_jets=program("analyze_route_jets", route_jets),
        _activity=program("analyze_activity", functools.partial(routes.activity, model, once)),
        _add_hessian=program("analyze_hessian", add_hessian),
    )


def _few_at_once(one: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return functools.partial(jax.lax.map, one, batch_size=AT_ONCE)


def _jet_rows(
    part: decoder_parts.DecoderParts,
    point: Any,
    fixed: Any,
    v: Any,
    rows: CompletionBatch,
    *,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """logp, u and w of the rows, [3, B, Tc]; logp is 0 on padding."""
    start = rows.tokens_BT.shape[-1] - rows.mask_BT.shape[-1]
    logp, u, w = jets(
        part, point, fixed, v, rows.tokens_BT, rows.valid_BT, start=start, temperature=temperature, chunk=chunk
    )
    return jnp.stack([jnp.where(rows.mask_BT > 0, logp, 0.0), u, w])
