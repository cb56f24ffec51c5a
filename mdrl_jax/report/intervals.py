"""Figures as records have them (`Estimate.record`) as columns of a chart's rows, as tooltips, and as words."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Record = Mapping[str, Any]


def columns(name: str, figure: Record, scale: float = 1.0) -> dict[str, float | None]:
    """The columns `name`, `name_low` and `name_high`; None for what the figure does not have."""
    low, high = figure["ci95"] or (None, None)
    values = {name: figure["estimate"], f"{name}_low": low, f"{name}_high": high}
    return {key: None if x is None else scale * x for key, x in values.items()}


def span(
    rows: Sequence[Record], names: Sequence[str], also: Sequence[float] = (0.0,), margin: float = 0.05
) -> tuple[float, float]:
    """The smallest and largest value, or end of an interval, of the named columns and of `also`.

    `margin` is left on each side, a share of their distance.
    """
    values = [row.get(f"{name}{end}") for row in rows for name in names for end in ("", "_low", "_high")]
    known = [*also, *(x for x in values if x is not None)]
    room = margin * ((max(known) - min(known)) or 1.0)
    return min(known) - room, max(known) + room


def number(value: float, form: str = ".2f") -> str:
    """A value as text, with a minus sign of its own width, and none before a 0."""
    text = f"{value:{form}}"
    return text.lstrip("-") if not text.strip("-0.%") else text.replace("-", "−")


def words(figure: Record, form: str = ".2f") -> str:
    """`0.94 [0.90, 0.96]`; the reason where there is no estimate."""
    if figure["estimate"] is None:
        return figure.get("reason") or "not measured"
    interval = figure["ci95"] and ", ".join(number(x, form) for x in figure["ci95"])
    return number(figure["estimate"], form) + (f" [{interval}]" if interval else "")


def tips(name: str, title: str, form: str = ".2f") -> list[alt.Tooltip]:
    """Tooltips of the columns of one figure."""
    ends = {name: title, f"{name}_low": f"{title}: 95 % from", f"{name}_high": f"{title}: to"}
    return [alt.Tooltip(f"{column}:Q", title=text, format=form) for column, text in ends.items()]
