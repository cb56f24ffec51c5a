"""Active routes: which neurons two domains share, and how edits act on these neurons (definitions §5)."""

from collections.abc import Iterator
from typing import Any

import altair as alt

from mdrl_jax.report.figure import BAND, HALF, INK, QUIET, Figure, Row, data
from mdrl_jax.report.figures import pairwise
from mdrl_jax.report.figures.layout import ALIGNED, distinct, panels, side_by_side
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import (
    columns,
    estimate_columns,
    estimate_tips,
    null_columns,
    span,
    tooltips,
    words,
)
from mdrl_jax.stats.tests import rank_agreement

KINDS = {"neurons": "MLP neurons", "heads": "attention heads"}
PLACES = {"route": "on the shared route", "complement": "outside the shared route"}
AXIS = alt.Axis(tickCount=4, labelFlush=False)
ROOM = 0.04  # room beyond the intervals, as a share of the range


def overlap(records: Records) -> Figure:
    """Jaccard index of the routes of every two domains, at the base and at each peak, beside its value by chance.

    Returns:
      The figure `route-overlap`. Left: the Jaccard index of MLP neurons at the base, as a matrix of domains. Beside it
      one chart for MLP neurons and one for attention heads, with the Jaccard index on the horizontal axis and a line
      for each pair of domains. Colours tell the base, with all pairs, from the peaks. At a peak it shows only the pairs
      that include the domain of the peak.

    Raises:
      Absent: if `analysis/routes.json` or `analysis/settings.json` is missing, or the first has no pairs of domains.
      UserError: if one of them is not valid JSON.
      KeyError: if one of them lacks a field.
    """
    found = pairwise.places(records, "analysis/routes.json")
    rows = [
        r
        for place, own, at in found
        for pair in at["overlaps"].values()
        if not own or own in pair["domains"]
        for r in _overlaps(place, pair)
    ]
    if not rows:
        raise Absent("analysis/routes.json has no pairs of domains: fewer than two were trained")
    at, pairs = distinct(rows, "at"), distinct(rows, "pair")
    domains = list(dict.fromkeys(distinct(rows, "a") + distinct(rows, "b")))
    chosen = [r for r in rows if r["at"] == at[0] and r["channels"] == KINDS["neurons"]]
    charts = [pairwise.matrix(chosen, domains, f"neurons, {at[0]}")]
    for kind in distinct(rows, "channels"):
        own = [r for r in rows if r["channels"] == kind]
        first = len(charts) == 1
        scale = alt.Scale(domain=[0, max(_ceiling(own), 0.1)], nice=True)
        charts.append(
            pairwise.beside_chance(own, pairs, f"Jaccard, {kind}", 230 if first else 160, scale, "at", at, first)
        )
    caption = (
        "A route is the 10 % most active neurons, or attention heads, of each layer on the domain's own completions. "
        "Lines: 95 % intervals by half-sampling of blocks of prompts. Grey: the central 95 % of random routes of the "
        "same size in each layer; the tick is their mean."
    )
    chart = alt.hconcat(charts[0], alt.hconcat(*charts[1:], spacing=18).properties(name=ALIGNED), spacing=18)
    return Figure("route-overlap", "Do domains use the same neurons and heads?", chart, rows, caption)


