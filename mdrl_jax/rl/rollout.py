"""The sampler: prefills each prompt once, then decodes its group of completions until all of them have ended.

It is one compiled program from token ids to token ids. `rollouts.py` pads the prompts, runs the program, and has the
completions scored.

Long completions of all prompts may need more memory for keys and values than the devices have. Therefore the program
decodes only as many prompts at a time as it has slots; a slot holds one prompt and its group. A slot is free when its
group has ended. Once a quarter of the slots are free, the next prompts are prefilled into them. So the number of slots
determines the memory, and most slots stay busy while a long completion is being decoded. The completions of a prompt do
not depend on the slot that it gets or on the step at which it begins.

Once no prompt waits, rows that have ended are no longer computed (`compaction.py`): as soon as the rows that still run
fit into a quarter of the rows, they are moved together, and a loop over that many goes on. This changes no token. On a
mesh that splits rows over devices, rows stay where they are, and all of them are computed until the last has ended.

The recorded log-prob of a token is its log-prob under the distribution that it was drawn from, with temperature, top-k
and top-p applied. The trainer divides by it to correct for the difference between that distribution and the policy
(`truncated_importance` in `rl/grpo.py`).

The key of every draw is folded from (seed, stage, step, prompt, sample, token), so draws that differ in any of these
have keys of their own, and a resumed run draws the same completions (definitions §14). The prompt is told apart by its
domain, its split, its row, and how often it occurred before in the batch.

Letters of shapes: N prompts in all, S slots, G completions per prompt (its group), B = S * G rows that are decoded
together, T tokens, V vocabulary.
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
from mdrl_jax.model.cache import Cache, Prefix
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import constrain, divisor
from mdrl_jax.rl import compaction
from mdrl_jax.rl.sampling import SamplingConfig, draw


@struct.dataclass
class Completions:
    """G completions of each of P prompts; arrays on the devices or on the host.

    Attributes:
      tokens_PGT: token ids [P, G, T], int32, with the end token; 0 after the end.
      logp_PGT: log-prob of each token under the distribution that it was drawn from, in nats; 0 after the end.
      length_PG: number of tokens, the end token included, if there is one.
      ended_PG: True if the completion ended by an end token, False if the length limit cut it off.
    """

    tokens_PGT: Any
    logp_PGT: Any
    length_PG: Any
    ended_PG: Any


@struct.dataclass
class _State:
    """State of the decoding loop.

    Attributes:
      step: steps that the loop has made since all slots were free, a scalar.
      prompt_S: index of the prompt in each slot; a slot with N or more is empty.
      start_S: the step at which each slot's prompt began.
      token_B: the token drawn last in each row; 0 if the row had ended before.
      done_B: True if the row has drawn an end token, or if its slot is empty.
      length_B: number of tokens drawn in each row.
      hidden_BD: the hidden state that `token_B` was drawn from.
      tokens_BT: all tokens drawn [B, max_new_tokens], 0 after the end.
      logp_BT: their log-probs, 0 after the end.
      prefix: keys and values of the prompts in the slots.
      cache: keys and values of the rows. It keeps its size when fewer rows go on; they are then its first ones.
    """

    step: jax.Array
    prompt_S: jax.Array
    start_S: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    length_B: jax.Array
    hidden_BD: jax.Array
    tokens_BT: jax.Array
    logp_BT: jax.Array
    prefix: Prefix
    cache: Cache


def stage_key(seed: int, stage: str, step: int) -> jax.Array:
    """The sampling key of one step of one stage.

    It depends on the stage's name, not on its number, so adding a stage does not change the draws of other stages.

    Args:
      seed: seed of the run, -2^63 <= seed < 2^63. Only its lowest 32 bits count, unless JAX's 64-bit mode is on.
      stage: name of the stage.
      step: number of the step, from 0 and below 2^32.

    Returns:
      one typed JAX key, a scalar.

    Raises:
      OverflowError: if `step` or `seed` is outside these bounds.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return jax.random.fold_in(key, step)


