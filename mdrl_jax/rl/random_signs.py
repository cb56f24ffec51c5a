"""The edit that a stage would have made if every entry of every update had a random sign (definitions §3, C1).

Adam moves almost every entry by about one learning rate a step, whatever the gradient is. An edit is therefore sparse
by itself if the signs of an entry's updates cancel. This null keeps the size of every entry of every update and draws
its sign anew. A difference between the real edit and the null therefore comes from the signs of the updates.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdrl_jax import tree
from mdrl_jax.parallel import hashing


class SignedSum(NamedTuple):
    """The state of `random_signs`.

    Attributes:
      count: number of updates so far, an int32 scalar.
      total: Σ learning rate · s ∘ update, a tree like the parameters; each sign s is +1 or −1.
    """

    count: Any
    total: Any


def random_signs(seed: int) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that returns updates as they are and adds learning rate · s ∘ update to a sum.

    Each sign s is +1 or −1 with probability ½. It is a function of the seed, the number of the update and the position
    of the entry, so a resumed stage continues the same sum. The sum is in the transformation's state, a `SignedSum`. It
    is saved and sharded like Adam's moments and takes as much memory as the parameters. The transformation must be the
    last of the chain, so that its updates are those that the parameters get.

    Args:
      seed: an integer, from which the signs are drawn.

    Returns:
      the transformation. Its `update` needs the extra argument `learning_rate`, a scalar, and raises TypeError without
      it; other extra arguments are ignored.
    """

    def init(params: Any) -> SignedSum:
        return SignedSum(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: SignedSum, params: Any = None, *, learning_rate: Any, **_: Any
    ) -> tuple[Any, SignedSum]:
        words = hashing.words(jax.random.fold_in(jax.random.key(seed), state.count))
        high = np.uint32(1 << (hashing.KEY_BITS - 1))
        signed = jax.tree.map(
            lambda u, bits, t: t + learning_rate * jnp.where(bits >= high, u, -u),
            updates,
            hashing.position_bits(updates, words),
            state.total,
        )
        return updates, SignedSum(state.count + 1, signed)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def signed_edit(opt_state: Any) -> Any:
    """The sum of `random_signs` in the state of a stage's optimizer: an edit δ, a tree like the parameters.

    Raises:
      StopIteration: if the optimizer has no `random_signs`.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SignedSum))
    return next(x for x in leaves if isinstance(x, SignedSum)).total


def moved(params: Any, opt_state: Any) -> Any:
    """The parameters that a stage would have ended with if its updates had random signs: `params` + `signed_edit`.

    Args:
      params: parameters at the stage's start.
      opt_state: state of the optimizer at the stage's end.

    Raises:
      StopIteration: as in `signed_edit`.
    """
    return tree.add(params, signed_edit(opt_state))
