"""The GRPO family of losses: arrays in, arrays out; no model, no sampling, no optimizer.

P prompts, G group, B = P * G sequences, T completion tokens. `mask_BT` is 1 on the tokens that
are trained (the completion with its end token, see `loss_mask`) and 0 on padding; whatever lies
where it is 0, even infinities, reaches neither loss, gradient nor metrics. Log-probs are natural
logarithms of the policy at the sampling temperature (definitions §1). Sums and counts are
returned apart, so that micro-batches add up to exactly the loss of the whole batch.

Per token, with ratio r = π_θ / π_old and importance weight w (`truncated_importance`):

    loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * KL

Sources: GRPO arXiv 2402.03300; DAPO 2503.14476 (token mean, asymmetric clip, overlong masking,
zero-variance groups); Dr.GRPO 2503.20783 (constant normaliser, no std); GSPO 2507.18071.
Deviations from them:
- a fully masked sequence adds to neither sum nor count (GRPO and Dr.GRPO count it, as does TRL);
- a group whose rewards are equal up to rounding has advantages of exactly 0;
- the sequence ratio takes GSPO's stop-gradient form (its GSPO-token), which has the gradient of
  the plain one; the importance weight stays per token under it, so the two differ once w varies;
- k1 enters as a reward, not as a term to differentiate (`kl_penalty`).
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from mdrl_jax.section import section

STD_EPSILON = 1e-4  # TRL's; keeps groups of nearly equal rewards from exploding
REWARD_TOLERANCE = 1e-6  # float32 rounding of sums of a few rewards in [0, 1], with room

Pair = tuple[jax.Array, jax.Array]  # (sum, count); the mean is sum / max(count, 1)


@section
class GRPOConfig:
    """The loss's section of a config. Raises ValueError on a value that is not allowed.

    Attributes:
        scale: "std" divides a group's advantages by its standard deviation, "none" does not.
        aggregation: "token" mean over all tokens (DAPO), "sequence" mean of each sequence's mean
            (GRPO), "constant" sum / (sequences * longest completion allowed) (Dr.GRPO).
        ratio: "token", or "sequence" for the length-normalised ratio of GSPO (which wants clips
            near 3e-4).
        clip_low: r below 1 - clip_low is clipped when the advantage is negative; 1 is never.
        clip_high: r above 1 + clip_high is clipped when the advantage is positive.
        kl_coef: weight of the KL to the reference policy; 0 needs no reference log-probs.
        kl: estimator, "k1", "k2" or "k3"; see `kl_penalty` for what each one pulls on.
        importance_cap: upper limit of the sampler-to-trainer importance weight; 0 turns it off.
        mask_overlong: leave out completions cut at the length limit.
        drop_zero_variance: leave out groups without reward variance (their KL too).
        updates_per_batch: passes over each batch of completions; above 1 it is off-policy.
    """

    scale: str = "std"
    aggregation: str = "token"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    kl: str = "k3"
    importance_cap: float = 2.0
    mask_overlong: bool = False
    drop_zero_variance: bool = True
    updates_per_batch: int = 1

    def __post_init__(self):
        cap = self.importance_cap
        rules = {
            "scale": (self.scale in SCALES, f"one of {', '.join(SCALES)}"),
            "aggregation": (self.aggregation in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}"),
            "ratio": (self.ratio in LOG_RATIOS, f"one of {', '.join(LOG_RATIOS)}"),
            "clip_low": (0 <= self.clip_low <= 1, "a number from 0 to 1"),
            "clip_high": (0 <= self.clip_high < math.inf, "a number of at least 0"),
            "kl_coef": (0 <= self.kl_coef < math.inf, "a number of at least 0"),
            "kl": (self.kl in KL_ESTIMATES, f"one of {', '.join(KL_ESTIMATES)}"),
            "importance_cap": (cap == 0 or 1 <= cap < math.inf, "0 (off) or a number from 1 up"),
            "updates_per_batch": (self.updates_per_batch >= 1, "a whole number of at least 1"),
        }
        for field, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: {allowed}")


@flax.struct.dataclass
class GRPOBatch:
    """What the loss needs besides the current policy's log-probs; log-probs in nats.

    Attributes:
        old_logp_BT: by the trainer before this batch's first update; None when every update sees
            fresh completions: then π_old is π_θ itself with its gradient stopped.
        sampler_logp_BT: as recorded while sampling.
        ref_logp_BT: by the reference policy; None when it is neither penalised nor watched.
        adv_B: advantage of each sequence (`group_advantages`).
        mask_BT: 1 where a token is trained (`loss_mask`).
    """

    old_logp_BT: jax.Array | None
    sampler_logp_BT: jax.Array
    ref_logp_BT: jax.Array | None
    adv_B: jax.Array
    mask_BT: jax.Array


def group_advantages(rewards_PG: jax.Array, *, scale: str) -> tuple[jax.Array, jax.Array]:
    """A = r - mean of its group, over (std + 1e-4) if `scale` is "std" (arXiv 2402.03300).

    The std has ddof 1 (divides by G - 1), as in TRL and torch. Returns `adv_PG` and
    `informative_P`: whether the group's rewards differ by more than float rounding; if not, its
    advantages are exactly 0. `1 - mean(informative_P)` is the share to report as dropped.
    Raises ValueError for fewer than two completions a prompt: they have no group to differ from.
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError(f"a group has {rewards_PG.shape[1]} completion; allowed: 2 or more")
    largest_P = jnp.max(jnp.abs(rewards_PG), axis=1)
    informative_P = jnp.ptp(rewards_PG, axis=1) > REWARD_TOLERANCE * jnp.maximum(largest_P, 1.0)
    adv_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    adv_PG = adv_PG / SCALES[scale](rewards_PG)
    return jnp.where(informative_P[:, None], adv_PG, jnp.zeros_like(adv_PG)), informative_P


