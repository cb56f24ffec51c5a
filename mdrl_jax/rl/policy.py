"""The model as a policy: GRPO's loss of its parameters, and log-probs of completions under it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig, grpo_loss
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.trainer import LossFn


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
