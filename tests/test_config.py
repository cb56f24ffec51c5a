"""Tests of the configuration: a wrong value gives one line that names its field, and the code reads every field."""

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import mdrl_jax
from configs import paper_qwen3_4b, real_local, smollm2_135m
from mdrl_jax import config as config_module
from mdrl_jax import workfolder
from mdrl_jax.config import RENAMED, Config, default, parse, renamed, sft_config, stage_config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.stage import ALL_DOMAINS, PREFIXES, resolve_stages

PACKAGE = Path(mdrl_jax.__file__).parent

# (change of the configuration, text that the error message must contain)
WRONG = [
    ({"sed": 1}, "config.sed"),
    ({"train": {"rate": 1.0}}, "config.train.rate"),
    ({"train": {"grpo": {"beta": 0.1}}}, "config.train.grpo.beta"),
    ({"seed": True}, "config.seed"),
    ({"seed": 1.0}, "config.seed"),
    ({"seed": "1"}, "config.seed"),
    ({"seed": None}, "config.seed"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"train": {"learning_rate": "1e-3"}}, "config.train.learning_rate"),
    ({"train": {"learning_rate": True}}, "config.train.learning_rate"),
    ({"train": 3}, "config.train"),
    ({"train": {"grpo": {"mask_overlong": 1}}}, "config.train.grpo.mask_overlong"),
    ({"model": {"path": 3}}, "config.model.path"),
    ({"stages": "math"}, "config.stages"),
    ({"stages": ("math", 3)}, "config.stages[1]"),
    ({"rollout": {"prompt_buckets": (8, "16")}}, "config.rollout.prompt_buckets[1]"),
    ({"rollout": {"prompt_buckets": 8}}, "config.rollout.prompt_buckets"),
    ({"model": {"weights": "loaded"}}, "model.weights"),
    ({"model": {"dtype": "float16"}}, "model.dtype"),
    ({"model": {"remat": "all"}}, "model.remat"),
    ({"model": {"logprob_chunk": -1}}, "model.logprob_chunk"),
    ({"evaluate": {"split": "train"}}, "evaluate.split"),
    ({"evaluate": {"samples": 0}}, "evaluate.samples"),
    ({"evaluate": {"batch": 0}}, "evaluate.batch"),
    ({"evaluate": {"shown": -1}}, "evaluate.shown"),
    ({"evaluate": {"sampling": {"top_p": 0.0}}}, "config.evaluate.sampling: top_p"),
    ({"rewards": {"workers": 0}}, "rewards.workers"),
    ({"rewards": {"memory_mb": 1}}, "rewards.memory_mb"),
    ({"rewards": {"sandbox": "docker"}}, "rewards.sandbox"),
    ({"rewards": {"cpu_seconds": 0.0}}, "rewards.cpu_seconds"),
    ({"rewards": {"deadline_seconds": -1.0}}, "rewards.deadline_seconds"),
    ({"rewards": {"max_error_share": 0.0}}, "rewards.max_error_share"),
    ({"sft": {"steps": 0}}, "sft.steps"),
    ({"sft": {"batch_size": 0}}, "sft.batch_size"),
    ({"sft": {"grad_accum_steps": 0}}, "sft.grad_accum_steps"),
    ({"sft": {"batch_size": 10, "grad_accum_steps": 3}}, "sft.batch_size"),
    ({"sft": {"learning_rate": -1.0}}, "sft.learning_rate"),
    ({"train": {"learning_rate": 10**400}}, "config.train.learning_rate=inf is not valid; it must be a finite number"),
    ({"sft": {"warmup_steps": -1}}, "sft.warmup_steps"),
    ({"sft": {"checkpoint_every": -1}}, "sft.checkpoint_every"),
    ({"sft": {"decay": 1.5}}, "sft.decay"),
    ({"sft": {"noise": -0.1}}, "sft.noise"),
    ({"sft": {"noise_from": float("nan")}}, "sft.noise_from"),
    ({"stages": ()}, "stages"),
    ({"stages": ("math", "qa", "math")}, "'math' is listed twice"),
    ({"scored_domains": ()}, "scored_domains"),
    ({"scored_domains": ("math", "qa", "math")}, "scored_domains"),
    ({"rollout": {"prompt_buckets": ()}}, "rollout.prompt_buckets"),
    ({"rollout": {"prompt_buckets": (0, 8)}}, "rollout.prompt_buckets"),
    ({"rollout": {"completion_buckets": (16, 8)}}, "rollout.completion_buckets"),
    ({"rollout": {"completion_buckets": (8, 8)}}, "rollout.completion_buckets"),
    ({"rollout": {"sampling": {"temperature": 0.0}}}, "rollout.sampling.temperature"),
    ({"rollout": {"sampling": {"temperature": -1.0}}}, "config.rollout.sampling: temperature"),
    ({"rollout": {"sampling": {"top_k": -1}}}, "config.rollout.sampling: top_k"),
    ({"evaluate": {"sampling": {"temperature": float("nan")}}}, "config.evaluate.sampling.temperature=nan"),
    ({"analyze": {"split": "dev"}}, "analyze.split"),
    ({"analyze": {"dtype": "float64"}}, "analyze.dtype"),
    ({"stages": ("qa", "orders"), "analyze": {"split": "test"}}, "analyze.split='test' is evaluate.split"),
    ({"train": {"prevent": {"ewc": 1.0}}, "analyze": {"split": "validation"}}, "analyze.split='validation' must be"),
    ({"stages": ("qa", "math", "protect-math"), "analyze": {"split": "test"}}, "analyze.split='test' must be 'train'"),
    ({"analyze": {"group_size": 1}}, "analyze.group_size"),
    ({"analyze": {"prompts": 120}}, "analyze.prompts=120"),
    ({"analyze": {"prompts": 32}}, "analyze.prompts=32"),
    ({"analyze": {"path_prompts": 24}}, "analyze.path_prompts=24"),
    ({"analyze": {"path_prompts": 256}}, "analyze.path_prompts=256"),
    ({"analyze": {"vectors": 17}}, "analyze.vectors=17 is not valid; it must be at most a third of"),
    ({"analyze": {"lanczos_block": 1}}, "analyze.lanczos_block"),
    ({"analyze": {"held": 1}}, "analyze.held"),
    ({"analyze": {"permutations": -1}}, "analyze.permutations=-1"),
    ({"analyze": {"permutations": 39}}, "analyze.permutations=39 is not valid; it must be at least 40, or 0"),
    ({"stages": ("math", "plan"), "recover": {"forecast_prompts": 24}}, "recover.forecast_prompts=24 is not valid"),
    ({"stages": ("math", "plan"), "recover": {"forecast_prompts": 0}}, "recover.forecast_prompts=0 is not valid"),
    (
        {"stages": ("math", "plan"), "recover": {"prompts": 1}},
        "recover.prompts=1 is not valid; it must be >= 2 in a run",
    ),
    ({"stages": ("math", "analyze", "qa"), "stage_overrides": {"qa": {"start": "analyze"}}}, "start='analyze'"),
    ({"train": {"steps": 0}}, "steps"),
    ({"train": {"prompts_per_step": 0}}, "prompts_per_step"),
    ({"train": {"group_size": 1}}, "group_size"),
    ({"train": {"grad_accum_steps": 0}}, "grad_accum_steps"),
    ({"train": {"prompts_per_step": 3, "group_size": 5, "grad_accum_steps": 2}}, "grad_accum_steps"),
    ({"train": {"learning_rate": -1e-3}}, "learning_rate"),
    ({"train": {"warmup_steps": -1}}, "warmup_steps"),
    ({"train": {"checkpoint_every": -1}}, "checkpoint_every"),
    ({"train": {"kl_every": -1}}, "kl_every"),
    ({"train": {"start": "finetune"}}, "start='finetune'"),
    ({"train": {"grpo": {"aggregation": "mean"}}}, "config.train.grpo: aggregation"),
    ({"train": {"grpo": {"clip_low": 2.0}}}, "config.train.grpo: clip_low"),
    ({"train": {"grpo": {"updates_per_batch": 0}}}, "config.train.grpo: updates_per_batch"),
    ({"train": {"optimizer": {"b2": 1.0}}}, "config.train.optimizer: b2"),
    ({"train": {"optimizer": {"eps": -1e-8}}}, "config.train.optimizer: eps"),
    ({"train": {"optimizer": {"weight_decay": float("nan")}}}, "config.train.optimizer.weight_decay=nan"),
    ({"sft": {"optimizer": {"b1": -0.1}}}, "config.sft.optimizer: b1"),
    ({"domains": {"n_test": 0}}, "domains.n_test"),
    ({"domains": {"thinking": "yes"}}, "domains.thinking"),
    ({"domains": {"math": {"preset": "gsm9k"}}}, "domains.math.preset='gsm9k'"),
    ({"domains": {"math": {"preset": "longbench_write"}}}, "domains.math.files"),
    ({"domains": {"math": {"files": ("a.jsonl",)}}}, "domains.math.prompt"),
    ({"domains": {"math": {"files": ("a.jsonl",), "prompt": "{q}"}}}, "domains.math.reward"),
    ({"domains": {"math": {"files": "a.jsonl"}}}, "config.domains.math.files"),
    ({"domains": {"math": {"prompt": "{q}", "n_test": 4}}}, "domains.math names no data set"),
    ({"domains": {"math": {"preset": "gsm8k", "check": {"answer": 3}}}}, "config.domains.math.check.answer"),
    ({"domains": {"math": {"preset": "gsm8k", "check": "answer"}}}, "config.domains.math.check"),
    (
        {"domains": {"math": {"preset": "gsm8k", "test_share": 1.0}}},
        "config.domains.math: validation_share, test_share",
    ),
    ({"domains": {"math": {"preset": "gsm8k", "max_bad_rows": -1}}}, "config.domains.math: max_bad_rows"),
    ({"domains": {"math": {"preset": "gsm8k", "n_train": -1}}}, "config.domains.math: n_train"),
    ({"stage_overrides": {"rest": {"steps": 1}}}, "'rest'"),
    ({"stage_overrides": {"math": {"stepz": 1}}}, "stage_overrides.math.stepz"),
    ({"stage_overrides": {"math": {"steps": 1.5}}}, "stage_overrides.math.steps"),
    ({"stage_overrides": {"math": {"group_size": 1}}}, "stage math: group_size"),
    ({"stage_overrides": {"math": {"grpo": {"ratio": "none"}}}}, "stage_overrides.math.grpo: ratio"),
    ({"stage_overrides": {"math": {"start": "qa"}}}, "stage math: start='qa'"),
    ({"stage_overrides": {"math": {"prevent": {"module": "head"}}}}, "stage math: prevent.module='head'"),
    ({"recover": {"thresholds": (-1.0,)}}, "recover.thresholds=(-1.0,)"),
    ({"recover": {"drop_rates": (1.0,)}}, "recover.drop_rates=(1.0,)"),
    ({"stage_overrides": {"math": 3}}, "stage_overrides.math"),
    ({"stage_overrides": 3}, "stage_overrides"),
]


