"""Damage that later stages do to earlier domains: predicted to second order, and measured (definitions §6)."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, COLOURED, HALF, INK, QUIET, Figure, Row, data
from mdrl_jax.report.figures import pairwise
from mdrl_jax.report.figures.cascade import cascade
from mdrl_jax.report.figures.layout import LEGEND, distinct, panels, side_by_side
from mdrl_jax.report.folder import UNSCORED, Absent, Records
from mdrl_jax.report.intervals import columns, estimate_columns, estimate_tips, near, span, tooltips, words
from mdrl_jax.report.tables.transfer import fall
from mdrl_jax.stats.tests import r_squared, rank_agreement

WIDE = 700  # px of the plots of predicted against measured damage
OBJECTIVES = {"reward": ("mean reward", "points", 100.0), "success_nll": ("success NLL", "nats", 1.0)}
DAMAGE = {
    "reward": "Damage is the loss of mean reward, in points,",
    "success_nll": "Damage is the rise of −log π of successes sampled at the domain's peak, in nats per completion,",
}
TERMS = {
    "first order": CATEGORIES[0],
    "second order": CATEGORIES[1],
    "remainder": CATEGORIES[3],
    "measured": CATEGORIES[6],
}
LINES = {"predicted": "#0072B2", "measured": "#D55E00"}
BOTH = ("predicted", "measured")
EDGE = " A band that reaches the edge of its chart goes on, and the points' tooltips have its ends."


def waterfall(records: Records) -> list[Figure]:
    """Damage of every pair by first order, second order and remainder, beside the measured damage; positive is harm.

    With D the displacement from the earlier domain's peak to the end of the later stage, and g and H the gradient and
    the Hessian of its loss at the peak, the first order is g·D, the second ½DᵀHD, and the remainder is the
    measured damage minus both.

    Returns:
      One figure for each objective that a pair has a record of: `damage-reward` in points, `damage-success-nll` in nats
      per completion. It has one small chart for each such pair of an earlier domain and a later stage. Its bars are
      horizontal: the three terms, each from where the one before it ended, and the measured damage, from 0.

    Raises:
      Absent: if `analysis/damage.json` is missing, has no pairs, or has none of the two objectives.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs, figures = _pairs(records), []
    for objective in _objectives(pairs):
        label, unit, scale = OBJECTIVES[objective]
        rows = [r for pair in pairs for r in _terms(pair, objective, scale)]
        order = distinct(rows, "pair")
        count, width = panels(len(order), 3, HALF)
        title = f"{unit} (n = {_prompts(rows)})"  # short, because the charts are narrow on a phone
        chart = cascade(rows, TERMS, title, "pair", order, count, width)
        caption = (
            f"{DAMAGE[objective]} from the end of the domain's own stage to the end of a later stage. The first order "
            "g·D, the second order ½DᵀHD and the remainder add up to the damage that was measured on the same "
            f"prompts. Lines: 95 % intervals over n = {_prompts(rows)} prompts.{_gaps(rows)}"
            f"{_falls(records) if objective == 'reward' else ''}"
        )
        name = f"damage-{objective}".replace("_", "-")
        figures.append(Figure(name, f"Damage by the {label}, term by term", chart, rows, caption))
    return figures


def agreement(records: Records) -> Figure:
    """Predicted against measured damage of every pair of an earlier domain and a later stage; positive is harm.

    Returns:
      The figure `damage-agreement`: predicted damage is horizontal and measured damage vertical, with a point for each
      pair that has both. There is one line of charts for each objective (the reward in points, the success NLL in nats
      per completion). It has one chart for each number of segments in which the path was expanded and each number n of
      prompts: an expansion in one segment on all prompts, and those on the first `analyze.path_prompts`.

    Raises:
      Absent: if `analysis/damage.json` is missing, has no pairs, has none of the two objectives, or has no pair with
        both a prediction and a measured damage.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs = _pairs(records)
    rows = [r for objective in _objectives(pairs) for pair in pairs for r in _expansions(pair, objective)]
    rows = [r for r in rows if r["predicted"] is not None and r["measured"] is not None]
    if not rows:
        raise Absent("analysis/damage.json has no pair with both a prediction and a measured damage")
    rows.sort(key=lambda r: (-r["n"], r["segments"]))
    order, objectives = distinct(rows, "expansion"), distinct(rows, "objective")
    count, width = panels(len(order), 5, WIDE, 14)
    charts = [_scatter([r for r in rows if r["objective"] == o], rows, o, count, min(width, 260)) for o in objectives]
    chart = alt.vconcat(*charts, spacing=24)
    said = []
    for objective in objectives:
        made = distinct((r for r in rows if r["objective"] == objective), "expansion")
        for expansion in dict.fromkeys((made[0], made[-1])):
            said.append(f"{OBJECTIVES[objective][0]}, {expansion}: {_correlations(rows, objective, expansion)}")
    caption = (
        "A point is a pair of an earlier domain and a later stage. On the line, prediction and measurement are equal. "
        f"Bars: 95 % intervals over prompts{_cut(rows)}. A chart with n segments expands the path anew at the start of "
        "each. "
        f"Over pairs, Spearman and the R² of the line — {'; '.join(said)}."
    )
    return Figure("damage-agreement", "Predicted against measured damage", chart, rows, caption)


def alphas(records: Records) -> Figure:
    """Predicted and measured damage at θ* + αD, and the α from which on the prediction fails; positive is harm.

    θ* is the earlier domain's peak (α = 0), and D leads from there to the end of the later stage (α = 1). The
    prediction fails where it is measurably off by more than 20 % of the measured damage
    (`analysis.expansion.breakdown`).

    Returns:
      The figure `damage-path`: one chart for each objective and pair, with α from 0 to 1 on the horizontal and the
      damage on the vertical axis. The reward is in points, the success NLL in nats per completion.

    Raises:
      Absent: if `analysis/damage.json` is missing, has no pairs, has none of the two objectives, or has no such curves.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    pairs = _pairs(records)
    rows = [r for objective in _objectives(pairs) for pair in pairs for r in _curve(pair, objective)]
    if not rows:
        raise Absent("analysis/damage.json has no curves along θ* + αD")
    objectives = distinct(rows, "objective")
    charts = [_curves([r for r in rows if r["objective"] == o], OBJECTIVES[o]) for o in objectives]
    caption = (
        "Damage at θ* + αD, from the end of the domain's own stage (α = 0) to the end of the later stage (α = 1), with "
        "95 % bands over prompts. From the dashed line on, the second-order prediction is measurably off by more than "
        f"20 % of the measured damage.{EDGE if _leave(_ends(rows), ['x']) else ''}{_gaps(rows)}"
    )
    chart = alt.vconcat(*charts, spacing=28)
    return Figure("damage-path", "Damage along the way to the later stage", chart, rows, caption)


