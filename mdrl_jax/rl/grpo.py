"""The GRPO family of losses: functions of arrays that know no model, no sampling and no optimizer.

`policy.py` calls them: `group_advantages` and `loss_mask` for every batch of scored completions, and `grpo_loss` with
the log-probs that the model gives the completions' tokens (definitions §15).

Letters of shapes: P prompts, G completions of each (its group), B = P * G sequences, T completion tokens. `mask_BT` is
1 on the tokens that are trained (a completion with its end token, see `loss_mask`) and 0 elsewhere. Values at masked
positions (those with mask 0), even infinities and NaN, affect neither the loss nor its gradient nor the metrics.
Log-probs are natural logarithms of the policy at the sampling temperature (definitions §1). Arguments that select a
variant by name allow the names that `GRPOConfig` allows; another name raises KeyError.

The loss of a token, with the advantage A of its sequence, the ratio r = π_θ / π_old, and the importance weight w of
`truncated_importance`, is

    loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * KL

The loss of a batch is a mean of these (`aggregate`). It is returned as a sum and a count. Those of micro-batches simply
add up, so the division into micro-batches does not change the loss of the batch.

Sources: GRPO arXiv 2402.03300; DAPO 2503.14476 (token mean, asymmetric clip, overlong masking, zero-variance groups);
Dr.GRPO 2503.20783 (constant normaliser, no std); GSPO 2507.18071. This file differs from them in four points:

- A fully masked sequence adds to neither the sum nor the count. GRPO, Dr.GRPO and TRL include it in the count.
- A group whose rewards are equal up to rounding has advantages of exactly 0.
- The sequence ratio has GSPO's stop-gradient form, which its paper calls GSPO-token. The paper's plain form has the
  same gradient if w is the same for all tokens of a sequence. Here w is per token, so the gradients differ.
- The KL estimator k1 is charged like a reward, because its own gradient is zero on average (`kl_penalty`).
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from mdrl_jax.section import section

STD_EPSILON = 1e-4  # as in TRL; limits the advantages of groups whose rewards are nearly equal
REWARD_TOLERANCE = 1e-6  # well above the float32 rounding error of a reward that is a sum of a few terms

Pair = tuple[jax.Array, jax.Array]  # (sum, count); the mean is sum / max(count, 1)


@section
class GRPOConfig:
    """Options of the loss (section `train.grpo` of the configuration).

    Attributes:
      scale: "std" divides a group's advantages by the standard deviation of its rewards; "none" does not.
      aggregation: how losses of tokens become the loss of a batch. "token": mean over all tokens (DAPO). "sequence":
        mean over sequences of each sequence's mean (GRPO). "constant": sum / (sequences * longest completion allowed)
        (Dr.GRPO).
      ratio: "token": the ratio of each token. "sequence": the length-normalised ratio of GSPO, which needs far smaller
        clips (about 3e-4).
      clip_low: a token with a negative advantage is clipped if r is below 1 - clip_low; 1 clips none.
      clip_high: a token with a positive advantage is clipped if r is above 1 + clip_high.
      kl_coef: weight of the KL to the reference policy; 0 needs no reference log-probs.
      kl: estimator of the KL, "k1", "k2" or "k3"; `kl_penalty` says which gradient each one has.
      importance_cap: upper limit of the importance weight w from the sampler to the trainer; 0: all weights are 1.
      mask_overlong: whether completions that the length limit cut off are left out of the loss.
      drop_zero_variance: whether groups without reward variance are left out of the loss, their KL included.
      updates_per_batch: optimizer updates on each batch of completions; all but the first are off-policy.

    Raises:
      ValueError: if a value is not allowed.
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
    """Inputs of the loss besides the current policy's log-probs; all log-probs are in nats.

    Attributes:
      old_logp_BT: log-probs under π_old, the policy before the first update on this batch. None: there is one update
        per batch, so π_old is π_θ with its gradient stopped.
      sampler_logp_BT: log-probs that the sampler recorded.
      ref_logp_BT: log-probs under the reference policy; None: the KL is neither penalised nor reported.
      adv_B: advantage of each sequence, from `group_advantages`; or of each token [B, T] (`distill.py`).
      mask_BT: 1 where a token is trained, from `loss_mask`.
    """

    old_logp_BT: jax.Array | None
    sampler_logp_BT: jax.Array
    ref_logp_BT: jax.Array | None
    adv_B: jax.Array
    mask_BT: jax.Array


