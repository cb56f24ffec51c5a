"""Winning each domain back after each later stage: recovery, collateral and cost by pair, and cost against delay.

A pair is a recovery (refresh, distillation, alternating refresh or rollback) of one domain, from the end of one later
stage. Its delay is the number of stages between the domain's peak and the recovery. `configs/pairs.py` runs all pairs
of three orders.

Choices where the definitions leave room:
- The peak, and what was lost, are those of `recovered`. A pair without a stage in between is left out.
- The cost of a pair is that of the recovery alone, with the validation scores and sweeps that it needs to choose.
- Cost is compared with delay over the pairs that had measurably lost something: the interval of the loss lies above 0.
- The fraction of several pairs is the sum of their gains over the sum of their losses, so that a pair that lost little
  does not dominate it.
- A recovery that used up its steps, or stopped because another domain lost, costs less than a repair would. So the
  number of those that came near the peak stands beside each mean.
- The rank correlation of cost and delay is of differences to the mean of the pairs of the same domain: the tokens of a
  completion differ between domains, and so do the delays at which they can be tried.
- With one run, means over pairs have Student's t over pairs, and the rank correlation of cost and delay has Fisher's z
  over pairs. Both take the pairs as independent, although pairs of one run share stages. With several runs both are
  taken within each run, with Student's t over the runs.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdrl_jax.progress import printable
from mdrl_jax.report.tables import seeds
from mdrl_jax.report.tables.matrix import Matrix, trained_domain
from mdrl_jax.report.tables.methods import COSTS, RECOVERY, Run
from mdrl_jax.report.tables.recovered import Recovery, peak_row, recoveries
from mdrl_jax.report.tables.seeds import Line
from mdrl_jax.stage import names_on_the_way
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.estimate import Estimate
from mdrl_jax.stats.tests import rank_agreement

FIGURES = ("loss", "gain", "fraction", "collateral")
MEANS = ("fraction", "steps", "flops")
WIDEST = 400  # columns, more than any line has


@dataclasses.dataclass(frozen=True)
class Pair:
    """One domain won back after one later stage.

    Attributes:
      stage: name of the recovery.
      method: "refresh", "distill", "alternate" or "rollback".
      domain: the domain that is won back.
      way: what was trained until then, from θ_0 on, as names of domains; of a stage of several domains its own name.
      delay: number of stages between the domain's peak and the recovery, at least 1.
      cells: a figure for each of `FIGURES` (points; the fraction has no unit) and `methods.COSTS`.
      worst: the domain of the collateral in each run.
    """

    stage: str
    method: str
    domain: str
    way: tuple[str, ...]
    delay: int
    cells: Mapping[str, Line]
    worst: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Delay:
    """The pairs of one method and delay that had measurably lost something.

    Attributes:
      method, delay: as in `Pair`.
      pairs: number of these pairs in each run.
      reached: number of them whose recovery ended near the peak, in each run; a rollback does not say so.
      cells: over these pairs the fraction, summed gains over summed losses, and the mean of the other `MEANS`.
    """

    method: str
    delay: int
    pairs: tuple[int, ...]
    reached: tuple[int, ...]
    cells: Mapping[str, Line]


@dataclasses.dataclass(frozen=True)
class PairsTable:
    """All pairs of an experiment.

    Attributes:
      seeds: seed of each run.
      rows: the pairs, by way, domain and method.
      delays: means by method and delay.
      trends: by method, Spearman's correlation of FLOPs and delay within domains, over the pairs that had lost
        something; null: 0.
    """

    seeds: tuple[int | None, ...]
    rows: tuple[Pair, ...]
    delays: tuple[Delay, ...]
    trends: Mapping[str, Line]

    def text(self) -> str:
        """The pairs, the means by delay and the correlations as plain text; nothing is cut, so lines may be long."""
        shown = ", ".join("?" if s is None else str(s) for s in self.seeds)
        first = _table(
            f"pairs: each domain won back after each later stage; seeds {shown}, 95 %",
            ("trained", "won back", "delay", "by", "lost", "fraction", "collateral", "steps", "FLOPs"),
        )
        for r in self.rows:
            worst = f" {'/'.join(dict.fromkeys(r.worst))}" if r.worst else ""
            cells = [r.cells["loss"].shown(".1f"), r.cells["fraction"].shown(".2f")]
            cells += [r.cells["collateral"].shown(".1f") + worst]
            cells += [r.cells["steps"].around(".1f"), r.cells["flops"].around(".2g")]
            _add(first, (" → ".join(r.way), r.domain, str(r.delay), r.method, *cells))
        second = _table(
            "repair against delay: means over the pairs that had lost something",
            ("by", "delay", "pairs", "near the peak", "fraction", "steps", "FLOPs"),
        )
        for d in self.delays:
            counts, near = "/".join(map(str, d.pairs)), "–" if d.method == "rollback" else "/".join(map(str, d.reached))
            costs = (d.cells["steps"].around(".1f"), d.cells["flops"].around(".2g"))
            _add(second, (d.method, str(d.delay), counts, near, d.cells["fraction"].shown(".2f"), *costs))
        console = Console(file=io.StringIO(), width=WIDEST, color_system=None)
        console.print(first, second, highlight=False)
        lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
        lines += [
            f"Spearman's correlation of FLOPs and delay within domains, {method}: {line.shown('.2f')}{_why(line)}"
            for method, line in self.trends.items()
        ]
        return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"

    def record(self) -> dict[str, Any]:
        """The same as a JSON document.

        Returns:
          {"seeds", "pairs", "delays", "trends"}. A pair has the fields of `Pair`, a delay those of `Delay`, each with
          its cells as records by name. A trend is a record with the null 0, by method.
        """

        def flat(row: Pair | Delay) -> dict[str, Any]:
            fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "cells"}
            return fields | {name: line.record() for name, line in row.cells.items()}

        trends = {method: line.record() | {"null": 0.0} for method, line in self.trends.items()}
        rows = {"pairs": [flat(r) for r in self.rows], "delays": [flat(d) for d in self.delays]}
        return {"seeds": list(self.seeds), **rows, "trends": trends}


def compare(runs: Sequence[Run]) -> PairsTable | None:
    """The table (`summarise`); None without a run, or if the runs have fewer than two different pairs."""
    table = summarise(runs) if runs else None
    return table if table is not None and several(table) else None


def several(table: PairsTable) -> bool:
    """Whether a table has at least two pairs that differ in domain or way: methods on one pair are no comparison."""
    return len({(r.domain, r.way) for r in table.rows}) > 1


def summarise(runs: Sequence[Run]) -> PairsTable:
    """The table over runs of one experiment, one for each seed. A pair has a row if any of the runs has it.

    Args:
      runs: the runs, at least one. With one, figures of pairs have intervals over prompts, and costs have none.
    """
    found = [{r.stage: r for r in recoveries(run.matrix)} for run in runs]
    lines = {x.name: x for x in seeds.summarise([r.matrix for r in runs]).lines} if len(runs) > 1 else {}
    rows = []
    for stage in dict.fromkeys(stage for f in found for stage in f):
        matrix, domain = next((r.matrix, f[stage].domain) for r, f in zip(runs, found, strict=True) if stage in f)
        placed = _placed(matrix, stage, domain)
        if placed is None:
            continue
        each = [f.get(stage) for f in found]
        cells = {c: lines.get(f"{c} {stage}") or _of_one(each[0], c) for c in FIGURES}
        cells |= {c: _over([r.costs.get(stage, {}).get(c) for r in runs], c) for c in COSTS}
        worst = tuple(r.collateral.detail for r in each if r is not None and r.collateral.detail)
        rows.append(Pair(stage, stage.partition("-")[0], domain, *placed, cells, worst))
    rows = _grouped(rows)
    lost = [_lost(run, f, rows) for run, f in zip(runs, found, strict=True)]
    seed_of = tuple(r.matrix.seed for r in runs)
    return PairsTable(seed_of, tuple(rows), tuple(_delays(rows, lost)), _trends(rows, lost))


def _grouped(rows: Sequence[Pair]) -> list[Pair]:
    """Pairs of one way and domain together; ways, domains and methods in the order in which they first occur."""
    keys = list(dict.fromkeys((r.way, r.domain) for r in rows))
    return [r for key in keys for r in rows if (r.way, r.domain) == key]


def _placed(matrix: Matrix, stage: str, domain: str) -> tuple[tuple[str, ...], int] | None:
    """(way, delay) of a recovery; None if the domain has no peak on the way or nothing was trained since."""
    top, names = peak_row(matrix, domain, stage), names_on_the_way(matrix.starts[stage], matrix.starts)
    if top is None:
        return None
    delay = len(names) - 1 - names.index(matrix.stages[top])
    return (tuple(trained_domain(n, matrix.domains) or n for n in names), delay) if delay else None


def _of_one(found: Recovery | None, cell: str) -> Line:
    quantity = getattr(found, cell)
    value = None if quantity.estimate is None else quantity.estimate.value
    return Line(quantity.name, quantity.estimate, (value,), quantity.reason)


def _over(values: Sequence[float | None], name: str, pairs: Sequence[float] | None = None) -> Line:
    """A figure over runs by Student's t; of one run over `pairs`, or as it is if it is exact (`pairs` is None)."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return Line(name, None, tuple(values), "not on record")
    if len(values) > 1:
        return Line(name, statistics.over_seeds(known), tuple(values))
    if pairs is not None:
        return Line(name, statistics.clustered(pairs, "pair"), tuple(values))
    return Line(name, Estimate(known[0], -math.inf, math.inf, 1), tuple(values))


