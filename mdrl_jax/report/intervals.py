"""Figures as records have them (`Estimate.record`), as columns of a chart's rows, as tooltips, and as words.

Rows with several figures name the columns of each after it (`columns`, `tips`). Rows of one figure each have the
columns estimate, low, high, n and reason, and those of its null (`estimate_columns`, `null_columns`, `estimate_tips`).
"""

from collections.abc import Mapping, Sequence

import altair as alt

from mdrl_jax.report.figure import Row
from mdrl_jax.stats.estimate import Record, figure_text


def columns(name: str, figure: Record, scale: float = 1.0) -> Row:
    """The columns `name`, `name_low` and `name_high`; None for what the figure does not have."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), _ends(figure, scale), strict=True))


def estimate_columns(figure: Record, scale: float = 1.0) -> Row:
    """The columns estimate, low and high (95 %), n, and why there is no estimate ("" where there is one)."""
    found = dict(zip(("estimate", "low", "high"), _ends(figure, scale), strict=True))
    return found | {"n": figure["n"], "reason": figure.get("reason", "") if figure["estimate"] is None else ""}


def null_columns(figure: Record, scale: float = 1.0) -> Row:
    """The columns null, null_low and null_high of a null that is drawn (its mean and central 95 %), or a number."""
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


def words(figure: Record, form: str = ".2f", scale: float = 1.0) -> str:
    """`0.94 [0.90, 0.96]`, times `scale`; the reason where there is no estimate."""
    if figure["estimate"] is None:
        return figure.get("reason") or "not measured"
    ci95 = figure["ci95"] and [scale * x for x in figure["ci95"]]
    return figure_text(scale * figure["estimate"], ci95, form, number=number)


def tips(name: str, title: str, form: str = ".2f") -> list[alt.Tooltip]:
    """Tooltips of the columns of one figure."""
    return tooltips({name: title, f"{name}_low": f"{title}: 95 % from", f"{name}_high": f"{title}: to"}, form)


def estimate_tips(names: Sequence[str], title: str, null: bool = False) -> list[alt.Tooltip]:
    """Tooltips of the columns `names`, which say what a figure is of, and of the figure under `title` with its unit."""
    titles = {"estimate": title, "low": "95 % from", "high": "to"}
    if null:
        titles |= {"null": "by chance", "null_low": "chance, 95 % from", "null_high": "to"}
    named = [alt.Tooltip(f"{name}:N") for name in names]
    return [*named, *tooltips(titles, ".3g"), alt.Tooltip("n:Q"), alt.Tooltip("reason:N", title="not measurable")]


def tooltips(titles: Mapping[str, str], form: str = ".2f") -> list[alt.Tooltip]:
    """Tooltips of numeric columns under their titles."""
    return [alt.Tooltip(f"{column}:Q", title=text, format=form) for column, text in titles.items()]
