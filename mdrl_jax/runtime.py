"""Builds what all stages of a run share: the model, the mesh, the tokenizer, the domains and their prompts.

`build` makes one `Runtime` for the whole run. It also checks that sizes, prompts and model fit together, before
anything is trained or written.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax.config import EMBEDDED_MODEL, Config, RewardSection, is_supervised, sft_config, stage_config
from mdrl_jax.domains.base import Domain
from mdrl_jax.domains.chat import PLAIN, writes_date
from mdrl_jax.domains.datasets import SPLITS
from mdrl_jax.domains.demonstrations import Demonstrations, demonstrations
from mdrl_jax.domains.prompts import PromptSet, notes, tokenize
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.model import attention, huggingface, tokens
from mdrl_jax.model.attention import causal_attention
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.sharding import batch_divisor, divisor, make_mesh, param_shardings
from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rl.rollouts import Rollouts, prompts_at_once

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_folder(path: str) -> Path:
    """The folder of a model, which may not exist.

    Args:
      path: a Hugging Face folder; "tiny" for the base model that comes with the package; or "hub:" and the name of a
        model of the Hugging Face hub, which may be downloaded (`ModelSection.path`). "hub:" may be left out of a name
        such as "Qwen/Qwen2.5-0.5B" if there is no folder of that name.

    Raises:
      UserError: if a model of the hub cannot be had (`huggingface.downloaded`).
    """
    hub = path.startswith("hub:") or (HUB_NAME.fullmatch(path) and not Path(path).exists())
    if hub:
        return huggingface.downloaded(path.removeprefix("hub:"))
    return EMBEDDED_MODEL if path == "tiny" else Path(os.path.expanduser(path))


@dataclasses.dataclass(frozen=True, eq=False)
class Runtime:
    """The fixed parts of a run, made once by `build`; only the counter `rollouts.spent` changes.

    Attributes:
      config: the whole configuration.
      mesh: the devices, as `data x fsdp x tensor`.
      model: the decoder, without parameters.
      tokenizer: the model's tokenizer.
      shapes: tree of the parameters' shapes and dtypes (`jax.ShapeDtypeStruct`).
      shardings: tree of the parameters' `NamedSharding`s.
      domains: the scored domains by name.
      prompts: tokenized prompts by (domain, split), for the splits "train", "validation" and "test".
      rollouts: samples and scores batches of prompts.
      notes: lines for the log, about the data sets and the attention that was chosen.
    """

    config: Config
    mesh: Mesh
    model: Decoder
    tokenizer: Any
    shapes: Any
    shardings: Any
    domains: dict[str, Domain]
    prompts: dict[tuple[str, str], PromptSet]
    rollouts: Rollouts
    notes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """The record `data.json`: for each data set, the rows read and left out, and fingerprints of its prompts.

        Returns:
          Name of a domain -> `Data.record`, with the `PromptSet.record` of each split under "splits". Domains without
          a data set are left out.
        """
        return {
            name: {**domain.data.record, "splits": {split: self.prompts[name, split].record for split in SPLITS}}
            for name, domain in self.domains.items()
            if domain.data
        }

    @functools.cache  # noqa: B019  (one object lives as long as the process)
    def demonstrations(self, domain: str, longest: int, pretraining: bool = False) -> Demonstrations:
        """The rows of a domain that a supervised stage trains on; calls with equal arguments return the same object.

        Args:
          domain: name of a scored domain.
          longest: the largest length of prompt and reply together, in tokens.
          pretraining: whether a procedural domain also shows problems that only a base model may see.

        Returns:
          Rows of the training prompts, or of `Domain.pretraining`.

        Raises:
          UserError: as in `domains.demonstrations.demonstrations`.
          KeyError: if the domain is not scored.
        """
        made = self.domains[domain]
        problems = made.pretraining if pretraining and made.pretraining else self.prompts[domain, "train"].problems
        return demonstrations(made, problems, self.tokenizer, self.rollouts.eos_ids, longest)

    def base_params(self) -> Any:
        """Loads, or for `model.weights` "random" draws, the parameters of the base model; each call makes new arrays.

        Random parameters are drawn from the run's seed, so they have the same values at each call.

        Returns:
          A tree of float32 parameters on the devices, placed by `shardings`.

        Raises:
          UserError: if the model folder's weights cannot be read, are quantized or do not fit its config.json.
        """
        section = self.config.model
        if section.weights == "random":
            return huggingface.random_params(self.model, self.mesh, self.config.seed)
        whole = model_folder(section.path)
        if section.adapter:
            return huggingface.load(section.adapter, self.model, self.mesh, whole)
        return huggingface.load(whole, self.model, self.mesh)


def make_pool(section: RewardSection) -> RewardPool:
    """Starts the reward workers of a config; use the pool as a context manager, which ends them.

    Its `score` raises `preemption.Dropped` if the run must end.

    Args:
      section: section `rewards` of the configuration.

    Raises:
      UserError: if `rewards.sandbox` is "bwrap" and bubblewrap does not work here.
      ValueError: if a value is out of its range, which `config.parse` refuses.
    """
    s = section
    give_up = preemption.give_up_if_told
    return RewardPool(s.workers, s.cpu_seconds, s.memory_mb, s.deadline_seconds, s.sandbox, s.packages, give_up)


def decoder(config: Config, sizes: ModelConfig, mesh: Mesh) -> Decoder:
    """The model of a run, with an attention that fits the largest batches of its training, log-probs and prefill.

    It is `causal_attention`, which holds the logits of a whole layer, if these take at most
    `model.attention_logit_bytes` of a device. Otherwise it is `attention.splash` on TPU and `attention.blockwise`
    elsewhere, and in models with sliding layers.

    Args:
      config: the whole configuration.
      sizes: sizes of the model, from `huggingface.read_config`.
      mesh: the devices.

    Returns:
      The decoder, without parameters.

    Raises:
      UserError: if prompt and completion together may be longer than the model allows, or if `rollout.cache_gib` has no
        room for one prompt with one completion.
      KeyError: if `model.dtype` is not in `DTYPES`, which `config.parse` refuses.
    """
    prompt, completion = config.rollout.prompt_buckets[-1], config.rollout.completion_buckets[-1]
    if prompt + completion > sizes.max_positions:
        raise UserError(
            f"rollout: the longest prompt and completion have {prompt + completion} tokens together, but the model "
            f"{config.model.path} allows {sizes.max_positions}; lower the last prompt_buckets or completion_buckets"
        )
    model = Decoder(sizes, DTYPES[config.model.dtype], config.model.remat)
    trained, sampled = 1, max(config.evaluate.batch, config.analyze.batch)
    for stage in config.stages:
        train = stage_config(config, stage)
        trained = max(trained, train.prompts_per_step * train.group_size // train.grad_accum_steps)
        sampled = max(sampled, train.prompts_per_step // config.rollout.parts)
    sampled = min(sampled, prompts_at_once(config.rollout, model, mesh, 1) or sampled)
    supervised = [config.sft, *(sft_config(config, stage) for stage in config.stages if is_supervised(stage))]
    uses = (
        (trained, prompt + completion),
        (sampled, prompt),
        *((section.batch_size // section.grad_accum_steps, section.length) for section in supervised),
    )
    rows, length = max(uses, key=lambda use: use[0] * use[1] ** 2)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    fused = attention.splash if on_tpu and not sizes.sliding else attention.blockwise
    here, heads = -(-rows // batch_divisor(mesh)), sizes.n_heads // divisor(mesh, "heads")
    chosen = attention.choose(here, heads, length, config.model.attention_logit_bytes, causal_attention, fused)
    return dataclasses.replace(model, attention=chosen)


def _dated(domain: Domain, date: str) -> Domain:
    if domain.data is None:
        return domain
    record = {**domain.data.record, "date": date}
    return dataclasses.replace(domain, data=dataclasses.replace(domain.data, record=record, date=date))


def build(config: Config, pool: RewardPool, date: str = "") -> Runtime:
    """Builds a run, and refuses what cannot work before anything runs. It reads no weights.

    Args:
      config: the whole configuration, parsed.
      pool: the reward workers, which `rollouts` uses; nothing is scored here.
      date: the day, YYYY-MM-DD, that a chat template gets as the present one; "": today.

    Returns:
      The parts that all stages share. `prompts` has every split of every scored domain.

    Raises:
      UserError: if the model or its tokenizer is missing, damaged or not supported; if there is no end token, or one
        that can never be drawn, or a prompt has token ids that are no rows of the embedding; if the longest prompt and
        completion together are longer than the model allows; if a scored domain does not exist; if its reward runs
        programs, which cannot be isolated here (`RewardPool.check`); if a data set is not valid or cannot be read
        (`datasets.make`); if a domain has too few prompts, or none in one of the three splits, or they cannot be
        tokenized (`prompts.tokenize`); if the mesh does not match the devices, or does not divide a parameter or
        `evaluate.batch`; or if `rollout.cache_gib` has no room for one prompt with `evaluate.samples` completions.
      OSError: if a file of JSON lines or csv cannot be read to its end.
      Exception: what a domain of the registry, or a function that `fields` of a data set names, raises itself.
    """
    folder = huggingface.model_of(model_folder(config.model.path))
    sizes = huggingface.read_config(folder)
    tokenizer = tokens.load_tokenizer(folder)
    eos_ids = tokens.eos_ids(tokenizer, folder, sizes.vocab_size)
    mesh = make_mesh(config.mesh)
    model = decoder(config, sizes, mesh)
    boxed = param_shapes(model)
    names = tuple(dict.fromkeys(config.scored_domains))
    domains = make_domains(names, config.domains)
    pool.check(domain.reward for domain in domains.values())
    if date and writes_date(tokenizer):
        domains = {name: _dated(domain, date) for name, domain in domains.items()}
    limit = config.rollout.prompt_buckets[-1]
    prompts = {
        (name, split): tokenize(domain, split, tokenizer, limit, sizes.vocab_size)
        for name, domain in domains.items()
        for split in SPLITS
    }
    told = [note for name, d in domains.items() for note in notes(d, {split: prompts[name, split] for split in SPLITS})]
    if told and not tokenizer.chat_template:
        told.append(f"{folder} has no chat template; prompts of data sets use the template {PLAIN!r}")
    told.append(f"attention of training, log-probs and prefill: {model.attention.__name__}")
    parts = batch_divisor(mesh)
    if config.evaluate.batch % parts:
        raise UserError(f"evaluate.batch={config.evaluate.batch} is not divisible by the mesh's data * fsdp = {parts}")
    prompts_at_once(config.rollout, model, mesh, config.evaluate.samples)  # called for its check alone
    return Runtime(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        shapes=nn.unbox(boxed),
        shardings=param_shardings(mesh, boxed),
        domains=domains,
        prompts=prompts,
        rollouts=Rollouts(model, mesh, tokenizer, eos_ids, config.rollout, pool, config.rewards.max_error_share),
        notes=tuple(told),
    )
