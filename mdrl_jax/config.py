"""Every field that a user can set: declared as frozen dataclasses, filled from a config file, validated here.

A config file's `get_config()` starts from `default()` and changes fields. Flags such as `--config.seed=1` change them
again. `parse` then turns the ConfigDict into a `Config`, or raises an error that names the wrong field in one line.

Each section lists its fields under `Attributes:`. The limits stated there are checked by `parse`. A section that Python
code makes directly checks only what its own docstring names under `Raises:`. The sections `domains`, `mesh`, `rollout`,
`grpo` and `optimizer` are declared in `domains/base.py`, `parallel/sharding.py`, `rl/rollouts.py`, `rl/grpo.py` and
`rl/trainer.py`.
"""

import dataclasses
import math
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
from mdrl_jax.rewards.sandbox import CHOICES, PACKAGES
from mdrl_jax.rl.distill import DistillConfig
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.rollouts import RolloutConfig
from mdrl_jax.rl.sampling import SamplingConfig
from mdrl_jax.rl.trainer import OptimizerConfig
from mdrl_jax.section import section

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny"
GRADIENTS = ("none", "agem", "pcgrad", "mgs")
# Training fields that a stage prefix sets for its prevention method (definitions §10); `stage_overrides` win over them.
METHODS: dict[str, dict[str, Any]] = {
    "protect": {"prevent": {"protect": 1.0}},
    "ewc": {"prevent": {"ewc": 10.0}},
    "agem": {"prevent": {"gradients": "agem"}},
    "pcgrad": {"prevent": {"gradients": "pcgrad"}},
    "mgs": {"prevent": {"gradients": "mgs"}},
    "replay": {"prevent": {"replay": 0.25}},
    "kl": {"grpo": {"kl_coef": 0.3}},
}
# Further prefixes with a preset. A distillation learns from every prompt and group, whatever the rewards, and has no
# other KL.
PRESETS = METHODS | {
    "distill": {
        "kl_every": 0,
        "max_rounds": 1,
        "filter": {"low": 0.0, "high": 1.0},
        "grpo": {"drop_zero_variance": False, "kl_coef": 0.0},
    }
}

# Stages that score candidates on validation prompts and keep the best (definitions §14), by what comes before the first
# "-" of their names.
CHOOSE = ("refresh", "distill", "alternate", "rollback", "plan", "trials", "recover")
CHOOSE += ("arithmetic", "ties", "ram", "dare")
# Those of them that make their candidates from completions of the analysis' prompts.
FIT = ("rollback", "plan", "trials", "recover")
# Supervised stages, by what comes before the first "-" of their names.
SUPERVISED = ("pretrain", "sft")


@section
class ModelSection:
    """The model a run starts from, and how it is computed.

    Attributes:
      path: Hugging Face folder of the model; "tiny" for the base model that comes with the package; or a model of the
        Hugging Face hub, "ORGANISATION/MODEL" or "hub:ORGANISATION/MODEL", perhaps with "@" and a revision.
      adapter: folder of a LoRA adapter in the layout of PEFT, which is merged into the weights of `path`; "": none.
      weights: "load" reads the folder's weights; "random" draws new weights from the seed and takes only config.json
        and the tokenizer from the folder.
      dtype: number format of matrix products and of the KV cache, "float32" or "bfloat16"; master weights are float32.
      remat: activations that the backward pass computes again to save memory: "none"; "dots" keeps only the results of
        matrix products; "full" keeps only the input of each layer.
      logprob_chunk: number of positions whose logits are computed at a time, to save memory; 0 computes all at once.
      attention_logit_bytes: bytes of a device that the attention logits of one layer may take, at least 1. If they need
        more, training, log-probs and prefill use an attention that never holds all of them (`model/attention.py`).
    """

    path: str = "tiny"
    adapter: str = ""
    weights: str = "load"
    dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 0
    attention_logit_bytes: float = 2.0**30


@section
class PreventSection:
    """How a training stage protects the domains trained before it (definitions §10).

    Any GRPO stage may use any of these methods, alone or together. The defaults use none.

    Attributes:
      domains: names of the domains to keep; () keeps every domain trained on the way to the stage's start.
      replay: share of each step's prompts that comes from the kept domains, equally many from each; 0 <= replay < 1.
      ewc: weight λ >= 0 of the penalty Σ_i (λ/2) Σ_j F_ij (θ_j − θ*_ij)² over kept domains i and parameters j (arXiv
        1612.00796).
      gradients: "agem", "pcgrad" or "mgs" removes from the gradient the components that conflict with kept domains, the
        last one within each module; "none".
      module: the modules of "mgs": "tensor", every tensor of every layer; or "layer", all tensors of a layer together.
      protect: share of the gradient's and of the update's component in the protected subspaces that is removed, from 0
        to 1; 1 removes all of it.
      vectors: number of gradients, at least 1, that span the protected subspace of each kept domain; they are computed
        anew at every step.
    """

    domains: tuple[str, ...] = ()
    replay: float = 0.0
    ewc: float = 0.0
    gradients: str = "none"
    module: str = "tensor"
    protect: float = 0.0
    vectors: int = 32

    @property
    def transforms(self) -> bool:
        """Whether a method changes gradients or updates; such methods need completions of the kept domains."""
        return bool(self.ewc or self.protect or self.gradients != "none")