def _cut(rows: list[Row]) -> str:
    """A clause on intervals that leave their chart; "" if none does."""
    cut = _leave(rows, BOTH)
    return "; one that reaches the edge of its chart goes on, and the point's tooltip has its ends" if cut else ""


def _leave(rows: Sequence[Row], names: Sequence[str]) -> bool:
    """Whether an interval of the columns `names` leaves the chart of its objective, whose axis is `near`."""
    by_objective = [[r for r in rows if r["objective"] == o] for o in distinct(rows, "objective")]
    return any(near(some, names) != span(some, names, margin=0.0) for some in by_objective)


def _ends(rows: Sequence[Row]) -> list[Row]:
    """Estimates and their intervals with the names that `near` and `span` ask for."""
    return [r | {"x": r["estimate"], "x_low": r["low"], "x_high": r["high"]} for r in rows]


def _pairs(records: Records) -> list[dict[str, Any]]:
    pairs = records.json("analysis/damage.json")["pairs"]
    if not pairs:
        raise Absent("analysis/damage.json has no pairs: no stage followed that of another domain")
    return pairs


def _objectives(pairs: list[dict[str, Any]]) -> list[str]:
    found = [o for o in OBJECTIVES if any(o in pair["objectives"] for pair in pairs)]
    if not found:
        raise Absent(f"analysis/damage.json has neither of {', '.join(OBJECTIVES)}")
    return found


def _head(pair: dict[str, Any]) -> Row:
    return {"domain": pair["domain"], "stage": pair["stage"], "pair": f"{pair['domain']} after {pair['stage']}"}


def _terms(pair: dict[str, Any], objective: str, scale: float) -> Iterator[Row]:
    found = pair["objectives"].get(objective)
    if found is None:
        return
    starts = {"first": 0.0, "second": found["first"], "remainder": found["predicted"], "measured": 0.0}
    for term, key in zip(TERMS, starts, strict=True):
        if key not in found:
            continue
        start = starts[key]
        at = start if isinstance(start, float) else start["estimate"]
        row = _head(pair) | {"term": term, "start": None if at is None else scale * at}
        yield row | estimate_columns(found[key], scale)


def _falls(records: Records) -> str:
    """A sentence on the same losses on all test prompts, which are more; "" if the run has no scores."""
    try:
        matrix = records.matrix()
    except UNSCORED:
        return ""
    found = {d: f for d in matrix.domains if (f := fall(matrix, d).record())["estimate"] is not None}
    if not found:
        return ""
    said = ", ".join(f"{d} {words(f, '.1f')} (n = {f['n']})" for d, f in found.items())
    return f" On all test prompts, as in the score matrix, the fall until the last stage is, in points: {said}."


def _prompts(rows: list[Row]) -> str:
    return " or ".join(str(n) for n in sorted({r["n"] for r in rows}))


def _gaps(rows: list[Row]) -> str:
    """A sentence that names the pairs with a figure that could not be measured, and the reason; otherwise ""."""
    pairs: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["reason"]:
            pairs.setdefault(row["reason"], {})[row["pair"]] = None
    said = "; ".join(f"{', '.join(names)} ({why})" for why, names in pairs.items())
    return f" Not measurable: {said}." if pairs else ""


