"""The run command as its user meets it: whole runs, kills at several moments, records, a placebo, compilations."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdrl_jax import experiment
from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.programs import compilations

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
    c.train.prompts = 4
    c.train.group = 4
    c.train.micro_batches = 2
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
    # One device: the children stand for a user's machine, not for the test's eight.
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def evaluations(workdir: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in sorted((workdir / "evaluations").glob("*.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, str]:
    """A config file, the work folder of an uninterrupted run of it, and what the terminal showed."""
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
    events = EventAccumulator(str(workdir / "tensorboard" / "01-math"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3]


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


def test_killed_anywhere_it_goes_on_to_the_same_end(whole, tmp_path):
    """kill -9 while scoring the base, in the middle of a stage, and between stages: bit-identical at the end."""
    config, uninterrupted, _ = whole
    workdir = tmp_path / "killed"
    moments = ("config.json", "checkpoints/01-math/1", "evaluations/01-math.json", "recovery/refresh-math.json")
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
    done = subprocess.run(command(config, workdir), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in (workdir / "log.txt").read_text()
    assert evaluations(workdir) == evaluations(uninterrupted)
    ends = [load_stage(str(folder), "refresh-math").params for folder in (workdir, uninterrupted)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *ends)))


def test_repeated_it_skips_and_more_stages_may_follow(whole, tmp_path):
    config, workdir, _ = whole
    before = evaluations(workdir)
    again = subprocess.run(command(config, workdir), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 4
    assert evaluations(workdir) == before
    shorter = command(config, workdir) + ["--config.stages=('math',)", "--config.stage_overrides={}"]
    refused = subprocess.run(shorter, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert evaluations(workdir) == before


def raising(completion, check):
    raise ZeroDivisionError("no verdict")


def test_a_reward_that_raises_ends_the_run_in_one_line_and_loses_nothing(tmp_path, monkeypatch):
    import dataclasses

    from mdrl_jax.domains import math, registry

    c = default()
    c.stages, c.scored_domains = ("math",), ("math",)
    c.domains.n_test = c.domains.n_validation = 4
    c.evaluate.batch, c.evaluate.samples = 8, 2
    make = lambda config: dataclasses.replace(math.make(config), reward="tests.test_experiment:raising")  # noqa: E731
    monkeypatch.setitem(registry.DOMAINS, "math", make)
    with pytest.raises(UserError, match=r"16 of 16 completions.*ZeroDivisionError: no verdict") as error:
        experiment.run(parse(c), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "config.json").exists()


def test_compilations_are_as_many_as_there_are_shapes(tmp_path):
    """Three stages of one shape: one sampler for training, one for scoring, one GRPO step a completion bucket."""
    c = default()
    c.stages, c.scored_domains = ("math", "qa", "refresh-math"), ("math", "qa")
    c.domains.n_test = c.domains.n_validation = 8
    c.evaluate.batch, c.evaluate.samples = 8, 2
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.train.steps, c.train.prompts, c.train.group = 2, 8, 4
    compilations.clear()
    experiment.run(parse(c), tmp_path / "run")
    made = {name: n for name, n in compilations.items() if not name.startswith("refresh_")}
    assert made == {"sample_4": 1, "sample_2": 1, "grpo_step": 1}


RECOVERY = SMALL.replace(
    "def get_config():",
    """def get_config():
    c = sequence()
    c.stages = ("math", "qa", "analyze", "refresh-math", "rollback-math-qa", "agem-qa", "plan", "recover", "trials")
    c.stage_overrides = {"refresh-math": {"steps": 2}}
    c.scored_domains = ("math", "qa")
    c.domains.n_validation = 8
    c.rollout.completion_buckets = (16,)
    c.analyze.prompts, c.analyze.group, c.analyze.batch, c.analyze.path_prompts = 8, 4, 2, 4
    c.analyze.permutations, c.analyze.vectors, c.analyze.lanczos_steps = 2, 4, 2
    c.recover.random_sets, c.recover.fractions, c.recover.strengths = 4, (0.01, 0.1), (1.0,)
    c.recover.rules = ("removing", "magnitude")
    c.recover.limit = 100.0
    return c

