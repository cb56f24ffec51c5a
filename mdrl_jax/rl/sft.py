"""Supervised fine-tuning (and pretraining) on replies, by the same step as GRPO."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.trainer import LossFn


@struct.dataclass
class SFTBatch:
    """Left-padded sequences [B, T] and the mask of reply tokens, the end token included."""

    tokens_BT: Any
    valid_BT: Any
    mask_BT: Any


def make_sft_loss(model: Decoder, chunk: int = 0) -> LossFn:
    """Mean negative log-likelihood of reply tokens, in nats a token, as (sum, count)."""

    def loss_fn(params: Any, batch: SFTBatch):
        logp_BT = token_log_probs(model, params, batch.tokens_BT, batch.valid_BT, start=1, chunk=chunk)
        mask_BT = batch.mask_BT[:, 1:]
        count = jnp.sum(mask_BT)
        loss = -jnp.sum(jnp.where(mask_BT > 0, logp_BT, 0.0))
        return loss, (count, {"nll": (jax.lax.stop_gradient(loss), count)})

    return loss_fn
