"""The model as a policy: GRPO's loss of its parameters, its batches, and log-probs of completions under it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named, put
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig, group_advantages, grpo_loss, loss_mask
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.trainer import LossFn, micro_batches


@struct.dataclass
class PolicyBatch:
    """Left-padded prompts with their completions [B, Tp + Tc], and the loss's arrays over [B, Tc]."""

    tokens_BT: Any
    valid_BT: Any
    grpo: GRPOBatch


def make_grpo_loss(model: Decoder, config: GRPOConfig, temperature: float, max_length: int, chunk: int) -> LossFn:
    """GRPO's loss (sum, count) of parameters on a `PolicyBatch`; the policy is at the sampling temperature."""

    def loss_fn(params: Any, batch: PolicyBatch):
        start = batch.tokens_BT.shape[1] - batch.grpo.mask_BT.shape[1]
        logp_BT = token_log_probs(
            model, params, batch.tokens_BT, batch.valid_BT, start=start, temperature=temperature, chunk=chunk
        )
        loss, count, metrics = grpo_loss(logp_BT, batch.grpo, config, max_length)
        return loss, (count, metrics)

    return loss_fn


def make_log_probs(model: Decoder, mesh: Mesh, temperature: float, chunk: int) -> Callable[..., jax.Array]:
    """The jitted (params, tokens_MBT, valid_MBT, start) -> log-probs [M, B, T - start], by micro-batch."""

    def log_probs(params: Any, tokens_MBT: jax.Array, valid_MBT: jax.Array, start: int) -> jax.Array:
        one = functools.partial(token_log_probs, model, params, start=start, temperature=temperature, chunk=chunk)
        return jax.lax.map(lambda pair: one(*pair), (tokens_MBT, valid_MBT))

    rows = named(mesh, None, "batch")
    return program("log_probs", log_probs, static_argnums=3, out_shardings=rows)


def join(prompts_PT: Any, valid_PT: Any, completions_PGT: Any, mask_PGT: Any) -> tuple[Any, Any]:
    """On the host: prompts repeated over their groups, followed by completions: tokens and valid, [P * G, Tp + Tc]."""
    n_prompts, group, _ = completions_PGT.shape
    rows = n_prompts * group

    def repeat(x_PT: Any) -> Any:
        return np.repeat(x_PT, group, axis=0)

    tokens_BT = np.concatenate([repeat(prompts_PT), completions_PGT.reshape(rows, -1)], axis=1)
    valid_BT = np.concatenate([repeat(valid_PT), mask_PGT.reshape(rows, -1) > 0], axis=1)
    return tokens_BT, valid_BT


class Trained(NamedTuple):
    """What the trainer takes of G completions of each of P prompts, on the host.

    Attributes:
      adv_PG: their advantages.
      informative_P: whether the rewards of a prompt differ.
      mask_PGT: 1 on the tokens that are trained (`loss_mask`).
    """

    adv_PG: np.ndarray
    informative_P: np.ndarray
    mask_PGT: np.ndarray


def trained(rewards_PG: Any, mask_PGT: Any, ended_PG: Any, config: GRPOConfig) -> Trained:
    """Advantages and trained tokens of scored completions.

    Args:
      rewards_PG: their rewards.
      mask_PGT: 1 on their tokens.
      ended_PG: false where the length limit cut one off.
    """
    adv_PG, informative_P = jax.device_get(group_advantages(jnp.asarray(rewards_PG), scale=config.scale))
    n_prompts, group, length = mask_PGT.shape
    mask_BT = loss_mask(
        jnp.asarray(mask_PGT.reshape(n_prompts * group, length)),
        jnp.asarray(np.repeat(informative_P, group)),
        jnp.asarray(~ended_PG.reshape(-1)),
        config,
    )
    return Trained(adv_PG, informative_P, np.asarray(mask_BT).reshape(mask_PGT.shape))


def policy_batch(
    prompts_PT: Any, valid_PT: Any, completions_PGT: Any, mask_PGT: Any, logp_PGT: Any, trained: Trained,
    n: int, mesh: Mesh,
) -> PolicyBatch:  # fmt: skip
    """The loss's batch of n micro-batches on the devices, leaves [n, rows, ...]; old and reference log-probs are None.

    Args:
      prompts_PT, valid_PT, completions_PGT, mask_PGT: as of `join`.
      logp_PGT: log-probs under the sampler.
    """
    rows = trained.adv_PG.size
    tokens_BT, valid_BT = join(prompts_PT, valid_PT, completions_PGT, mask_PGT)
    logp_BT, mask_BT = (x.reshape(rows, -1) for x in (logp_PGT, trained.mask_PGT))
    on_host = tokens_BT, valid_BT, logp_BT, trained.adv_PG.reshape(-1), mask_BT
    tokens, valid, logp, adv, mask = put(micro_batches(on_host, n), mesh, None, "batch")
    return PolicyBatch(tokens, valid, GRPOBatch(None, logp, None, adv, mask))
