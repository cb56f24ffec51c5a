"""Compares all methods to recover or prevent forgetting, over one work folder per seed (definitions §2, §8 to §10).

Each row is a method: the plain sequence (θ_T), each recovery (refresh, distillation, alternating refresh, rollback),
each prevention, the reversed order, joint training, and merges. A prevention is the last stage of its prefix without a
label; it has a row if that stage trains the domain with which the plain sequence ended. The reversed order has a row if
it trained the same domains. Columns are the average over domains, the score of the domain that lost most, the worst
collateral, and the cost beyond the plain sequence: optimizer steps, FLOPs and seconds, from `costs/NN-stage.json`.

Choices where the definitions leave room:
- The domain that lost most is the one with the largest fall in the plain sequence, by the mean over seeds.
- The collateral (`recovered.collateral`) compares a recovery with the stage that it started from, and other rows with
  θ_T. It is the largest drop of any domain but one: the domain that the recovery is of (of `alternate-A-B` A), and the
  domain that lost most in other rows. `distill-all` leaves out none. It is negative if all these domains rose.
- The cost of a row is that of all stages that led to its parameters, minus that of all stages that led to θ_T. So a
  refresh that starts from another refresh includes both, a prevention counts the difference between its stages and the
  plain ones, and a merge includes all its solo stages.
- Intervals are over seeds, as in `seeds`. With a single seed, scores have intervals over prompts and costs have none.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdrl_jax.config import METHODS, is_supervised, parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.progress import printable
from mdrl_jax.records import read_json, regular
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import BASE, Matrix, Quantity
from mdrl_jax.report.tables.recovered import collateral
from mdrl_jax.report.tables.seeds import HIERARCHICAL_FROM, N_REPLICATES, Line
from mdrl_jax.report.tables.transfer import fall
from mdrl_jax.stage import Stage, labelled, names_on_the_way, resolve_stages, way
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.bootstrap import hierarchical_bootstrap
from mdrl_jax.stats.estimate import Estimate
from mdrl_jax.workfolder import WorkFolder

PLAIN = "plain sequence"
RECOVERY = ("refresh", "distill", "alternate", "rollback")
WHOLE = ("joint", "average", "arithmetic", "ties", "ram", "dare")
COSTS = ("steps", "flops", "seconds")
SCORES = ("average", "focus", "collateral")
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the comparison needs from one work folder.

    Attributes:
      matrix: its scores.
      stages: the stages of its config; empty if the folder has no config.
      costs: the records of `costs/`, by stage name.
      ended: why a refresh, distillation or alternating refresh stopped, in words (`refresh.tracker.stop`), by stage.
    """

    matrix: Matrix
    stages: tuple[Stage, ...]
    costs: Mapping[str, Mapping[str, Any]]
    ended: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
      name: the stage, or `PLAIN`.
      cells: a figure for each of `SCORES` (in points) and `COSTS` (steps, FLOPs, seconds).
      worst: the domain of the collateral in each seed that has one, in the order of the seeds.
    """

    name: str
    cells: Mapping[str, Line]
    worst: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MethodsTable:
    """The comparison.

    Attributes:
      seeds: seed of each run.
      focus: the domain that lost most; None if no domain lost anything.
      rows: the methods.
    """

    seeds: tuple[int | None, ...]
    focus: str | None
    rows: tuple[Method, ...]

    def table(self) -> Table:
        """The comparison as a table for the screen."""
        seeds = ", ".join("?" if s is None else str(s) for s in self.seeds)
        over = f"mean over seeds {seeds} ± 95 % half-width" if len(self.seeds) > 1 else "± 95 % half-width over prompts"
        title = f"methods, points: {over}; cost beyond the plain sequence"
        table = Table(box=box.SIMPLE, title_justify="left", title=title)
        table.add_column("", no_wrap=True)
        for heading in ("average", self.focus or "–", "worst collateral", "steps", "FLOPs", "seconds"):
            table.add_column(Text(printable(heading)), justify="right", no_wrap=True)
        for row in self.rows:
            domains = "/".join(dict.fromkeys(row.worst))
            cells = [row.cells[c].around(".1f") for c in SCORES]
            cells[2] += f" {domains}" if domains else ""
            costs = [row.cells[c].around(form) for c, form in zip(COSTS, ("+.0f", "+.2g", "+.0f"), strict=True)]
            have, all_ = sum(x is not None for x in row.cells["average"].per_seed), len(self.seeds)
            name = row.name if have == all_ else f"{row.name} ({have} of {all_} seeds)"
            table.add_row(*(Text(printable(cell)) for cell in (name, *cells, *costs)))
        return table

    def text(self, width: int = 120) -> str:
        """The same table as plain text, at most `width` columns wide."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.table(), highlight=False)
        lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
        return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"

    def record(self) -> dict[str, Any]:
        """The same as a JSON document.

        Returns:
          {"seeds", "focus", "methods"}: for each method {"method": its name, and the record of each cell by its name}.
          The record of the collateral also has "domains", the row's `worst`.
        """
        rows = []
        for row in self.rows:
            rows.append({"method": row.name, **{name: x.record() for name, x in row.cells.items()}})
            rows[-1]["collateral"]["domains"] = list(row.worst)
        return {"seeds": list(self.seeds), "focus": self.focus, "methods": rows}


