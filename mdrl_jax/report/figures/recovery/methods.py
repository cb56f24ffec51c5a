"""Compares all methods to recover or prevent forgetting that a run tried (definitions §2, §8 to §10)."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from mdrl_jax.config import METHODS
from mdrl_jax.report.figure import CATEGORIES, INK, QUIET, Figure, Row, Table, data
from mdrl_jax.report.figures.layout import FIXED, LEGEND
from mdrl_jax.report.figures.placement import between, place
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import columns, number, span, tips, words
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables import rivals
from mdrl_jax.report.tables.methods import (
    COSTS,
    PLAIN,
    RECOVERY,
    Method,
    MethodsTable,
    Run,
    load,
    rows_of,
    summarise,
    total,
)
from mdrl_jax.report.tables.recovered import collateral
from mdrl_jax.report.tables.transfer import fall
from mdrl_jax.stats.estimate import Record

WIDTH, HEIGHT = 780, 460
LARGEST = 260  # px² of the largest point
# Points of collateral up to which the axis is linear. It is logarithmic beyond, because single methods lie far off.
SYMLOG = 1.0
GROUPS = {
    "recovery": CATEGORIES[0],
    "prevention": CATEGORIES[1],
    "other training": CATEGORIES[2],
    "merge": CATEGORIES[3],
    PLAIN: CATEGORIES[6],
}
AREA = " Area of a point: FLOPs of all stages that led there."
UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def best_average(records: Records) -> Table:
    """Whether the refreshed sequence gives the best average over domains, in words, and against each other method.

    Returns:
      The table `best-average`. Its title is the verdict. Rows are the other methods: the average after the refresh
      minus that of the method, in points, paired over test prompts, with its 95 % interval; and what follows from it.

    Raises:
      Absent: if there are no evaluations, or no refresh from the end of the sequence.
      UserError: as in `tables.methods.load`.
      KeyError, ValueError: if a record lacks a field or an evaluation has no prompts.
    """
    records.files("evaluations/*.json")
    found = rivals.best_average([load(records.root)])
    if found is None:
        raise Absent("no refresh was trained from the end of the sequence, so no average is compared with its average")
    rows = [
        (row.name, words(row.record(), "+.1f") if row.estimate else row.reason, rivals.verdict_of(row))
        for row in found.rows
    ]
    caption = (
        f"{found.stage} ends at an average of {words(found.average.record(), '.1f')} points. {found.words} Differences "
        "are paired over test prompts, with 95 % intervals over prompts of this one run, not over seeds; each interval "
        "is by itself. Methods whose steps differ by more than a tenth of the sequence are not compared. Their FLOPs "
        "may differ all the same; the table of methods has them."
    )
    head = ("method", "refresh minus method, points", "verdict")
    return Table("best-average", found.verdict, head, rows, caption, head[1:2])


def frontier(records: Records) -> Figure:
    """The gain of each method on the domain that lost most, against its worst collateral in points, and its FLOPs.

    Returns:
      The figure `methods`: a point for each method that has both figures, and the plain sequence at (0, 0). Vertical:
      the gain, the domain's score with the method minus that at the end of the plain sequence. Horizontal, on a
      symmetric log scale (`symlog`): the largest drop of any other domain from the end of the plain sequence, negative
      if all rose. Both are paired over test prompts. The area of a point is proportional to the FLOPs of all stages
      that led there, the plain sequence's included; if those of a method are not on record, all points have one size.

    Raises:
      Absent: if there are no evaluations, if only the plain sequence was run, or if no domain fell in it.
      UserError: as in `tables.methods.load`.
      KeyError, ValueError: if a record lacks a field or an evaluation has no prompts.
    """
    run, table = _compared(records)
    focus = table.focus
    if focus is None:
        raise Absent("no domain fell in the plain sequence, so there was nothing to win back")
    at = rows_of(run.matrix)
    zero = {"estimate": 0.0, "ci95": None}
    rows = []
    for row in table.rows:
        gain = matrices.difference(run.matrix, "gain", focus, at[row.name], at[PLAIN]).record()
        drop = collateral(run.matrix, "collateral", focus, at[PLAIN], at[row.name])
        paid = zero if row.name == PLAIN else drop.record()
        if gain["estimate"] is None or paid["estimate"] is None:
            continue
        head = {"method": row.name, "group": _group(row.name), "worst": "" if row.name == PLAIN else drop.detail}
        head |= columns("gain", zero if row.name == PLAIN else gain) | columns("collateral", paid)
        head |= {"average": _value(row, "average")} | {c: _value(row, c) for c in COSTS}
        rows.append(head | {"all_flops": total(run, run.matrix.stages[at[row.name]], "flops")})
    lost = fall(run.matrix, focus).record()
    chart = _chart(rows, focus, lost["estimate"], _limit(records))
    n = ", ".join(f"{len(x)} of {d}" for d, x in run.matrix.rewards[at[PLAIN]].items())
    caption = (
        f"Vertical: gain of {focus}, the domain that lost most ({words(lost, '.1f')} points), over the end of the "
        "plain sequence. Horizontal: the largest drop of any other domain from there. Up and left is better; left of 0 "
        f"every other domain rose. Bars: 95 % intervals over test prompts ({n}), not over seeds."
        f"{'' if _unknown(rows) else AREA}"
    )
    return Figure("methods", f"Gain of {focus} by each method, and its cost to other domains", chart, rows, caption)


def comparison(records: Records) -> Table:
    """Average, the domain that lost most, the worst collateral, and the cost beyond the plain sequence.

    Returns:
      The table `methods-table`, a row for each method. Its columns: the method; the average over domains; the score of
      the domain that lost most (no such column if none lost); the worst collateral, which is the largest drop of any
      other domain, with this domain's name; extra optimizer steps, FLOPs and seconds. Scores and collateral are in
      points, with one decimal and 95 % intervals over prompts. Costs have a sign; the prefix of FLOPs is in the
      heading. A figure that is not known is "–".

    Raises:
      Absent: if there are no evaluations, or if only the plain sequence was run.
      UserError: as in `tables.methods.load`.
      KeyError, ValueError: if a record lacks a field or an evaluation has no prompts.
    """
    _, table = _compared(records)
    most = max((abs(_value(row, "flops") or 0.0) for row in table.rows), default=0.0)
    prefix, size = next((u for u in UNITS if most >= u[1]), UNITS[-1])
    scores = ("average", *([table.focus] if table.focus else []), "worst collateral")
    rows = []
    for row in table.rows:
        found = [words(_figure(row, c), ".1f") if _value(row, c) is not None else "–" for c in ("average", "focus")]
        paid = "–" if _value(row, "collateral") is None else words(_figure(row, "collateral"), ".1f")
        paid += f" {'/'.join(dict.fromkeys(row.worst))}" if row.worst else ""
        costs = [_cost(row, "steps"), _cost(row, "flops", size), _cost(row, "seconds")]
        rows.append((row.name, *found[: len(scores) - 1], paid, *costs))
    caption = (
        "Points on test prompts with 95 % intervals over prompts. Worst collateral: the largest drop of any other "
        "domain, for a recovery against where it started and for the rest against the end of the plain "
        "sequence; negative if all of them rose. Steps, FLOPs and seconds are "
        "those beyond the plain sequence; seconds include compilation. A rollback trains no step, but its sweep takes "
        "time. A prevention counts the difference between its stages and the plain ones."
    )
    head = ("method", *scores, "extra steps", f"extra {prefix}FLOPs", "extra seconds")
    return Table("methods-table", "Methods side by side", head, rows, caption, head[1:])


def _compared(records: Records) -> tuple[Run, MethodsTable]:
    records.files("evaluations/*.json")
    run = load(records.root)
    table = summarise([run])
    if len(table.rows) < 2:
        raise Absent("only the plain sequence was run; stages such as `refresh-…`, `replay-…` or `joint` are compared")
    return run, table


def _limit(records: Records) -> float | None:
    """`recover.limit`, the drop of other domains that a recovery accepts; None if the run's config is unknown."""
    try:
        return records.json("config.json")["config"].get("recover", {}).get("limit")
    except Absent:
        return None


