"""Turns the figures of the records (`Estimate.record`) into columns of a chart's rows, tooltips and text.

If a row holds several figures, the columns of each start with its name: gain, gain_low, gain_high (`columns`, `tips`).
If a row holds one figure, its columns are estimate, low, high, n and reason, and the columns of its null are null,
null_low and null_high (`estimate_columns`, `null_columns`, `estimate_tips`).
"""

from collections.abc import Mapping, Sequence

import altair as alt

from mdrl_jax.report.figure import Row
from mdrl_jax.stats.estimate import Record, figure_text


def columns(name: str, figure: Record, scale: float = 1.0) -> Row:
    """The columns of a figure in a row that holds several figures.

    Args:
      name: the figure's name, with which its columns start.
      figure: its record; only "estimate" and "ci95" are used, and both must be there.
      scale: a factor on the estimate and on both ends, for example 100 from reward to points.

    Returns:
      {`name`: estimate, `name`_low, `name`_high: ends of the 95 % interval}. Without an estimate or an interval, the
      value is None.
    """
    return dict(zip((name, f"{name}_low", f"{name}_high"), _ends(figure, scale), strict=True))


def estimate_columns(figure: Record, scale: float = 1.0) -> Row:
    """The columns of the figure in a row that holds one figure.

    Args:
      figure: its record.
      scale: a factor on the estimate and on both ends, for example 100 from reward to points.

    Returns:
      {"estimate", "low", "high": ends of the 95 % interval, "n", "reason": why there is no estimate, otherwise ""}.
      Without an estimate or an interval, the value is None.
    """
    found = dict(zip(("estimate", "low", "high"), _ends(figure, scale), strict=True))
    return found | {"n": figure["n"], "reason": figure.get("reason", "") if figure["estimate"] is None else ""}


def null_columns(figure: Record, scale: float = 1.0) -> Row:
    """The columns of a figure's null.

    Args:
      figure: its record, whose null is a number, {"mean", "low", "high"} of a drawn null, or None.
      scale: a factor on all three, for example 100 from reward to points.

    Returns:
      {"null": the null's value, or the mean of a drawn null; "null_low", "null_high": the central 95 % of a drawn
      null, otherwise None}. All three are None if the figure has no null.

    Raises:
      TypeError: if the null is an interval, [low, high].
    """
    null = figure["null"]
    if isinstance(null, Mapping):
        return columns("null", {"estimate": null["mean"], "ci95": [null["low"], null["high"]]}, scale)
    return columns("null", {"estimate": null, "ci95": None}, scale)


def _ends(figure: Record, scale: float) -> list[float | None]:
    """[estimate, low, high], each times `scale`."""
    return [None if x is None else scale * x for x in (figure["estimate"], *(figure["ci95"] or (None, None)))]


def span(
    rows: Sequence[Row], names: Sequence[str], also: Sequence[float] = (0.0,), margin: float = 0.05
) -> tuple[float, float]:
    """The range of an axis that holds all values and intervals of some columns.

    Args:
      rows: the data of the chart. A value that is None or absent does not count.
      names: the columns; their intervals `name`_low and `name`_high count too.
      also: further values that the range holds; by default 0.
      margin: room on each side, as a share of the range; of 1 if all values are equal.

    Returns:
      (low, high) in the unit of the columns.

    Raises:
      ValueError: if there is no value at all.
    """
    values = [row.get(f"{name}{end}") for row in rows for name in names for end in ("", "_low", "_high")]
    known = [*also, *(x for x in values if x is not None)]
    room = margin * ((max(known) - min(known)) or 1.0)
    return min(known) - room, max(known) + room


def near(rows: Sequence[Row], names: Sequence[str]) -> tuple[float, float]:
    """The range of axes that holds all values, and their intervals as far as these go no further than the values do.

    One value that is hardly determined would otherwise press all points into a corner.

    Args:
      rows, names: as for `span`.

    Returns:
      (low, high): the range of the values, 0 and the intervals, cut at the width of the range of values and 0 beyond
      that range.

    Raises:
      ValueError: if there is no value at all.
    """
    whole = span(rows, names, margin=0.0)
    points = span([{name: row.get(name) for name in names} for row in rows], names, margin=1.0)
    return max(whole[0], points[0]), min(whole[1], points[1])


def number(value: float, form: str = ".2f") -> str:
    """A value as text with a typographic minus sign (−), also in an exponent. A value that rounds to 0 has no sign −.

    Args:
      value: the value.
      form: its format, for example ".2f" or ".0%".

    Raises:
      ValueError: if `form` is no format of a number.
    """
    text = f"{value:{form}}"
    return text.lstrip("-") if not text.strip("-0.%") else text.replace("-", "−")


def words(figure: Record, form: str = ".2f", scale: float = 1.0) -> str:
    """A figure as text, `0.94 [0.90, 0.96]`.

    Args:
      figure: its record. Without an interval the text is the value alone.
      form: the format of each number, for example ".2f". A plus sign at its start applies to the value only.
      scale: a factor on all numbers.

    Returns:
      The text, with typographic minus signs; for a figure without an estimate the record's reason, or "not measured" if
      it has none.

    Raises:
      ValueError: if `form` is no format of a number.
    """
    if figure["estimate"] is None:
        return figure.get("reason") or "not measured"
    ci95 = figure["ci95"] and [scale * x for x in figure["ci95"]]
    return figure_text(scale * figure["estimate"], ci95, form, number=number)


def tips(name: str, title: str, form: str = ".2f") -> list[alt.Tooltip]:
    """Three tooltips of the figure `name` in rows that hold several figures (`columns`): estimate, low and high end.

    Args:
      name: the figure's name.
      title: the title of its estimate, with the unit.
      form: the format of each number.

    Returns:
      the tooltips, in this order.
    """
    return tooltips({name: title, f"{name}_low": f"{title}: 95 % from", f"{name}_high": f"{title}: 95 % to"}, form)


def estimate_tips(names: Sequence[str], title: str, null: bool = False) -> list[alt.Tooltip]:
    """Tooltips of rows that hold one figure (`estimate_columns`), with three significant digits.

    Args:
      names: text columns that say which figure it is, for example ("domain", "stage").
      title: the title of the estimate, with the unit.
      null: whether the rows have the columns of a null (`null_columns`).

    Returns:
      Tooltips, in this order: these columns, the estimate, both ends of its interval, the null and both ends of it if
      `null` is true, n and the reason.
    """
    titles = {"estimate": title, "low": "95 % from", "high": "95 % to"}
    if null:
        titles |= {"null": "by chance", "null_low": "by chance: 95 % from", "null_high": "by chance: 95 % to"}
    named = [alt.Tooltip(f"{name}:N") for name in names]
    return [*named, *tooltips(titles, ".3g"), alt.Tooltip("n:Q"), alt.Tooltip("reason:N", title="not measurable")]


def tooltips(titles: Mapping[str, str], form: str = ".2f") -> list[alt.Tooltip]:
    """Tooltips of numeric columns, one for each, in the given order.

    Args:
      titles: the title of each column, by the column's name.
      form: the format of each number, for example ".2f".
    """
    return [alt.Tooltip(f"{column}:Q", title=text, format=form) for column, text in titles.items()]
