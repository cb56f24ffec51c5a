"""Scores by stage and domain, and transfer between stages (definitions §2)."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from mdrl_jax.report.figure import HALF, SEQUENTIAL, Figure, Table, by_category, data, ink_on
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import number, tooltips
from mdrl_jax.report.tables.matrix import Matrix, Quantity, framed_cells, path_rows, score_at
from mdrl_jax.report.tables.transfer import quantities
from mdrl_jax.stats.estimate import interval_text

ROW_HEIGHT, CELL_WIDTH, FULL = 24, 100, 80  # px; cells of less than FULL have no room for an error
# What comes before the domain in the name of a recovery stage; rollbacks come last.
LONG = 40  # rows of a table from which on the page folds it
RECOVERIES = ("refresh-", "distill-", "alternate-", "rollback-")


def matrix(records: Records) -> Figure:
    """The score of every domain after every stage, in points, as a heat map.

    Returns:
      The figure `scores`: a line for each stage in the order of the run, and a column for each domain. A cell has the
      score and its standard error over prompts, each with one decimal. A frame marks the domain that the stage trained.

    Raises:
      Absent: if no stage has been scored yet.
      UserError: if an evaluation is not valid JSON, or does not fit the others (`tables.matrix.build`).
      KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = records.matrix()
    rows = _cells(found)
    scored = [r["score"] for r in rows if r["score"] is not None]
    if not scored:
        raise Absent("no stage has been scored yet")
    low, high = min(scored), max(scored)
    x = alt.X("domain:N", sort=None, title="domain tested", axis=alt.Axis(orient="top", labelAngle=0))
    y = alt.Y("stage:N", sort=None, title="after stage")
    colour = alt.Color(
        "score:Q",
        scale=alt.Scale(scheme=SEQUENTIAL, domain=[low, high if high > low else low + 1]),
        legend=None,
    )
    tips = _tips(stderr="standard error", accuracy="score regardless of style")
    base = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=[*tips, alt.Tooltip("prompts:Q")])
    cells = base.mark_rect().encode(color=colour)
    # On a narrow screen the page makes the cells smaller; they then have room for the score alone.
    short = f"width < {FULL * len(found.domains)}"
    labelled = base.transform_calculate(label=f"{short} ? split(datum.shown, ' ')[0] : datum.shown")
    text = labelled.mark_text().encode(text="label:N", color=ink_on("score", high, low))
    framed = base.transform_filter("datum.trained")
    outside = framed.mark_rect(fillOpacity=0, stroke="white", strokeWidth=5)
    inside = framed.mark_rect(fillOpacity=0, stroke="black", strokeWidth=2)
    chart = alt.layer(cells, outside, inside, text).properties(
        width=CELL_WIDTH * len(found.domains), height=ROW_HEIGHT * len(found.stages)
    )
    caption = (
        "Points (100 × mean reward) ± standard error over prompts, on held-out prompts that are the same after every "
        "stage. Framed: the domain that the stage trained."
    )
    return Figure("scores", "Score of every domain after every stage", chart, rows, caption)


