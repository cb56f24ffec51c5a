"""Gain of the kept domain against loss of the donor for each rollback and its controls (definitions §9, C7)."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, HALF, INK, QUIET, Figure, by_category, data
from mdrl_jax.report.figures.layout import LEGEND, distinct
from mdrl_jax.report.figures.recovery.refreshed import labelled, largest, named
from mdrl_jax.report.folder import UNSCORED, Absent, Records
from mdrl_jax.report.intervals import columns, number, span, tips, words
from mdrl_jax.report.tables.recovered import Recovery, recoveries
from mdrl_jax.stats.estimate import Record, missing

RULE_ORDER = ("adding", "removing", "opposition", "magnitude")
PLACES = {"all": "all coordinates", "route": "shared route"}
# One for each control: solid, dotted, dashed, dash-dot, long dashes, sparse dots, dash-dot-dot, dash-dash-dot.
DASHES = ([1, 0], [2, 2], [6, 3], [10, 3, 2, 3], [14, 5], [2, 6], [10, 3, 2, 3, 2, 3], [8, 3, 8, 3, 2, 3])
CONTROLS = {
    "random": "random",
    "matched": "matched in |δ|",
    "largest": "largest |δ|",
    "out_of_route": "outside the route",
    "whole": "the whole edit",
    "matched_in_tensor": "matched within the tensor",
    "permuted": "permuted |δ|, A's sign",
    "sign_step": "sign step of A",
}


NOTHING_TRIED = "no rollback tried a set of coordinates; `evidence` in recovery/rollback-*.json says why"


def sweep(records: Records) -> list[Figure]:
    """Gain of the kept domain against loss of the donor for every set of coordinates that was tried, in points.

    The donor is the domain whose edit is taken back. Gain is a rise of the kept domain's score, loss a fall of the
    donor's.

    Returns:
      One figure for each record `recovery/rollback-*.json` in which a set was tried, named as its stage, for example
      `rollback-math-qa`, with `.` for the `@` before a label; of more than `refreshed.MOST` records, for those whose
      domain had lost most. The loss is horizontal, the gain vertical. Each point is a set, scored on validation
      prompts; its colour is the rule and its shape the place (all coordinates, or the shared route). Lines are the
      controls, also on validation prompts. The chosen set, if there is one, is marked twice: with its figures on
      validation prompts, and with those on test prompts.

    Raises:
      Absent: if there is no such record, or if no rollback tried a set.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found = [r for r in _rollbacks(records) if r["points"]]
    if not found:
        raise Absent(NOTHING_TRIED)
    return [_sweep(r) for r in found]


def at_equal_loss(records: Records) -> list[Figure]:
    """The chosen set's gain minus each control's at the same loss of the donor, in points, on test prompts.

    Returns:
      One figure `STAGE-controls` for each record `recovery/rollback-*.json` in which a set was chosen. The difference
      with its 95 % interval is horizontal, above 0 if the chosen set gains more; each control is a line.

    Raises:
      Absent: if there is no such record, or if no rollback chose a set.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found = [_at_equal_loss(r, _of_matrix(records, r["stage"])) for r in _rollbacks(records) if "test" in r]
    if not found:
        raise Absent("no rollback found a set that gains anything within the limit, so none was compared with controls")
    return found


def fractions(records: Records) -> list[Figure]:
    """Gain and loss, in points, against the share of all coordinates that is taken back, for each rule and place.

    It shows the sets of strength 1, scored on validation prompts. A place is all coordinates or the shared route.

    Returns:
      One figure `STAGE-fractions` for each record `recovery/rollback-*.json` in which a set of strength 1 was tried. It
      has a column of two charts for each place, the gain of the kept domain above the loss of the donor. The share is
      horizontal on a log scale, points are vertical, and each rule has a line.

    Raises:
      Absent: if there is no such record, or if no rollback tried a set at strength 1.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found = [r for r in _rollbacks(records) if any(p["strength"] == 1.0 for p in r["points"])]
    if not found:
        raise Absent(NOTHING_TRIED)
    return [_fractions(r) for r in found]


def _rollbacks(records: Records) -> list[Record]:
    """The records of rollbacks, at most `refreshed.MOST`."""
    found = [records.json(path) for path in records.files("recovery/rollback-*.json")]
    return largest(found, lambda r: r.get("test", {}).get("lost") or missing(""))


def _of_matrix(records: Records, stage: str) -> Recovery | None:
    """The gain and the cost of a rollback in the score matrix; None if its stage has no scores there yet."""
    try:
        return next((r for r in recoveries(records.matrix()) if r.stage == stage), None)
    except UNSCORED:
        return None