def group_advantages(rewards_PG: jax.Array, *, scale: str) -> tuple[jax.Array, jax.Array]:
    """Advantages of completions: A = reward - mean of its group, and for scale "std" this / (std of the group + 1e-4).

    The standard deviation has ddof 1 (it divides by G - 1), as in TRL and torch (arXiv 2402.03300).

    Args:
      rewards_PG: rewards of the completions [P, G], on any scale.
      scale: "std" or "none" (`GRPOConfig.scale`).

    Returns:
      adv_PG: the advantages [P, G], in the unit of the rewards, or in standard deviations for "std".
      informative_P: True if the rewards of the group differ by more than float32 rounding, i.e. by more than 1e-6 times
        the largest |reward| or 1, whichever is larger [P]. If not, or if a reward is NaN or infinite, it is False and
        the advantages of the group are exactly 0.

    Raises:
      ValueError: if a group has fewer than two completions, because then there is nothing to compare them with.
      KeyError: if `scale` is unknown.
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
    """Sets the mask of the sequences that the config leaves out to 0.

    A sequence that is left out is not counted in any normaliser either.

    Args:
      mask_BT: 1 on completion tokens.
      informative_B: True if the rewards of the sequence's group differ.
      truncated_B: True if the length limit cut the completion off.
      config: `drop_zero_variance` and `mask_overlong` are read.

    Returns:
      the mask of the tokens that are trained [B, T], in the dtype of `mask_BT`.
    """
    keep_B = jnp.ones_like(informative_B, dtype=bool)
    if config.drop_zero_variance:
        keep_B &= informative_B.astype(bool)
    if config.mask_overlong:
        keep_B &= ~truncated_B.astype(bool)
    return jnp.where(keep_B[:, None], mask_BT, jnp.zeros_like(mask_BT))


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str) -> jax.Array:
    """Estimates KL(π_θ ‖ π_ref) from tokens that were sampled from π_θ (joschu.net/blog/kl-approx.html).

    With d = log π_ref - log π_θ, k1 = -d is unbiased; k2 = d²/2 is biased and has a low variance; k3 = eᵈ - 1 - d is
    unbiased and never negative. This holds for their values. Their gradients are another matter: k2 has the gradient of
    this KL, that of k1 is zero on average, and that of k3 belongs to another KL. A loss therefore uses `kl_penalty`.

    Args:
      logp: log π_θ of the sampled tokens, of any shape.
      ref_logp: log π_ref of the same tokens, in the same shape.
      kind: "k1", "k2" or "k3".

    Returns:
      the estimate of each token, in nats, in the shape of `logp`.

    Raises:
      KeyError: if `kind` is unknown.
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
    """`kl_estimate` with a gradient that is useful in a loss.

    The expected gradients under samples of π_θ are:

    - k1: differentiated as it stands it would have E[∇log π] = 0. It is therefore charged like a reward: its value is
      k1_t and its gradient weight_t (Σ_{s≥t} k1_s) ∇log π_t. Summed over the sequence, this is exactly the gradient of
      the sequence's reverse KL(π_θ ‖ π_ref). It has the largest variance of the three.
    - k2: exactly the gradient of the reverse KL of each token given its prefix. It ignores that a token also changes
      the KL of later tokens, so it is the gradient of the sequence's KL only for completions of one token.
    - k3: exactly the gradient of the *forward* KL(π_ref ‖ π_θ) of each token given its prefix. To first order in
      π_θ - π_ref it agrees with k2.

    Args:
      logp_BT: log π_θ of the sampled tokens.
      ref_logp_BT: log π_ref of the same tokens, with its gradient stopped.
      weight_BT: importance weight w π_θ / π_old, which is π_θ / π_sampler up to the cap of w. Only k1 uses it, because
        its gradient is a score function. TRL does not weight k3 either.
      mask_BT: 1 on the tokens that are trained.
      kind: "k1", "k2" or "k3".

    Returns:
      the penalty of each token [B, T], in nats; 0 at masked positions.

    Raises:
      KeyError: if `kind` is unknown.
    """
    keep_BT = mask_BT.astype(bool)
    kl_BT = kl_estimate(_only(logp_BT, keep_BT), _only(ref_logp_BT, keep_BT), kind)
    if kind != "k1":
        return kl_BT
    kl_BT = stop_gradient(kl_BT)
    to_go_BT = stop_gradient(_only(weight_BT, keep_BT)) * jax.lax.cumsum(kl_BT, 1, reverse=True)
    return kl_BT + to_go_BT * _zero_with_gradient(_only(logp_BT, keep_BT))


