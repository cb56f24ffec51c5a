"""The configuration: declared once as frozen dataclasses, filled from a ConfigDict file, validated here.

A config file's `get_config()` starts from `default()` and changes fields; flags (`--config.seed=1`) change them
again; `parse` turns the ConfigDict into a `Config` or says in one line which field is wrong.
"""

import dataclasses
import re
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mdrl_jax.domains.base import DomainsConfig, SourceConfig
from mdrl_jax.domains.presets import completed
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import MeshConfig
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.rollout import SamplingConfig
from mdrl_jax.rl.rollouts import RolloutConfig
from mdrl_jax.rl.trainer import OptimizerConfig
from mdrl_jax.section import section

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny"
GRADIENTS = ("none", "agem", "pcgrad")
# What a stage `METHOD-D` changes in the training section, before its own overrides (definitions §10).
METHODS: dict[str, dict[str, Any]] = {
    "protect": {"prevent": {"protect": 1.0}},
    "ewc": {"prevent": {"ewc": 10.0}},
    "agem": {"prevent": {"gradients": "agem"}},
    "pcgrad": {"prevent": {"gradients": "pcgrad"}},
    "replay": {"prevent": {"replay": 0.25}},
    "kl": {"grpo": {"kl_coef": 0.3}},
}


@section
class ModelSection:
    """The model a run starts from.

    Attributes:
      path: Hugging Face folder, or "tiny": the base model shipped with the package.
      weights: "load" reads them; "random" keeps config.json and tokenizer but draws new weights from the seed.
      dtype: of matrix products and the KV cache, "float32" or "bfloat16"; master weights are float32.
      remat: "none", "full" or "dots" (see `Decoder`).
      logprob_chunk: positions whose logits are held at a time; 0: all.
      attention_logit_bytes: bytes of a device that the attention logits of one layer may take. Where they would take
        more, training, log-probs and prefill use attention that never holds all of them (`model/attention.py`).
    """

    path: str = "tiny"
    weights: str = "load"
    dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 0
    attention_logit_bytes: float = 2.0**30


@section
class PreventSection:
    """What a stage does so as not to lose earlier domains (definitions §10); any of it in any stage, together too.

    Attributes:
      domains: the domains to keep; () is every domain trained on the way to the stage's start.
      replay: share of each step's prompts taken from them, evenly.
      ewc: weight λ of Σ_i (λ/2) Σ_j F_ij (θ_j − θ*_ij)² (arXiv 1612.00796).
      gradients: "agem" or "pcgrad" take conflicting components out of the gradient, "none" leaves it.
      protect: share of each update's component in the protected subspaces that is taken out; 1 is all of it.
      vectors: gradients that span the protected subspace of each domain, anew at every step.
    """

    domains: tuple[str, ...] = ()
    replay: float = 0.0
    ewc: float = 0.0
    gradients: str = "none"
    protect: float = 0.0
    vectors: int = 32

    @property
    def transforms(self) -> bool:
        """Whether it changes gradients or updates, for which kept completions are needed."""
        return bool(self.ewc or self.protect or self.gradients != "none")


@section
class TrainSection:
    """One GRPO stage; `stage_overrides` in the config changes single fields for single stages.

    Attributes:
      start: stage whose parameters it starts from; "" is the stage before it ("base" before the first).
      reference: stage whose parameters the KL is taken to; "" is the start.
      steps: optimizer steps are steps * grpo.updates_per_batch.
      prompts_per_step: prompts that each step samples completions of.
      group_size: completions of each prompt.
      grad_accum_steps: micro-batches that a step's completions are divided into; their gradients are added up.
      warmup_steps: of linear warm-up; the learning rate is constant after it.
      checkpoint_every: steps between checkpoints; 0: only at the end.
      kl_every: steps between measurements of the KL to the stage's start, where kl_coef computes none; 0: never.
    """

    start: str = ""
    reference: str = ""
    steps: int = 40
    prompts_per_step: int = 16
    group_size: int = 16
    grad_accum_steps: int = 1
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    checkpoint_every: int = 20
    kl_every: int = 0
    grpo: GRPOConfig = GRPOConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prevent: PreventSection = PreventSection()

    def lr_scale(self, step: int) -> float:
        """Share of the learning rate at a step: linear warm-up over `warmup_steps`, then 1."""
        return min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0)


