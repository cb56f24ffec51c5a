"""Kills a run at random moments, starts it again until it ends, and compares it with an undisturbed run bit for bit.

    python tests/kills.py --kills=100 --seed=0

Each kill sends SIGKILL to the whole process group, after a random time. The time begins at one of these moments:

- start: when the command is started.
- work: when the run has begun to work.
- save: as work; then the kill waits until a checkpoint is being written (its temporary folder exists).
- record: as work; then the kill waits until a record is being written (its temporary file exists).

If a run ends before all kills are made, the remaining kills are made on a new run. The comparison covers the parameters
of every stage, scores, evaluations, samples, costs and records of analysis and recovery except seconds and memory, and
the scalars of TensorBoard.

The exit status is 0 if no run differs from the undisturbed one.
"""

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from mdrl_jax import config

def get_config():
    c = config.default()
    c.stages = ("math", "qa", "analyze", "refresh-math", "rollback-math-qa")
    c.stage_overrides = {
        "math": {"random_signs": True, "max_rounds": 2, "filter": {"low": 0.01, "high": 0.99, "prompts": 48}},
        "refresh-math": {"steps": 2},
    }
    c.scored_domains = ("math", "qa")
    c.domains.n_test = 16
    c.domains.n_validation = 8
    c.evaluate.batch, c.evaluate.samples = 16, 1
    c.rollout.prompt_buckets = (12,)
    c.rollout.completion_buckets = (8,)
    c.train.steps = 12
    c.train.prompts_per_step, c.train.group_size = 8, 8
    c.train.learning_rate = 4e-4
    c.train.checkpoint_every = 2
    c.analyze.prompts, c.analyze.group_size, c.analyze.batch, c.analyze.path_prompts = 16, 2, 4, 4
    c.analyze.vectors, c.analyze.lanczos_steps, c.analyze.permutations = 2, 3, 0
    c.recover.prompts, c.recover.samples, c.recover.random_sets = 8, 1, 2
    c.recover.rules, c.recover.fractions, c.recover.strengths = ("magnitude",), (0.01, 0.1), (1.0,)
    c.recover.control_draws = 2
    c.rewards.workers = 1
    c.mesh.data = 1
    return c
