"""The benchmark `bench start`: seconds from the start of a process to the end of the first step of a run.

Each call starts a new Python process. One task imports what a run imports. The others run the quickstart's first GRPO
step in a new work folder, after its base was scored on four prompts: with the compilation cache that the first call has
filled, and without a cache.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mdrl_jax.bench.measure import Task
from mdrl_jax.bench.speed import Entry
from mdrl_jax.errors import UserError


def tasks(folder: str) -> tuple[dict[str, Task], list[Entry]]:
    """An import of what a run imports, and the first step with and without a compilation cache.

    Args:
      folder: an empty folder for the compilation cache and the work folders.

    Returns:
      the tasks by name, and their lines. A call of a task raises UserError if its process fails, or ends before the
      first step.
    """

    def imports() -> None:
        _finish([sys.executable, "-c", "from mdrl_jax import main; main.import_run()"])

    def first_step(cache: Callable[[], str]) -> Callable[[], None]:
        def call() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as workdir:
                _until_first_step(workdir, cache())

        return call

    warm, cold = "first step, with a cache", "first step, without a cache"
    made = {
        "imports": Task(imports),
        warm: Task(first_step(lambda: str(Path(folder) / "cache"))),
        cold: Task(first_step(lambda: "off")),
    }
    return made, [Entry("imports"), Entry(warm), Entry(cold)]


def _finish(command: list[str]) -> None:
    """Runs a command to its end.

    Raises:
      UserError: if it fails; the message is its last line of errors.
    """
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{' '.join(command)} failed: {ended.stderr.strip().splitlines()[-1:]}")


def _until_first_step(workdir: str, cache: str) -> None:
    """Starts a run and waits for the end of its first training step; then the process is killed.

    Raises:
      UserError: if the run ends before.
    """
    command = [
        sys.executable, "-m", "mdrl_jax.main", "--config=quickstart", "--config.stages=('math',)",
        "--config.scored_domains=('math',)", "--config.stage_overrides={}", "--config.train.steps=1",
        "--config.domains.n_test=4", "--config.evaluate.batch=4", "--config.evaluate.samples=1", f"--workdir={workdir}",
        f"--compilation_cache={cache}",
        "--output=json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["label"] == "math" and event["done"] == 1:
                run.kill()
                return
        raise UserError(f"the run ended before its first step: {run.stderr.read().strip().splitlines()[-1:]}")
