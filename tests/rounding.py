"""Tolerances that follow from the arithmetic: unit roundoff, number of roundings, condition.

The same sum in another order (another mesh, another CPU, other threads) differs by rounding alone. With n roundings on
the longest path, each independent with mean 0, the relative backward error stays below λ √n u with probability
1 − 2n exp(−λ²/2) (Higham and Mary 2019, Theorem 2.4); the condition takes it to the result. A product W x that is
rounded is the exact product of a W whose entries changed by that relative error, so the condition with respect to the
parameters is what counts.
"""

import math

from mdrl_jax.model.families import ModelConfig

UNIT_ROUNDOFF = 2.0**-24  # of float32
SURE = 6.0  # λ: below 1e-4 for every n up to a million


def tolerance(roundings: int, condition: float) -> float:
    """Largest relative difference that rounding explains, of a result computed twice in float32."""
    return 2 * SURE * math.sqrt(roundings) * UNIT_ROUNDOFF * condition  # both computations are rounded


def decoder_roundings(config: ModelConfig, length: int, tokens: int) -> int:
    """Roundings on the longest path through a decoder, forwards and backwards, to a mean over tokens of log-probs.

    Args:
      config: sizes of the decoder.
      length: tokens of a row.
      tokens: terms of the final mean.
    """
    heads = config.n_heads * config.head_dim
    attention = 2 * config.d_model + config.head_dim + 2 * length + heads
    layer = attention + 2 * config.d_model + config.d_mlp
    return 2 * (config.n_layers * layer + 2 * config.d_model + config.vocab_size + tokens)
