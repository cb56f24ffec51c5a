"""Circuits: which attention heads a domain needs in the base model and after SFT and RL (definitions §11)."""

from collections.abc import Iterator
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, HALF, INK, Figure, Row, Table, data
from mdrl_jax.report.figures.layout import panels
from mdrl_jax.report.folder import Records
from mdrl_jax.report.intervals import words
from mdrl_jax.stats.estimate import Record

FILES = "analysis/circuits-*.json"
MOST_COLUMNS = 3
WORST = 5  # heads that are listed
CELL = 22  # px of a head, at most


def circuits(records: Records) -> list[Figure | Table]:
    """The heads of each record `analysis/circuits-D.json`, and what they do.

    Returns:
      For each record the figure `circuits-D`, a chart of layers by heads for each model, coloured by m, with a point on
      each head of base's circuit; the tables `circuits-D-models` and `circuits-D-pairs`; and the table
      `circuits-D-edits` if the edits of heads were measured.

    Raises:
      Absent: if there is no such record.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found: list[Figure | Table] = []
    for path in records.files(FILES):
        record = records.json(path)
        found += [_heads(record), _models(record), _compared(record), *_edits(record)]
    return found


def masks(records: Records) -> list[Figure | Table]:
    """A histogram of m for each model, as the figure `circuits-D-masks` of each record; it raises what `circuits` does.

    It shows whether the searches have decided.
    """
    return [_histogram(records.json(path)) for path in records.files(FILES)]


def _titled(record: Record) -> dict[str, str]:
    return {name: name if m["kind"] == "base" else f"{name} ({m['kind']})" for name, m in record["models"].items()}


def _head_rows(record: Record) -> Iterator[Row]:
    titles, base = _titled(record), record["models"][record["base"]]
    for name, model in record["models"].items():
        width = len(model["m"][0])
        opened, hidden = ({tuple(h) for h in model[field]} for field in ("open", "hidden"))
        for layer, heads in enumerate(model["m"]):
            for head, m in enumerate(heads):
                notes = ["the starts disagree"] * ((layer, head) in opened)
                notes += ["redundant: does the work of heads of the circuit"] * ((layer, head) in hidden)
                yield {
                    "model": titles[name],
                    "layer": layer,
                    "head": head,
                    "m": m,
                    "in_base": base["m"][layer][head] > 0.5,
                    "necessity": model["necessity"][layer * width + head]["estimate"],
                    "sufficiency": model["sufficiency"][layer * width + head]["estimate"],
                    "attribution": model["attribution"][layer][head],
                    "note": "; ".join(notes),
                }


def _heads(record: Record) -> Figure:
    rows, domain = list(_head_rows(record)), record["domain"]
    models = list(_titled(record).values())
    columns, width = panels(len(models), MOST_COLUMNS, HALF, 60)
    n_layers, n_heads = len(record["models"][record["base"]]["m"]), len(rows) // len(models)
    n_heads //= n_layers
    size = {"width": min(width, CELL * n_heads), "height": CELL * n_layers}
    tips = [alt.Tooltip(f"{name}:O") for name in ("model", "layer", "head")]
    tips += [alt.Tooltip(f"{name}:Q", format=".3g") for name in ("m", "necessity", "sufficiency", "attribution")]
    tips.append(alt.Tooltip("note:N"))

    def chart(model: str) -> alt.LayerChart | alt.FacetChart:
        own = [r for r in rows if r["model"] == model]
        base = alt.Chart(data(own), title=model).encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("layer:O", title="layer", sort="descending"),
            tooltip=tips,
        )
        colour = alt.Color("m:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), title="share of blocks")
        kept = base.transform_filter("datum.in_base").mark_point(filled=True, size=26, opacity=1, color=CATEGORIES[1])
        return alt.layer(base.mark_rect(stroke=INK, strokeOpacity=0.2).encode(color=colour), kept).properties(**size)

    kind = record["pairs"]
    caption = (
        f"Each block of {kind['block']} of the {kind['pairs']} counterfactual pairs has a circuit of its own, sought "
        f"from both starts at λ = {record['penalty']:g}. m is the share of the blocks whose circuit has the head; an "
        "orange point marks, in every model, a head of most of base's circuits. Necessity is how much the log-prob of "
        "the counterfactual reply drops without the head, sufficiency how much it rises by the head alone, both in "
        "nats."
    )
    picture = alt.concat(*(chart(m) for m in models), columns=columns, spacing=24)
    return Figure(f"circuits-{domain}", f"The heads that {domain} needs", picture, rows, caption)


def _histogram(record: Record) -> Figure:
    titles, domain = _titled(record), record["domain"]
    rows: list[Row] = []
    for name, model in record["models"].items():
        counts, total = model["histogram"], sum(model["histogram"])
        rows += [
            {"model": titles[name], "from": i / len(counts), "to": (i + 1) / len(counts), "share": n / total}
            for i, n in enumerate(counts)
        ]
    columns, width = panels(len(titles), MOST_COLUMNS, HALF, 60)

    def chart(model: str) -> alt.Chart:
        x = alt.X("from:Q", title="m", bin="binned", scale=alt.Scale(domain=[0, 1]))
        y = alt.Y("share:Q", title="share of masks", scale=alt.Scale(domain=[0, 1]))
        tips = [alt.Tooltip(f"{c}:Q", format=".2f") for c in ("from", "to", "share")]
        own = data([r for r in rows if r["model"] == model])
        return alt.Chart(own, title=model).mark_bar().encode(x=x, x2="to:Q", y=y, tooltip=tips)

    picture = alt.concat(*(chart(m).properties(width=width, height=120) for m in titles.values()), columns=columns)
    caption = (
        "Where the masks of every search ended. Masks in the middle have not decided: a threshold at 0.5 would then "
        "make a circuit of about half of all heads, whatever the model does. From there heads are put in and taken "
        "out as long as the loss falls."
    )
    return Figure(f"circuits-{domain}-masks", f"Masks of {domain} at the end of the search", picture, rows, caption)


def _models(record: Record) -> Table:
    head = (
        "model", "steps", "score", "KL(π₀ ‖ π), nats", "heads of the circuit", "faithfulness", "by chance",
        "completeness", "kept of base's", "by chance", "beyond chance, by block", "ceiling",
        "faithfulness of base's circuit", "by chance", "attribution ~ m",
    )  # fmt: skip
    titles, rows = _titled(record), []
    for name, model in record["models"].items():
        overlap: dict[str, Any] = model.get("overlap", {})
        none = {"estimate": None, "reason": "–"}
        size = f"{model['size']:.3g} of {model['heads']}"
        size += "" if model["converged"] else f", not converged (starts differ on {100 * model['open_share']:.0f} %)"
        size += f"; redundancy hides {len(model['hidden'])}" if model["hidden"] else ""
        rows.append(
            (
                titles[name],
                str(model.get("steps", "–")),
                words(model["score"], ".1f"),
                words(model.get("kl", none), ".3f"),
                size,
                words(model["faithfulness"]),
                _null(model["faithfulness"].get("null")),
                words(model["completeness"]),
                f"{overlap['shared']:.3g} of {overlap['base']:.3g}" if overlap else "–",
                _null(overlap.get("null"), ".1f"),
                words(model.get("beyond_chance", none)),
                words(model["ceiling"]),
                words(model.get("transfer", none)),
                _null(model.get("transfer", none).get("null")),
                words(model["attribution_rank"]),
            )
        )
    caption = (
        "Faithfulness is F(circuit) / F(all heads), with the circuit of another block of pairs; by chance: random "
        "circuits of the same size. Sizes and kept heads are means over blocks. Completeness is the share of F's rise "
        "that the heads outside the circuit still give: 0 for a complete circuit; redundancy raises it. Beyond chance "
        "is the retention of base's circuit minus the share of all heads in the model's own circuit; its ceiling "
        "compares two blocks of one model. The last column correlates attribution with the masks at the end of the "
        "searches, before single heads are put in or taken out."
    )
    domain = record["domain"]
    return Table(f"circuits-{domain}-models", f"Circuits of {domain}", head, rows, caption, head[1:])


def _null(null: Any, form: str = ".2f") -> str:
    return f"{null['mean']:{form}} [{null['low']:{form}}, {null['high']:{form}}]" if isinstance(null, dict) else "–"


def _compared(record: Record) -> Table:
    head = (
        "RL minus SFT",
        "score, points",
        "overlap beyond chance",
        "faithfulness of base's circuit",
        "C_vuln",
        "judged",
    )
    rows = []
    for c in record["comparisons"]:
        count = "; ".join(
            f"{v['count']} at δ = {v['delta']:g} (by chance {_null(v['null'], '.1f')})" for v in c["vulnerable"]
        )
        judged = "; ".join(c["doubts"]) or "yes"
        figures = (words(c["score"], "+.1f"), words(c["overlap"], "+.2f"), words(c["transfer"], "+.2f"))
        rows.append((f"{c['rl']} − {c['sft']}", *figures, count, judged))
    caption = (
        "C_vuln counts the heads whose m is lower in the SFT model than in the RL model by more than δ. The units of "
        "both intervals are blocks of pairs. C8 asks for both differences to be above 0."
    )
    domain = record["domain"]
    return Table(f"circuits-{domain}-pairs", f"RL against SFT on {domain}", head, rows, caption, head[1:4])


def _edits(record: Record) -> list[Table]:
    """A table of the damage that the edit of each head does to other domains; no table if it was not measured."""
    rows = []
    for name, model in record["models"].items():
        for domain, found in model.get("vulnerability", {}).items():
            measured = {(i, j): x for i, row in enumerate(found.get("measured", ())) for j, x in enumerate(row)}
            worst = sorted(measured, key=lambda h: -measured[h])[:WORST]
            listed = "; ".join(f"{i}.{j}: {measured[i, j]:+.3f}" for i, j in worst)
            rows.append((_titled(record)[name], domain, words(found["rank"], "+.2f"), listed or "–"))
    if not rows:
        return []
    caption = (
        "The damage of a head's own edit is the rise of −log π of the other domain's successes at the base model, in "
        "nats a completion. It is predicted to second order at the base model, and measured by restoring the head's "
        "old weights. Heads are named layer.head."
    )
    head = ("model", "other domain", "predicted ~ measured, rank correlation over heads", "most harmful edits, nats")
    domain = record["domain"]
    return [Table(f"circuits-{domain}-edits", "Heads whose edits hurt other domains", head, rows, caption, head[2:3])]