def row_keys(key: jax.Array, prompt_ids_PI: jax.Array, group_size: int) -> jax.Array:
    """The keys of all completions of a batch.

    Args:
      key: from `stage_key`.
      prompt_ids_PI: the integers that tell each prompt apart [P, I], uint32 (definitions §14). They are folded into the
        key one after another, so prompts whose integers are all equal get equal keys. `Rollouts.sample` takes the three
        (domain and split, row, number of times that the prompt occurred before in the batch).
      group_size: G, completions per prompt.

    Returns:
      one typed JAX key per completion [P * G], the G keys of a prompt in succession. The key of a token is folded from
      that of its completion.
    """
    fold = jax.random.fold_in

    def of_prompt(ids_I: jax.Array) -> jax.Array:
        keyed = functools.reduce(fold, ids_I, key)
        return jax.vmap(fold, in_axes=(None, 0))(keyed, jnp.arange(group_size))

    return jax.vmap(of_prompt)(prompt_ids_PI).reshape(-1)


def decode_loop(
    model: Decoder,
    params: Any,
    prompts_NT: jax.Array,
    valid_NT: jax.Array,
    key: jax.Array,
    prompt_ids_NI: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: SamplingConfig,
    at_once: int = 0,
    compact: bool = True,
) -> Completions:
    """Samples `group_size` completions of each prompt; the module docstring explains slots, log-probs and keys.

    Free slots wait until a quarter of all slots are free, because a refill computes a prefill for every slot.

    Args:
      model: the decoder.
      params: its parameters.
      prompts_NT: token ids of the left-padded prompts.
      valid_NT: True at real tokens, False at padding.
      key: the key of the step, from `stage_key`.
      prompt_ids_NI: integers that tell each prompt apart, as in `row_keys`.
      group_size: G, completions per prompt.
      max_new_tokens: the largest number of tokens of a completion, the end token included; at least 1.
      eos_ids: ids of the tokens that end a completion; (): only the length limit ends completions.
      sampling: temperature, top-k and top-p.
      at_once: number of slots, 0 or more; 0, or more than there are prompts: one for every prompt.
      compact: whether rows that still run are moved together. This changes no token.

    Returns:
      the completions of all prompts, in the order of the prompts; P is N, and T is `max_new_tokens`.
    """
    apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
    n_prompts = prompts_NT.shape[0]
    slots = min(at_once, n_prompts) or n_prompts
    batch = slots * group_size
    keys_NG = row_keys(key, prompt_ids_NI, group_size).reshape(n_prompts, group_size)
    eos_E = jnp.asarray(eos_ids, jnp.int32)
    lm_head_DV = apply(method="lm_head")

    def by_row(x_S: jax.Array, rows: int = batch) -> jax.Array:
        return jnp.repeat(x_S, rows // x_S.shape[0], axis=0)

    def running(state: _State) -> jax.Array:
        full_B = by_row(state.step - state.start_S >= max_new_tokens - 1, state.done_B.shape[0])
        return ~(state.done_B | full_B)

    def finished(state: _State) -> jax.Array:
        return ~jnp.any(running(state).reshape(slots, group_size), axis=1)

    def uniforms(prompt_S: jax.Array) -> jax.Array:
        """The uniform numbers that the tokens of each row are drawn with [B, max_new_tokens]."""
        keys_B = keys_NG[jnp.minimum(prompt_S, n_prompts - 1)].reshape(-1)
        keys_BT = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, jnp.arange(max_new_tokens))
        return constrain(jax.vmap(jax.vmap(jax.random.uniform))(keys_BT), "batch", None)

    def sample(state: _State, uniform_BT: jax.Array) -> _State:
        logits_BV = constrain(apply(state.hidden_BD, lm_head_DV, method="logits"), "batch", "vocab")
        at_B = by_row(state.step - state.start_S, uniform_BT.shape[0])
        now_BT = jnp.arange(max_new_tokens)[None, :] == at_B[:, None]
        token_B, logp_B = draw(logits_BV, jnp.sum(jnp.where(now_BT, uniform_BT, 0.0), axis=1), sampling)
        running_B = ~state.done_B & (at_B < max_new_tokens)
        write = now_BT & running_B[:, None]
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

    def begin(step: jax.Array, prompt_S: jax.Array, uniform_BT: jax.Array, cache: Cache) -> _State:
        """Prefills a prompt into every slot and draws the first token of each row; the rows of empty slots are done."""
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
        return sample(state, uniform_BT)

    def advance(state: _State, uniform_BT: jax.Array, going: Callable[[_State], jax.Array]) -> _State:
        """Decodes as long as `going(state)` is true."""

        def body(state: _State) -> _State:
            hidden_BD, cache = apply(
                state.token_B, state.step, state.start_S, state.prefix, state.cache, method="decode"
            )
            return sample(dataclasses.replace(state, step=state.step + 1, hidden_BD=hidden_BD, cache=cache), uniform_BT)

        return jax.lax.while_loop(going, body, state)

    def finish(state: _State, uniform_BT: jax.Array, slot_B: jax.Array, sizes: list[tuple[int, int]]) -> Completions:
        """Decodes until every row has ended, and returns the completions of the rows [B, 1, ...].

        Args:
          state: the rows before the next move.
          uniform_BT: from `uniforms`, of these rows.
          slot_B: the slot that each row had before all moves, which tells the prompts apart.
          sizes: the sizes that rows are moved to, one after another, from `compaction.sizes`.
        """
        if not sizes:
            return _completions(advance(state, uniform_BT, lambda s: jnp.any(running(s))), 1)
        (n_slots, group), *smaller = sizes

        def places(state: _State) -> compaction.Places:
            return compaction.Places(running(state), slot_B, slots, group)

        state = advance(state, uniform_BT, lambda s: places(s).slots() > n_slots)
        from_R, taken_R = places(state).origins(n_slots)
        later = finish(_moved(state, from_R, taken_R, n_slots), uniform_BT[from_R], slot_B[from_R], smaller)
        moved_B, place_B = running(state), jnp.minimum(places(state).of_rows(), n_slots * group - 1)

        def joined(ended: jax.Array, later: jax.Array) -> jax.Array:
            return jnp.where(moved_B.reshape((-1,) + (1,) * (ended.ndim - 1)), later[place_B], ended)

        return jax.tree.map(joined, _completions(state, 1), later)

    def whole(state: _State, uniform_BT: jax.Array) -> Completions:
        """Decodes until every row has ended, and returns the completions of the slots."""
        sizes = [] if _rows_are_split() or not compact else compaction.sizes(slots, group_size)
        rows = finish(state, uniform_BT, by_row(jnp.arange(slots, dtype=jnp.int32)), sizes)
        return jax.tree.map(lambda x: x.reshape((slots, group_size, *x.shape[2:])), rows)

    cache = apply(batch, max_new_tokens, method="empty_cache")
    first_S = jnp.arange(slots, dtype=jnp.int32)
    uniform_BT = uniforms(first_S)
    state = begin(jnp.int32(0), first_S, uniform_BT, cache)
    if slots == n_prompts:
        return whole(state, uniform_BT)

    def refill(carry: tuple[_State, Completions]) -> tuple[_State, Completions]:
        state, results = carry
        state = advance(state, uniforms(state.prompt_S), lambda s: jnp.sum(finished(s)) < max(slots // 4, 1))
        results, free_S = _put(results, state.prompt_S, _completions(state, group_size)), finished(state)
        following_S = jnp.max(state.prompt_S) + jnp.cumsum(free_S, dtype=jnp.int32)
        prompt_S = jnp.where(free_S, following_S, n_prompts)
        # With no row left in the cache, it is filled from its start again.
        step = jnp.where(jnp.all(free_S), 0, state.step)
        fresh = begin(step, prompt_S, uniforms(prompt_S), state.cache)

        def merged(old: jax.Array, new: jax.Array) -> jax.Array:
            axis = 1 if old.ndim == 5 else 0  # keys and values are [L, S, Tp, K, h]
            fresh_X = free_S if old.shape[axis] == slots else by_row(free_S)
            return jnp.where(fresh_X.reshape((1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1)), new, old)

        both = (dataclasses.replace(s, step=None, cache=None) for s in (state, fresh))
        return jax.tree.map(merged, *both).replace(step=step, cache=state.cache), results

    def empty(x: jax.Array) -> jax.Array:
        return constrain(jnp.zeros((n_prompts, *x.shape[1:]), x.dtype), "batch", *(None for _ in x.shape[1:]))

    results = jax.tree.map(empty, jax.eval_shape(lambda s: _completions(s, group_size), state))
    pending = lambda carry: jnp.max(carry[0].prompt_S) + 1 < n_prompts  # noqa: E731
    state, results = jax.lax.while_loop(pending, refill, (state, results))
    return _put(results, state.prompt_S, whole(state, uniforms(state.prompt_S)))


def _rows_are_split() -> bool:
    mesh: Any = jax.sharding.get_abstract_mesh()
    return not mesh.empty and divisor(mesh, "batch") > 1


def _moved(state: _State, from_R: jax.Array, taken_R: jax.Array, slots: int) -> _State:
    """The state of fewer rows, in this number of slots; the other arguments are from `compaction.Places.origins`."""
    group_before = state.token_B.shape[0] // state.start_S.shape[0]
    from_S = from_R[:: from_R.shape[0] // slots] // group_before
    cache, prefix = compaction.moved(state.cache, state.prefix, from_R, from_S, jnp.any(taken_R))
    return _State(
        step=state.step,
        prompt_S=state.prompt_S[from_S],
        start_S=state.start_S[from_S],
        token_B=state.token_B[from_R],
        done_B=state.done_B[from_R] | ~taken_R,
        length_B=state.length_B[from_R],
        hidden_BD=state.hidden_BD[from_R],
        tokens_BT=state.tokens_BT[from_R],
        logp_BT=state.logp_BT[from_R],
        prefix=prefix,
        cache=cache,
    )


def _put(results: Completions, index_X: jax.Array, new: Completions) -> Completions:
    """The results with the new ones at these indices; those at indices beyond the end are dropped."""
    return jax.tree.map(lambda all_N, x_X: all_N.at[index_X].set(x_X, mode="drop"), results, new)


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
    compact: bool = True,
) -> Callable[..., Completions]:
    """`decode_loop` for one set of options as a program, which its first call compiles.

    Args:
      model: the decoder.
      name: name of the program, under which its compilations are counted.
      group_size: as in `decode_loop`.
      max_new_tokens: as in `decode_loop`.
      eos_ids: as in `decode_loop`.
      sampling: as in `decode_loop`.
      at_once: as in `decode_loop`.
      compact: as in `decode_loop`.

    Returns:
      the jitted function (params, prompts_NT, valid_NT, key, prompt_ids_NI) -> Completions.
    """
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
            compact=compact,
        ),
    )


