"""A figure of the report: one Vega-Lite specification makes the chart on the page, the SVG, the PDF and the PNG.

Its rows are the CSV. Colours are safe for colour-blind readers. Categories have the hues of Okabe and Ito (2008), some
of them darker, so that each has a contrast of 3:1 to the paper of both themes. Magnitudes have the scale cividis, and
signed values a blue–orange scale centred on 0. Text and lines that belong to no category have the colour
"currentColor": dark on paper and in the files, light in the page's dark mode.
"""

import csv
import dataclasses
import functools
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from mdrl_jax.errors import UserError

INK = "currentColor"
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#C4659A", "#B07C00", "#2F96D0", "#858585")
QUIET = (
    0.55  # opacity of reference lines and of the edges of bands; with less they have no contrast of 3:1 to the paper
)
# A band of values by chance or of an interval: a tint, with an edge that carries the meaning.
BAND: dict[str, Any] = {"fillOpacity": 0.16, "strokeOpacity": QUIET, "strokeWidth": 1}
COLOURED: dict[str, Any] = {**BAND, "strokeOpacity": 1}  # the same in a colour of `CATEGORIES`
SEQUENTIAL, DIVERGING = "cividis", "blueorange"
PNG_SCALE = 2.0
DARK_BELOW = 0.47  # position on the sequential scale; white text is legible below it, black text above (WCAG 4.5)
TEXT = 12  # smallest text, in px
HALF = 500  # px of the plots of a chart that goes into one of the page's two columns; its axes take about 80 more
THEME: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
    "view": {"stroke": None, "continuousWidth": 640, "continuousHeight": 320},
    "title": {"fontSize": 14, "color": INK, "anchor": "start", "fontWeight": 600, "subtitleFontSize": TEXT},
    "axis": {
        "labelFontSize": TEXT,
        "titleFontSize": 13,
        "titleFontWeight": 500,
        "labelColor": INK,
        "titleColor": INK,
        "tickColor": INK,
        "domainColor": INK,
        "gridColor": INK,
        "gridOpacity": 0.13,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "labelLimit": 260,
        "labelSeparation": 6,
    },
    "legend": {
        "orient": "top",  # the start of the legend is then visible, however narrow the screen is
        "direction": "horizontal",
        "titleOrient": "left",
        "offset": 10,
        "layout": {"top": {"direction": "vertical", "anchor": "start", "margin": 3}},
        "symbolOpacity": 1,
        # Of legends of shapes, which have no colour of their own.
        "symbolBaseFillColor": INK,
        "symbolBaseStrokeColor": INK,
        "labelFontSize": TEXT,
        "titleFontSize": TEXT,
        "labelColor": INK,
        "titleColor": INK,
        "labelLimit": 260,
        "symbolStrokeWidth": 2,
        "gradientLength": 160,
    },
    "header": {"labelFontSize": 13, "titleFontSize": 13, "labelColor": INK, "titleColor": INK},
    "text": {"fontSize": TEXT, "color": INK},
    "rule": {"color": INK},
    "line": {"strokeWidth": 2},
    "range": {"category": list(CATEGORIES)},
}
# Names become file names and links. No name can leave the folder or be the address of something else.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,99}")
Row = dict[str, Any]  # the data of one mark: {column: value}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its data.

    Attributes:
      name: stem of its files, e.g. `scores` for `report/scores.png` and `report/scores.csv`.
      title: the heading above the chart.
      chart: the Altair chart; it holds its own data.
      rows: the data behind the chart, for the CSV.
      caption: how to read it: units, the meaning of the interval and of the null, the number of prompts or pairs.

    Raises:
      UserError: if the name, which may come from a record, does not match `NAME`.
    """

    name: str
    title: str
    chart: alt.TopLevelMixin
    rows: Sequence[Row]
    caption: str

    def __post_init__(self) -> None:
        _check_name(self.name)

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification under the report's theme.

        Raises:
          altair.utils.schemapi.SchemaValidationError: if the chart is not valid Vega-Lite; from `json` and `svg` too.
        """
        return self._valid | {"config": THEME}

    @functools.cached_property
    def _valid(self) -> dict[str, Any]:
        return self.chart.to_dict()  # cached, because the validation in it takes longer than drawing

    def json(self) -> str:
        """The specification as JSON for a script element. Every "<" is escaped, so no text in the data can end it.

        Raises:
          ValueError: if a number is NaN or infinite; `data` replaces such numbers.
        """
        return json.dumps(self.spec(), allow_nan=False).replace("<", "\\u003c")

    @functools.cached_property
    def svg(self) -> str:
        """The chart as SVG on a white background.

        Raises:
          ValueError: if the chart cannot be drawn; from `width`, `png` and `pdf` too.
        """
        spec = self.spec()
        spec["config"] = THEME | {"background": "white"}
        return vl_convert.vegalite_to_svg(json.dumps(spec))

    @property
    def width(self) -> float:
        """The width of the chart in px, its axes and legends included."""
        found = re.search(r'<svg[^>]*? width="([\d.]+)"', self.svg)
        if found is None:
            raise ValueError(f"the chart {self.name} has no width")
        return float(found[1])

    def png(self) -> bytes:
        """The chart as PNG on a white background, with `PNG_SCALE` pixels for each px of the page."""
        return vl_convert.svg_to_png(self.svg, scale=PNG_SCALE)

    def pdf(self) -> bytes:
        """The chart as PDF on a white background."""
        return vl_convert.svg_to_pdf(self.svg)

    def csv(self) -> str:
        """The rows as CSV; an absent value is an empty cell. Columns are in the order in which the rows name them."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      name: stem of its CSV file.
      title: the heading above the table.
      columns: the head of each column.
      rows: one text for each column.
      caption: how to read it.
      numeric: heads of the columns that are aligned to the right.
      folded: whether the page shows the caption alone until a reader opens the rows.

    Raises:
      UserError: if the name, which may come from a record, does not match `NAME`.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[str] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)

    def csv(self) -> str:
        """The cells as CSV, below a line with the heads of the columns."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Rows as the inline data of a chart; NaN and infinite floats become null, because JSON has neither."""
    return alt.InlineData(values=[{k: _finite(v) for k, v in row.items()} for row in rows])


def by_category(names: Sequence[str]) -> alt.Scale:
    """A scale with a colour for each name, in the order of `CATEGORIES`, which repeat after seven names."""
    return alt.Scale(domain=list(names), range=[CATEGORIES[i % len(CATEGORIES)] for i in range(len(names))])


def ink_on(column: str, high: float, low: float = 0.0) -> Any:
    """The colour of text on a cell that the sequential scale colours: white or black, whichever is legible.

    Args:
      column: the column that colours the cell.
      high: the value at the upper end of the scale.
      low: the value at its lower end.

    Returns:
      A condition for the channel `color` of a text mark.
    """
    dark = alt.datum[column] < low + DARK_BELOW * (high - low)
    return alt.when(dark).then(alt.value("white")).otherwise(alt.value("black"))


def signed(values: Sequence[float | None]) -> alt.Scale:
    """A scale from blue (negative) to orange (positive), symmetric about 0; it ends at ± the largest magnitude.

    Args:
      values: the values on the scale, none of them infinite; None and NaN do not count. If no other value than 0 is
        left, the scale ends at ±1.
    """
    largest = max((abs(v) for v in values if v is not None and v == v), default=0.0) or 1.0
    return alt.Scale(scheme=DIVERGING, domain=[-largest, largest], domainMid=0)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a figure: it may have letters, digits, -, _ and . after the first one")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not (abs(value) < float("inf")) else value
