"""Losses of completions fixed in advance, and their first and second derivatives from (u, w) (definitions §6).

Every quantity is a loss: positive first and second orders say that a direction harms the domain. U = Σ_t u_t and
W = Σ_t w_t over a completion; A = reward − mean reward of the other completions of its prompt.

| objective | first order | second order |
|---|---|---|
| reward | −mean A·U | −mean A·(U² + W): the Hessian of −J (DiCE, arXiv 1802.05098) |
| surrogate | −mean A·U | −mean A·W: the same gradient, the wrong Hessian; for comparison |
| grpo | −mean Σ A u_t | −mean Σ A (u_t² + w_t): the token-ratio loss of the trainer, at ratio 1, unclipped, no KL |
| success_nll | −mean U | −mean W over completions that succeeded |
| kl | 0 | mean Σ_t u_t²: KL to the point of the expansion (Fisher) |

`second` is vᵀ∇²L v without the ½. Each figure is a ratio Σ numerator / Σ denominator over prompts, so that the prompt
stays the unit of every interval.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.lax import stop_gradient

from mdrl_jax.second_order.decoder_parts import DecoderParts, log_probs

SUCCESS = 1.0 - 1e-6  # a completion succeeds when its reward is the full one


@struct.dataclass
class CompletionBatch:
    """Completions as rows [B, ...], the G of each prompt in a row.

    Attributes:
      tokens_BT, valid_BT: left-padded prompts with their completions.
      mask_BT: 1 on completion tokens [B, Tc].
      adv_B: reward minus the mean reward of the prompt's other completions, never divided by a std.
      success_B: 1 where the reward is the full one.
      weight_B: 0 on rows that only fill a batch up, else 1.
    """

    tokens_BT: Any
    valid_BT: Any
    mask_BT: Any
    adv_B: Any
    success_B: Any
    weight_B: Any


def leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    """A = r − mean of the other rewards of the prompt (definitions §6); exactly 0 where all of them are equal.

    Raises:
      ValueError: for fewer than two completions a prompt.
    """
    group = rewards_PG.shape[1]
    if group < 2:
        raise ValueError(f"a group has {group} completion; allowed: 2 or more")
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred_PG[np.ptp(rewards_PG, axis=1) == 0] = 0.0
    return centred_PG * (group / (group - 1))


@dataclasses.dataclass(frozen=True)
class Forward:
    """How log-probs of a `CompletionBatch` are taken: at the sampling temperature, `chunk` positions at a time."""

    stack: DecoderParts
    temperature: float
    chunk: int = 0

    def __call__(self, point: Any, rows: CompletionBatch, fixed: Any) -> jax.Array:
        """log π of completion tokens [B, Tc], 0 on padding."""
        start = rows.tokens_BT.shape[1] - rows.mask_BT.shape[1]
        logp_BT = log_probs(
            self.stack, point, fixed, rows.tokens_BT, rows.valid_BT,
            start=start, temperature=self.temperature, chunk=self.chunk,
        )  # fmt: skip
        return jnp.where(rows.mask_BT > 0, logp_BT, 0.0)


Loss = Callable[..., tuple[jax.Array, jax.Array]]


def reward_loss(forward: Forward) -> Loss:
    """−A π_θ(y)/π_sg(y) of a whole completion, as (sum, count): its Hessian is the right one of −J."""

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        ratio_B = jnp.exp(logp_B - stop_gradient(logp_B))
        return -jnp.sum(rows.weight_B * rows.adv_B * ratio_B), jnp.sum(rows.weight_B)

    return loss


def success_nll(forward: Forward) -> Loss:
    """−log π of completions that succeeded, as (sum, count), in nats a completion."""

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        weight_B = rows.weight_B * rows.success_B
        return -jnp.sum(weight_B * logp_B), jnp.sum(weight_B)

    return loss


def both_losses(forward: Forward) -> Loss:
    """The sum of both over completions, with a count of 1: one program for rows in which either part is left out."""

    def loss(point: Any, rows: CompletionBatch, fixed: Any) -> tuple[jax.Array, jax.Array]:
        logp_B = jnp.sum(forward(point, rows, fixed), axis=1)
        ratio_B = jnp.exp(logp_B - stop_gradient(logp_B))
        return -jnp.sum(rows.weight_B * (rows.adv_B * ratio_B + rows.success_B * logp_B)), jnp.float32(1)

    return loss


LOSSES: dict[str, Callable[[Forward], Loss]] = {"reward": reward_loss, "success_nll": success_nll}


@dataclasses.dataclass(frozen=True)
class DirectionalDerivatives:
    """Per-prompt parts of an objective's derivatives along one direction: values are Σ first / Σ count and so on."""

    first_P: np.ndarray
    second_P: np.ndarray
    count_P: np.ndarray

    @property
    def first(self) -> float:
        """v·∇L."""
        return float(self.first_P.sum() / self.count_P.sum())

    @property
    def second(self) -> float:
        """vᵀ∇²L v."""
        return float(self.second_P.sum() / self.count_P.sum())


def derivatives(
    u_PGT: np.ndarray, w_PGT: np.ndarray, mask_PGT: np.ndarray, adv_PG: np.ndarray,
    success_PG: np.ndarray, trained_PG: np.ndarray, trained_mask_PGT: np.ndarray,
) -> Mapping[str, DirectionalDerivatives]:  # fmt: skip
    """Every objective of the module's table from (u, w) of the completions of P prompts.

    `trained_PG` are the trainer's own advantages and `trained_mask_PGT` the tokens it trains, aggregated by tokens
    (its "token" mean); the other arguments as in `CompletionBatch`.
    """
    u, w = (np.where(mask_PGT > 0, x, 0.0).astype(np.float64) for x in (u_PGT, w_PGT))
    u_PG, w_PG = u.sum(-1), w.sum(-1)
    ones_P = np.full(u_PG.shape[0], float(u_PG.shape[1]))
    keep, trained = trained_mask_PGT > 0, trained_PG[:, :, None]
    zeros_P = np.zeros_like(ones_P)
    return {
        "reward": DirectionalDerivatives(-(adv_PG * u_PG).sum(1), -(adv_PG * (u_PG**2 + w_PG)).sum(1), ones_P),
        "surrogate": DirectionalDerivatives(-(adv_PG * u_PG).sum(1), -(adv_PG * w_PG).sum(1), ones_P),
        "grpo": DirectionalDerivatives(
            -(keep * trained * u).sum((1, 2)),
            -(keep * trained * (u**2 + w)).sum((1, 2)),
            keep.sum((1, 2)).astype(np.float64),
        ),
        "success_nll": DirectionalDerivatives(
            -(success_PG * u_PG).sum(1), -(success_PG * w_PG).sum(1), success_PG.sum(1)
        ),
        "kl": DirectionalDerivatives(zeros_P, (u**2).sum((1, 2)), ones_P),
    }
