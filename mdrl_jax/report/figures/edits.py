"""The edits δ of the domains: their size, sparsity and rank, and the neurons that they change (definitions §3)."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from mdrl_jax.claims.published import CLAIMS, SPARSE_SHARES, WEAK_OVERLAP
from mdrl_jax.report.figure import (
    CATEGORIES,
    COLOURED,
    HALF,
    INK,
    QUIET,
    SEQUENTIAL,
    Figure,
    Row,
    by_category,
    data,
    ink_on,
)
from mdrl_jax.report.figures import pairwise
from mdrl_jax.report.figures.layout import ALIGNED, LEGEND, NO_LAYER, distinct, panels, side_by_side, tensor_axes
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import estimate_columns, estimate_tips, null_columns, tooltips, words

CASTS = {"fp32": "fp32", "bf16": "after a bf16 cast"}
BOTH = "|δ| < 1e-7 and |δ|/|θ| < 1e-3"  # the rule behind the published shares of C1
MOST_NUMBERS = 8  # layers; with more, cells are too narrow for a number


def histogram(records: Records) -> Figure:
    """The distribution of |δ| over the entries of each domain's edit δ, with the share of entries that did not change.

    Returns:
      The figure `edit-sizes`: one chart for fp32 and one after a bf16 cast, if the record has it. A curve for each
      trained domain has the share of all entries, in % (vertical), in each half decade of |δ| (horizontal, log scale).
      A point at "0", left of the curve, is the share of unchanged entries.

    Raises:
      Absent: if `analysis/edits.json` is missing, has no domains, or has no histogram.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    domains = _domains(records)
    rows = _within([r for name, edit in domains.items() for r in _bins(name, edit)])
    casts = distinct(rows, "values")
    count, width = panels(len(casts), 2, HALF)
    first, last = (f(r["log10_size"] for r in rows if r["log10_size"] is not None) for f in (min, max))
    zero = round(first) - 1.0  # where the entries that did not change are drawn
    step = 4 if last - first > 7 else 2 if last - first > 4 else 1  # labels of the axis need room
    marks = [zero, *range(int(round(first)), int(round(last)) + 1, step)]
    axis = alt.Axis(values=marks, labelExpr=f"datum.value == {zero} ? '0' : '1e' + datum.value")
    x = alt.X("at:Q", title="|δ| of an entry", axis=axis, scale=alt.Scale(domain=[zero - 0.3, last], nice=False))
    colour = alt.Color("domain:N", scale=by_category(list(domains)), title="edit of", legend=LEGEND)
    listed = [
        alt.Tooltip("domain:N"),
        alt.Tooltip("values:N"),
        alt.Tooltip("size:N", title="|δ|"),
        alt.Tooltip("count:Q", format=",.0f", title="entries"),
        alt.Tooltip("share:Q", format=".3g", title="share, %"),
    ]
    base = (
        alt.Chart()
        .transform_calculate(at=f"isValid(datum.log10_size) ? datum.log10_size : {zero}")
        .encode(x=x, y=alt.Y("share:Q", title="share of entries, %"), color=colour, tooltip=listed)
    )
    rule = alt.Chart(data([{"at": -7.0}] if first < -7 else [])).mark_rule(strokeDash=[4, 3], color=INK, opacity=QUIET)
    layers = alt.layer(
        rule.encode(x=x),
        base.transform_filter("isValid(datum.log10_size)").mark_line(interpolate="step"),
        base.mark_point(filled=True, opacity=1).encode(
            size=alt.when("isValid(datum.log10_size)").then(alt.value(8)).otherwise(alt.value(70))
        ),
        data=data(rows),
    ).properties(width=width, height=200)
    caption = (
        f"Share of all {_entries(domains)} entries in each half decade of |δ|; exact counts. The marks at 0 show the "
        "entries that did not change at all. Dashed: the published threshold 1e-7. Changes grow with learning rate × "
        "steps, so the share below the threshold is comparable only between runs of equal learning rate × steps."
        f"{_without_bf16(casts)}"
    )
    chart = side_by_side(layers, "values", casts, count)
    return Figure("edit-sizes", "Size of the changes", chart, rows, caption)


