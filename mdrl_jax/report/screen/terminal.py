"""The tables of a run on the screen and in `log.txt`. A score table of four domains fits into 60 columns."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mdrl_jax.report.screen.outputs import shown
from mdrl_jax.report.tables.answers import Change, headlines, passes
from mdrl_jax.report.tables.matrix import Matrix, Quantity, framed_cells, own_rows
from mdrl_jax.report.tables.recovered import recoveries
from mdrl_jax.report.tables.transfer import backward_transfer, forgetting, forward_transfer, mean_forgetting
from mdrl_jax.stats.estimate import figure_text, interval_text

NAME = 40  # columns of a stage's name; a longer one takes several lines


@dataclasses.dataclass(frozen=True)
class Fitting:
    """The first of several forms of a table that fits the console; the last one if none does."""

    forms: tuple[RenderableType, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield next((form for form in self.forms if _fits(form, console, options)), self.forms[-1])


@dataclasses.dataclass(frozen=True)
class _Figures:
    """A table of figures with their intervals and notes.

    Where it is too wide for the terminal, names are short and there is no column of notes; the reason why a figure has
    no estimate then stands in place of its interval.

    Attributes:
      title: the title of the table.
      rows: (name, short name, figure, digits) of each line.
    """

    title: str
    rows: Sequence[tuple[str, str, Quantity, int]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A reason may be long, so it is folded, and does not decide which form fits.
        fits = (notes for notes in (True, False) if _fits(self._table(notes, False, True), console, options))
        notes = next(fits, None)
        yield self._table(notes is True, True, notes is not None)

    def _table(self, notes: bool, reasons: bool, whole_names: bool) -> Table:
        table = Table(box=box.SIMPLE, title_justify="left", title=self.title, padding=(0, int(notes)))
        table.add_column("", no_wrap=whole_names, overflow="fold")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("95 % interval", no_wrap=notes, overflow="fold")
        if notes:
            table.add_column("note", overflow="fold")
        for name, short, quantity, digits in self.rows:
            value, interval, note = "–", "", quantity.reason if reasons else ""
            if (estimate := quantity.estimate) is not None:
                form = f".{digits}f"
                value, interval = f"{estimate.value:{form}}", interval_text(estimate.record()["ci95"], form)
                note = quantity.detail
            cells = (name, value, interval, note) if notes else (short, value, interval or note)
            table.add_row(*map(shown, cells))
        return table


def _fits(form: RenderableType, console: Console, options: ConsoleOptions) -> bool:
    return Measurement.get(console, options.update(max_width=10_000), form).maximum <= options.max_width


def score_table(
    matrix: Matrix, beside: Sequence[Mapping[str, Any]] = (), accuracy: bool = True, trained: bool = True
) -> RenderableType:
    """Stages by domains: score ± standard error in points with one decimal, and the plain mean over domains.

    Where it is too wide for the terminal, the errors are left out, and then the mean. An asterisk marks the domain that
    a stage trained. The accuracy judges the same replies regardless of style. If it differs from the score, a second
    block shows it, dim and in the same form. A score that is not known is "–"; so is the mean of a stage that lacks
    one.

    Args:
      matrix: the scores.
      beside: scores of other tasks of the only stage, as of `tables.harness.read`, in columns after the mean.
      accuracy: whether the second block is shown.
      trained: whether rows are stages that trained; False for a model whose folder may have the name of one.
    """
    scores = _block("score, points", matrix, matrix.score_SD, matrix.stderr_SD, "", beside, trained)
    same = np.allclose(matrix.accuracy_SD, matrix.score_SD, equal_nan=True)
    if not accuracy or same or not np.isfinite(matrix.accuracy_SD).any():
        return scores
    title = "accuracy regardless of style, points"
    return Group(scores, _block(title, matrix, matrix.accuracy_SD, matrix.accuracy_stderr_SD, "dim", (), trained))


def pass_table(matrix: Matrix, trained: bool = True) -> RenderableType | None:
    """Stages by domains: pass@k for k = the number of samples, ± standard error, in points; None if that is 1.

    The title says from which reward an answer is right where that is not 1. A value that is not known is "–".

    Args:
      matrix: the scores.
      trained: as in `score_table`.
    """
    k = max((rewards_PG.shape[1] for row in matrix.rewards for rewards_PG in row.values()), default=1)
    if k == 1:
        return None
    found = [[passes(matrix, s, d).get(k) for d in matrix.domains] for s in range(len(matrix.stages))]
    value_SD, stderr_SD = (
        np.array([[np.nan if e is None else getattr(e, field) for e in row] for row in found], float)
        for field in ("value", "stderr")
    )
    graded = ", ".join(f"{x:g} in {d}" for d, x in matrix.right.items() if x != 1)
    title = f"pass@{k}, points" + (f"; right from {graded}" if graded else "")
    return _block(title, matrix, value_SD, stderr_SD, "", (), trained)


def answer_table(changes: Sequence[Change]) -> RenderableType | None:
    """Answers that were lost and gained between pairs of stages; None if there is no pair.

    In points of all answers, with 95 % intervals over prompts where the terminal is wide enough. The last column is
    what other sampling keys change.
    """
    return Fitting(tuple(_answers(changes, intervals) for intervals in (True, False))) if changes else None


def _answers(changes: Sequence[Change], intervals: bool) -> Table:
    kinds = ("right → wrong", "wrong → right", "other keys") if intervals else ("lost", "gained", "keys")
    what = "single answers, points of all answers" if intervals else "answers lost (right → wrong) and gained, points"
    table = Table(box=box.SIMPLE, title_justify="left", title=what)
    table.add_column("", no_wrap=True)
    for heading in kinds:
        table.add_column(heading, justify="right", no_wrap=True)
    for c in changes:
        figures = (c.found.lost, c.found.gained)
        cells = [figure_text(e.value, e.record()["ci95"] if intervals else None, ".1f") for e in figures]
        chance = "–" if c.found.resampled is None else f"{c.found.resampled.value:.1f}"
        table.add_row(shown(f"{c.domain}: {c.before} to {c.after}"), *map(shown, (*cells, chance)))
    return table


def summary(matrix: Matrix) -> RenderableType:
    """The final screen: scores, pass@k, transfer, forgetting, lost answers, gain and cost of each recovery stage.

    Figures are those of `tables.transfer` and `tables.recovered`, with 95 % intervals: in points with two decimals, the
    recovery fraction without a unit and with three. A figure without an estimate is "–", with the reason as its note.
    """
    rows = [
        ("BWT, backward transfer", "BWT", backward_transfer(matrix), 2),
        ("FWT, forward transfer", "FWT", forward_transfer(matrix), 2),
        ("forgetting, mean", "forgetting, mean", mean_forgetting(matrix), 2),
    ]
    for domain in list(own_rows(matrix))[:-1]:
        rows.append((f"forgetting of {domain}", f"forgetting of {domain}", forgetting(matrix, domain), 2))
    transfer = _Figures("transfer, points", rows)
    tables = (score_table(matrix), pass_table(matrix), transfer, answer_table(headlines(matrix)))
    parts = [table for table in tables if table is not None]
    recovered = [
        (f"{r.stage}: {name}", f"{r.stage}: {short}", figure, digits)
        for r in recoveries(matrix)
        for name, short, figure, digits in (
            ("gain, points", "gain", r.gain, 2),
            ("fraction recovered", "fraction", r.fraction, 3),
            ("collateral, points", "collateral", r.collateral, 2),
        )
    ]
    return Group(*parts, *([_Figures("recovery, gain and collateral in points", recovered)] if recovered else []))


def places(root: Path, seconds: float) -> RenderableType:
    """The last lines of a command: its time, and the places of the page, the work folder and TensorBoard.

    Args:
      root: the work folder, which is always named. The page, and the command that shows the TensorBoard folder, are
        named only if they exist. A long line is not wrapped.
      seconds: how long the command took; shown in whole seconds.
    """
    page, board = root / "report" / "index.html", root / "tensorboard"
    where: dict[str, object] = {"page": page} if page.exists() else {}
    where["work folder"] = root
    if board.exists():
        where["TensorBoard"] = f"tensorboard --logdir {shlex.quote(str(board))}"
    lines = [shown(f"done in {seconds:.0f} s"), *(shown(f"  {name:13}{place}") for name, place in where.items())]
    for line in lines:
        line.no_wrap, line.overflow = True, "ignore"
    return Group(*lines)


def _block(
    title: str,
    matrix: Matrix,
    mean_SD: NDArray[np.float64],
    stderr_SD: NDArray[np.float64],
    style: str,
    beside: Sequence[Mapping[str, Any]],
    trained: bool,
) -> RenderableType:
    framed = framed_cells(matrix) if trained else []
    no_error = np.full_like(stderr_SD, np.nan)
    forms = ((stderr_SD, True), (no_error, True), (no_error, False))
    return Fitting(tuple(_form(title, matrix, mean_SD, errors, style, beside, mean, framed) for errors, mean in forms))


def _form(
    title: str,
    matrix: Matrix,
    mean_SD: NDArray[np.float64],
    stderr_SD: NDArray[np.float64],
    style: str,
    beside: Sequence[Mapping[str, Any]],
    with_mean: bool,
    framed: Sequence[tuple[int, int]],
) -> Table:
    caption = "* trained in that stage" if framed else None
    table = Table(box=box.SIMPLE, title_justify="left", title=title, style=style, caption=caption)
    table.caption_justify = "left"
    if not with_mean:
        table.padding = (0, 0)
    table.add_column("after stage", overflow="fold", max_width=NAME)  # a stage may be the path of a folder
    for domain in (*matrix.domains, *(["mean"] if with_mean else []), *(task["domain"] for task in beside)):
        table.add_column(shown(domain), justify="right", no_wrap=True)
    for s, stage in enumerate(matrix.stages):
        cells = [_cell(mean_SD[s, d], stderr_SD[s, d], (s, d) in framed) for d in range(len(matrix.domains))]
        finite = np.isfinite(mean_SD[s]).all() and mean_SD.shape[1] > 0
        mean = Text(f"{mean_SD[s].mean():.1f}" if finite else "–")
        others = [_cell(task["score"], task["stderr"], False) for task in beside]
        table.add_row(shown(stage), *cells, *([mean] if with_mean else []), *others, style=style)
    return table


def _cell(mean: float, stderr: float, framed: bool) -> Text:
    if not np.isfinite(mean):
        return Text("– ")
    error = f" ±{stderr:.1f}" if np.isfinite(stderr) else ""
    return Text(f"{mean:.1f}{error}{'*' if framed else ' '}", style="bold" if framed else "")