def _rules(record: Record) -> list[str]:
    """The rules in the order of their colours: all known ones first, so that each has the same colour in every run."""
    return list(dict.fromkeys([*RULE_ORDER, *(p["rule"] for p in record["points"])]))


def _row(point: Record, what: str, rule: str = "", place: str = "") -> dict[str, Any]:
    """A point of the sweep or of a control's curve."""
    head = {"what": what, "rule": rule, "place": place}
    head |= {key: point.get(key) for key in ("fraction", "size", "strength", "setting")}
    return head | columns("gain", point["gain"]) | columns("loss", point["loss"])


def _sweep(record: Record) -> Figure:
    domain, donor, chosen = record["domain"], record["donor"], record["chosen"]
    tried = [_row(p, "set", p["rule"], PLACES[p["place"]]) for p in record["points"]]
    curves = [
        _row(p, CONTROLS.get(name, str(name)), "control")
        for name, curve in record.get("curves", {}).items()
        for p in sorted(curve, key=lambda p: p["setting"])
    ]
    picked = []
    if chosen:
        picked.append(_row(chosen, "chosen", chosen["rule"], PLACES[chosen["place"]]))
        picked.append(picked[0] | columns("gain", record["test"]["gain"]) | columns("loss", record["test"]["loss"]))
        picked[1]["what"] = "chosen, on test prompts"
    # A control grows until the donor loses more than by any set. The axis ends at the sets, so that they keep room.
    n = min(record["prompts"].values())
    titles = f"loss of {donor}, points ({n} validation prompts)", f"gain of {domain}, points ({n} validation prompts)"
    room = _room("loss", tried, picked, record["limit"])
    x = alt.X("loss:Q", title=titles[0], scale=room, axis=alt.Axis(tickCount=10))
    y = alt.Y("gain:Q", title=titles[1], scale=_room("gain", tried + curves, picked, 1.0))
    colour = alt.Color("rule:N", title="rule", scale=by_category(_rules(record)))
    places = alt.Scale(domain=list(PLACES.values()), range=["circle", "triangle-up"])
    shape = alt.Shape("place:N", title="taken from", scale=places)
    tip = _tips(domain, donor)
    sets = alt.Chart(data(tried)).mark_point(size=70, filled=True, opacity=1)
    layers: list[Any] = [_zero(record), sets.encode(x=x, y=y, color=colour, shape=shape, tooltip=tip)]
    if curves:
        layers.insert(1, _controls(curves, x, y, tip))
    if picked:
        layers.append(_picked(picked, x, y, titles, colour, tip))
    caption = (
        f"Each mark takes back a part of {donor}'s edit, from where the rollback starts, and is scored on {n} "
        f"validation prompts a domain. Up is a larger gain, right a larger loss. Lines: controls of growing size, up "
        f"to the largest loss of a mark. Dashed: the limit of {record['limit']:g} points. {_choice(record)}"
    )
    chart = alt.layer(*layers).resolve_scale(strokeDash="independent").properties(width=HALF, height=380)
    title = f"Rollback of {donor} for {domain}{labelled(record)}: gain against loss"
    return Figure(named(record), title, chart, tried + curves + picked, caption)


def _room(name: str, tried: Sequence[Record], picked: Sequence[Record], also: float) -> alt.Scale:
    """The scale that holds all sets that were tried and the intervals of the chosen set."""
    low, high = span([{name: row[name]} for row in tried] + list(picked), [name], (0.0, also))
    return alt.Scale(domain=[low, high], nice=False)


def _choice(record: Record) -> str:
    chosen = record["chosen"]
    if not chosen:
        return "No set within the limit gained anything, so nothing was taken back."
    share = chosen["size"] / record["coordinates"]
    return (
        f"Chosen: {share:.2%} of the coordinates by the rule `{chosen['rule']}` ({PLACES[chosen['place']]}, strength "
        f"{chosen['strength']:g}). Bars: 95 % intervals over prompts."
    )


def _zero(record: Record) -> Any:
    limit = alt.Chart(data([{"loss": record["limit"], "shown": "limit"}])).encode(x="loss:Q")
    axes = alt.Chart(data([{"zero": 0.0}]))
    return alt.layer(
        axes.mark_rule(opacity=QUIET).encode(x="zero:Q"),
        axes.mark_rule(opacity=QUIET).encode(y="zero:Q"),
        limit.mark_rule(strokeDash=[4, 3], strokeWidth=1.5),
        limit.mark_text(align="left", baseline="bottom", dx=5, dy=-4, y="height").encode(text="shown:N"),
    )