PATH = ("math", "qa")
SOLOS = tuple(f"solo-{d}" for d in ("code", "math", "qa", "cw"))
CHOICES = ["refresh-math", "distill-math", "alternate-math-qa", "rollback-math-qa", "arithmetic", "ties", "ram", "dare"]
CHOICES += ["plan", "recover", "trials"]
FITTED = ["rollback-math-qa", "plan", "recover", "trials", "protect-qa", "ewc-qa", "agem-qa", "pcgrad-qa", "mgs-qa"]
PLAIN = ["analyze", "again-qa", "placebo-qa", "joint", "average", "replay-qa", "kl-qa", "reversed-qa", "sft", "sft-qa"]
PLAIN += ["circuits-math"]


@pytest.mark.parametrize("stage", CHOICES)
def test_what_is_chosen_on_validation_prompts_is_not_scored_on_them(stage: str):
    stages = (*PATH, *SOLOS, stage)
    parse({"stages": stages})
    told = (
        f"evaluate.split='validation' would score stage {stage} on the prompts by which it chooses; it must be 'test'"
    )
    with pytest.raises(UserError, match=re.escape(told)):
        parse({"stages": stages, "evaluate": {"split": "validation"}})


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("stage", FITTED)
def test_what_is_made_from_prompts_of_the_analysis_needs_training_prompts(stage: str, split: str):
    with pytest.raises(UserError, match=f"analyze.split='{split}' must be 'train' in a run with stage {stage}"):
        parse({"stages": (*PATH, stage), "analyze": {"split": split}})


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("stage", PLAIN)
def test_a_run_without_choices_may_use_any_split(stage: str, split: str):
    parse({"stages": (*PATH, *SOLOS, stage), "evaluate": {"split": "validation"}, "analyze": {"split": split}})