@section
class FilterSection:
    """Which training prompts a GRPO stage visits, by the success rate of its first policy (definitions §15).

    The success rate of a prompt is the mean reward of `train.group_size` completions, measured once when the stage
    begins. With the default bounds nothing is measured, and every prompt is visited.

    Attributes:
      low, high: the smallest and the largest success rate of a prompt that is visited; 0 <= low < high <= 1.
      prompts: number of training prompts of each domain that are measured, in an order of the stage's own; only these
        can be visited; 0: all.
    """

    low: float = 0.0
    high: float = 1.0
    prompts: int = 0

    @property
    def on(self) -> bool:
        """Whether the bounds leave out any prompt."""
        return self.low > 0 or self.high < 1


@section
class TrainSection:
    """GRPO training: the values for all GRPO stages; `stage_overrides` changes them for single stages.

    Attributes:
      start: name of an earlier stage whose final parameters the stage starts from, or "base"; "" is the default for the
        stage's name (`stage.py`), usually the previous stage.
      reference: name of an earlier stage whose final parameters are the reference policy of the KL, or "base"; "" is
        the stage's start.
      target: name of an earlier stage whose score the stage has to reach: it ends at the first look at which the mean
        reward on the validation prompts of its own domain (`recover.prompts`, `recover.samples`) is at least that of
        the other stage's end; "" for none. Only for a stage of one domain that is no refresh or distillation.
      target_every: steps from one look to the next in a stage with a target, at least 1; the last step is one too.
      steps: number of sampled batches, at least 1; each gives grpo.updates_per_batch optimizer steps.
      prompts_per_step: prompts of each sampled batch; divisible by rollout.parts.
      n_prompts: number of training prompts of each domain that the stage draws from, the first ones; 0, or more than
        there are: all of them.
      turn: steps of a stage `alternate-A-B` on one of its domains before the other has its turn, at least 1.
      max_rounds: the largest number of rounds, each of prompts_per_step prompts, that a step samples until it has
        prompts_per_step groups whose rewards differ (dynamic sampling, definitions §15); at least 1. With 1 a step
        trains on the groups of its one round, whether their rewards differ or not.
      filter: which training prompts are visited.
      group_size: completions sampled for each prompt, at least 2.
      grad_accum_steps: number of micro-batches that a step's prompts_per_step * group_size completions are divided
        into; their gradients are added up.
      learning_rate: learning rate of the optimizer after the warm-up, at least 0.
      warmup_steps: steps over which the learning rate rises linearly; it stays constant afterwards.
      checkpoint_every: steps between checkpoints; 0 saves one only at the end.
      kl_every: steps between measurements of the KL to the reference in stages with grpo.kl_coef = 0; 0 measures none.
      random_signs: whether the stage also sums up its updates with random signs, the null of how sparse its edit is
        (definitions §3). It takes as much memory as the parameters. Not for a refresh or a distillation.
      grpo: the loss and its advantages.
      distill: the teachers and the loss of a stage `distill-`.
      optimizer: AdamW and gradient clipping.
      prevent: methods that protect earlier domains.
    """

    start: str = ""
    reference: str = ""
    target: str = ""
    target_every: int = 4
    steps: int = 40
    prompts_per_step: int = 16
    n_prompts: int = 0
    turn: int = 1
    max_rounds: int = 1
    filter: FilterSection = FilterSection()
    group_size: int = 16
    grad_accum_steps: int = 1
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    checkpoint_every: int = 20
    kl_every: int = 0
    random_signs: bool = False
    grpo: GRPOConfig = GRPOConfig()
    distill: DistillConfig = DistillConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prevent: PreventSection = PreventSection()

    def lr_scale(self, step: int) -> float:
        """Factor on the learning rate at a step, above 0 and at most 1.

        Args:
          step: number of the step, from 0. The factor is (step + 1) / `warmup_steps` until this reaches 1; without
            warm-up it is always 1.
        """
        return min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0)


@section
class SFTSection:
    """Supervised training on replies that the domains demonstrate: stages `sft-D`, `sft` and `pretrain`.

    These are the values for all supervised stages; `stage_overrides` changes them for single stages. The defaults
    pre-train a tiny model. To fine-tune a large one, set a smaller learning rate and fewer steps. Wrong replies late in
    a pre-training leave the model able but uncertain, which gives RL something to improve.

    Attributes:
      start, target, target_every: as in section `train`.
      domains: names of the domains that the stages `sft` and `pretrain` train, evenly; () takes all scored domains
        except data sets without a `reply`. A stage `sft-D` does not read it.
      steps: optimizer steps, at least 1.
      batch_size: replies of each step, at least 1; divisible by grad_accum_steps.
      grad_accum_steps: number of micro-batches that a step's replies are divided into; their gradients are added up.
      length: the largest length of prompt and reply together, in tokens. Longer rows of a data set are left out; in a
        procedural domain they are an error. A batch is padded to the smallest sum of one of rollout.prompt_buckets and
        one of rollout.completion_buckets that holds its rows, or to this length if no smaller one does.
      learning_rate: learning rate of the optimizer between warm-up and decay, at least 0.
      warmup_steps: steps over which the learning rate rises linearly.
      decay: share of the steps, at the end, over which the learning rate falls linearly to 0; from 0 to 1.
      noise: probability that a demonstrated reply is wrong, from 0 to 1; replies of data sets stay as they are.
      noise_from: share of the steps, from 0 to 1, before `noise` applies; until then all replies are right.
      checkpoint_every: steps between checkpoints; 0 saves one only at the end.
      optimizer: AdamW and gradient clipping.
    """

    start: str = ""
    target: str = ""
    target_every: int = 4
    domains: tuple[str, ...] = ()
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
    """Checkpoints of a stage in training; `checkpoint_every` of `train` and `sft` sets how often one is saved.

    Attributes:
      keep: number of newest checkpoints that are kept, at least 1; with 2 there is an older one to fall back on if the
        newest is damaged.
    """

    keep: int = 2