def _expansions(pair: dict[str, Any], objective: str) -> Iterator[Row]:
    found = pair["objectives"].get(objective)
    if found is None or "measured" not in found:
        return
    scale, seen = OBJECTIVES[objective][2], set()
    for part in ({**found, "segments": 1}, *found.get("segments", ())):
        n = part["measured"]["n"]
        if (part["segments"], n) in seen:  # the path has one segment on the same prompts
            continue
        seen.add((part["segments"], n))
        row = _head(pair) | {"objective": objective, "segments": part["segments"], "n": n}
        row["expansion"] = f"{part['segments']} segment{'s' * (part['segments'] > 1)} (n = {n})"
        row |= columns("predicted", part["predicted"], scale) | columns("measured", part["measured"], scale)
        yield row


def _correlations(rows: list[Row], objective: str, expansion: str) -> str:
    points = [r for r in rows if (r["objective"], r["expansion"]) == (objective, expansion)]
    predicted, measured = ([p[k] for p in points] for k in ("predicted", "measured"))
    if len(points) < 3:
        return f"too few pairs ({len(points)})"
    rank, explained = rank_agreement(predicted, measured), r_squared(predicted, measured)
    return f"Spearman {words(rank)}, R² {words(explained.record()) if explained else 'not measurable'}"


def _scatter(rows: list[Row], everything: list[Row], objective: str, count: int, width: int) -> alt.FacetChart:
    label, unit, _ = OBJECTIVES[objective]
    ends = near(rows, BOTH)
    scale = alt.Scale(domain=list(ends), nice=True)
    colour, shape = pairwise.marks(everything)
    predicted, measured = f"predicted, {unit}", f"measured, {unit}"
    base = alt.Chart().encode(
        color=colour,
        tooltip=[
            alt.Tooltip("pair:N"),
            alt.Tooltip("expansion:N"),
            *tooltips({"predicted": predicted, "predicted_low": "95 % from", "predicted_high": "to"}, ".3g"),
            *tooltips({"measured": measured, "measured_low": "95 % from", "measured_high": "to"}, ".3g"),
        ],
    )
    x, y = alt.X("predicted:Q", title=predicted, scale=scale), alt.Y("measured:Q", title=measured, scale=scale)
    equal = alt.Chart(data([{"at": v} for v in ends])).mark_line(color=INK, opacity=QUIET, strokeWidth=1.2)
    bars = base.mark_rule(strokeWidth=1, clip=True)
    chart = alt.layer(
        equal.encode(x=alt.X("at:Q", title=predicted), y=alt.Y("at:Q", title=measured)),
        bars.encode(x=alt.X("predicted_low:Q", title=predicted), x2="predicted_high:Q", y=y),
        bars.encode(x=x, y=alt.Y("measured_low:Q", title=measured), y2="measured_high:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, shape=shape),
        data=data(rows),
    ).properties(width=width, height=width)
    return side_by_side(chart, "expansion", distinct(rows, "expansion"), count, spacing=14, title=label)


def _curve(pair: dict[str, Any], objective: str) -> Iterator[Row]:
    found = pair["objectives"].get(objective, {})
    for step in found.get("curve", ()):
        for name in LINES:
            if name in step:
                row = _head(pair) | {"objective": objective, "alpha": step["alpha"], "what": name}
                row |= estimate_columns(step[name], OBJECTIVES[objective][2])
                yield row | {"breaks": found.get("breaks_at") == step["alpha"]}


def _curves(rows: list[Row], named: tuple[str, str, float]) -> alt.FacetChart:
    label, unit, _ = named
    order = distinct(rows, "pair")
    count, width = panels(len(order), 3, HALF)
    title = f"damage, {unit}"
    x = alt.X(
        "alpha:Q",
        title="α",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f"),
    )
    scale = alt.Scale(domain=list(LINES), range=list(LINES.values()))
    colour = alt.Color("what:N", scale=scale, title=None, legend=LEGEND)
    alpha = alt.Tooltip("alpha:Q", title="α")
    base = alt.Chart().encode(x=x, color=colour, tooltip=[alpha, *estimate_tips(["pair", "what"], title)])
    heights = alt.Scale(domain=list(near(_ends(rows), ["x"])), nice=True)
    y = alt.Y("estimate:Q", title=title, scale=heights)
    band = base.mark_area(**COLOURED, clip=True).encode(
        y=alt.Y("low:Q", title=title, scale=heights),
        y2="high:Q",
        stroke=alt.Stroke("what:N", scale=scale, title=None, legend=LEGEND),
    )
    broken = base.transform_filter("datum.breaks")
    layers = alt.layer(
        band,
        broken.mark_rule(strokeDash=[4, 3], color=INK, strokeWidth=1.4).encode(color=alt.value(INK)),
        base.mark_line().encode(y=y),
        base.mark_point(filled=True, size=28, opacity=1).encode(y=y),
        data=data(rows),
    ).properties(width=width, height=110)
    return side_by_side(
        layers, "pair", order, count, spacing={"row": 14, "column": 20}, title=f"{label}, n = {_prompts(rows)}"
    )
