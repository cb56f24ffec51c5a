"""On-policy distillation: the student samples completions, and the loss pulls its policy to that of a frozen teacher.

The loss of a completion y ∼ π_θ with teacher π_T is Σ_t KL(π_θ(·|y_<t) ‖ π_T(·|y_<t)) at fixed prefixes y_<t. The form
`full` has its gradient exactly, `sampled` in expectation, and `top_k` in part (definitions §10). The influence of a
token on the distribution of later tokens is left out. The forms differ in how much of the teacher they ask for:

| form | loss of a token | from the teacher |
|---|---|---|
| `sampled` | the policy loss of `grpo.py` with the advantage log π_T(y_t) − log π_θ(y_t), a constant | log π_T(y_t) |
| `top_k` | Σ_{v∈K} [π_θ log(π_θ/π_T) − π_θ + π_T], K the student's k likeliest tokens | log π_T on K |
| `full` | Σ_v π_θ log(π_θ/π_T) over the whole vocabulary | its last hidden states |
| `fixed` | the policy loss with one advantage for the least likely tokens, 0 for the others: a control | nothing |

Every term of `top_k` is at least 0, and 0 where both policies agree, so the teacher is a fixed point and the sum is at
most the KL. What it leaves out is Σ_{v∉K} of the same terms. Its estimate from the sampled token, 1{y_t ∉ K} (e^d − 1 −
d) with d = log π_T(y_t) − log π_θ(y_t), is unbiased and needs no other log-prob of the teacher; it is the metric
`kl_left_out`.

All policies are taken at the sampling temperature. `top_k` and `full` sum over the token that is drawn, so no
importance weight and no clip applies to them. `sampled` and `fixed` have both, as GRPO has.

Letters of shapes: M micro-batches, B rows, T positions of completions (Tp + T in rows with their prompts), D embed,
V vocabulary, K tokens of the set K, N teachers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.lax import stop_gradient
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named
from mdrl_jax.rl.grpo import GRPOConfig, aggregate, grpo_loss, kl_estimate
from mdrl_jax.rl.logprobs import over_chunks, predicting, token_log_probs
from mdrl_jax.rl.policy import PolicyBatch
from mdrl_jax.section import section

FORMS = ("sampled", "top_k", "full", "fixed")


@section
class DistillConfig:
    """What a stage `distill-` pulls the student to (section `train.distill`); other stages do not read it.

    Attributes:
      teacher: name of an earlier stage, or "base", whose final parameters teach all prompts; "": each prompt is taught
        by the peak of its domain.
      form: how much of the teacher the loss asks for, "sampled", "top_k" or "full"; "fixed": a control without one.
      top_k: tokens of the set K of the form "top_k", at least 1.
      lowest: share of a batch's tokens, the least likely ones, that the form "fixed" pushes; above 0, at most 1.
      advantage: their advantage in the form "fixed".

    Raises:
      ValueError: if a value is not allowed.
    """

    teacher: str = ""
    form: str = "sampled"
    top_k: int = 32
    lowest: float = 0.2
    advantage: float = -0.5

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; allowed: one of {', '.join(FORMS)}")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k!r}; allowed: a whole number of at least 1")
        if not 0 < self.lowest <= 1:
            raise ValueError(f"lowest is {self.lowest!r}; allowed: a number above 0 and at most 1")


@struct.dataclass
class Targets:
    """What the teachers say about the completions of a batch; arrays that the form does not need are None.

    Attributes:
      logp_BT: log-probs of the sampled tokens under the row's teacher, in nats.
      ids_BTK: the tokens of the set K at each position.
      logp_BTK: their log-probs under the row's teacher, in nats.
      hidden_BTD: the teacher's hidden states after the final norm, from which each token is predicted.
    """

    logp_BT: Any = None
    ids_BTK: Any = None
    logp_BTK: Any = None
    hidden_BTD: Any = None


def make_distill_loss(
    model: Decoder,
    config: GRPOConfig,
    distill: DistillConfig,
    temperature: float,
    max_length: int,
    chunk: int,
    shared: int = 1,
) -> Callable[..., Any]:
    """The loss of a distillation as a function of parameters and a `PolicyBatch` that has `Targets`.

    Args:
      model: the decoder.
      config: options of the loss; `kl_coef` must be 0, because a distillation has no other reference (the configuration
        is refused otherwise).
      distill: the form of the loss.
      temperature: sampling temperature, at which all policies are taken.
      max_length: the longest completion allowed, in tokens.
      chunk: positions whose logits are held at a time, as in `token_log_probs`.
      shared: rows in succession that have the same prompt, which is computed once for them (`policy.shared_rows`).

    Returns:
      (params, batch, heads) -> (sum, (count, metrics)) as `make_train_step` takes it. `heads` are the unembeddings
      [D, V] of the N teachers, which only the form "full" reads. The metrics of "sampled" and "fixed" are those of
      `grpo_loss`; "kl" of "sampled" estimates the KL to the teacher by `config.kl`, and "fixed" has no "kl". Of "full"
      and "top_k" the metric "kl" is the mean loss of a token, in nats; "top_k" also has "kl_left_out", an unbiased
      estimate of what K leaves out of it. The function raises ValueError for "fixed" if `kl_coef` is above 0.
    """
    if distill.form in ("sampled", "fixed"):
        return functools.partial(_policy_loss, model, config, distill.form, temperature, max_length, chunk, shared)
    return functools.partial(_divergence_loss, model, config, distill.form, temperature, max_length, chunk, shared)


def _policy_loss(
    model: Decoder, config: GRPOConfig, form: str, temperature: float, max_length: int, chunk: int,
    shared: int, params: Any, batch: PolicyBatch, heads: Any = (),
) -> Any:  # fmt: skip
    """The loss of GRPO with an advantage of each token; that of "fixed" is in the batch."""
    grpo, start = batch.grpo, batch.tokens_BT.shape[1] - batch.grpo.mask_BT.shape[1]
    logp_BT = token_log_probs(
        model, params, batch.tokens_BT, batch.valid_BT,
        start=start, temperature=temperature, chunk=chunk, group=shared,
    )  # fmt: skip
    if form == "sampled":
        old_BT = stop_gradient(logp_BT) if grpo.old_logp_BT is None else grpo.old_logp_BT
        teacher_BT = batch.targets.logp_BT
        grpo = dataclasses.replace(grpo, adv_B=teacher_BT - old_BT, ref_logp_BT=teacher_BT)
    loss, count, metrics = grpo_loss(logp_BT, grpo, config, max_length)
    return loss, (count, metrics)


def _divergence_loss(
    model: Decoder, config: GRPOConfig, form: str, temperature: float, max_length: int, chunk: int,
    shared: int, params: Any, batch: PolicyBatch, heads: Any = (),
) -> Any:  # fmt: skip
    """Σ_v of the whole vocabulary ("full") or of the set K ("top_k") at each sampled prefix."""
    targets, mask_BT = batch.targets, batch.grpo.mask_BT
    start = batch.tokens_BT.shape[1] - mask_BT.shape[1]
    apply = _bound(model, params)
    hidden_BTD = predicting(apply, batch.tokens_BT, batch.valid_BT, start, shared)
    lm_head_DV = apply(method="lm_head")

    def logp(hidden_BCD: jax.Array, head_DV: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(apply(hidden_BCD, head_DV, method="logits") / temperature, axis=-1)

    def full(hidden_BCD: jax.Array, taught_BCD: jax.Array, which_BC: jax.Array) -> Any:
        student_BCV = logp(hidden_BCD, lm_head_DV)
        teacher_BCV = jnp.zeros_like(student_BCV)
        for n, head_DV in enumerate(heads):  # the rows of a micro-batch mostly have one teacher
            own_BC = which_BC == n
            ask = lambda head_DV=head_DV, own_BC=own_BC, others_BCV=teacher_BCV: jnp.where(  # noqa: E731
                own_BC[:, :, None], logp(taught_BCD, head_DV), others_BCV
            )
            teacher_BCV = jax.lax.cond(jnp.any(own_BC), ask, lambda others_BCV=teacher_BCV: others_BCV)
        return jnp.sum(jnp.exp(student_BCV) * (student_BCV - teacher_BCV), axis=-1)

    def top_k(hidden_BCD: jax.Array, ids_BCK: jax.Array, teacher_BCK: jax.Array, targets_BC: jax.Array) -> Any:
        student_BCV = logp(hidden_BCD, lm_head_DV)
        student_BCK = jnp.take_along_axis(student_BCV, ids_BCK, axis=-1)
        sampled_BC = jnp.take_along_axis(student_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        p_BCK = jnp.exp(student_BCK)
        terms_BCK = p_BCK * (student_BCK - teacher_BCK) - p_BCK + jnp.exp(teacher_BCK)
        return jnp.sum(terms_BCK, axis=-1), sampled_BC

    metrics_BT = {}
    if form == "full":
        which_BT = jnp.broadcast_to(batch.teacher_B[:, None], mask_BT.shape)
        loss_BT = over_chunks(full, (hidden_BTD, targets.hidden_BTD, which_BT), chunk)
    else:
        tokens_BT = batch.tokens_BT[:, start:]
        arrays = (hidden_BTD, targets.ids_BTK, targets.logp_BTK, tokens_BT)
        loss_BT, logp_BT = over_chunks(top_k, arrays, chunk)
        inside_BT = jnp.any(targets.ids_BTK == tokens_BT[:, :, None], axis=-1)
        metrics_BT["kl_left_out"] = jnp.where(inside_BT, 0, kl_estimate(logp_BT, targets.logp_BT, "k3"))
    metrics_BT["kl"] = loss_BT
    total, count = aggregate(loss_BT, mask_BT, config.aggregation, max_length)
    metrics = {k: aggregate(stop_gradient(x), mask_BT, "token", max_length) for k, x in metrics_BT.items()}
    return total, (count, metrics)


def _bound(model: Decoder, params: Any) -> Callable[..., Any]:
    return cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))


def make_teach(
    model: Decoder, mesh: Mesh, form: str, temperature: float, chunk: int, shared: int = 1
) -> Callable[..., Targets]:
    """A program that asks one teacher about its rows of a batch; its first call compiles it.

    A micro-batch without a row of this teacher is not computed. `policy_batch` sorts the rows by their teachers, so
    each micro-batch is computed once, and once more for each further teacher that it has rows of.

    Args:
      model: the decoder.
      mesh: the devices; the rows of each micro-batch are split over them.
      form: "sampled", "top_k" or "full".
      temperature: sampling temperature, at which the teacher is taken.
      chunk: positions whose logits are held at a time, as in `token_log_probs`.
      shared: rows in succession that have the same prompt, which is computed once for them (`policy.shared_rows`).

    Returns:
      the jitted function (params of the teacher, batch, number of the teacher, start) -> the batch's `Targets` with the
      teacher's rows filled in; its other rows stay as they are. The batch has micro-batches [M, B, ...], and `Targets`
      from `make_blank`. `start` is the length of the padded prompts, a Python int of at least 1.
    """

    def read(params: Any, tokens_BT: jax.Array, valid_BT: jax.Array, before: Targets, start: int) -> Targets:
        apply = _bound(model, params)
        hidden_BTD = predicting(apply, tokens_BT, valid_BT, start, shared)
        if form == "full":
            return dataclasses.replace(before, hidden_BTD=hidden_BTD)
        lm_head_DV = apply(method="lm_head")

        def log_probs(hidden_BCD: jax.Array, ids_BCK: jax.Array) -> jax.Array:
            logp_BCV = jax.nn.log_softmax(apply(hidden_BCD, lm_head_DV, method="logits") / temperature, axis=-1)
            return jnp.take_along_axis(logp_BCV, ids_BCK, axis=-1)

        ids_BTK = tokens_BT[:, start:, None]
        if form == "top_k":
            ids_BTK = jnp.concatenate([ids_BTK, before.ids_BTK], axis=-1)
        logp_BTK = over_chunks(log_probs, (hidden_BTD, ids_BTK), chunk)
        further = {"logp_BTK": logp_BTK[:, :, 1:]} if form == "top_k" else {}
        return dataclasses.replace(before, logp_BT=logp_BTK[:, :, 0], **further)

    def teach(params: Any, batch: PolicyBatch, index: jax.Array, start: int) -> Targets:
        def one(micro: PolicyBatch) -> Targets:
            before, own_B = micro.targets, micro.teacher_B == index

            def merged() -> Targets:
                found = read(params, micro.tokens_BT, micro.valid_BT, before, start)
                keep = lambda new, old: jnp.where(own_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
                return jax.tree.map(keep, found, before)

            return jax.lax.cond(jnp.any(own_B), merged, lambda: before)

        return jax.lax.map(one, batch)

    return program("teach", teach, static_argnums=3, out_shardings=named(mesh, None, "batch"))


def make_blank(
    model: Decoder, mesh: Mesh, distill: DistillConfig, chunk: int, shared: int = 1
) -> Callable[..., Targets]:
    """A program that makes the `Targets` of a batch before any teacher is asked; its first call compiles it.

    Args:
      model: the decoder.
      mesh: the devices; the rows of each micro-batch are split over them.
      distill: the form, and the size of K.
      chunk: positions whose logits are held at a time, as in `token_log_probs`.
      shared: rows in succession that have the same prompt, which is computed once for them (`policy.shared_rows`).

    Returns:
      the jitted function (params of the student, tokens_MBT, valid_MBT, start) -> `Targets` with zeros in the arrays
      that the teachers fill in. `start` is as in `make_teach`. For "top_k" the `Targets` also have `ids_BTK`, the
      student's `distill.top_k` likeliest tokens, or the whole vocabulary if that is smaller; no other form reads the
      parameters.
    """

    def blank(params: Any, tokens_MBT: Any, valid_MBT: Any, start: int) -> Targets:
        zeros_MBT = jnp.zeros(tokens_MBT[:, :, start:].shape, jnp.float32)
        if distill.form == "full":
            shape = (*zeros_MBT.shape, model.config.d_model)
            return Targets(hidden_BTD=jnp.zeros(shape, model.dtype))
        if distill.form != "top_k":
            return Targets(logp_BT=zeros_MBT)

        def likeliest(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            apply = _bound(model, params)
            hidden_BTD = predicting(apply, *pair, start, shared)
            lm_head_DV = apply(method="lm_head")
            k = min(distill.top_k, model.config.vocab_size)

            def ids(hidden_BCD: jax.Array) -> jax.Array:
                return jax.lax.top_k(apply(hidden_BCD, lm_head_DV, method="logits"), k)[1]

            return over_chunks(ids, (hidden_BTD,), chunk)

        ids = jax.lax.map(likeliest, (tokens_MBT, valid_MBT))
        return Targets(zeros_MBT, ids, jnp.zeros(ids.shape, jnp.float32))

    return program("distill_targets", blank, static_argnums=3, out_shardings=named(mesh, None, "batch"))