@section
class EvaluateSection:
    """How the parameters are scored after every stage; the prompts and the sampling keys are the same each time.

    Attributes:
      split: the prompts that are used, "test" or "validation"; only "test" in a run with a stage that chooses by
        validation prompts: a refresh, plain or alternating, a distillation, a rollback, a merge with a factor, `plan`,
        `recover`, `trials`, `orders`, or a stage with a `target`.
      samples: completions sampled for each prompt, at least 1.
      batch: prompts that are sampled at once, at least 1; divisible by the mesh's data * fsdp.
      sampling: temperature, top-k and top-p of the completions.
      shown: number of prompts of each domain whose completions are written to `samples/`, for people to read.
      keep_texts: whether all completions are written, compressed, to `completions/`; the report shows there what a
        stage lost.
    """

    split: str = "test"
    samples: int = 4
    batch: int = 100
    sampling: SamplingConfig = SamplingConfig()
    shown: int = 4
    keep_texts: bool = True


@section
class RewardSection:
    """The worker processes that compute rewards, and their limits.

    The time limit counts CPU time, so a busy machine does not change a reward.

    Attributes:
      workers: number of worker processes, at least 1.
      cpu_seconds: CPU time, in seconds, of one call of a reward function and of one sandboxed program; above 0.
      memory_mb: address space of one sandboxed program, in MB, at least 128.
      deadline_seconds: wall-clock time, in seconds, after which a program is killed in any case; above 0.
      sandbox: "best" runs programs in bubblewrap if that works here, and otherwise logs what is not isolated; it
        refuses to run programs where files are not isolated. "bwrap" refuses to run programs without bubblewrap. "none"
        runs them in any case.
      packages: the installed distributions whose modules programs and tests may import, with what these require.
      max_error_share: share of a batch's rewards that may fail with an error, above 0 and at most 1; the run ends if
        more fail. A failed reward counts as 0 and is logged.
    """

    workers: int = 2
    cpu_seconds: float = 2.0
    memory_mb: int = 512
    deadline_seconds: float = 60.0
    sandbox: str = "best"
    packages: tuple[str, ...] = PACKAGES
    max_error_share: float = 0.2


@section
class AnalyzeSection:
    """The interference analysis, as stage `analyze` or as a command (definitions §3 to §7, §12, §13).

    Rollbacks, plans and prevention methods sample their completions with these settings as well.

    Attributes:
      split: the prompts that are used, "train", "validation" or "test"; the default "train" has no prompt on which
        scores are reported or rollbacks are chosen. Only "train" in a run with a rollback, `plan`, `recover`, `trials`,
        or a prevention method that takes gradients of the kept domains; not evaluate.split in a run with `orders`.
      prompts: prompts of each domain; a multiple of 2 * batch, at least 4 * batch.
      group_size: completions sampled for each prompt, at least 2.
      batch: prompts of a micro-batch, at least 1; the intervals of gradients and routes treat these as one block.
      path_prompts: prompts for the expansions along the path to a later stage, in 1, 2, 4 and 8 segments; a multiple of
        batch, at most prompts.
      conflicts: number of pairs (domain, later stage), most damaged first, whose conflict subspace is computed.
      vectors: largest dimension of a conflict subspace, at least 1; a third of lanczos_block * lanczos_steps at most,
        because only the leading vectors of a Lanczos search converge.
      lanczos_block: vectors of one block of the Lanczos iteration, at least 2.
      lanczos_steps: block steps of the Lanczos iteration, at least 1.
      permutations: random permutations of rewards, on each half of the prompts, that give the null of the largest
        eigenvalue; at least 40, or 0 for no null. Each takes a Lanczos search, which ends once its largest eigenvalue
        has converged.
      removal_spaces: further spaces, beside the MLP neurons of the shared route, in which a conflict subspace is sought
        and its part of the displacement removed: "heads" (these neurons and the shared attention heads) and "all" (all
        parameters). Each costs a Lanczos iteration over all parameters on both halves of the prompts, and memory for
        lanczos_block * lanczos_steps vectors of their size.
      theorem: whether the assumptions of the contraction theorem are measured for each conflict subspace. It costs
        2 * vectors Hessian products over all parameters with each prompt, and memory for 2 * vectors of their size.
      held: number of gradients in memory at a time, at least 2; if there are more blocks than this, gradients are
        computed several times.
      dtype: number format of matrix products, "float32" or "bfloat16"; parameters, their tangents and sums are float32
        in either case.
      attention_logit_bytes: bytes of a device that the attention logits of one layer may take, at least 1; if they need
        more, attention is computed blockwise.
    """

    split: str = "train"
    prompts: int = 128
    group_size: int = 8
    batch: int = 16
    path_prompts: int = 32
    conflicts: int = 1
    vectors: int = 16
    lanczos_block: int = 2
    lanczos_steps: int = 24
    permutations: int = 40
    removal_spaces: tuple[str, ...] = ()
    theorem: bool = False
    held: int = 64
    dtype: str = "float32"
    attention_logit_bytes: float = 2.0**30


