"""The model as a policy: its GRPO loss as a function of parameters, the batches of that loss, and its log-probs.

This file connects `grpo.py`, which knows no model, to the decoder. In each step `stages/grpo.py` passes scored
completions (`rollouts.py`) through `trained` and `policy_batch`, adds log-probs of the old and the reference policy
(`make_log_probs`) if the loss needs them, and gives the batch to the training step (`trainer.py`), whose loss is
`make_grpo_loss`.

Letters of shapes: P prompts, G completions of each, B = P * G rows, M micro-batches of a batch. Tp and Tc
are the lengths of padded prompts and completions. T is Tp in arrays of prompts, Tc in arrays of completions, and
Tp + Tc in rows of both.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import named, put
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig, group_advantages, grpo_loss, loss_mask
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.trainer import Cases, LossFn, micro_batches

MOST_SHAPES = 4  # lengths of a micro-batch that a training step is compiled for


@struct.dataclass
class PolicyBatch:
    """Rows of left-padded prompts, each followed by a completion.

    `policy_batch` returns all micro-batches of a step as one `PolicyBatch`, whose leaves have one more leading axis, M.

    Rows of one prompt follow each other in blocks of `shared_rows`; the prompt of a block is computed once.

    Attributes:
      tokens_BT: token ids [B, Tp + Tc].
      valid_BT: True at real tokens, False at padding [B, Tp + Tc].
      grpo: inputs of the loss; its arrays over tokens are [B, Tc].
      teacher_B: number of each row's teacher in a distillation, from 0; None: there is no teacher.
      targets: what the teachers say (`distill.Targets`); None before they were asked.
    """

    tokens_BT: Any
    valid_BT: Any
    grpo: GRPOBatch
    teacher_B: Any = None
    targets: Any = None


def shared_rows(group_size: int, rows: int, parts: int) -> int:
    """Number of completions that share one computation of their prompt in a micro-batch.

    Args:
      group_size: completions of each prompt.
      rows: rows of a micro-batch.
      parts: number of devices that rows are split over; it divides `rows`.

    Returns:
      the largest common divisor of `group_size` and of the rows of a device. With a single row for each device it is 1:
      nothing is shared.
    """
    return math.gcd(group_size, rows // parts)


def make_grpo_loss(
    model: Decoder, config: GRPOConfig, temperature: float, max_length: int, chunk: int, shared: int = 1
) -> LossFn:
    """The GRPO loss as a function of parameters and a `PolicyBatch`, in the form that `make_train_step` takes.

    Args:
      model: the decoder.
      config: options of the loss.
      temperature: sampling temperature, at which the policy is taken (definitions §1).
      max_length: the longest completion allowed, in tokens.
      chunk: positions whose logits are held at a time, as in `token_log_probs`.
      shared: rows in succession that have the same prompt, which is computed once for them (`shared_rows`).

    Returns:
      (params, batch) -> (sum, (count, metrics)); `grpo_loss` explains the three. The function raises ValueError if
      kl_coef is above 0 and the batch has no reference log-probs.
    """

    def loss_fn(params: Any, batch: PolicyBatch):
        start = batch.tokens_BT.shape[1] - batch.grpo.mask_BT.shape[1]
        logp_BT = token_log_probs(
            model, params, batch.tokens_BT, batch.valid_BT,
            start=start, temperature=temperature, chunk=chunk, group=shared,
        )  # fmt: skip
        loss, count, metrics = grpo_loss(logp_BT, batch.grpo, config, max_length)
        return loss, (count, metrics)

    return loss_fn


def make_log_probs(
    model: Decoder, mesh: Mesh, temperature: float, chunk: int, shared: int = 1
) -> Callable[..., jax.Array]:
    """A program for the log-probs of all rows of a batch, one micro-batch after the other; its first call compiles it.

    Args:
      model: the decoder.
      mesh: the devices; the rows of each micro-batch are split over them.
      temperature: sampling temperature, at which the policy is taken.
      chunk: positions whose logits are held at a time, as in `token_log_probs`.
      shared: rows in succession that have the same prompt, which is computed once for them (`shared_rows`).

    Returns:
      the jitted function (params, tokens_MBT, valid_MBT, start) -> log-probs in nats [M, B, T - start], where B is the
      number of rows of a micro-batch. `start` is the length of the padded prompts, a Python int of at least 1: another
      value compiles anew. At padding the log-probs have no meaning. The function raises ValueError if `start` is 0, or
      if the mesh cannot split the rows of a micro-batch evenly.
    """

    def log_probs(params: Any, tokens_MBT: jax.Array, valid_MBT: jax.Array, start: int) -> jax.Array:
        options: dict[str, Any] = {"start": start, "temperature": temperature, "chunk": chunk, "group": shared}
        one = functools.partial(token_log_probs, model, params, **options)
        return jax.lax.map(lambda pair: one(*pair), (tokens_MBT, valid_MBT))

    rows = named(mesh, None, "batch")
    return program("log_probs", log_probs, static_argnums=3, out_shardings=rows)


def join(prompts_PT: Any, valid_PT: Any, completions_PGT: Any, mask_PGT: Any) -> tuple[Any, Any]:
    """Repeats each prompt for its group and appends the completions, on the host.

    Args:
      prompts_PT: token ids of the left-padded prompts [P, Tp].
      valid_PT: True at real tokens of the prompts [P, Tp].
      completions_PGT: token ids of the completions [P, G, Tc].
      mask_PGT: 1 on tokens of the completions [P, G, Tc].

    Returns:
      the joined tokens [P * G, Tp + Tc], and True at the real ones among them [P * G, Tp + Tc]. The G rows of a prompt
      follow each other.
    """
    n_prompts, group, length = completions_PGT.shape
    rows = n_prompts * group

    def repeat(x_PT: Any) -> Any:
        return np.repeat(x_PT, group, axis=0)

    tokens_BT = np.concatenate([repeat(prompts_PT), completions_PGT.reshape(rows, length)], axis=1)
    valid_BT = np.concatenate([repeat(valid_PT), mask_PGT.reshape(rows, length) > 0], axis=1)
    return tokens_BT, valid_BT


class Trained(NamedTuple):
    """Advantages and loss mask of scored completions, on the host.

    Attributes:
      adv_PG: advantages of the completions.
      informative_P: True if the rewards of the prompt's group differ.
      mask_PGT: 1 on the tokens that are trained (`loss_mask`).
    """

    adv_PG: np.ndarray
    informative_P: np.ndarray
    mask_PGT: np.ndarray


def trained(rewards_PG: Any, mask_PGT: Any, ended_PG: Any, config: GRPOConfig) -> Trained:
    """Computes the advantages of completions and the mask of the tokens that are trained.

    Args:
      rewards_PG: rewards of the completions [P, G].
      mask_PGT: 1 on tokens of the completions, 0 after their ends [P, G, T]; a NumPy array.
      ended_PG: False if the length limit cut the completion off [P, G]; a NumPy array of bool.
      config: `scale`, `drop_zero_variance` and `mask_overlong` are read.

    Returns:
      a `Trained` of NumPy arrays, computed by `group_advantages` and `loss_mask`.

    Raises:
      ValueError: if a group has fewer than two completions.
    """
    adv_PG, informative_P = jax.device_get(group_advantages(jnp.asarray(rewards_PG), scale=config.scale))
    n_prompts, group, length = mask_PGT.shape
    mask_BT = loss_mask(
        jnp.asarray(mask_PGT.reshape(n_prompts * group, length)),
        jnp.asarray(np.repeat(informative_P, group)),
        jnp.asarray(~ended_PG.reshape(-1)),
        config,
    )
    return Trained(adv_PG, informative_P, np.asarray(mask_BT).reshape(mask_PGT.shape))


def cut_shapes(
    prompt: int, completion: int, prompt_buckets: Sequence[int], completion_buckets: Sequence[int]
) -> list[tuple[int, int]]:
    """The lengths to which a micro-batch may be cut, at most `MOST_SHAPES`.

    Args:
      prompt: Tp of the batch.
      completion: Tc of the batch.
      prompt_buckets, completion_buckets: the lengths to choose from; longer ones than those of the batch are left out.

    Returns:
      pairs (length of the prompt, length of the completion), those with the smallest sum first. The last is
      (`prompt`, `completion`).
    """
    prompts, completions = (
        [n for n in buckets if n < longest] + [longest]
        for buckets, longest in ((prompt_buckets, prompt), (completion_buckets, completion))
    )
    pairs = sorted(itertools.product(prompts, completions), key=lambda pair: (sum(pair), pair))
    if len(pairs) > MOST_SHAPES:
        pairs = [pairs[round(i * (len(pairs) - 1) / (MOST_SHAPES - 1))] for i in range(MOST_SHAPES)]
    return pairs


def make_cases(prompt_buckets: Sequence[int] = (), completion_buckets: Sequence[int] = ()) -> Cases:
    """The `cases` of `make_train_step` for a `PolicyBatch`: what of a micro-batch is computed.

    A micro-batch without a trained token is not computed. Otherwise it is cut to the first of `cut_shapes` that loses
    no real token of a row with a trained token. Other rows may lose tokens; they do not change the loss.

    Args:
      prompt_buckets, completion_buckets: as in `cut_shapes`; without any a micro-batch keeps its lengths.

    Returns:
      the function (micro-batch) -> (case, cuts), in the form that `make_train_step` takes.
    """

    def cases(batch: PolicyBatch) -> tuple[jax.Array, list[Callable[[PolicyBatch], PolicyBatch]]]:
        completion = batch.grpo.mask_BT.shape[1]
        prompt = batch.tokens_BT.shape[1] - completion
        trained_B = jnp.any(batch.grpo.mask_BT > 0, axis=1)
        shapes = cut_shapes(prompt, completion, prompt_buckets, completion_buckets)
        real_T = jnp.any(batch.valid_BT & trained_B[:, None], axis=0)
        fits = [~jnp.any(real_T[: prompt - p]) & ~jnp.any(real_T[prompt + c :]) for p, c in shapes]
        case = jnp.where(jnp.any(trained_B), 1 + jnp.argmax(jnp.stack(fits)), 0)
        return case, [functools.partial(_cut, prompt - p, prompt + c, c) for p, c in shapes]

    return cases


def _cut(first: int, last: int, completion: int, batch: PolicyBatch) -> PolicyBatch:
    """The columns from `first` to `last` of a micro-batch, whose completions then have the length `completion`."""
    grpo, targets = jax.tree.map(lambda x: x[:, :completion] if x.ndim > 1 else x, (batch.grpo, batch.targets))
    tokens_BT, valid_BT = batch.tokens_BT[:, first:last], batch.valid_BT[:, first:last]
    return PolicyBatch(tokens_BT, valid_BT, grpo, batch.teacher_B, targets)


def row_order(mask_PGT: Any, length_PG: Any, shared: int = 1, teacher_P: Any = None) -> np.ndarray:
    """The order of the rows of a batch: rows with a trained token first, and among them the shorter ones first.

    The rows that the loss leaves out thereby fill micro-batches of their own, which the training step does not compute,
    and rows of similar lengths share a micro-batch, which it cuts to their length (`make_cases`). Rows that share the
    computation of their prompt stay together: within each group the rows are ordered and divided into blocks, and then
    the blocks are ordered by their longest row. A block comes last only if it has no trained row at all. Rows, and
    blocks, that compare as equal keep their order.

    Args:
      mask_PGT: 1 on the tokens that are trained [P, G, T].
      length_PG: real tokens of each row, prompt and completion together [P, G].
      shared: rows of a block, a divisor of G.
      teacher_P: number of each prompt's teacher, for a distillation with several: rows of one teacher then stay
        together, and this order holds among them. None: no teachers.

    Returns:
      the numbers of the rows in this order, integers [P * G]; row g of prompt p has the number p * G + g.
    """
    left_out_PG = ~np.asarray(mask_PGT).any(axis=-1)
    length_PG = np.asarray(length_PG)
    order_PG = np.lexsort((length_PG, left_out_PG), axis=-1)
    row_PG = order_PG + length_PG.shape[1] * np.arange(len(length_PG))[:, None]
    blocks = row_PG.reshape(-1, shared)
    longest, left_out = length_PG.reshape(-1)[blocks].max(axis=1), left_out_PG.reshape(-1)[blocks].all(axis=1)
    teacher = () if teacher_P is None else (np.repeat(teacher_P, len(blocks) // len(length_PG)),)
    return blocks[np.lexsort((longest, left_out, *teacher))].reshape(-1)


def policy_batch(
    prompts_PT: Any, valid_PT: Any, completions_PGT: Any, mask_PGT: Any, logp_PGT: Any, trained: Trained,
    n: int, mesh: Mesh, shared: int = 1, teacher_P: Any = None,
) -> PolicyBatch:  # fmt: skip
    """Makes the batch of a training step and puts it on the devices. Its rows are in the order of `row_order`.

    Args:
      prompts_PT: as in `join`.
      valid_PT: as in `join`.
      completions_PGT: as in `join`.
      mask_PGT: as in `join`: all tokens of the completions, also those that are not trained.
      logp_PGT: log-probs of the completions that the sampler recorded, in nats [P, G, Tc]; a NumPy array.
      trained: advantages and loss mask of the completions, from the function `trained`.
      n: number of micro-batches, M; at least 1.
      mesh: the devices; the rows of each micro-batch are split over its axes `data` and `fsdp`.
      shared: as in `row_order`.
      teacher_P: as in `row_order`.

    Returns:
      the batch, every leaf [M, B / M, ...]. Its log-probs of the old and the reference policy and its targets are None.

    Raises:
      UserError: if the rows cannot be divided into n equal micro-batches.
      ValueError: if the mesh cannot split the rows of a micro-batch evenly.
    """
    rows = trained.adv_PG.size
    tokens_BT, valid_BT = join(prompts_PT, valid_PT, completions_PGT, mask_PGT)
    logp_BT, mask_BT = (x.reshape(rows, -1) for x in (logp_PGT, trained.mask_PGT))
    order_B = row_order(trained.mask_PGT, valid_BT.sum(axis=1).reshape(trained.adv_PG.shape), shared, teacher_P)
    teacher_B = None if teacher_P is None else np.repeat(teacher_P, rows // len(teacher_P)).astype(np.int32)[order_B]
    on_host = [x[order_B] for x in (tokens_BT, valid_BT, logp_BT, trained.adv_PG.reshape(-1), mask_BT)]
    tokens, valid, logp, adv, mask, teacher = put(micro_batches([*on_host, teacher_B], n), mesh, None, "batch")
    return PolicyBatch(tokens, valid, GRPOBatch(None, logp, None, adv, mask), teacher)
