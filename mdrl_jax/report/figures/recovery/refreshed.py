"""Each refresh, distillation and alternating refresh step by step: scores, recovery fraction, and θ_t − θ* in and
outside S.

Definitions §8, §10; claim C6.
"""

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np

from mdrl_jax.claims.published import LEAST_FRACTION, RECOVERY_FRACTION
from mdrl_jax.config import parse, stage_config
from mdrl_jax.report.figure import CATEGORIES, COLOURED, HALF, INK, QUIET, Figure, Table, by_category, data
from mdrl_jax.report.figures.layout import LEGEND
from mdrl_jax.report.folder import UNSCORED, Absent, Records
from mdrl_jax.report.intervals import columns, number, tips, tooltips, words
from mdrl_jax.report.tables.recovered import recoveries
from mdrl_jax.report.tables.theorem import Check, checks
from mdrl_jax.stats.estimate import Estimate, Record, figure_text, missing

AVERAGE = "mean of all"
FAINT: dict[str, Any] = {**COLOURED, "fillOpacity": 0.1, "strokeWidth": 0.8}  # bands of several domains overlap
PARTS = {"within": "in S", "route": "on the route, not in S", "outside": "everywhere but in S"}
RANDOM = "random subspaces"
OBJECTIVES = {"reward": "reward", "success_nll": "success NLL"}
OPTIMIZERS = {"adamw": "AdamW on the loss of GRPO", "sgd": "clipped gradient descent on the loss of GRPO"}
ACROSS = 2  # small charts in a line
MOST = 12  # recoveries of one kind that the page follows step by step; the records of the others are in recovery/
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)


def curves(records: Records) -> list[Figure]:
    """Scores of all domains and the recovery fraction against the step of each stage that trains to recover.

    Returns:
      One figure for each record `recovery/refresh-*.json`, `recovery/distill-*.json` and `recovery/alternate-*.json`,
      named as its stage, for example `refresh-math`, or `distill-math.full` for `distill-math@full`; of more than
      `MOST` records, for those whose domain had lost most. The optimizer step is horizontal. The upper chart has the
      scores in points on validation prompts, with a line for each domain and one for their mean. The lower chart has
      the recovery fraction of the record's domain, (score − score at step 0) / (score at its peak − score at step 0);
      it is left out if no step has one.

    Raises:
      Absent: if there is no such record.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    return [_curves(record, _on_test(records, record["stage"])) for record in _followed(records)]


def contraction(records: Records) -> list[Figure | Table]:
    """The distance to the peak in each conflict subspace S and outside it, step by step, and its mean factor per step.

    Returns:
      For each refresh, distillation or alternating refresh that followed an S of at least one dimension, a figure and a
      table. The figure `STAGE-contraction` has a chart for each such S, of each objective and half of the prompts. The
      step is horizontal; the distance relative to step 0 is vertical, on a log scale. Lines: in S, on the route but not
      in S, everywhere but in S, and the mean of random subspaces with their central 95 %. The table `STAGE-factors` has
      a row for each S, also one without a dimension: its dimensions, the mean factor per step of each of these
      distances (below 1 it shrinks), the log factor in S minus that everywhere else, and the bound 1 − αμ (α: learning
      rate, μ: smallest eigenvalue that spans S).

    Raises:
      Absent: if there is no such record, or none followed a conflict subspace.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found: list[Figure | Table] = []
    recoveries = _followed(records)
    for record in recoveries:
        if any(basis["within"] for basis in record["steps"][0].get("subspaces", ())):
            found += [_paths(record), _factors(record)]
    if not found:
        names = ", ".join(r["stage"] for r in recoveries)
        why = "they come from a stage `analyze` before the stage, and an S of no dimension is not followed"
        raise Absent(f"{names}: no conflict subspaces were followed: {why}")
    return found