CIRCUIT_LOSSES = ("margin", "log_prob")


@section
class CircuitsSection:
    """Circuits of attention heads, as stages `circuits-D` or by `analyze --circuits` (definitions §11).

    The prompts are those of analyze.split.

    Attributes:
      pairs_file: file of counterfactual pairs to use in place of the domain's own, a JSON object a line with the texts
        base, source, base_reply and source_reply, and perhaps kind; "": the domain's own.
      blocks: blocks of pairs, each with searches of its own; at least 4. Overlaps have them as units.
      block: pairs of a block, at least 2; divisible by the mesh's data * fsdp.
      differing: a pair is left out if its prompts have more tokens than this from the first different one on; 0: none
        is. For every mask, a pass runs as many prompt tokens of all pairs as the pair has that differs earliest.
      loss: the loss of a search, to which the price of the heads is added. "margin": the share of the margin of all
        heads that a circuit leaves out. "log_prob": −log π of the source's reply in nats, as published.
      penalties: values of λ, the price of a head in the unit of the loss, that are tried; above 0.
      faithful: the largest λ is used at which every compared model's circuits are at least this faithful.
      steps: steps of Adam of each search, at least 1.
      learning_rate: learning rate of these steps, above 0.
      seeds: searches of each block, λ and start, at least 1.
      tried: heads that a round of the descent after a search puts in or takes out on trial, at least 1; those of which
        the derivative promises most.
      at_once: masks whose passes run together, at least 1; fewer take less memory.
      random_sets: random circuits of equal size that give the null of a faithfulness, at least 2.
      single_blocks: blocks of pairs in which every head is tried alone, at least 1; two passes a head and block.
      match: two scores count as matched if they differ by at most this many points; at least 0.
      vulnerability: whether the effect of every head's own edit on the other scored domains is predicted and measured;
        it costs two passes with derivatives over analyze.prompts for each head and domain.
    """

    pairs_file: str = ""
    blocks: int = 8
    block: int = 8
    differing: int = 0
    loss: str = "margin"
    penalties: tuple[float, ...] = (0.01, 0.03, 0.1)
    faithful: float = 0.8
    steps: int = 100
    learning_rate: float = 0.1
    seeds: int = 1
    tried: int = 48
    at_once: int = 4
    random_sets: int = 20
    single_blocks: int = 2
    match: float = 5.0
    vulnerability: bool = False


@section
class RecoverSection:
    """Recovery of a damaged domain: refreshes, rollbacks, merges and plans (definitions §8 to §10).

    When a refresh, a distillation or a stage with a `target` stops, and which rollback or merge is chosen, is decided
    on validation prompts. A distillation and an alternating refresh stop, and are repeated, as a refresh is.

    Attributes:
      prompts: validation prompts of each domain, at least 1, or 2 for a plan; all of them if there are fewer.
      samples: completions sampled for each prompt, at least 1.
      every: steps of a refresh from one scoring to the next, at least 1.
      streams: how often a refresh is trained to measure how it contracts, at least 1; the first time is the one that is
        scored and kept. Above 1 it is also trained once on each other scored domain, for comparison.
      margin: a refresh stops once the domain is, by its 95 % interval, less than this many points below its peak; at
        least 0.
      limit: points that a recovery may cost any other domain, at least 0.
      rules: rules that score coordinates for a rollback, each of which is tried: "adding", "removing", "opposition",
        "displacement" or "magnitude" (definitions §9).
      fractions: sizes of the coordinate sets that a rollback tries, as shares of all parameters; above 0, at most 1.
      strengths: factors β on the subtracted edit that a rollback tries; a stage always tries 1 as well.
      forecast_prompts: prompts of each domain that a plan forecasts on, a positive multiple of analyze.batch; no action
        of the plan is made from them; only checked in a run with the stage `plan`.
      n_reweighted: number of actions, the most promising first, whose outcome a plan also forecasts with importance
        weights; each costs a forward pass; 0 uses none.
      random_sets: number of random coordinate sets of its size that a chosen rollback is compared with on validation
        prompts.
      control_draws: how often each random control of a rollback is drawn on test prompts, at least 1; with 1 its
        interval leaves out the luck of the draw.
      control_half_width: a rollback's difference to a control on test prompts is narrow enough if its interval has at
        most this half-width, in points; at least 0. While it is wider, more completions are sampled, unless its
        interval at the level 1 - 0.05/4 excludes 0.
      control_tokens: tokens, read and sampled, that a rollback may spend on such further completions; at least 0.
      density: share of the entries of each edit that TIES merging keeps, the largest ones; above 0, at most 1.
      thresholds: what counts as changed in RAM merging: an entry of an edit above this many root mean squares of the
        edit of its tensor; 0: every entry that is not 0. Each is tried with each factor λ.
      drop_rates: shares of the entries of each edit that DARE merging drops at random, at least 0 and below 1. Each is
        tried with each factor λ.
      scales: factors λ that the merges `arithmetic`, `ties`, `ram` and `dare` try.
    """

    prompts: int = 100
    samples: int = 2
    every: int = 1
    streams: int = 1
    margin: float = 1.0
    limit: float = 2.0
    rules: tuple[str, ...] = ("adding", "removing", "opposition", "magnitude")
    fractions: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    strengths: tuple[float, ...] = (0.5, 1.0)
    forecast_prompts: int = 192
    n_reweighted: int = 32
    random_sets: int = 40
    control_draws: int = 5
    control_half_width: float = 2.0
    control_tokens: float = 0.0
    density: float = 0.2
    thresholds: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    drop_rates: tuple[float, ...] = (0.5, 0.9)
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


