"""The conflict subspace S of the most harmed pairs: its spectrum and its share of the damage (definitions §7)."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, HALF, INK, QUIET, Figure, Row, by_category, data
from mdrl_jax.report.figures.cascade import cascade
from mdrl_jax.report.figures.layout import LEGEND, distinct, panels, side_by_side
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import estimate_columns, estimate_tips, words

LABELS = {"reward": "mean reward", "success_nll": "success NLL"}
COLOURS = {"all": "#009E73", "inside": "#0072B2", "cross": "#D55E00", "outside": CATEGORIES[6]}
ROUTE = "route"  # the place on the axis of dimensions for the whole route
SHARE = "share of the second-order damage"
# The unit in a record, to (the unit that the charts show, the factor). Other units are shown as recorded.
UNITS = {"reward": ("points", 100.0)}


def captured(records: Records) -> Figure:
    """The share c(k) = D_SᵀHD_S / DᵀHD of the second-order damage in k dimensions of S, beside that of other subspaces.

    D is the displacement from the earlier domain's peak to the end of the later stage, H the Hessian of the earlier
    domain's loss at the peak, and D_S the projection of D onto S. c(k) has no unit and may lie outside [0, 1].

    Returns:
      The figure `captured`: one chart for each pair (earlier domain, later stage) and objective, with k on the
      horizontal and c(k) on the vertical axis. Random subspaces are shown at the largest k only, by their mean and the
      central 95 %.

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
    rows = [r for r in rows if any(r["panel"] == s["panel"] and s["estimate"] is not None for s in rows)]
    order, names = distinct(rows, "panel"), distinct(rows, "subspace")
    x = alt.X("k:O", title="dimensions k", axis=alt.Axis(labelAngle=0))
    chart = _by_dimension(rows, x, "subspace", names, order, SHARE, [0])
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
      a unit is that of a parameter. A dashed line is the null, where it was measured: the 95th percentile of the
      largest eigenvalue with permuted rewards.

    Raises:
      Absent: if `analysis/subspace.json` is missing, has no pairs, or has no pair with a subspace.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, why = _pairs(records)
    rows = [r for pair in pairs for r in _eigenvalues(pair)]
    objectives = distinct(rows, "objective")
    width = panels(len(objectives), 2, HALF - 40)[1]
    charts = [_spectrum([r for r in rows if r["objective"] == o], width) for o in objectives]
    dimensions = "; ".join(
        f"{_panel(pair)}: {' and '.join(str(h['measured_dimension']) for h in pair['halves'])}"
        for pair in pairs
        if pair["halves"][0]["measured_dimension"] is not None
    )
    caption = (
        "Leading eigenvalues of the Hessian of the loss on the shared route, by Lanczos on each half of the prompts. "
        "Only pairs that have converged are shown; trust them only as far as the two halves agree. Dashed: the 95th "
        "percentile of the largest eigenvalue with rewards permuted, within prompts for the mean reward and across "
        "prompts for the success NLL. "
        + (f"Eigenvalues above 0 and this null, by half — {dimensions}. " if dimensions else "")
        + _no_null(pairs)
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
    charts = []
    for objective in objectives:
        own = [r for r in rows if r["objective"] == objective]
        colours = {r["term"]: COLOURS[r["part"]] for r in own}
        title = f"second-order damage, {own[0]['unit']}"
        charts.append(cascade(own, colours, title, "panel", distinct(own, "panel"), 1, 330))
    caption = (
        "The bar “all” is the second-order damage ½DᵀHD. It is split on the route, on S and, if known, on S cut at its "
        "measured dimension (measured S). In each split inside + cross + outside = all, and each bar starts where the "
        "bar before it ended. If S held all the damage, all of it would be inside. Lines: 95 % intervals over prompts. "
        f"{_residuals(pairs)}{why}"
    )
    chart = alt.vconcat(*charts, spacing=20).resolve_scale(color="independent")
    return Figure("ladder", "Second-order damage inside and outside the route and S", chart, rows, caption)


def removal(records: Records) -> Figure:
    """The damage that is left when the displacement's part in S is removed, by the number of dimensions removed.

    The damage is the rise of −log π of successes from the earlier domain's peak to the end of the later stage. Random
    pieces and the complement of S are removed at the norm of the part in S of the largest dimension.

    Returns:
      The figure `removal`: one chart for each pair (earlier domain, later stage), objective and space in which S was
      sought. The number of dimensions is horizontal, with 0 for the whole damage and "route" for the whole part of the
      displacement in the space. The damage left is vertical, in percent of the whole.

    Raises:
      Absent: if `analysis/subspace.json` is missing, has no pairs, has no pair with a subspace, or no share of the
        damage could be measured.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, why = _pairs(records)
    rows = [r for pair in pairs for removed in _removals(pair) for r in _left(pair, removed)]
    shares = [r for r in rows if r["k"] != "0"]
    if all(r["estimate"] is None for r in shares):
        reason = shares[0]["reason"] if shares else "the analysis has no removal test"
        raise Absent(f"no share of the damage could be measured: {reason}")
    order, names = distinct(rows, "panel"), distinct(rows, "removed")
    ks = [*sorted({r["k"] for r in rows if r["k"] != ROUTE}, key=int), ROUTE]
    x = alt.X("k:O", sort=ks, title="dimensions removed", axis=alt.Axis(labelAngle=0))
    chart = _by_dimension(rows, x, "removed", names, order, "damage left, %", [0, 100])
    caption = (
        "The damage is the rise of −log π of successes sampled at the domain's peak. It is measured again after a "
        "piece of the displacement is taken away: its part in k dimensions of S, its whole part in the space that S "
        "lies in (route), or a piece with the norm of the part in S. Such a piece lies in random dimensions "
        "(central 95 % of the draws) or in the complement of S. S is found on one half of the prompts and judged on "
        "the other. Bars: 95 % intervals over "
        f"prompts. {_undone(pairs)}{why}"
    )
    return Figure("removal", "Damage left when the part in the conflict subspace is removed", chart, rows, caption)


def _by_dimension(
    rows: list[dict[str, Any]], x: alt.X, field: str, names: list[str], order: list[str], title: str, lines: list[int]
) -> Any:
    """A chart of estimates with intervals by dimension: a panel for each of `order`, a colour for each of `names`.

    Args:
      rows: the figures, with "panel", "k", "estimate", "low", "high" and `field`.
      x: the horizontal axis.
      field: the field that the colour shows.
      names: its values, in order.
      order: the panels, in order.
      title: of the vertical axis.
      lines: heights of horizontal lines.
    """
    count, width = panels(len(order), 1, HALF)
    base = alt.Chart().encode(
        x=x,
        xOffset=alt.XOffset(f"{field}:N", sort=names),
        color=alt.Color(f"{field}:N", scale=by_category(names), title=None, legend=LEGEND),
        tooltip=[alt.Tooltip("k:O", title="dimensions"), *estimate_tips(["panel", field], title)],
    )
    at = alt.Chart(data([{"at": y} for y in lines])).mark_rule(color=INK, opacity=QUIET)
    layers = alt.layer(
        at.encode(y=alt.Y("at:Q", title=title)),
        base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=alt.Y("estimate:Q", title=title)),
        data=data(rows),
    ).properties(width=width, height=120 if len(order) > 1 else 180)
    return side_by_side(layers, "panel", order, count, before="S on", spacing=14)


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


def _removals(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the removal test of a pair that have figures, one for each space."""
    first = pair.get("removal", {})  # analyses of earlier versions have none
    return [removed for removed in (first, *first.get("wider", ())) if removed.get("curve")]


def _space(pair: dict[str, Any], removed: dict[str, Any]) -> str:
    return f"{_panel(pair)}, S on {removed['space']}"


def _left(pair: dict[str, Any], removed: dict[str, Any]) -> Iterator[Row]:
    head = _head(pair) | {"panel": _space(pair, removed), "space": removed["space"]}
    whole = {"estimate": 100.0, "low": None, "high": None, "n": removed["n_prompts"], "reason": ""}
    yield head | {"removed": "part in S", "k": "0"} | whole
    for step in removed["curve"]:
        yield head | {"removed": "part in S", "k": str(step["k"])} | estimate_columns(step["left"], 100)
    top = str(removed["curve"][-1]["k"])
    random, complement = removed["margins"]
    if random["shares"]:
        low, high = (100 * (1 - share) for share in reversed(random["band95"]))
        middle = 100 * (1 - sum(random["shares"]) / len(random["shares"]))
        found = {"estimate": middle, "low": low, "high": high, "n": random["n"], "reason": ""}
        yield head | {"removed": "random piece", "k": top} | found
    for name, k, share in (("complement", top, complement["share"]), ("whole route", ROUTE, removed["route"])):
        undone = estimate_columns(share, 100)
        left = {"estimate": undone["estimate"], "low": undone["high"], "high": undone["low"]}
        yield head | {"removed": name, "k": k} | undone | {n: x if x is None else 100 - x for n, x in left.items()}


def _undone(pairs: Sequence[dict[str, Any]]) -> str:
    found = [
        f"{_space(pair, removed)}: {words(removed['undone'], '.0%')} with "
        f"{removed['share_of_norm']:.1%} of the squared norm"
        for pair in pairs
        for removed in _removals(pair)
        if removed["undone"]["estimate"] is not None
    ]
    return f"Share undone — {'; '.join(found)}." if found else ""


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
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=QUIET).encode(y=alt.Y("at:Q", title=title))
    layers = alt.layer(
        zero,
        *null,
        base.mark_line(strokeWidth=1.2).encode(x=x, y=y),
        base.mark_point(filled=True, size=45, opacity=1).encode(x=x, y=y),
        data=data(rows),
    ).properties(width=width, height=180)
    return side_by_side(layers, "panel", order, 1)


def _no_null(pairs: Sequence[dict[str, Any]]) -> str:
    # Analyses of earlier versions do not say why they have no null.
    reasons = [f"{_panel(pair)}: {pair['null']}" for pair in pairs if pair.get("null")]
    return f"No null — {'; '.join(reasons)}. " if reasons else ""


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
