"""Samples completions of a batch of prompts on the devices and scores them on the host.

`stages/grpo.py` calls `Rollouts.sample` once per step; evaluation and analysis call it too. It pads the prompts, runs
the compiled sampler of `rollout.py` on them, and gives the texts of the completions to the reward workers
(`rewards/pool.py`). A batch may be sampled in parts: while the workers compute the rewards of one part, the devices
sample the next one.

Letters of shapes: P prompts, G completions per prompt (its group), T tokens.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mdrl_jax.domains.base import Problem
from mdrl_jax.domains.prompts import PromptSet
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel import distributed, preemption
from mdrl_jax.parallel.sharding import batch_divisor, divisor, put
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rl.rollout import (
    Completions,
    SamplingConfig,
    cache_bytes,
    check_finite,
    completion_mask,
    make_sampler,
    stage_key,
)
from mdrl_jax.section import section


@section
class RolloutConfig:
    """Sampling of training completions, and the lengths that prompts and completions are rounded up to.

    Every length in use is compiled once. The last prompt bucket is the longest prompt allowed, and the last completion
    bucket is the longest completion.

    Attributes:
      sampling: temperature, top-p and top-k.
      prompt_buckets: lengths in tokens that prompts are padded to, ascending.
      completion_buckets: lengths in tokens that completions are cut to after sampling, ascending.
      parts: number of equal parts in which a step's prompts are sampled. The rewards of one part are computed while the
        next part is sampled.
      cache_gib: memory, in GiB per device, that keys and values of prompts and completions may take. Prompts for which
        there is no room wait until others have ended. 0: no limit.
    """

    sampling: SamplingConfig = SamplingConfig()
    prompt_buckets: tuple[int, ...] = (16,)
    completion_buckets: tuple[int, ...] = (16,)
    parts: int = 1
    cache_gib: float = 0.0


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
    """Sampled completions of a batch of prompts, on the host, with their rewards.

    Attributes:
      prompts_PT: token ids of the left-padded prompts.
      valid_PT: True where a prompt has a token, False on padding.
      completions: token ids, log-probs, lengths and whether each ended, [P, G, ...].
      mask_PGT: 1 on the tokens of a completion, its end token included; 0 after the end.
      rewards_PG: rewards in [0, 1].
      accuracy_PG: accuracy in [0, 1], which judges the content regardless of its style.
      errors: number of rewards that could not be computed, by kind of error; each of them counts as 0.
    """

    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    completions: Completions
    mask_PGT: np.ndarray
    rewards_PG: np.ndarray
    accuracy_PG: np.ndarray
    errors: Mapping[str, int]

    def cut(self, buckets: Sequence[int]) -> "ScoredRollouts":
        """These rollouts with the arrays of completions cut to a shorter T; no token of a completion is lost.

        Args:
          buckets: allowed values of T in tokens, ascending, at least one. The smallest that holds the longest
            completion is taken. If it is not below the present T, nothing is cut.

        Returns:
          new rollouts, whose `completions` and `mask_PGT` are shorter; this object does not change.

        Raises:
          UserError: if the longest completion is longer than the last bucket.
        """
        done = self.completions
        length = tokens.bucket(int(done.length_PG.max()), buckets, "a completion")
        tokens_PGT, logp_PGT, mask_PGT = (x[:, :, :length] for x in (done.tokens_PGT, done.logp_PGT, self.mask_PGT))
        shorter = dataclasses.replace(done, tokens_PGT=tokens_PGT, logp_PGT=logp_PGT)
        return dataclasses.replace(self, completions=shorter, mask_PGT=mask_PGT)


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A part of a batch that the devices are still sampling; reading `completions` waits for them."""

    problems: list[tuple[PromptSet, Problem]]
    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    completions: Completions


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """Samples and scores batches of prompts; only `spent` changes from call to call.

    Attributes:
      model: the decoder.
      mesh: the devices.
      tokenizer: the model's tokenizer.
      eos_ids: ids of the tokens that end a completion.
      config: section `rollout` of the configuration.
      pool: worker processes that compute rewards.
      max_error_share: share of the rewards of a part that may fail; above it the run ends with an error.
      spent: tokens so far, by what was computed of them (`model.flops.FORWARDS`). Sampling counts "read" in prompts (a
        prompt counts once for its whole group) and "sampled" in completions; whoever trains or differentiates adds the
        other kinds. "operations" is no kind of tokens: it counts operations on parameters.
    """

    model: Decoder
    mesh: Mesh
    tokenizer: Any
    eos_ids: tuple[int, ...]
    config: RolloutConfig
    pool: RewardPool
    max_error_share: float
    spent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def pad_id(self) -> int:
        """The id of the padding token (`tokens.pad_id`)."""
        return tokens.pad_id(self.tokenizer, self.eos_ids, self.model.config.vocab_size)

    @functools.cache  # noqa: B019  (one object lives as long as the process)
    def sampler(self, group_size: int, sampling: SamplingConfig) -> Any:
        """The compiled sampler for groups of this size; calls with equal arguments return the same one.

        It decodes as many prompts at once as `rollout.cache_gib` has room for.

        Args:
          group_size: completions per prompt.
          sampling: temperature, top-k and top-p.

        Returns:
          the jitted function of `make_sampler`.

        Raises:
          UserError: if a device has no room for the completions of one prompt.
        """
        return make_sampler(
            self.model,
            f"sample_{group_size}",
            group_size=group_size,
            max_new_tokens=self.config.completion_buckets[-1],
            eos_ids=self.eos_ids,
            sampling=sampling,
            at_once=prompts_at_once(self.config, self.model, self.mesh, group_size),
        )

    def sample(
        self,
        params: Any,
        sets: list[tuple[PromptSet, np.ndarray]],
        key_path: tuple[int, str, int],
        group_size: int,
        sampling: SamplingConfig,
        parts: int = 1,
        show: Callable[[int], None] = lambda part: None,
    ) -> ScoredRollouts:
        """Samples and scores `group_size` completions of the chosen rows of each prompt set.

        With several parts, one part is scored while the devices sample the next. With several processes, each process
        scores its share of the completions, and all processes get all scores; every process has to make the call. The
        call adds to `spent`, also if it fails after sampling, and the pool counts the errors of rewards.

        Args:
          params: parameters of the policy.
          sets: (prompt set, row numbers in it, an integer array [n]) of each domain; the batch is all these rows, in
            this order. P is their number, at least 1. With several parts, prompts of one bucket are sampled together.
          key_path: (seed, stage name, step), which the sampling keys are folded from.
          group_size: completions per prompt.
          sampling: temperature, top-p and top-k.
          parts: number of equal parts; it must divide the number of prompts.
          show: called with the index of each part, from 0, before it is sampled.

        Returns:
          all completions with their rewards. Prompts are padded to the smallest bucket that holds the longest one, and
          completions to the last bucket (`ScoredRollouts.cut` shortens them).

        Raises:
          UserError: if more than `max_error_share` of a part's rewards fail, a prompt is longer than the last bucket, a
            device has no room for the completions of one prompt, the reward `code` finds no sandbox that works, the
            file of a streamed data set was changed since it was indexed, or the policy's logits are not finite.
          AssertionError: if `parts` does not divide the number of prompts.
          ValueError: if there are no prompts, or the mesh cannot split the prompts of a part evenly.
          IndexError: if a prompt set has no row of a given number.
          TypeError: if the check of a problem is not JSON-serialisable.
          RuntimeError: if reward workers do not start, or the pool is closed.
          HostLost: if another process does not share its scores within the time-out.
          Dropped: if the run must end (`preemption`); the devices may still be sampling then.
        """
        rows = [prompts.tokens[i] for prompts, chosen in sets for i in chosen]
        problems = [(prompts, prompts.problems[i]) for prompts, chosen in sets for i in chosen]
        ids_P3 = _told_apart(np.concatenate([prompts.ids(chosen) for prompts, chosen in sets]))
        length_P = [tokens.bucket(len(row), self.config.prompt_buckets, "a prompt") for row in rows]
        size = len(rows) // parts
        assert size * parts == len(rows), "the number of prompts must be a multiple of parts"
        sampler, key = self.sampler(group_size, sampling), stage_key(*key_path)
        # Prompts of one bucket are sampled together, so that few are padded to the length of a longer one.
        order_P = np.argsort(length_P, kind="stable")

        def launch(part: int) -> _Launched:
            show(part)
            of = order_P[part * size : (part + 1) * size]
            padded = tokens.left_pad([rows[i] for i in of], max(length_P[i] for i in of), self.pad_id)
            return self._launch(sampler, params, key, [problems[i] for i in of], *padded, ids_P3[of])

        scored, launched = [], launch(0)
        for part in range(1, parts):
            following = launch(part)
            scored.append(self._score(launched))
            launched = following
        scored.append(self._score(launched))
        place_P = np.argsort(order_P)
        return picked(scored, [divmod(int(i), size) for i in place_P], self.config.prompt_buckets, self.pad_id)

    def text(self, done: Completions, prompt: int, sample: int) -> str:
        """The text of one completion, without special tokens.

        Args:
          done: completions on the host.
          prompt: index of the prompt, from 0 to P - 1.
          sample: index of the completion within the prompt's group, from 0 to G - 1.

        Returns:
          the text, decoded from the tokens up to the completion's length.
        """
        row = done.tokens_PGT[prompt, sample, : done.length_PG[prompt, sample]]
        return self.tokenizer.decode(row.tolist(), skip_special_tokens=True)

    def _launch(
        self,
        sampler: Callable[..., Completions],
        params: Any,
        key: jax.Array,
        problems: list[tuple[PromptSet, Problem]],
        prompts_PT: np.ndarray,
        valid_PT: np.ndarray,
        ids_P3: np.ndarray,
    ) -> _Launched:
        on_device = put((prompts_PT, valid_PT, ids_P3), self.mesh)
        return _Launched(problems, prompts_PT, valid_PT, sampler(params, *on_device[:2], key, on_device[2]))

    def _score(self, launched: _Launched) -> ScoredRollouts:
        preemption.until_ready(launched.completions)
        done: Completions = distributed.gather(launched.completions)
        check_finite(done)
        mask_PGT = completion_mask(done.length_PG, done.tokens_PGT.shape[-1])
        self.spent.update(read=int(launched.valid_PT.sum()), sampled=int(done.length_PG.sum()))
        shape = done.length_PG.shape

        def request(i: int) -> tuple[str, str, Any]:
            prompts, problem = launched.problems[i // shape[1]]
            return prompts.reward, self.text(done, *divmod(i, shape[1])), problem.check

        try:
            own = self.pool.score([request(i) for i in distributed.part(done.length_PG.size)])
            mine = [(s.reward, s.accuracy, s.error) for s in own]
        except preemption.Dropped:
            mine = None  # the other processes wait for the scores, so they have to hear that there are none
        shared = distributed.share(mine)
        if None in shared:
            raise preemption.Dropped
        scores = [Score(*fields) for of_process in shared for fields in of_process]
        failed = [i for i, s in enumerate(scores) if s.error is not None]
        if len(failed) > self.max_error_share * len(scores):
            name, text, _ = request(failed[0])
            raise UserError(
                f"reward {name} failed on {len(failed)} of {len(scores)} completions, "
                f"more than rewards.max_error_share allows; first: {scores[failed[0]].error} on {text[:60]!r}"
            )
        return ScoredRollouts(
            prompts_PT=launched.prompts_PT,
            valid_PT=launched.valid_PT,
            completions=done,
            mask_PGT=mask_PGT,
            rewards_PG=np.asarray([s.reward for s in scores], np.float32).reshape(shape),
            accuracy_PG=np.asarray([s.accuracy for s in scores], np.float32).reshape(shape),
            errors=collections.Counter(s.kind for s in scores if s.error),
        )


def _told_apart(ids_P2: np.ndarray) -> np.ndarray:
    """Adds to the ids of each prompt how often it has occurred before in the batch, so that no draw is made twice."""
    seen: collections.Counter[bytes] = collections.Counter()
    before_P = []
    for ids in ids_P2:
        before_P.append(seen[ids.tobytes()])
        seen[ids.tobytes()] += 1
    return np.column_stack([ids_P2, np.asarray(before_P, np.uint32)])


def _fields(scored: ScoredRollouts) -> dict[str, Any]:
    return {f.name: getattr(scored, f.name) for f in dataclasses.fields(scored) if f.name != "errors"}


def picked(
    rounds: Sequence[ScoredRollouts], picks: Sequence[tuple[int, int]], buckets: Sequence[int], pad: int
) -> ScoredRollouts:
    """Chosen prompts of several batches, with their completions, as one batch.

    Args:
      rounds: the batches; all have the same number of completions of a prompt, of the same largest length.
      picks: (number of the batch, row in it) of each chosen prompt, from 0; at least one.
      buckets: lengths in tokens that prompts may be padded to, ascending; the smallest that holds all is taken.
      pad: id of the token that prompts are padded with.

    Returns:
      the batch, in the order of `picks`. Its errors are those of all completions of all batches, chosen or not.

    Raises:
      UserError: if a prompt is longer than the last bucket.
    """
    longest = max(int(rounds[number].valid_PT[row].sum()) for number, row in picks)
    length = tokens.bucket(longest, buckets, "a prompt")

    def padded(row_T: np.ndarray, fill: Any) -> np.ndarray:
        return np.concatenate([np.full(max(length - len(row_T), 0), fill, row_T.dtype), row_T[-length:]])

    rows = [jax.tree.map(lambda x, row=row: x[row], _fields(rounds[number])) for number, row in picks]
    for row in rows:
        row["prompts_PT"], row["valid_PT"] = padded(row["prompts_PT"], pad), padded(row["valid_PT"], False)
    errors = sum((collections.Counter(scored.errors) for scored in rounds), collections.Counter())
    return ScoredRollouts(**jax.tree.map(lambda *arrays: np.stack(arrays), *rows), errors=errors)


def prompts_at_once(config: RolloutConfig, model: Decoder, mesh: Mesh, group_size: int) -> int:
    """Number of prompts, on all devices together, whose keys and values fit in `cache_gib` per device.

    A prompt counts with its group of completions, and all of them with the last bucket, i.e. with their largest length.

    Args:
      config: section `rollout` of the configuration.
      model: the decoder.
      mesh: the devices; prompts are split over `data` and `fsdp`, heads over `tensor`.
      group_size: completions per prompt.

    Returns:
      the number, a multiple of the number of parts that the mesh splits batch rows into; 0, which stands for no limit,
      if `cache_gib` is 0.

    Raises:
      UserError: if a device has no room for the completions of one prompt.
    """
    if not config.cache_gib:
        return 0
    each = cache_bytes(model, group_size, config.prompt_buckets[-1], config.completion_buckets[-1])
    each //= divisor(mesh, "kv_heads")
    fit = int(config.cache_gib * 2**30 // each)
    if fit < 1:
        raise UserError(
            f"rollout.cache_gib={config.cache_gib} is too small: the keys and values of one prompt "
            f"and its {group_size} completions take {each / 2**30:.3g} GiB on each device"
        )
    return fit * batch_divisor(mesh)
