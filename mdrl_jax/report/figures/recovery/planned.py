"""The planner's forecast of every action, the outcomes of the actions, and forecasts of the orders of the domains.

Definitions §10 describes planner, outcomes and orders.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, INK, QUIET, Figure, by_category, data
from mdrl_jax.report.figures.layout import ALIGNED, LEGEND, distinct
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import columns, span, tips, words
from mdrl_jax.stats.estimate import Record, missing

TOP = 12  # actions shown
ORDERS = 24  # orders shown, enough for all orders of four domains
KINDS = {"refresh": CATEGORIES[0], "rollback": CATEGORIES[1], "nothing": CATEGORIES[6]}
ALLOWED, OVER, RUN = "allowed", "over the limit", "was run"
OBJECTIVES = {"reward": "mean reward", "success_nll": "success NLL", "bwt": "backward transfer of the solo stages"}
SIDE = 330  # px


def plan(records: Records) -> Figure:
    """The most promising actions: forecast change of the mean over domains, and of the worst other domain, in points.

    Returns:
      The figure `plan`, with a line for each of the 12 actions of the largest forecast mean (`TOP`), for the pick, and
      for doing nothing. Two charts have the forecast with its 95 % interval on the horizontal axis, above 0 for a gain:
      the mean over domains, and the domain that fares worst of those that the action does not win back. Without such
      domains the second chart is left out.

    Raises:
      Absent: if `recovery/plan.json` is missing.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    record = records.json("recovery/plan.json")
    ranked = sorted(record["actions"], key=lambda a: (-a["average_change"]["estimate"], a["rank"]))
    kept = {a["name"]: a for a in ranked[:TOP]}
    kept |= {a["name"]: a for a in ranked if a["name"] == record["pick"] or a["kind"] == "nothing"}
    rows = []
    for action in kept.values():
        worst = action["collateral"] or {"domain": "", "change": missing("there is no other domain")}
        head = {"action": short(action), "name": action["name"], "rank": action["rank"], "risk": action["risk"]}
        head |= {"verdict": ALLOWED if action["allowed"] else OVER, "worst": worst["domain"]}
        head |= {"picked": "picked" if action["name"] == record["pick"] else ""}
        rows.append(head | columns("mean", action["average_change"]) | columns("other", worst["change"]))
    panels = [_panel(rows, "mean", "change of the mean over domains, points", 0.0)]
    if any(r["other"] is not None for r in rows):
        panels.append(_panel(rows, "other", "worst other domain: change, points", -record["limit"]))
    caption = (
        f"{record['reason']} Of {len(record['actions'])} actions the {TOP} best are shown, with the pick and doing "
        f"nothing. All figures are forecasts with 95 % intervals, made before any action is tried. An action is "
        f"allowed if no other domain is expected to lose more than {record['limit']:g} points (dashed)."
    )
    chart = alt.hconcat(*panels, spacing=14).properties(name=ALIGNED)
    return Figure("plan", "What the planner expects of each action", chart, rows, caption)


def short(action: Record) -> str:
    """An action in a few words, for example "refresh math, 5 steps".

    Args:
      action: one entry of the "actions" of `recovery/plan.json`. Its "kind" is "nothing", "refresh" (with "domain" and
        "steps") or "rollback" (with "domain", "donor", "fraction", "strength" and "rule").

    Returns:
      "do nothing", "refresh math, 1 step", or "roll 0.3 % of qa back for math (removing, strength 0.5)", with the
      fraction in % of all coordinates, and without a strength of 1.

    Raises:
      KeyError: if the entry lacks a field that its kind needs.
    """
    if action["kind"] == "nothing":
        return "do nothing"
    if action["kind"] == "refresh":
        return f"refresh {action['domain']}, {action['steps']} step{'s' if action['steps'] > 1 else ''}"
    share = f"{100 * action['fraction']:g} %"
    strength = "" if action["strength"] == 1 else f", strength {action['strength']:g}"
    return f"roll {share} of {action['donor']} back for {action['domain']} ({action['rule']}{strength})"