SCALES = {
    "std": lambda r_PG: jnp.std(r_PG, axis=1, keepdims=True, ddof=1) + STD_EPSILON,
    "none": lambda r_PG: jnp.ones_like(r_PG),
}


def loss_mask(mask_BT: jax.Array, informative_B: jax.Array, truncated_B: jax.Array, config: GRPOConfig) -> jax.Array:
    """`mask_BT` without the sequences that the config leaves out; same dtype.

    `informative_B`: the sequence's group has reward variance. `truncated_B`: the completion was
    cut at the token limit. Left-out sequences then count in no normaliser either.
    """
    keep_B = jnp.ones_like(informative_B, dtype=bool)
    if config.drop_zero_variance:
        keep_B &= informative_B.astype(bool)
    if config.mask_overlong:
        keep_B &= ~truncated_B.astype(bool)
    return jnp.where(keep_B[:, None], mask_BT, jnp.zeros_like(mask_BT))


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str) -> jax.Array:
    """KL(π_θ ‖ π_ref) from tokens sampled from π_θ, any shape (joschu.net/blog/kl-approx.html).

    With d = log π_ref - log π_θ: k1 = -d (unbiased), k2 = d²/2 (biased, low variance),
    k3 = eᵈ - 1 - d (unbiased, never negative). These are *values*: put into a loss as they are,
    k2 has the right gradient, k1's is zero on average and k3's another KL's: see `kl_penalty`.
    """
    return KL_ESTIMATES[kind](ref_logp - logp)


KL_ESTIMATES = {
    "k1": lambda d: -d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": lambda d: jnp.expm1(d) - d,
}