def sparsity(records: Records) -> Figure:
    """Shares of the entries of each domain's edit δ that hardly changed, by several rules, and its participation ratio.

    Returns:
      The figure `edit-sparsity`: one chart for each rule, with the figure in % on the horizontal axis and a line for
      each domain. The rules are |δ| below each threshold of the record, |δ|/|θ| < 1e-3 with θ the parameter before the
      edit, and |δ| < 1e-7 together with |δ|/|θ| < 1e-3; each for fp32 and after a bf16 cast. The last chart has the
      participation ratio (Σδ²)²/(nΣδ⁴) of the n entries, for fp32.

    Raises:
      Absent: if `analysis/edits.json` is missing or has no domains.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    domains = _domains(records)
    rows = [r for name, edit in domains.items() for r in _shares(name, edit)]
    order = distinct(rows, "rule")
    count, width = panels(len(order), 2, HALF)
    title = "share of entries, %"
    scale = alt.Scale(domain=[0, 100])
    base = alt.Chart().encode(
        y=alt.Y("domain:N", sort=list(domains), title=None),
        yOffset=alt.YOffset("values:N", sort=list(CASTS.values())),
        tooltip=estimate_tips(["domain", "rule", "values"], title, null=True),
    )
    colour = alt.Color("values:N", scale=by_category(list(CASTS.values())), title=None, legend=LEGEND)
    # All rows of a panel have the same published range, so one rectangle is enough. Panels without a range have none.
    published = alt.Chart().transform_filter("isValid(datum.published_low)")
    published = published.transform_aggregate(low="min(published_low)", high="max(published_high)")
    x = alt.X("estimate:Q", title=title, scale=scale)
    layers = alt.layer(
        published.mark_rect(color=CATEGORIES[4], stroke=CATEGORIES[4], **COLOURED).encode(
            x=alt.X("low:Q", title=title), x2="high:Q"
        ),
        base.mark_tick(color=INK, thickness=2, height=12).encode(x=alt.X("null:Q", title=title)),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=colour),
        base.mark_point(filled=True, size=50, opacity=1).encode(x=x, color=colour),
        data=data(rows),
    ).properties(width=width, height=28 * len(domains))
    caption = (
        "Lines: 95 % intervals by jackknife over layers. Black ticks: the value of an edit with Gaussian entries and "
        "the same norm in each tensor. The participation ratio (Σδ²)²/(nΣδ⁴) is 1 if all entries changed by the same "
        f"amount and 1/n if only one changed. Shaded: published, {CLAIMS['C1'].published}."
    )
    chart = side_by_side(layers, "rule", order, count)
    return Figure("edit-sparsity", "How sparse the edits are", chart, rows, caption)


def ranks(records: Records) -> Figure:
    """Effective rank of every tensor's edit δ, and the share of its entries that hardly changed, by kind and layer.

    Returns:
      The figure `edit-modules`: for each of the two figures a map for each domain, with layers on the horizontal and
      kinds of tensors on the vertical axis. The effective rank is exp(−Σ p log p), p the squared singular values of the
      tensor's edit over their sum; a tensor that is no matrix, or did not change, has none. The share is that of
      entries with |δ|/|θ| < 1e-3 or δ = 0, θ the parameter before the edit, in %, for fp32. Tensors outside the layers
      are in a column "–". A figure that no tensor has gets no maps.

    Raises:
      Absent: if `analysis/edits.json` is missing, has no domains, or has no figures by layer.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    domains = _domains(records)
    rows = [r for name, edit in domains.items() for r in _modules(name, edit)]
    if not rows:
        raise Absent("analysis/edits.json has no figures by layer")
    charts = [
        _map([r for r in rows if r[key] is not None], key, title, form, list(domains))
        for key, title, form in (
            ("effective_rank", "effective rank", ".0f"),
            ("relative", "|δ|/|θ| < 1e-3, % of entries", ".0f"),
        )
        if any(r[key] is not None for r in rows)
    ]
    caption = (
        "Effective rank: the exponential of the entropy of the normalised squared singular values. It is 1 for an "
        "outer product and at most the smaller dimension of the matrix. |δ|/|θ| < 1e-3: the share of entries with a "
        "relative change below 1e-3. Columns are layers; the column – holds tensors outside the layers."
    )
    chart = alt.vconcat(*charts, spacing=24).resolve_scale(color="independent")
    return Figure("edit-modules", "Rank and sparsity of the edits, module by module", chart, rows, caption)