def paths(records: Records) -> Figure:
    """Each domain's score along the sequence from the base, and after recoveries, in points.

    Returns:
      The figure `paths`: stages on the horizontal axis, scores with 95 % intervals over prompts on the vertical one,
      and a colour for each domain. A line joins the base, the warm-up and the training stages
      (`tables.matrix.path_rows`). To their right each refresh and distillation has a dashed line from the stage that it
      started from, if that one is shown, and each rollback a mark without a line.

    Raises:
      Absent: if fewer than two of these stages have been scored.
      UserError: if an evaluation is not valid JSON, or does not fit the others (`tables.matrix.build`).
      KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = records.matrix()
    along = path_rows(found)
    end = along[-1] if along else 0
    after = [s for s, name in enumerate(found.stages) if name.startswith(RECOVERIES) and s > end]
    rows = _path(found, [*along, *after])
    order = [found.stages[s] for s in [*along, *after]]
    if len(order) < 2:
        raise Absent("a path needs the scores of two stages, and fewer are done so far")
    plain = {found.stages[s] for s in along}
    for row in rows:
        row["part"] = "sequence" if row["stage"] in plain else "recovery"
    shown = {(r["stage"], r["domain"]): r["score"] for r in rows}
    links = [
        {"domain": r["domain"], "stage": start, "score": shown[start, r["domain"]], "to": r["stage"], "at": r["score"]}
        for r in rows
        if r["stage"].startswith(RECOVERIES[:3]) and ((start := found.starts[r["stage"]]), r["domain"]) in shown
    ]
    x = alt.X("stage:N", sort=order, title="after stage", axis=alt.Axis(labelAngle=-30))
    colour = alt.Color("domain:N", scale=by_category(found.domains), title="domain")
    base = alt.Chart(data(rows)).encode(x=x, color=colour, tooltip=_tips(low="95 % from", high="to"))
    y = alt.Y("score:Q", title="score, points", scale=alt.Scale(zero=False))
    lines = base.transform_filter("datum.part == 'sequence'").mark_line().encode(y=y)
    dashed = alt.Chart(data(links)).mark_rule(strokeDash=[5, 4], strokeWidth=2)
    refreshed = [dashed.encode(x=x, x2="to:N", y=y, y2="at:Q", color=colour)] if links else []
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title="score, points"), y2="high:Q")
    shape = alt.when("datum.trained").then(alt.value(130)).otherwise(alt.value(45))
    points = base.mark_point(filled=True, opacity=1).encode(y=y, size=shape)
    chart = alt.layer(lines, *refreshed, bars, points).properties(width=min(HALF, 80 * len(order)), height=300)
    caption = (
        "Scores in points with 95 % intervals over prompts. A large mark is the score of the domain that the stage "
        "trained. Dashed lines lead to each refresh and distillation from where it started; a rollback is a mark "
        "without a line."
    )
    return Figure("paths", "Score of each domain along the stages", chart, rows, caption)


def transfer(records: Records) -> Table:
    """Backward and forward transfer, forgetting, and the gain and cost of each recovery stage.

    Returns:
      The table `transfer`, a row for each figure of `tables.transfer.quantities`: its name, the estimate, the 95 %
      interval and a remark. Numbers are in points with two decimals; a fraction has no unit and three. A figure that
      the run cannot give is "–", with the reason as its remark.

    Raises:
      Absent: if no stage has been scored yet.
      UserError: if an evaluation is not valid JSON, or does not fit the others (`tables.matrix.build`).
      KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = quantities(records.matrix())
    return Table(
        "transfer",
        "Transfer, forgetting, recovery",
        ("figure", "estimate", "95 % interval", "remark"),
        [_line(q) for q in found],
        "BWT and FWT: backward and forward transfer. Differences are in points and paired over prompts; a fraction has "
        "no unit and a Fieller interval. Forgetting is measured from the highest score before the last stage, that of "
        "the model where the sequence starts included.",
        ("estimate", "95 % interval"),
        folded=len(found) > LONG,
    )


def _tips(**more: str) -> list[alt.Tooltip]:
    """Tooltips of a score and of further columns in points: {column: title}."""
    named = [alt.Tooltip("stage:N", title="after stage"), alt.Tooltip("domain:N")]
    return [*named, *tooltips({"score": "score, points"} | more)]


def _line(q: Quantity) -> tuple[str, str, str, str]:
    record = q.record()
    if record["estimate"] is None:
        return q.name, "–", "", q.reason
    form = ".3f" if "fraction" in q.name else ".2f"
    return q.name, number(record["estimate"], form), interval_text(record["ci95"], form, number=number), q.detail


def _cells(found: Matrix) -> list[dict[str, Any]]:
    framed = set(framed_cells(found))
    rows = []
    for (s, d), score in np.ndenumerate(found.score_SD):
        stderr = found.stderr_SD[s, d]
        shown = f"{score:.1f}" + (f" ± {stderr:.1f}" if np.isfinite(stderr) else "") if np.isfinite(score) else "–"
        rows.append(
            {
                "stage": found.stages[s],
                "domain": found.domains[d],
                "score": _finite(score),
                "stderr": _finite(stderr),
                "accuracy": _finite(found.accuracy_SD[s, d]),
                "prompts": len(found.rewards[s].get(found.domains[d], ())),
                "trained": (s, d) in framed,
                "shown": shown,
            }
        )
    return rows


def _path(found: Matrix, along: Sequence[int]) -> list[dict[str, Any]]:
    framed = set(framed_cells(found))
    rows = []
    for s in along:
        for d, domain in enumerate(found.domains):
            record = score_at(found, "", s, domain).record()
            if record["estimate"] is None:
                continue
            low, high = record["ci95"] or (None, None)
            head = {"stage": found.stages[s], "domain": domain, "score": record["estimate"]}
            rows.append(head | {"low": low, "high": high, "trained": (s, d) in framed})
    return rows


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
