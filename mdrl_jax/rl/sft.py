"""The loss of supervised fine-tuning and pretraining on replies.

It has the same form as the GRPO loss of `policy.py`, so both run the training step of `trainer.py`. `stages/sft.py`
makes its batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.trainer import LossFn


@struct.dataclass
class SFTBatch:
    """Left-padded rows of a prompt and its reply.

    Attributes:
      tokens_BT: token ids.
      valid_BT: True at real tokens, False at padding.
      mask_BT: 1 on the tokens of the reply, its end token included; 0 elsewhere.
    """

    tokens_BT: Any
    valid_BT: Any
    mask_BT: Any


def make_sft_loss(model: Decoder, chunk: int = 0) -> LossFn:
    """The negative log-likelihood of reply tokens as a function of parameters and an `SFTBatch`, for `make_train_step`.

    Args:
      model: the decoder.
      chunk: number of positions whose logits are held at a time, as in `token_log_probs`; 0: all at once.

    Returns:
      (params, batch) -> (sum, (count, metrics)): the sum of -log p over the reply tokens, in nats; the number of these
      tokens; and {"nll": (sum, count)}, the same two without a gradient. The mean, sum / count, is in nats per token,
      at temperature 1. Without reply tokens both are 0. Position 0 is never counted, because nothing predicts it. For
      the same reason the mask must be 0 at the first real token of a padded row, which is not checked.
    """

    def loss_fn(params: Any, batch: SFTBatch):
        logp_BT = token_log_probs(model, params, batch.tokens_BT, batch.valid_BT, start=1, chunk=chunk)
        mask_BT = batch.mask_BT[:, 1:]
        count = jnp.sum(mask_BT)
        loss = -jnp.sum(jnp.where(mask_BT > 0, logp_BT, 0.0))
        return loss, (count, {"nll": (jax.lax.stop_gradient(loss), count)})

    return loss_fn
