"""Sampling completions: prefill each prompt once, then decode its group until every row has ended.

The recorded log-prob is that of the distribution sampled from (temperature, top-k and top-p applied), so that
the trainer can correct for the difference (`rl/grpo.py`). The key of every draw is folded from
(seed, stage, step, prompt, sample, token): no draw repeats, and a resumed run draws the same.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mdrl_jax.errors import UserError
from mdrl_jax.model.transformer import NEGATIVE, Cache, Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn; temperature 0 is greedy, top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} is not valid; it is >= 0")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is not valid; it is >= 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not valid; 0 < top_p <= 1")


@struct.dataclass
class Completions:
    """What was sampled: tokens and log-probs [P, G, T], zero after the end; lengths [P, G] with the end token.

    `ended` is false where the length limit cut a completion off.
    """

    tokens_PGT: Any
    logp_PGT: Any
    length_PG: Any
    ended_PG: Any


@struct.dataclass
class _State:
    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    hidden_BD: jax.Array
    tokens_BT: jax.Array
    logp_BT: jax.Array
    cache: Cache


def sampling_log_probs(logits_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Log-probs [B, V] of the distribution sampled from; tokens outside top-k or top-p get about -1e30.

    Temperature 0 puts all mass on the first largest logit. Top-p keeps the smallest set of most probable tokens
    whose mass reaches p, after top-k (the order of vLLM and transformers).
    """
    vocab = logits_BV.shape[-1]
    if sampling.temperature == 0:
        best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), vocab, dtype=bool)
        return jnp.where(best_BV, 0.0, NEGATIVE)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < vocab:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, NEGATIVE, logits_BV)
    if sampling.top_p < 1:
        descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        n_kept_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True)
        threshold_B1 = jnp.take_along_axis(descending_BV, n_kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < threshold_B1, NEGATIVE, logits_BV)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def stage_key(seed: int, stage: str, step: int) -> jax.Array:
    """The key of one step of one stage. By name, so that adding a stage changes no other's draws."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return jax.random.fold_in(key, step)


def row_keys(key: jax.Array, prompt_ids_P: jax.Array, group: int) -> jax.Array:
    """Keys [P * group] by prompt and sample."""
    fold = jax.random.fold_in
    keys_P = jax.vmap(fold, in_axes=(None, 0))(key, prompt_ids_P)
    keys_PG = jax.vmap(jax.vmap(fold, in_axes=(None, 0)), in_axes=(0, None))(keys_P, jnp.arange(group))
    return keys_PG.reshape(-1)


def decode_loop(
    model: Decoder,
    params: Any,
    prompts_PT: jax.Array,
    valid_PT: jax.Array,
    key: jax.Array,
    prompt_ids_P: jax.Array,
    *,
    group: int,
    max_new_tokens: int,
    end: tuple[int, ...],
    sampling: SamplingConfig,
) -> Completions:
    """Samples `group` completions of each left-padded prompt; see the module for keys and log-probs."""
    apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
    n_prompts, batch = prompts_PT.shape[0], prompts_PT.shape[0] * group
    keys_B = row_keys(key, prompt_ids_P, group)
    end_E = jnp.asarray(end, jnp.int32)
    hidden_PD, prefix = apply(prompts_PT, valid_PT, method="prefill")
    readout_DV = apply(method="readout")

    def sample(state: _State) -> _State:
        logits_BV = constrain(apply(state.hidden_BD, readout_DV, method="logits"), "batch", "vocab")
        logp_BV = sampling_log_probs(logits_BV, sampling)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.step)
        token_B = jax.vmap(jax.random.categorical)(keys, logp_BV).astype(jnp.int32)
        logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(state.done_B, 0, token_B)
        column = jnp.arange(max_new_tokens)[None, :] == state.step
        done_B = state.done_B | jnp.any(token_B[:, None] == end_E[None, :], axis=-1)
        write = column & ~state.done_B[:, None]
        return dataclasses.replace(
            state,
            token_B=token_B,
            done_B=done_B,
            tokens_BT=jnp.where(write, token_B[:, None], state.tokens_BT),
            logp_BT=jnp.where(write, logp_B[:, None], state.logp_BT),
        )

    def body(state: _State) -> _State:
        hidden_BD, cache = apply(state.token_B, state.step, prefix, state.cache, method="decode")
        return sample(dataclasses.replace(state, step=state.step + 1, hidden_BD=hidden_BD, cache=cache))

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens - 1) & ~jnp.all(state.done_B)

    def rows(value: Any, dtype: Any, *shape: int) -> jax.Array:
        x = jnp.full((batch, *shape), value, dtype)
        return constrain(x, "batch", *(None for _ in shape))

    start = _State(
        step=jnp.int32(0),
        token_B=rows(0, jnp.int32),
        done_B=rows(False, bool),
        hidden_BD=jnp.repeat(hidden_PD, group, axis=0),
        tokens_BT=rows(0, jnp.int32, max_new_tokens),
        logp_BT=rows(0.0, jnp.float32, max_new_tokens),
        cache=apply(batch, max_new_tokens, method="empty_cache"),
    )
    final = jax.lax.while_loop(unfinished, body, sample(start))
    written_BT = jnp.arange(max_new_tokens)[None, :] <= final.step
    ended_BT = jnp.any(final.tokens_BT[:, :, None] == end_E[None, None, :], axis=-1)
    # A row is as long as the position of its end token, or as the loop ran.
    first_B = jnp.argmax(ended_BT, axis=-1).astype(jnp.int32) + 1
    ended_B = jnp.any(ended_BT & written_BT, axis=-1)
    length_B = jnp.where(ended_B, first_B, jnp.int32(max_new_tokens))
    grouped = lambda x: x.reshape((n_prompts, group) + x.shape[1:])  # noqa: E731
    return Completions(
        tokens_PGT=grouped(final.tokens_BT),
        logp_PGT=grouped(final.logp_BT),
        length_PG=grouped(length_B),
        ended_PG=grouped(final.done_B),
    )


def make_sampler(
    model: Decoder,
    name: str,
    *,
    group: int,
    max_new_tokens: int,
    end: tuple[int, ...],
    sampling: SamplingConfig,
) -> Callable[..., Completions]:
    """The jitted `decode_loop`: (params, prompts_PT, valid_PT, key, prompt_ids_P) -> Completions."""
    return program(
        name,
        functools.partial(
            decode_loop,
            model,
            group=group,
            max_new_tokens=max_new_tokens,
            end=end,
            sampling=sampling,
        ),
    )


def completion_mask(length_PG: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """1 on completion tokens, the end token included: [P, G, T] float32."""
    return (np.arange(max_new_tokens) < length_PG[..., None]).astype(np.float32)
