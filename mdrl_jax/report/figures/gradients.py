"""Agreement of two domains' gradients: over the model, in each tensor, and how far it cancels (definitions §4)."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.claims.published import CLAIMS
from mdrl_jax.report.figure import BAND, CATEGORIES, HALF, INK, QUIET, Figure, Row, data, signed
from mdrl_jax.report.figures import pairwise
from mdrl_jax.report.figures.layout import LEGEND, NO_LAYER, distinct, panels, side_by_side, tensor_axes
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import estimate_columns, estimate_tips, null_columns

COSINES = {"cosine": "plain", "disattenuated": "corrected for noise"}
SUMS = {"negative": "#0072B2", "positive": "#D55E00"}  # blue and orange, as in the signed scale
AXIS = alt.Axis(tickCount=5, labelFlush=False)
MAPS = 690
LONG = 8  # layers; with more, cells are too narrow for a sign


def cosines(records: Records) -> Figure:
    """Cosine of the gradients of every two domains' losses, plain and corrected for noise, by point of the run.

    Above 0 a step down one gradient lowers the other loss (synergy); below 0 it raises it (conflict).

    Returns:
      The figure `gradient-cosines`: one chart at the base, with all pairs of domains, and one at the peaks, with each
      pair at the peak of its earlier domain. The cosine is horizontal from −1 to 1, and each pair is a line with two
      estimates, their 95 % intervals and nulls; "not measurable" stands in place of one without an estimate.

    Raises:
      Absent: if `analysis/gradients.json` or `analysis/settings.json` is missing, or the first has no pairs of domains.
      UserError: if one of them is not valid JSON.
      KeyError: if one of them lacks a field.
    """
    rows = [r for place, pair in _pairs(records) for r in _cosines(place, pair)]
    order, pairs = distinct(rows, "place"), distinct(rows, "pair")
    count, width = panels(len(order), 2, HALF - 170)
    title = "cosine of the gradients"
    scale = alt.Scale(domain=[-1, 1])
    base = alt.Chart().encode(
        y=alt.Y("pair:N", sort=pairs, title=None, axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("figure:N", sort=list(COSINES.values())),
        tooltip=estimate_tips(["pair", "place", "figure"], title, null=True),
    )
    names = list(COSINES.values())
    colour = alt.Color(
        "figure:N", scale=alt.Scale(domain=names, range=[CATEGORIES[5], CATEGORIES[1]]), title=None, legend=LEGEND
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=QUIET).encode(x=alt.X("at:Q", title=title))
    missing = base.transform_filter("!isValid(datum.estimate)")
    layers = alt.layer(
        zero,
        base.mark_bar(size=10, color=INK, stroke=INK, **BAND).encode(
            x=alt.X("null_low:Q", title=title), x2="null_high:Q"
        ),
        base.mark_rule(strokeWidth=2, clip=True).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=colour),
        base.mark_point(filled=True, size=55, opacity=1, clip=True).encode(
            x=alt.X("estimate:Q", title=title, scale=scale, axis=AXIS), color=colour
        ),
        missing.mark_text(align="left", dx=6, color=INK).encode(x=alt.value(width), text=alt.value("not measurable")),
        data=data(rows),
    ).properties(width=width, height=30 * len(pairs))
    chart = side_by_side(layers, "place", order, count)
    caption = (
        "Below 0, a gradient step for one domain raises the loss of the other. Lines: 95 % intervals over blocks of "
        "prompts; grey: the central 95 % with random signs of the blocks. Not measurable: the gradients of two halves "
        "of one domain's prompts do not agree, so a cosine near 0 could be noise; the tooltip names the domain. "
        f"Published: {CLAIMS['C3'].published}."
    )
    return Figure("gradient-cosines", "Cosine of the domains' gradients", chart, rows, caption)


def modules(records: Records) -> Figure:
    """Cosine of two domains' gradients by kind of tensor and layer, with the tensors that measurably conflict or agree.

    Returns:
      The figure `gradient-modules`: one map for each place (base or peak) and pair of domains, with layers on the
      horizontal and kinds of tensors on the vertical axis. Cosines below 0 (conflict) are blue, those above 0 (synergy)
      orange. A mark is on the tensors whose inner product differs from 0 by Benjamini–Hochberg at q = 0.05 within the
      pair. At a peak it shows only the pairs that include the domain of the peak.

    Raises:
      Absent: if `analysis/gradients.json` or `analysis/settings.json` is missing, or the first has no pairs of domains.
      UserError: if one of them is not valid JSON.
      KeyError: if one of them lacks a field.
    """
    found = list(_pairs(records))
    rows = [r for place, pair in found for r in _tensors(place, pair)]
    order = distinct(rows, "place")
    scale = signed([r["cosine"] for r in rows])
    charts = [_map([r for r in rows if r["place"] == place], rows, scale, place) for place in order]
    called = sum(bool(r["called"]) for r in rows)
    caption = (
        "Blue: the gradients oppose each other in this tensor (conflict). Orange: they agree (synergy). Columns are "
        "layers; the column – holds tensors outside the layers. A sign, − or +, marks an inner product that differs "
        "from 0 by Benjamini–Hochberg at q = 0.05 within the pair: "
        f"{called} of {len(rows)}. A colour without a sign may be noise."
    )
    chart = alt.vconcat(*charts, spacing=24)
    return Figure("gradient-modules", "Where gradients conflict", chart, rows, caption)


def cancellation(records: Records) -> Figure:
    """Sums over tensors of the positive and of the negative inner products of two domains' gradients, and their net.

    Returns:
      The figure `gradient-cancellation`: one chart at the base and one at the peaks. Each pair of domains has three
      horizontal bars, in (loss per unit of parameter)². At a peak it shows only the pairs that include the domain of
      the peak.

    Raises:
      Absent: if `analysis/gradients.json` or `analysis/settings.json` is missing, or the first has no pairs of domains.
      UserError: if one of them is not valid JSON.
      KeyError: if one of them lacks a field.
    """
    rows = [r for place, pair in _pairs(records) for r in _sums(place, pair)]
    order, pairs = distinct(rows, "place"), distinct(rows, "pair")
    count, width = panels(len(order), 2, HALF - 20)
    title = "sum of inner products of gradients"
    sums = ["negative", "positive", "net"]
    base = alt.Chart().encode(
        y=alt.Y("pair:N", sort=pairs, title=None, axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("sum:N", sort=sums),
        color=alt.Color(
            "sum:N", scale=alt.Scale(domain=sums, range=[*SUMS.values(), CATEGORIES[6]]), title=None, legend=LEGEND
        ),
        tooltip=estimate_tips(["pair", "place", "sum"], title),
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=QUIET).encode(x=alt.X("at:Q", title=title))
    layers = alt.layer(
        base.mark_bar(height=8).encode(x=alt.X("estimate:Q", title=title, axis=AXIS)),
        zero,
        base.mark_rule(strokeWidth=1.3).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=alt.value(INK)),
        data=data(rows),
    ).properties(width=width, height=34 * len(pairs))
    chart = side_by_side(layers, "place", order, count)
    caption = (
        "The inner products ⟨g_A, g_B⟩ of the tensors, summed over the tensors where they are negative, over those "
        "where they are positive, and over all (net), in (loss per unit of parameter)². If the net is near 0 beside "
        "long bars, conflict and synergy cancel; beside short bars, the gradients are near-orthogonal everywhere. The "
        "signs and the sums come from different prompts, so noise adds nothing to either sum on average. Lines: 95 % "
        "intervals over blocks of prompts."
    )
    return Figure("gradient-cancellation", "Do conflict and synergy cancel?", chart, rows, caption)


def _pairs(records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, pair): all pairs at the base, and at each peak θ*_A the pairs that include A."""
    found = [
        (place, pair)
        for place, own, pairs in pairwise.places(records, "analysis/gradients.json")
        for pair in pairs.values()
        if not own or own in pair["domains"]
    ]
    if not found:
        raise Absent("analysis/gradients.json has no pairs of domains: fewer than two were trained")
    yield from found