def _panel(rows: Sequence[Record], name: str, title: str, mark: float) -> Any:
    first = name == "mean"
    axis = alt.Axis(labelLimit=330) if first else alt.Axis(labels=False, ticks=False)
    y = alt.Y("action:N", sort=[r["action"] for r in rows], title=None, axis=axis)
    colour = alt.Color(
        "verdict:N", title=None, legend=LEGEND,
        scale=alt.Scale(domain=[ALLOWED, OVER], range=[CATEGORIES[0], CATEGORIES[1]]),
    )  # fmt: skip
    shape = alt.Shape("verdict:N", title=None, scale=alt.Scale(domain=[ALLOWED, OVER], range=["circle", "square"]))
    tip = [
        alt.Tooltip("action:N"), alt.Tooltip("rank:Q"), alt.Tooltip("verdict:N"),
        *tips("mean", "mean over domains, points"), *tips("other", "worst other domain, points"),
        alt.Tooltip("worst:N", title="worst other domain"),
        alt.Tooltip("risk:Q", format=".0%", title="probability that another domain loses more than the limit"),
    ]  # fmt: skip
    base = alt.Chart(data(rows)).encode(y=y, tooltip=tip)
    x = alt.X(f"{name}:Q", title=title)
    low = alt.X(f"{name}_low:Q", title=title)
    layers = [
        alt.Chart(data([{"mark": mark}])).mark_rule(strokeDash=[4, 3]).encode(x="mark:Q"),
        base.mark_rule(strokeWidth=1.8).encode(x=low, x2=f"{name}_high:Q", color=colour),
        base.mark_point(filled=True, size=80, opacity=1).encode(x=x, color=colour, shape=shape),
    ]
    if not first:
        limit = alt.Chart(data([{"mark": mark, "shown": "limit"}])).mark_text(align="right", dx=-4, y=-6)
        layers.append(limit.encode(x="mark:Q", text="shown:N"))
    if first:
        layers.append(base.mark_text(dy=-10, fontWeight=700).encode(x=x, text="picked:N"))
    return alt.layer(*layers).properties(width=270 if first else 220, height=alt.Step(28))


def outcomes(records: Records) -> Figure:
    """Forecast against outcome of every action that was tried, in points: the mean over domains, and each domain.

    Returns:
      The figure `outcomes`. In both charts the forecast change is horizontal and the measured one vertical, in points,
      above 0 for a gain. Left: a point for each action, the mean over domains. Right: a point for each action and
      domain.

    Raises:
      Absent: if `recovery/outcomes.json` is missing or holds no action.
      UserError: if the file is not valid JSON, or as in `Records.matrix`, which gives the order of the domains.
      KeyError: if a record lacks a field.
      ValueError: as in `Records.matrix`.
    """
    record = records.json("recovery/outcomes.json")
    means, cells = [], []
    pick, best = ((record["regret"] or {}).get(key) for key in ("pick", "best"))
    for row in record["actions"]:
        head = {"action": row["name"], "kind": row["name"].partition("-")[0]}
        head["mark"] = "picked" if row["name"] == pick else "best" if row["name"] == best else ""
        for domain, found in {"mean": row["average_change"], **row["changes"]}.items():
            made = head | {"domain": domain} | columns("forecast", found["forecast"])
            (means if domain == "mean" else cells).append(made | columns("measured", found["measured"]))
    if not means:
        raise Absent("recovery/outcomes.json holds no action; the stage `trials` tries those of a plan")
    domains = _in_order(records, distinct(cells, "domain"))
    kinds = [k for k in KINDS if k in {r["kind"] for r in means}]
    by_kind = alt.Scale(domain=kinds, range=[KINDS[k] for k in kinds])
    chart = alt.hconcat(
        _scatter(means, "kind", by_kind, "mean over domains", True),
        _scatter(cells, "domain", by_category(domains), "each domain", False),
        spacing=40,
    ).resolve_scale(color="independent")
    found = record["calibration"]
    caption = (
        f"Change in points on validation prompts: forecast before an action was tried, and measured after it. On the "
        f"line both are equal; bars: 95 % intervals. Spearman {words(record['spearman'])} over actions"
        f"{_no_interval(record['spearman'])}. The 95 % interval of the forecast contained the outcome in "
        f"{words(found['average']['held'], '.0%')} of means over domains and in "
        f"{words(found['domain']['held'], '.0%')} of single domains.{_regret(record['regret'])}"
    )
    return Figure("outcomes", "Forecasts of the planner against measured outcomes", chart, means + cells, caption)