def load(workdir: str | Path) -> Run:
    """Reads the scores, the stages and the costs of a work folder.

    Args:
      workdir: the work folder. Without `config.json` the run has no stages, and without `costs/` it has no costs.

    Raises:
      UserError: if it has no evaluations; if one of its records or `config.json` is not valid JSON; if the evaluations
        do not fit together (`matrix.build`); or if `config.json` is not that of a run, or is not valid in
        this version.
      KeyError: if a cost lacks "stage", or as in `matrix.build`.
      ValueError: as in `matrix.build`.
    """
    folder = WorkFolder(Path(workdir))
    matrix = matrices.load(workdir)
    configured = (folder.root / "config.json").exists()
    stages = resolve_stages(parse(folder.recorded()), tuple(DOMAINS)) if configured else ()
    costs = [read_json(regular(file)) for file in sorted((folder.root / "costs").glob("*.json"))]
    files = ((s, folder.root / "recovery" / f"{s}.json") for s in matrix.stages)
    recovered = {s: read_json(regular(file)) for s, file in files if file.exists()}
    ended = {s: record["stopped"] for s, record in recovered.items() if record.get("stopped")}
    return Run(matrix, stages, {c["stage"]: c for c in costs}, ended)


def compare(runs: Sequence[Run]) -> MethodsTable | None:
    """The comparison over one run per seed (`summarise`).

    None if no method but the plain sequence has a row (`rows_of`), also if there is no training stage or no run.
    """
    table = summarise(runs)
    return table if len(table.rows) > 1 else None


def summarise(runs: Sequence[Run]) -> MethodsTable:
    """The comparison over runs of one experiment, one for each seed. A method has a row if any of the runs has it.

    Args:
      runs: the runs, at least one. With one, intervals of scores are over prompts. From eight of them on
        (`HIERARCHICAL_FROM`), the intervals of scores come from a bootstrap with a fixed seed.

    Returns:
      The comparison, with rows in this order: the plain sequence, refreshes, distillations, alternating refreshes,
      rollbacks, preventions, joint training, the reversed order, merges. It has no rows if no run has a training stage.
    """
    focus = most_lost([r.matrix for r in runs])
    found = [_figures(r, focus) for r in runs]
    replicates = replicated(runs, lambda run: _figures(run, focus))
    rows = []
    for name in in_order({row for r in runs for row in rows_of(r.matrix)}):
        cells = {c: over_runs(f"{c} of {name}", (name, c), found, replicates) for c in (*SCORES, *COSTS)}
        worst = (f[name, "collateral"].detail for f in found if (name, "collateral") in f)
        rows.append(Method(name, cells, tuple(w for w in worst if w)))
    return MethodsTable(tuple(r.matrix.seed for r in runs), focus, tuple(rows))


