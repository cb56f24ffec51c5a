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
    """The mean negative log-likelihood of reply tokens, in nats per token, as a function of parameters and a batch.

    Returns:
      (params, batch) -> (sum, (count, metrics)): the sum over the reply tokens, their number, and the metric "nll",
      which is the same mean. `token_log_probs` explains `chunk`.
    """

    def loss_fn(params: Any, batch: SFTBatch):
        logp_BT = token_log_probs(model, params, batch.tokens_BT, batch.valid_BT, start=1, chunk=chunk)
        mask_BT = batch.mask_BT[:, 1:]
        count = jnp.sum(mask_BT)
        loss = -jnp.sum(jnp.where(mask_BT > 0, logp_BT, 0.0))
        return loss, (count, {"nll": (jax.lax.stop_gradient(loss), count)})

    return loss_fn