def theorem(records: Records) -> list[Table]:
    """The contraction theorem on this run: each assumption as measured, and both factors (definitions §8).

    Returns:
      For each refresh a table `STAGE-theorem-…` for each conflict subspace S that the analysis measured the assumptions
      of. It has a row for each assumption (what was measured with its 95 % interval over blocks of prompts, what the
      theorem asks for, and whether it holds). Three more rows have the factor of the theorem; its bound for the first
      step, which allows for the gradient in S and for the part outside S; and the measured factor. The caption sums up
      in words.

    Raises:
      Absent: if there is no `recovery/refresh-*.json`, no `analysis/subspace.json` or no `config.json`, or if no S has
        both records.
      UserError: if a record is not valid JSON, or the configuration has fields that are not valid.
      KeyError: if a record lacks a field.
    """
    refreshes = [records.json(path) for path in records.files("recovery/refresh-*.json")]
    pairs = records.json("analysis/subspace.json")["pairs"]
    found = []
    for record in refreshes if any("theorem" in pair for pair in pairs) else ():
        config = parse(records.json("config.json")["config"])
        optimizer = OPTIMIZERS[stage_config(config, record["stage"]).optimizer.name]
        found += [_theorem(record, check) for check in checks(record, pairs, optimizer)]
    if not found:
        names = ", ".join(r["stage"] for r in refreshes)
        why = "it needs analyze.theorem=True, as in configs/claims.py, and a conflict subspace found before the refresh"
        raise Absent(f"{names}: no assumption of the contraction theorem was measured: {why}")
    return found


def _followed(records: Records) -> list[Record]:
    """The records of refreshes, then those of distillations, then those of alternating refreshes; at most `MOST`."""
    prefixes = ("recovery/refresh-", "recovery/distill-", "recovery/alternate-")
    paths = [p for prefix in prefixes for p in records.files("recovery/*.json") if p.startswith(prefix)]
    found = [records.json(path) for path in paths or records.files("recovery/refresh-*.json")]
    return largest(found, lambda r: r["steps"][0].get("to_peak") or missing(""))


def largest(found: Sequence[Record], lost: Callable[[Record], Record]) -> list[Record]:
    """All records, or the `MOST` of them whose domain had lost most, in their order: each has figures of its own.

    Args:
      found: records of recoveries.
      lost: (record) -> the figure of what its domain had lost; its magnitude counts, and nothing if it is missing.
    """
    if len(found) <= MOST:
        return list(found)
    size = [abs(lost(r)["estimate"] or 0.0) for r in found]
    kept = sorted(range(len(found)), key=lambda i: -size[i])[:MOST]
    return [found[i] for i in sorted(kept)]


def named(record: Record) -> str:
    """The name of the stage, in which a figure's name has `.` for the `@` before a label."""
    return record["stage"].replace("@", ".")


def labelled(record: Record) -> str:
    """The label of the stage as a part of a title, " (label)"; "" if it has none."""
    label = record["stage"].partition("@")[2]
    return f" ({label})" if label else ""


def _what(record: Record) -> str:
    return "Distillation" if record["stage"].startswith("distill-") else "Refresh"


def _on_test(records: Records, stage: str) -> Record:
    """The recovery fraction of a stage on the test prompts, which are more than those that it was scored on."""
    try:
        found = next((r.fraction for r in recoveries(records.matrix()) if r.stage == stage), None)
    except UNSCORED:
        found = None
    return found.record() if found else missing("its stage has no scores on test prompts yet")


