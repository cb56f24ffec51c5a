"""A rollback's sweep as a picture: gain of the kept domain against loss of the donor, beside the controls (C7)."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mdrl_jax.records import write_bytes

COLOURS = {"adding": "#0072B2", "removing": "#D55E00", "opposition": "#009E73", "magnitude": "#CC79A7"}
CONTROLS = {"random": ":", "matched": "--", "largest": "-", "out_of_route": "-.", "whole": (0, (5, 1, 1, 1, 1, 1))}


def save_tradeoff(path: str | Path, record: Mapping[str, Any]) -> None:
    """Draws `recovery/rollback-A-B.json`: every point of the sweep, the controls' curves, and the chosen point."""
    figure = Figure(figsize=(8.5, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for rule, colour in COLOURS.items():
        for place, filled in (("all", True), ("route", False)):
            found = [p for p in record["points"] if (p["rule"], p["place"]) == (rule, place)]
            if found:
                where = "all coordinates" if filled else "shared route"
                face = colour if filled else "none"
                axes.plot(*_xy(found), "o", ms=6, mfc=face, color=colour, label=f"{rule}, {where}")
    for name, curve in record.get("curves", {}).items():
        x, y = _xy(sorted(curve, key=lambda p: p["loss"]["estimate"]))
        label = f"control: {name.replace('_', ' ')}"
        axes.plot(x, y, ls=CONTROLS.get(name, "-"), marker=".", lw=1.2, color="0.35", label=label)
    chosen = record["chosen"]
    if chosen:
        x, y = _xy([chosen])
        spread = [
            [[v["estimate"] - v["ci95"][0]], [v["ci95"][1] - v["estimate"]]] for v in (chosen["loss"], chosen["gain"])
        ]
        style = {"ms": 15, "mec": "k", "mfc": COLOURS.get(chosen["rule"], "k"), "ecolor": "k", "lw": 1}
        axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="*", label="chosen", zorder=5, **style)
    axes.axvline(record["limit"], color="0.7", lw=1, zorder=0)
    axes.axhline(0, color="0.7", lw=1, zorder=0)
    axes.set_xlabel(f"loss of {record['donor']}, points on validation prompts (line: the limit)")
    axes.set_ylabel(f"gain of {record['domain']}, points on validation prompts")
    axes.set_title(f"{record['stage']}: part of {record['donor']}'s edit taken back", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _xy(points: Any) -> tuple[list[float], list[float]]:
    return [p["loss"]["estimate"] for p in points], [p["gain"]["estimate"] for p in points]
