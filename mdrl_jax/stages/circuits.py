"""A stage `circuits-D`: the circuits of θ_0 and of every stage that trained D alone from there (definitions §11).

`analysis/circuits/` does the work. This file selects the stages of the run, and puts their steps and their scores on
all domains beside the figures.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mdrl_jax import records
from mdrl_jax.analysis.circuits import study
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, alone_from_origin
from mdrl_jax.stages.train import steps_taken
from mdrl_jax.stats.estimate import score
from mdrl_jax.workfolder import WorkFolder


def check(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage that cannot run; raises UserError as in `study.check`."""
    study.check(runtime, stage.domains[0])


def run(
    runtime: Runtime,
    folder: WorkFolder,
    stage: Stage,
    stages: Sequence[Stage],
    screen: Screen,
    params_after: Callable[[str], Any],
) -> None:
    """Compares the circuits, writes `analysis/circuits-D.json`, and shows a line for each model and each comparison.

    Nothing is done if the file exists. A stage that was stopped goes on with the first part that is not finished.

    Args:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stage: the stage `circuits-D`.
      stages: all stages of the run, in order.
      screen: shows progress and the lines.
      params_after: (name of a stage, or "base") -> the parameters at its end.

    Raises:
      UserError, RuntimeError: as in `study.run`.
      Stopped: after a SIGTERM; finished parts are saved.
      The errors of `params_after`.
    """
    started, (domain,) = time.monotonic(), stage.domains
    file = folder.root / "analysis" / f"{stage.name}.json"
    if file.exists():
        screen.print(f"{stage.name}: finished before, skipped")
        return
    trained = alone_from_origin(domain, stages[: stages.index(stage)], DOMAINS)
    kinds = {s.name: study.SFT if s.kind == "sft" else study.RL for s in trained}
    compared = study.Compared(domain, trained[0].start, kinds, params_after)
    record = study.run(runtime, compared, folder.root, screen.steps)
    by_name = {s.name: s for s in stages}
    for name, figures in record["models"].items():
        place = folder.evaluation(by_name[name].folder if name in by_name else "00-base")
        after = records.read_json(place)
        groups = after.get("groups", {})
        figures["scores"] = {d: score(x, groups.get(d)).record() for d, x in after["rewards"].items()}
        figures["steps"] = steps_taken(folder, by_name[name]) if name in by_name else 0
    records.write_json(file, record)
    for line in study.summary(record):
        screen.print(line)
    screen.print(f"{stage.name}: {time.monotonic() - started:.0f} s")
