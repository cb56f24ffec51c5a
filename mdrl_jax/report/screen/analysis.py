"""The interference analysis on the screen: the verdicts, and the predicted beside the measured damage."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mdrl_jax.report.screen.outputs import shown
from mdrl_jax.report.screen.terminal import Fitting
from mdrl_jax.stats.estimate import figure_text, interval_text

COLOURS = {"supported": "green", "contradicted": "red", "undecided": "yellow"}


def verdicts(claims: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Each claim in a few lines: the verdict; its figure, interval, null and published figure; then its parts.

    A claim without parts has its reason in their place.

    Numbers have three significant digits and no unit; "–" stands for a figure or an interval that is missing.

    Args:
      claims: the records of `claims.json` (`claims.verdicts.judge`).

    Raises:
      KeyError: if a record lacks a field, or its verdict is none of the three of `COLOURS`.
    """
    lines = [Text("claims")]
    for claim in claims:
        figure = f"{number(claim['estimate'])} {_interval(claim['ci95'])}, null {null_text(claim['null'])}"
        verdict = shown(claim["verdict"], style=COLOURS[claim["verdict"]])
        lines.append(Text.assemble(shown(f"  {claim['id']} "), verdict, shown(f": {claim['claim']}")))
        lines.append(shown(f"     {figure}; published: {claim['published']}"))
        lines += [shown(f"     {line}") for line in part_lines(claim) or [claim["reason"]]]
    return Text("\n").join(lines)


def part_lines(claim: Mapping[str, Any]) -> list[str]:
    """The parts of a claim's rule in words, a line each, and then the verdict by the rule of an earlier version.

    If the record has such an earlier rule but no parts, the first line is the reason of the present verdict.

    Args:
      claim: a record of `claims.json`. One that has neither, as in earlier versions, gives an empty list.

    Raises:
      KeyError: if a part or the earlier rule lacks a field.
    """
    lines = [f"{part['part']} – {part['verdict']}: {part['words']}" for part in claim.get("parts", ())]
    if old := claim.get("old_rule"):
        lines += [] if lines else [claim["reason"]]
        lines.append(f"by the earlier rule – {old['verdict']}: {old['reason']}")
    return lines


def verdict_table(claims: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line for each claim: id, verdict, figure, its interval, and null; numbers have three significant digits.

    Where it is too wide for the terminal, the null is left out, and then the interval.

    Args:
      claims: the records of `claims.json` (`claims.verdicts.judge`).

    Raises:
      KeyError: as in `verdicts`.
    """
    return Fitting(tuple(_verdicts(claims, columns) for columns in (5, 4, 3)))


def _verdicts(claims: Sequence[Mapping[str, Any]], columns: int) -> Table:
    table = Table(box=box.SIMPLE, title_justify="left", title="claims (reasons are in claims.json)")
    for heading in ("", "verdict", "value", "95 % interval", "null")[:columns]:
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=True)
    for claim in claims:
        verdict = shown(claim["verdict"], style=COLOURS[claim["verdict"]])
        figures = number(claim["estimate"]), _interval(claim["ci95"]), null_text(claim["null"])
        table.add_row(*[shown(claim["id"]), verdict, *map(shown, figures)][:columns])
    return table


def damage_table(pairs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """For every domain and later stage a line for the mean reward in points and one for the success NLL in nats.

    An objective that a pair has no record of has no line. The columns are the first and the second order of the damage,
    the prediction (their sum), the measured damage with its 95 % interval, and the remainder (measured − predicted).
    Positive is harm. Numbers have three significant digits; "–" stands for a figure that was not measured. Where the
    table is too wide for the terminal, both orders and the remainder are left out.

    Args:
      pairs: the "pairs" of `analysis/damage.json`.

    Raises:
      KeyError: if a pair lacks a field.
    """
    return Fitting(tuple(_damage(pairs, terms, room) for terms, room in ((True, 1), (True, 0), (False, 0))))


def _damage(pairs: Sequence[Mapping[str, Any]], terms: bool, room: int) -> Table:
    table = Table(box=box.SIMPLE, title_justify="left", title="damage: reward in points, success NLL in nats")
    table.padding = (0, room)
    table.add_column("domain", no_wrap=True)
    table.add_column("after", no_wrap=True)
    table.add_column("objective", no_wrap=True)
    before, after = (("first", "second"), ("remainder",)) if terms else ((), ())
    for heading in (*before, "predicted", "measured", "95 %", *after):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in pairs:
        for name, scale, label in (("reward", 100.0, "reward"), ("success_nll", 1.0, "NLL")):
            if (figures := pair["objectives"].get(name)) is None:
                continue
            cells = [number(figures[k]["estimate"], scale) for k in (*before, "predicted", "measured")]
            cells.append(_interval(figures["measured"]["ci95"], scale))
            cells += [number(figures[k]["estimate"], scale) for k in after]
            table.add_row(*map(shown, (pair["domain"], pair["stage"], label, *cells)))
    return table


def summary(found: Mapping[str, Any]) -> RenderableType:
    """`damage_table`, the agreement of predicted and measured damage over pairs, and `verdicts`, below each other.

    Args:
      found: {"damage": the content of `analysis/damage.json`, "claims": the records of `claims.json`}. The agreement
        has a line for each objective, with Spearman and R² and their intervals.

    Raises:
      KeyError: if a record lacks a field, or as in `verdicts`.
    """
    lines = []
    for name, figures in found["damage"]["agreement"].items():
        spearman, r2 = figures["spearman"], figures["r_squared"]
        lines.append(
            f"{name}: predicted against measured over {figures['n']} pairs, Spearman "
            f"{number(spearman['estimate'])} {_interval(spearman['ci95'])}, R² "
            f"{number(r2['estimate'])} {_interval(r2['ci95'])}"
        )
    return Group(damage_table(found["damage"]["pairs"]), *map(shown, lines), verdicts(found["claims"]))


def number(value: float | None, scale: float = 1.0) -> str:
    """A figure times `scale` as plain text in Python's format ".3g"; "–" for None.

    It has at most three significant digits: 0.5 gives "0.5", 1234 gives "1.23e+03", and nan gives "nan".
    """
    return "–" if value is None else f"{scale * value:.3g}"


def null_text(null: Any) -> str:
    """A claim's null as plain text: three significant digits, without a unit.

    Its square brackets are not escaped for rich (`rich.markup.escape`).

    Args:
      null: in the unit of the claim's figure: a number, an interval [low, high], {"mean", "low", "high"} of a drawn
        null, or None.

    Returns:
      "0.123" for a number, "[0.1, 0.25]" for an interval, "0.123 [0.1, 0.25]" (mean, low and high) for a drawn null,
      "–" for None.
    """
    if isinstance(null, Mapping):
        return figure_text(null["mean"], [null["low"], null["high"]], ".3g")
    if isinstance(null, Sequence):
        return interval_text(null, ".3g")
    return number(null)


def _interval(ci95: Sequence[float] | None, scale: float = 1.0) -> str:
    return interval_text(ci95 and [scale * x for x in ci95], ".3g")