def test_forecasts_of_orders_and_their_scores_use_different_prompts():
    stages = (*PATH, *SOLOS, "orders")
    parse({"stages": stages, "analyze": {"split": "validation"}})
    with pytest.raises(UserError, match="analyze.split='test' is evaluate.split"):
        parse({"stages": stages, "analyze": {"split": "test"}})
    with pytest.raises(UserError, match="evaluate.split='validation' has the prompts by which stage orders forecasts"):
        parse({"stages": stages, "evaluate": {"split": "validation"}})


def test_every_kind_of_stage_is_known_to_choose_or_not():
    """A new kind of stage has to be added to the lists above, and to `config.CHOOSE` or `config.FIT` if it belongs."""
    named = {s.partition("-")[0] for s in (*CHOICES, *FITTED, *PLAIN, *SOLOS, "orders", "pretrain", "locality-math")}
    assert named == {*ALL_DOMAINS, *PREFIXES, "rollback"}


@pytest.mark.parametrize("change, named", WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_wrong_value_is_one_line_naming_its_field(change: dict[str, Any], named: str):
    with pytest.raises(UserError) as caught:
        parse(change)
    assert "\n" not in str(caught.value)
    assert named in str(caught.value)


def test_a_whole_number_is_accepted_for_a_float_and_becomes_one():
    config = parse({"train": {"learning_rate": 1, "optimizer": {"clip_norm": 2}}})
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert type(config.train.optimizer.clip_norm) is float


def test_defaults_round_trip_through_configdict_and_json():
    assert parse(default()) == Config()
    written = json.loads(json.dumps(workfolder.resolved(Config())))
    assert parse(written) == Config()
    changed: Any = default()
    changed.stages = ("code", "refresh-code")
    changed.stage_overrides = {"refresh-code": {"steps": 8, "grpo": {"clip_low": 0.1}}}
    changed.rollout.prompt_buckets = (4, 8)
    config = parse(changed)
    assert type(config.stage_overrides["refresh-code"]) is dict
    assert parse(json.loads(json.dumps(workfolder.resolved(config)))) == config


def test_a_folder_from_before_data_sets_is_read_with_their_defaults():
    written = workfolder.resolved(Config())
    written["domains"] = {
        k: written["domains"][k] for k in ("seed", "n_train", "n_validation", "n_test", "style_blind")
    }
    assert parse(json.loads(json.dumps(written))) == Config()


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_field_of_an_earlier_version_is_refused_with_its_new_name(old: str, new: str):
    def nested(path: str) -> dict[str, Any]:
        change: Any = 4
        for name in reversed(path.split(".")):
            change = {name: change}
        return change

    with pytest.raises(UserError, match=rf"^config\.{re.escape(old)} is now called {re.escape(new)}$"):
        parse(nested(old))
    assert not renamed(new)
    fields: Any = default()
    for name in new.split("."):
        fields = fields[name]
    if old.startswith("train."):
        inside = f"stage_overrides.math.{old.removeprefix('train.')}"
        with pytest.raises(UserError, match=rf"^{re.escape(inside)} is now called stage_overrides\.math\."):
            parse({"stages": ("math",), **nested(inside)})


def test_the_type_that_editors_see_is_that_of_the_configdict():
    """`default()` is annotated to return `Config`. The ConfigDict that it returns has the same fields and types."""

    def same(fields: Any, kind: Any, where: str) -> None:
        hints = typing.get_type_hints(kind)
        assert set(fields) == set(hints), where
        for name, hint in hints.items():
            value, inner = fields[name], typing.get_origin(hint) or hint
            if dataclasses.is_dataclass(hint):
                same(value, hint, f"{where}.{name}")
            else:
                expected = ConfigDict if issubclass(inner, Mapping) else inner
                assert isinstance(value, expected), f"{where}.{name}"

    made: Any = default()
    assert isinstance(made, ConfigDict) and typing.get_type_hints(default)["return"] is Config
    same(made, Config, "config")


def test_data_sets_are_written_and_read_back():
    changed: Any = default()
    changed.domains.math.preset = "gsm8k"
    changed.domains.math.files = ("a.jsonl", "b/*.parquet")
    changed.domains.qa.files = ("c.csv",)
    changed.domains.qa.check = {"answer": "a"}
    changed.domains.qa.prompt, changed.domains.qa.reward = "{q}", "qa"
    config = parse(changed)
    assert set(config.domains.sources) == {"math", "qa"}
    assert config.domains.qa.check == {"answer": "a"} and type(config.domains.qa.check) is dict
    assert parse(json.loads(json.dumps(workfolder.resolved(config)))) == config


def test_the_configs_of_real_data_are_whole():
    local, paper = parse(real_local.get_config("there")), parse(paper_qwen3_4b.get_config())
    small = parse(smollm2_135m.get_config("there"))
    stages = {s.name: s for s in resolve_stages(small, tuple(DOMAINS))}
    assert stages["sft"].domains == ("code", "math", "qa") and stages["code"].start == "sft"
    assert set(small.domains.sources) == set(DOMAINS) and small.domains.code.files == ("there/code/mbpp.jsonl",)
    assert local.domains.math.test_files == ("there/math/gsm8k_test.jsonl",)
    assert set(local.domains.sources) == set(paper.domains.sources) == {"code", "math", "qa", "cw"}
    assert [s for s in paper.stages if s in DOMAINS] == ["code", "math", "qa", "cw"]
    # The published set-up of definitions §0.
    assert (paper.domains.n_train, paper.rollout.prompt_buckets[-1], paper.domains.n_validation) == (5120, 2048, 50)
    assert paper.rollout.completion_buckets[-1] == 8192 and paper.domains.qa.n_test == 2141
    assert paper.train.steps * paper.train.prompts_per_step == 5120
    assert (paper.train.group_size, paper.train.learning_rate, paper.train.grpo.kl_coef) == (8, 1e-6, 1e-3)
    assert paper.rollout.sampling.temperature == paper.evaluate.sampling.temperature == 0.7


@pytest.mark.parametrize("key", ["fingerprint", None])
def test_a_run_does_not_go_on_with_other_prompts(tmp_path: Path, key: str | None):
    folder = workfolder.WorkFolder(tmp_path)
    splits = {split: {"prompts": 3, "fingerprint": f"{split} 1"} for split in ("train", "test")}
    folder.open_data({"math": {"rows": 9, "splits": splits}})
    again = {**splits, "train": splits["train"] | ({key: "train 2"} if key else {})}
    if key:
        with pytest.raises(UserError, match="different train prompts of math: a data file was changed"):
            folder.open_data({"math": {"rows": 9, "splits": again}})
    else:
        folder.open_data({"math": {"rows": 10, "splits": again}})
    assert json.loads((tmp_path / "data.json").read_text())["math"]["rows"] == (9 if key else 10)


def test_a_run_does_not_go_on_with_other_demonstrations(tmp_path: Path):
    """A supervised stage may be added to a run; its rows may not change afterwards."""
    folder = workfolder.WorkFolder(tmp_path)
    math: dict[str, Any] = {"splits": {"train": {"fingerprint": "1"}}}
    folder.open_data({"math": math})
    shown = {"sft-math": {"fingerprint": "1"}}
    folder.open_data({"math": math | {"demonstrations": shown}})
    folder.open_data({"math": math | {"demonstrations": {**shown, "sft": {"fingerprint": "7"}}}})
    for stage in ("sft-math", "sft"):
        with pytest.raises(UserError, match=rf"different demonstrations \({stage}\) of math: a data file was changed"):
            folder.open_data({"math": math | {"demonstrations": {stage: {"fingerprint": "2"}}}})


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(default()).train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_overrides_change_single_fields_of_single_stages(kind: Any):
    changes = {"math": {"steps": 3, "grpo": {"clip_high": 0.5}, "optimizer": {"b1": 0.5}}}
    config = parse(kind({"train": {"prompts_per_step": 8, "grpo": {"clip_low": 0.1}}, "stage_overrides": changes}))
    section, plain = stage_config(config, "math"), stage_config(config, "qa")
    assert plain == config.train
    assert (section.steps, section.prompts_per_step) == (3, 8)
    assert (section.grpo.clip_high, section.grpo.clip_low) == (0.5, 0.1)
    assert section.optimizer == dataclasses.replace(config.train.optimizer, b1=0.5)
    rest = {"steps": plain.steps, "grpo": plain.grpo, "optimizer": plain.optimizer}
    assert dataclasses.replace(section, **rest) == plain


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_overrides_of_a_supervised_stage_change_fields_of_sft(kind: Any):
    changes = {"sft-qa": {"steps": 3, "start": "base", "optimizer": {"b1": 0.5}}, "qa": {"steps": 5}}
    stages = ("math", "qa", "sft", "sft-qa")
    config = parse(kind({"stages": stages, "sft": {"length": 40, "steps": 7}, "stage_overrides": changes}))
    made, plain = sft_config(config, "sft-qa"), sft_config(config, "sft")
    assert plain == config.sft == sft_config(config, "qa")
    assert (made.steps, made.start, made.length, made.optimizer.b1) == (3, "base", 40, 0.5)
    assert dataclasses.replace(made, steps=7, start="", optimizer=plain.optimizer) == plain
    assert stage_config(config, "sft-qa") == config.train and stage_config(config, "qa").steps == 5


SFT_FIELDS = ", ".join(f.name for f in dataclasses.fields(config_module.SFTSection))
WRONG_IN_SFT = [
    ({"group_size": 4}, f"unknown field stage_overrides.sft-qa.group_size; stage_overrides.sft-qa has {SFT_FIELDS}"),
    (
        {"micro_batches": 4},
        "stage_overrides.sft-qa.micro_batches is now called stage_overrides.sft-qa.grad_accum_steps",
    ),
    ({"steps": 0}, "stage sft-qa: steps=0 is not valid; it must be >= 1"),
    ({"group": 4}, "unknown field stage_overrides.sft-qa.group; stage_overrides.sft-qa has"),
    ({"length": 1}, "stage sft-qa: length=1 is not valid; it must be >= 2"),
    ({"noise": 2.0}, "stage sft-qa: noise=2.0 is not valid; it must lie in [0, 1]"),
    ({"batch_size": 7, "grad_accum_steps": 2}, "stage sft-qa: batch_size=7 is not divisible by grad_accum_steps=2"),
    ({"start": "cw"}, "stage sft-qa: start='cw' is not an earlier stage or 'base'"),
    ({"target": "base"}, "stage sft-qa: target='base' is not an earlier stage"),
    ({"target": "qa", "target_every": 0}, "stage sft-qa: target_every=0 is not valid; it must be >= 1"),
]


@pytest.mark.parametrize("change, told", WRONG_IN_SFT, ids=[told[:40] for _, told in WRONG_IN_SFT])
def test_a_wrong_override_of_a_supervised_stage_is_told(change: dict[str, Any], told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        parse({"stages": ("math", "qa", "sft-qa", "cw"), "stage_overrides": {"sft-qa": change}})


@pytest.mark.parametrize("stage", ["sft-qa", "solo-qa"])
def test_a_stage_that_ends_by_validation_prompts_is_not_scored_on_them(stage: str):
    fields = {"stages": (*PATH, stage), "stage_overrides": {stage: {"target": "qa"}}}
    parse(fields)
    with pytest.raises(UserError, match=f"evaluate.split='validation' would score stage {stage} on the prompts by"):
        parse({**fields, "evaluate": {"split": "validation"}})


def test_a_start_may_be_base_or_an_earlier_stage():
    overrides = {"math": {"start": "base"}, "qa": {"start": "code"}}
    config = parse({"stage_overrides": overrides})
    assert stage_config(config, "qa").start == "code"


def sections(kind: Any) -> set[Any]:
    """A dataclass and all dataclasses nested in its fields."""
    hints = typing.get_type_hints(kind)
    held = {hint for hint in hints.values() if dataclasses.is_dataclass(hint)}
    return {kind}.union(*(sections(inner) for inner in held))


CHECKS = ("_check", "_check_splits", "_check_stage", "__post_init__")  # functions that only validate
TREES = [ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))]


