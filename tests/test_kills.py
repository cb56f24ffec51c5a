"""Tests of whole runs that are killed, get a SIGTERM, or find their newest checkpoint damaged.

Each of them has to end with the same results as an undisturbed run.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.workfolder import LOCK, WorkFolder
from tests.kills import CONFIG, Runs, assert_gone, descendants, differences

# Only two stages of the config of `tests/kills.py`, so that CI has the time to compile their programs, with the shapes
# of the run in `tests/test_experiment.py`, whose compiled programs are kept.
FLAGS = (
    "--config.stages=('math','refresh-math')",
    "--config.scored_domains=('math',)",
    "--config.train.checkpoint_every=1",
    "--config.train.steps=8",
    "--config.train.prompts_per_step=4",
    "--config.train.group_size=4",
    "--config.train.grad_accum_steps=2",
    "--config.rollout.completion_buckets=(16,)",
    "--config.evaluate.batch=8",
    "--config.evaluate.samples=2",
)
STATUS = 143


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of the config; the run `whole` is made here and not disturbed."""
    made = Runs(tmp_path_factory.mktemp("kills"), CONFIG, *FLAGS)
    made.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in `tests/test_experiment.py`
    made.end("whole", made.start("whole"))
    return made


def log(workdir: Path) -> str:
    """The log of a run: the lines of all its starts, in order."""
    return (workdir / "log.txt").read_text() if (workdir / "log.txt").exists() else ""


def until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Waits until `reached()` is true; fails if the process ends before or takes too long."""
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def stopped(runs: Runs, name: str, reached: Callable[[], bool], *more: str) -> str:
    """Starts a run and sends SIGTERM to its process group, as a scheduler does, once `reached()` is true.

    Returns:
      the last line of its output.
    """
    process = runs.start(name, *more)
    until(process, reached)
    children = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == STATUS
    assert_gone(children)
    return (runs.folder / f"{name}.out").read_text().strip().splitlines()[-1]


def damage(stage: Path) -> tuple[int, str]:
    """Changes a bit in the parameters of the newest checkpoint of a stage: its step, and the name of the file."""
    newest = max(int(p.name) for p in stage.iterdir() if p.name.isdigit())
    data = next((stage / str(newest) / "state/params/d").iterdir())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    return newest, data.name


@pytest.mark.slow  # 140 s; test_sft.py kills a run too, and test_interference.py stops an analysis
def test_a_run_that_is_stopped_killed_and_damaged_ends_the_same(runs: Runs):
    """One run: SIGTERM while the base is scored and in training, SIGKILL in a save, a damaged checkpoint, SIGKILL."""
    name, workdir = "disturbed", runs.folder / "disturbed"
    stage, again = workdir / "checkpoints/01-math", "start the same command again to go on"
    line = stopped(runs, name, lambda: "parameters on" in log(workdir))
    assert line == f"stopped by SIGTERM during base: scores; what was finished is saved; {again}"

    # Without periodic checkpoints, so only the signal causes one.
    trained = '"label": "math", "done": 1,'
    out = (runs.folder / f"{name}.out").read_text
    flags = ("--config.train.checkpoint_every=0", "--output=json")
    line = json.loads(stopped(runs, name, lambda: trained in out(), *flags))["text"]
    (step,) = (int(p.name) for p in stage.iterdir())
    during = f"during step {step + 1} of math; the state after step {step} is saved"
    assert line in (f"stopped by SIGTERM {where}; {again}" for where in (f"after step {step} of math; saved", during))
    assert log(workdir).strip().endswith(line)

    assert runs.killed(name, "save", 0, saved=2), "the run ended before the kill"
    assert f"math: goes on after step {step} of 8" in log(workdir)
    newest, file = damage(stage)
    assert newest >= step + 2

    assert runs.killed(name, "record", 0.2, saved=1), "the run ended before the kill"
    line = next(line for line in log(workdir).splitlines() if line.startswith("warning: "))
    assert f"01-math: checkpoint {newest} is damaged (state/params/d/{file} was changed)" in line
    assert line.endswith(f"renamed to {newest}.damaged; the one of step {newest - 1} is used instead")
    assert f"math: goes on after step {newest - 1} of 8" in log(workdir)

    runs.end(name, runs.start(name))
    assert differences(runs.folder / "whole", workdir) == [f"left behind: checkpoints/01-math/{newest}.damaged"]


# `saved` is a number of steps rather than a time, so that the run makes progress on a machine of any speed.
KILLS = (("save", 0, 2), ("record", 0.2, 1)), (("save", 0, 0), ("start", 4, 0), ("save", 0, 2), ("work", 0.3, 3))


@pytest.mark.slow  # the test above has two of these kills
@pytest.mark.parametrize("kills", KILLS)
def test_kills_change_nothing(runs: Runs, kills: tuple[tuple[str, float, int], ...]):
    """A run is killed in the middle of a save and of a record; another one at its start, and while it works too."""
    name = f"killed-{len(kills)}"
    for kind, seconds, saved in kills:
        assert runs.killed(name, kind, seconds, saved), f"the run ended before the moment {kind}"
    runs.end(name, runs.start(name))
    assert log(runs.folder / name).count("goes on after step") >= len(kills) // 2
    assert differences(runs.folder / "whole", runs.folder / name) == []


def test_what_a_kill_left_of_a_record_is_removed_and_in_nobodys_way(tmp_path: Path):
    """A folder that has nothing but a temporary file is still an empty work folder."""
    (tmp_path / ".config.json.123.tmp").write_text("{")
    work = WorkFolder(tmp_path)
    work.open(parse(default()))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", LOCK}
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / ".plan.json.123.tmp").write_text("{")
    work.open(parse(default()))
    assert not list((tmp_path / "recovery").iterdir())


def test_a_run_goes_on_on_another_mesh_but_not_with_other_prompts(tmp_path: Path):
    work = WorkFolder(tmp_path)
    work.open(parse(default()))
    work.open(parse({"mesh": {"data": 2, "fsdp": 4}, "checkpoints": {"keep": 3}}))
    (tmp_path / "checkpoints" / f"01-{default().stages[0]}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a run with train.prompts_per_step=16, now 8; name a new work folder"):
        work.open(parse({"train": {"prompts_per_step": 8}}))
