"""The losses whose damage is predicted, and their first and second derivatives along a direction (definitions §6).

The completions are given: they were sampled at the point where derivatives are taken. The file gives each objective in
up to two forms. `derivatives` computes v·∇L and vᵀ∇²L v from the (u, w) of `jets.py`, on the host. `reward_loss` and
`success_nll` are losses that JAX can differentiate, for Hessian products (`hvp.py`).

Every objective is a loss, so positive first and second orders mean that the direction v harms the domain. With
U = Σ_t u_t and W = Σ_t w_t over a completion, and A = reward − mean reward of the prompt's other completions:

| objective | first order | second order | mean over | meaning |
|---|---|---|---|---|
| reward | −mean A·U | −mean A·(U² + W) | completions | −J with its true Hessian (DiCE, arXiv 1802.05098) |
| surrogate | −mean A·U | −mean A·W | completions | right gradient, wrong Hessian; for comparison |
| grpo | −mean A'·u_t | −mean A'·(u_t² + w_t) | trained tokens, as the trainer | its loss at ratio 1, unclipped, no KL |
| success_nll | −mean U | −mean W | successes | −log π of completions that succeeded |
| kl | 0 | mean Σ_t u_t² | completions | KL to the policy at the point, in its Fisher form |

A' is the trainer's own advantage, and the mean of `grpo` is the trainer's own (`token_weights`). The second order is
vᵀ∇²L v, without the ½ of the Taylor expansion.

The Hessian of −J has the term U² because J is a mean over samples whose distribution depends on θ:
∇²J = E[A (∇log π ∇log πᵀ + ∇²log π)]. Differentiating the surrogate −A·log π of fixed samples loses it.

Each value is Σ numerator / Σ denominator over prompts. Both are kept by prompt, so that intervals can resample whole
prompts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.lax import stop_gradient

from mdrl_jax.second_order.decoder_parts import DecoderParts, log_probs

SUCCESS = 1.0 - 1e-6  # a completion succeeds if its reward is at least this: the full reward, up to rounding


@struct.dataclass
class CompletionBatch:
    """Completions as rows.

    Attributes:
      tokens_BT: left-padded prompts, each followed by a completion of padded length Tc.
      valid_BT: True at real tokens, False at padding.
      mask_BT: 1 on completion tokens [B, Tc].
      adv_B: A, from `leave_one_out`, or other advantages that take its place.
      success_B: 1 where the completion succeeds, otherwise 0.
      weight_B: 0 on rows that only fill up the batch, otherwise 1.
      group: number of rows in succession that have the same prompt; it divides B. 1 says nothing about the order.
    """

    tokens_BT: Any
    valid_BT: Any
    mask_BT: Any
    adv_B: Any
    success_B: Any
    weight_B: Any
    group: int = struct.field(pytree_node=False, default=1)


def leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    """The advantage A = reward − mean reward of the prompt's other completions (definitions §6).

    It is never divided by a standard deviation, and it is exactly 0 if all rewards of the prompt are equal. The
    baseline leaves out the completion's own reward, so it does not depend on the completion and adds no bias.

    Args:
      rewards_PG: rewards of the G completions of each of P prompts, floats. They are not changed.

    Returns:
      A [P, G], in rewards. A NaN among the rewards of a prompt makes A NaN for all its completions.

    Raises:
      ValueError: if there are fewer than two completions a prompt.
    """
    group = rewards_PG.shape[1]
    if group < 2:
        raise ValueError(f"a group has {group} completion; allowed: 2 or more")
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred_PG[np.ptp(rewards_PG, axis=1) == 0] = 0.0
    return centred_PG * (group / (group - 1))


@dataclasses.dataclass(frozen=True)
class Forward:
    """Computes the log-probs of a `CompletionBatch`.

    Attributes:
      parts: the pieces of the decoder, which decide what the point is.
      temperature: the sampling temperature, at which the policy is taken (definitions §1).
      chunk: number of positions whose logits are computed at a time; 0: all positions at once.
      share: whether the rows of a group share the computation of their prompt, as many as one device has. Rows that
        were taken out of their order must not.
      devices: number of devices that the rows are split over.
    """

    parts: DecoderParts
    temperature: float
    chunk: int = 0
    share: bool = False
    devices: int = 1

    def shared(self, rows: CompletionBatch) -> int:
        """Number of rows that share one computation of their prompt."""
        return math.gcd(rows.group, len(rows.tokens_BT) // self.devices) if self.share else 1

    def __call__(self, point: Any, rows: CompletionBatch, fixed: Any) -> jax.Array:
        """The log-probs of completion tokens.

        Args:
          point: what derivatives may be taken with respect to.
          rows: the completions.
          fixed: what is constant.

        Returns:
          log π in nats [B, Tc]; 0 on padding.
        """
        start = rows.tokens_BT.shape[1] - rows.mask_BT.shape[1]
        logp_BT = log_probs(
            self.parts, point, fixed, rows.tokens_BT, rows.valid_BT,
            start=start, temperature=self.temperature, chunk=self.chunk, group=self.shared(rows),
        )  # fmt: skip
        return jnp.where(rows.mask_BT > 0, logp_BT, 0.0)


Loss = Callable[..., tuple[jax.Array, jax.Array]]


def reward_loss(forward: Forward) -> Loss:
    """The loss −A·π_θ(y)/sg(π_θ(y)) of whole completions y, where sg stops the gradient; its Hessian is that of −J.

    The ratio has the value 1, the gradient ∇log π and the Hessian ∇log π ∇log πᵀ + ∇²log π (DiCE, arXiv 1802.05098).

    Args:
      forward: computes the log-probs.

    Returns:
      the loss (point, rows, fixed) -> (sum over rows, number of rows), both weighted by `weight_B`; A is `adv_B`.
    """

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        ratio_B = jnp.exp(logp_B - stop_gradient(logp_B))
        return -jnp.sum(rows.weight_B * rows.adv_B * ratio_B), jnp.sum(rows.weight_B)

    return loss


def success_nll(forward: Forward) -> Loss:
    """The loss −log π(y) of completions y that succeeded, in nats a completion.

    Args:
      forward: computes the log-probs.

    Returns:
      the loss (point, rows, fixed) -> (sum over successes, number of successes), both weighted by `weight_B`. A success
      is a row with `success_B` 1. Without any, both are 0.
    """

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        weight_B = rows.weight_B * rows.success_B
        return -jnp.sum(weight_B * logp_B), jnp.sum(weight_B)

    return loss


def both_losses(forward: Forward) -> Loss:
    """The sums of `reward_loss` and `success_nll` added, with a count of 1.

    One compiled program serves both objectives: rows with `success_B` 0 leave out the second, and rows with `adv_B` 0
    leave out the first. The caller divides by the count of the objective that it wants.

    Args:
      forward: computes the log-probs.

    Returns:
      the loss (point, rows, fixed) -> (sum over rows, weighted by `weight_B`; 1).
    """

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        ratio_B = jnp.exp(logp_B - stop_gradient(logp_B))
        return -jnp.sum(rows.weight_B * (rows.adv_B * ratio_B + rows.success_B * logp_B)), jnp.float32(1)

    return loss


@dataclasses.dataclass(frozen=True)
class DirectionalDerivatives:
    """An objective's first and second derivative along one direction, kept as sums by prompt.

    Attributes:
      first_P: the numerators of v·∇L.
      second_P: the numerators of vᵀ∇²L v.
      count_P: the denominators of both: completions, successes, or what the trainer counts (`token_weights`), of the
        prompt.
    """

    first_P: np.ndarray
    second_P: np.ndarray
    count_P: np.ndarray

    @property
    def first(self) -> float:
        """v·∇L = Σ first_P / Σ count_P, in the unit of the loss; NaN if the count is 0."""
        return float(self.first_P.sum() / self.count_P.sum())

    @property
    def second(self) -> float:
        """vᵀ∇²L v = Σ second_P / Σ count_P, without the ½, in the unit of the loss; NaN if the count is 0."""
        return float(self.second_P.sum() / self.count_P.sum())


def token_weights(mask_PGT: np.ndarray, how: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each token in the trainer's mean over tokens, and the count that it divides by.

    The mean of a value x of each token, as `rl.grpo.aggregate` takes it, is Σ weight·x / Σ count. Tokens that are not
    trained have the weight 0.

    Args:
      mask_PGT: above 0 on the tokens that the trainer trains.
      how: `train.grpo.aggregation`: "token", "sequence" or "constant".
      max_length: the longest completion allowed, in tokens; only "constant" reads it.

    Returns:
      the weights [P, G, T] and the count of each prompt [P], both float64. The weight of a trained token is 1, or for
      "sequence" 1 / the number of trained tokens of its completion. The count is that of the prompt's trained tokens
      ("token"), that of its completions with a trained token ("sequence"), or this times `max_length` ("constant").

    Raises:
      KeyError: if `how` is unknown.
    """
    keep_PGT = (mask_PGT > 0).astype(np.float64)
    length_PG = keep_PGT.sum(-1)
    some_P = (length_PG > 0).sum(1, dtype=np.float64)
    count_P = {"token": length_PG.sum(1), "sequence": some_P, "constant": some_P * max_length}[how]
    return keep_PGT / np.maximum(length_PG, 1.0)[:, :, None] if how == "sequence" else keep_PGT, count_P


