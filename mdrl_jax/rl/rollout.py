"""Sampling completions: prefill each prompt once, then decode its group until every row has ended.

Keys and values of long completions do not fit a device for all prompts at once. So some prompts have a slot each, and
when a prompt's group has ended, the next one takes its place in the same program: memory is that of the slots, and no
slot waits for the longest completion of all. What is drawn for a prompt does not depend on it.

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
from mdrl_jax.model.transformer import NEGATIVE, Cache, Decoder, Prefix
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import constrain
from mdrl_jax.section import section


@section
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
    """S slots of G rows each, B = S * G: which prompt is in a slot, at which step it began, and what it has so far."""

    step: jax.Array
    prompt_S: jax.Array  # N or more: none
    start_S: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    length_B: jax.Array
    hidden_BD: jax.Array
    tokens_BT: jax.Array
    logp_BT: jax.Array
    prefix: Prefix
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


def row_keys(key: jax.Array, prompt_ids_P: jax.Array, group_size: int) -> jax.Array:
    """Keys [P * group_size] by prompt and sample."""
    fold = jax.random.fold_in
    keys_P = jax.vmap(fold, in_axes=(None, 0))(key, prompt_ids_P)
    keys_PG = jax.vmap(jax.vmap(fold, in_axes=(None, 0)), in_axes=(0, None))(keys_P, jnp.arange(group_size))
    return keys_PG.reshape(-1)


def decode_loop(
    model: Decoder,
    params: Any,
    prompts_NT: jax.Array,
    valid_NT: jax.Array,
    key: jax.Array,
    prompt_ids_N: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: SamplingConfig,
    at_once: int = 0,
) -> Completions:
    """Samples `group_size` completions of each left-padded prompt; see the module for keys and log-probs.

    `at_once` prompts have a slot (0: all); free slots are filled when a quarter of them is free, as filling computes
    a prefill of all.
    """
    apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
    n_prompts = prompts_NT.shape[0]
    slots = min(at_once, n_prompts) or n_prompts
    batch = slots * group_size
    keys_NG = row_keys(key, prompt_ids_N, group_size).reshape(n_prompts, group_size)
    eos_E = jnp.asarray(eos_ids, jnp.int32)
    lm_head_DV = apply(method="lm_head")

    def by_row(x_S: jax.Array) -> jax.Array:
        return jnp.repeat(x_S, group_size, axis=0)

    def finished(state: _State) -> jax.Array:
        full_B = by_row(state.step - state.start_S >= max_new_tokens - 1)
        return jnp.all((state.done_B | full_B).reshape(slots, group_size), axis=1)

    def sample(state: _State, keys_B: jax.Array) -> _State:
        logits_BV = constrain(apply(state.hidden_BD, lm_head_DV, method="logits"), "batch", "vocab")
        logp_BV = sampling_log_probs(logits_BV, sampling)
        at_B = by_row(state.step - state.start_S)
        keys = jax.vmap(jax.random.fold_in)(keys_B, at_B)
        token_B = jax.vmap(jax.random.categorical)(keys, logp_BV).astype(jnp.int32)
        logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        running_B = ~state.done_B & (at_B < max_new_tokens)
        write = (jnp.arange(max_new_tokens)[None, :] == at_B[:, None]) & running_B[:, None]
        token_B = jnp.where(running_B, token_B, 0)
        ends_B = running_B & jnp.any(token_B[:, None] == eos_E[None, :], axis=-1)
        return dataclasses.replace(
            state,
            token_B=token_B,
            done_B=state.done_B | ends_B,
            length_B=jnp.where(running_B, at_B + 1, state.length_B),
            tokens_BT=jnp.where(write, token_B[:, None], state.tokens_BT),
            logp_BT=jnp.where(write, logp_B[:, None], state.logp_BT),
        )

    def keys_of(prompt_S: jax.Array) -> jax.Array:
        return keys_NG[jnp.minimum(prompt_S, n_prompts - 1)].reshape(-1)

    def begin(step: jax.Array, prompt_S: jax.Array, cache: Cache) -> _State:
        """Prefills a prompt into every slot and draws its first tokens; slots without a prompt are done."""
        at_S = jnp.minimum(prompt_S, n_prompts - 1)
        chosen_ST, valid_ST = (constrain(x[at_S], "batch", None) for x in (prompts_NT, valid_NT))
        hidden_SD, prefix = apply(chosen_ST, valid_ST, method="prefill")

        def rows(value: Any, dtype: Any, *shape: int) -> jax.Array:
            x = jnp.full((batch, *shape), value, dtype)
            return constrain(x, "batch", *(None for _ in shape))

        state = _State(
            step=step,
            prompt_S=prompt_S,
            start_S=jnp.full_like(prompt_S, step),
            token_B=rows(0, jnp.int32),
            done_B=by_row(prompt_S >= n_prompts),
            length_B=rows(0, jnp.int32),
            hidden_BD=by_row(hidden_SD),
            tokens_BT=rows(0, jnp.int32, max_new_tokens),
            logp_BT=rows(0.0, jnp.float32, max_new_tokens),
            prefix=prefix,
            cache=cache,
        )
        return sample(state, keys_of(prompt_S))

    def advance(state: _State, enough: int | jax.Array) -> _State:
        """Decodes until `enough` slots have finished."""
        keys_B = keys_of(state.prompt_S)

        def body(state: _State) -> _State:
            hidden_BD, cache = apply(
                state.token_B, state.step, state.start_S, state.prefix, state.cache, method="decode"
            )
            return sample(dataclasses.replace(state, step=state.step + 1, hidden_BD=hidden_BD, cache=cache), keys_B)

        return jax.lax.while_loop(lambda s: jnp.sum(finished(s)) < enough, body, state)

    cache = apply(batch, max_new_tokens, method="empty_cache")
    state = begin(jnp.int32(0), jnp.arange(slots, dtype=jnp.int32), cache)
    if slots == n_prompts:
        return _completions(advance(state, slots), group_size)

    def kept(results: Completions, state: _State) -> Completions:
        put = lambda all_N, x_S: all_N.at[state.prompt_S].set(x_S, mode="drop")  # noqa: E731
        return jax.tree.map(put, results, _completions(state, group_size))

    def refill(carry: tuple[_State, Completions]) -> tuple[_State, Completions]:
        state, results = carry
        state = advance(state, max(slots // 4, 1))
        results, free_S = kept(results, state), finished(state)
        following_S = jnp.max(state.prompt_S) + jnp.cumsum(free_S, dtype=jnp.int32)
        fresh = begin(state.step, jnp.where(free_S, following_S, n_prompts), state.cache)

        def merged(old: jax.Array, new: jax.Array) -> jax.Array:
            axis = 1 if old.ndim == 5 else 0  # keys and values have their layers first
            fresh_X = free_S if old.shape[axis] == slots else by_row(free_S)
            return jnp.where(fresh_X.reshape((1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1)), new, old)

        both = (dataclasses.replace(s, step=None, cache=None) for s in (state, fresh))
        return jax.tree.map(merged, *both).replace(step=state.step, cache=state.cache), results

    def empty(x: jax.Array) -> jax.Array:
        return constrain(jnp.zeros((n_prompts, *x.shape[1:]), x.dtype), "batch", *(None for _ in x.shape[1:]))

    results = jax.tree.map(empty, jax.eval_shape(lambda s: _completions(s, group_size), state))
    pending = lambda carry: jnp.max(carry[0].prompt_S) + 1 < n_prompts  # noqa: E731
    state, results = jax.lax.while_loop(pending, refill, (state, results))
    return kept(results, advance(state, slots))


def _completions(state: _State, group_size: int) -> Completions:
    grouped = lambda x: x.reshape((-1, group_size) + x.shape[1:])  # noqa: E731
    return Completions(
        tokens_PGT=grouped(state.tokens_BT),
        logp_PGT=grouped(state.logp_BT),
        length_PG=grouped(state.length_B),
        ended_PG=grouped(state.done_B),
    )


def make_sampler(
    model: Decoder,
    name: str,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: SamplingConfig,
    at_once: int = 0,
) -> Callable[..., Completions]:
    """The jitted `decode_loop`: (params, prompts_NT, valid_NT, key, prompt_ids_N) -> Completions."""
    return program(
        name,
        functools.partial(
            decode_loop,
            model,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            sampling=sampling,
            at_once=at_once,
        ),
    )


def cache_bytes(model: Decoder, group_size: int, prompt_length: int, max_new_tokens: int) -> int:
    """Bytes that keys and values of one prompt and its completions take."""
    c = model.config
    values = 2 * c.n_layers * c.n_kv_heads * c.head_dim * (prompt_length + group_size * max_new_tokens)
    return values * jnp.dtype(model.dtype).itemsize


def completion_mask(length_PG: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """1 on completion tokens, the end token included: [P, G, T] float32."""
    return (np.arange(max_new_tokens) < length_PG[..., None]).astype(np.float32)
