"""Waterfall charts of terms that add up: each bar starts where the bar before it ended."""

from collections.abc import Sequence

import altair as alt

from mdrl_jax.report.figure import INK, QUIET, Row, data
from mdrl_jax.report.figures.layout import side_by_side
from mdrl_jax.report.intervals import estimate_tips, number, span

STEP = 22  # px of each bar
ROOM = 0.34  # of the range, for the numbers at the bars' ends


def cascade(
    rows: Sequence[Row],
    colours: dict[str, str],
    title: str,
    group: str,
    order: Sequence[str],
    count: int,
    width: int,
) -> alt.FacetChart:
    """Small waterfall charts side by side, with one scale.

    Bars are horizontal, one below the other. A bar starts at "start" and has the length "estimate". The line at its end
    is the interval of the estimate. Its number has three significant digits and a sign.

    Args:
      rows: one row for each bar, with "term", "start", the column `group` and the columns of `estimate_columns`. Start
        and estimate are None if the term was not measured. All values have the unit that `title` names.
      colours: the colour of each term, in the order of the bars.
      title: what the bars show, with the unit.
      group: the column that tells the small charts apart.
      order: its values, in the order of the charts.
      count: number of charts in a line.
      width: px of each chart.

    Returns:
      The chart, which holds its own data.

    Raises:
      KeyError: if a row lacks "start", "estimate", "low" or "high".
    """
    labelled = [
        row | {"shown": "not measurable" if (x := row["estimate"]) is None else number(x, "+.3g")} for row in rows
    ]
    x = alt.X("start:Q", title=title, scale=alt.Scale(domain=_domain(rows), nice=False), axis=alt.Axis(tickCount=5))
    y = alt.Y("term:N", sort=list(colours), title=None, axis=alt.Axis(ticks=False, domain=False))
    base = (
        alt.Chart()
        .transform_calculate(
            end="datum.start + datum.estimate",
            from_="datum.start + datum.low",
            to="datum.start + datum.high",
            right="max(datum.start, datum.start + datum.estimate, datum.start + datum.high)",
        )
        .encode(y=y, tooltip=estimate_tips([group, "term"], title))
    )
    colour = alt.Color(
        "term:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), sort=None, legend=None
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=QUIET).encode(x=alt.X("at:Q", title=title))
    bars = base.mark_bar(height=12).encode(x=x, x2="end:Q", color=colour)
    intervals = base.mark_rule(color=INK, strokeWidth=1.3).encode(x=alt.X("from_:Q", title=title), x2="to:Q")
    text = base.mark_text(align="left", dx=5, color=INK).encode(x=alt.X("right:Q", title=title), text="shown:N")
    layers = alt.layer(zero, bars, intervals, text, data=data(labelled)).properties(
        width=width, height=STEP * len(colours)
    )
    return side_by_side(layers, group, order, count, spacing={"row": 18, "column": 20})


def _domain(rows: Sequence[Row]) -> list[float]:
    ends = [
        {"end": r["start"] + r["estimate"], "low": r["start"] + (r["low"] or 0), "high": r["start"] + (r["high"] or 0)}
        for r in rows
        if r["start"] is not None and r["estimate"] is not None
    ]
    low, high = span(ends, ("end", "low", "high"), margin=0.0)
    size = (high - low) or 1.0
    return [low - 0.04 * size, high + ROOM * size]