def _curves(record: Record, on_test: Record) -> Figure:
    domain, steps = record["domain"], record["steps"]
    domains = list(steps[0]["scores"])
    rows = []
    for row in steps:
        scores = row["scores"] | {AVERAGE: row["average"]}
        fraction = columns("fraction", row["fraction"])
        for name, score in scores.items():
            rows.append({"step": row["step"], "domain": name} | columns("score", score))
            rows[-1] |= fraction if name == domain else dict.fromkeys(fraction)
    peak = 100 * float(np.mean(record["peak"])) if "peak" in record else None
    charts: list[Any] = [_scores(rows, domains, domain, peak, record)]
    if any(row["fraction"] is not None for row in rows):
        charts.append(_fraction([row for row in rows if row["domain"] == domain], record))
    n = steps[0]["scores"][domain]["n"]
    kept = {row["step"]: row for row in steps}[record["chosen"]]
    here, lost = words(kept["fraction"]), f"of what {domain} had lost is recovered"
    published = f"(published for Math: {RECOVERY_FRACTION})"
    if on_test["estimate"] is not None:
        n_test = f"the {on_test['n']} test prompts of the score matrix"
        back = f"on {n_test} {words(on_test)} {lost} {published}; on these prompts the fraction is {here}"
    elif kept["fraction"]["estimate"] is not None:
        back = f"{here} {lost} {published}"
    else:
        back = f"the recovery fraction is not known: {here}"
    caption = (
        f"Scores in points on {n} validation prompts a domain, with 95 % bands over prompts; step 0 is where the "
        "stage started. It keeps the step with the best mean of all domains. This is step "
        f"{record['chosen']}: {back}. "
        f"{'It ended because ' + record['stopped'] if record['stopped'] else 'It has not ended yet'}."
    )
    title = f"{_what(record)} of {domain}{labelled(record)}: scores step by step"
    return Figure(named(record), title, alt.vconcat(*charts, spacing=12), rows, caption)


def _scores(rows: Sequence[Record], domains: Sequence[str], domain: str, peak: float | None, record: Record) -> Any:
    scale = alt.Scale(domain=[*domains, AVERAGE], range=[*by_category(domains).to_dict()["range"], INK])
    colour = alt.Color("domain:N", scale=scale, title="domain", legend=LEGEND)
    base = alt.Chart(data(rows)).encode(x=_step(record), color=colour, tooltip=_tooltip("score"))
    title = f"score, points ({_validation(record)})"
    y = alt.Y("score:Q", title=title, scale=alt.Scale(zero=False))
    bands = base.mark_area(**FAINT).encode(
        y=alt.Y("score_low:Q", title=title, scale=alt.Scale(zero=False)),
        y2="score_high:Q",
        stroke=alt.Stroke("domain:N", scale=scale, title="domain", legend=LEGEND),
    )
    dash = alt.when(alt.datum.domain == AVERAGE).then(alt.value([6, 3])).otherwise(alt.value([1, 0]))
    layers = [
        bands,
        base.mark_line().encode(y=y, strokeDash=dash),
        base.mark_point(filled=True, size=55, opacity=1).encode(y=y),
    ]
    if peak is not None:
        at = alt.Chart(data([{"peak": peak, "shown": f"{domain} at its peak, {peak:.1f}"}])).encode(y="peak:Q")
        layers.append(at.mark_rule(color=_colour(record), strokeDash=[2, 3], strokeWidth=2))
        layers.append(at.mark_text(align="left", x=6, dy=-8).encode(text="shown:N"))
    return alt.layer(*layers, _kept(record, "kept")).properties(width=HALF, height=260)


def _fraction(rows: Sequence[Record], record: Record) -> Any:
    base = alt.Chart(data(rows)).encode(x=_step(record), tooltip=_tooltip("fraction"))
    scale = alt.Scale(zero=True)
    title = ["recovery fraction", f"({_validation(record)})"]
    y = alt.Y("fraction:Q", title=title, scale=scale)
    low = alt.Y("fraction_low:Q", title=title, scale=scale)
    published = {"at": RECOVERY_FRACTION, "shown": f"published, {RECOVERY_FRACTION}"}
    marks = [published, {"at": LEAST_FRACTION, "shown": "C6 asks for more than this"}]
    rules = alt.Chart(data(marks)).encode(y="at:Q")
    colour = _colour(record)
    return alt.layer(
        rules.mark_rule(strokeDash=[2, 3], opacity=QUIET),
        rules.mark_text(align="left", x=6, dy=-8).encode(text="shown:N"),
        base.mark_rule(strokeWidth=1.5, color=colour).encode(y=low, y2="fraction_high:Q"),
        base.mark_line(color=colour).encode(y=y),
        base.mark_point(filled=True, size=55, color=colour, opacity=1).encode(y=y),
        _kept(record, ""),
    ).properties(width=HALF, height=120)


def _validation(record: Record) -> str:
    return f"{record['steps'][0]['scores'][record['domain']]['n']} validation prompts"