"""
KINDS = ("start", "work", "save", "record")
RECORDS = (
    ".",
    "evaluations",
    "samples",
    "costs",
    "filters",
    "recovery",
    "analysis",
    "analysis/parts",
    "analysis/samples",
)


class Runs:
    """Runs of one config; they share a cache of compiled programs, so that a restart is quick."""

    def __init__(self, folder: Path, config: str = CONFIG, *flags: str):
        self.folder, self.flags = folder, flags
        (folder / "config.py").write_text(config)
        # One device, as on a user's machine, instead of the tests' eight.
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("MDRL_TESTS_COMPILED", str(folder / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """Starts the command in a process group of its own; its output goes to `NAME.out`."""
        flags = [f"--config={self.folder / 'config.py'}", f"--workdir={self.folder / name}", *self.flags, *more]
        with open(self.folder / f"{name}.out", "a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "mdrl_jax.main", *flags],
                env=self.environment,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    def end(self, name: str, process: subprocess.Popen[str]) -> None:
        """Waits until the command ends.

        Raises:
          RuntimeError: if it failed; the message has the end of its output.
        """
        if process.wait():
            said = (self.folder / f"{name}.out").read_text().strip().splitlines()[-20:]
            raise RuntimeError(f"exit status {process.returncode}: " + "\n".join(said))

    def killed(self, name: str, kind: str, seconds: float, saved: int = 0) -> bool:
        """Starts the command and kills it.

        Args:
          name: name of the run; a run that was killed before continues.
          kind: the moment of the kill, one of `KINDS`; the module docstring explains them.
          seconds: time to wait, after the start of the process if the kind is "start", otherwise after it has begun to
            work and has written the checkpoints of `saved` more steps.
          saved: number of these steps.

        Returns:
          True if it was killed, False if it ended before.
        """
        workdir = self.folder / name
        log = workdir / "log.txt"
        before, steps = log.stat().st_size if log.exists() else 0, _saved(workdir)
        process = self.start(name)
        if kind != "start":
            _until(process, lambda: log.exists() and log.stat().st_size > before)
            _until(process, lambda: _saved(workdir) >= steps + saved)
        _sleep(process, seconds)
        if kind == "save":
            _until(process, lambda: any(workdir.glob("checkpoints/*/*.unfinished")))
        if kind == "record":
            _until(
                process, lambda: any(name.endswith(".tmp") for place in RECORDS for name in _entries(workdir / place))
            )
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            self.end(name, process)
        return not ended


def descendants(pid: int) -> list[int]:
    """All descendants of a process, by their ids.

    They include reward workers and their children, which a signal to the process group does not reach, because each
    worker is in a session of its own.
    """
    found = [pid]
    for known in found:
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                pass  # the process has just ended
    return found[1:]


def assert_gone(pids: list[int]) -> None:
    """Checks that all these processes end within 20 seconds. Workers end because their pipes are closed."""

    def alive(pid: int) -> bool:
        try:  # a killed process stays as a zombie on systems where no process reaps orphans
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _saved(workdir: Path) -> int:
    """Number of steps up to the newest checkpoint of each stage, summed over stages."""
    found: dict[Path, int] = {}
    for p in workdir.glob("checkpoints/*/*"):
        if p.name.isdigit():
            found[p.parent] = max(int(p.name), found.get(p.parent, 0))
    return sum(found.values())


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _sleep(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def _until(process: subprocess.Popen[str], reached: Any) -> None:
    while process.poll() is None and not reached():
        time.sleep(0.0003)


def differences(one: Path, other: Path) -> list[str]:
    """Names of the results that differ between two finished work folders; empty if none does."""
    import jax
    import numpy as np

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would warn that steps were logged twice
    from mdrl_jax.commands.loaded import load_stage

    found = []
    stages = [p.name for p in sorted((one / "checkpoints").iterdir())]
    for stage in stages:
        a, b = (load_stage(str(folder), stage.partition("-")[2]).params for folder in (one, other))
        if any(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in _pairs(jax.tree.leaves, a, b)):
            found.append(f"parameters after {stage}")
    found += [f"TensorBoard of {name}" for name in [*stages, "scores"] if _shown(one, name) != _shown(other, name)]
    for pattern in (
        "scores.jsonl",
        "costs/*",
        "claims.json",
        "samples/*",
        "evaluations/*",
        "analysis/**/*.json",
        "recovery/*.json",
        "random_signs/*.json",
    ):
        for file in sorted(one.glob(pattern)):
            name = file.relative_to(one)
            if not (other / name).exists() or _content(file) != _content(other / name):
                found.append(str(name))
    left = [str(p.relative_to(other)) for p in other.rglob("*") if p.name.endswith((".tmp", ".unfinished", ".damaged"))]
    return found + [f"left behind: {name}" for name in left]


def _pairs(leaves: Any, a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    return zip(leaves(a), leaves(b), strict=True)


def _content(file: Path) -> Any:
    return json.dumps(timeless(json.loads(file.read_text()))) if file.suffix == ".json" else file.read_bytes()


def timeless(record: Any) -> Any:
    """A record without its seconds and without the memory that it took."""
    if isinstance(record, dict):
        return {k: timeless(v) for k, v in record.items() if k not in ("seconds", "peak_bytes")}
    return [timeless(v) for v in record] if isinstance(record, list) else record


def _shown(workdir: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a folder of event files, except times.

    Args:
      workdir: the work folder.
      name: name of the folder in `tensorboard/`: that of a stage, or "scores".

    Returns:
      tag -> (step, value) of each point; empty if there is no such folder.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (workdir / "tensorboard" / name).exists():
        return {}
    events = EventAccumulator(str(workdir / "tensorboard" / name), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "seconds" not in tag]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def main() -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=12.0, help="longest time before a kill, in seconds")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rng = random.Random(given.seed)
    wrong, kills, number = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        began = time.monotonic()
        runs.end("whole", runs.start("whole"))
        print(f"the undisturbed run took {time.monotonic() - began:.0f} s", flush=True)
        while kills < given.kills:
            number += 1
            ended = False
            while not ended and kills < given.kills:
                kind, seconds = rng.choice(KINDS), rng.uniform(0, given.seconds)
                ended = not runs.killed(f"run-{number}", kind, seconds)
                kills += not ended
                log = Path(folder) / f"run-{number}" / "log.txt"
                last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
                what = "ended before the kill" if ended else f"kill {kills}"
                print(f"run {number}: {what}, {kind} {seconds:.1f} s; log: {(last or [''])[0][:80]}", flush=True)
            if not ended:
                runs.end(f"run-{number}", runs.start(f"run-{number}"))
            different = differences(Path(folder) / "whole", Path(folder) / f"run-{number}")
            print(f"run {number}: {'; '.join(different) or 'equal to the undisturbed run, bit for bit'}", flush=True)
            wrong += different
    print(f"{kills} kills in {number} runs; {len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
