"""The layout of charts: small charts side by side, and maps of tensors by layer."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import Row

Layers = alt.LayerChart | alt.FacetChart  # the type that Altair declares for layered charts
LEGEND = alt.Legend(symbolOpacity=1)
# Names of charts for the page. The parts of an aligned chart share the names of their lines, so a narrow screen keeps
# them side by side. A fixed chart has names at computed places, so it keeps its size.
ALIGNED, FIXED = "aligned", "fixed"
# Kinds of tensors, in the order in which the forward pass uses them.
MODULES = (
    *("embedding", "attn_norm", "q", "k", "v", "o", "attn_post_norm"),
    *("mlp_norm", "gate", "up", "down", "mlp_post_norm", "norm", "unembedding"),
)
NO_LAYER = "–"  # the layer that a map shows for a tensor outside the layer stack


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """The values of a column, each once, in the order of the rows. Raises KeyError if a row lacks the column."""
    return list(dict.fromkeys(row[column] for row in rows))


def panels(n: int, most: int, total: int, gap: int = 20) -> tuple[int, int]:
    """The number of columns for small charts, and their width.

    Args:
      n: number of charts.
      most: the largest number of columns.
      total: px of all columns with the gaps between them.
      gap: px between two columns.

    Returns:
      (number of columns, the smaller of `n` and `most` but at least 1; px of each, rounded down).
    """
    count = max(min(n, most), 1)
    return count, int((total - gap * (count - 1)) / count)


def side_by_side(
    chart: Layers, column: str, order: Sequence[str], count: int, before: str = "", **more: Any
) -> alt.FacetChart:
    """Repeats a chart for each value of a column.

    Args:
      chart: the chart with its data.
      column: the column whose values tell the small charts apart.
      order: the values, in the order of the small charts.
      count: number of small charts in a line.
      before: a value that has ", " and this text has a second line from this text on; "" for none. A long line would
        leave a narrow screen, and the chart would shrink in vain.
      **more: further arguments of Altair's `facet`.

    Returns:
      One chart that holds the small charts, each under its value of the column.
    """
    header = alt.Header(title=None, labelFontWeight=600, labelAnchor="start")
    if before:
        header.labelExpr = f"split(replace(datum.value, ', {before}', '\\n{before}'), '\\n')"
    return chart.facet(facet=alt.Facet(f"{column}:N", sort=list(order), header=header), columns=count, **more)


def tensor_axes(rows: Sequence[Row]) -> tuple[alt.X, alt.Y, int, int]:
    """The axes of a map of tensors.

    Args:
      rows: the data of the map, with the columns "layer" (the number of the layer as text, or `NO_LAYER`) and "kind"
        (the kind of tensor, for example "gate").

    Returns:
      (x axis of layers, y axis of kinds, number of layers, number of kinds). `NO_LAYER` counts as a layer, the first
      one. Other layers are in the order of their numbers, kinds in that of `by_module`.

    Raises:
      ValueError: if a layer is neither a whole number nor `NO_LAYER`.
    """
    layers = sorted(distinct(rows, "layer"), key=lambda x: -1 if x == NO_LAYER else int(x))
    kinds = by_module(distinct(rows, "kind"))
    x = alt.X("layer:O", sort=layers, title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    return x, alt.Y("kind:N", sort=kinds, title=None), len(layers), len(kinds)


def by_module(kinds: Iterable[str]) -> list[str]:
    """Sorts kinds of tensors in the order of `MODULES`, each once; a projection's bias or norm comes right after it.

    Kinds that `MODULES` does not have come last, in the order of the alphabet.
    """

    def place(kind: str) -> tuple[int, str]:
        known = kind if kind in MODULES else kind.split("_")[0]
        return (MODULES.index(known) if known in MODULES else len(MODULES), kind)

    return sorted(set(kinds), key=place)
