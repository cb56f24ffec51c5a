"""What every stage of a run shares: mesh, model, tokenizer, prompts, reward pool and compiled samplers."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax import tokens
from mdrl_jax.config import EMBEDDED_MODEL, Config, RewardSection
from mdrl_jax.domains.base import Domain
from mdrl_jax.domains.chat import PLAIN
from mdrl_jax.domains.datasets import SPLITS
from mdrl_jax.domains.prompts import PromptSet, notes, tokenize
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import batch_divisor, make_mesh, param_shardings, put
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rl.rollout import Completions, SamplingConfig, completion_mask, make_sampler, stage_key

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def model_folder(path: str) -> Path:
    """The folder a model path names; "tiny" is the base model shipped with the package."""
    return EMBEDDED_MODEL if path == "tiny" else Path(path)


@dataclasses.dataclass(frozen=True)
class Judged:
    """Sampled completions of a batch of prompts, on the host, with their scores [P, G]."""

    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    completions: Completions
    mask_PGT: np.ndarray
    texts: list[list[str]]
    rewards_PG: np.ndarray
    accuracy_PG: np.ndarray
    errors: Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Runtime:
    """Built once a run by `build`; nothing in it changes but `spent`, which counts tokens read and sampled.

    `notes` are lines for the log: what was found in data sets.
    """

    config: Config
    mesh: Mesh
    model: Decoder
    tokenizer: Any
    end: tuple[int, ...]
    shapes: Any
    shardings: Any
    domains: dict[str, Domain]
    prompts: dict[tuple[str, str], PromptSet]
    pool: RewardPool
    notes: tuple[str, ...] = ()
    spent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def data(self) -> dict[str, Any]:
        """Of each data set: rows, bad ones, repeats, prompts that were too long, and fingerprints of what was kept."""
        return {
            name: {**domain.data.record, "splits": {split: self.prompts[name, split].record for split in SPLITS}}
            for name, domain in self.domains.items()
            if domain.data
        }

    def base_params(self) -> Any:
        """Parameters the first stage starts from."""
        section = self.config.model
        if section.weights == "random":
            return huggingface.random_params(self.model, self.mesh, self.config.seed)
        return huggingface.load(model_folder(section.path), self.model, self.mesh)

    @functools.cache  # noqa: B019  (one runtime lives as long as the process)
    def sampler(self, group: int, sampling: SamplingConfig) -> Any:
        """The compiled sampler for groups of this size."""
        return make_sampler(
            self.model,
            f"sample_{group}",
            group=group,
            max_new_tokens=self.config.rollout.completion_buckets[-1],
            end=self.end,
            sampling=sampling,
        )

    def sample(
        self,
        params: Any,
        sets: list[tuple[PromptSet, np.ndarray]],
        key_of: tuple[int, str, int],
        group: int,
        sampling: SamplingConfig,
    ) -> Judged:
        """Samples and judges `group` completions of the chosen rows of each prompt set.

        `key_of` is (seed, stage, step). Prompts are padded to the smallest bucket that holds the longest.

        Raises:
          UserError: if more than `rewards.max_error_share` of the rewards raise.
        """
        rows = [prompts.tokens[i] for prompts, chosen in sets for i in chosen]
        problems = [(prompts, prompts.problems[i]) for prompts, chosen in sets for i in chosen]
        ids_P = np.concatenate([prompts.ids(chosen) for prompts, chosen in sets])
        buckets = self.config.rollout.prompt_buckets
        length = tokens.bucket(max(map(len, rows)), buckets, "a prompt")
        prompts_PT, valid_PT = tokens.left_pad(rows, length, tokens.pad_id(self.tokenizer))
        on_device = put((prompts_PT, valid_PT, ids_P), self.mesh)
        sampler = self.sampler(group, sampling)
        done: Completions = jax.device_get(
            sampler(params, on_device[0], on_device[1], stage_key(*key_of), on_device[2])
        )
        mask_PGT = completion_mask(done.length_PG, done.tokens_PGT.shape[-1])
        self.spent.update(read=int(valid_PT.sum()), sampled=int(done.length_PG.sum()))
        texts = [
            [self._text(row[:n]) for row, n in zip(group_rows, lengths, strict=True)]
            for group_rows, lengths in zip(done.tokens_PGT, done.length_PG, strict=True)
        ]
        requests = [
            (prompts.reward, text, problem.check)
            for (prompts, problem), group_texts in zip(problems, texts, strict=True)
            for text in group_texts
        ]
        scores = self.pool.score(requests)
        self._check_errors(scores, requests)
        shape = done.length_PG.shape
        return Judged(
            prompts_PT=prompts_PT,
            valid_PT=valid_PT,
            completions=done,
            mask_PGT=mask_PGT,
            texts=texts,
            rewards_PG=np.asarray([s.reward for s in scores], np.float32).reshape(shape),
            accuracy_PG=np.asarray([s.accuracy for s in scores], np.float32).reshape(shape),
            errors=collections.Counter(s.kind for s in scores if s.error),
        )

    def _text(self, row: np.ndarray) -> str:
        return self.tokenizer.decode(row.tolist(), skip_special_tokens=True)

    def _check_errors(self, scores: list[Score], requests: list[Any]) -> None:
        failed = [i for i, s in enumerate(scores) if s.error is not None]
        if len(failed) > self.config.rewards.max_error_share * len(scores):
            name, text, _ = requests[failed[0]]
            raise UserError(
                f"reward {name} failed on {len(failed)} of {len(scores)} completions "
                f"(limit: rewards.max_error_share); first: {scores[failed[0]].error} on {text[:60]!r}"
            )


def make_pool(section: RewardSection) -> RewardPool:
    """The reward workers of a config, to be used as a context manager."""
    s = section
    return RewardPool(s.workers, s.cpu_seconds, s.memory_mb, s.deadline_seconds, s.sandbox)


def build(config: Config, pool: RewardPool) -> Runtime:
    """Reads model and tokenizer, makes mesh and domains, and refuses what cannot work before anything runs.

    Raises:
      UserError: for a missing or unsupported model, prompts that are too long, sizes the mesh does not divide.
    """
    folder = model_folder(config.model.path)
    model_config = huggingface.read_config(folder)
    tokenizer = tokens.load_tokenizer(folder)
    longest = config.rollout.prompt_buckets[-1] + config.rollout.completion_buckets[-1]
    if longest > model_config.max_positions:
        raise UserError(
            f"rollout: prompts and completions may be {longest} tokens long together, but the model "
            f"in {folder} takes {model_config.max_positions}"
        )
    mesh = make_mesh(config.mesh)
    model = Decoder(model_config, DTYPES[config.model.dtype], config.model.remat)
    boxed = param_shapes(model)
    names = tuple(dict.fromkeys(config.scored_domains))
    domains = make_domains(names, config.domains)
    limit = config.rollout.prompt_buckets[-1]
    prompts = {
        (name, split): tokenize(domain, split, tokenizer, limit) for name, domain in domains.items() for split in SPLITS
    }
    told = [note for name, d in domains.items() for note in notes(d, {split: prompts[name, split] for split in SPLITS})]
    if told and not tokenizer.chat_template:
        told.append(f"{folder} has no chat template; prompts of data sets are {PLAIN!r}")
    parts = batch_divisor(mesh)
    if config.evaluate.batch % parts:
        raise UserError(f"evaluate.batch={config.evaluate.batch} is not divisible by the mesh's data * fsdp = {parts}")
    return Runtime(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        end=tokens.end_ids(tokenizer),
        shapes=nn.unbox(boxed),
        shardings=param_shardings(mesh, boxed),
        domains=domains,
        prompts=prompts,
        pool=pool,
        notes=tuple(told),
    )