def _controls(curves: Sequence[Record], x: alt.X, y: alt.Y, tip: Sequence[alt.Tooltip]) -> Any:
    names = distinct(curves, "what")
    scale = alt.Scale(domain=names, range=[DASHES[i % len(DASHES)] for i in range(len(names))])
    dash = alt.StrokeDash(
        "what:N", title="control", scale=scale, legend=alt.Legend(symbolSize=700, symbolOpacity=1, columns=2)
    )
    base = alt.Chart(data(curves)).encode(x=x, y=y, tooltip=list(tip))
    style = {"color": INK, "opacity": QUIET, "clip": True}
    lines = base.mark_line(strokeWidth=1.6, **style).encode(strokeDash=dash, order="setting:Q")
    return alt.layer(lines, base.mark_point(filled=True, size=16, **style).encode(detail="what:N"))


def _picked(
    rows: Sequence[Record], x: alt.X, y: alt.Y, titles: Sequence[str], colour: alt.Color, tip: Sequence[alt.Tooltip]
) -> Any:
    base = alt.Chart(data(rows)).encode(tooltip=list(tip))
    shape = alt.Shape("what:N", legend=None, scale=alt.Scale(range=["cross", "diamond"]))
    at = base.encode(x=x, y=y)
    across, up = alt.X("loss_low:Q", title=titles[0]), alt.Y("gain_low:Q", title=titles[1])
    return alt.layer(
        base.mark_rule(strokeWidth=1.5).encode(x=across, x2="loss_high:Q", y=y),
        base.mark_rule(strokeWidth=1.5).encode(x=x, y=up, y2="gain_high:Q"),
        at.mark_point(filled=True, size=220, stroke=INK, strokeWidth=1.5, opacity=1).encode(color=colour, shape=shape),
        *(_label(row, x, y, i) for i, row in enumerate(rows)),
    ).resolve_scale(shape="independent")


def _label(row: Record, x: alt.X, y: alt.Y, place: int) -> Any:
    """The name of a mark: above it on the left, or below it on the right, since both marks are close to each other."""
    at = alt.Chart(data([row | {"shown": row["what"].removeprefix("chosen, ")}])).encode(x=x, y=y, text="shown:N")
    if place == 0:
        return at.mark_text(align="right", dx=-11, dy=-12, fontWeight=600)
    return at.mark_text(align="left", dx=11, dy=14, fontWeight=600)


def _tips(domain: str, donor: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("what:N"), alt.Tooltip("rule:N"), alt.Tooltip("place:N", title="taken from"),
        alt.Tooltip("fraction:Q", format=".4~%", title="share asked for"), alt.Tooltip("size:Q", format=",d"),
        alt.Tooltip("strength:Q"), alt.Tooltip("setting:Q", format=",.3~r", title="size or strength of the control"),
        *tips("gain", f"gain of {domain}, points"), *tips("loss", f"loss of {donor}, points"),
    ]  # fmt: skip