def truncated_importance(old_logp_BT: jax.Array, sampler_logp_BT: jax.Array, cap: float) -> jax.Array:
    """The importance weight of each token, w = min(π_old / π_sampler, cap), with a stopped gradient.

    It corrects for tokens that were not drawn from π_old exactly: the sampler applies top-k and top-p and rounds
    differently. The cap bounds the variance (truncated importance sampling, Ionides 2008).

    Args:
      old_logp_BT: log π_old of the tokens.
      sampler_logp_BT: log-probs of the same tokens that the sampler recorded.
      cap: upper limit of the weights (`GRPOConfig.importance_cap`); 0: all weights are 1.

    Returns:
      the weights [B, T]. There is no mask: at positions without a token they have no meaning.
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
    """The clipped policy loss of each token, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347).

    A token is clipped if A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low. A clipped token has no gradient.
    Every other token has the gradient -r A ∇logp_t.

    Args:
      logp_BT: log π_θ of the tokens.
      old_logp_BT: log π_old of the tokens, with its gradient stopped.
      adv_B: advantage A of each sequence, or of each token [B, T].
      mask_BT: 1 on the tokens that are trained.
      clip_low: as in `GRPOConfig`.
      clip_high: as in `GRPOConfig`.
      ratio: "token": r_t = exp(logp_t - old_logp_t). "sequence": every token has the geometric mean of its sequence's
        r_t, and the gradient of r at token t is r ∇logp_t (GSPO-token).

    Returns:
      the loss of each token [B, T], 0 at masked positions; and True where a token is clipped [B, T], False at masked
      positions.

    Raises:
      KeyError: if `ratio` is unknown.
    """
    keep_BT = mask_BT.astype(bool)
    log_r_BT = LOG_RATIOS[ratio](_only(logp_BT, keep_BT), _only(old_logp_BT, keep_BT), keep_BT)
    r_BT = jnp.exp(stop_gradient(log_r_BT))
    adv_B1 = _by_token(adv_B, keep_BT)
    high_BT = (adv_B1 > 0) & (r_BT > 1 + clip_high)
    low_BT = (adv_B1 < 0) & (r_BT < 1 - clip_low)
    clipped_BT = keep_BT & (high_BT | low_BT)
    bound_BT = jnp.clip(r_BT, 1 - clip_low, 1 + clip_high)
    # Clear the exponent of clipped tokens: if exp overflowed there, their zero gradient would become 0 * inf = NaN.
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
    """The sum and the count whose quotient is the mean of a value of each token.

    The mean over several micro-batches is the total of their sums divided by the total of their counts. A fully masked
    sequence adds nothing to either.

    Args:
      value_BT: a value of each token.
      mask_BT: 1 on the tokens that are trained.
      how: "token", "sequence" or "constant" (`GRPOConfig.aggregation`).
      max_length: the longest completion allowed, in tokens; only "constant" reads it.

    Returns:
      (sum, count), two scalars in the dtype of `value_BT`. The sum is over tokens, or for "sequence" over the means of
      sequences. The count is the number of trained tokens ("token"), of sequences with a trained token ("sequence"), or
      of these sequences times `max_length` ("constant"). Both are 0 if everything is masked.

    Raises:
      KeyError: if `how` is unknown.
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
    """The loss of one micro-batch, with its metrics.

    The gradient of a batch is Σ ∇sum / max(Σ count, 1), with sums over its micro-batches.

    Args:
      logp_BT: log-probs of the completions' tokens under the current policy, in nats. The log-probs in
        `batch` are treated as constants.
      batch: the other inputs.
      config: options of the loss. `scale`, `mask_overlong`, `drop_zero_variance` and `updates_per_batch` are not read
        here.
      max_length: the longest completion allowed, in tokens.

    Returns:
      sum: the sum of the loss, a scalar.
      count: the count that belongs to it, a scalar; `aggregate` says what it counts.
      metrics: name -> (sum, count) without a gradient, whose quotient is a mean over trained tokens. `clip_low` and
        `clip_high` are the shares of tokens that are clipped with A < 0 and with A > 0. `importance` is the mean of w.
        `sampler_gap` is the mean of |log π_old - log π_sampler| in nats. `kl` is the mean KL estimate in nats; it is
        there if the batch has reference log-probs, also if kl_coef is 0.

    Raises:
      ValueError: if kl_coef is above 0 and the batch has no reference log-probs.
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
    adv_B1 = _by_token(batch.adv_B, keep_BT)
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


def _by_token(adv: jax.Array, keep_BT: jax.Array) -> jax.Array:
    """Advantages with an axis of tokens: [B, 1] of sequences, [B, T] of tokens."""
    return _only(adv, keep_BT) if adv.ndim == 2 else adv[:, None]


def _only(x_BT: jax.Array, keep_BT: jax.Array) -> jax.Array:
    """`x_BT` where `keep_BT` is True, elsewhere 0 with no gradient.

    A product with the mask would not do, because inf * 0 is NaN.
    """
    return jnp.where(keep_BT, x_BT, jnp.zeros_like(x_BT))


def _zero_with_gradient(x: jax.Array) -> jax.Array:
    """A zero whose gradient with respect to x is 1."""
    return x - stop_gradient(x)