def most_lost(runs: Sequence[Matrix]) -> str | None:
    """The domain with the largest mean fall over seeds in the plain sequence, the first of equal ones.

    None if no domain has a mean fall above 0. A fall is the score after the domain's own stage minus that after the
    last training stage.

    Args:
      runs: the score matrix of each seed. A seed in which a domain has no fall does not enter the domain's mean.
    """
    falls: dict[str, list[float]] = {}
    for m in runs:
        for domain in m.domains:
            estimate = fall(m, domain).estimate if matrices.training_rows(m) else None
            if estimate is not None:
                falls.setdefault(domain, []).append(estimate.value)
    means = {d: float(np.mean(x)) for d, x in falls.items() if np.mean(x) > 0}
    return max(means, key=lambda d: means[d]) if means else None


def rows_of(matrix: Matrix) -> dict[str, int]:
    """The methods of a run, with the rows of the score matrix that hold their scores.

    Returns:
      {`PLAIN` or the name of a stage: row, from 0}; empty if there is no training stage. Of a prevention it has only
      the last stage without a label, if that trains the domain with which the plain sequence ended; of the reversed
      order only the last stage, if it trained the same domains. A stage `recover` has none. A recovery has a row only
      if it starts where all domains of the sequence were trained, in its order: not one from the middle of the sequence
      or from another order, which the comparison of pairs has (`pairs`).
    """
    training = [matrix.stages[s] for s in matrices.training_rows(matrix)]
    if not training:
        return {}
    rows = {PLAIN: matrices.training_rows(matrix)[-1]}
    last: dict[str, int] = {}
    reversed_domains = set()
    for s, name in enumerate(matrix.stages):
        prefix, _, rest = name.partition("-")
        if name in WHOLE or (rest and prefix in RECOVERY and _after_all(matrix, name, training)):
            rows[name] = s
        elif rest and prefix in METHODS and not labelled(name):
            last[prefix] = s
        elif rest and prefix == "reversed" and not labelled(name):
            last[prefix] = s
            reversed_domains.add(rest)
    for prefix, s in last.items():
        rest = matrix.stages[s].partition("-")[2]
        if rest == training[-1] if prefix in METHODS else reversed_domains == set(training):
            rows[matrix.stages[s]] = s
    return rows


def _after_all(matrix: Matrix, stage: str, training: Sequence[str]) -> bool:
    """Whether the way to a stage's start trained the domains of the sequence in its order, or no domain at all."""
    way = [s for s in names_on_the_way(matrix.starts.get(stage, BASE), matrix.starts) if not is_supervised(s)]
    found = [d for s in way if (d := matrices.trained_domain(s, matrix.domains)) is not None]
    return not found or tuple(dict.fromkeys(found)) == tuple(dict.fromkeys(training))