def _no_interval(figure: Record) -> str:
    """Why a figure that has an estimate has no interval, in brackets; "" if it has one."""
    reason = figure.get("reason", "") if figure["estimate"] is not None else ""
    return f" ({reason})" if reason else ""


def _in_order(records: Records, domains: Iterable[str]) -> list[str]:
    """Domains in the order of the run, so that they have the colours of other figures; the record sorts by name."""
    try:
        known = records.matrix().domains
    except Absent:
        known = ()
    return list(dict.fromkeys([*known, *domains]))


def _regret(found: Record | None) -> str:
    if found is None:
        return ""
    if found["pick"] == found["best"]:
        return " No action within the limit did better than the pick."
    return f" The best action within the limit, {found['best']}, did {words(found)} points better than the pick."


def _scatter(rows: Sequence[Record], by: str, scale: alt.Scale, title: str, bars: bool) -> Any:
    both = ("forecast", "measured")
    low, high = span(rows if bars else [{key: r[key] for key in both} for r in rows], both)
    ends = alt.Scale(domain=[low, high], nice=False)
    titles = [f"{key}, {title}, points" for key in both]
    x, y = alt.X("forecast:Q", title=titles[0], scale=ends), alt.Y("measured:Q", title=titles[1], scale=ends)
    colour = alt.Color(f"{by}:N", title=None, scale=scale, legend=LEGEND)
    tip = [
        alt.Tooltip("action:N"),
        alt.Tooltip("domain:N"),
        *tips("forecast", "forecast"),
        *tips("measured", "measured"),
    ]
    base = alt.Chart(data(rows)).encode(color=colour, tooltip=tip)
    equal = alt.Chart(data([{"at": low}, {"at": high}])).mark_line(color=INK, strokeDash=[4, 3], opacity=QUIET)
    layers = [equal.encode(x=alt.X("at:Q", scale=ends), y=alt.Y("at:Q", scale=ends))]
    if bars:
        across, up = alt.X("forecast_low:Q", title=titles[0]), alt.Y("measured_low:Q", title=titles[1])
        layers.append(base.mark_rule(strokeWidth=1).encode(x=across, x2="forecast_high:Q", y=y))
        layers.append(base.mark_rule(strokeWidth=1).encode(x=x, y=up, y2="measured_high:Q"))
    layers.append(base.mark_point(filled=True, size=45, opacity=1).encode(x=x, y=y))
    if bars:
        marked = alt.Chart(data([r for r in rows if r["mark"]])).encode(x=x, y=y)
        layers.append(marked.mark_point(size=150, color=INK, strokeWidth=1.8))
        layers.append(marked.mark_text(align="left", dx=9, dy=13, fontWeight=700).encode(text="mark:N"))
    return alt.layer(*layers).properties(width=SIDE, height=SIDE)


def orders(records: Records) -> list[Figure]:
    """Total damage of every order of the domains, forecast from the solo edits, and measured where an order was run.

    Returns:
      One figure for each objective that has a forecast: `orders` for the reward, `orders-success-nll` for the success
      NLL, and `orders-bwt` for the baseline by backward transfer. Each order is a line, the least harmful first, with
      the forecast on the horizontal axis in the unit of its record, above 0 for harm. An order that was run is coloured
      and has its measured total loss, in points, as text. An order without a forecast is left out. If there are more
      than 24 orders (`ORDERS`), only 12 at either end and those that were run are shown.

    Raises:
      Absent: if `recovery/orders.json` is missing, or no order has a forecast.
      UserError: if the file is not valid JSON.
      KeyError: if the file lacks a field.
    """
    record = records.json("recovery/orders.json")
    ranked = {
        name: [r for r in found["orders"] if r["total"]["estimate"] is not None] for name, found in record.items()
    }
    if not any(ranked.values()):
        reasons = {found["orders"][0]["total"].get("reason", "") for found in record.values()}
        raise Absent(f"no order has a forecast: {'; '.join(sorted(reasons))}")
    return [_orders(name, record[name], rows) for name, rows in ranked.items() if rows]


