"""Keys and values of prompts and completions, and the attention of a new token to them.

All completions of a prompt read one copy of its keys and values (`Prefix`). Those of the completions lie in a ring
(`Cache`), into which each decoding step writes one token of every row.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from mdrl_jax.model.attention import NEGATIVE, Attend
from mdrl_jax.parallel.hlo_text import EQUALLY

# A cache of at least `LONG` tokens is read in one of `PARTS` lengths, so that early tokens do not read an empty tail.
LONG, PARTS = 512, 8


@struct.dataclass
class Prefix:
    """Keys and values of prompts of Tp tokens; all completions of a prompt (its group) read the same ones.

    Attributes:
      k_LPTKh: keys [L, P, Tp, K, h].
      v_LPTKh: values [L, P, Tp, K, h].
      valid_PT: True at real tokens of the prompts [P, Tp].
    """

    k_LPTKh: jax.Array
    v_LPTKh: jax.Array
    valid_PT: jax.Array


@struct.dataclass
class Cache:
    """Keys and values of completions, of which row b belongs to prompt b // G (B = P · G).

    The cache is a ring: the token that is decoded at step s lies in slot s mod Tc. It may have more rows than are
    decoded; then the first ones count.

    Attributes:
      k_LBTKh: keys [L, B, Tc, K, h].
      v_LBTKh: values [L, B, Tc, K, h].
    """

    k_LBTKh: jax.Array
    v_LBTKh: jax.Array


def cached_attention(prefix_k, prefix_v, prefix_valid_PT, cache: Cache, layer, step, start_P, window=None) -> Attend:
    """Attention of one new token in each row to the prompt of its group and to its own completion.

    It writes the new keys and values into slot step mod Tc of the layer's cache; this happens in place if the caller's
    loop carries the cache. All rows share the slot although their completions began at different steps: RoPE has put
    the position into the keys, so the slot need not encode it. Of a completion of more than Tc tokens, only the
    last Tc are attended to. If Tc is at least `LONG`, slots that no step has filled yet are not read, to within
    Tc / `PARTS`.

    Args:
      prefix_k: keys of the prompts in this layer [P, Tp, K, h].
      prefix_v: values of the prompts in this layer [P, Tp, K, h].
      prefix_valid_PT: True at real tokens of the prompts [P, Tp].
      cache: keys and values of the completions in all layers, with Tc of 1 or more.
      layer: index of this layer, from 0, a scalar of the dtype of `step`.
      step: the current step of the decoding loop, from 0, an int32 scalar.
      start_P: the step at which each prompt's completions began [P], at most `step`.
      window: how many tokens, itself included, the token attends to, an int32 scalar; None: all.

    Returns:
      an `Attend`: (q [B, 1, H, h], k [B, 1, K, h], v [B, 1, K, h]) -> (output [B, 1, H, h], the new cache). All have
      the dtype of the cache and of the prompts' keys and values. Row b belongs to prompt b // G, with G = B / P, and
      to row b of the cache, which has B rows or more.
    """
    n_prompts, length = prefix_valid_PT.shape[0], cache.k_LBTKh.shape[2]
    scale = prefix_k.shape[-1] ** -0.5

    def grouped(x_BXX: jax.Array) -> jax.Array:
        return x_BXX.reshape((n_prompts, -1) + x_BXX.shape[1:])

    def over(filled: int, q_PGKRh: jax.Array, k_LBTKh: jax.Array, v_LBTKh: jax.Array) -> jax.Array:
        """The output [P, G, K, R, h], read from the first `filled` slots; the others must be empty."""
        zero = jnp.zeros_like(step)
        sizes = (1, q_PGKRh.shape[0] * q_PGKRh.shape[1], filled, *k_LBTKh.shape[3:])
        of_layer = (layer, zero, zero, zero, zero)
        k_BTKh = jax.lax.dynamic_slice(k_LBTKh, of_layer, sizes)[0]
        v_BTKh = jax.lax.dynamic_slice(v_LBTKh, of_layer, sizes)[0]
        f32 = jnp.float32
        prompt_PGKRS = jnp.einsum("pgkrh,pskh->pgkrs", q_PGKRh, prefix_k, preferred_element_type=f32)
        own_PGKRT = jnp.einsum("pgkrh,pgtkh->pgkrt", q_PGKRh, grouped(k_BTKh), preferred_element_type=f32)
        seen_PS = prefix_valid_PT
        age_T = (step - jnp.arange(filled)) % length
        written_PT = age_T[None, :] <= (step - start_P)[:, None]
        if window is not None:
            ages_S = jnp.arange(prefix_k.shape[1], 0, -1, dtype=jnp.int32)  # of the prompt, at a completion's 1st token
            seen_PS = seen_PS & (ages_S[None, :] + (step - start_P)[:, None] < window)
            written_PT = written_PT & (age_T < window)[None, :]
        prompt_PGKRS = jnp.where(seen_PS[:, None, None, None, :], prompt_PGKRS, NEGATIVE)
        own_PGKRT = jnp.where(written_PT[:, None, None, None, :], own_PGKRT, NEGATIVE)
        weights = jax.nn.softmax(jnp.concatenate([prompt_PGKRS, own_PGKRT], axis=-1), axis=-1)
        weights = weights.astype(q_PGKRh.dtype)
        on_prompt, on_own = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
        return jnp.einsum("pgkrs,pskh->pgkrh", on_prompt, prefix_v) + jnp.einsum(
            "pgkrt,pgtkh->pgkrh", on_own, grouped(v_BTKh)
        )

    def attend(q_B1Hh: jax.Array, k_B1Kh: jax.Array, v_B1Kh: jax.Array):
        zero = jnp.zeros_like(step)
        at = (layer, zero, step % length, zero, zero)
        k_LBTKh = jax.lax.dynamic_update_slice(cache.k_LBTKh, k_B1Kh[None], at)
        v_LBTKh = jax.lax.dynamic_update_slice(cache.v_LBTKh, v_B1Kh[None], at)
        n_kv, head_dim = k_LBTKh.shape[3:]
        q_PGKRh = grouped(q_B1Hh.reshape(q_B1Hh.shape[0], n_kv, -1, head_dim)) * scale
        if length < LONG:
            out_PGKRh = over(length, q_PGKRh, k_LBTKh, v_LBTKh)
        else:
            parts = [functools.partial(over, -(-length * n // PARTS)) for n in range(1, PARTS + 1)]
            filled = jnp.minimum(step + 1, length)  # before the ring is full, its first `step + 1` slots
            with jax.named_scope(EQUALLY):
                out_PGKRh = jax.lax.switch((filled * PARTS - 1) // length, parts, q_PGKRh, k_LBTKh, v_LBTKh)
        return out_PGKRh.reshape(q_B1Hh.shape), Cache(k_LBTKh=k_LBTKh, v_LBTKh=v_LBTKh)

    return attend