def _step(record: Record) -> alt.X:
    last = max(record["settings"]["steps"], record["steps"][-1]["step"])
    axis = alt.Axis(tickMinStep=1, format="d")
    return alt.X("step:Q", title="optimizer step of the stage", axis=axis, scale=alt.Scale(domain=[0, last]))


def _colour(record: Record) -> str:
    """The colour that `by_category` gives to the record's domain."""
    return CATEGORIES[list(record["steps"][0]["scores"]).index(record["domain"]) % len(CATEGORIES)]


def _kept(record: Record, text: str) -> Any:
    at = alt.Chart(data([{"step": record["chosen"], "shown": text}])).encode(x="step:Q")
    label = at.mark_text(align="right", baseline="bottom", y="height", dx=-6, dy=-4).encode(text="shown:N")
    return alt.layer(at.mark_rule(strokeWidth=1.5, opacity=QUIET), label)


def _tooltip(what: str) -> list[alt.Tooltip]:
    title = {"score": "score, points", "fraction": "recovery fraction"}[what]
    return [alt.Tooltip("step:Q"), alt.Tooltip("domain:N"), *tips(what, title)]


def _label(basis: Record, several: bool) -> str:
    stage = f", {basis['stage']}" if several else ""
    return f"{OBJECTIVES.get(basis['objective'], basis['objective'])}, half {basis['half'] + 1}{stage}"


def _labels(record: Record) -> list[str]:
    several = len({b["stage"] for b in record["contraction"]}) > 1
    return [_label(b, several) for b in record["contraction"]]


def _paths(record: Record) -> Figure:
    rows = []
    starts = record["steps"][0]["subspaces"]
    followed = [i for i, start in enumerate(starts) if start["within"]]  # a subspace without dimensions has no distance
    for i in followed:
        start, label = starts[i], _labels(record)[i]
        for row in record["steps"]:
            now, head = row["subspaces"][i], {"subspace": label, "k": start["k"], "step": row["step"]}
            for part, name in PARTS.items():
                ratio = now[part] / start[part] if start[part] else None
                rows.append(head | {"part": name, "ratio": ratio, "low": None, "high": None})
            drawn = np.divide(now["random"], start["random"])
            if drawn.size:
                low, high = np.quantile(drawn, [0.025, 0.975])
                ends = {"ratio": float(drawn.mean()), "low": float(low), "high": float(high)}
                rows.append(head | {"part": RANDOM} | ends)
    first, label = record["contraction"][followed[0]], _labels(record)[followed[0]]
    n = len(starts[followed[0]]["random"])
    caption = (
        f"Distance to {record['domain']}'s peak relative to step 0, on a log scale; below 1 it has shrunk. Each S is a "
        f"conflict subspace found on one half of the prompts. Band: the central 95 % of {n} random subspaces of the "
        f"same route and dimension. For the S “{label}” the mean factor per step is {words(first['within'], '.3f')} "
        f"in S and {words(first['outside'], '.3f')} everywhere but in S. The bound for plain gradient descent in S is "
        f"{_bound(first)}."
    )
    name = f"{named(record)}-contraction"
    of = f"{record['domain']}{labelled(record)}"
    title = f"{_what(record)} of {of}: distance to its peak, in the conflict subspaces S and outside"
    return Figure(name, title, _facets(rows, _labels(record)), rows, caption)


