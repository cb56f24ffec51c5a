"""Predicted against measured damage over the pairs of several seeds, as a table and as a picture (definitions §6).

A point is a pair (earlier domain, later stage) of one seed. The picture compares two predictions with the measured
damage: the expansion in one segment, and the expansion in the largest number of segments. Correlations and R² are taken
within each seed and averaged, with the interval over seeds of definitions §12. R² is that of the line of equality, so
it may be negative.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from mdrl_jax.errors import UserError
from mdrl_jax.records import read_json, regular
from mdrl_jax.report.figure import INK, Figure, by_category, data
from mdrl_jax.report.intervals import columns, near, tips
from mdrl_jax.stats.estimate import Estimate, figure_text, over_seeds
from mdrl_jax.stats.tests import r_squared, spearman

SHOWN = {"reward": ("mean reward, points", 100.0), "success_nll": ("success NLL, nats", 1.0)}
SIDE = 330  # px of a panel


def load(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Reads the analysis of each work folder.

    Args:
      workdirs: work folders, one for each seed.

    Returns:
      For each folder the content of its `analysis/damage.json`, with that of `claims.json` under "claims". The list is
      empty if no folder has an `analysis/damage.json`: recoveries alone write a `claims.json` too.

    Raises:
      UserError: if only some of the folders have an `analysis/damage.json`, or if a record is not valid JSON or
        `claims.json` is missing. The fields of the records are not checked.
    """
    have = [w for w in workdirs if (Path(w) / "analysis" / "damage.json").exists()]
    if not have:
        return []
    if len(have) < len(workdirs):
        missing = next(w for w in workdirs if w not in have)
        raise UserError(f"{missing} has no analysis/damage.json, others have one; run its stage analyze first")
    return [
        read_json(regular(Path(w) / "analysis" / "damage.json"))
        | {"claims": read_json(regular(Path(w) / "claims.json"))}
        for w in workdirs
    ]


def text(damage: Sequence[dict[str, Any]]) -> str:
    """The table as text, which ends with a newline.

    It has, for each objective and 1, 2, 4 and 8 segments, as far as there are points, Spearman and R² of predicted and
    measured damage (`agreement`), with two decimals. Then it has, for each pair and seed, the α from which on the
    second-order prediction of the success NLL fails ("holds" if there is none, "not measured" without this objective).
    Last come the verdict of each claim in each seed ("–" without a record), and the mean of its figure over seeds, if
    two seeds have one, with three decimals.

    Args:
      damage: what `load` returns, not empty.

    Raises:
      KeyError: if a record lacks a field.
    """
    lines = ["predicted against measured damage: Spearman and R², means over seeds [95 %]"]
    for name, (label, _) in SHOWN.items():
        for segments in (1, 2, 4, 8):
            points = [p for p in _points(damage, name) if p["segments"] == segments]
            if points:
                figures = ", ".join(f"{k} {_shown(e)}" for k, e in agreement(points).items())
                many = "s" if segments > 1 else ""
                lines.append(f"  {label}, {segments} segment{many}, {len(points)} pairs: {figures}")
    lines += [
        "",
        "success NLL: first α from which the second-order prediction is measurably off by over 20 %, each seed",
    ]
    for domain, stage in dict.fromkeys((p["domain"], p["stage"]) for d in damage for p in d["pairs"]):
        found = [p["objectives"].get("success_nll", {}) for d in damage for p in _pair(d, domain, stage)]
        at = [x.get("breaks_at", "not measured") for x in found]
        said = ["holds" if x is None else x if isinstance(x, str) else f"{x:g}" for x in at]
        lines.append(f"  {domain} after {stage}: {', '.join(said)}")
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
    """Agreement of predicted with measured damage, with intervals over seeds.

    Args:
      points: for each pair and seed {"predicted", "measured", "seed"}: predicted and measured damage in one unit, and
        the seed of the run. More keys do no harm.

    Returns:
      {"Spearman", "R²"}: means over seeds; None for a figure that cannot be measured in one of the seeds, because all
      measured (Spearman: or all predicted) damages are equal, or if there are no points. If all points have one seed,
      they are the figures of that seed, with intervals over its pairs; with fewer than five pairs the interval is the
      whole line.
    """
    x, y, seeds = ([p[k] for p in points] for k in ("predicted", "measured", "seed"))
    return {"Spearman": spearman(x, y, seeds), "R²": r_squared(x, y, seeds)}