def _lost(run: Run, found: Mapping[str, Recovery], rows: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """By stage, figures of one run's pairs that had measurably lost something; what is not known is absent."""
    made = {}
    for row in rows:
        pair = found.get(row.stage)
        if pair is None or pair.loss.estimate is None or pair.loss.estimate.low <= 0:
            continue
        values = {c: run.costs.get(row.stage, {}).get(c) for c in ("steps", "flops")}
        values |= {q: e.value for q in ("loss", "gain") if (e := getattr(pair, q).estimate) is not None}
        end = run.ended.get(row.stage, "")
        values["reached"] = "of its peak" in end or "of their peaks" in end
        made[row.stage] = {c: float(v) for c, v in values.items() if v is not None}
    return made


def _delays(rows: Sequence[Pair], lost: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Delay]:
    made = []
    for method, delay in sorted({(r.method, r.delay) for r in rows}, key=lambda k: (RECOVERY.index(k[0]), k[1])):
        names = [r.stage for r in rows if (r.method, r.delay) == (method, delay)]
        own = [[f[n] for n in names if n in f] for f in lost]
        if any(own):
            cells = {"fraction": _fraction(own)}
            for c in ("steps", "flops"):
                each = [[x[c] for x in found if c in x] for found in own]
                cells[c] = _over([sum(v) / len(v) if v else None for v in each], c, each[0])
            reached = tuple(int(sum(x["reached"] for x in found)) for found in own)
            made.append(Delay(method, delay, tuple(map(len, own)), reached, cells))
    return made


def _fraction(own: Sequence[Sequence[Mapping[str, float]]]) -> Line:
    """Summed gains over summed losses of the pairs of each run; of one run with Fieller's interval over pairs."""
    gains, losses = ([[x[c] for x in found if "gain" in x] for found in own] for c in ("gain", "loss"))
    each = tuple(sum(g) / sum(x) if g else None for g, x in zip(gains, losses, strict=True))
    one = statistics.ratio_of_means(gains[0], losses[0]) if len(own) == 1 else None
    return Line("fraction", one, each) if one else _over(each, "fraction")


def _trends(rows: Sequence[Pair], lost: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Line]:
    made = {}
    for method in dict.fromkeys(r.method for r in rows):
        own = [r for r in rows if r.method == method]
        per_run = [rank_agreement(*_within(own, f)) for f in lost]
        values = tuple(r["estimate"] for r in per_run)
        known = [v for v in values if v is not None]
        name = f"Spearman {method}"
        if not known:
            made[method] = Line(name, None, values, per_run[0]["reason"])
        elif len(lost) > 1:
            made[method] = Line(name, statistics.over_seeds(known, "Spearman", (-1.0, 1.0)), values)
        else:
            low, high = per_run[0]["ci95"] or (-math.inf, math.inf)
            made[method] = Line(name, Estimate(known[0], low, high, per_run[0]["n"], "Spearman"), values)
    return made


def _within(rows: Sequence[Pair], lost: Mapping[str, Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Delay and FLOPs of each pair that had lost something, minus the means over the pairs of its domain."""
    known = [(r.domain, float(r.delay), lost[r.stage].get("flops", math.nan)) for r in rows if r.stage in lost]
    delays, flops = [], []
    for domain, delay, cost in known:
        same = [x for x in known if x[0] == domain]
        delays.append(delay - sum(x[1] for x in same) / len(same))
        flops.append(cost - sum(x[2] for x in same) / len(same))
    return delays, flops


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE, title_justify="left", title=title)
    for name in columns:
        left = name in ("trained", "won back", "by")
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=True)
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _why(line: Line) -> str:
    return f" ({line.reason})" if line.estimate is None and line.reason else ""
