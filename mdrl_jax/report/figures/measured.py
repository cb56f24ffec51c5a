"""Figures of the records, {"estimate", "ci95", "null", "n", "unit"}, as columns and tooltips of charts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

Row = dict[str, Any]
# Rewards are shown in points, 100 times the reward; everything else as it is recorded.
POINTS = {"reward": ("points", 100.0)}
MODULES = ("embedding", "attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down", "norm", "unembedding")
LEGEND = alt.Legend(orient="bottom", symbolOpacity=1)


def unit(recorded: str) -> tuple[str, float]:
    """The unit that a recorded unit is shown in, and the factor."""
    return POINTS.get(recorded, (recorded, 1.0))


def scaled(record: Mapping[str, Any], scale: float) -> Row:
    """A record in another unit."""
    ends = record["ci95"] and [scale * x for x in record["ci95"]]
    return {**record, "estimate": times(record["estimate"], scale), "ci95": ends}


def columns(record: Mapping[str, Any], scale: float = 1.0) -> Row:
    """The columns estimate, low and high (95 %), n, and why there is no estimate ("" where there is one)."""
    shown = scaled(record, scale)
    low, high = shown["ci95"] or (None, None)
    return {"estimate": shown["estimate"], "low": low, "high": high, "n": record["n"], "reason": _reason(record)}


def _reason(record: Mapping[str, Any]) -> str:
    return record.get("reason", "") if record["estimate"] is None else ""


def null_columns(record: Mapping[str, Any], scale: float = 1.0) -> Row:
    """The columns null, null_low and null_high of a null that is drawn (its mean and central 95 %), or a number."""
    null = record["null"]
    known = null if isinstance(null, Mapping) else {"mean": null, "low": None, "high": None}
    return {name: times(known[key], scale) for name, key in NULL.items()}


NULL = {"null": "mean", "null_low": "low", "null_high": "high"}


def times(value: float | None, scale: float) -> float | None:
    """A value in another unit; None stays None."""
    return None if value is None else scale * value


def tips(names: Sequence[str], title: str, null: bool = False) -> list[alt.Tooltip]:
    """Tooltips of a measured figure under `title`, which says its unit; after those of the `names` of what it is of."""
    listed = [alt.Tooltip(f"{name}:N") for name in names]
    listed += [
        alt.Tooltip("estimate:Q", format=".3g", title=title),
        alt.Tooltip("low:Q", format=".3g", title="95 % from"),
        alt.Tooltip("high:Q", format=".3g", title="to"),
    ]
    if null:
        listed += [
            alt.Tooltip("null:Q", format=".3g", title="by chance"),
            alt.Tooltip("null_low:Q", format=".3g", title="chance, 95 % from"),
            alt.Tooltip("null_high:Q", format=".3g", title="to"),
        ]
    return [*listed, alt.Tooltip("n:Q"), alt.Tooltip("reason:N", title="not measurable")]


def gaps(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the pairs that have figures without an estimate, and why; "" where there are none."""
    pairs: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["reason"]:
            pairs.setdefault(row["reason"], {})[row["pair"]] = None
    said = "; ".join(f"{', '.join(names)} ({why})" for why, names in pairs.items())
    return f" Not measurable: {said}." if pairs else ""


def panels(n: int, most: int, total: int, gap: int = 20) -> tuple[int, int]:
    """Columns of n small charts, at most `most`, and the width of each, so that they take `total` px in all."""
    count = max(min(n, most), 1)
    return count, int((total - gap * (count - 1)) / count)


def facet(field: str, order: Sequence[str]) -> alt.Facet:
    """Small charts by a field in the given order."""
    header = alt.Header(title=None, labelFontWeight=600, labelAnchor="start")
    return alt.Facet(f"{field}:N", sort=list(order), header=header)


def extent(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[float, float]:
    """The smallest and the largest value of these columns, 0 included."""
    values = [row[name] for row in rows for name in names if row.get(name) is not None]
    return min([0.0, *values]), max([0.0, *values])


def by_module(kinds: Iterable[str]) -> list[str]:
    """Kinds of tensors in the order in which a token meets them; biases and norms of a projection come after it."""

    def place(kind: str) -> tuple[int, str]:
        known = kind if kind in MODULES else kind.split("_")[0]
        return (MODULES.index(known) if known in MODULES else len(MODULES), kind)

    return sorted(set(kinds), key=place)