def _group(name: str) -> str:
    prefix = name.partition("-")[0]
    if name == PLAIN:
        return PLAIN
    if prefix in RECOVERY:
        return "recovery"
    if prefix in METHODS:
        return "prevention"
    return "other training" if prefix in ("joint", "reversed") else "merge"


def _figure(row: Method, cell: str) -> Record:
    return row.cells[cell].record()


def _unknown(rows: Sequence[Row]) -> bool:
    """Whether the FLOPs of a method are not on record."""
    return any(not row["all_flops"] for row in rows)


def _value(row: Method, cell: str) -> float | None:
    return _figure(row, cell)["estimate"]


def _cost(row: Method, what: str, size: float = 1.0) -> str:
    value = _value(row, what)
    return (
        "–" if value is None else number(value / size, "+,.0f" if abs(value) >= 100 * size or size == 1.0 else "+.2g")
    )


def symlog(x: float) -> float:
    """The symmetric log scale of Vega: linear near 0, logarithmic away from it.

    Args:
      x: a value in points.

    Returns:
      sign(x) · log(1 + |x| / `SYMLOG`), the position on the axis up to a factor.
    """
    return math.copysign(math.log1p(abs(x) / SYMLOG), x)


def unsymlog(t: float) -> float:
    """The inverse of `symlog`: the value in points at a position that `symlog` returned."""
    return math.copysign(SYMLOG * math.expm1(abs(t)), t)


