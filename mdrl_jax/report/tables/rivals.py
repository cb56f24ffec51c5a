"""The mean score over domains after a refresh against that of every other method of the run (definitions §13, C6).

Two methods have an equal budget if their optimizer steps beyond the plain sequence differ by at most `TOLERANCE` of the
steps of that sequence [chosen]. A method of another budget is listed without a difference.

`rivals` has the figures of claim C6 on one run. `best_average` compares the refresh with every method, over one run or
several, and says the result in words.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mdrl_jax.config import METHODS
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import Quantity
from mdrl_jax.report.tables.methods import PLAIN, RECOVERY, WHOLE, Run, in_order, most_lost, rows_of, spent
from mdrl_jax.report.tables.seeds import Line
from mdrl_jax.stage import labelled, way
from mdrl_jax.stats import estimate as statistics
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
    for name, apart, steps in _against(run, stage):
        prefix = name.partition("-")[0]
        if prefix in ("refresh", "rollback", "reversed"):
            continue
        record = missing(apart.reason, "points") if apart.estimate is None else apart.record() | {"steps": steps}
        found[prefix if prefix in METHODS else name] = record
    return found


def _against(run: Run, stage: str) -> Iterator[tuple[str, Quantity, float | None]]:
    """(row, difference of the averages in points, difference of the steps) of each other row without a label."""
    m, rows = run.matrix, rows_of(run.matrix)
    after, ours = m.stages.index(stage), spent(run, stage, "steps")
    length = sum(run.costs.get(s.name, {}).get("steps", 0) for s in way(m.stages[rows[PLAIN]], run.stages))
    for name, row in rows.items():
        if name == stage or (name.partition("-")[0] in RECOVERY and labelled(name)):
            continue
        theirs = 0.0 if name == PLAIN else spent(run, name, "steps")
        steps = None if ours is None or theirs is None else theirs - ours
        if steps is None:
            apart = Quantity(name, None, "its steps are not on record")
        elif abs(steps) > TOLERANCE * length:
            apart = Quantity(name, None, f"no equal budget: {steps:+g} steps against a sequence of {length:g}")
        else:
            apart = matrices.average(name, [matrices.difference(m, "", d, after, row) for d in m.domains])
        yield name, apart, steps


@dataclasses.dataclass(frozen=True)
class BestAverage:
    """The average after a refresh against that of every other method.

    Attributes:
      stage: the refresh.
      average: its mean score over domains, in points.
      rows: for each other method, in the order of `methods`, the average after the refresh minus that of the method.
      over: what the intervals are over, "prompts" or "seeds".
    """

    stage: str
    average: Line
    rows: tuple[Line, ...]
    over: str

    def methods(self, verdict: str) -> list[str]:
        """The methods with one of the verdicts `BETTER`, `WORSE`, `UNDECIDED` and `UNEQUAL`."""
        return [row.name for row in self.rows if verdict_of(row) == verdict]

    @property
    def verdict(self) -> str:
        """Whether the refreshed sequence gives the best average, in one sentence."""
        worse, open_ = self.methods(WORSE), self.methods(UNDECIDED)
        if worse:
            return f"The refreshed sequence does not give the best average: {_count(worse)} above it"
        if open_:
            return f"Whether the refreshed sequence gives the best average is undecided: {_count(open_)} about as high"
        if self.methods(BETTER):
            return (
                f"The refreshed sequence gives the best average of the {len(self.methods(BETTER)) + 1} methods compared"
            )
        return "No other method could be compared with the refreshed sequence"

    @property
    def words(self) -> str:
        """The methods by verdict, in sentences."""
        found = [
            f"{text}: {', '.join(names)}."
            for verdict, text in (
                (WORSE, "Above the refresh"),
                (UNDECIDED, "Not told apart from it"),
                (BETTER, "Below it"),
                (UNEQUAL, "Not compared, for another budget or a missing record"),
            )
            if (names := self.methods(verdict))
        ]
        return " ".join(found)

    def text(self) -> str:
        """The verdict and all differences as plain text."""
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"best average: {self.verdict}.", self.words]
        lines += [f"{self.stage} minus other methods, average in points, 95 % over {self.over}:"]
        for row in self.rows:
            shown = row.shown("+.1f") if row.estimate is not None else f"– ({row.reason})"
            lines.append(f"  {row.name:<{width}}  {shown}  {verdict_of(row) if row.estimate else ''}".rstrip())
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, Any]:
        """{"stage", "verdict", "average", "methods"}: for each {"method", "verdict"} and `Line.record`; null: 0."""
        rows = [{"method": x.name, "verdict": verdict_of(x), **x.record(), "null": 0.0} for x in self.rows]
        return {"stage": self.stage, "verdict": self.verdict, "average": self.average.record(), "methods": rows}


def best_average(runs: Sequence[Run]) -> BestAverage | None:
    """Compares the refreshed sequence with every method of `methods.rows_of` but recoveries with a label.

    The refresh is the one without a label of the domain that lost most, or else the first one. Differences are paired
    over prompts. With one run the intervals are over prompts, with several over the runs. Each interval is by itself:
    they are not widened for the number of methods.

    Args:
      runs: the runs of one experiment, one for each seed.

    Returns:
      The comparison; None if no run has a refresh that is a row.
    """
    named = [name for r in runs for name in rows_of(r.matrix) if name.startswith("refresh-") and not labelled(name)]
    if not named:
        return None
    wanted = f"refresh-{most_lost([r.matrix for r in runs])}"
    stage = wanted if wanted in named else named[0]
    having = [r for r in runs if stage in r.matrix.stages]
    each = [{name: apart for name, apart, _ in _against(r, stage)} for r in having]
    after = [r.matrix.stages.index(stage) for r in having]
    scores = [
        matrices.average(stage, [matrices.score_at(r.matrix, "", s, d) for d in r.matrix.domains])
        for r, s in zip(having, after, strict=True)
    ]
    rows = [_line(name, [f.get(name) for f in each]) for name in in_order({n for f in each for n in f})]
    return BestAverage(stage, _line(stage, scores), tuple(rows), "prompts" if len(having) == 1 else "seeds")


def verdict_of(row: Line) -> str:
    """The verdict on a difference: `BETTER` if its interval lies above 0, `WORSE` if below, or else `UNDECIDED`."""
    if row.estimate is None:
        return UNEQUAL
    return BETTER if row.estimate.low > 0 else WORSE if row.estimate.high < 0 else UNDECIDED


def _line(name: str, each: Sequence[Quantity | None]) -> Line:
    known = [q.estimate for q in each if q is not None and q.estimate is not None]
    per_seed = tuple(None if q is None or q.estimate is None else q.estimate.value for q in each)
    if not known:
        return Line(name, None, per_seed, next((q.reason for q in each if q is not None), "no run has it"))
    one = len(each) == 1
    return Line(name, known[0] if one else statistics.over_seeds([e.value for e in known], "points"), per_seed)


def _count(names: Sequence[str]) -> str:
    return "one method ends" if len(names) == 1 else f"{len(names)} methods end"
