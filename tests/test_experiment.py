"""Tests of the command `run` as a user calls it: whole runs and their records, kills, a placebo, compilations."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mdrl_jax import experiment, runtime
from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.config import default, parse
from mdrl_jax.domains import registry
from mdrl_jax.errors import UserError
from mdrl_jax.main import main
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import make_mesh
from tests import compiled
from tests.conftest import compiling_fast

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
from mdrl_jax import config

def get_config():
    c = config.default()
    c.stages = ("math", "code", "placebo-qa", "refresh-math")
    c.stage_overrides = {"refresh-math": {"steps": 2, "grpo": {"kl_coef": 1e-3}}}
    c.scored_domains = ("math", "code", "qa")
    c.domains.n_test = 12
    c.domains.n_validation = 4
    c.evaluate.batch = 8
    c.evaluate.samples = 2
    c.rollout.prompt_buckets = (12,)
    c.train.steps = 3
    c.train.prompts_per_step = 4
    c.train.group_size = 4
    c.train.grad_accum_steps = 2
    c.train.learning_rate = 3e-4
    c.train.checkpoint_every = 1
    c.train.kl_every = 2
    c.mesh.data = 1
    c.rewards.workers = 1
    return c
"""


def command(config: Path, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "mdrl_jax.main", f"--config={config}", f"--workdir={workdir}"]


def environment() -> dict[str, str]:
    # One device, as on a user's machine, instead of the tests' eight. Programs run for a shorter time than they take
    # to compile, so they are compiled fast.
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ[compiled.FOLDER],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def evaluations(workdir: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in sorted((workdir / "evaluations").glob("*.json"))}


