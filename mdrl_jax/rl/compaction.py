"""Gathers the rows of the sampler that still run, so that a step does not compute rows that have ended.

`rollout.py` decodes rows in slots. At first a slot holds a prompt and its whole group. Here each row gets a place in
fewer or smaller slots. A slot still holds rows of one prompt only, which share the prompt's keys and values, but two
slots may hold rows of the same prompt.

Letters of shapes: B rows before the move, R rows after it, S slots after it, P prompts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mdrl_jax.model.cache import Cache, Prefix

MOST = 2  # sizes; each has a decoding loop of its own, which takes seconds to compile
LEAST_ROWS = 8  # a step with fewer rows costs nearly the same, because it mostly reads the weights


def sizes(slots: int, group: int) -> list[tuple[int, int]]:
    """The sizes that rows are moved to one after another, each with about a quarter of the rows of the one before.

    Args:
      slots: number of slots at first.
      group: rows of a slot at first.

    Returns:
      (slots, rows of a slot) of each size, at most `MOST`, none with fewer than `LEAST_ROWS` rows. The number of slots
      never grows, because a slot has keys and values of a prompt.
    """
    found: list[tuple[int, int]] = []
    while len(found) < MOST:
        rows, group = -(-slots * group // 4), -(-group // 4)
        slots = -(-rows // group)
        if slots * group < LEAST_ROWS:
            break
        found.append((slots, group))
    return found


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of rows in slots of a given size.

    Attributes:
      wanted_B: True at the rows that need a place.
      prompt_B: index of the prompt of each row, from 0 to P - 1. Among the rows that need a place it must not fall from
        row to row; their places keep this order.
      prompts: P.
      group: rows of a slot.
    """

    wanted_B: jax.Array
    prompt_B: jax.Array
    prompts: int
    group: int

    @functools.cached_property
    def _rows_P(self) -> jax.Array:
        own_BP = self.prompt_B[:, None] == jnp.arange(self.prompts, dtype=jnp.int32)[None, :]
        return jnp.sum(own_BP & self.wanted_B[:, None], axis=0, dtype=jnp.int32)

    @functools.cached_property
    def _slots_P(self) -> jax.Array:
        return -(-self._rows_P // self.group)

    def slots(self) -> jax.Array:
        """Number of slots that the rows need, an int32 scalar."""
        return jnp.sum(self._slots_P)

    def of_rows(self) -> jax.Array:
        """The place of each row that needs one [B], int32; places are counted from 0, slot after slot."""
        # The n-th wanted row of all has this place, plus the places that stay empty in the slots of earlier prompts.
        n_B = jnp.cumsum(self.wanted_B, dtype=jnp.int32) - 1
        empty_P = self._slots_P * self.group - self._rows_P
        earlier_BP = jnp.arange(self.prompts, dtype=jnp.int32)[None, :] < self.prompt_B[:, None]
        return n_B + jnp.sum(jnp.where(earlier_BP, empty_P[None, :], 0), axis=1)

    def origins(self, slots: int) -> tuple[jax.Array, jax.Array]:
        """Which row gets each place.

        Args:
          slots: S, at least `self.slots()`.

        Returns:
          (index of the row [R], int32; True at places that a row gets [R]), with R = S * group. At the other places the
          index is 0.
        """
        places_R = jnp.arange(slots * self.group, dtype=jnp.int32)
        gets_RB = (self.of_rows()[None, :] == places_R[:, None]) & self.wanted_B[None, :]
        rows_B = jnp.arange(self.wanted_B.shape[0], dtype=jnp.int32)
        return jnp.sum(jnp.where(gets_RB, rows_B[None, :], 0), axis=1), jnp.any(gets_RB, axis=1)


def moved(
    cache: Cache, prefix: Prefix, from_R: jax.Array, from_S: jax.Array, wanted: jax.Array
) -> tuple[Cache, Prefix]:
    """Keys and values in their new places; one layer is moved after the other, so only one is held twice.

    Args:
      cache: keys and values of the rows. It keeps its size, and the new rows become its first ones.
      prefix: keys and values of the prompts in the slots.
      from_R: index of the row that moves to each place.
      from_S: index of the slot whose prompt moves to each slot.
      wanted: False if the result is not used; then nothing is moved.

    Returns:
      the cache, and the prefix of the new slots.
    """

    def of_layer(layer: jax.Array, stacks: list[jax.Array]) -> list[jax.Array]:
        def taken(x_LXTKh: jax.Array, from_Y: jax.Array) -> jax.Array:
            new_YTKh = jax.lax.dynamic_index_in_dim(x_LXTKh, layer, keepdims=False)[from_Y]
            return jax.lax.dynamic_update_slice(x_LXTKh, new_YTKh[None], (layer, 0, 0, 0, 0))

        return [taken(x, by) for x, by in zip(stacks, (from_R, from_R, from_S, from_S), strict=True)]

    stacks = [cache.k_LBTKh, cache.v_LBTKh, prefix.k_LPTKh, prefix.v_LPTKh]
    k, v, prefix_k, prefix_v = jax.lax.fori_loop(0, jnp.where(wanted, stacks[0].shape[0], 0), of_layer, stacks)
    slots = from_S.shape[0]
    return Cache(k, v), Prefix(prefix_k[:, :slots], prefix_v[:, :slots], prefix.valid_PT[from_S])