def _facets(rows: Sequence[Record], labels: Sequence[str]) -> Any:
    parts = [*PARTS.values(), RANDOM]
    colour = alt.Color(
        "part:N",
        title="θ − θ*",
        scale=alt.Scale(domain=parts, range=[*CATEGORIES[:3], CATEGORIES[-1]]),
        legend=LEGEND,
    )
    found = [row[key] for row in rows for key in ("ratio", "low", "high") if row[key]]
    ends = 0.98 * min(found), 1.02 * max(found)
    scale = alt.Scale(type="log", domain=list(ends), nice=False)
    title = "distance, relative to step 0"
    tooltip = [
        alt.Tooltip("subspace:N"), alt.Tooltip("k:Q", title="dimensions of S"), alt.Tooltip("step:Q"),
        alt.Tooltip("part:N"), *tooltips({"ratio": title, "low": "random: 95 % from", "high": "to"}, ".3f"),
    ]  # fmt: skip
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d"))
    base = alt.Chart().encode(x=x, color=colour, tooltip=tooltip)
    axis = alt.Axis(values=[x for x in TICKS if ends[0] <= x <= ends[1]], format="~g")
    y = alt.Y("ratio:Q", title=title, scale=scale, axis=axis)
    drawn = base.transform_filter(alt.datum.part == RANDOM)
    layers = (
        drawn.mark_area(stroke=CATEGORIES[-1], **COLOURED).encode(
            y=alt.Y("low:Q", title=title, scale=scale, axis=axis), y2="high:Q"
        ),
        base.mark_line().encode(y=y),
        base.mark_point(filled=True, size=35, opacity=1).encode(y=y),
    )
    return (
        alt.layer(*layers, data=data(rows))
        .properties(width=235, height=150)
        .facet(facet=alt.Facet("subspace:N", sort=list(labels), title=None), columns=ACROSS, spacing=14)
    )


def _factors(record: Record) -> Table:
    head = ("S", "dimensions", *PARTS.values(), RANDOM, "log S − log elsewhere", "1 − αμ")
    rows = []
    for label, found in zip(_labels(record), record["contraction"], strict=True):
        null = found["within"]["null"]
        drawn = f"{null['low']:.3f} to {null['high']:.3f}" if null else "–"
        parts = [words(found[part], ".3f") for part in PARTS]
        rows.append((label, str(found["k"]), *parts, drawn, words(found["faster"], ".3f"), _bound(found)))
    caption = (
        "Mean factor of the distance to the peak per step, with its 95 % interval over steps (not over seeds). Below 1 "
        "the distance shrinks. Random subspaces: the central 95 % of their factors. The difference of logs is below 0 "
        "if the distance shrinks faster in S; random steps can cause that, too, and the claim C6 lists what it asks "
        "for. The bound 1 − αμ, with μ the smallest eigenvalue that spans S, holds for plain gradient descent with "
        "step size α; under Adam it is only descriptive."
    )
    title = f"{_what(record)} of {record['domain']}{labelled(record)}: factors per step"
    return Table(f"{named(record)}-factors", title, head, rows, caption, head[1:])


def _theorem(record: Record, check: Check) -> Table:
    head, rows = check.head, []
    for a in check.assumptions:
        shown = [a.text or _figure(a.figure), *(f"{what}: {_figure(x)}" for what, x in a.more.items())]
        rows.append((a.name, "; ".join(shown), a.asked, a.verdict))
    factors = {"factor of the theorem, 1 − αμ": check.factor, "bound of the first step": check.bound}
    rows += [(what, _one_minus(x), f"α = {check.alpha:g}, the learning rate", "–") for what, x in factors.items()]
    rows.append(("measured factor a step", words(check.measured, ".4f"), "–", "–"))
    several = len({b["stage"] for b in record["contraction"]}) > 1
    name = f"{named(record)}-theorem-{head['stage']}-{head['objective']}-{head['half'] + 1}"
    title = f"Refresh of {record['domain']}: the theorem in S ({_label(head, several)}; {head['k']} dimensions)"
    return Table(name, title, ("what", "measured", "asked", "verdict"), rows, check.summary(), folded=True)


def _figure(figure: Estimate | None) -> str:
    if figure is None:
        return "–"
    return figure_text(figure.value, (figure.low, figure.high), ".3g", number=number).replace("inf", "∞")


def _one_minus(figure: Estimate | None) -> str:
    """A factor near 1 as the text `1 − x [1 − y, 1 − z]`."""
    if figure is None:
        return "–"
    value, low, high = (f"1 {'−' if x <= 1 else '+'} {abs(1 - x):.2g}" for x in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _bound(found: Record) -> str:
    factor = found["bound"]["factor"]
    return "–" if factor is None else f"1 − {1 - factor:.1e}"