def _at_equal_loss(record: Record, matrix: Recovery | None) -> Figure:
    domain, donor, test = record["domain"], record["donor"], record["test"]
    rows = []
    for name, found in test["at_equal_loss"].items():
        rows.append({"control": CONTROLS.get(name, name), "control_gain": found["control_gain"]})
        rows[-1]["completions"] = found.get("completions")  # absent in records of earlier versions
        rows[-1] |= columns("difference", found)
    title = f"gain of {domain} minus the control's, points"
    y = alt.Y("control:N", sort=None, title="control")
    tip = [
        alt.Tooltip("control:N"),
        *tips("difference", title),
        alt.Tooltip("control_gain:Q", format=".2f", title="gain of the control, points"),
        alt.Tooltip("completions:Q", title="completions of each prompt"),
    ]
    base = alt.Chart(data(rows)).encode(y=y, tooltip=tip)
    scale = alt.Scale(domain=list(span(rows, ["difference"])), nice=False)
    axis = alt.Axis(titleAnchor="end")  # beside long names of controls, a centred title would leave a narrow screen
    x, low = (alt.X(f"{name}:Q", title=title, scale=scale, axis=axis) for name in ("difference", "difference_low"))
    chart = alt.layer(
        alt.Chart(data([{"zero": 0.0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
        base.mark_rule(strokeWidth=2, color=CATEGORIES[0]).encode(x=low, x2="difference_high:Q"),
        base.mark_point(filled=True, size=90, color=CATEGORIES[0], opacity=1).encode(x=x),
    ).properties(width=400, height=alt.Step(30))
    # The same prompts as in the score matrix, with `recover.samples` completions each.
    head = "On"
    if matrix is not None and matrix.gain.estimate is not None:
        head = (
            f"In the score matrix the stage gains {words(matrix.gain.record(), '.1f')} points of {domain}; recovery "
            f"fraction {words(matrix.fraction.record())}. The comparison with controls has other samples: on"
        )
    counts = sorted({r["completions"] for r in rows if r["completions"]})
    more = f" with {counts[0]} to {counts[-1]} completions of each prompt" if len(counts) > 1 else ""
    caption = (
        f"{head} {test['prompts']} test prompts the chosen set gains {words(test['gain'], '.1f')} points of {domain} "
        f"and costs {words(test['loss'], '.1f')} of {donor}; recovery fraction {words(test['recovery'])}. Each line: "
        f"the gain of the chosen set minus the largest gain of a control at the same loss{more}, with a 95 % "
        f"bootstrap interval. C7 asks that all intervals lie above 0.{_same_size(record)}"
    )
    return Figure(
        f"{named(record)}-controls",
        f"Rollback of {donor} for {domain}{labelled(record)}: at equal loss",
        chart,
        rows,
        caption,
    )


def _same_size(record: Record) -> str:
    """A sentence on the gain by random sets of the chosen size."""
    found = record.get("same_size", {}).get("random", {"n": 0})
    if not found["n"]:
        return ""
    mean, low, high = (number(x, ".1f") for x in (found["gain"]["mean"], *found["gain"]["percentiles"]))
    return (
        f" {found['n']} random sets of the same size gained {mean} points on average on validation prompts (95 % of "
        f"them {low} to {high}; p = {found['p']:.3f})."
    )


def _fractions(record: Record) -> Figure:
    domain, donor = record["domain"], record["donor"]
    sides = {"gain": f"gain of {domain}", "loss": f"loss of {donor}"}
    rows = [
        {"rule": p["rule"], "place": PLACES[p["place"]], "side": text}
        | {"size": p["size"], "share": p["size"] / record["coordinates"]}
        | columns("points", p[side])
        for p in record["points"]
        if p["strength"] == 1.0
        for side, text in sides.items()
    ]
    places = [text for text in PLACES.values() if text in {r["place"] for r in rows}]
    by_place = [
        alt.vconcat(*(_panel(rows, place, side, record) for side in sides.values()), spacing=10) for place in places
    ]
    caption = (
        f"Horizontal: share of all {record['coordinates']:,} coordinates that is taken back at strength 1, on a log "
        f"scale. Vertical: gain and loss on validation prompts with 95 % intervals. Dashed: no gain, and the limit of "
        f"{record['limit']:g} points of loss. A curve ends where {donor} loses more than three times the limit or "
        f"where the rule has no more coordinates."
    )
    title = f"Rollback of {donor} for {domain}{labelled(record)}: how many coordinates"
    return Figure(f"{named(record)}-fractions", title, alt.hconcat(*by_place, spacing=20), rows, caption)


def _panel(rows: Sequence[Record], place: str, side: str, record: Record) -> Any:
    ends = span([r for r in rows if r["side"] == side], ["points"], (0.0, record["limit"]), 0.0)
    scale = alt.Scale(domain=list(ends), nice=True)
    shares, asked = [r["share"] for r in rows], sorted({p["fraction"] for p in record["points"]})
    log = alt.Scale(type="log", domain=[min(shares) / 1.15, 1.15 * max(shares)], nice=False)
    ticks = alt.Axis(format="~%", values=asked, grid=False)
    x = alt.X("share:Q", title="share of coordinates", scale=log, axis=ticks)
    colour = alt.Color("rule:N", title="rule", scale=by_category(_rules(record)), legend=LEGEND)
    title = f"{side}, points"
    tip = [
        alt.Tooltip("rule:N"), alt.Tooltip("place:N", title="taken from"), alt.Tooltip("size:Q", format=",d"),
        alt.Tooltip("share:Q", format=".3~%"), *tips("points", title),
    ]  # fmt: skip
    some = [r for r in rows if (r["place"], r["side"]) == (place, side)]
    base = alt.Chart(data(some)).encode(x=x, color=colour, tooltip=tip)
    axis = alt.Axis(minExtent=32)  # aligns panels that stand below each other
    y = alt.Y("points:Q", title=title, scale=scale, axis=axis)
    low = alt.Y("points_low:Q", title=title, scale=scale, axis=axis)
    level = record["limit"] if side.startswith("loss") else 0.0
    return alt.layer(
        alt.Chart(data([{"level": level}])).mark_rule(strokeDash=[4, 3], strokeWidth=1.5).encode(y="level:Q"),
        base.mark_rule(strokeWidth=1).encode(y=low, y2="points_high:Q"),
        base.mark_line().encode(y=y),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=y),
    ).properties(width=205, height=150, title=place)
