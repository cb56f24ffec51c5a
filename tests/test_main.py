"""Tests of users' mistakes: each gives one line on standard error and exit status 2, never a traceback."""

import contextlib
import dataclasses
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import mdrl_jax
from mdrl_jax import main as main_module
from mdrl_jax import records
from mdrl_jax.config import EMBEDDED_MODEL, default, parse
from mdrl_jax.domains import registry
from mdrl_jax.domains.base import Domain, DomainsConfig
from mdrl_jax.errors import UserError
from mdrl_jax.main import COMMANDS, main
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.workfolder import LOCK, WorkFolder, flat

CONFIG = """
from mdrl_jax import config

def get_config():
    c = config.default()
    c.stages = ("qa",)
    c.scored_domains = ("qa",)
    c.model.weights = "random"
    c.rollout.prompt_buckets = (12,)
    c.train.prompts_per_step = 8
    c.train.steps = 1
    c.evaluate.batch = 8
    c.evaluate.samples = 1
    c.domains.n_test = 8
    return c
"""
Refused = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config file of one short stage."""
    file = tmp_path / "short.py"
    file.write_text(CONFIG)
    return f"--config={file}"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs a command line, checks that it is refused with one line, and returns the line."""

    def run(*argv: str) -> str:
        # Otherwise a second config file in one process would be loaded into the module of the first one.
        sys.modules.pop("config_config", None)
        status = main(["mdrl", *argv])
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("mdrl: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Path and content of every file in a folder and its subfolders."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- flags ------------------------------------------------------------------------------------------------------------


def test_commands_and_flags_that_do_not_exist(refused: Refused, config: str):
    line = refused("train", config)
    assert "'train'" in line and all(name in line for name in COMMANDS)
    assert "work" in refused("run", config, "--work=x")
    assert "'extra'" in refused("run", config, "extra")
    assert "temperature" in refused("generate", "--model=tiny", "--prompt=x", "--temperature=hot")
    assert "max_new_tokens" in refused("generate", "--model=tiny", "--prompt=x", "--max_new_tokens=0")


@pytest.mark.parametrize(
    "argv, missing",
    [
        (["run"], "--config"),
        (["evaluate", "--model=tiny"], "--config"),
        (["generate", "--prompt=x"], "--model"),
        (["generate", "--model=tiny"], "--prompt"),
        (["generate", "--workdir=x", "--prompt=x"], "--stage"),
        (["export", "--stage=qa", "--out=x"], "--workdir"),
        (["export", "--workdir=x", "--out=x"], "--stage"),
        (["export", "--workdir=x", "--stage=qa"], "--out"),
        (["score", "--input=x"], "--domain"),
        (["score", "--domain=math"], "--input"),
        (["seeds"], "--workdir"),
    ],
)
def test_a_missing_flag_is_named(refused: Refused, argv: list[str], missing: str):
    assert missing in refused(*argv)


def test_a_missing_model_flag_is_named(refused: Refused, config: str):
    assert "--model" in refused("evaluate", config)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--helpshort", "--help"])
def test_help_of_each_command_is_readable(name: str, flag: str, capsys: pytest.CaptureFixture[str]):
    assert main(["mdrl", name, flag]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"{name}: {COMMANDS[name][0]}")
    flags = {"run": "workdir", "generate": "prompt_ids", "evaluate": "model", "export": "out", "score": "domain"}
    flags |= {"bench": "repeats", "config": "names", "rollback": "keep", "fit": "topology", "push": "repo"}
    assert f"--{flags.get(name, 'workdir')}" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["--helpshort"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["mdrl", *argv]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and about in out for name, (about, _, _) in COMMANDS.items())


def test_the_version_and_the_fields_of_the_config(capsys: pytest.CaptureFixture[str], refused: Refused):
    assert main(["mdrl", "--version"]) == 0
    assert capsys.readouterr().out.startswith(f"mdrl_jax {mdrl_jax.__version__}, jax {jax.__version__}")

    assert main(["mdrl", "config"]) == 0
    shown = capsys.readouterr().out
    printed = dict(re.findall(r"^([\w.]+) = (.*)$", shown, re.M))
    known = {name: repr(value) for name, value in flat(dataclasses.asdict(parse({}))).items()}
    assert {name: value for name, value in printed.items() if value != "{}"} == known
    assert main(["mdrl", "config", "Learning", "warm-up"]) == 0
    assert re.findall(r"^\S+", capsys.readouterr().out, re.M) == ["train.learning_rate", "sft.learning_rate"]
    assert main(["mdrl", "config", "config.train.optimizer.b1"]) == 0
    assert capsys.readouterr().out == "train.optimizer.b1 = 0.9\n    decay rate of the mean of gradients.\n"
    assert "'zebra'" in refused("config", "zebra")
    assert main(["mdrl", "run", "--help"]) == 0
    assert shown in capsys.readouterr().out


# --- config files and fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, named",
    [
        ("sed=1", "--config.sed is not a field: the config has analyze"),
        ("evaluate.prompt=1", "config.evaluate has batch"),
        ("train.rate=1", "rate"),
        ("seed=abc", "seed"),
        ("seed=1.5", "seed"),
        ("seed=-1", "seed=-1"),
        ("train.learning_rate=fast", "learning_rate"),
        ("model.dtype=float16", "model.dtype"),
        ("train.grpo.ratio=none", "train.grpo: ratio"),
        ("train.group_size=1", "group_size"),
        ("train.group=4", "--config.train.group is now called --config.train.group_size"),
        ("stages=('qa','qa')", "listed twice"),
        ("stages=('maths',)", "'maths'"),
        ("stages=('math',)", "scored_domains"),
        ("stage_overrides={'qa':{'steps':0}}", "steps"),
        ("stage_overrides={'cw':{'steps':1}}", "'cw'"),
    ],
)
def test_a_wrong_field_or_value_is_named(refused: Refused, config: str, field: str, named: str, tmp_path: Path):
    assert named in refused("run", config, f"--config.{field}", f"--workdir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "source, named",
    [
        ("def get_config(:\n", "syntax"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    raise KeyError('lost')\n", "broken.py line 2: keyerror: 'lost'"),
        ("x = 1\n\nimport no_such_package\n", "broken.py line 3: no module named 'no_such_package'"),
        ("import sys\n\ndef get_config():\n    sys.exit()\n", "broken.py line 4: systemexit"),
        ("def get_config():\n    return 3\n", "broken.py returns int; it must return what"),
        ("def get_config(name):\n    pass\n", "broken.py: typeerror: get_config() missing"),
        (CONFIG.replace("c.train.prompts_per_step", "c.train.promts"), "promts"),
        (CONFIG.replace("= 8", "= 'eight'"), "eight"),
        (CONFIG.replace("return c", "open('/absent')"), "/absent"),
        (CONFIG.replace("return c", "pass"), "get_config() of"),
    ],
)
def test_a_config_file_that_does_not_work_says_why(refused: Refused, tmp_path: Path, source: str, named: str):
    file = tmp_path / "broken.py"
    file.write_text(source)
    assert named in refused("run", f"--config={file}").lower()


def test_a_config_may_import_a_module_beside_it_from_any_folder(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "beside_it.py").write_text("STAGES = ('nothing',)\n")
    text = CONFIG.replace('("qa",)', "__import__('beside_it').STAGES", 1)
    (tmp_path / "own.py").write_text(text)
    assert "stage 'nothing'" in refused("run", f"--config={tmp_path / 'own.py'}")


def test_overrides_of_stages_that_are_not_run_any_more_are_left_out_with_a_note(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
):
    file = tmp_path / "short.py"
    file.write_text(CONFIG.replace("return c", "c.stage_overrides = {'qa': {'steps': 2}}; return c"))
    flags = ("--config.scored_domains=('math',)", "--config.stages=('math',)", "--config.domains.n_train=4")
    sys.modules.pop("config_config", None)
    assert main(["mdrl", "run", config, *flags, f"--workdir={tmp_path / 'new'}"]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note == "mdrl: note: the config's stage_overrides of qa are left out, which --config.stages does not name"
    assert "a step takes 8 prompts of math, which has 4 train prompts" in error
    both = (*flags, "--config.stage_overrides={'qa':{'steps':2}}")
    assert "stage_overrides names 'qa'" in refused("run", config, *both)


def test_a_config_file_that_is_absent_is_named(refused: Refused, tmp_path: Path):
    assert str(tmp_path / "absent.py") in refused("run", f"--config={tmp_path / 'absent.py'}")
    assert "absent.py" in refused("run", f"--config={tmp_path / 'absent.py'}", "--config.seed=1")


def test_a_config_of_the_package_is_found_by_its_name_anywhere(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name, such as a work folder, is no config
    wrong = "--config.train.steps=0"
    for given in (["--config", "quickstart"], ["--config=configs/quickstart.py"], ["--config=compare:style_blind"]):
        assert "steps=0 is not valid" in refused("run", *given, wrong)
    (tmp_path / "own").write_text(CONFIG)
    assert "no_field" in refused("run", "--config=own", "--config.no_field=1")
    for absent in ("quickstar", "configs/absent.py", "quickstart.py"):
        assert f"no config file {absent!r}" in (line := refused("run", f"--config={absent}"))
        assert "quickstart, real_local" in line


def test_what_the_machine_sets_does_not_change_results(
    capsys: pytest.CaptureFixture[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    assert main(["mdrl", "seeds"]) == 2  # any command
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("mdrl: note: JAX_ENABLE_X64=1 is ignored") and "--workdir" in error
    assert "JAX_ENABLE_X64" not in os.environ
    monkeypatch.setattr(sys, "platform", "win32")
    assert "use WSL" in refused("run", "--config=quickstart")


# --- models and data --------------------------------------------------------------------------------------------------


def test_a_model_that_is_absent_or_damaged_is_named(refused: Refused, config: str, tmp_path: Path):
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    empty.mkdir()
    workdir = f"--workdir={tmp_path / 'new'}"
    assert str(absent) in refused("run", config, f"--config.model.path={absent}", workdir)
    assert str(absent) in refused("generate", f"--model={absent}", "--prompt=tom age =")
    assert str(absent) in refused("evaluate", config, f"--model={absent}")
    assert "config.json" in refused("generate", f"--model={empty}", "--prompt=tom age =")
    shutil.copy(EMBEDDED_MODEL / "config.json", empty)
    assert str(empty) in refused("generate", f"--model={empty}", "--prompt=tom age =")
    assert not (tmp_path / "new").exists()


def test_a_tilde_is_the_home_folder_in_flags_which_the_shell_leaves_as_they_are(
    refused: Refused, config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    prompt, one = "--prompt=~/x", ["analyze", config, "--base=~/base", f"--workdir={tmp_path}/new"]
    assert f"{tmp_path}/model does not exist" in refused("generate", "--model=~/model", prompt)
    assert f"{tmp_path}/file is a file; a model is" in refused("generate", "--model=~/file", prompt)
    assert f"{tmp_path}/base" in refused(*one, "--stage=qa:~/x")
    assert "--seed" in refused("generate", "--model=tiny", prompt, f"--seed={2**70}")
    assert "--workdir= is empty" in refused("run", config, "--workdir=")


def test_a_model_of_the_hub_needs_no_prefix_and_is_refused_in_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    line = refused("generate", "--model=nobody/some-model", "--prompt=x")
    assert "nobody/some-model cannot be downloaded" in line and "no network" in line


def test_generate_takes_no_more_tokens_than_the_model_allows(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def sampler(*_: Any, max_new_tokens: int, **__: Any) -> None:
        asked.append(max_new_tokens)
        raise UserError("enough")

    monkeypatch.setattr("mdrl_jax.commands.generate.make_sampler", sampler)
    limit = json.loads((EMBEDDED_MODEL / "config.json").read_text())["max_position_embeddings"]
    for n_prompt in (3, limit - 5):
        main(["mdrl", "generate", "--model=tiny", f"--prompt_ids={','.join(['5'] * n_prompt)}"])
    assert asked == [min(128, limit - 3), 5]


def test_prompts_that_are_too_long_are_refused(refused: Refused, config: str, tmp_path: Path):
    workdir = f"--workdir={tmp_path / 'new'}"
    line = refused("run", config, "--config.rollout.prompt_buckets=(2,)", workdir)
    assert "domain qa" in line and "limit (the last of rollout.prompt_buckets) is 2" in line
    assert "rollout" in refused("run", config, "--config.rollout.completion_buckets=(9999,)", workdir)
    assert not (tmp_path / "new").exists()


def test_an_empty_data_set_is_refused(refused: Refused, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def empty(section: DomainsConfig) -> Domain:
        return Domain("qa", "qa", (), (), ())

    monkeypatch.setitem(registry.DOMAINS, "qa", empty)
    assert "domain qa has no train prompts" in refused("run", config, f"--workdir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def test_sizes_that_the_mesh_does_not_divide_are_refused(refused: Refused, config: str, tmp_path: Path):
    workdir = f"--workdir={tmp_path / 'new'}"
    assert "stage qa: prompts_per_step = 12" in refused("run", config, "--config.train.prompts_per_step=12", workdir)
    assert "evaluate.batch=12" in refused("run", config, "--config.evaluate.batch=12", workdir)
    assert "mesh data=3" in refused("run", config, "--config.mesh.data=3", workdir)
    rows = ("--config.train.grad_accum_steps=32", "--config.train.prompts_per_step=8")
    assert "grad_accum_steps = 4" in refused("run", config, *rows, workdir)
    assert not (tmp_path / "new").exists()


# --- work folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A work folder in which a run with another seed has begun."""
    space: dict = {}
    exec(CONFIG, space)
    changed = space["get_config"]()
    changed.seed = 1
    folder = WorkFolder(tmp_path / "earlier")
    folder.open(parse(changed))
    (folder.root / "log.txt").write_text("begun")
    for index, name in enumerate(changed.stages, 1):
        (folder.root / "checkpoints" / f"{index:02d}-{name}").mkdir(parents=True)
    return folder.root


@pytest.mark.parametrize(
    "change, named",
    [
        ("seed=0", "seed=1, now 0"),
        ("train.learning_rate=0.5", "train.learning_rate"),
        ("domains.n_test=16", "domains.n_test"),
        ("stages=('placebo-qa',)", "stages"),
        ("stage_overrides={'qa':{'steps':2}}", "stage_overrides.qa.steps"),
    ],
)
def test_a_folder_of_another_experiment_is_left_as_it_is(
    refused: Refused, config: str, earlier: Path, change: str, named: str
):
    before = contents(earlier)
    line = refused("run", config, "--config.seed=1", f"--config.{change}", f"--workdir={earlier}")
    assert named in line and str(earlier) in line
    assert contents(earlier) == before


def test_what_the_stages_that_have_begun_did_not_use_may_change(tmp_path: Path):
    folder = WorkFolder(tmp_path / "run")

    def opened(*stages: str, **fields: Any) -> None:
        folder.open(parse({"stages": stages, **fields}))

    opened("sft", "qa", "cw")
    opened("sft-qa", "qa", sft={"steps": 3})
    (folder.root / "checkpoints" / "01-sft-qa").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has begun the stages \['sft-qa'\], now \['sft', 'qa'\]"):
        opened("sft", "qa", sft={"steps": 3})
    with pytest.raises(UserError, match=r"sft\.steps=3, now 3000"):
        opened("sft-qa", "qa")
    used: dict[str, Any] = {"sft": {"steps": 3}, "train": {"steps": 5}, "recover": {"samples": 3}}
    opened("sft-qa", "cw", "refresh-cw", **used)
    records.write_json(folder.root / "evaluations" / "02-cw.json", {})
    with pytest.raises(UserError, match=r"train\.steps=5, now 6"):
        opened("sft-qa", "cw", **used | {"train": {"steps": 6}})
    with pytest.raises(UserError, match=r"stage_overrides\.cw\.steps=None, now 3"):
        opened("sft-qa", "cw", stage_overrides={"cw": {"steps": 3}}, **used)
    used["recover"] = {"samples": 4}
    opened("sft-qa", "cw", "rollback-qa-cw", **used)
    records.write_json(folder.root / "recovery" / "rollback-qa-cw.json", {})
    with pytest.raises(UserError, match=r"recover\.samples=4, now 3"):
        opened("sft-qa", "cw", "rollback-qa-cw", **used | {"recover": {"samples": 3}})
    opened("sft-qa", "cw", "rollback-qa-cw", "circuits-cw", circuits={"block": 2}, **used)
    opened("sft-qa", "cw", "rollback-qa-cw", "circuits-cw", circuits={"block": 4}, **used)
    records.write_json(folder.root / "analysis" / "circuits-cw.json", {})
    with pytest.raises(UserError, match=r"circuits\.block=4, now 2"):
        opened("sft-qa", "cw", "rollback-qa-cw", "circuits-cw", circuits={"block": 2}, **used)


def test_settings_of_recoveries_are_free_until_circuits_or_a_stage_with_a_target_begin(tmp_path: Path):
    aimed = {"stage_overrides": {"sft-qa": {"target": "qa", "start": "base"}}}
    for stages, fields, file, free in (
        (("qa", "sft-qa"), aimed, "checkpoints/01-qa/x", True),
        (("qa", "sft-qa"), aimed, "checkpoints/02-sft-qa/x", False),
        (("qa", "sft-qa", "circuits-qa"), {}, "checkpoints/02-sft-qa/x", True),
        (("qa", "sft-qa", "circuits-qa"), {}, "analysis/circuits-qa.json", False),
        (("qa", "analyze", "refresh-qa"), {}, "analysis/locality-qa.json", True),
    ):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        WorkFolder(root).open(parse({"stages": stages, **fields}))
        records.write_json(root / file, {})
        changed = parse({"stages": stages, "recover": {"samples": 5}, **fields})
        with contextlib.nullcontext() if free else pytest.raises(UserError, match=r"recover\.samples=2, now 5"):
            WorkFolder(root).open(changed)


def test_fields_that_change_no_result_may_change(tmp_path: Path):
    folder = WorkFolder(tmp_path / "run")
    folder.open(parse({"stages": ("qa",)}))
    free = {"train": {"checkpoint_every": 1}, "evaluate": {"shown": 1}, "rewards": {"workers": 5}}
    folder.open(parse({"stages": ("qa",), **free}))


def test_a_folder_that_is_no_work_folder_is_left_as_it_is(refused: Refused, config: str, tmp_path: Path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("It was a dark and stormy night")
    before = contents(folder)
    assert "not empty" in refused("run", config, f"--workdir={folder}")
    assert contents(folder) == before
    assert "is a file" in refused("run", config, f"--workdir={folder / 'chapter1.txt'}")
    assert "has no config.json" in refused("report", f"--workdir={folder}")
    assert contents(folder) == before


def test_a_stage_or_run_that_is_absent_is_named(refused: Refused, earlier: Path, tmp_path: Path):
    before = contents(earlier)
    out = f"--out={tmp_path / 'out'}"
    assert "config.json" in refused("export", f"--workdir={tmp_path / 'absent'}", "--stage=qa", out)
    assert "'math'" in refused("export", f"--workdir={earlier}", "--stage=math", out)
    assert "no checkpoint" in refused("generate", f"--workdir={earlier}", "--stage=qa", "--prompt=tom age =")
    assert str(earlier) in refused("seeds", f"--workdir={earlier}")
    (earlier / "config.json").write_text("{")
    assert "not valid JSON" in refused("export", f"--workdir={earlier}", "--stage=qa", out)
    (earlier / "config.json").write_text(json.dumps({}))
    assert "config.json" in refused("export", f"--workdir={earlier}", "--stage=qa", out)
    assert contents(earlier).keys() == before.keys() and not (tmp_path / "out").exists()


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(refused: Refused, config: str, tmp_path: Path):
    """Another process holds the lock; when that process ends, the folder is free, and a refusal has written nothing."""
    folder = tmp_path / "run"
    hold = "import sys; from mdrl_jax.workfolder import *; from mdrl_jax.config import default; "
    hold += f"WorkFolder(Path({str(folder)!r}))._locked_by(); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
        told = WorkFolder(folder)._locked_by()
        assert told.startswith(f"process {other.pid} on {platform.node()}, since 20")
        with pytest.raises(UserError, match=f"{folder} is in use by process {other.pid}"):
            WorkFolder(folder).open(parse(default()))
        assert [p.name for p in folder.iterdir()] == [LOCK]
        other.stdin.close()
    WorkFolder(folder).open(parse(default()))
    WorkFolder(folder).open(parse(default()))  # once more in the same process
    assert {p.name for p in folder.iterdir()} == {"config.json", LOCK}


def test_a_full_disk_is_named_by_the_lock_that_it_does_not_take(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as e:
        WorkFolder(tmp_path / "run").open(parse(default()))
    assert e.value.filename == str(tmp_path / "run" / LOCK)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/big/file"), "/big/file: No space left on device"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "a -> b: Permission denied"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_what_the_system_refuses_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch, error, line: str):
    def fail(values: object) -> None:
        raise error

    about, define, _ = COMMANDS["report"]
    monkeypatch.setitem(COMMANDS, "report", (about, define, fail))
    assert line in refused("report", "--workdir=x")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail() -> None:
        raise error

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(UserError, match="JAX_PLATFORMS='cpu' asks for devices that JAX does not find here"):
        make_mesh(MeshConfig())


def test_output_that_is_not_utf8_is_escaped(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main_module._whole("stdout")
    print("± 1", flush=True)
    assert written.getvalue() == b"\\xb1 1\n"


def test_an_error_of_several_lines_is_printed_as_one(refused: Refused, monkeypatch: pytest.MonkeyPatch):
    def fail(values: object) -> None:
        raise UserError("first\n  second")

    monkeypatch.setitem(main_module.COMMANDS, "seeds", ("about", main_module._seeds_flags, fail))
    assert refused("seeds", "--workdir=x") == "mdrl: error: first second\n"
