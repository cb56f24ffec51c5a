"""Tolerances that follow from the arithmetic: from the unit roundoff, the number of roundings and the condition.

If a sum is computed in another order (on another mesh, another CPU, by other threads), it differs by rounding alone.
With n roundings on the longest path, each independent with mean 0, the relative backward error is below λ √n u with
probability 1 − 2n exp(−λ²/2) (Higham and Mary 2019, Theorem 2.4). Here u is the unit roundoff. The error of the result
is the backward error times the condition of the problem. A rounded product W x is the exact product with another W,
whose entries differ by that relative error. Therefore the condition with respect to the parameters is used.
"""

import math

from mdrl_jax.model.families import ModelConfig

UNIT_ROUNDOFF = 2.0**-24  # of float32
SURE = 6.0  # λ: the probability of a larger error is at most about 3e-8 n


def tolerance(roundings: int, condition: float) -> float:
    """The largest relative difference that rounding explains between two computations of a result in float32.

    Args:
      roundings: number of roundings on the longest path.
      condition: relative change of the result per relative change of the parameters.
    """
    return 2 * SURE * math.sqrt(roundings) * UNIT_ROUNDOFF * condition  # twice, because both results are rounded


def decoder_roundings(config: ModelConfig, length: int, tokens: int) -> int:
    """Number of roundings on the longest path through a decoder and back, for a mean of log-probs over tokens.

    Args:
      config: sizes of the decoder.
      length: tokens per row.
      tokens: number of terms of the final mean.
    """
    heads = config.n_heads * config.head_dim
    attention = 2 * config.d_model + config.head_dim + 2 * length + heads
    layer = attention + 2 * config.d_model + config.d_mlp
    return 2 * (config.n_layers * layer + 2 * config.d_model + config.vocab_size + tokens)
