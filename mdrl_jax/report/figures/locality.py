"""How local the theory is: figures of edits of several sizes from one peak (definitions §7, stage `locality-A`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from mdrl_jax.errors import UserError
from mdrl_jax.records import read_json, regular
from mdrl_jax.report.figure import CATEGORIES, HALF, INK, QUIET, Figure, Row, Table, data
from mdrl_jax.report.figures.layout import LEGEND, Layers, distinct, panels
from mdrl_jax.report.folder import Records
from mdrl_jax.report.intervals import estimate_columns, estimate_tips, words

R2, CURVATURE, UNDONE = "R² of one expansion", "curvature share of the damage", "share undone by removing P_S D"
RATIO = "predicted / measured damage"
KEYS = {RATIO: ("ratio",), R2: ("r2",), CURVATURE: ("curvature_share",), UNDONE: ("removal", "undone")}
LOWEST = -1.0  # an R² below it is drawn here


def locality(records: Records) -> list[Figure | Table]:
    """The validity of the theory against the length of an edit, for each record `analysis/locality-A.json`.

    Returns:
      For each record a figure `locality-A` and a table `locality-A-edits`. The figure has a chart each of predicted /
      measured damage, R², curvature share and share undone against ‖D‖ on a log scale, with a point for each edit and a
      colour for each optimizer. Values below −1 are drawn at −1. The table lists the edits, the shortest first.

    Raises:
      Absent: if there is no such record.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found: list[Figure | Table] = []
    for path in records.files("analysis/locality-*.json"):
        record = records.json(path)
        found += [_figure([record]), _table(record)]
    return found


def over_seeds(workdirs: Sequence[str | Path]) -> Figure | None:
    """The figure of `locality` with the edits of several seeds together.

    Args:
      workdirs: work folders, one for each seed, of the same stage `locality-A`.

    Returns:
      The figure of the first record in the first folder; None if no folder has a record.

    Raises:
      UserError: if only some of the folders have this record, or one is not valid JSON.
      KeyError: if a record lacks a field.
    """
    files = [sorted((Path(w) / "analysis").glob("locality-*.json")) for w in workdirs]
    name = next((found[0].name for found in files if found), None)
    if name is None:
        return None
    for workdir, found in zip(workdirs, files, strict=True):
        if name not in [file.name for file in found]:
            raise UserError(f"{workdir} has no analysis/{name}, another folder has one; run its stage first")
    return _figure([read_json(regular(Path(w) / "analysis" / name)) for w in workdirs])


def _rows(record: dict[str, Any]) -> Iterator[Row]:
    for edit in sorted(record["edits"], key=lambda e: e["norm"]):
        head = {"edit": edit["stage"], "trained": _trained(edit), "norm": edit["norm"], "by": edit["by"]}
        for panel, keys in KEYS.items():
            figure: Any = edit
            for key in keys:
                figure = figure.get(key, {"estimate": None, "ci95": None, "reason": "no eigenvector was found"})
            row = head | {"panel": panel} | estimate_columns(figure)
            drawn = {f"drawn_{k}": None if row[k] is None else max(row[k], LOWEST) for k in ("estimate", "low", "high")}
            yield row | drawn


def _trained(edit: dict[str, Any]) -> str:
    """How an edit was trained, such as "GRPO, adamw on qa, learning rate 0.0004, 22 steps"."""
    domains = ", ".join(edit["domains"])
    return f"{edit['by']} on {domains}, learning rate {edit['learning_rate']:g}, {edit['steps']} steps"


def _figure(seeds: Sequence[dict[str, Any]]) -> Figure:
    """The figure of one record, or of those of several seeds."""
    rows, domain = [row for record in seeds for row in _rows(record)], seeds[0]["domain"]
    by, width = distinct(rows, "by"), panels(len(KEYS), 2, HALF, 60)[1]
    colour = alt.Color("by:N", scale=alt.Scale(domain=by, range=list(CATEGORIES[: len(by)])), title=None, legend=LEGEND)
    charts = [_chart([r for r in rows if r["panel"] == panel], panel, colour, width) for panel in KEYS]
    chart = alt.concat(*charts, columns=2, spacing=24).resolve_scale(color="shared")
    lengths = [edit["norm"] for record in seeds for edit in record["edits"]]
    points = f"The points are the edits of {len(seeds)} seeds. " if len(seeds) > 1 else ""
    caption = (
        f"{points}Every edit starts at the peak of {domain}. The damage is the rise of −log π of its successes, and "
        "one second-order expansion at the peak predicts it. R² compares the two over prompts: 1 is exact, 0 is as "
        "good as the mean, below 0 is worse. The curvature share is the part of the damage that the gradient at the "
        "peak does not explain. S is spanned by the leading eigenvectors of the Hessian over all parameters, found on "
        f"one half of the prompts and judged on the other. Bars: 95 % intervals over prompts. ‖D‖ from "
        f"{min(lengths):.3g} to {max(lengths):.3g}. Values below {LOWEST:g} are drawn there; the table has them."
    )
    return Figure(
        f"locality-{domain}", f"How local the theory is: edits from the peak of {domain}", chart, rows, caption
    )


def _chart(rows: Sequence[Row], panel: str, colour: alt.Color, width: int) -> Layers:
    x = alt.X("norm:Q", title="‖D‖", scale=alt.Scale(type="log", padding=12))
    y = alt.Y("drawn_estimate:Q", title=panel)
    tips = [alt.Tooltip("trained:N"), alt.Tooltip("norm:Q", format=".3g"), *estimate_tips(["edit"], panel)]
    base = alt.Chart(data(rows)).encode(x=x, color=colour, tooltip=tips)
    lines = alt.Chart(data([{"at": at} for at in (0, 1)])).mark_rule(color=INK, opacity=QUIET).encode(y="at:Q")
    return alt.layer(
        lines,
        base.mark_rule().encode(y=alt.Y("drawn_low:Q", title=panel), y2="drawn_high:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(y=y),
    ).properties(width=width, height=180)


def _table(record: dict[str, Any]) -> Table:
    domain = record["domain"]
    head = (
        "edit", "trained", "‖D‖", "unchanged in bfloat16", "score", f"{domain} lost, points", "damage, nats",
        "predicted, nats", "R²", "null of R²", "curvature share", "k", "undone", "‖P_S D‖²/‖D‖²",
    )  # fmt: skip
    rows = []
    for edit in sorted(record["edits"], key=lambda e: e["norm"]):
        removal = edit.get("removal", {})
        null = edit["r2"].get("null")
        rows.append(
            (
                edit["stage"],
                _trained(edit),
                f"{edit['norm']:.3g}",
                words(edit["unchanged"], ".2f"),
                "; ".join(words(x, ".1f") for x in edit["scores"].values()),
                words(edit["lost"], ".1f"),
                words(edit["damage"], ".3g"),
                words(edit["predicted"], ".3g"),
                words(edit["r2"], ".2f"),
                f"{null[0]:.2f} to {null[1]:.2f}" if isinstance(null, list) else "–",
                words(edit["curvature_share"], ".2f"),
                " and ".join(map(str, removal.get("k", []))) or "–",
                words(removal["undone"], ".2f") if removal else "–",
                f"{removal['share_of_norm']:.4f}" if removal else "–",
            )
        )
    caption = (
        f"Damage and predictions are of −log π of the successes of {domain} at its peak, in nats a completion. The "
        "null of R² permutes the predictions among the prompts."
    )
    title = f"Edits from the peak of {domain}"
    return Table(f"locality-{domain}-edits", title, head, rows, caption, head[2:])
