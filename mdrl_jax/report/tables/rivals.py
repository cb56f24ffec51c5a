"""The mean score over domains after a refresh against that of every other method of the run (definitions §13, C6).

Two methods have an equal budget if their optimizer steps beyond the plain sequence differ by at most `TOLERANCE` of the
GRPO steps of that sequence [chosen]. A method of another budget is listed without a difference. Steps of one method may
cost more than those of another: `BestAverage.flops` has the difference of all FLOPs.

`rivals` has the figures of claim C6 on one run. `best_average` compares the refresh with every method, over one run or
several, and says the result in words.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mdrl_jax.config import METHODS
from mdrl_jax.recovery.refresh.tracker import variant
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import Quantity
from mdrl_jax.report.tables.methods import (
    PLAIN,
    RECOVERY,
    WHOLE,
    Key,
    Run,
    exact,
    in_order,
    most_lost,
    over_runs,
    replicated,
    rows_of,
    spent,
)
from mdrl_jax.report.tables.seeds import Line
from mdrl_jax.stage import labelled, peak, unlabelled, way
from mdrl_jax.stats.estimate import Record, missing

TOLERANCE = 0.1
BETTER, WORSE, UNDECIDED, UNEQUAL = "refresh better", "refresh worse", "undecided", "not compared"


def rivals(run: Run, stage: str) -> dict[str, Record]:
    """The mean score over domains after a refresh minus that of each other method, in points; positive: refresh better.

    Args:
      run: the work folder.
      stage: the refresh, a row of its scores.

    Returns:
      A record for the plain sequence (key `methods.PLAIN`) and for each method of `methods.rows_of` that is no refresh,
      no rollback, no reversed order and no recovery with a label, which is a variant or a control. The key of a
      prevention is its prefix, of another method its name. The record is the mean over domains of the differences,
      which are paired over prompts, with "steps", the steps of the method minus those of the refresh. A method of
      another budget, or without steps on record, has no estimate but a reason. So have the plain sequence and each
      method of `methods.WHOLE` if the run has no training stage (`matrix.training_rows`); other methods then have no
      record.

    Raises:
      ValueError: if the scores have no such row.
    """
    found: dict[str, Record] = {}
    if not rows_of(run.matrix):
        names = (PLAIN, *(name for name in run.matrix.stages if name in WHOLE))
        return {name: missing("no plain stage was trained before a refresh", "points") for name in names}
    for name, apart, steps, _ in _against(run, stage):
        prefix = name.partition("-")[0]
        if prefix in ("refresh", "rollback", "reversed"):
            continue
        record = missing(apart.reason, "points") if apart.estimate is None else apart.record() | {"steps": steps}
        found[prefix if prefix in METHODS else name] = record
    return found


def _against(run: Run, stage: str) -> Iterator[tuple[str, Quantity, float | None, float | None]]:
    """(row, difference of the averages in points, of the steps, of the FLOPs) of each other row without a label."""
    m, rows = run.matrix, rows_of(run.matrix)
    after = m.stages.index(stage)
    trained = [s for s in way(m.stages[rows[PLAIN]], run.stages) if s.kind == "grpo"]
    length = sum(run.costs.get(s.name, {}).get("steps", 0) for s in trained)

    def more(name: str, what: str) -> float | None:
        ours, theirs = spent(run, stage, what), 0.0 if name == PLAIN else spent(run, name, what)
        return None if ours is None or theirs is None else theirs - ours

    for name, row in rows.items():
        if name == stage or (name.partition("-")[0] in RECOVERY and labelled(name)):
            continue
        steps = more(name, "steps")
        if steps is None:
            apart = Quantity(name, None, "its steps are not on record")
        elif abs(steps) > TOLERANCE * length:
            apart = Quantity(name, None, f"no equal number of steps: {steps:+g} against a sequence of {length:g}")
        else:
            apart = matrices.average(name, [matrices.difference(m, "", d, after, row) for d in m.domains])
        yield name, apart, steps, more(name, "flops")


@dataclasses.dataclass(frozen=True)
class BestAverage:
    """The average after a refresh against that of every other method.

    Attributes:
      stage: the refresh.
      variant: how it differs from a plain one, in words (`refresh.tracker.variant`); "" for a plain one.
      average: its mean score over domains, in points.
      rows: for each other method, in the order of `methods`, the average after the refresh minus that of the method.
      flops: for each of these methods, the FLOPs that led to it minus those that led to the refresh.
      over: what the intervals are over, "prompts", "seeds" or "seeds and prompts".
    """

    stage: str
    variant: str
    average: Line
    rows: tuple[Line, ...]
    flops: tuple[Line, ...]
    over: str

    def methods(self, verdict: str) -> list[str]:
        """The methods with one of the verdicts `BETTER`, `WORSE`, `UNDECIDED` and `UNEQUAL`."""
        return [row.name for row in self.rows if verdict_of(row) == verdict]

    @property
    def verdict(self) -> str:
        """Whether the refreshed sequence gives the best average, in one sentence."""
        worse, open_ = self.methods(WORSE), self.methods(UNDECIDED)
        if worse:
            above = "one method ends" if len(worse) == 1 else f"{len(worse)} methods end"
            return f"The refreshed sequence does not give the best average: {above} above it"
        if open_:
            near = "one method is" if len(open_) == 1 else f"{len(open_)} methods are"
            return f"Whether the refreshed sequence gives the best average is undecided: {near} not told apart from it"
        if self.methods(BETTER):
            return (
                f"The refreshed sequence gives the best average of the {len(self.methods(BETTER)) + 1} methods compared"
            )
        return "No other method could be compared with the refreshed sequence"

    @property
    def words(self) -> str:
        """Sentences that say how the refresh differs from a plain one, and which methods end above and below it."""
        found = [f"{self.stage} is no plain refresh: {self.variant}."] if self.variant else []
        found += [
            f"{text}: {', '.join(names)}."
            for verdict, text in (
                (WORSE, "Above the refresh"),
                (UNDECIDED, "Not told apart from it"),
                (BETTER, "Below it"),
                (UNEQUAL, "Not compared, for another number of steps or a missing record"),
            )
            if (names := self.methods(verdict))
        ]
        return " ".join(found)

    def text(self) -> str:
        """The verdict and all differences as plain text."""
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"best average: {self.verdict}.", self.words]
        lines += [f"{self.stage} minus other methods, average in points, 95 % over {self.over}; extra FLOPs of each:"]
        for row, flops in zip(self.rows, self.flops, strict=True):
            shown = row.shown("+.1f") if row.estimate is not None else f"– ({row.reason})"
            cost = "" if flops.estimate is None else f"FLOPs {flops.around('+.2g')}"
            said = verdict_of(row) if row.estimate else ""
            lines.append("  ".join(x for x in (f"  {row.name:<{width}}", shown, said, cost) if x))
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, Any]:
        """{"stage", "variant", "verdict", "average", "methods"}.

        For each method {"method", "verdict", "flops"} and the fields of `Line.record`, null: 0.
        """
        rows = [
            {"method": x.name, "verdict": verdict_of(x), **x.record(), "null": 0.0, "flops": flops.record()}
            for x, flops in zip(self.rows, self.flops, strict=True)
        ]
        head = {"stage": self.stage, "variant": self.variant, "verdict": self.verdict}
        return head | {"average": self.average.record(), "methods": rows}


def best_average(runs: Sequence[Run]) -> BestAverage | None:
    """Compares the refreshed sequence with every method of `methods.rows_of` but recoveries with a label.

    The refresh is of the domain that lost most, if there is one: a plain one (definitions §8), as claim C6 judges, or
    else the one without a label. Differences are paired over prompts. With one run the intervals are over prompts, with
    several over the runs, and from eight runs on (`methods.over_runs`) over both, by a bootstrap with a fixed seed.
    Each interval is by itself: they are not widened for the number of methods.

    Args:
      runs: the runs of one experiment, one for each seed.

    Returns:
      The comparison; None if no run has a refresh that is a row.
    """
    stage, differs = _refresh(runs)
    if not stage:
        return None
    having = [r for r in runs if stage in r.matrix.stages]
    each = [_figures(r, stage) for r in having]
    drawn = replicated(having, lambda run: _figures(run, stage))
    names = in_order({name for f in each for name, _ in f if name != stage})

    def line(name: str, what: str) -> Line:
        return over_runs(name, (name, what), each, drawn)

    over = "prompts" if len(having) == 1 else "seeds and prompts" if drawn else "seeds"
    rows, flops = (tuple(line(name, what) for name in names) for what in ("average", "flops"))
    return BestAverage(stage, differs, line(stage, "average"), rows, flops, over)


def _refresh(runs: Sequence[Run]) -> tuple[str, str]:
    """The refresh whose average is compared, and how it differs from a plain one; ("", "") if no run has one."""
    names = dict.fromkeys(name for r in runs for name in rows_of(r.matrix) if name.startswith("refresh-"))
    lost = f"refresh-{most_lost([r.matrix for r in runs])}"
    unmarked = [name for name in names if not labelled(name)]
    candidates = [name for name in names if unlabelled(name) == lost] or unmarked
    differs = {name: _variant(runs, name) for name in candidates}
    plain = sorted((name for name in candidates if not differs[name]), key=labelled)
    found = next(iter(plain or [name for name in candidates if name in unmarked]), "")
    return found, differs.get(found, "")


def _variant(runs: Sequence[Run], name: str) -> str:
    """How a refresh differs from a plain one; "" also if no run has a config."""
    stages = next((r.stages for r in runs if r.stages and name in r.matrix.stages), ())
    stage = next((s for s in stages if s.name == name), None)
    return "" if stage is None else variant(stage, peak(stage.domains[0], stage.start, stages))


def _figures(run: Run, stage: str) -> dict[Key, Quantity]:
    """The average after the refresh; and of each other method the difference to it, and its FLOPs beyond it."""
    m, after = run.matrix, run.matrix.stages.index(stage)
    found = {(stage, "average"): matrices.average(stage, [matrices.score_at(m, "", after, d) for d in m.domains])}
    for name, apart, _, flops in _against(run, stage):
        found |= {(name, "average"): apart, (name, "flops"): exact("flops", flops)}
    return found


def verdict_of(row: Line) -> str:
    """The verdict on a difference: `BETTER` if its interval lies above 0, `WORSE` if below, or else `UNDECIDED`.

    An interval without any width is of figures that are equal by chance, or of a single one, and decides nothing.
    """
    if row.estimate is None:
        return UNEQUAL
    if row.estimate.low == row.estimate.high:
        return UNDECIDED
    return BETTER if row.estimate.low > 0 else WORSE if row.estimate.high < 0 else UNDECIDED