@section
class SFTSection:
    """Supervised stages (`pretrain`): replies demonstrated by the domains.

    The learning rate warms up linearly and falls linearly to 0 over the last `decay` of the steps. Replies are
    clean until `noise_from` of the steps, then wrong with probability `noise`: this leaves abilities latent but
    uncertain, which is what RL then sharpens.
    """

    steps: int = 3000
    batch_size: int = 64
    grad_accum_steps: int = 1
    length: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay: float = 0.3
    noise: float = 0.0
    noise_from: float = 0.6
    checkpoint_every: int = 500
    optimizer: OptimizerConfig = OptimizerConfig()


@section
class CheckpointSection:
    """What is kept of a stage while it goes on; how often it saves is `checkpoint_every` of its section.

    Attributes:
      keep: the newest ones; with 2 there is one before it where the newest is found damaged.
    """

    keep: int = 2


@section
class EvaluateSection:
    """Scores after every stage: `samples` completions of every held-out prompt of `split`, same keys each time."""

    split: str = "test"
    samples: int = 4
    batch: int = 100
    sampling: SamplingConfig = SamplingConfig()
    shown: int = 4


@section
class RewardSection:
    """The pool that judges completions: worker processes and the limits of one check.

    Limits count CPU time, so that a loaded machine changes no verdict. `max_error_share`: the run ends when a larger
    share of a batch's rewards raise (0 reward each, always counted and logged). `sandbox`: "best" runs programs in
    bubblewrap where it works and else says what is not isolated; "bwrap" refuses to run them without.
    """

    workers: int = 2
    cpu_seconds: float = 2.0
    memory_mb: int = 512
    deadline_seconds: float = 60.0
    sandbox: str = "best"
    max_error_share: float = 0.2


@section
class AnalyzeSection:
    """The interference analysis: stage `analyze`, or the command (definitions §3 to §7, §12, §13).

    Attributes:
      split: whose prompts are used; never those that scores, or the choice of a rollback, are reported on.
      prompts: of each domain; the first of a shuffle by the seed.
      group_size: completions of each prompt.
      batch: prompts a micro-batch, and a block of the bootstrap of gradients and routes.
      path_prompts: prompts of the expansions along the path to a later stage (1, 2, 4 and 8 segments).
      conflicts: pairs, most harmed first, whose conflict subspace is sought.
      vectors: of the subspace, at most.
      lanczos_steps: block steps, of `lanczos_block` vectors each.
      permutations: of advantages within groups, for the null of the top eigenvalue; 0 leaves it out.
      null_steps: block steps of each.
      held: gradients kept at a time; with fewer than blocks, they are computed several times.
      dtype: of matrix products; parameters, tangents of parameters and sums are float32 in either case.
      attention_logit_bytes: bytes of a device that the attention logits of one layer may take; above it, attention is
        blockwise.
    """

    split: str = "train"
    prompts: int = 128
    group_size: int = 8
    batch: int = 16
    path_prompts: int = 32
    conflicts: int = 1
    vectors: int = 16
    lanczos_block: int = 2
    lanczos_steps: int = 8
    permutations: int = 20
    null_steps: int = 3
    held: int = 64
    dtype: str = "float32"
    attention_logit_bytes: float = 2.0**30


@section
class RecoverSection:
    """Stopping a refresh, choosing a rollback or a merge, planning: all on validation prompts (definitions §8 to §10).

    Attributes:
      prompts: validation prompts of each domain.
      samples: completions a prompt.
      every: steps of a refresh between two looks at its scores.
      margin: a refresh ends when the domain is surely less than this many points below its peak.
      limit: points that any other domain may lose.
      rules, fractions, strengths: of a rollback, tried in turn; fractions are shares of all coordinates.
      forecast_prompts: prompts of each domain, unseen by any candidate, that a plan looks at.
      n_reweighted: number of actions, the most promising first, that a plan also forecasts by importance weights at
        the parameters they end at; each costs one forward pass.
      random_sets: random coordinate sets that the chosen one is compared with.
      density, scales: of merges; the share of each edit that TIES keeps, and the factors λ tried.
    """

    prompts: int = 100
    samples: int = 2
    every: int = 1
    margin: float = 1.0
    limit: float = 2.0
    rules: tuple[str, ...] = ("adding", "removing", "opposition", "magnitude")
    fractions: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    strengths: tuple[float, ...] = (0.5, 1.0)
    forecast_prompts: int = 192
    n_reweighted: int = 32
    random_sets: int = 40
    density: float = 0.2
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


