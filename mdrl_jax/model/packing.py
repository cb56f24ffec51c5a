"""Packed rows: completions of one prompt that share the computation of this prompt."""

import dataclasses

import jax
import jax.numpy as jnp

from mdrl_jax.model.attention import Attend, Attention
from mdrl_jax.model.rope import positions_of


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Rows of a left-padded prompt and a completion; several in succession share the computation of their prompt.

    The layers then run packed rows: each holds a prompt and, one after the other, the completions of `group` rows. A
    completion attends to the prompt and to itself, as if the packed row held no other completion. With a group of 1 a
    packed row is a row as it is. Letters of shapes: R = B / G packed rows of S = Tp + G · Tc tokens, with G = `group`
    and Tp = `start`.

    Attributes:
      valid_BT: True at real tokens, False at padding [B, Tp + Tc].
      start: length of the padded prompts, at least 1: nothing predicts the first token of a row.
      group: number of rows in succession that have the same prompt; it divides B.

    Raises:
      ValueError: if `start` is below 1, or `group` does not divide B.
    """

    valid_BT: jax.Array
    start: int
    group: int = 1

    def __post_init__(self) -> None:
        rows = self.valid_BT.shape[0]
        if self.start < 1:
            raise ValueError(f"start is {self.start}; allowed: 1 or more, because nothing predicts a row's first token")
        if rows % self.group:
            raise ValueError(f"{rows} rows cannot be divided into groups of {self.group} with the same prompt")

    @property
    def own(self) -> int:
        """How many tokens of a packed row belong to completions, G · Tc."""
        return self.group * (self.valid_BT.shape[1] - self.start)

    def pack(self, tokens_BT: jax.Array) -> jax.Array:
        """The packed rows of token ids [R, S]."""
        if self.group == 1:
            return tokens_BT
        shared_RT, own_BT = tokens_BT[:: self.group, : self.start], tokens_BT[:, self.start :]
        return jnp.concatenate([shared_RT, own_BT.reshape(shared_RT.shape[0], -1)], axis=1)

    def positions(self) -> jax.Array:
        """Position of each token of the packed rows in its own sequence [R, S], int32."""
        if self.group == 1:
            return positions_of(self.valid_BT)
        valid_RT = self.valid_BT[:: self.group, : self.start]
        own_T = jnp.arange(self.valid_BT.shape[1] - self.start, dtype=jnp.int32)
        own_RT = jnp.sum(valid_RT, axis=1, keepdims=True, dtype=jnp.int32) + own_T[None]
        return jnp.concatenate([positions_of(valid_RT), jnp.tile(own_RT, (1, self.group))], axis=1)

    def attend(self, attention: Attention) -> Attend:
        """Attention in packed rows.

        Args:
          attention: attention of whole sequences.

        Returns:
          an `Attend`: (q [R, Q, H, h], k [R, S, K, h], v [R, S, K, h]) -> (output [R, Q, H, h], None). The queries may
          lack the first tokens of the prompts, Q <= S. It raises what `attention` raises.
        """
        if self.group == 1:
            return attention(self.valid_BT)
        rows, start = self.valid_BT.shape[0], self.start
        valid_RT = self.valid_BT[:: self.group, :start]
        whole_BT = jnp.concatenate([self.valid_BT[:, :start], jnp.ones_like(self.valid_BT[:, start:])], axis=1)

        def split(x_RSHh: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Prompts [R, Tp, H, h], or their last tokens, and completions [B, Tc, H, h]."""
            of_prompt = x_RSHh.shape[1] - self.own
            own = x_RSHh[:, of_prompt:]
            return x_RSHh[:, :of_prompt], own.reshape((rows, -1) + own.shape[2:])

        def attend(q_RQHh: jax.Array, k_RSKh: jax.Array, v_RSKh: jax.Array):
            (q, own_q), (k, own_k), (v, own_v) = map(split, (q_RQHh, k_RSKh, v_RSKh))
            both = [jnp.concatenate([jnp.repeat(x, self.group, axis=0), own], 1) for x, own in ((k, own_k), (v, own_v))]
            out, _ = attention(valid_RT)(q, k, v)
            own_out, _ = attention(whole_BT)(own_q, *both)
            own_out = own_out.reshape((out.shape[0], -1) + out.shape[2:])
            return jnp.concatenate([out, own_out], axis=1), None

        return attend

    def predicting(self, x_RQD: jax.Array) -> jax.Array:
        """The hidden states that the tokens of completions are predicted from [B, Tc, D].

        The first is that of the prompt's last token, the others are those of the completion's tokens but the last.

        Args:
          x_RQD: hidden states of the packed rows. They may lack the first tokens of the prompts, but not the last one.
        """
        of_prompt = x_RQD.shape[1] - self.own
        if self.group == 1:
            return x_RQD[:, of_prompt - 1 : -1]
        rows, width = self.valid_BT.shape[0], x_RQD.shape[-1]
        own_BTD = x_RQD[:, of_prompt:].reshape(rows, -1, width)[:, :-1]
        last_B1D = jnp.repeat(x_RQD[:, of_prompt - 1 : of_prompt], self.group, axis=0)
        return jnp.concatenate([last_B1D, own_BTD], axis=1)