def kl_penalty(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, weight_BT: jax.Array, mask_BT: jax.Array, kind: str
) -> jax.Array:
    """`kl_estimate` with a gradient fit for a loss; expected gradients under samples of π_θ:

    k1: its own is E[∇log π] = 0, so it is charged as a reward would be: value k1_t, gradient
        weight_t (Σ_{s≥t} k1_s) ∇log π_t. Summed over the sequence this is exactly the gradient
        of the sequence's reverse KL. Of the three it has the largest variance.
    k2: exactly that of the reverse KL of each token given its prefix: what a token does to the
        KL of later ones is left out, so it is the sequence's only for one-token completions.
    k3: exactly that of the *forward* KL(π_ref ‖ π_θ) of each token given its prefix; to first
        order in π_θ - π_ref it agrees with k2.

    `weight_BT` is π_θ / π_sampler: only k1, a score function, takes it (as in TRL for k3).
    """
    keep_BT = mask_BT.astype(bool)
    kl_BT = kl_estimate(_only(logp_BT, keep_BT), _only(ref_logp_BT, keep_BT), kind)
    if kind != "k1":
        return kl_BT
    kl_BT = stop_gradient(kl_BT)
    to_go_BT = stop_gradient(_only(weight_BT, keep_BT)) * jax.lax.cumsum(kl_BT, 1, reverse=True)
    return kl_BT + to_go_BT * _zero_with_gradient(_only(logp_BT, keep_BT))


def truncated_importance(old_logp_BT: jax.Array, sampler_logp_BT: jax.Array, cap: float) -> jax.Array:
    """w = min(π_old / π_sampler, cap), a constant to the gradient; all ones when `cap` is 0.

    Corrects for a sampler whose numerics differ from the trainer's; the cap bounds the variance
    (truncated importance sampling, Ionides 2008).
    """
    if cap == 0:
        return jnp.ones_like(old_logp_BT)
    return stop_gradient(jnp.minimum(jnp.exp(old_logp_BT - sampler_logp_BT), cap))