def _head(place: str, pair: dict[str, Any]) -> Row:
    return {"place": place, "pair": pairwise.name(pair["domains"])}


def _cosines(place: str, pair: dict[str, Any]) -> Iterator[Row]:
    a, b = pair["domains"]
    for key, words in COSINES.items():
        figure = pair["model"][key]
        row = _head(place, pair) | {"figure": words} | estimate_columns(figure) | null_columns(figure)
        # The record calls the two domains A and B.
        yield row | {"reason": row["reason"].replace("of A's", f"of {a}'s").replace("of B's", f"of {b}'s")}


def _tensors(place: str, pair: dict[str, Any]) -> Iterator[Row]:
    signs = {name: sign for key, sign in (("conflicting", "−"), ("synergistic", "+")) for name in pair[key]["tensors"]}
    for tensor in pair["tensors"]:
        layer = NO_LAYER if tensor["layer"] is None else str(tensor["layer"])
        found = {key: tensor[key]["estimate"] for key in ("cosine", "inner")}
        row = _head(place, pair) | {"kind": tensor["kind"], "layer": layer} | found
        yield row | {"p": tensor["p"], "called": signs.get(tensor["name"], "")}


def _map(rows: Sequence[Row], everything: Sequence[Row], scale: alt.Scale, place: str) -> alt.FacetChart:
    x, y, n_layers, n_kinds = tensor_axes(everything)
    order = distinct(rows, "pair")
    most = max(1, min(6, int(MAPS / (pairwise.LETTER * max(map(len, order)) + 10))))  # the names of pairs must fit
    count = min(len(order), most)
    width = min(panels(max(count, 4), 6, MAPS, 10)[1], 26 * n_layers)
    base = alt.Chart().encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("pair:N"),
            alt.Tooltip("kind:N"),
            alt.Tooltip("layer:N"),
            alt.Tooltip("cosine:Q", format=".3f"),
            alt.Tooltip("inner:Q", format=".3g", title="inner product"),
            alt.Tooltip("p:Q", format=".2g", title="p, against 0"),
            alt.Tooltip("called:N", title="measured sign"),
        ],
    )
    limit = scale.to_dict()["domain"][1]
    # On these colours of the scale white text is legible, on the others black text (WCAG).
    dark = f"datum.cosine < {-0.79 * limit} || datum.cosine > {0.87 * limit}"
    ink = alt.when(dark).then(alt.value("white")).otherwise(alt.value("black"))
    cells = base.mark_rect().encode(color=alt.Color("cosine:Q", scale=scale, title="cosine"))
    called = base.transform_filter("datum.called != ''")
    if n_layers <= LONG:
        marks = called.mark_text(fontSize=15, fontWeight=700).encode(text="called:N", color=ink)
    else:
        marks = called.mark_point(filled=True, size=12, opacity=1).encode(color=ink)
    made = alt.layer(cells, marks, data=data(rows)).properties(width=width, height=19 * n_kinds)
    return side_by_side(made, "pair", order, count, spacing=10, title=place)


def _sums(place: str, pair: dict[str, Any]) -> Iterator[Row]:
    for name, record in pair["cancellation"].items():
        yield _head(place, pair) | {"sum": name} | estimate_columns(record)