def _orders(objective: str, record: Record, ranked: Sequence[Record]) -> Figure:
    checked = {tuple(run["order"]): run for run in record["checked"]["runs"]}
    unit = ranked[0]["total"]["unit"]
    half = ORDERS // 2
    kept = [r for i, r in enumerate(ranked) if i < half or i >= len(ranked) - half or tuple(r["order"]) in checked]
    rows = []
    for row in kept:
        run = checked.get(tuple(row["order"]))
        measured = run["total"]["measured"] if run else missing("was not run")
        head = {"order": " → ".join(row["order"]), "rank": row["rank"], "state": RUN if run else "forecast only"}
        head |= {"shown": f"lost {words(measured, '.1f')} {measured['unit']}" if run else ""}
        rows.append(head | columns("forecast", row["total"]) | columns("measured", measured))
    left_out = {d: f["reason"] for d, f in ranked[0]["damage"].items() if f["estimate"] is None}
    same = all(run["total"]["measured"]["unit"] == unit for run in checked.values())
    spearman = record["checked"]["spearman"]
    agreed = words(spearman) if spearman["estimate"] is not None else f"not known ({words(spearman)})"
    how = "Forecast" if objective == "bwt" else "Second-order forecast"
    caption = (
        f"{how} of the total damage of each order in {unit}, the least harmful order first, with 95 % "
        f"intervals over prompts. Coloured: orders that were run, with the measured total loss in points; a diamond "
        f"marks it if the forecast has the same unit. Spearman correlation of forecast and measurement over "
        f"{spearman['n']} pairs of an order and a domain: {agreed}."
    )
    if left_out:
        caption += " Not in the forecast: " + "; ".join(f"{d}, {reason}" for d, reason in left_out.items()) + "."
    if len(kept) < len(record["orders"]):
        caption += f" Of {len(record['orders'])} orders the best, the worst and those that were run are shown."
    title = f"Orders of the domains: damage forecast by the {OBJECTIVES.get(objective, objective)}"
    name = "orders" if objective == "reward" else f"orders-{objective.replace('_', '-')}"
    return Figure(name, title, _ranking(rows, unit, same), rows, caption)


def _ranking(rows: Sequence[Record], unit: str, same: bool) -> Any:
    title = f"total damage forecast, {unit}"
    y = alt.Y("order:N", sort=[r["order"] for r in rows], title=None, axis=alt.Axis(labelLimit=330))
    colour = alt.Color(
        "state:N", title=None, legend=LEGEND,
        scale=alt.Scale(domain=["forecast only", RUN], range=[CATEGORIES[6], CATEGORIES[1]]),
    )  # fmt: skip
    tip = [
        alt.Tooltip("order:N"), alt.Tooltip("rank:Q"), *tips("forecast", title, ".3g"),
        *tips("measured", "total damage measured, points", ".3g"),
    ]  # fmt: skip
    base = alt.Chart(data(rows)).encode(y=y, tooltip=tip)
    layers = [
        alt.Chart(data([{"zero": 0.0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
        base.mark_rule(strokeWidth=1.8).encode(
            x=alt.X("forecast_low:Q", title=title), x2="forecast_high:Q", color=colour
        ),
        base.mark_point(filled=True, size=65, opacity=1).encode(x=alt.X("forecast:Q", title=title), color=colour),
    ]
    if same:
        at = base.transform_filter(alt.datum.state == RUN)
        layers.append(
            at.mark_rule(strokeWidth=1.5).encode(x=alt.X("measured_low:Q", title=title), x2="measured_high:Q")
        )
        layers.append(
            at.mark_point(shape="diamond", size=110, color=INK, filled=True, opacity=1).encode(x="measured:Q")
        )
    chart = alt.layer(*layers).properties(width=460, height=alt.Step(20))
    names = alt.Y("order:N", sort=[r["order"] for r in rows], title=None, axis=None)
    text = base.mark_text(align="left", x=4).encode(text="shown:N", y=names)
    return alt.hconcat(chart, text.properties(width=190, height=alt.Step(20)), spacing=0).properties(name=ALIGNED)