def spent(run: Run, stage: str, what: str) -> float | None:
    """The cost of all stages that led to a stage's parameters, minus that of all stages that led to θ_T.

    Args:
      run: the work folder.
      stage: name of the stage. "base", and a name that no stage has, cost nothing.
      what: one of `COSTS`: "steps", "flops" or "seconds".

    Returns:
      The difference, in steps, FLOPs or seconds; negative if the stage cost less. None if a cost that does not cancel
      is not on record, if the folder has no config, or if there is no training stage.
    """
    training = matrices.training_rows(run.matrix)
    if not training or not run.stages:
        return None
    ours, theirs = (_led_to(run.stages, name) for name in (stage, run.matrix.stages[training[-1]]))
    signed = [(s, 1.0) for s in ours - theirs] + [(s, -1.0) for s in theirs - ours]
    values = [(run.costs.get(s, {}).get(what), sign) for s, sign in signed]
    known = [sign * float(value) for value, sign in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def total(run: Run, stage: str, what: str) -> float | None:
    """The cost of all stages that led to a stage's parameters, those of the plain sequence on the way included.

    Args:
      run, stage, what: as in `spent`.

    Returns:
      The sum; None if one of the costs is not on record, or if the folder has no config.
    """
    values = [run.costs.get(s, {}).get(what) for s in _led_to(run.stages, stage)]
    return None if None in values or not values else float(sum(v for v in values if v is not None))


def _led_to(stages: Sequence[Stage], name: str) -> set[str]:
    stage = next((s for s in stages if s.name == name), None)
    if stage is not None and stage.kind == "merge":
        return {name}.union(*(_led_to(stages, f"solo-{d}") for d in stage.domains))
    return {s.name for s in way(name, stages)}


def _figures(run: Run, focus: str | None) -> dict[Key, Quantity]:
    """{(row, column): figure} of the comparison for one run."""
    m, found = run.matrix, {}
    rows = rows_of(m)
    for name, s in rows.items():
        stage = m.stages[s]
        recovers = stage.partition("-")[0] in RECOVERY
        about = (matrices.trained_domain(stage, m.domains) if recovers else focus) or ""
        found[name, "average"] = matrices.average("average", [matrices.score_at(m, "", s, d) for d in m.domains])
        if focus is not None:
            found[name, "focus"] = matrices.score_at(m, focus, s, focus)
        before = matrices.start_row(m, stage) if recovers else rows[PLAIN]
        if name != PLAIN and before is None:
            found[name, "collateral"] = Quantity("collateral", None, f"{m.starts[stage]} was not evaluated")
        elif name != PLAIN and before is not None:
            found[name, "collateral"] = collateral(m, "collateral", about, before, s)
        for what in COSTS:
            found[name, what] = exact(what, spent(run, stage, what))
    return found


def exact(what: str, value: float | None) -> Quantity:
    """A cost, one of `COSTS`, as a figure without an interval; without an estimate if it is not on record."""
    estimate = None if value is None else Estimate(value, -math.inf, math.inf, 1, what)
    return Quantity(what, estimate, "" if estimate else "not on record")


def replicated(
    runs: Sequence[Run], figures: Callable[[Run], Mapping[Key, Quantity]]
) -> list[list[Mapping[Key, Quantity]]]:
    """Figures of each run on `N_REPLICATES` draws of its prompts; empty below `HIERARCHICAL_FROM` runs.

    Seeds share their prompts, so replicate r has the same draw of prompts in every run.
    """
    if len(runs) < HIERARCHICAL_FROM:
        return []
    rngs = [np.random.default_rng(0) for _ in runs]
    return [
        [figures(dataclasses.replace(r, matrix=matrices.resample(r.matrix, rng))) for _ in range(N_REPLICATES)]
        for r, rng in zip(runs, rngs, strict=True)
    ]


def over_runs(
    name: str, key: Key, found: Sequence[Mapping[Key, Quantity]], replicates: Sequence[Sequence[Mapping[Key, Quantity]]]
) -> Line:
    """A figure over the runs that have an estimate for it.

    Args:
      name: name of the resulting figure.
      key: its key, a row and one of `SCORES` or `COSTS`.
      found: the figures of each run.
      replicates: as from `replicated`.

    Returns:
      The figure of a single run as it is; of several the mean with Student's t; of a score in `HIERARCHICAL_FROM` runs
      or more with the interval of a bootstrap over runs and prompts.
    """
    estimates = [f[key].estimate if key in f else None for f in found]
    per_seed = tuple(None if e is None else e.value for e in estimates)
    known = [e for e in estimates if e is not None]
    if not known:
        reasons = [f[key].reason for f in found if key in f]
        return Line(name, None, per_seed, next((r for r in reasons if r), ""))
    if len(found) == 1:
        return Line(name, known[0], per_seed)
    values = [e.value for e in known]
    if len(values) < HIERARCHICAL_FROM or key[1] in COSTS:
        return Line(name, statistics.over_seeds(values, known[0].unit), per_seed)
    drawn_NR = [
        [e.value for f in r if (e := f[key].estimate) is not None]
        for r, v in zip(replicates, per_seed, strict=True)
        if v is not None
    ]
    return Line(name, hierarchical_bootstrap(values, drawn_NR, unit=known[0].unit), per_seed)


def in_order(names: set[str]) -> list[str]:
    """Sorts the names of rows: the plain sequence, recoveries, preventions, other ways to train, merges."""
    prefixes = [PLAIN, *RECOVERY, *METHODS, "joint", "reversed", *WHOLE[1:]]
    return sorted(names, key=lambda n: (prefixes.index(n if n in prefixes else n.partition("-")[0]), n))