@section
class Config:
    """A whole experiment.

    Attributes:
      seed: determines the order of prompts, all sampling and random weights; 0 <= seed < 2**32.
      stages: names of the stages in the order in which they run, each once; `stage.py` explains the names.
      scored_domains: domains that are scored after every stage; stages may use no others.
      stage_overrides: fields of `train`, or of `sft` for a supervised stage, for single stages, {stage name: {field:
        value}}.
      model: the model that the run starts from.
      mesh: how many devices each axis of the mesh has.
      domains: problems and data sets.
      rollout: sampling of training completions.
      train: GRPO stages.
      sft: supervised stages.
      checkpoints: checkpoints of a stage in training.
      evaluate: scores after every stage.
      analyze: the interference analysis.
      circuits: circuits of attention heads.
      recover: refreshes, rollbacks, merges and plans.
      rewards: the processes that compute rewards.
      track: service that also gets the curves of TensorBoard: "wandb", or "" for none (`report/track.py`).
    """

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
    circuits: CircuitsSection = CircuitsSection()
    recover: RecoverSection = RecoverSection()
    rewards: RewardSection = RewardSection()
    track: str = ""


# Names of fields in earlier versions -> names now; a config that uses an old name is refused with the new one.
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
    """The present name of a field that was renamed, e.g. "train.group_size" for "train.group"; "" if it was not.

    Args:
      path: dotted path of the field below the config, without "config.". `stage_overrides.STAGE` has the fields of
        `train`, or of `sft`: "stage_overrides.math.group" gives "stage_overrides.math.group_size".
    """
    stage = re.match(r"stage_overrides\.([^.]+)\.", path)
    if not stage:
        return RENAMED.get(path, "")
    section = "sft." if is_supervised(stage[1]) else "train."
    found = RENAMED.get(section + path[stage.end() :], "")
    return found and stage[0] + found.removeprefix(section)


def default() -> Config:
    """A new `ConfigDict` with all fields at their defaults, for a config file to change.

    It is annotated as `Config`, which it is not, so that editors and type checkers know the fields that a config file
    sets. `parse` turns the ConfigDict into a real `Config`.
    """
    return typing.cast(Config, ConfigDict(_as_dict(Config())))


def from_file(path: str | Path) -> Config:
    """The result of `get_config()` of another config file, so that a config can change a few of its fields.

    The code of the file runs, and `get_config` is called without arguments. The result is not checked. It is annotated
    as `Config` for the same reason as that of `default`.

    Args:
      path: the other file, relative to the current folder, not to the file that calls this.

    Raises:
      FileNotFoundError: if there is no such file.
      KeyError: if it does not define `get_config`.
      Exception: whatever the file or its `get_config` raises.
    """
    return runpy.run_path(str(path))["get_config"]()


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _as_dict(getattr(value, f.name)) for f in fields}
    return value


def _number(name: str, value: Any, kind: type) -> Any:
    # In Python True is an int, but it is no valid number in a config.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r} has the wrong type; it must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name}={value} is not valid; it must be a finite number")
    return value


