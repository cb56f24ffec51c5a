"""Kills a run at random moments and starts it again until it ends: as the undisturbed run does, bit for bit.

    python tests/kills.py --kills=100 --seed=0

Each kill is SIGKILL to the whole process group, at a moment of one of these kinds: some time after the command was
started, or after it began to work; while a checkpoint is written (its temporary folder is there); while a record is
written (its temporary file is there). A run that has ended is compared with the undisturbed one, and another one takes
the kills that are left. Compared are the parameters of every stage, scores, evaluations, samples, what analysis and
recovery found but for its seconds, and what TensorBoard shows of the training.

The exit status is 0 if all runs ended the same.
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
    c.stage_overrides = {"refresh-math": {"steps": 2}}
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
    c.analyze.vectors, c.analyze.lanczos_steps, c.analyze.permutations = 2, 2, 1
    c.recover.prompts, c.recover.samples, c.recover.random_sets = 8, 1, 2
    c.recover.rules, c.recover.fractions, c.recover.strengths = ("magnitude",), (0.01, 0.1), (1.0,)
    c.rewards.workers = 1
    c.mesh.data = 1
    return c
"""
KINDS = ("start", "work", "save", "record")
RECORDS = (".", "evaluations", "samples", "costs", "recovery", "analysis", "analysis/parts", "analysis/samples")


class Runs:
    """Runs of one config, which share a cache of compiled programs so that a restart is quick."""

    def __init__(self, folder: Path, config: str = CONFIG, *flags: str):
        self.folder, self.flags = folder, flags
        (folder / "config.py").write_text(config)
        # One device: the processes stand for a user's machine, not for a test's eight.
        self.environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """The command, in a process group of its own; what it says goes to `NAME.out`."""
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
        """Waits; raises RuntimeError with what the command said if it failed."""
        if process.wait():
            said = (self.folder / f"{name}.out").read_text().strip().splitlines()[-20:]
            raise RuntimeError(f"exit status {process.returncode}: " + "\n".join(said))

    def killed(self, name: str, kind: str, seconds: float, saved: int = 0) -> bool:
        """Starts the command and kills it at a moment of this kind; whether it came to that before the run ended.

        The time begins with the process or, of other kinds than "start", with its work, after `saved` steps whose
        checkpoints it has finished.
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
    """The children of a process and theirs: reward workers, which lie in sessions of their own, and what they run."""
    found = [pid]
    for known in found:
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                pass  # it has just ended
    return found[1:]


def assert_gone(pids: list[int]) -> None:
    """No process is left after some seconds: workers see that their pipes are closed."""

    def alive(pid: int) -> bool:
        try:  # a killed process stays as a zombie where nobody waits for orphans
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _saved(workdir: Path) -> int:
    """Steps up to the newest checkpoint of each stage."""
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
    """What differs between two finished work folders; [] if nothing does."""
    import jax
    import numpy as np

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that steps were done again is no news
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
        "claims.json",
        "samples/*",
        "evaluations/*",
        "analysis/**/*.json",
        "recovery/*.json",
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
    if file.suffix != ".json":
        return file.read_bytes()

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return json.dumps(timeless(json.loads(file.read_text())))


def _shown(workdir: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a stage's training, or of all scores, but for seconds."""
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
    parser.add_argument("--seconds", type=float, default=12.0, help="longest time before a kill")
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
                what = "ended before it" if ended else f"kill {kills}"
                print(f"run {number}: {what}, {kind} {seconds:.1f} s; log: {(last or [''])[0][:80]}", flush=True)
            if not ended:
                runs.end(f"run-{number}", runs.start(f"run-{number}"))
            different = differences(Path(folder) / "whole", Path(folder) / f"run-{number}")
            print(f"run {number}: {'; '.join(different) or 'as the undisturbed one, bit for bit'}", flush=True)
            wrong += different
    print(f"{kills} kills of {number} runs; {len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
