"""Predicted against measured damage over the pairs of several seeds, as a table and as a picture (definitions §6).

Every point is a pair (earlier domain, later stage) of one seed. Expansions of one segment, and of as many as were
made, are held against the same measured damage. Correlations and R² are taken within each seed and averaged, with
Student's t over seeds (definitions §12); R² is that of the line of equality, so it may be negative.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mdrl_jax.analysis.nulls import r_squared, spearman
from mdrl_jax.analysis.statistics import Estimate, over_seeds
from mdrl_jax.errors import UserError
from mdrl_jax.records import read_json, write_bytes

SHOWN = {"reward": ("mean reward, points", 100.0), "success_nll": ("success NLL, nats", 1.0)}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
DPI = 150


def load(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The `analysis/damage.json` and `claims.json` of each folder; none where no folder has an analysis.

    Raises:
      UserError: where some folders have one and others do not.
    """
    have = [w for w in workdirs if (Path(w) / "claims.json").exists()]
    if not have:
        return []
    if len(have) < len(workdirs):
        missing = next(w for w in workdirs if w not in have)
        raise UserError(f"{missing} has no claims.json, the other folders have; run its stage analyze first")
    return [
        read_json(Path(w) / "analysis" / "damage.json") | {"claims": read_json(Path(w) / "claims.json")}
        for w in workdirs
    ]


def text(damage: Sequence[dict[str, Any]]) -> str:
    """Agreement by objective and number of segments, where the local model ends, and the verdicts of each seed."""
    lines = ["predicted against measured damage: Spearman and R², means over seeds [95 %]"]
    for name, (label, _) in SHOWN.items():
        for segments in (1, 2, 4, 8):
            points = [p for p in _points(damage, name) if p["segments"] == segments]
            if points:
                figures = ", ".join(f"{k} {_shown(e)}" for k, e in agreement(points).items())
                lines.append(f"  {label}, {segments} segments, {len(points)} pairs: {figures}")
    lines += [
        "",
        "second-order model of the success NLL: first α at which it is measurably off by over 20 %, each seed",
    ]
    for domain, stage in dict.fromkeys((p["domain"], p["stage"]) for d in damage for p in d["pairs"]):
        found = [p["objectives"]["success_nll"]["breaks_at"] for d in damage for p in _pair(d, domain, stage)]
        lines.append(f"  {domain} after {stage}: {', '.join('holds' if x is None else f'{x:g}' for x in found)}")
    lines += ["", "claims, each seed"]
    by_id = [{c["id"]: c for c in d["claims"]} for d in damage]
    for name in sorted({name for claims in by_id for name in claims}):
        found = [claims.get(name) for claims in by_id]
        verdicts = ", ".join("–" if c is None else c["verdict"] for c in found)
        known = [c["estimate"] for c in found if c is not None and c["estimate"] is not None]
        mean = f"; figure {_shown(over_seeds(known), 3)} over seeds" if len(known) > 1 else ""
        text = next(c["claim"] for c in found if c is not None)
        lines.append(f"  {name} {text}: {verdicts}{mean}")
    return "\n".join(lines) + "\n"


def agreement(points: Sequence[dict[str, Any]]) -> dict[str, Estimate | None]:
    """Spearman and R² of predicted and measured damage with their intervals over seeds."""
    x, y, seeds = ([p[k] for p in points] for k in ("predicted", "measured", "seed"))
    return {"Spearman": spearman(x, y, seeds), "R²": r_squared(x, y, seeds)}


def save_plot(path: str | Path, damage: Sequence[dict[str, Any]]) -> None:
    """Writes the picture as PNG: hollow one segment, filled as many as were made; bars are 95 % over prompts."""
    figure = Figure(figsize=(10, 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    pairs = list(dict.fromkeys((p["domain"], p["stage"]) for d in damage for p in d["pairs"]))
    for axes, (name, (label, scale)) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        points = list(_points(damage, name))
        most = max((p["segments"] for p in points), default=1)
        for p in points:
            if p["segments"] not in (1, most):
                continue
            colour = COLOURS[pairs.index(p["pair"]) % len(COLOURS)]
            style = {"mfc": "white"} if p["segments"] == 1 else {}
            bars = {k: _bars(p[f"{k}_ci95"], p[k], scale) for k in ("predicted", "measured")}
            axes.errorbar(
                scale * p["predicted"], scale * p["measured"], xerr=bars["predicted"], yerr=bars["measured"],
                fmt="o", ms=5, lw=0.7, color=colour, **style,
            )  # fmt: skip
        ends = axes.get_xlim(), axes.get_ylim()
        low, high = min(e[0] for e in ends), max(e[1] for e in ends)
        axes.plot([low, high], [low, high], color="0.6", lw=1, zorder=0)
        axes.set_xlabel(f"predicted damage, {label}")
        axes.set_ylabel(f"measured damage, {label}")
        axes.set_title(f"hollow: one segment; filled: {most}", fontsize=9)
    handles = [
        figure.axes[0].plot([], [], "o", color=COLOURS[i % len(COLOURS)], label=f"{d} after {s}")[0]
        for i, (d, s) in enumerate(pairs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(pairs), fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _points(damage: Sequence[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """One point a pair, seed and number of segments."""
    for d in damage:
        for pair in d["pairs"]:
            for row in pair["objectives"][name].get("segments", ()):
                predicted, measured = row["predicted"], row["measured"]
                if None not in (predicted["estimate"], measured["estimate"]):
                    yield {
                        "pair": (pair["domain"], pair["stage"]),
                        "seed": d["settings"]["seed"],
                        "segments": row["segments"],
                        "predicted": predicted["estimate"],
                        "measured": measured["estimate"],
                        "predicted_ci95": predicted["ci95"],
                        "measured_ci95": measured["ci95"],
                    }


def _pair(damage: dict[str, Any], domain: str, stage: str) -> list[dict[str, Any]]:
    return [p for p in damage["pairs"] if (p["domain"], p["stage"]) == (domain, stage)]


def _bars(ci95: Sequence[float] | None, value: float, scale: float) -> Any:
    if ci95 is None:
        return None
    return np.array([[max(value - ci95[0], 0.0)], [max(ci95[1] - value, 0.0)]]) * scale


def _shown(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