def neurons(records: Records) -> Figure:
    """Overlap of the most-changed MLP neurons of every two domains beside chance, and the sign conflict of their edits.

    Returns:
      The figure `edit-neurons`, with three charts. Left: the Jaccard index of the top 10 % of each layer, as a matrix
      of domains. Middle: two Jaccard indices with intervals for each pair, of the top 10 % of each layer and of the
      whole model. Right: the sign conflict of each pair in %, which is the share of opposite signs among the entries in
      the top 20 % by size of both edits. In the last two, figures are horizontal and pairs are lines.

    Raises:
      Absent: if `analysis/edits.json` is missing, or has no domains or no pairs of domains.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    record, domains = records.json("analysis/edits.json"), list(_domains(records))
    rows = [r for pair in record["pairs"] for r in _overlaps(pair)]
    if not rows:
        raise Absent("analysis/edits.json has no pairs: fewer than two domains were trained")
    pairs = distinct(rows, "pair")
    sets = ("top 10 % of each layer", "top 10 % of the model")
    jaccard = [r for r in rows if r["figure"] == "Jaccard"]
    signs = [r for r in rows if r["figure"] == "sign conflict"]
    left = pairwise.matrix([r for r in jaccard if r["set"] == sets[0]], domains, "Jaccard, each layer")
    middle = pairwise.beside_chance(
        jaccard, pairs, "Jaccard of the sets", 240, alt.Scale(zero=True), "set", sets, dashed=WEAK_OVERLAP
    )
    right = pairwise.beside_chance(signs, pairs, "signs that differ, %", 150, alt.Scale(domain=[0, 100]), labels=False)
    caption = (
        "Left and middle: overlap of the neurons that two edits change most, with 95 % intervals over channels. Grey: "
        "the central 95 % of random sets of the same sizes. "
        f"Dashed: {WEAK_OVERLAP}; the published mean lies below it. Right: share of opposite signs among the entries "
        "in the top 20 % of both edits; 50 % by chance. "
        f"Mean Jaccard over pairs, each layer: {words(record['mean_jaccard'], '.3f')}."
    )
    lines = alt.hconcat(middle, right, spacing=18).properties(name=ALIGNED)
    chart = alt.hconcat(left, lines, spacing=18)
    return Figure("edit-neurons", "Do the edits hit the same neurons?", chart, rows, caption)


def _domains(records: Records) -> dict[str, Any]:
    domains = records.json("analysis/edits.json")["domains"]
    if not domains:
        raise Absent("analysis/edits.json has no domains: nothing was trained")
    return domains


def _entries(domains: dict[str, Any]) -> str:
    return " or ".join(f"{n:,}" for n in sorted({edit["all"]["n"] for edit in domains.values()}))


def _without_bf16(casts: Sequence[str]) -> str:
    return "" if len(casts) > 1 else " An older version made this analysis and did not count entries after a bf16 cast."


def _bins(domain: str, edit: dict[str, Any]) -> Iterator[Row]:
    found = edit.get("histogram")
    if found is None:
        raise Absent("analysis/edits.json has no histogram of |δ|, because an older version wrote it; analyze again")
    edges, step = found["log10_edges"], found["log10_edges"][1] - found["log10_edges"][0]
    for cast, label in CASTS.items():
        counted = found if cast == "fp32" else found.get(cast)
        if counted is None:
            continue
        counts, n = counted["counts"], sum(counted["counts"])
        head = {"domain": domain, "values": label}
        still = counted["unchanged"]
        yield head | {"size": "unchanged", "log10_size": None, "count": still, "share": 100 * still / n}
        for i, count in enumerate([counts[0] - still, *counts[1:]]):
            low = edges[0] - step if i == 0 else edges[i - 1]
            size = f"1e{low:g} to 1e{low + step:g}"
            if i in (0, len(edges)):
                size = f"below 1e{edges[0]:g}" if i == 0 else f"above 1e{edges[-1]:g}"
            yield head | {"size": size, "log10_size": low + step / 2, "count": count, "share": 100 * count / n}


def _within(rows: Sequence[Row]) -> list[Row]:
    """Drops the empty bins below the smallest and above the largest size that occurs, except one at each end."""
    sizes = [r["log10_size"] for r in rows if r["log10_size"] is not None and r["count"]]
    low, high = min(sizes, default=0.0) - 0.6, max(sizes, default=0.0) + 0.6
    return [r for r in rows if r["log10_size"] is None or low < r["log10_size"] < high]


def _shares(domain: str, edit: dict[str, Any]) -> Iterator[Row]:
    rules = {f"|δ| < {t.replace('e-0', 'e-')}": ("below", t) for t in edit["all"]["fp32"]["below"]}
    rules |= {"|δ|/|θ| < 1e-3": ("relative",), BOTH: ("both",)}
    for rule, path in rules.items():
        for cast, label in CASTS.items():
            record = edit["all"][cast]
            for key in path:
                record = record[key]
            row = {"domain": domain, "rule": rule, "values": label}
            row |= estimate_columns(record, 100) | null_columns(record, 100)
            low, high = SPARSE_SHARES if rule == BOTH else (None, None)
            yield row | {"published_low": low, "published_high": high}
    record = edit["all"]["participation"]
    row = {"domain": domain, "rule": "participation ratio", "values": CASTS["fp32"]}
    row |= estimate_columns(record, 100) | null_columns(record, 100)
    yield row | {"published_low": None, "published_high": None}


def _modules(domain: str, edit: dict[str, Any]) -> Iterator[Row]:
    for kind, figures in edit["kinds"].items():
        layers = figures.get("layers")
        if layers is None:
            rank = figures.get("effective_rank", {}).get("estimate")
            share = 100 * figures["fp32"]["relative"]["estimate"]
            yield {"domain": domain, "kind": kind, "layer": NO_LAYER, "effective_rank": rank, "relative": share}
            continue
        ranked = layers["effective_rank"] or [None] * len(layers["relative"])
        for i, (rank, share) in enumerate(zip(ranked, layers["relative"], strict=True)):
            yield {"domain": domain, "kind": kind, "layer": str(i), "effective_rank": rank, "relative": 100 * share}


def _map(rows: Sequence[Row], key: str, title: str, form: str, domains: Sequence[str]) -> alt.FacetChart:
    x, y, n_layers, n_kinds = tensor_axes(rows)
    count, width = panels(len(domains), 4, HALF - 20, 12)
    width = min(width, 40 * n_layers)
    high = max(r[key] for r in rows)
    named = [alt.Tooltip(f"{name}:N") for name in ("domain", "kind", "layer")]
    base = alt.Chart().encode(x=x, y=y, tooltip=[*named, *tooltips({key: title}, ".3g")])
    scale = alt.Scale(scheme=SEQUENTIAL, domain=[0, high or 1])
    legend = None if n_layers <= MOST_NUMBERS else LEGEND  # the numbers are printed
    marks = [base.mark_rect().encode(color=alt.Color(f"{key}:Q", scale=scale, title=None, legend=legend))]
    if n_layers <= MOST_NUMBERS:
        text = base.mark_text().encode(text=alt.Text(f"{key}:Q", format=form), color=ink_on(key, high))
        marks.append(text)
    made = alt.layer(*marks, data=data(rows)).properties(width=width, height=20 * n_kinds)
    return side_by_side(made, "domain", domains, count, title=title)


def _overlaps(pair: dict[str, Any]) -> Iterator[Row]:
    a, b = pair["domains"]
    head = {"pair": pairwise.name((a, b)), "a": a, "b": b}
    for key, label in (("by_layer", "top 10 % of each layer"), ("global", "top 10 % of the model")):
        yield head | {"figure": "Jaccard", "set": label} | estimate_columns(pair[key]) | null_columns(pair[key])
    record = pair["sign_conflict"]["all"]
    chance = {"null": 100 * record["chance"], "null_low": None, "null_high": None}
    yield head | {"figure": "sign conflict", "set": "top 20 % of entries"} | estimate_columns(record, 100) | chance
