"""That a figure is drawable and all its rows are in its chart."""

from typing import Any

from mdrl_jax.report.figure import Figure
from tests.report.figures.rendered import check, drawn


def whole(figure: Figure) -> dict[str, Any]:
    """Checks a figure, and that every row is among the chart's data; returns its specification."""
    spec = check(figure)
    held = drawn(spec)
    assert all(any(row.items() <= r.items() for r in held) for row in figure.rows)
    return spec