@section
class Config:
    """A whole experiment; `stage.py` has a table of what each stage name means."""

    seed: int = 0
    stages: tuple[str, ...] = ("code", "math", "qa", "cw", "refresh-math")
    scored_domains: tuple[str, ...] = ("code", "math", "qa", "cw")
    stage_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: ModelSection = ModelSection()
    mesh: MeshConfig = MeshConfig()
    domains: DomainsConfig = DomainsConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainSection = TrainSection()
    sft: SFTSection = SFTSection()
    checkpoints: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    analyze: AnalyzeSection = AnalyzeSection()
    recover: RecoverSection = RecoverSection()
    rewards: RewardSection = RewardSection()


# Fields of earlier versions, and what they are called now; a config that uses one is refused with the new name.
RENAMED = {
    "model.score_bytes": "model.attention_logit_bytes",
    "train.prompts": "train.prompts_per_step",
    "train.group": "train.group_size",
    "train.micro_batches": "train.grad_accum_steps",
    "train.grpo.inner_epochs": "train.grpo.updates_per_batch",
    "sft.micro_batches": "sft.grad_accum_steps",
    "analyze.group": "analyze.group_size",
    "analyze.score_bytes": "analyze.attention_logit_bytes",
    "recover.weighed": "recover.n_reweighted",
}


def renamed(path: str) -> str:
    """The present name of a field of an earlier version, by its path below the config; "" if it is no such field.

    `stage_overrides.STAGE` has the fields of `train`.
    """
    stage = re.match(r"stage_overrides\.[^.]+\.", path)
    if not stage:
        return RENAMED.get(path, "")
    found = RENAMED.get(f"train.{path[stage.end() :]}", "")
    return found and stage[0] + found.removeprefix("train.")


def default() -> Config:
    """All fields at their defaults, to be changed by a config file: a `ConfigDict`.

    The annotated type is not the real one. It lets editors and type checkers know the fields, and their types, of
    what a config file sets; `parse` makes a real `Config` of the ConfigDict.
    """
    return typing.cast(Config, ConfigDict(_as_dict(Config())))


def from_file(path: str | Path) -> Config:
    """The `get_config()` of another config file, for configs that change a few fields of it; typed as `default`."""
    return runpy.run_path(str(path))["get_config"]()


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _as_dict(getattr(value, f.name)) for f in fields}
    return value


def _number(name: str, value: Any, kind: type) -> Any:
    # bool is an int to Python, not to a reader of configs.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r} has the wrong type; it is of type {kind.__name__}")
    return value


