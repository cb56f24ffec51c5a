"""Charts for figures of pairs of domains: as a matrix, and with intervals beside the values by chance."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import BAND, INK, QUIET, SEQUENTIAL, Row, by_category, data, ink_on
from mdrl_jax.report.figures.layout import LEGEND, Layers, distinct
from mdrl_jax.report.folder import Records
from mdrl_jax.report.intervals import estimate_tips

CELL, NARROW, MATRIX = 44, 32, 176  # px of the widest cell, of the narrowest cell, and of all cells in between
LETTER = 7.5  # px of a letter of a label
BASE, PEAK = "at the base", "at the earlier domain's peak"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


def name(pair: Sequence[str]) -> str:
    """The name of a pair without an order, for example "math – qa"."""
    return " – ".join(pair)


def places(records: Records, path: str) -> Iterator[tuple[str, str, Any]]:
    """Reads a record that has an entry for each point of the sequence.

    Args:
      records: the work folder.
      path: path of the record, for example `analysis/routes.json`.

    Yields:
      For each point: `BASE`, which stands for θ_0, or `PEAK`; the domain whose peak the point is, "" at θ_0; and the
      entry.

    Raises:
      Absent: on the first step, if the record or `analysis/settings.json` is missing.
      UserError: on the first step, if one of them is not valid JSON.
      KeyError: if `analysis/settings.json` lacks a field.
    """
    points = records.json(path)
    own = {s["name"]: s["domain"] for s in records.json("analysis/settings.json")["stages"]}
    for point, found in points.items():
        yield (PEAK, own[point], found) if point in own else (BASE, "", found)


def marks(rows: Sequence[Row]) -> tuple[alt.Color, alt.Shape]:
    """The marks of pairs of a domain and a later stage.

    Args:
      rows: the data of the chart, with the columns "domain" and "stage".

    Returns:
      (a colour for each domain, a shape for each later stage), in the order of the rows. Colours repeat after seven
      domains, shapes after six stages.
    """
    domains, stages = distinct(rows, "domain"), distinct(rows, "stage")
    shapes = alt.Scale(domain=stages, range=[SHAPES[i % len(SHAPES)] for i in range(len(stages))])
    return (
        alt.Color("domain:N", scale=by_category(domains), title="domain", legend=LEGEND),
        alt.Shape("stage:N", scale=shapes, title="after", legend=LEGEND),
    )


def matrix(rows: Sequence[Row], domains: Sequence[str], title: str) -> alt.LayerChart | alt.FacetChart:
    """The estimates as the upper half of a matrix, by colour and as numbers with two decimals.

    Args:
      rows: the data, one row for each pair, with the columns of `estimate_columns` and `null_columns`, and "a" and "b",
        where a comes before b in `domains`. No estimate is negative: the colours go from 0 to the largest estimate.
      domains: names of the domains, in the order of the matrix.
      title: what the estimates are.

    Returns:
      The layered chart, which holds its own data. Domain a is the row of the matrix and b the column.
    """
    known = [r["estimate"] for r in rows if r["estimate"] is not None]
    high = max(known, default=0.0) or 1.0
    cells = max(len(domains) - 1, 1)
    cell = max(NARROW, min(CELL, MATRIX // cells))
    angle = 0 if LETTER * max(map(len, domains), default=0) < cell else -40
    base = alt.Chart(data(rows)).encode(
        x=alt.X("b:N", sort=list(domains[1:]), title=None, axis=alt.Axis(orient="top", labelAngle=angle)),
        y=alt.Y("a:N", sort=list(domains[:-1]), title=None),
        tooltip=estimate_tips(["a", "b"], title, null=True),
    )
    colour = alt.Color("estimate:Q", scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, high]), title=title, legend=None)
    ink = ink_on("estimate", high)
    text = base.mark_text().encode(text=alt.Text("estimate:Q", format=".2f"), color=ink)
    return alt.layer(base.mark_rect().encode(color=colour), text).properties(
        width=cell * cells, height=cell * cells, title=alt.Title(title, fontSize=13)
    )


def beside_chance(
    rows: Sequence[Row],
    pairs: Sequence[str],
    title: str,
    width: int,
    scale: alt.Scale,
    by: str = "",
    series: Sequence[str] = (),
    labels: bool = True,
    height: int = 34,
    dashed: float | None = None,
) -> Layers:
    """Estimates of pairs (horizontal) with their intervals, one line for each pair, beside the values by chance.

    A grey tick marks the value by chance. If the null is drawn, a grey band shows its central 95 %, and the tick its
    mean.

    Args:
      rows: the data, with "pair" and the columns of `estimate_columns` and `null_columns`.
      pairs: names of the pairs, in order.
      title: what the estimates are, with the unit.
      width: px of the chart.
      scale: scale of the estimates.
      by: the column that tells several estimates of a pair apart, by colour and by height within the pair's line; "" if
        there is one.
      series: the values of this column, in order.
      labels: whether pairs are named; without labels, a chart beside it names them.
      height: px of each pair.
      dashed: a value to compare with, in the unit of the estimates, drawn as a dashed line; None draws no line.

    Returns:
      The chart, which holds its own data.
    """
    shown = estimate_tips(["pair", by] if by else ["pair"], title, null=True)
    axis = alt.Axis(grid=True) if labels else alt.Axis(labels=False, ticks=False, grid=True)
    base = alt.Chart(data(rows)).encode(y=alt.Y("pair:N", sort=list(pairs), title=None, axis=axis), tooltip=shown)
    colour = alt.value(INK)
    if by:
        base = base.encode(yOffset=alt.YOffset(f"{by}:N", sort=list(series)))
        colour = alt.Color(f"{by}:N", scale=by_category(series), title=None, legend=LEGEND)
    chance = base.mark_bar(size=10, color=INK, stroke=INK, **BAND)
    intervals = base.mark_rule(strokeWidth=1.6, clip=True).encode(
        x=alt.X("low:Q", title=title), x2="high:Q", color=colour
    )
    expected = base.mark_tick(color=INK, thickness=1.5, height=10, opacity=QUIET).encode(x=alt.X("null:Q", title=title))
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=alt.X("estimate:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4, labelFlush=False)), color=colour
    )
    band = chance.encode(x=alt.X("null_low:Q", title=title), x2="null_high:Q")
    bound = alt.Chart(data([] if dashed is None else [{"at": dashed}])).mark_rule(strokeDash=[4, 3], color=INK)
    layers = (band, bound.encode(x=alt.X("at:Q", title=title)), expected, intervals, points)
    return alt.layer(*layers).properties(width=width, height=height * len(pairs))
