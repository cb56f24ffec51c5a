"""Figures of pairs of domains: a matrix of them, and each with its interval beside what chance gives."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import INK, SEQUENTIAL, Row, by_category, data, ink_on
from mdrl_jax.report.figures.layout import LEGEND, distinct
from mdrl_jax.report.folder import Records
from mdrl_jax.report.intervals import estimate_tips

CELL, NARROW, MATRIX = 44, 32, 176  # px of a cell, of the narrowest, and of the whole where there are many
LETTER = 7.5  # px of a letter of a label
BASE, PEAK = "at the base", "at the earlier domain's peak"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


def name(pair: Sequence[str]) -> str:
    """What a pair without an order is called."""
    return " – ".join(pair)


def places(records: Records, path: str) -> Iterator[tuple[str, str, Any]]:
    """(place, domain whose peak it is or "", what the record holds there) of a record by point of the sequence."""
    points = records.json(path)
    own = {s["name"]: s["domain"] for s in records.json("analysis/settings.json")["stages"]}
    for point, found in points.items():
        yield (BASE, "", found) if point == "base" else (PEAK, own[point], found)


def marks(rows: Sequence[Row]) -> tuple[alt.Color, alt.Shape]:
    """A colour for each domain and a shape for each later stage."""
    domains, stages = distinct(rows, "domain"), distinct(rows, "stage")
    shapes = alt.Scale(domain=stages, range=[SHAPES[i % len(SHAPES)] for i in range(len(stages))])
    return (
        alt.Color("domain:N", scale=by_category(domains), title="domain", legend=LEGEND),
        alt.Shape("stage:N", scale=shapes, title="after", legend=LEGEND),
    )


def matrix(rows: Sequence[Row], domains: Sequence[str], title: str) -> alt.LayerChart | alt.FacetChart:
    """The estimates as the upper half of a matrix; rows have "a" and "b", with a before b in `domains`."""
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
) -> alt.LayerChart | alt.FacetChart:
    """Estimates with intervals a pair, on the grey band of what chance gives; `by` tells `series` of a pair apart.

    `labels`: whether pairs and colours are named, else a chart beside it does; `height`: px a pair;
    `dashed`: a figure to compare with.
    """
    shown = estimate_tips(["pair", by] if by else ["pair"], title, null=True)
    axis = alt.Axis(grid=True) if labels else alt.Axis(labels=False, ticks=False, grid=True)
    base = alt.Chart(data(rows)).encode(y=alt.Y("pair:N", sort=list(pairs), title=None, axis=axis), tooltip=shown)
    colour = alt.value(INK)
    if by:
        base = base.encode(yOffset=alt.YOffset(f"{by}:N", sort=list(series)))
        colour = alt.Color(f"{by}:N", scale=by_category(series), title=None, legend=LEGEND if labels else None)
    chance = base.mark_rule(strokeWidth=9, opacity=0.22, color=INK)
    intervals = base.mark_rule(strokeWidth=1.6, clip=True).encode(
        x=alt.X("low:Q", title=title), x2="high:Q", color=colour
    )
    expected = base.mark_tick(color=INK, thickness=1.5, height=9, opacity=0.6).encode(x=alt.X("null:Q", title=title))
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=alt.X("estimate:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4, labelFlush=False)), color=colour
    )
    band = chance.encode(x=alt.X("null_low:Q", title=title), x2="null_high:Q")
    bound = alt.Chart(data([] if dashed is None else [{"at": dashed}])).mark_rule(strokeDash=[4, 3], color=INK)
    layers = (band, bound.encode(x=alt.X("at:Q", title=title)), expected, intervals, points)
    return alt.layer(*layers).properties(width=width, height=height * len(pairs))