def derivatives(
    u_PGT: np.ndarray, w_PGT: np.ndarray, mask_PGT: np.ndarray, adv_PG: np.ndarray, success_PG: np.ndarray,
    trained_PG: np.ndarray, weight_PGT: np.ndarray, count_P: np.ndarray,
) -> Mapping[str, DirectionalDerivatives]:  # fmt: skip
    """Computes the first and second orders of every objective in the table of this module.

    Args:
      u_PGT: u of every completion token, from `jets`.
      w_PGT: w of every completion token, from `jets`.
      mask_PGT: 1 on completion tokens, 0 on padding, where u and w are not used.
      adv_PG: A, from `leave_one_out`.
      success_PG: 1 where the completion succeeds, otherwise 0.
      trained_PG: A', the trainer's advantages.
      weight_PGT: weight of each token in the trainer's mean, from `token_weights`.
      count_P: the count that belongs to it, from `token_weights`.

    Returns:
      name of the objective ("reward", "surrogate", "grpo", "success_nll" or "kl") -> its derivatives by prompt, [P]
      each: the numerators `first_P` and `second_P`, and `count_P`, the denominator of both.
    """
    u, w = (np.where(mask_PGT > 0, x, 0.0).astype(np.float64) for x in (u_PGT, w_PGT))
    u_PG, w_PG = u.sum(-1), w.sum(-1)
    ones_P = np.full(u_PG.shape[0], float(u_PG.shape[1]))
    weighted = weight_PGT * trained_PG[:, :, None]
    zeros_P = np.zeros_like(ones_P)
    return {
        "reward": DirectionalDerivatives(-(adv_PG * u_PG).sum(1), -(adv_PG * (u_PG**2 + w_PG)).sum(1), ones_P),
        "surrogate": DirectionalDerivatives(-(adv_PG * u_PG).sum(1), -(adv_PG * w_PG).sum(1), ones_P),
        "grpo": DirectionalDerivatives(-(weighted * u).sum((1, 2)), -(weighted * (u**2 + w)).sum((1, 2)), count_P),
        "success_nll": DirectionalDerivatives(
            -(success_PG * u_PG).sum(1), -(success_PG * w_PG).sum(1), success_PG.sum(1)
        ),
        "kl": DirectionalDerivatives(zeros_P, (u**2).sum((1, 2)), ones_P),
    }