def picture(damage: Sequence[dict[str, Any]]) -> Figure:
    """Predicted against measured damage, one panel for each objective: the reward in points, the success NLL in nats.

    The predicted damage is horizontal, the measured damage vertical, and positive is harm. A hollow point is the
    expansion in one segment, a filled point the one in the largest number of segments. Colours tell the pairs (earlier
    domain, later stage); a pair has a point of each kind for each seed. Points without a prediction or a measurement
    are left out.

    Args:
      damage: what `load` returns, not empty.

    Returns:
      The figure `damage-over-seeds`; its rows are the points.

    Raises:
      KeyError: if a record lacks a field.
    """
    pairs = list(dict.fromkeys(f"{p['domain']} after {p['stage']}" for d in damage for p in d["pairs"]))
    rows, panels = [], []
    for name, (label, scale) in SHOWN.items():
        points = list(_points(damage, name))
        most = max((p["segments"] for p in points), default=1)
        some = [_row(p, name, scale) for p in points if p["segments"] in (1, most)]
        rows += some
        panels.append(_panel(some, label, pairs, most))
    seeds = ", ".join(str(d["settings"]["seed"]) for d in damage)
    caption = (
        f"A point is a pair of an earlier domain and a later stage of one seed (seeds {seeds}). On the line, the "
        "damage measured at the end of the stage equals the prediction of the second-order expansion. Bars: 95 % "
        "intervals over prompts; one that reaches the edge goes on."
    )
    return Figure(
        "damage-over-seeds", "Predicted against measured damage", alt.hconcat(*panels, spacing=30), rows, caption
    )


def _row(point: dict[str, Any], objective: str, scale: float) -> dict[str, Any]:
    head = {"pair": " after ".join(point["pair"]), "seed": point["seed"], "objective": objective}
    head["segments"] = point["segments"]
    for key in ("predicted", "measured"):
        head |= columns(key, {"estimate": point[key], "ci95": point[f"{key}_ci95"]}, scale)
    return head


def _panel(rows: Sequence[dict[str, Any]], label: str, pairs: Sequence[str], most: int) -> Any:
    low, high = near(rows, ("predicted", "measured"))
    scale = alt.Scale(domain=[low, high], nice=True)
    titles = {key: f"{key} damage, {label}" for key in ("predicted", "measured")}
    x = alt.X("predicted:Q", title=titles["predicted"], scale=scale)
    y = alt.Y("measured:Q", title=titles["measured"], scale=scale)
    colour = alt.Color(
        "pair:N", title=None, scale=by_category(pairs),
        legend=alt.Legend(orient="bottom", columns=4, symbolOpacity=1, symbolType="circle"),
    )  # fmt: skip
    tip = [alt.Tooltip("pair:N"), alt.Tooltip("seed:Q"), alt.Tooltip("segments:Q")]
    tip += [t for key in titles for t in tips(key, titles[key], ".3g")]
    base = alt.Chart(data(rows)).encode(color=colour, tooltip=tip)
    line = alt.Chart(data([{"at": low}, {"at": high}])).mark_line(color=INK, opacity=0.5, strokeWidth=1.5)
    across, up = alt.X("predicted_low:Q", title=titles["predicted"]), alt.Y("measured_low:Q", title=titles["measured"])
    return alt.layer(
        line.encode(x=alt.X("at:Q", scale=scale), y=alt.Y("at:Q", scale=scale)),
        base.mark_rule(opacity=0.6, clip=True).encode(x=across, x2="predicted_high:Q", y=y),
        base.mark_rule(opacity=0.6, clip=True).encode(x=x, y=up, y2="measured_high:Q"),
        base.mark_point(size=45, opacity=1, fill="white").transform_filter(alt.datum.segments == 1).encode(x=x, y=y),
        base.mark_point(size=45, opacity=1, filled=True).transform_filter(alt.datum.segments == most).encode(x=x, y=y),
    ).properties(width=SIDE, height=SIDE, title=f"hollow: one segment; filled: {most}" if most > 1 else "one segment")


def _points(damage: Sequence[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """One point for each pair, seed and number of segments, if prediction and measurement have an estimate."""
    for d in damage:
        for pair in d["pairs"]:
            for row in pair["objectives"].get(name, {}).get("segments", ()):
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


def _shown(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return "–"
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return f"{estimate.value:.{digits}f} (no interval)"
    return figure_text(estimate.value, (estimate.low, estimate.high), f".{digits}f")