def effects(records: Records) -> Figure:
    """First-order effect of a later stage's edit on an earlier domain, against the measured transfer.

    The effect is −g·δ: g is the gradient of the earlier domain's loss at that domain's peak, δ the later stage's edit.
    Above 0 the edit helps the earlier domain. The transfer is the change of that domain's mean reward through the
    stage. Both are in points (100 times the reward).

    Args:
      records: the work folder; `analysis/damage.json` is read.

    Returns:
      The figure `route-effects`. It has two panels, on the shared route and outside it, each with a point for each pair
      of an earlier domain and a later stage: the effect is horizontal, the transfer vertical. Its rows are one for each
      pair and panel.

    Raises:
      Absent: if `analysis/damage.json` is missing, or has no effects on a shared route.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    transfers = [t for t in records.json("analysis/damage.json")["transfers"] if t["effect"]]
    rows = [r for t in transfers for r in _effects(t)]
    if not rows:
        raise Absent("analysis/damage.json has no effects on a shared route: no domain was followed by another")
    order = distinct(rows, "where")
    count, width = panels(len(order), 2, HALF - 20)
    n = " or ".join(str(x) for x in sorted({t["measured"]["n"] for t in transfers}))
    effect, measured = "first-order effect, points", f"measured transfer, points (n = {n})"
    ends = span(rows, ("estimate", "low", "high"), margin=ROOM)
    x = alt.X("estimate:Q", title=effect, scale=alt.Scale(domain=list(ends), nice=False), axis=AXIS)
    y = alt.Y("transfer:Q", title=measured)
    listed = [
        *estimate_tips(["pair", "where"], effect, null=True),
        *tooltips({"transfer": measured, "transfer_low": "95 % from", "transfer_high": "to"}, ".3g"),
    ]
    colour, shape = pairwise.marks(rows)
    base = alt.Chart().encode(tooltip=listed)
    zero = alt.Chart(data([{"at": 0}]))
    layers = alt.layer(
        zero.mark_rule(color=INK, opacity=QUIET).encode(x=alt.X("at:Q", title=effect)),
        zero.mark_rule(color=INK, opacity=QUIET).encode(y=alt.Y("at:Q", title=measured)),
        base.mark_bar(color=INK, stroke=INK, size=9, orient="horizontal", **BAND).encode(
            x=alt.X("null_low:Q", title=effect), x2="null_high:Q", y=y
        ),
        base.mark_rule().encode(x=alt.X("low:Q", title=effect), x2="high:Q", y=y, color=colour),
        base.mark_rule().encode(x=x, y=alt.Y("transfer_low:Q", title=measured), y2="transfer_high:Q", color=colour),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, color=colour, shape=shape),
        data=data(rows),
    ).properties(width=width, height=260)
    chart = side_by_side(layers, "where", order, count)
    on = [r for r in rows if r["where"] == PLACES["route"]]
    rank = rank_agreement([r["estimate"] for r in on], [r["transfer"] for r in on])
    caption = (
        "Horizontal: −g·δ, with the gradient g of the earlier domain and the edit δ of the later stage; above 0 the "
        "edit helps that domain. Vertical: the measured change of its mean reward through that stage. In the upper "
        "right and lower left both agree in sign. Lines: 95 % intervals, horizontal over blocks of prompts and "
        "vertical over prompts. Grey: the central 95 % of random sets of the route's size. "
        f"Spearman on the route, {rank['n']} pairs: {words(rank)}."
    )
    return Figure("route-effects", "Does the effect on the shared route predict the transfer?", chart, rows, caption)


def edit_cosines(records: Records) -> Figure:
    """Cosine of two domains' edits on the MLP neurons that both routes share, and on all other MLP neurons.

    The routes are those at the earlier domain's peak. An edit is the domain's solo edit, or its edit in the sequence if
    there is no solo stage. Below 0 the edits change the neurons in opposite directions.

    Returns:
      The figure `route-edit-cosines`: a line for each pair of an earlier and a later domain, with two cosines on the
      horizontal axis, on the shared route and outside it. That on the route is shown beside its values by chance.

    Raises:
      Absent: if `analysis/routes.json` or `analysis/settings.json` is missing, or the first has no shared routes.
      UserError: if one of them is not valid JSON.
      KeyError: if one of them lacks a field.
    """
    rows = [
        {"pair": pairwise.name((own, other)), "where": where, "neurons": sum(map(len, shared["neurons"]))}
        | estimate_columns(shared["edit_cosine"][key])
        | null_columns(shared["edit_cosine"][key])
        for _, own, found in pairwise.places(records, "analysis/routes.json")
        for other, shared in found["shared"].items()
        for key, where in PLACES.items()
    ]
    if not rows:
        raise Absent("analysis/routes.json has no shared routes: no domain was followed by another")
    pairs = distinct(rows, "pair")
    title = "cosine of the two edits"
    chart = pairwise.beside_chance(rows, pairs, title, 400, alt.Scale(), "where", list(PLACES.values()), dashed=0.0)
    caption = (
        "Cosine of two edits on the MLP neurons that both routes share, and on all other MLP neurons. Below 0, the "
        "edits change the neurons in opposite directions. Lines: 95 % intervals by jackknife over layers; grey: the "
        "central 95 % of random sets of the route's size."
    )
    return Figure("route-edit-cosines", "Do two edits agree on the shared route?", chart, rows, caption)


def _overlaps(at: str, pair: dict[str, Any]) -> Iterator[Row]:
    a, b = pair["domains"]
    for kind, label in KINDS.items():
        record = pair[kind]["all"]
        head = {"pair": pairwise.name((a, b)), "a": a, "b": b, "at": at, "channels": label}
        yield head | estimate_columns(record) | null_columns(record)


def _ceiling(rows: list[Row]) -> float:
    """The largest value that a chart draws, intervals and nulls included, but at most 1."""
    return min(1.0, span(rows, ("estimate", "high", "null_high"), margin=0.0)[1])


def _effects(transfer: dict[str, Any]) -> Iterator[Row]:
    measured = columns("transfer", transfer["measured"], 100)
    for key, where in PLACES.items():
        record = transfer["effect"][key]
        domain, stage = transfer["domain"], transfer["stage"]
        row = {"domain": domain, "stage": stage, "pair": f"{domain} after {stage}", "where": where}
        yield row | estimate_columns(record, 100) | null_columns(record, 100) | measured