def _fill(kind: Any, value: Any, name: str) -> Any:
    """`value` as type `kind`, or a UserError naming the field."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{name}={value!r} has the wrong type; it is a section of fields")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                if now := renamed(f"{name}.{key}".removeprefix("config.")):
                    raise UserError(f"{name}.{key} is now called {now}")
                raise UserError(f"unknown field {name}.{key}; {name} has {', '.join(hints)}")
        filled = {k: _fill(hints[k], v, f"{name}.{k}") for k, v in value.items()}
        try:
            return typing.cast(Any, kind)(**filled)
        except (ValueError, UserError) as e:
            raise UserError(f"{name}: {e}") from e
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise UserError(f"{name}={value!r} has the wrong type; it is a tuple")
        inner = typing.get_args(kind)[0]
        return tuple(_fill(inner, v, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is not None or isinstance(kind, types.UnionType):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{name}={value!r} has the wrong type; it is a section by name")
        plain = value.to_dict() if isinstance(value, ConfigDict) else value
        inner = typing.get_args(kind)[-1]
        return plain if inner is Any else {k: _fill(inner, v, f"{name}.{k}") for k, v in plain.items()}
    return _number(name, value, kind)


def parse(config: Config | ConfigDict | Mapping[str, Any]) -> Config:
    """The frozen, validated configuration.

    Raises:
      UserError: one line naming the field that is wrong and what would be right.
    """
    parsed: Config = _fill(Config, config, "config")
    _check(parsed)
    return parsed


def stage_config(config: Config, stage: str) -> TrainSection:
    """The training section of one stage: `config.train` with what its prefix changes, and with its overrides."""
    changes, name = config.stage_overrides.get(stage, {}), f"stage_overrides.{stage}"
    if not isinstance(changes, Mapping):
        raise UserError(f"{name}={changes!r} has the wrong type; it is a section of fields")
    preset = METHODS.get(stage.partition("-")[0], {}) if "-" in stage else {}
    return _fill(TrainSection, _merge(_merge(_as_dict(config.train), preset), changes), name)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check(config: Config) -> None:
    c = config
    for name, choice, allowed in (
        ("model.weights", c.model.weights, ("load", "random")),
        ("model.dtype", c.model.dtype, ("float32", "bfloat16")),
        ("model.remat", c.model.remat, ("none", "full", "dots")),
        ("evaluate.split", c.evaluate.split, ("validation", "test")),
        ("analyze.split", c.analyze.split, ("train", "validation", "test")),
        ("analyze.dtype", c.analyze.dtype, ("float32", "bfloat16")),
    ):
        _require(choice in allowed, f"{name}={choice!r} is not known; known: {', '.join(allowed)}")
    _require(0 <= c.seed < 2**32, f"seed={c.seed} is not valid; 0 <= seed < 2**32")
    _require(len(c.stages) > 0, "stages is empty; name at least one")
    for i, stage in enumerate(c.stages):
        _require(stage not in c.stages[:i], f"stage {stage!r} is listed twice; stage names are unique")
    _require(len(c.scored_domains) > 0, "scored_domains is empty; name at least one")
    for i, domain in enumerate(c.scored_domains):
        _require(domain not in c.scored_domains[:i], f"scored_domains lists {domain!r} twice")
    for name, source in c.domains.sources.items():
        completed(source, f"domains.{name}")
    for name in ("code", "math", "qa", "cw"):
        alone = name in c.domains.sources or getattr(c.domains, name) == SourceConfig()
        _require(alone, f"domains.{name} names no data set; set its preset or its files")
    for stage in c.stage_overrides:
        _require(stage in c.stages, f"stage_overrides names {stage!r}, which is not in stages")
    for name, buckets in (
        ("prompt_buckets", c.rollout.prompt_buckets),
        ("completion_buckets", c.rollout.completion_buckets),
    ):
        growing = bool(buckets) and buckets[0] > 0 and list(buckets) == sorted(set(buckets))
        _require(growing, f"rollout.{name}={buckets} is not valid; positive sizes in growing order")
    _require(c.rollout.sampling.temperature > 0, "rollout.sampling.temperature must be above 0")
    for name, value, least in (
        ("model.logprob_chunk", c.model.logprob_chunk, 0),
        ("model.attention_logit_bytes", c.model.attention_logit_bytes, 1),
        ("rollout.parts", c.rollout.parts, 1),
        ("rollout.cache_gib", c.rollout.cache_gib, 0),
        ("checkpoints.keep", c.checkpoints.keep, 1),
        ("evaluate.samples", c.evaluate.samples, 1),
        ("evaluate.batch", c.evaluate.batch, 1),
        ("evaluate.shown", c.evaluate.shown, 0),
        ("analyze.group_size", c.analyze.group_size, 2),
        ("analyze.batch", c.analyze.batch, 1),
        ("analyze.conflicts", c.analyze.conflicts, 0),
        ("analyze.vectors", c.analyze.vectors, 1),
        ("analyze.lanczos_block", c.analyze.lanczos_block, 2),
        ("analyze.lanczos_steps", c.analyze.lanczos_steps, 1),
        ("analyze.permutations", c.analyze.permutations, 0),
        ("analyze.null_steps", c.analyze.null_steps, 1),
        ("analyze.held", c.analyze.held, 2),
        ("analyze.attention_logit_bytes", c.analyze.attention_logit_bytes, 1),
        ("recover.n_reweighted", c.recover.n_reweighted, 0),
        ("rewards.workers", c.rewards.workers, 1),
        ("rewards.memory_mb", c.rewards.memory_mb, 128),
        ("sft.steps", c.sft.steps, 1),
        ("sft.batch_size", c.sft.batch_size, 1),
        ("sft.grad_accum_steps", c.sft.grad_accum_steps, 1),
        ("sft.learning_rate", c.sft.learning_rate, 0),
        ("sft.warmup_steps", c.sft.warmup_steps, 0),
        ("sft.checkpoint_every", c.sft.checkpoint_every, 0),
    ):
        _require(value >= least, f"{name}={value} is not valid; it is >= {least}")
    for field in ("cpu_seconds", "deadline_seconds"):
        value = getattr(c.rewards, field)
        _require(value > 0, f"rewards.{field}={value} is not valid; it is above 0")
    for field in ("decay", "noise", "noise_from"):
        value = getattr(c.sft, field)
        _require(0 <= value <= 1, f"sft.{field}={value} is not valid; it lies in [0, 1]")
    a = c.analyze
    even = a.prompts >= 4 * a.batch and a.prompts % (2 * a.batch) == 0
    _require(even, f"analyze.prompts={a.prompts} is not valid; an even number, 4 or more, of batches of {a.batch}")
    on_path = 0 < a.path_prompts <= a.prompts and a.path_prompts % a.batch == 0
    _require(on_path, f"analyze.path_prompts={a.path_prompts} is not valid; batches of {a.batch}, at most {a.prompts}")
    found = a.lanczos_block * a.lanczos_steps
    _require(a.vectors <= found, f"analyze.vectors={a.vectors} is more than lanczos_block * lanczos_steps = {found}")
    sandboxes = ("best", "bwrap")
    _require(c.rewards.sandbox in sandboxes, f"rewards.sandbox={c.rewards.sandbox!r} is not one of {sandboxes}")
    _require(0 < c.rewards.max_error_share <= 1, "rewards.max_error_share lies in (0, 1]")
    _require(c.sft.batch_size % c.sft.grad_accum_steps == 0, "sft.batch_size must be divisible by sft.grad_accum_steps")
    for i, stage in enumerate(c.stages):
        s = stage_config(c, stage)
        where = f"stage {stage}"
        for field in ("steps", "prompts_per_step", "grad_accum_steps"):
            _require(getattr(s, field) >= 1, f"{where}: {field}={getattr(s, field)}; it is >= 1")
        _require(
            s.group_size >= 2, f"{where}: group_size={s.group_size}; GRPO compares at least 2 completions a prompt"
        )
        for field in ("learning_rate", "warmup_steps", "checkpoint_every", "kl_every"):
            _require(getattr(s, field) >= 0, f"{where}: {field}={getattr(s, field)}; it is >= 0")
        parts = c.rollout.parts
        n, rows = s.prompts_per_step, s.prompts_per_step * s.group_size
        _require(n % parts == 0, f"{where}: prompts_per_step={n} is not divisible by rollout.parts={parts}")
        parts = s.grad_accum_steps
        _require(
            rows % parts == 0,
            f"{where}: prompts_per_step * group_size = {rows} is not divisible by grad_accum_steps={parts}",
        )
        known = ("", "base", *(s for s in c.stages[:i] if s != "analyze"))
        for field, value in (("start", s.start), ("reference", s.reference)):
            _require(value in known, f"{where}: {field}={value!r} is not an earlier stage or 'base'")
        p = s.prevent
        _require(p.gradients in GRADIENTS, f"{where}: prevent.gradients={p.gradients!r}; known: {', '.join(GRADIENTS)}")
        _require(0 <= p.replay < 1, f"{where}: prevent.replay={p.replay} is not valid; 0 <= replay < 1")
        _require(0 <= p.protect <= 1, f"{where}: prevent.protect={p.protect} is not valid; it lies in [0, 1]")
        _require(p.ewc >= 0, f"{where}: prevent.ewc={p.ewc} is not valid; it is >= 0")
        _require(p.vectors >= 1, f"{where}: prevent.vectors={p.vectors} is not valid; it is >= 1")
    r = c.recover
    for field in ("prompts", "samples", "every"):
        _require(getattr(r, field) >= 1, f"recover.{field}={getattr(r, field)} is not valid; it is >= 1")
    for field in ("margin", "limit", "random_sets"):
        _require(getattr(r, field) >= 0, f"recover.{field}={getattr(r, field)} is not valid; it is >= 0")
    for field in ("rules", "fractions", "strengths", "scales"):
        _require(len(getattr(r, field)) > 0, f"recover.{field} is empty; name at least one")
    for field, values in (("fractions", r.fractions), ("density", (r.density,))):
        _require(all(0 < v <= 1 for v in values), f"recover.{field}={values} is not valid; above 0, up to 1")
