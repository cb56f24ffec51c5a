"""Tests of whole runs that are killed, get a SIGTERM, or find their newest checkpoint damaged.

Each of them has to end with the same results as an undisturbed run.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.workfolder import WorkFolder
from tests.kills import CONFIG, Runs, assert_gone, descendants, differences

# Only two stages of the config of `tests/kills.py`, so that CI has the time to compile their programs.
FLAGS = (
    "--config.stages=('math','refresh-math')",
    "--config.scored_domains=('math',)",
    "--config.train.checkpoint_every=1",
)
STATUS = 143


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of the config; the run `whole` is made here and not disturbed."""
    made = Runs(tmp_path_factory.mktemp("kills"), CONFIG, *FLAGS)
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


# `saved` is a number of steps rather than a time, so that the run makes progress on a machine of any speed.
KILLS = (("save", 0, 2), ("record", 0.2, 1)), (("save", 0, 0), ("start", 4, 0), ("save", 0, 2), ("work", 0.3, 3))


@pytest.mark.parametrize("kills", [KILLS[0], pytest.param(KILLS[1], marks=pytest.mark.slow)])
def test_kills_change_nothing(runs: Runs, kills: tuple[tuple[str, float, int], ...]):
    """A run is killed in the middle of a save and of a record; another one at its start, and while it works too."""
    name = f"killed-{len(kills)}"
    for kind, seconds, saved in kills:
        assert runs.killed(name, kind, seconds, saved), f"the run ended before the moment {kind}"
    runs.end(name, runs.start(name))
    assert log(runs.folder / name).count("goes on after step") >= len(kills) // 2
    assert differences(runs.folder / "whole", runs.folder / name) == []


def test_a_run_that_finds_its_newest_checkpoint_damaged_says_so_and_ends_the_same(runs: Runs):
    workdir = runs.folder / "damaged"
    process = runs.start("damaged")
    stage = workdir / "checkpoints" / "01-math"
    until(process, (stage / "3").exists)
    children = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert children
    assert_gone(children)
    newest = max(int(p.name) for p in stage.iterdir() if p.name.isdigit())
    data = next((stage / str(newest) / "state/params/d").iterdir())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    runs.end("damaged", runs.start("damaged"))
    line = next(line for line in log(workdir).splitlines() if line.startswith("warning: "))
    assert f"01-math: checkpoint {newest} is damaged (state/params/d/{data.name} was changed)" in line
    assert line.endswith(f"renamed to {newest}.damaged; the one of step {newest - 1} is used instead")
    assert f"math: goes on after step {newest - 1} of 12" in log(workdir)
    aside = f"checkpoints/01-math/{newest}.damaged"
    assert differences(runs.folder / "whole", workdir) == [f"left behind: {aside}"]


def test_sigterm_ends_a_run_in_order_and_it_goes_on(runs: Runs):
    """SIGTERM goes to the whole process group, as from a scheduler: while the base is scored, then in training."""
    workdir, said = runs.folder / "told", runs.folder / "told.out"
    again = "start the same command again to go on"
    first = runs.start("told")
    until(first, lambda: "parameters on" in log(workdir))
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(60) == STATUS
    line = said.read_text().strip().splitlines()[-1]
    assert line == f"stopped by SIGTERM during base: scores; what was finished is saved; {again}"

    second = runs.start("told", "--config.train.checkpoint_every=0")  # so only the signal causes a checkpoint
    until(second, (workdir / "tensorboard/01-math").exists)
    children = descendants(second.pid)
    os.killpg(second.pid, signal.SIGTERM)
    assert second.wait(60) == STATUS
    assert children
    assert_gone(children)
    line = said.read_text().strip().splitlines()[-1]
    (newest,) = (int(p.name) for p in (workdir / "checkpoints/01-math").iterdir())
    assert line == f"stopped by SIGTERM after step {newest} of math; saved; {again}"
    assert log(workdir).strip().endswith(line)

    runs.end("told", runs.start("told"))
    assert f"math: goes on after step {newest} of 12" in log(workdir)
    assert differences(runs.folder / "whole", workdir) == []


def test_what_a_kill_left_of_a_record_is_removed_and_in_nobodys_way(tmp_path: Path):
    """A folder that has nothing but a temporary file is still an empty work folder."""
    (tmp_path / ".config.json.123.tmp").write_text("{")
    work = WorkFolder(tmp_path)
    work.open(parse(default()))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / ".plan.json.123.tmp").write_text("{")
    work.open(parse(default()))
    assert not list((tmp_path / "recovery").iterdir())


def test_a_run_goes_on_on_another_mesh_but_not_with_other_prompts(tmp_path: Path):
    work = WorkFolder(tmp_path)
    work.open(parse(default()))
    work.open(parse({"mesh": {"data": 2, "fsdp": 4}, "checkpoints": {"keep": 3}}))
    with pytest.raises(UserError, match=r"a run with train.prompts_per_step=16, now 8; name a new work folder"):
        work.open(parse({"train": {"prompts_per_step": 8}}))
