"""How charts are laid out: small charts side by side, and maps of tensors by layer."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import Row

Layers = alt.LayerChart | alt.FacetChart  # what Altair says that it makes of layers
LEGEND = alt.Legend(orient="bottom", symbolOpacity=1)
# Kinds of tensors in the order in which a token meets them.
MODULES = ("embedding", "attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down", "norm", "unembedding")
NO_LAYER = "–"  # where a map shows a tensor outside the layers


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """The values of a column, each once, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def panels(n: int, most: int, total: int, gap: int = 20) -> tuple[int, int]:
    """Columns of n small charts, at most `most`, and the width of each, so that they take `total` px in all."""
    count = max(min(n, most), 1)
    return count, int((total - gap * (count - 1)) / count)


def side_by_side(chart: Layers, column: str, order: Sequence[str], count: int, **more: Any) -> alt.FacetChart:
    """The chart once for each value of a column, in the given order, `count` in a line; `more` goes to Altair."""
    header = alt.Header(title=None, labelFontWeight=600, labelAnchor="start")
    return chart.facet(facet=alt.Facet(f"{column}:N", sort=list(order), header=header), columns=count, **more)


def tensor_axes(rows: Sequence[Row]) -> tuple[alt.X, alt.Y, int, int]:
    """Axes of a map of tensors, layers across and kinds down, and the numbers of both."""
    layers = sorted(distinct(rows, "layer"), key=lambda x: -1 if x == NO_LAYER else int(x))
    kinds = by_module(distinct(rows, "kind"))
    x = alt.X("layer:O", sort=layers, title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    return x, alt.Y("kind:N", sort=kinds, title=None), len(layers), len(kinds)


def by_module(kinds: Iterable[str]) -> list[str]:
    """Kinds of tensors in the order of `MODULES`; biases and norms of a projection come after it."""

    def place(kind: str) -> tuple[int, str]:
        known = kind if kind in MODULES else kind.split("_")[0]
        return (MODULES.index(known) if known in MODULES else len(MODULES), kind)

    return sorted(set(kinds), key=place)
