"""The conflict subspace S of the most harmed pairs: its spectrum and its share of the damage (definitions §7)."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, INK, Figure, Row, by_category, data
from mdrl_jax.report.figures.cascade import cascade
from mdrl_jax.report.figures.layout import LEGEND, distinct, panels, side_by_side
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import estimate_columns, estimate_tips, words

LABELS = {"reward": "mean reward", "success_nll": "success NLL"}
WIDTH = 760  # px of all panels, axes apart
COLOURS = {"all": "#009E73", "inside": "#0072B2", "cross": "#D55E00", "outside": "#8C8C8C"}
SHARE = "share of the second-order damage"
# The unit in a record, to (the unit that the charts show, the factor). Other units are shown as recorded.
UNITS = {"reward": ("points", 100.0)}


def captured(records: Records) -> Figure:
    """The share c(k) = D_SᵀHD_S / DᵀHD of the second-order damage in k dimensions of S, beside that of other subspaces.

    D is the displacement from the earlier domain's peak to the end of the later stage, H the Hessian of the earlier
    domain's loss at the peak, and D_S the projection of D onto S. c(k) has no unit and may lie outside [0, 1].

    Returns:
      The figure `captured`: one chart for each pair (earlier domain, later stage) and objective, with k on the
      horizontal and c(k) on the vertical axis. Random subspaces are shown at the largest k only, by mean and central 95
      %.

    Raises:
      Absent: if `analysis/subspace.json` is missing, has no pairs, has no pair with a subspace, or no share could be
        measured.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, why = _pairs(records)
    rows = [r for pair in pairs for r in _shares(pair)]
    if all(r["estimate"] is None for r in rows):
        raise Absent(f"no share of DᵀHD could be measured: {rows[0]['reason']}")
    order, names = distinct(rows, "panel"), distinct(rows, "subspace")
    count, width = panels(len(order), 2, WIDTH)
    listed = [alt.Tooltip("k:O", title="dimensions"), *estimate_tips(["panel", "subspace"], SHARE)]
    base = alt.Chart().encode(
        x=alt.X("k:O", title="dimensions k", axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("subspace:N", sort=names),
        color=alt.Color("subspace:N", scale=by_category(names), title=None, legend=LEGEND),
        tooltip=listed,
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=0.5).encode(y=alt.Y("at:Q", title=SHARE))
    layers = alt.layer(
        zero,
        base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=SHARE), y2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=alt.Y("estimate:Q", title=SHARE)),
        data=data(rows),
    ).properties(width=width, height=230)
    chart = side_by_side(layers, "panel", order, count)
    caption = (
        "c(k) = D_SᵀHD_S / DᵀHD, with S cut at k dimensions and 95 % intervals over prompts; it may be below 0 or "
        "above 1. The vectors of S come from one half of the prompts and the shares from the other half. Random "
        f"subspaces: the central 95 % of the draws, at the largest k only. {_k90(pairs)}{why}"
    )
    return Figure("captured", "Second-order damage that the conflict subspace captures", chart, rows, caption)


