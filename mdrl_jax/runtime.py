"""What every stage of a run shares: mesh, model, tokenizer, prompts, reward pool and compiled samplers."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax import tokens
from mdrl_jax.config import EMBEDDED_MODEL, Config, RewardSection, RolloutSection, stage_config
from mdrl_jax.domains.base import Domain, Problem
from mdrl_jax.domains.chat import PLAIN
from mdrl_jax.domains.datasets import SPLITS
from mdrl_jax.domains.prompts import PromptSet, notes, tokenize
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.model import attention, huggingface
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, causal_attention, param_shapes
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.sharding import batch_divisor, divisor, make_mesh, param_shardings, put
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rl.rollout import (
    Completions,
    SamplingConfig,
    cache_bytes,
    completion_mask,
    make_sampler,
    stage_key,
)

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
    rewards_PG: np.ndarray
    accuracy_PG: np.ndarray
    errors: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A part of a batch whose completions the devices are sampling."""

    problems: list[tuple[PromptSet, Problem]]
    prompts_PT: np.ndarray
    valid_PT: np.ndarray
    completions: Completions


@dataclasses.dataclass(frozen=True, eq=False)
class Runtime:
    """Built once a run by `build`; nothing in it changes but `spent`, which counts tokens read and sampled.

    `notes` are lines for the log: what was found in data sets, and which attention was chosen.
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
        """The compiled sampler for groups of this size; as many prompts at once as `rollout.cache_gib` holds."""
        return make_sampler(
            self.model,
            f"sample_{group}",
            group=group,
            max_new_tokens=self.config.rollout.completion_buckets[-1],
            end=self.end,
            sampling=sampling,
            at_once=prompts_at_once(self.config.rollout, self.model, self.mesh, group),
        )

    def sample(
        self,
        params: Any,
        sets: list[tuple[PromptSet, np.ndarray]],
        key_of: tuple[int, str, int],
        group: int,
        sampling: SamplingConfig,
        parts: int = 1,
        show: Callable[[int], None] = lambda part: None,
    ) -> Judged:
        """Samples and judges `group` completions of the chosen rows of each prompt set.

        `key_of` is (seed, stage, step). Prompts are padded to the smallest bucket that holds the longest. Of several
        `parts` of as many prompts each, one is judged while the devices sample the next; `show` is told which. Each
        process judges its share of the completions.

        Raises:
          UserError: if more than `rewards.max_error_share` of the rewards raise.
        """
        rows = [prompts.tokens[i] for prompts, chosen in sets for i in chosen]
        problems = [(prompts, prompts.problems[i]) for prompts, chosen in sets for i in chosen]
        ids_P = np.concatenate([prompts.ids(chosen) for prompts, chosen in sets])
        length = tokens.bucket(max(map(len, rows)), self.config.rollout.prompt_buckets, "a prompt")
        prompts_PT, valid_PT = tokens.left_pad(rows, length, tokens.pad_id(self.tokenizer))
        size = len(rows) // parts
        assert size * parts == len(rows), "prompts do not divide into parts"
        sampler, key = self.sampler(group, sampling), stage_key(*key_of)

        def launch(part: int) -> _Launched:
            show(part)
            of = slice(part * size, (part + 1) * size)
            return self._launch(sampler, params, key, problems[of], prompts_PT[of], valid_PT[of], ids_P[of])

        judged, launched = [], launch(0)
        for part in range(1, parts):
            following = launch(part)
            judged.append(self._judge(launched))
            launched = following
        return _joined([*judged, self._judge(launched)])

    def _launch(
        self,
        sampler: Callable[..., Completions],
        params: Any,
        key: jax.Array,
        problems: list[tuple[PromptSet, Problem]],
        prompts_PT: np.ndarray,
        valid_PT: np.ndarray,
        ids_P: np.ndarray,
    ) -> _Launched:
        on_device = put((prompts_PT, valid_PT, ids_P), self.mesh)
        return _Launched(problems, prompts_PT, valid_PT, sampler(params, *on_device[:2], key, on_device[2]))

    def _judge(self, launched: _Launched) -> Judged:
        done: Completions = distributed.gather(launched.completions)
        mask_PGT = completion_mask(done.length_PG, done.tokens_PGT.shape[-1])
        self.spent.update(read=int(launched.valid_PT.sum()), sampled=int(done.length_PG.sum()))
        shape = done.length_PG.shape

        def request(i: int) -> tuple[str, str, Any]:
            prompts, problem = launched.problems[i // shape[1]]
            return prompts.reward, self.text(done, *divmod(i, shape[1])), problem.check

        mine = self.pool.score([request(i) for i in distributed.part(done.length_PG.size)])
        shared = distributed.share([(s.reward, s.accuracy, s.error) for s in mine])
        scores = [Score(*fields) for of_process in shared for fields in of_process]
        failed = [i for i, s in enumerate(scores) if s.error is not None]
        if len(failed) > self.config.rewards.max_error_share * len(scores):
            name, text, _ = request(failed[0])
            raise UserError(
                f"reward {name} failed on {len(failed)} of {len(scores)} completions "
                f"(limit: rewards.max_error_share); first: {scores[failed[0]].error} on {text[:60]!r}"
            )
        return Judged(
            prompts_PT=launched.prompts_PT,
            valid_PT=launched.valid_PT,
            completions=done,
            mask_PGT=mask_PGT,
            rewards_PG=np.asarray([s.reward for s in scores], np.float32).reshape(shape),
            accuracy_PG=np.asarray([s.accuracy for s in scores], np.float32).reshape(shape),
            errors=collections.Counter(s.kind for s in scores if s.error),
        )

    def text(self, done: Completions, prompt: int, sample: int) -> str:
        """One completion as text."""
        row = done.tokens_PGT[prompt, sample, : done.length_PG[prompt, sample]]
        return self.tokenizer.decode(row.tolist(), skip_special_tokens=True)


def _joined(parts: list[Judged]) -> Judged:
    if len(parts) == 1:
        return parts[0]
    errors = sum((collections.Counter(part.errors) for part in parts), collections.Counter())
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *map(_fields, parts))
    return Judged(**whole, errors=errors)


def _fields(judged: Judged) -> dict[str, Any]:
    return {f.name: getattr(judged, f.name) for f in dataclasses.fields(judged) if f.name != "errors"}


def prompts_at_once(section: RolloutSection, model: Decoder, mesh: Mesh, group: int) -> int:
    """Prompts whose completions a device has room for, over all devices; 0: no limit.

    Raises:
      UserError: if a device has no room for those of one prompt.
    """
    if not section.cache_gib:
        return 0
    each = cache_bytes(model, group, section.prompt_buckets[-1], section.completion_buckets[-1])
    each //= divisor(mesh, "kv_heads")
    fit = int(section.cache_gib * 2**30 // each)
    if fit < 1:
        raise UserError(
            f"rollout.cache_gib={section.cache_gib} is too small: keys and values of one prompt, "
            f"sampled {group} times, take {each / 2**30:.3g} GiB of a device"
        )
    return fit * batch_divisor(mesh)


def make_pool(section: RewardSection) -> RewardPool:
    """The reward workers of a config, to be used as a context manager."""
    s = section
    return RewardPool(s.workers, s.cpu_seconds, s.memory_mb, s.deadline_seconds, s.sandbox)


def decoder(config: Config, sizes: ModelConfig, mesh: Mesh) -> Decoder:
    """The model of a run, with the attention that its longest batches need.

    Raises:
      UserError: for prompts and completions that are longer than the model takes.
    """
    prompt, completion = config.rollout.prompt_buckets[-1], config.rollout.completion_buckets[-1]
    if prompt + completion > sizes.max_positions:
        raise UserError(
            f"rollout: prompts and completions may be {prompt + completion} tokens long together, but the model "
            f"{config.model.path} takes {sizes.max_positions}"
        )
    model = Decoder(sizes, DTYPES[config.model.dtype], config.model.remat)
    trained, sampled = 1, max(config.evaluate.batch, config.analyze.batch)
    for stage in config.stages:
        train = stage_config(config, stage)
        trained = max(trained, train.prompts * train.group // train.micro_batches)
        sampled = max(sampled, train.prompts // config.rollout.parts)
    sampled = min(sampled, prompts_at_once(config.rollout, model, mesh, 1) or sampled)
    uses = (
        (trained, prompt + completion),
        (sampled, prompt),
        (config.sft.batch_size // config.sft.micro_batches, config.sft.length),
    )
    rows, length = max(uses, key=lambda use: use[0] * use[1] ** 2)
    fused = attention.splash if mesh.devices.flat[0].platform == "tpu" else attention.blockwise
    here, heads = -(-rows // batch_divisor(mesh)), sizes.n_heads // divisor(mesh, "heads")
    chosen = attention.choose(here, heads, length, config.model.score_bytes, causal_attention, fused)
    return dataclasses.replace(model, attention=chosen)


def build(config: Config, pool: RewardPool) -> Runtime:
    """Reads model and tokenizer, makes mesh and domains, and refuses what cannot work before anything runs.

    Raises:
      UserError: for a missing or unsupported model, prompts that are too long, sizes the mesh does not divide.
    """
    folder = model_folder(config.model.path)
    sizes = huggingface.read_config(folder)
    tokenizer = tokens.load_tokenizer(folder)
    mesh = make_mesh(config.mesh)
    model = decoder(config, sizes, mesh)
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
    told.append(f"attention of training, log-probs and prefill: {model.attention.__name__}")
    parts = batch_divisor(mesh)
    if config.evaluate.batch % parts:
        raise UserError(f"evaluate.batch={config.evaluate.batch} is not divisible by the mesh's data * fsdp = {parts}")
    prompts_at_once(config.rollout, model, mesh, config.evaluate.samples)  # refuses before anything is written
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
