"""Each domain won back after each later stage, and what the repair costs against its delay (definitions §10)."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import Figure, Row, Table, by_category, data
from mdrl_jax.report.figures.layout import LEGEND, distinct
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import columns, tips, words
from mdrl_jax.report.tables.methods import RECOVERY, load
from mdrl_jax.report.tables.pairs import Delay, Pair, PairsTable, several, summarise
from mdrl_jax.report.tables.seeds import Line

WIDTH, HEIGHT = 330, 300
APART = 0.09  # between the points of two methods, in stages of delay


def against_delay(records: Records) -> Figure:
    """The recovery fraction and the FLOPs of each recovery against its delay.

    Returns:
      The figure `repair-delay`: a point for each recovery of a domain that had measurably lost something. The number
      of stages between the domain's peak and the recovery is horizontal. Vertical is, on the left, the recovery
      fraction with its 95 % interval over test prompts and, on the right, the FLOPs of the recovery alone on a log
      scale, which is left out if none is on record. Lines join the means over pairs. Colours are methods.

    Raises:
      Absent: if there are no evaluations, if fewer than two pairs were tried, or if none of them had lost anything.
      UserError: as in `tables.methods.load`.
      KeyError, ValueError: if a record lacks a field or an evaluation has no prompts.
    """
    table = _table(records)
    rows = [_row(r) for r in table.rows if (e := r.cells["loss"].estimate) is not None and e.low > 0]
    rows = [r for r in rows if r["fraction"] is not None]
    if not rows:
        raise Absent("no domain had measurably lost anything where it was won back, so there is no cost of a repair")
    methods = [m for m in RECOVERY if m in {r["method"] for r in rows}]
    for row in rows:
        row["at"] = row["delay"] + APART * (methods.index(row["method"]) - (len(methods) - 1) / 2)
    costs = [r for r in rows if r["flops"]]
    panels = [_panel(rows, table.delays, methods, "fraction", "recovery fraction")]
    if costs:
        panels.append(_panel(costs, table.delays, methods, "flops", "FLOPs of the recovery, log scale"))
    chart = alt.hconcat(*panels, spacing=30)
    trends = "; ".join(f"{m} {_words(table.trends[m])}" for m in methods)
    caption = (
        "Each point is one domain that had measurably lost something, won back after one later stage. Horizontal: how "
        "many stages lie between its peak and the recovery, that last one included. Bars: 95 % intervals over test "
        "prompts. Lines: over all points of a delay, the summed gains over the summed losses, and the mean FLOPs. "
        "Spearman's correlation of FLOPs and delay within domains, with 95 % intervals that take the points as "
        f"independent (by chance 0): {trends}."
    )
    return Figure("repair-delay", "Repair against the number of stages since the peak", chart, rows, caption)


def table(records: Records) -> Table:
    """Every pair: what was trained, what was won back and by which method, at which cost.

    Returns:
      The table `pairs`, a row for each recovery. Loss and collateral are in points, with 95 % intervals over test
      prompts; steps and FLOPs are those of the recovery alone. A figure that is not known is "–".

    Raises:
      Absent: if there are no evaluations, or if fewer than two pairs were tried.
      UserError: as in `tables.methods.load`.
      KeyError, ValueError: if a record lacks a field or an evaluation has no prompts.
    """
    found = _table(records)
    rows = []
    for r in found.rows:
        paid = _cell(r.cells["collateral"], ".1f") + (f" {'/'.join(dict.fromkeys(r.worst))}" if r.worst else "")
        figures = (_cell(r.cells["loss"], ".1f"), _cell(r.cells["fraction"], ".2f"), paid)
        costs = (_cell(r.cells["steps"], ".0f"), _cell(r.cells["flops"], ".2g"))
        rows.append((" → ".join(r.way), r.domain, str(r.delay), r.method, *figures, *costs))
    caption = (
        "Delay: stages between the peak and the recovery. Lost: the score at the peak minus that where the recovery "
        "started, in points. The fraction of it that was won back is undefined, –, unless the interval of the loss "
        "lies above 0. Collateral: the largest drop of any other domain. A rollback takes back a part of the edit of "
        "the stage that its name gives. 95 % intervals over test prompts."
    )
    head = ("trained", "won back", "delay", "by", "lost", "fraction", "collateral", "steps", "FLOPs")
    title = "Each domain won back after each later stage"
    return Table("pairs", title, head, rows, caption, ("delay", *head[4:]), folded=len(rows) > 12)


def _table(records: Records) -> PairsTable:
    records.files("evaluations/*.json")
    found = summarise([load(records.root)])
    if not several(found):
        raise Absent("fewer than two pairs of a lost domain and a later stage were tried; configs/pairs.py tries all")
    return found


def _row(pair: Pair) -> Row:
    head = {"stage": pair.stage, "method": pair.method, "domain": pair.domain, "trained": " → ".join(pair.way)}
    head |= {"delay": pair.delay, "worst": "/".join(dict.fromkeys(pair.worst))}
    for cell in ("loss", "fraction", "collateral"):
        head |= columns(cell, pair.cells[cell].record())
    return head | {c: pair.cells[c].record()["estimate"] for c in ("steps", "flops")}


def _panel(rows: Sequence[Row], delays: Sequence[Delay], methods: Sequence[str], what: str, title: str) -> Any:
    ticks = sorted(distinct(rows, "delay"))
    x = alt.X(
        "at:Q", title="stages between the peak and the recovery", axis=alt.Axis(values=ticks, format="d"),
        scale=alt.Scale(domain=[min(ticks) - 0.5, max(ticks) + 0.5], nice=False),
    )  # fmt: skip
    scale = alt.Scale(type="log") if what == "flops" else alt.Scale(zero=True)
    axis = alt.Axis(format="~s") if what == "flops" else alt.Axis()

    def up(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)

    colour = alt.Color("method:N", title=None, scale=by_category(methods), legend=LEGEND)
    tip = [
        alt.Tooltip("stage:N"), alt.Tooltip("trained:N"), alt.Tooltip("domain:N", title="won back"),
        *tips("loss", "lost, points"), *tips("fraction", "recovery fraction"),
        *tips("collateral", "collateral, points"), alt.Tooltip("worst:N", title="of"),
        alt.Tooltip("steps:Q"), alt.Tooltip("flops:Q", format=".3~s", title="FLOPs"),
    ]  # fmt: skip
    base = alt.Chart(data(rows)).encode(x=x, color=colour, tooltip=tip)
    shift = {m: APART * (i - (len(methods) - 1) / 2) for i, m in enumerate(methods)}
    means = [
        {"method": d.method, "at": d.delay + shift[d.method], what: value}
        for d in delays
        if d.method in shift and (value := d.cells[what].record()["estimate"]) is not None
    ]
    layers = [
        alt.Chart(data(means)).mark_line(opacity=0.6).encode(x=x, y=up(what), color=colour),
        base.mark_point(filled=True, size=60, opacity=1).encode(y=up(what)),
    ]
    if what == "fraction":
        layers.insert(1, base.mark_rule(strokeWidth=1).encode(y=up("fraction_low"), y2="fraction_high:Q"))
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)


def _cell(line: Line, form: str) -> str:
    return "–" if line.estimate is None else words(line.record(), form)


def _words(line: Line) -> str:
    return f"not known ({line.reason})" if line.estimate is None else words(line.record())