def sequence():""",
)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory) -> tuple[Path, Path, str]:
    """The same of a run that analyses, refreshes, rolls back and prevents."""
    folder = tmp_path_factory.mktemp("recovery")
    config = folder / "recovery.py"
    config.write_text(RECOVERY)
    done = subprocess.run(
        command(config, folder / "whole"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return config, folder / "whole", done.stdout


def read(workdir: Path, name: str):
    return json.loads((workdir / f"{name}.json").read_text())


def test_what_wins_a_domain_back_is_scored_and_judged(recovered):
    _, workdir, shown = recovered
    names = ["00-base", "01-math", "02-qa", "04-refresh-math", "05-rollback-math-qa", "06-agem-qa", "08-recover"]
    assert [f.stem for f in sorted((workdir / "evaluations").glob("*.json"))] == names
    assert [c["id"] for c in read(workdir, "claims")] == [f"C{i}" for i in range(1, 8)]
    assert all(f"C{i} " in shown for i in range(1, 8))
    refresh = read(workdir, "recovery/refresh-math")
    looked = [row["step"] for row in refresh["steps"]]
    assert looked in ([0, 1], [0, 1, 2]) and refresh["chosen"] in looked
    assert (refresh["stopped"] == "the budget ended") <= (looked[-1] == 2) and refresh["stopped"]


def test_the_step_that_a_refresh_keeps_is_the_one_saved(recovered):
    _, workdir, _ = recovered
    kept, start = (load_stage(str(workdir), name).params for name in ("refresh-math", "qa"))
    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), kept, start)))
    assert same == (read(workdir, "recovery/refresh-math")["chosen"] == 0)


def test_a_rollback_takes_the_recorded_part_of_the_edit_back(recovered):
    _, workdir, _ = recovered
    record = read(workdir, "recovery/rollback-math-qa")
    before, now, after = (load_stage(str(workdir), n).params for n in ("math", "qa", "rollback-math-qa"))
    chosen = record["chosen"] or {"size": 0, "strength": 0.0}
    changed = 0
    for was, is_now, got in zip(*map(jax.tree.leaves, (before, now, after)), strict=True):
        moved = np.asarray(is_now != got)
        expected = np.asarray(is_now) - np.float32(chosen["strength"]) * np.asarray(is_now - was)
        np.testing.assert_allclose(np.asarray(got)[moved], expected[moved], rtol=1e-6, atol=1e-8)
        changed += int(moved.sum())
    assert changed <= chosen["size"] and changed >= 0.99 * chosen["size"]


def test_costs_are_those_of_the_tokens(recovered):
    _, workdir, _ = recovered
    qa, agem, refresh, rollback = (
        read(workdir, f"costs/{name}") for name in ("02-qa", "06-agem-qa", "04-refresh-math", "05-rollback-math-qa")
    )
    assert (qa["steps"], agem["steps"], rollback["steps"]) == (3, 3, 0)
    assert refresh["steps"] == read(workdir, "recovery/refresh-math")["steps"][-1]["step"]
    assert 0 < qa["tokens_sampled"] <= 3 * 4 * 4 * 16
    # In training a prompt is read with each of its completions, while sampling once.
    assert qa["tokens_trained"] > qa["tokens_sampled"]
    assert agem["tokens_sampled"] > qa["tokens_sampled"]  # those kept of Math
    assert rollback["tokens_trained"] == 0 and rollback["flops"] > 0
    for cost in (qa, agem, refresh, rollback):
        assert cost["flops"] > 0 and cost["seconds"] > 0


def test_a_plan_is_tried_and_acted_on(recovered):
    _, workdir, shown = recovered
    plan, tried = read(workdir, "recovery/plan"), read(workdir, "recovery/trials")
    names = [row["name"] for row in plan["actions"]]
    assert names[0] == plan["pick"] and plan["reason"][:40] in " ".join(shown.split())
    assert {n.partition("-")[0] for n in names} <= {"nothing", "refresh", "rollback"} and "refresh-math-1" in names
    assert set(tried) == set(names) - set(plan["left_out"])
    compared = read(workdir, "recovery/outcomes")
    assert [row["name"] for row in compared["actions"]] == [n for n in names if n in tried]
    before = np.asarray(tried["nothing"]["math"]).mean()
    row = next(r for r in compared["actions"] if r["name"] == "refresh-math-1")
    change = 100 * (np.asarray(tried["refresh-math-1"]["math"]).mean() - before)
    assert row["changes"]["math"]["measured"]["estimate"] == pytest.approx(change)
    recover, start = (load_stage(str(workdir), name).params for name in ("recover", "qa"))
    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), recover, start)))
    assert same == (plan["pick"] == "nothing")


def test_recovery_that_is_killed_goes_on_to_the_same_end(recovered, tmp_path):
    config, uninterrupted, _ = recovered
    workdir = tmp_path / "killed"
    shutil.copytree(uninterrupted, workdir)
    for name in (
        "evaluations/04*",
        "evaluations/05*",
        "evaluations/06*",
        "evaluations/08*",
        "recovery/*",
        "checkpoints/0[4568]*",
    ):
        for found in workdir.glob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    for moment in ("recovery/refresh-math.json", "recovery/rollback-math-qa.json", "recovery/trials.json"):
        process = subprocess.Popen(
            command(config, workdir), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 400
        while not (workdir / moment).exists():
            assert process.poll() is None and time.monotonic() < deadline, f"ended before {moment}"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(config, workdir), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert evaluations(workdir) == evaluations(uninterrupted)
    for name in ("claims", "recovery/outcomes"):
        assert read(workdir, name) == read(uninterrupted, name)