def spectrum(records: Records) -> Figure:
    """Leading eigenvalues of the Hessian of the earlier domain's loss on the shared route, by half of the prompts.

    Returns:
      The figure `spectrum`: one column of charts for each objective, and in it one chart for each pair (earlier domain,
      later stage). The rank of an eigenvalue, from 1 for the largest, is horizontal and the eigenvalue vertical, with a
      line for each half. Eigenvalues of the reward are in points per unit², others in the unit of the record per unit²;
      a unit is that of a parameter. A dashed line, for the reward only, is the null: the 95th percentile of the largest
      eigenvalue with advantages permuted within groups.

    Raises:
      Absent: if `analysis/subspace.json` is missing, has no pairs, or has no pair with a subspace.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, why = _pairs(records)
    rows = [r for pair in pairs for r in _eigenvalues(pair)]
    objectives = distinct(rows, "objective")
    width = panels(len(objectives), 2, WIDTH - 60)[1]
    charts = [_spectrum([r for r in rows if r["objective"] == o], width) for o in objectives]
    dimensions = "; ".join(
        f"{_panel(pair)}: {' and '.join(str(h['measured_dimension']) for h in pair['halves'])}"
        for pair in pairs
        if pair["halves"][0]["measured_dimension"] is not None
    )
    caption = (
        "Leading eigenvalues of the Hessian of the loss on the shared route, by Lanczos on each half of the prompts. "
        "Trust them only as far as the two halves agree. Dashed, for the mean reward only: the 95th percentile of the "
        "largest eigenvalue with advantages permuted within groups. "
        + (f"Eigenvalues above 0 and this null, by half — {dimensions}. " if dimensions else "")
        + _angles(pairs)
        + why
    )
    chart = alt.hconcat(*charts, spacing=36)
    return Figure("spectrum", "Spectrum of the Hessian on the shared route", chart, rows, caption)


def ladder(records: Records) -> Figure:
    """The second-order damage ½DᵀHD, and its splits into inside + cross + outside (definitions §7).

    D and H are those of `captured`. For a projection P, inside is ½(PD)ᵀH(PD), outside the same of D − PD, and cross
    the rest. P is that on the shared route, on S and, if the measured dimension is known, on S cut at that dimension.

    Returns:
      The figure `ladder`: one column of waterfall charts for each objective, one chart for each pair (earlier domain,
      later stage). The damage is horizontal, positive for harm, and the bars are listed downwards. The first bar is the
      whole damage; the bars of each split start at 0 and add up to it. Damage of the reward is in points, other damage
      in the unit of the record.

    Raises:
      Absent: if `analysis/subspace.json` is missing, has no pairs, or has no pair with a subspace.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, why = _pairs(records)
    rows = [r for pair in pairs for r in _rungs(pair)]
    objectives = distinct(rows, "objective")
    width = panels(len(objectives), 2, WIDTH - 160, 120)[1]
    charts = []
    for objective in objectives:
        own = [r for r in rows if r["objective"] == objective]
        colours = {r["term"]: COLOURS[r["part"]] for r in own}
        title = f"second-order damage, {own[0]['unit']}"
        charts.append(cascade(own, colours, title, "panel", distinct(own, "panel"), 1, width))
    caption = (
        "The bar “all” is the second-order damage ½DᵀHD. It is split on the route, on S and, if known, on S cut at its "
        "measured dimension (measured S). In each split inside + cross + outside = all, and each bar starts where the "
        "bar before it ended. If S held all the damage, all of it would be inside. Lines: 95 % intervals over prompts. "
        f"{_residuals(pairs)}{why}"
    )
    chart = alt.hconcat(*charts, spacing=30).resolve_scale(color="independent")
    return Figure("ladder", "Second-order damage inside and outside the route and S", chart, rows, caption)


def _pairs(records: Records) -> tuple[list[dict[str, Any]], str]:
    """(pairs that have a subspace, a sentence on the pairs that have none)."""
    pairs = records.json("analysis/subspace.json")["pairs"]
    if not pairs:
        raise Absent(
            "analysis/subspace.json has no pairs: no stage measurably harmed the reward of an earlier domain, or "
            "analyze.conflicts is 0"
        )
    found = [pair for pair in pairs if "captured" in pair]
    reasons = [f"{_panel(pair)}: not measurable, {pair['reason']}" for pair in pairs if "captured" not in pair]
    if not found:
        raise Absent("; ".join(reasons))
    return found, f" {'; '.join(reasons)}." if reasons else ""


def _unit(pair: dict[str, Any]) -> tuple[str, float]:
    return UNITS.get(pair["unit"], (pair["unit"], 1.0))


def _panel(pair: dict[str, Any]) -> str:
    return f"{pair['domain']} after {pair['stage']}, {LABELS.get(pair['objective'], pair['objective'])}"


def _head(pair: dict[str, Any]) -> Row:
    names = ("domain", "stage", "objective")
    return {"panel": _panel(pair)} | {name: pair[name] for name in names}


def _shares(pair: dict[str, Any]) -> Iterator[Row]:
    for step in pair["captured"]:
        yield _head(pair) | {"subspace": "S", "k": step["k"]} | estimate_columns(step["share"])
    for baseline in pair["baselines"]:
        head = _head(pair) | {"subspace": baseline["name"]}
        if "band95" in baseline:  # random subspaces have one number per draw instead of a record
            if baseline["band95"] is not None:
                low, high = baseline["band95"]
                middle = sum(baseline["shares"]) / len(baseline["shares"])
                found = {"estimate": middle, "low": low, "high": high, "n": baseline["n"], "reason": ""}
                yield head | {"k": baseline["k"]} | found
            continue
        for step in baseline["shares"]:
            yield head | {"k": step["k"]} | estimate_columns(step["share"])


