"""First orders of every domain's mean reward along candidate changes of parameters, and along those of the past.

One gradient a block of prompts serves all directions, so a further candidate costs inner products only. A direction
that was made from a domain's own completions (the first step of a refresh, the coordinates of a rollback that keeps it)
fits their noise: its first order on them is up to several times too large. Every domain is therefore looked at on
prompts that no direction has seen, and on more of them than directions are made from: what tells candidates apart is
a small difference of first orders.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.analysis import samples
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.config import TrainSection
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import put
from mdrl_jax.progress import Show
from mdrl_jax.recovery.planning.forecast import Shift, shift
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig, group_advantages, loss_mask
from mdrl_jax.rl.policy import PolicyBatch, join, make_grpo_loss
from mdrl_jax.rl.trainer import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from mdrl_jax.runtime import Runtime

Floats = NDArray[np.float64]
Direction = Callable[[], Any]
UNCLIPPED = 1e6  # of a ratio: more than one that is met


@dataclasses.dataclass(frozen=True)
class Found:
    """What a direction does to log-odds, by domain, and its norm."""

    shifts: dict[str, Shift]
    norm: float


def at_hand(runtime: Runtime, stored: Sample) -> Sample:
    """A stored set, its completions padded so that all sets share one program."""
    return stored.padded(runtime.config.rollout.completion_buckets[-1])


def unseen(runtime: Runtime, params: Any, domain: str) -> Sample:
    """Completions of the `recover.forecast_prompts` prompts that come after those of stored sets, drawn at `params`.

    Raises:
      UserError: where the split has too few prompts.
    """
    stored, split = runtime.config.analyze.prompts, runtime.config.analyze.split
    n, there = runtime.config.recover.forecast_prompts, len(runtime.prompts[domain, split])
    if there < stored + n:
        raise UserError(
            f"a forecast needs analyze.prompts + recover.forecast_prompts = {stored} + {n} {split} prompts of "
            f"{domain}, which has {there}"
        )
    return at_hand(runtime, samples.draw(runtime, params, domain, n, first=stored))


def measure(
    probe: Probe,
    params: Any,
    looked: Mapping[str, Sample],
    directions: Sequence[Direction],
    show: Show,
) -> list[Found | None]:
    """What each direction does to every domain at `params`; None where it cannot be made.

    Up to `analyze.held` directions are kept at a time; with more, gradients are computed in several `rounds`, each a
    piece of what `show` is told.

    Args:
      looked: completions of each domain drawn there (`unseen`).
      directions: each gives its tree, or None where it cannot be made.
    """
    held = probe.runtime.config.analyze.held
    found: list[Found | None] = [None] * len(directions)
    for first in range(0, len(directions), held):
        done = first // held
        show(done, "directions")
        made = {i: directions[i]() for i in range(first, min(first + held, len(directions)))}
        some = [i for i, direction in made.items() if direction is not None]
        trees = [made[i] for i in some]
        shifts: list[dict[str, Shift]] = [{} for _ in some]
        for domain, sample in looked.items():
            tell = functools.partial(show, done)
            gain_MV = _gains(probe, params, sample, trees, lambda t, d=domain, tell=tell: tell(f"gradient of {d}, {t}"))
            rewards_MB = sample.rewards_PG.reshape(len(gain_MV), -1)
            for at in range(len(some)):
                shifts[at][domain] = shift(gain_MV[:, at], rewards_MB)
        for at, i in enumerate(some):
            found[i] = Found(shifts[at], float(length(trees[at])))
    return found


def rounds(n_directions: int, held: int) -> int:
    """How often `measure` computes the gradients."""
    return -(-n_directions // held)


def _gains(probe: Probe, params: Any, sample: Sample, trees: list[Any], progress: Callable[[str], None]) -> Floats:
    """∇J·v of each block of prompts: [blocks, directions]."""
    blocks = probe.rows(sample)
    out = np.zeros((len(blocks), len(trees)))
    for m, rows in enumerate(blocks):
        progress(f"block {m + 1} of {len(blocks)}")
        gradient = probe.gradient(params, rows)
        out[m] = [-float(x) for x in distributed.gather([_product(v, gradient) for v in trees])]
    return out


class OffPolicyLookahead:
    """A refresh on completions at hand, by the trainer's own step from a fresh optimizer; nothing is sampled in it.

    What a stage adds to its optimizer so as to keep other domains is not in it: a refresh is plain training
    (definitions §8).
    """

    def __init__(self, probe: Probe):
        self.probe, self.runtime = probe, probe.runtime

    @functools.cache  # noqa: B019  (one lives as long as a plan is made)
    def _program(self, grpo: GRPOConfig, optimizer: OptimizerConfig) -> tuple[Any, Any, Any]:
        config = self.runtime.config
        made = make_optimizer(optimizer)
        shardings = state_shardings(made, self.runtime.shapes, self.runtime.shardings, self.runtime.mesh)
        longest = config.rollout.completion_buckets[-1]
        temperature, chunk = config.rollout.sampling.temperature, config.model.logprob_chunk
        # Where completions are used again and again, as here, clipping would end the rehearsal where a refresh goes on.
        free = dataclasses.replace(grpo, clip_low=1.0, clip_high=UNCLIPPED)
        loss = make_grpo_loss(self.runtime.model, free, temperature, longest, chunk)
        return made, shardings, make_train_step("planner_step", loss, made, shardings, self.runtime.mesh)

    def first(self, params: Any, sample: Sample, train: TrainSection) -> Any:
        """The direction of the first step at `params`, on completions drawn there; its length is that of rate 1."""
        optimizer, shardings, step = self._program(train.grpo, train.optimizer)
        batch = self._batch(params, sample, train)
        state, _ = step(init_state(optimizer, params, shardings), batch, jnp.float32(1), {})
        return self.probe.difference(state.params, params)

    def walk(self, params: Any, sample: Sample, train: TrainSection, steps: int) -> Iterator[Any]:
        """Parameters after each of the first steps from `params`, on completions drawn there: each until the next.

        From the second step on the policy has left the completions: their tokens are weighted by its ratio.
        """
        optimizer, shardings, step = self._program(train.grpo, train.optimizer)
        batch, state = self._batch(params, sample, train), init_state(optimizer, params, shardings)
        for done in range(steps):
            for _ in range(train.grpo.updates_per_batch):
                state, _ = step(state, batch, jnp.float32(train.learning_rate * train.lr_scale(done)), {})
            yield state.params

    def _batch(self, params: Any, sample: Sample, train: TrainSection) -> PolicyBatch:
        grpo, (n, group) = train.grpo, sample.rewards_PG.shape
        adv_PG, informative_P = distributed.gather(group_advantages(jnp.asarray(sample.rewards_PG), scale=grpo.scale))
        flat = sample.mask_PGT.reshape(n * group, -1)
        mask_BT = loss_mask(
            jnp.asarray(flat),
            jnp.asarray(np.repeat(informative_P, group)),
            jnp.asarray(~sample.ended_PG.reshape(-1)),
            grpo,
        )
        tokens_BT, valid_BT = join(sample.prompts_PT, sample.valid_PT, sample.tokens_PGT, sample.mask_PGT)
        # Sampler, trainer and reference agree at the first step, so that every ratio is 1 and the KL is 0.
        logp_BT = self.probe.log_probs(params, sample).reshape(n * group, -1).astype(np.float32)
        arrays = {
            "tokens": np.asarray(tokens_BT),
            "valid": np.asarray(valid_BT),
            "logp": logp_BT,
            "adv": adv_PG.reshape(-1),
            "mask": np.asarray(mask_BT),
        }
        arrays = micro_batches(arrays, n // self.runtime.config.analyze.batch)
        arrays = put(arrays, self.runtime.mesh, None, "batch")
        return PolicyBatch(
            tokens_BT=arrays["tokens"],
            valid_BT=arrays["valid"],
            grpo=GRPOBatch(
                old_logp_BT=arrays["logp"],
                sampler_logp_BT=arrays["logp"],
                ref_logp_BT=arrays["logp"] if grpo.kl_coef > 0 else None,
                adv_B=arrays["adv"],
                mask_BT=arrays["mask"],
            ),
        )


def path_length(train: TrainSection, steps: int) -> float:
    """Learning rate summed over the first steps of a stage, its warm-up included."""
    total = sum(train.lr_scale(step) for step in range(steps))
    return train.learning_rate * total * train.grpo.updates_per_batch


_product = program("planner_product", tree.vdot)
length = program("planner_norm", tree.norm)