def cache_bytes(model: Decoder, group_size: int, prompt_length: int, max_new_tokens: int) -> int:
    """Bytes that the keys and values of one prompt and its completions take, over all devices that share them.

    Args:
      model: the decoder; keys and values have its dtype.
      group_size: completions of the prompt.
      prompt_length: tokens of the padded prompt.
      max_new_tokens: tokens that each completion has room for.

    Returns:
      bytes of all layers and all key-value heads; the prompt counts once, not once for each completion.
    """
    c = model.config
    values = 2 * c.n_layers * c.n_kv_heads * c.head_dim * (prompt_length + group_size * max_new_tokens)
    return values * jnp.dtype(model.dtype).itemsize


def check_finite(done: Completions) -> None:
    """Refuses completions that were drawn from logits that are not finite, because their tokens mean nothing.

    Args:
      done: completions on the host.

    Raises:
      UserError: if the log-prob of a token is not finite.
    """
    bad = ~np.isfinite(done.logp_PGT) & (completion_mask(done.length_PG, done.logp_PGT.shape[-1]) > 0)
    if bad.any():
        raise UserError(
            f"the model's logits, divided by the temperature, are not finite at {bad.sum()} of {done.length_PG.sum()} "
            "sampled tokens; a tiny temperature must be larger, or 0; otherwise the weights are too large: take an "
            "earlier checkpoint, and train with a smaller learning rate"
        )


def completion_mask(length_PG: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """The mask of completions: 1 on their tokens, the end token included, and 0 after the end.

    Args:
      length_PG: number of tokens of each completion.
      max_new_tokens: T, the length of the mask.

    Returns:
      the mask [P, G, T], float32, on the host.
    """
    return (np.arange(max_new_tokens) < length_PG[..., None]).astype(np.float32)
