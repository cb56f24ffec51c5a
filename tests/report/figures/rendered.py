"""What every figure must be: a valid specification that draws, text of 12 px or more, 900 px wide at most."""

import csv
import io
import json
import re
from typing import Any

import vl_convert

from mdrl_jax.report.figure import Figure


def check(figure: Figure) -> dict[str, Any]:
    """Checks a figure and returns its specification."""
    spec = json.loads(figure.json())  # Altair validates as it makes it; JSON without NaN
    svg = vl_convert.vegalite_to_svg(json.dumps(spec))
    sizes = [float(x) for x in re.findall(r'font-size="([\d.]+)px"', svg)]
    assert sizes and min(sizes) >= 12
    width = re.search(r'<svg[^>]* width="([\d.]+)"', svg)
    assert width and float(width[1]) <= 900
    assert "NaN" not in svg and "undefined" not in svg
    assert figure.rows and all(list(row) == list(figure.rows[0]) for row in figure.rows)
    assert len(list(csv.reader(io.StringIO(figure.csv())))) == 1 + len(figure.rows)
    assert figure.caption and figure.title
    return spec


def drawn(spec: Any) -> list[dict[str, Any]]:
    """All rows of all data of a specification."""
    return [row for rows in spec.get("datasets", {}).values() for row in rows]


def texts(spec: Any) -> str:
    """What a reader may see as text, in one piece: of the drawn SVG."""
    return " ".join(re.findall(r"<text[^>]*>([^<]*)", vl_convert.vegalite_to_svg(json.dumps(spec))))


def figure(estimate: float | None, half: float | None = None, unit: str = "points", **more: Any) -> dict[str, Any]:
    """A figure of a record, with its interval half wide on each side."""
    ends = None if estimate is None or half is None else [estimate - half, estimate + half]
    return {"estimate": estimate, "ci95": ends, "null": None, "n": 40, "unit": unit} | more