def annotated(node: ast.expr | None) -> str:
    """The name of the class in an annotation, or several joined by "|"; "" if it is anything else."""
    if isinstance(node, ast.BinOp):  # Class | None, or Class | Other
        return "|".join(filter(None, (annotated(node.left), annotated(node.right))))
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def declared() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Annotations of the whole package.

    Returns:
      attributes: name of a class -> its attributes and properties -> the name of their class.
      returns: name of a function -> the name of the class that it returns.
    """
    attributes: dict[str, dict[str, str]] = {}
    returns: dict[str, str] = {}
    for node in (n for tree in TREES for n in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            known = attributes.setdefault(node.name, {})
            for part in ast.walk(node):
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    known[part.target.id] = annotated(part.annotation)
                if isinstance(part, ast.FunctionDef) and any(annotated(d) == "property" for d in part.decorator_list):
                    known[part.name] = annotated(part.returns)
        elif isinstance(node, ast.FunctionDef):
            returns[node.name] = annotated(node.returns)
    return attributes, returns


class Reads(ast.NodeVisitor):
    """Finds every field of a section that code reads, such as `runtime.config.train.steps`, outside of validation.

    It infers the class of an expression from the annotations of parameters, attributes and returned values.

    Attributes:
      found: (section, field) of every field that is read.
      attributes: as `declared` returns them.
      returns: as `declared` returns them.
      names: variable -> name of its class, in the function being visited.
      inside: name of the class being visited.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.attributes, self.returns = declared()
        self.names: dict[str, str] = {}
        self.inside = ""

    def kind(self, node: ast.expr) -> str:
        """The name of the class of an expression, or several joined by "|"; "" if it is not known."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            of = (self.attributes.get(name, {}).get(node.attr, "") for name in self.kind(node.value).split("|"))
            return next(filter(None, of), "")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            return self.kind(node.args[0]) if name == "replace" and node.args else self.returns.get(name, "")
        return ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.inside = self.inside, node.name
        self.generic_visit(node)
        self.inside = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in CHECKS:
            return
        outer, self.names = self.names, dict(self.names)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.names[argument.arg] = self.inside if argument.arg == "self" else annotated(argument.annotation)
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for to, value in pairs:
                if isinstance(to, ast.Name):
                    self.names[to.id] = self.kind(value)
                elif isinstance(to, ast.Attribute) and getattr(to.value, "id", "") == "self" and self.kind(value):
                    self.attributes[self.inside].setdefault(to.attr, self.kind(value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(name, node.attr) for name in self.kind(node.value).split("|")}
        self.generic_visit(node)


def test_every_field_is_read_somewhere_by_its_path():
    reads = Reads()
    for tree in TREES:
        reads.visit(tree)
    found = sections(Config)
    assert len(found) >= 10
    unread = {f"{s.__name__}.{f.name}" for s in found for f in dataclasses.fields(s)}
    unread -= {f"{section}.{field}" for section, field in reads.found}
    assert not unread, f"declared but never read: {sorted(unread)}"