def clipped_surrogate(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    adv_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str,
) -> tuple[jax.Array, jax.Array]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token, and where the clip holds.

    The `min` makes it pessimistic for either sign of A (PPO, arXiv 1707.06347): a clipped token
    (A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low) has no gradient; every other has
    gradient -r A. `ratio` "token" takes r_t = exp(logp_t - old_t); "sequence" takes for all its
    tokens the geometric mean of them, with r's gradient at token t being r ∇logp_t (GSPO-token).
    """
    keep_BT = mask_BT.astype(bool)
    log_r_BT = LOG_RATIOS[ratio](_only(logp_BT, keep_BT), _only(old_logp_BT, keep_BT), keep_BT)
    r_BT = jnp.exp(stop_gradient(log_r_BT))
    adv_B1 = adv_B[:, None]
    high_BT = (adv_B1 > 0) & (r_BT > 1 + clip_high)
    low_BT = (adv_B1 < 0) & (r_BT < 1 - clip_low)
    clipped_BT = keep_BT & (high_BT | low_BT)
    bound_BT = jnp.clip(r_BT, 1 - clip_low, 1 + clip_high)
    # The exponent is cleared where clipped: an overflow there would turn its zero gradient to NaN.
    r_BT = jnp.where(clipped_BT, bound_BT, jnp.exp(_only(log_r_BT, ~clipped_BT)))
    return -_only(r_BT * adv_B1, keep_BT), clipped_BT


def _sequence_log_ratio(logp_BT, old_logp_BT, keep_BT):
    length_B1 = jnp.sum(keep_BT, axis=1, keepdims=True, dtype=logp_BT.dtype)
    total_B1 = jnp.sum(logp_BT - old_logp_BT, axis=1, keepdims=True)
    return stop_gradient(total_B1 / jnp.maximum(length_B1, 1.0)) + _zero_with_gradient(logp_BT)


LOG_RATIOS = {
    "token": lambda logp_BT, old_logp_BT, _: logp_BT - old_logp_BT,
    "sequence": _sequence_log_ratio,
}


def aggregate(value_BT: jax.Array, mask_BT: jax.Array, how: str, max_length: int) -> Pair:
    """(sum, count) of a per-token value; `how` is `GRPOConfig.aggregation`.

    The mean over any number of micro-batches is the total of the sums over the total of the
    counts, whatever their token counts. `max_length` is the longest completion allowed, in
    tokens; only "constant" reads it. A fully masked sequence adds nothing to either.
    """
    keep_BT = mask_BT.astype(bool)
    value_BT = _only(value_BT, keep_BT)
    length_B = jnp.sum(keep_BT, axis=1, dtype=value_BT.dtype)
    return AGGREGATIONS[how](value_BT, length_B, max_length)


AGGREGATIONS = {
    "token": lambda value_BT, length_B, _: (jnp.sum(value_BT), jnp.sum(length_B)),
    "sequence": lambda value_BT, length_B, _: (
        jnp.sum(jnp.sum(value_BT, axis=1) / jnp.maximum(length_B, 1.0)),
        jnp.sum(length_B > 0, dtype=value_BT.dtype),
    ),
    "constant": lambda value_BT, length_B, max_length: (
        jnp.sum(value_BT),
        jnp.sum(length_B > 0, dtype=value_BT.dtype) * max_length,
    ),
}


def grpo_loss(
    logp_BT: jax.Array, batch: GRPOBatch, config: GRPOConfig, max_length: int
) -> tuple[jax.Array, jax.Array, dict[str, Pair]]:
    """The loss of one micro-batch as (sum, count), and its metrics, each a (sum, count) of tokens.

    The gradient of the batch is Σ∇sum / max(Σcount, 1) over its micro-batches. Metrics:
    `clip_low` and `clip_high`, shares clipped with A < 0 and A > 0; `importance`, mean w;
    `sampler_gap`, mean |log π_old - log π_sampler| in nats; `kl`, mean estimate in nats (present
    with reference log-probs, also at kl_coef 0). Raises ValueError when kl_coef is above 0 and
    there are none.
    """
    keep_BT = batch.mask_BT.astype(bool)
    logp_BT = _only(logp_BT, keep_BT)
    old = logp_BT if batch.old_logp_BT is None else batch.old_logp_BT
    old_BT = stop_gradient(_only(old, keep_BT))
    sampler_BT = stop_gradient(_only(batch.sampler_logp_BT, keep_BT))
    weight_BT = truncated_importance(old_BT, sampler_BT, config.importance_cap)
    loss_BT, clipped_BT = clipped_surrogate(
        logp_BT, old_BT, batch.adv_B, keep_BT,
        clip_low=config.clip_low, clip_high=config.clip_high, ratio=config.ratio,
    )  # fmt: skip
    loss_BT = weight_BT * loss_BT
    adv_B1 = batch.adv_B[:, None]
    metrics_BT = {
        "clip_low": (clipped_BT & (adv_B1 < 0)).astype(logp_BT.dtype),
        "clip_high": (clipped_BT & (adv_B1 > 0)).astype(logp_BT.dtype),
        "importance": weight_BT,
        "sampler_gap": jnp.abs(old_BT - sampler_BT),
    }
    if batch.ref_logp_BT is not None:
        ref_BT = stop_gradient(_only(batch.ref_logp_BT, keep_BT))
        metrics_BT["kl"] = stop_gradient(kl_estimate(logp_BT, ref_BT, config.kl))
        if config.kl_coef > 0:
            score_BT = weight_BT * jnp.exp(stop_gradient(logp_BT) - old_BT)
            kl_BT = kl_penalty(logp_BT, ref_BT, score_BT, keep_BT, config.kl)
            loss_BT = loss_BT + config.kl_coef * kl_BT
    elif config.kl_coef > 0:
        raise ValueError(f"kl_coef is {config.kl_coef!r} but the batch has no reference log-probs")
    total, count = aggregate(loss_BT, keep_BT, config.aggregation, max_length)
    metrics = {k: aggregate(v_BT, keep_BT, "token", max_length) for k, v_BT in metrics_BT.items()}
    return total, count, metrics


def _only(x_BT: jax.Array, keep_BT: jax.Array) -> jax.Array:
    """`x_BT` where kept, else 0, gradient included; a product would let inf * 0 = NaN through."""
    return jnp.where(keep_BT, x_BT, jnp.zeros_like(x_BT))


def _zero_with_gradient(x: jax.Array) -> jax.Array:
    """0 in value, the identity to the gradient."""
    return x - stop_gradient(x)
