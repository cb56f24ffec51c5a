"""A stage `locality-A`: how well the theory predicts A's damage from edits of several sizes that start at A's peak.

`analysis/locality.py` does the work. This file selects the stages of the run and puts their scores beside the figures.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mdrl_jax import records
from mdrl_jax.analysis import locality, samples
from mdrl_jax.analysis.probe import build
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, from_the_peak
from mdrl_jax.stages.train import steps_taken
from mdrl_jax.stats.estimate import Record, figure_text, paired_difference, score
from mdrl_jax.workfolder import WorkFolder


def check(runtime: Runtime, stage: Stage) -> None:
    """Refuses a stage whose domain has too few prompts, or prompts that the mesh does not divide.

    Raises:
      UserError: as in `samples.check`.
    """
    samples.check(runtime, stage.domains, f"stage {stage.name}: ")


def run(
    runtime: Runtime,
    folder: WorkFolder,
    stage: Stage,
    stages: Sequence[Stage],
    screen: Screen,
    params_after: Callable[[str], Any],
) -> None:
    """Measures every edit that starts at A's peak, writes `analysis/locality-A.json`, and shows a line for each edit.

    Nothing is done if the file exists.

    Args:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stage: the stage `locality-A`.
      stages: all stages of the run, in order.
      screen: shows progress and the lines.
      params_after: (name of a stage) -> the parameters at its end.

    Raises:
      UserError: if sampling fails (`samples.draw`), a Lanczos search fails, or a record is not valid JSON.
      ValueError: if a damage is not finite.
      Stopped: after a SIGTERM; nothing is saved.
      The errors of `params_after`.
    """
    started, (domain,) = time.monotonic(), stage.domains
    file = folder.root / "analysis" / f"{stage.name}.json"
    if file.exists():
        screen.print(f"{stage.name}: finished before, skipped")
        return
    branches = from_the_peak(domain, stages[: stages.index(stage)])
    with screen.steps(stage.name, len(branches)) as show:
        start = params_after(domain)
        show(0, f"samples of {domain}")
        sample = samples.draw(runtime, start, domain)
        probe, names, rows = build(runtime, runtime.config.train.grpo), [b.name for b in branches], []
        for row in locality.measure(probe, start, names, params_after, sample, lambda text: show(len(rows), text)):
            rows.append(row)
    peak = next(s for s in stages if s.name == domain)
    before = records.read_json(folder.evaluation(peak.folder))
    groups = before.get("groups", {})
    for row, branch in zip(rows, branches, strict=True):
        method = "SFT" if branch.kind == "sft" else "GRPO"
        row |= {"by": f"{method}, {branch.settings.optimizer.name}", "steps": steps_taken(folder, branch)}
        row |= {"domains": list(branch.domains), "learning_rate": branch.settings.learning_rate}
        after = records.read_json(folder.evaluation(branch.folder))
        lost = paired_difference(before["rewards"][domain], after["rewards"][domain], groups.get(domain)).in_points()
        row["lost"] = lost.record(0.0)
        row["scores"] = {d: score(after["rewards"][d], groups.get(d)).record() for d in branch.domains}
    records.write_json(file, {"domain": domain, "stage": peak.name, "n_prompts": sample.n_prompts, "edits": rows})
    for row in rows:
        undone = row.get("removal", {}).get("undone", {"estimate": None})
        screen.print(
            f"{row['stage']}: ‖D‖ {row['norm']:.3g}, {domain} lost {_text(row['lost'], '.1f')} points; one expansion: "
            f"R² {_text(row['r2'], '.2f')}; undone by removing P_S D: {_text(undone, '.2f')}"
        )
    screen.print(f"{stage.name}: {time.monotonic() - started:.0f} s")


def _text(figure: Record, form: str) -> str:
    """A figure as text; the report's own form of it would import the plotting library."""
    if figure["estimate"] is None:
        return figure.get("reason") or "not measured"
    return figure_text(figure["estimate"], figure["ci95"], form)