def board(workdir: Path, name: str) -> EventAccumulator:
    """Reads all events of a folder in `tensorboard/`."""
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(workdir / "tensorboard" / name), size_guidance=everything).Reload()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, str]:
    """A config file, the work folder of an uninterrupted run of it, and the run's output."""
    folder = tmp_path_factory.mktemp("experiment")
    config = folder / "small.py"
    config.write_text(SMALL)
    done = subprocess.run(
        command(config, folder / "whole"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return config, folder / "whole", done.stdout


def test_the_work_folder_holds_the_records(whole):
    _, workdir, shown = whole
    rows = [json.loads(line) for line in (workdir / "scores.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["index"]) for r in rows[::3]] == [
        ("base", 0),
        ("math", 1),
        ("code", 2),
        ("placebo-qa", 3),
        ("refresh-math", 4),
    ]
    for row in rows:
        record = json.loads((workdir / "evaluations" / f"{row['index']:02d}-{row['stage']}.json").read_text())
        rewards_PK = np.asarray(record["rewards"][row["domain"]])
        assert rewards_PK.shape == (12, 2) and row["n_prompts"] == 12 and row["k"] == 2
        assert row["score"] == pytest.approx(100 * rewards_PK.mean())
        assert row["stderr"] == pytest.approx(100 * rewards_PK.mean(1).std(ddof=1) / np.sqrt(12))
    assert json.loads((workdir / "config.json").read_text())["config"]["train"]["steps"] == 3
    assert (workdir / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")
    sample = json.loads((workdir / "samples" / "01-math.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("=") and 0 <= sample["reward"] <= 1
    assert "refresh-math" in shown and str(workdir) in shown.replace("\n", "")
    assert "\r" not in (workdir / "log.txt").read_text()
    events = board(workdir, "01-math")
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3]
    rewards = [e.histogram_value for e in events.Histograms("train/rewards")]
    assert [h.num for h in rewards] == [16, 16, 16]  # 4 prompts, groups of 4
    means = [e.value for e in events.Scalars("train/reward")]
    assert [h.sum / h.num for h in rewards] == pytest.approx(means, rel=1e-6)


def test_tensorboard_holds_scores_settings_and_pictures(whole):
    _, workdir, _ = whole
    scores, figures = (board(workdir, name) for name in ("scores", "figures"))
    rows = [json.loads(line) for line in (workdir / "scores.jsonl").read_text().splitlines()]
    for domain in ("math", "code", "qa"):
        expected = [(r["index"], pytest.approx(r["score"])) for r in rows if r["domain"] == domain]
        assert [(e.step, e.value) for e in scores.Scalars(f"score/{domain}")] == expected
        assert [e.step for e in scores.Histograms(f"reward/{domain}")] == [0, 1, 2, 3, 4]
        shown = scores.Tensors(f"samples/{domain}")
        assert len(shown) == 5 and " = **" in shown[0].tensor_proto.string_val[0].decode()
    content = scores.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["train.steps"].number_value == 3 and settings["model.path"].string_value == "tiny"
    assert settings["stage_overrides.refresh-math.grpo.kl_coef"].number_value == 1e-3
    pictures = {f"figures/{file.stem}": file.read_bytes() for file in (workdir / "report").glob("*.png")}
    assert {tag: figures.Images(tag)[0].encoded_image_string for tag in figures.Tags()["images"]} == pictures
    assert "figures/scores" in pictures


def test_a_placebo_changes_nothing(whole):
    _, workdir, _ = whole
    before, after = (load_stage(str(workdir), name).params for name in ("code", "placebo-qa"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), before, after)))
    records = [json.loads((workdir / "evaluations" / f).read_text()) for f in ("02-code.json", "03-placebo-qa.json")]
    assert records[0]["rewards"] == records[1]["rewards"]


def test_training_changes_parameters(whole):
    _, workdir, _ = whole
    before, after = (load_stage(str(workdir), name).params for name in ("base", "math"))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow  # `test_kills.py` tests more kills
def test_killed_anywhere_it_goes_on_to_the_same_end(whole, tmp_path):
    """Killed by SIGKILL in the middle of a stage and between stages, a run ends with bit-identical results."""
    config, uninterrupted, _ = whole
    workdir = tmp_path / "killed"
    moments = ("checkpoints/01-math/1", "recovery/refresh-math.json")
    for moment in moments:
        process = subprocess.Popen(
            command(config, workdir), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not (workdir / moment).exists():
            assert process.poll() is None, f"ended before {moment}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = [*command(config, workdir), "--output=json"]
    done = subprocess.run(last, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "done" and events[-1]["workdir"] == str(workdir)
    scored = [[row["stage"] for row in e["rows"]] for e in events if e["event"] == "scores"]
    assert scored == [["refresh-math"] * 3]
    assert [e["claims"] for e in events if e["event"] == "claims"] == [
        json.loads((workdir / "claims.json").read_text())
    ]
    assert "goes on after step" in (workdir / "log.txt").read_text()
    assert evaluations(workdir) == evaluations(uninterrupted)
    ends = [load_stage(str(folder), "refresh-math").params for folder in (workdir, uninterrupted)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *ends)))


def test_repeated_it_skips_and_more_stages_may_follow(whole, monkeypatch, capsys):
    config, workdir, _ = whole
    monkeypatch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    before = evaluations(workdir)
    again = command(config, workdir)[2:]
    assert main(again) == 0 and capsys.readouterr().out.count("finished before, skipped") == 4
    assert evaluations(workdir) == before
    assert main([*again, "--config.stages=('math',)", "--config.stage_overrides={}"]) == 2
    refused = capsys.readouterr().err
    assert len(refused.strip().splitlines()) == 1, refused
    assert evaluations(workdir) == before


def raising(completion, check):
    raise ZeroDivisionError("no verdict")


def without_verdict(domain: str, patch: pytest.MonkeyPatch) -> None:
    """Gives a domain the reward `raising`."""
    plain = registry.DOMAINS[domain]
    patch.setitem(
        registry.DOMAINS,
        domain,
        lambda config: dataclasses.replace(plain(config), reward="tests.test_experiment:raising"),
    )


def tiny(*stages: str):
    """A config of equal shapes for the runs that follow, so that they are compiled once."""
    c = default()
    c.stages, c.scored_domains = stages, ("math", "qa")
    c.domains.n_test = c.domains.n_validation = 8
    c.evaluate.batch, c.evaluate.samples = 8, 2
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.train.steps, c.train.prompts_per_step, c.train.group_size = 2, 8, 4
    return c


def test_a_reward_that_raises_ends_the_run_in_one_line_and_loses_nothing(tmp_path, monkeypatch):
    without_verdict("math", monkeypatch)
    with pytest.raises(UserError, match=r"16 of 16 completions.*ZeroDivisionError: no verdict") as error:
        experiment.run(parse(tiny("math")), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "config.json").exists()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple[str, dict[str, int]]:
    """The log of a run of three stages of equal shapes, and what it compiled; the rewards of qa fail."""
    folder = tmp_path_factory.mktemp("shapes")
    c = tiny("math", "qa", "refresh-math")
    c.rewards.max_error_share = 1.0
    before = compilations.copy()
    with pytest.MonkeyPatch.context() as patch, compiling_fast():
        without_verdict("qa", patch)
        experiment.run(parse(c), folder / "run")
    return (folder / "run/log.txt").read_text(), dict(compilations - before)


def test_failed_rewards_are_counted_by_kind(shapes):
    log, _ = shapes
    assert "64 reward errors (ZeroDivisionError 64)" in " ".join(log.split())


def test_compilations_are_as_many_as_there_are_shapes(shapes):
    """Three stages of equal shapes compile one sampler for training, one for scoring, and one GRPO step per bucket."""
    made = {name: n for name, n in shapes[1].items() if not name.startswith("refresh_")}
    # The refresh measures its distance from the peak with the last two.
    assert made == {"sample_4": 1, "sample_2": 1, "grpo_step": 1, "difference": 1, "norm": 1}