def _chart(rows: Sequence[Row], focus: str, lost: float | None, limit: float | None) -> Any:
    left, right = span(rows, ["collateral"], (0.0, limit or 0.0))
    low, high = span(rows, ["gain"], (0.0, lost or 0.0))
    start, stop = symlog(left), symlog(right)

    def px(x: float, y: float) -> tuple[float, float]:
        return (symlog(x) - start) / (stop - start) * WIDTH, (high - y) / (high - low) * HEIGHT

    def value(x: float, y: float) -> tuple[float, float]:
        return unsymlog(start + x / WIDTH * (stop - start)), high - y / HEIGHT * (high - low)

    spots = [px(r["collateral"], r["gain"]) for r in rows]
    marks = [((0.0, low), (0.0, high)), ((left, 0.0), (right, 0.0))]
    marks += [((limit, low), (limit, high))] if limit is not None else []
    marks += [((left, lost), (right, lost))] if lost is not None else []
    for r in rows:
        if None not in (r["collateral_low"], r["gain_low"]):
            marks.append(((r["collateral_low"], r["gain"]), (r["collateral_high"], r["gain"])))
            marks.append(((r["collateral"], r["gain_low"]), (r["collateral"], r["gain_high"])))
    lines = [between(*px(*a), *px(*b)) for a, b in marks]
    labels = []
    for r, spot, box in zip(rows, spots, place(spots, [r["method"] for r in rows], lines, WIDTH, HEIGHT), strict=True):
        (x, y), (end_x, end_y) = value(box.x, box.y), value(*box.edge(*spot))
        ends = {"from_x": r["collateral"], "from_y": r["gain"], "end_x": end_x, "end_y": end_y}
        labels.append({"method": r["method"], "x": x, "y": y, "far": box.away(*spot)} | ends)
    ticks = [t for size in (1, 2, 5, 10, 20, 50, 100) for t in (-size, size) if left <= t <= right]
    xs = alt.Scale(type="symlog", constant=SYMLOG, domain=[left, right], nice=False)
    ys = alt.Scale(domain=[low, high], nice=False)
    title = "worst collateral: largest drop of another domain, points, symmetric log scale (left is better)"

    def across(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=xs, axis=alt.Axis(values=[0, *ticks], format="d"))

    def up(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=f"gain of {focus}, points (up is better)", scale=ys)

    colour = alt.Color(
        "group:N", title=None, scale=alt.Scale(domain=list(GROUPS), range=list(GROUPS.values())),
        legend=LEGEND,
    )  # fmt: skip
    tip = [
        alt.Tooltip("method:N"), *tips("gain", f"gain of {focus}, points"),
        *tips("collateral", "worst collateral, points"), alt.Tooltip("worst:N", title="of"),
        alt.Tooltip("average:Q", format=".1f", title="average, points"),
        alt.Tooltip("steps:Q", format="+,.0f", title="extra steps"),
        alt.Tooltip("flops:Q", format="+.3~s", title="extra FLOPs"),
        alt.Tooltip("all_flops:Q", format=".3~s", title="FLOPs in all"),
        alt.Tooltip("seconds:Q", format="+,.0f", title="extra seconds"),
    ]  # fmt: skip
    base = alt.Chart(data(rows)).encode(tooltip=tip, color=colour)
    text = alt.Chart(data(labels))
    points = base.mark_point(filled=True, size=95, opacity=1)
    if not _unknown(rows):
        area = alt.Scale(type="linear", domain=[0, max(r["all_flops"] for r in rows)], range=[0, LARGEST], nice=False)
        legend = alt.Legend(format="~s", tickCount=4, symbolFillColor=INK, symbolOpacity=QUIET)
        points = points.encode(size=alt.Size("all_flops:Q", title="FLOPs in all", scale=area, legend=legend))
    leaders = text.transform_filter("datum.far").mark_rule(opacity=QUIET)
    layers = [
        base.mark_rule(strokeWidth=1).encode(x=across("collateral_low"), x2="collateral_high:Q", y=up("gain")),
        base.mark_rule(strokeWidth=1).encode(x=across("collateral"), y=up("gain_low"), y2="gain_high:Q"),
        leaders.encode(x=across("from_x"), x2="end_x:Q", y=up("from_y"), y2="end_y:Q"),
        points.encode(x=across("collateral"), y=up("gain")),
        text.mark_text(align="center", baseline="middle", color=INK).encode(x=across("x"), y=up("y"), text="method:N"),
    ]
    return alt.layer(*_rules(lost, limit, across, up), *layers).properties(width=WIDTH, height=HEIGHT, name=FIXED)


def _rules(lost: float | None, limit: float | None, x: Any, y: Any) -> list[Any]:
    """The lines at no collateral, at no gain, at a gain of all that was lost, and at the limit."""
    zero = alt.Chart(data([{"zero": 0.0}]))
    found = [zero.mark_rule(opacity=QUIET).encode(x=x("zero")), zero.mark_rule(opacity=QUIET).encode(y=y("zero"))]
    if lost is not None and lost > 0:
        at = alt.Chart(data([{"lost": lost, "shown": "all that was lost"}]))
        found.append(at.mark_rule(strokeDash=[4, 3]).encode(y=y("lost")))
        label = at.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, x="width", opacity=1)
        found.append(label.encode(y=y("lost"), text="shown:N"))
    if limit is not None:
        at = alt.Chart(data([{"limit": limit, "shown": f"limit {limit:g}"}]))
        found.append(at.mark_rule(strokeDash=[4, 3]).encode(x=x("limit")))
        label = at.mark_text(align="left", baseline="bottom", dx=4, dy=-4, y="height", opacity=1)
        found.append(label.encode(x=x("limit"), text="shown:N"))
    return found
