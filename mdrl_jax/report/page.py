"""The report: one HTML page without any request to elsewhere, and every figure as PNG and CSV, from a work folder.

It is built at any moment of a run and from whatever is there: a builder that lacks its record, or finds it damaged,
leaves a line that says so in its place.
"""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

import mdrl_jax
from mdrl_jax import records
from mdrl_jax.claims.published import CLAIMS, NOT_MEASURED
from mdrl_jax.config import parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures import run
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.screen.analysis import null_text, number
from mdrl_jax.report.sections import SECTIONS
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stats.estimate import interval_text
from mdrl_jax.workfolder import WorkFolder

# What a run needs for a verdict on a claim; the other claims need the stage `analyze`.
JUDGED_BY = {
    "C6": "a stage such as `refresh-math` is judged by it",
    "C7": "a stage such as `rollback-math-qa` is judged by it",
}
# What a record that is damaged, or of another version, makes a builder raise.
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError, UserError)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim as the page shows it; `verdict` is "not judged" where it was not."""

    id: str
    claim: str
    verdict: str
    reason: str
    figures: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A section as it is shown: its figures and tables in order, and lines on what is missing."""

    id: str
    title: str
    lead: str
    items: Sequence[Figure | Table]
    notes: Sequence[str]


def write(workdir: str | Path) -> Path:
    """Writes `report/index.html`, and PNG and CSV of every figure, each whole or not at all; returns the page's path.

    Raises:
      UserError: if `workdir` is not a folder.
    """
    root = Path(workdir)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the work folder of a run")
    found = Records(root)
    parts = [_part(section, found) for section in SECTIONS]
    folder = root / "report"
    for item in (item for part in parts for item in part.items):
        records.write_text(folder / f"{item.name}.csv", item.csv())
        if isinstance(item, Figure):
            records.write_bytes(folder / f"{item.name}.png", item.png())
    page = folder / "index.html"
    records.write_text(page, _html(root, found, parts))
    return page


def verdicts(found: Records) -> tuple[list[Verdict], str]:
    """All claims that are measured, in order, and a line if they could not be read."""
    note, known = "", {}
    try:
        claims = found.json("claims.json")
        if not isinstance(claims, list):
            raise UserError("claims.json is not a list of claims")
        known = {c["id"]: _verdict(c) for c in claims}
    except Absent:
        pass
    except DAMAGED as e:
        note = _damaged(e)
    shown = {i: claim for i, claim in CLAIMS.items() if i in known or claim.rule != NOT_MEASURED}
    return [known.get(i) or _not_judged(i, claim.text) for i, claim in shown.items()], note


def _not_judged(name: str, text: str) -> Verdict:
    return Verdict(name, text, "not judged", JUDGED_BY.get(name, "the stage `analyze` judges it"))


def _verdict(claim: dict[str, Any]) -> Verdict:
    figures = [
        ("estimate", number(claim["estimate"])),
        ("95 % interval", interval_text(claim["ci95"], ".3g")),
        ("null", null_text(claim["null"])),
        ("published", claim["published"]),
        ("rule", claim["rule"]),
    ]
    return Verdict(claim["id"], claim["claim"], claim["verdict"], claim["reason"], figures)


def _part(section: Any, found: Records) -> Part:
    items: list[Figure | Table] = []
    notes: list[str] = []
    for builder in section.builders:
        made, note = _tried(builder, found)
        items += made
        notes += [note] if note and note not in notes else []
    return Part(section.id, section.title, section.lead, items, notes)


def _tried(builder: Callable[[Records], Any], found: Records) -> tuple[list[Any], str]:
    """What a builder makes, or why it makes nothing; damage may only show where a chart's data are written out."""
    try:
        made = builder(found)
        items = list(made) if isinstance(made, Sequence) else [made]
        for item in items:
            if isinstance(item, Figure):
                item.json()
    except Absent as e:
        return [], f"Not shown: {e}."
    except DAMAGED as e:
        return [], f"{builder.__module__.rsplit('.', 1)[-1]}, {builder.__name__}: {_damaged(e)}"
    return items, ""


def _damaged(error: Exception) -> str:
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"Not shown, since a record is damaged or of another version: {what}"


def _html(root: Path, found: Records, parts: Sequence[Part]) -> str:
    environment = Environment(loader=PackageLoader("mdrl_jax.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters["slug"] = lambda text: text.lower().replace(" ", "-")
    cards, note = verdicts(found)
    readings, unread = _tried(run.samples, found)
    return environment.get_template("page.html.j2").render(
        title=root.resolve().name,
        state=_state(found),
        version=mdrl_jax.__version__,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        verdicts=cards,
        claims_note=note,
        parts=parts,
        readings=readings,
        unread=unread,
        is_figure=lambda item: isinstance(item, Figure),
        # A closing tag within the library's text would end its element.
        library=vl_convert.javascript_bundle().replace("</script", "<\\/script"),  # pyright: ignore[reportCallIssue]
    )


def _state(found: Records) -> list[str]:
    """How far the run is, in sentences."""
    try:
        config = parse(found.json("config.json")["config"])
        stages = resolve_stages(config, tuple(DOMAINS))
    except Absent as e:
        return [f"{e}."]
    except DAMAGED as e:
        return [_damaged(e)]
    done = [s for s in stages if WorkFolder(found.root).evaluation(s.folder).exists()]
    scored = [s for s in stages if s.scored]
    lines = [f"Model {config.model.path or 'embedded'}, seed {config.seed}."]
    if len(done) < len(scored):
        left = ", ".join(s.name for s in scored if s not in done)
        lines.append(f"{len(done)} of {len(scored)} stages are done; not yet: {left}. The same command goes on.")
    else:
        lines.append(f"All {len(scored)} stages are done.")
    return lines
