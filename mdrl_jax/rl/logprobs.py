"""Log-probs of given tokens under the model, computed in chunks of positions.

`policy.py` and `sft.py` call `token_log_probs` in their losses. The logits of all positions, [B, T, V], can be larger
than all other arrays together. With chunks, only those of a few positions exist at a time, in the backward pass too.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.transformer import Decoder

# Checkpoint name for the derivative of a token's log-prob with respect to its hidden state. A function that saves it
# needs no logits in the backward pass (`second_order/decoder_parts.py`).
SLOPE = "slope"
_slopes = jax.checkpoint_policies.save_only_these_names(SLOPE)


def token_log_probs(
    model: Decoder,
    params: Any,
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
    *,
    start: int,
    temperature: float = 1.0,
    chunk: int = 0,
    group: int = 1,
) -> jax.Array:
    """log π(token_t | tokens before t) for all t >= `start`.

    π is the policy at `temperature`, without top-k or top-p (definitions §1).

    Args:
      model: the decoder.
      params: its parameters.
      tokens_BT: token ids of left-padded rows [B, T].
      valid_BT: True at real tokens, False at padding [B, T].
      start: the first position t, counted from 0 in the padded rows; at least 1. From T on there are no positions left.
      temperature: divides the logits; above 0.
      chunk: number of positions whose logits are computed at a time, 0 or more; the backward pass recomputes them. 0:
        all positions at once.
      group: number of rows, in succession, that have the same first `start` tokens; it divides B. These tokens are
        computed once for all of them. 1: every row is computed as a whole.

    Returns:
      log-probs in nats [B, T - start], float32 (float64 if the model's dtype is). At padding, and at the first real
      token of a padded row, their values have no meaning.

    Raises:
      ValueError: if `start` is below 1, because nothing predicts the first token of a row, or if `group` does not
        divide B.
    """
    apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
    hidden_BTD, targets_BT = predicting(apply, tokens_BT, valid_BT, start, group), tokens_BT[:, start:]
    lm_head_DV = apply(method="lm_head")

    def log_probs(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = apply(hidden_BCD, lm_head_DV, method="logits") / temperature
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    return over_chunks(log_probs, (hidden_BTD, targets_BT), chunk)


def predicting(
    apply: Callable[..., Any], tokens_BT: jax.Array, valid_BT: jax.Array, start: int, group: int = 1
) -> jax.Array:
    """The hidden states after the final norm that the tokens from `start` on are predicted from.

    Args:
      apply: a decoder's `apply` with its parameters.
      tokens_BT, valid_BT, start, group: as in `token_log_probs`.

    Returns:
      hidden states [B, T - start, D], in the dtype of the decoder.

    Raises:
      ValueError: as in `token_log_probs`.
    """
    rows = Grouped(valid_BT, start, group)
    return rows.predicting(apply(rows.pack(tokens_BT), rows, method="packed_hidden"))


def over_chunks(function: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Applies `function` to `chunk` positions at a time, so that its intermediate arrays are small.

    The backward pass recomputes each chunk. It reuses only the values that `function` names `SLOPE` with
    `jax.ad_checkpoint.checkpoint_name`. If one chunk holds all positions, `function` is called directly, and the
    backward pass recomputes nothing.

    Args:
      function: a function of arrays [B, C, ...] for any number C of positions, which treats positions independently.
        It returns an array or a tree of arrays [B, C, ...].
      arrays: its arguments for all positions, one or more arrays [B, T, ...].
      chunk: C; the last chunk is padded with zeros, whose results are dropped. 0, or T or more: all positions at once.

    Returns:
      the results for all positions, an array or a tree of arrays [B, T, ...].
    """
    length = arrays[0].shape[1]
    if chunk == 0 or chunk >= length:
        return function(*arrays)

    def by_chunk(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        split = x.reshape((x.shape[0], -1, chunk) + x.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def whole(out_NBC: jax.Array) -> jax.Array:
        out_BNC = jnp.moveaxis(out_NBC, 0, 1)
        return out_BNC.reshape(out_BNC.shape[0], -1, *out_BNC.shape[3:])[:, :length]

    def one(parts: tuple[jax.Array, ...]) -> Any:
        return jax.checkpoint(function, policy=_slopes)(*parts)

    return jax.tree.map(whole, jax.lax.map(one, tuple(map(by_chunk, arrays))))