def _k90(pairs: Sequence[dict[str, Any]]) -> str:
    found = [f"{_panel(pair)}: {words(pair['k90'], '.0f')}" for pair in pairs]
    return f"Smallest k from which on c ≥ 0.9 — {'; '.join(found)}."


def _eigenvalues(pair: dict[str, Any]) -> Iterator[Row]:
    shown_unit, scale = _unit(pair)
    for number, half in enumerate(pair["halves"], 1):
        null = half["null_top_95"]
        for rank, value in enumerate(half["eigenvalues"], 1):
            head = _head(pair) | {"half": f"half {number}", "rank": rank, "unit": shown_unit}
            yield head | {"eigenvalue": scale * value, "null_95": None if null is None else scale * null}


def _spectrum(rows: Sequence[Row], width: int) -> alt.FacetChart:
    title = f"eigenvalue, {rows[0]['unit']} per unit²"
    halves, order = distinct(rows, "half"), distinct(rows, "panel")
    scale = alt.Scale(domain=halves, range=list(CATEGORIES[: len(halves)]))
    listed = [
        alt.Tooltip("panel:N"),
        alt.Tooltip("half:N"),
        alt.Tooltip("rank:Q"),
        alt.Tooltip("eigenvalue:Q", format=".3g", title=title),
        alt.Tooltip("null_95:Q", format=".3g", title="95th percentile of the null"),
    ]
    colour = alt.Color("half:N", scale=scale, title=None, legend=LEGEND)
    base = alt.Chart().encode(color=colour, tooltip=listed)
    x = alt.X("rank:Q", title="rank", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False, padding=8))
    y = alt.Y("eigenvalue:Q", title=title)
    dashed = base.transform_filter("datum.rank == 1").mark_rule(strokeDash=[5, 4], strokeWidth=1.6)
    null = [dashed.encode(y=alt.Y("null_95:Q", title=title))] if any(r["null_95"] is not None for r in rows) else []
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=0.5).encode(y=alt.Y("at:Q", title=title))
    layers = alt.layer(
        zero,
        *null,
        base.mark_line(opacity=0.5).encode(x=x, y=y),
        base.mark_point(filled=True, size=45, opacity=1).encode(x=x, y=y),
        data=data(rows),
    ).properties(width=width, height=230)
    return side_by_side(layers, "panel", order, 1)


def _angles(pairs: Sequence[dict[str, Any]]) -> str:
    found = []
    for pair in pairs:
        mean = pair["angles"]["mean"]
        if mean["estimate"] is None:
            continue
        null = mean["null"]
        found.append(f"{_panel(pair)}: {mean['estimate']:.2f} rad (random {null[0]:.2f}–{null[1]:.2f})")
    return f"Mean angle between the subspaces of the two halves — {'; '.join(found)}." if found else ""


def _rungs(pair: dict[str, Any]) -> Iterator[Row]:
    shown_unit, scale = _unit(pair)
    scale *= 0.5  # the damage is ½DᵀHD
    head = _head(pair) | {"unit": shown_unit}
    yield head | {"term": "all", "part": "all", "start": 0.0} | estimate_columns(pair["total"], scale)
    for rung in pair["ladder"]:
        start = 0.0
        for part, key in (("inside", "within"), ("cross", "cross"), ("outside", "outside")):
            where = {"term": f"{rung['rung']}: {part}", "part": part, "start": start}
            yield head | where | estimate_columns(rung[key], scale)
            start += scale * rung[key]["estimate"]


def _residuals(pairs: Sequence[dict[str, Any]]) -> str:
    found = []
    for pair in pairs:
        shown_unit, scale = _unit(pair)
        found.append(f"{_panel(pair)}: {words(pair['residual'], scale=scale)} {shown_unit}")
    return f"Residual |½DᵀHD − ½D_SᵀHD_S| — {'; '.join(found)}."