def _fill(kind: Any, value: Any, name: str) -> Any:
    """Converts a value of a config to its declared type.

    Args:
      kind: the declared type: a section, a tuple, a mapping or a plain type.
      value: the value in the config.
      name: dotted path of the field, for error messages.

    Returns:
      The value as type `kind`.

    Raises:
      UserError: if the value has the wrong type, or a section has no such field.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{name}={value!r} has the wrong type; it must be a section of fields")
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
            raise UserError(f"{name}={value!r} has the wrong type; it must be a tuple")
        inner = typing.get_args(kind)[0]
        return tuple(_fill(inner, v, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is not None or isinstance(kind, types.UnionType):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{name}={value!r} has the wrong type; it must map names to values")
        plain = value.to_dict() if isinstance(value, ConfigDict) else value
        inner = typing.get_args(kind)[-1]
        return plain if inner is Any else {k: _fill(inner, v, f"{name}.{k}") for k, v in plain.items()}
    return _number(name, value, kind)


def parse(config: Config | ConfigDict | Mapping[str, Any]) -> Config:
    """The frozen, validated configuration.

    Args:
      config: a ConfigDict, such as `default()` returns, or nested mappings; fields that are absent have their defaults.
        It does not change. A configuration that was parsed before is refused.

    Raises:
      UserError: if a field is unknown, was renamed, or has a value of the wrong type or one that is not allowed; the
        message names the field and what is allowed. Names of stages, domains and recovery rules are checked later
        (`stage.resolve_stages`, `stages.rollback.check`).
    """
    parsed: Config = _fill(Config, config, "config")
    _check(parsed)
    return parsed


def is_supervised(stage: str) -> bool:
    """Whether a stage of this name trains on demonstrations, with the settings of `sft` in place of `train`.

    It does if the name without its label, up to its first `-`, is "pretrain" or "sft"; that the stage exists is not
    checked.
    """
    return stage.partition("@")[0].partition("-")[0] in SUPERVISED


def stage_config(config: Config, stage: str) -> TrainSection:
    """The GRPO settings of one stage: `config.train`, changed by the stage's prefix, then by its overrides.

    Args:
      config: the whole configuration, parsed.
      stage: name of the stage; it need not be in `config.stages`. Only prefixes in `PRESETS` change fields. For a
        supervised stage, whose overrides are of `sft`, the fields are those of `config.train`.

    Returns:
      A `TrainSection`. Of a section in it, such as `prevent`, only the fields that the prefix or the overrides name
      change.

    Raises:
      UserError: if an override names no field of `TrainSection` or has the wrong type, or if `GRPOConfig` or
        `OptimizerConfig` refuses a value. All other limits are checked by `parse`.
    """
    preset = PRESETS.get(stage.partition("-")[0], {}) if "-" in stage else {}
    changes = {} if is_supervised(stage) else _overrides(config, stage)
    return _fill(TrainSection, _merge(_merge(_as_dict(config.train), preset), changes), f"stage_overrides.{stage}")


def sft_config(config: Config, stage: str) -> SFTSection:
    """The settings of one supervised stage: `config.sft`, changed by the stage's overrides.

    Args:
      config: the whole configuration, parsed.
      stage: name of the stage; it need not be in `config.stages`. For a stage that is not supervised, the fields are
        those of `config.sft`.

    Raises:
      UserError: if an override names no field of `SFTSection` or has the wrong type, or if `OptimizerConfig` refuses a
        value. All other limits are checked by `parse`.
    """
    changes = _overrides(config, stage) if is_supervised(stage) else {}
    return _fill(SFTSection, _merge(_as_dict(config.sft), changes), f"stage_overrides.{stage}")


def own_config(config: Config, stage: str) -> TrainSection | SFTSection:
    """The settings that a stage of this name trains with: `sft_config` if it is supervised, otherwise `stage_config`.

    Args:
      config: the whole configuration, parsed.
      stage: name of the stage.

    Raises:
      UserError: as in these two.
    """
    return sft_config(config, stage) if is_supervised(stage) else stage_config(config, stage)


def _overrides(config: Config, stage: str) -> Mapping[str, Any]:
    changes = config.stage_overrides.get(stage, {})
    if not isinstance(changes, Mapping):
        raise UserError(f"stage_overrides.{stage}={changes!r} has the wrong type; it must be a section of fields")
    return changes


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _check_splits(config: Config) -> None:
    """Refuses splits on which a stage would choose, or fit what it makes, and be scored (definitions §14)."""
    scored, analyzed = config.evaluate.split, config.analyze.split
    for stage in config.stages:
        kind = stage.partition("-")[0]
        if (kind in CHOOSE or own_config(config, stage).target) and scored == "validation":
            raise UserError(
                f"evaluate.split={scored!r} would score stage {stage} on the prompts by which it chooses; it must be "
                "'test' in a run with this stage"
            )
        fitted = kind in FIT or stage_config(config, stage).prevent.transforms
        if fitted and analyzed != "train":
            raise UserError(
                f"analyze.split={analyzed!r} must be 'train' in a run with stage {stage}, which is made from these "
                "prompts and chosen or scored on the other splits"
            )
        if kind == "orders" and scored == "validation":
            raise UserError(
                f"evaluate.split={scored!r} has the prompts by which stage {stage} forecasts from backward transfer; "
                "it must be 'test' in a run with this stage"
            )
        if kind == "orders" and analyzed == scored:
            raise UserError(
                f"analyze.split={analyzed!r} is evaluate.split, so stage {stage} would compare its forecasts with "
                "scores of the same prompts; it must be 'train' in a run with this stage"
            )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_sft(s: SFTSection, where: str) -> None:
    """Checks the limits of a supervised stage's settings; `where` comes before the name of a field in a message."""
    at_least = {"steps": 1, "batch_size": 1, "grad_accum_steps": 1, "length": 2}
    at_least |= {"learning_rate": 0, "warmup_steps": 0, "checkpoint_every": 0}
    for field, least in at_least.items():
        value = getattr(s, field)
        _require(value >= least, f"{where}{field}={value} is not valid; it must be >= {least}")
    for field in ("decay", "noise", "noise_from"):
        value = getattr(s, field)
        _require(0 <= value <= 1, f"{where}{field}={value} is not valid; it must lie in [0, 1]")
    _require(
        s.batch_size % s.grad_accum_steps == 0,
        f"{where}batch_size={s.batch_size} is not divisible by grad_accum_steps={s.grad_accum_steps}",
    )


