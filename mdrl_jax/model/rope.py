"""Rotary position embeddings (RoPE): positions of left-padded tokens, frequencies, and the rotation of heads."""

import jax
import jax.numpy as jnp

from mdrl_jax.model.families import RopeScaling
from mdrl_jax.tree import at_least_float32


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """The frequencies of RoPE (arXiv 2104.09864): θ^(−2i/h) for i = 0, …, h/2 − 1.

    Args:
      head_dim: h, an even number.
      theta: the base θ, above 0.
      scaling: None: none. Linear scaling divides all frequencies by `factor`. Llama-3 scaling (arXiv 2407.21783)
        divides those of long wavelengths by it; those of short wavelengths stay, and those between are multiplied by a
        factor that is linear in 1 / wavelength.

    Returns:
      radians per position [h/2], float32.

    Raises:
      ZeroDivisionError: if `low_freq_factor` or `high_freq_factor` of the scaling is 0.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.power(jnp.float32(theta), exponent)
    if scaling is None:
        return frequency
    if scaling.linear:
        return frequency / scaling.factor
    wavelength = 2 * jnp.pi / frequency
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    mixed = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = jnp.where(wavelength > low, frequency / scaling.factor, mixed)
    return jnp.where(wavelength < high, frequency, scaled)


def rotate(x_BTHh: jax.Array, positions_BT: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Applies RoPE to heads, in Hugging Face's layout: coordinate i is paired with coordinate i + h/2.

    Args:
      x_BTHh: queries or keys [B, T, H, h], with an even h.
      positions_BT: position of each token [B, T].
      frequencies: from `rope_frequencies` [h/2].

    Returns:
      rotated queries or keys [B, T, H, h], in the dtype of `x_BTHh`: with a = position · frequency i, the pair (x, y)
      becomes (x cos a − y sin a, y cos a + x sin a).
    """
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    a, b = jnp.split(x_BTHh.astype(at_least_float32(x_BTHh.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)


def positions_of(valid_BT: jax.Array) -> jax.Array:
    """Position of each token: the number of valid tokens before it. Padding on the left gets 0, like the first token.

    Args:
      valid_BT: mask [B, T]: True at real tokens, False at the padding on the left.

    Returns:
      positions [B, T], int32.
    """
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=-1) - 1, 0)
