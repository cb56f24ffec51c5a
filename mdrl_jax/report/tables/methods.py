"""All ways to recover or prevent forgetting side by side, over one work folder a seed (definitions §2, §8 to §10).

Rows are what was done: the plain sequence (θ_T), each refresh and rollback, each prevention (the last stage of its
prefix, once it has reached the domain that the plain sequence ended with), the reversed order, joint training, merges.
Columns are the average over domains, the score of the domain that lost most, the worst collateral, and what it took
beyond the plain sequence in optimizer steps, FLOPs and seconds, from `costs/NN-stage.json`.

Choices where the definitions leave room:
- The domain that lost most is that of the largest fall in the plain sequence, by the mean over seeds.
- Collateral is that of `recovered`, against θ_T, for every row: of a refresh or rollback the largest drop of any domain
  but the one it is about, of other rows that of any domain but the one that lost most; negative where all rose.
- What was spent is that of all stages which led to the row's parameters, less the same of θ_T: a second refresh
  after a first has both, a prevention what its stages cost more than the plain ones, a merge its solo stages for all.
- Intervals are over seeds, as in `seeds`; of one seed scores have those over prompts, and costs none.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mdrl_jax.config import METHODS, parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.records import read_json
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import Matrix, Quantity
from mdrl_jax.report.tables.recovered import collateral
from mdrl_jax.report.tables.seeds import HIERARCHICAL_FROM, N_REPLICATES, Line
from mdrl_jax.report.tables.transfer import fall
from mdrl_jax.stage import Stage, resolve_stages, way
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.bootstrap import hierarchical_bootstrap
from mdrl_jax.stats.estimate import Estimate
from mdrl_jax.workfolder import WorkFolder

PLAIN = "plain sequence"
RECOVERY = ("refresh", "rollback")
WHOLE = ("joint", "average", "arithmetic", "ties")
COSTS = ("steps", "flops", "seconds")
SCORES = ("average", "focus", "collateral")
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """One work folder: `stages` are those of its config, none where it has none; costs by stage name."""

    matrix: Matrix
    stages: tuple[Stage, ...]
    costs: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row: a cell for each of `SCORES` and `COSTS`; `worst` is the domain of the collateral in each seed."""

    name: str
    cells: Mapping[str, Line]
    worst: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MethodsTable:
    """The comparison; `focus` is the domain that lost most, None where none lost anything."""

    seeds: tuple[int | None, ...]
    focus: str | None
    rows: tuple[Method, ...]

    def table(self) -> Table:
        """For the screen."""
        seeds = ", ".join("?" if s is None else str(s) for s in self.seeds)
        title = f"methods, points: mean over seeds {seeds} ± 95 % half-width; cost beyond the plain sequence"
        table = Table(box=box.SIMPLE, title_justify="left", title=title)
        table.add_column("", no_wrap=True)
        for heading in ("average", self.focus or "–", "worst collateral", "steps", "FLOPs", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            domains = "/".join(dict.fromkeys(row.worst))
            cells = [_shown(row.cells[c], ".1f") for c in SCORES]
            cells[2] += f" {domains}" if domains else ""
            costs = [_shown(row.cells[c], form) for c, form in zip(COSTS, ("+.0f", "+.2g", "+.0f"), strict=True)]
            table.add_row(row.name, *cells, *costs)
        return table

    def text(self, width: int = 120) -> str:
        """The same as plain text, to be pasted."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.table(), highlight=False)
        lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
        return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"

    def record(self) -> dict[str, Any]:
        """The same as a JSON document."""
        rows = []
        for row in self.rows:
            rows.append({"method": row.name, **{name: x.record() for name, x in row.cells.items()}})
            rows[-1]["collateral"]["domains"] = list(row.worst)
        return {"seeds": list(self.seeds), "focus": self.focus, "methods": rows}


def load(workdir: str | Path) -> Run:
    """What a work folder holds. Raises UserError if it has no evaluations."""
    folder = WorkFolder(Path(workdir))
    matrix = matrices.load(workdir)
    configured = (folder.root / "config.json").exists()
    stages = resolve_stages(parse(folder.recorded()), tuple(DOMAINS)) if configured else ()
    costs = [read_json(file) for file in sorted((folder.root / "costs").glob("*.json"))]
    return Run(matrix, stages, {c["stage"]: c for c in costs})


def compare(workdirs: Sequence[str | Path]) -> MethodsTable | None:
    """The table of one work folder a seed; None where nothing but the plain sequence was done."""
    table = summarise([load(w) for w in workdirs])
    return table if len(table.rows) > 1 else None


def summarise(runs: Sequence[Run]) -> MethodsTable:
    """The table of runs of one experiment; rows are all that any of them has."""
    focus = most_lost([r.matrix for r in runs])
    found = [_figures(r, focus) for r in runs]
    rng = np.random.default_rng(0)
    replicates = [
        [_figures(dataclasses.replace(r, matrix=matrices.resample(r.matrix, rng)), focus) for _ in range(N_REPLICATES)]
        for r in runs
        if len(runs) >= HIERARCHICAL_FROM
    ]
    rows = []
    for name in _in_order({row for r in runs for row in rows_of(r.matrix)}):
        cells = {c: _over((name, c), found, replicates) for c in (*SCORES, *COSTS)}
        worst = (f[name, "collateral"].detail for f in found if (name, "collateral") in f)
        rows.append(Method(name, cells, tuple(w for w in worst if w)))
    return MethodsTable(tuple(r.matrix.seed for r in runs), focus, tuple(rows))


def most_lost(runs: Sequence[Matrix]) -> str | None:
    """The domain with the largest mean fall from its peak in the plain sequence; None where no domain fell."""
    falls: dict[str, list[float]] = {}
    for m in runs:
        for domain in m.domains:
            estimate = fall(m, domain).estimate if matrices.training_rows(m) else None
            if estimate is not None:
                falls.setdefault(domain, []).append(estimate.value)
    means = {d: float(np.mean(x)) for d, x in falls.items() if np.mean(x) > 0}
    return max(means, key=lambda d: means[d]) if means else None


def rows_of(matrix: Matrix) -> dict[str, int]:
    """Row of the matrix for each thing that was done."""
    training = [matrix.stages[s] for s in matrices.training_rows(matrix)]
    if not training:
        return {}
    rows = {PLAIN: matrices.training_rows(matrix)[-1]}
    last: dict[str, int] = {}
    reversed_domains = set()
    for s, name in enumerate(matrix.stages):
        prefix, _, rest = name.partition("-")
        if name in WHOLE or (rest and prefix in RECOVERY):
            rows[name] = s
        elif rest and prefix in METHODS:
            last[prefix] = s
        elif rest and prefix == "reversed":
            last[prefix] = s
            reversed_domains.add(rest)
    for prefix, s in last.items():
        rest = matrix.stages[s].partition("-")[2]
        if rest == training[-1] if prefix in METHODS else reversed_domains == set(training):
            rows[matrix.stages[s]] = s
    return rows


def spent(run: Run, stage: str, what: str) -> float | None:
    """Steps, FLOPs or seconds of all stages that led to a stage's parameters, less those that led to θ_T.

    None where a cost that matters is not on record.
    """
    training = matrices.training_rows(run.matrix)
    if not training or not run.stages:
        return None
    ours, theirs = (_led_to(run.stages, name) for name in (stage, run.matrix.stages[training[-1]]))
    signed = [(s, 1.0) for s in ours - theirs] + [(s, -1.0) for s in theirs - ours]
    values = [(run.costs.get(s, {}).get(what), sign) for s, sign in signed]
    known = [sign * float(value) for value, sign in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _led_to(stages: Sequence[Stage], name: str) -> set[str]:
    stage = next((s for s in stages if s.name == name), None)
    if stage is not None and stage.kind == "merge":
        return {name}.union(*(_led_to(stages, f"solo-{d}") for d in stage.domains))
    return {s.name for s in way(name, stages)}


def _figures(run: Run, focus: str | None) -> dict[Key, Quantity]:
    """Every figure that the run has, by row and column."""
    m, found = run.matrix, {}
    rows = rows_of(m)
    for name, s in rows.items():
        stage = m.stages[s]
        recovers = stage.partition("-")[0] in RECOVERY
        about = (matrices.trained_domain(stage, m.domains) if recovers else focus) or ""
        found[name, "average"] = matrices.average("average", [matrices.score_at(m, "", s, d) for d in m.domains])
        if focus is not None:
            found[name, "focus"] = matrices.score_at(m, focus, s, focus)
        if name != PLAIN:
            found[name, "collateral"] = collateral(m, "collateral", about, rows[PLAIN], s)
        for what in COSTS:
            value = spent(run, stage, what)
            exact = None if value is None else Estimate(value, -math.inf, math.inf, 1, what)
            found[name, what] = Quantity(what, exact, "" if exact else "not on record")
    return found


def _over(
    key: Key, found: Sequence[Mapping[Key, Quantity]], replicates: Sequence[Sequence[Mapping[Key, Quantity]]]
) -> Line:
    """A cell over seeds, on those that have it."""
    name = f"{key[1]} of {key[0]}"
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


def _in_order(names: set[str]) -> list[str]:
    """The plain sequence, refreshes, rollbacks, preventions, other ways to train, merges."""
    prefixes = [PLAIN, *RECOVERY, *METHODS, "joint", "reversed", *WHOLE[1:]]
    return sorted(names, key=lambda n: (prefixes.index(n if n in prefixes else n.partition("-")[0]), n))


def _shown(line: Line, form: str) -> str:
    if line.estimate is None:
        return "–"
    half = (line.estimate.high - line.estimate.low) / 2
    value = f"{line.estimate.value:{form}}"
    return f"{value} ± {half:{form.removeprefix('+')}}" if 0 < half < math.inf else value