def _check(config: Config) -> None:
    c = config
    for name, choice, allowed in (
        ("model.weights", c.model.weights, ("load", "random")),
        ("model.dtype", c.model.dtype, ("float32", "bfloat16")),
        ("model.remat", c.model.remat, ("none", "full", "dots")),
        ("evaluate.split", c.evaluate.split, ("validation", "test")),
        ("analyze.split", c.analyze.split, ("train", "validation", "test")),
        ("analyze.dtype", c.analyze.dtype, ("float32", "bfloat16")),
        ("track", c.track, ("", "wandb")),
    ):
        known = ", ".join(x or "''" for x in allowed)
        _require(choice in allowed, f"{name}={choice!r} is not known; known: {known}")
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
        unsized = dataclasses.replace(getattr(c.domains, name), n_train=0, n_validation=0, n_test=0)
        _require(
            name in c.domains.sources or unsized == SourceConfig(),
            f"domains.{name} names no data set; set its field preset or its field files",
        )
    for stage in c.stage_overrides:
        _require(stage in c.stages, f"stage_overrides names {stage!r}, which is not in stages")
    for name, buckets in (
        ("prompt_buckets", c.rollout.prompt_buckets),
        ("completion_buckets", c.rollout.completion_buckets),
    ):
        growing = bool(buckets) and buckets[0] > 0 and list(buckets) == sorted(set(buckets))
        _require(growing, f"rollout.{name}={buckets} is not valid; it must be positive lengths in ascending order")
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
        ("analyze.held", c.analyze.held, 2),
        ("analyze.attention_logit_bytes", c.analyze.attention_logit_bytes, 1),
        ("circuits.blocks", c.circuits.blocks, 4),
        ("circuits.block", c.circuits.block, 2),
        ("circuits.differing", c.circuits.differing, 0),
        ("circuits.steps", c.circuits.steps, 1),
        ("circuits.seeds", c.circuits.seeds, 1),
        ("circuits.tried", c.circuits.tried, 1),
        ("circuits.at_once", c.circuits.at_once, 1),
        ("circuits.random_sets", c.circuits.random_sets, 2),
        ("circuits.single_blocks", c.circuits.single_blocks, 1),
        ("circuits.match", c.circuits.match, 0),
        ("recover.n_reweighted", c.recover.n_reweighted, 0),
        ("rewards.workers", c.rewards.workers, 1),
        ("rewards.memory_mb", c.rewards.memory_mb, 128),
    ):
        _require(value >= least, f"{name}={value} is not valid; it must be >= {least}")
    for field in ("cpu_seconds", "deadline_seconds"):
        value = getattr(c.rewards, field)
        _require(value > 0, f"rewards.{field}={value} is not valid; it must be above 0")
    priced = len(c.circuits.penalties) > 0 and all(p > 0 for p in c.circuits.penalties)
    _require(priced, f"circuits.penalties={c.circuits.penalties} is not valid; name at least one, each above 0")
    loss = c.circuits.loss
    _require(loss in CIRCUIT_LOSSES, f"circuits.loss={loss!r} is not one of {CIRCUIT_LOSSES}")
    rate = c.circuits.learning_rate
    _require(rate > 0, f"circuits.learning_rate={rate} is not valid; it must be above 0")
    a = c.analyze
    even = a.prompts >= 4 * a.batch and a.prompts % (2 * a.batch) == 0
    _require(
        even,
        f"analyze.prompts={a.prompts} is not valid; it must be a multiple of 2 * analyze.batch and at least "
        f"4 * analyze.batch, with analyze.batch={a.batch}",
    )
    on_path = 0 < a.path_prompts <= a.prompts and a.path_prompts % a.batch == 0
    _require(
        on_path,
        f"analyze.path_prompts={a.path_prompts} is not valid; it must be a positive multiple of "
        f"analyze.batch={a.batch} and at most analyze.prompts={a.prompts}",
    )
    found = a.lanczos_block * a.lanczos_steps
    _require(
        3 * a.vectors <= found,
        f"analyze.vectors={a.vectors} is not valid; it must be at most a third of "
        f"lanczos_block * lanczos_steps = {found}",
    )
    _require(
        a.permutations == 0 or a.permutations >= 40,
        f"analyze.permutations={a.permutations} is not valid; it must be at least 40, or 0 for no null",
    )
    spaces = len(set(a.removal_spaces)) == len(a.removal_spaces) and set(a.removal_spaces) <= {"heads", "all"}
    _require(
        spaces,
        f"analyze.removal_spaces={a.removal_spaces!r} is not valid; it may name 'heads' and 'all', each once",
    )
    _require(c.rewards.sandbox in CHOICES, f"rewards.sandbox={c.rewards.sandbox!r} is not one of {CHOICES}")
    _require(0 < c.rewards.max_error_share <= 1, "rewards.max_error_share must be above 0 and at most 1")
    _check_sft(c.sft, "sft.")
    for i, stage in enumerate(c.stages):
        s = stage_config(c, stage)
        where = f"stage {stage}"
        for field in ("steps", "prompts_per_step", "max_rounds", "turn", "grad_accum_steps"):
            _require(getattr(s, field) >= 1, f"{where}: {field}={getattr(s, field)} is not valid; it must be >= 1")
        _require(
            s.group_size >= 2,
            f"{where}: group_size={s.group_size} is not valid; GRPO compares at least 2 completions of each prompt",
        )
        for field in ("learning_rate", "warmup_steps", "checkpoint_every", "kl_every", "n_prompts"):
            _require(getattr(s, field) >= 0, f"{where}: {field}={getattr(s, field)} is not valid; it must be >= 0")
        f = s.filter
        _require(
            0 <= f.low < f.high <= 1,
            f"{where}: filter.low, filter.high = {f.low}, {f.high} are not valid; 0 <= low < high <= 1",
        )
        _require(f.prompts >= 0, f"{where}: filter.prompts={f.prompts} is not valid; it must be >= 0")
        parts = c.rollout.parts
        n, rows = s.prompts_per_step, s.prompts_per_step * s.group_size
        _require(n % parts == 0, f"{where}: prompts_per_step={n} is not divisible by rollout.parts={parts}")
        parts = s.grad_accum_steps
        _require(
            rows % parts == 0,
            f"{where}: prompts_per_step * group_size = {rows} is not divisible by grad_accum_steps={parts}",
        )
        own = own_config(c, stage)
        if isinstance(own, SFTSection):
            _check_sft(own, f"{where}: ")
        earlier = tuple(s for s in c.stages[:i] if s != "analyze")
        starts = {"start": own.start} | ({"reference": own.reference} if isinstance(own, TrainSection) else {})
        starts |= {"distill.teacher": s.distill.teacher} if stage.partition("-")[0] == "distill" else {}
        for field, value in starts.items():
            _require(value in ("", "base", *earlier), f"{where}: {field}={value!r} is not an earlier stage or 'base'")
        _require(own.target in ("", *earlier), f"{where}: target={own.target!r} is not an earlier stage")
        _require(own.target_every >= 1, f"{where}: target_every={own.target_every} is not valid; it must be >= 1")
        p = s.prevent
        _require(
            p.gradients in GRADIENTS,
            f"{where}: prevent.gradients={p.gradients!r} is not known; known: {', '.join(GRADIENTS)}",
        )
        _require(
            p.module in ("tensor", "layer"),
            f"{where}: prevent.module={p.module!r} is not known; known: tensor, layer",
        )
        _require(0 <= p.replay < 1, f"{where}: prevent.replay={p.replay} is not valid; 0 <= replay < 1")
        _require(0 <= p.protect <= 1, f"{where}: prevent.protect={p.protect} is not valid; it must lie in [0, 1]")
        _require(p.ewc >= 0, f"{where}: prevent.ewc={p.ewc} is not valid; it must be >= 0")
        _require(p.vectors >= 1, f"{where}: prevent.vectors={p.vectors} is not valid; it must be >= 1")
    _check_splits(c)
    r = c.recover
    whole = r.forecast_prompts >= 1 and r.forecast_prompts % a.batch == 0
    _require(
        whole or "plan" not in c.stages,
        f"recover.forecast_prompts={r.forecast_prompts} is not valid; it must be a positive multiple of "
        f"analyze.batch={a.batch} in a run with stage plan",
    )
    _require(
        r.prompts >= 2 or "plan" not in c.stages,
        f"recover.prompts={r.prompts} is not valid; it must be >= 2 in a run with stage plan",
    )
    for field in ("prompts", "samples", "every", "streams", "control_draws"):
        _require(getattr(r, field) >= 1, f"recover.{field}={getattr(r, field)} is not valid; it must be >= 1")
    for field in ("margin", "limit", "random_sets", "control_half_width", "control_tokens"):
        _require(getattr(r, field) >= 0, f"recover.{field}={getattr(r, field)} is not valid; it must be >= 0")
    for field in ("rules", "fractions", "strengths", "scales", "thresholds", "drop_rates"):
        _require(len(getattr(r, field)) > 0, f"recover.{field} is empty; name at least one")
    for field, holds, allowed in (
        ("thresholds", all(v >= 0 for v in r.thresholds), "at least 0"),
        ("drop_rates", all(0 <= v < 1 for v in r.drop_rates), "at least 0 and below 1"),
    ):
        _require(holds, f"recover.{field}={getattr(r, field)} is not valid; every value must be {allowed}")
    for field, values in (("fractions", r.fractions), ("density", (r.density,))):
        _require(
            all(0 < v <= 1 for v in values),
            f"recover.{field}={values} is not valid; every value must be above 0 and at most 1",
        )
