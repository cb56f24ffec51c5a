"""Writes the report of a work folder: one HTML page that loads nothing from elsewhere, and the files of each figure.

The report can be written at any moment of a run. If the record of a builder is missing or damaged, the page has a line
that says so in place of the figure.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from altair.utils import schemapi
from jinja2 import Environment, PackageLoader, StrictUndefined

import mdrl_jax
from mdrl_jax import records
from mdrl_jax.claims.published import CLAIMS, NOT_MEASURED
from mdrl_jax.config import parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import programs
from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures import run
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.screen.analysis import null_text, number, part_lines
from mdrl_jax.report.sections import SECTIONS
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stats.estimate import interval_text
from mdrl_jax.workfolder import WorkFolder

# What a run needs for a verdict on these claims. The other claims need the stage `analyze`.
JUDGED_BY = {
    "C6": "needs a stage such as `refresh-math`",
    "C7": "needs a stage such as `rollback-math-qa`",
}
# The errors that a builder raises if a record is damaged or was written by another version.
DAMAGED = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError, UserError),
    # Altair's own error and its base: a text where altair needs a number.
    schemapi.jsonschema.ValidationError,  # pyright: ignore[reportPrivateImportUsage]
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The card of a claim on the page.

    Attributes:
      id: for example "C1".
      claim: the published statement.
      verdict: "supported", "contradicted", "undecided" or "not judged".
      reason: why it has this verdict.
      figures: (name, text) of each line on the card; none if the claim was not judged.
      parts: a sentence for each part of the rule, and one for the earlier rule, if the record has them.
    """

    id: str
    claim: str
    verdict: str
    reason: str
    figures: Sequence[tuple[str, str]] = ()
    parts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page with the results of its builders.

    Attributes:
      id, title, lead: as in `sections.Section`.
      items: figures and tables in the order of the page.
      notes: a line on each record that is missing or damaged.
    """

    id: str
    title: str
    lead: str
    items: Sequence[Figure | Table]
    notes: Sequence[str]


def write(workdir: str | Path) -> Path:
    """Writes `report/index.html`, the CSV of every figure and table, and the PNG of every figure.

    The folder is made if needed, and earlier files of the same names are replaced. Each file is written whole or not at
    all. Files of figures that can no longer be made stay as they are. If a builder raises `Absent` or one of `DAMAGED`,
    the page says so in place of the figure. If a run has several processes, all of them must call this; the first one
    writes, and the others wait for it.

    Args:
      workdir: the work folder.

    Returns:
      The path of the page.

    Raises:
      UserError: if `workdir` is not a folder.
      OSError: if a file cannot be written, or if a record that exists cannot be read.
      ValueError: if a chart cannot be drawn as PNG, or if a text has a lone surrogate.
      HostLost: if another process does not call this in time.
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
    """The cards of the claims.

    Args:
      found: the records of the work folder.

    Returns:
      (cards, note): a card for each claim that has a rule or a record, in the order of `CLAIMS`; and a line that says
      how `claims.json` is damaged, "" if it is intact or missing. Without a record the verdict of a card is "not
      judged", and so is that of every card if the file is damaged. Records of claims that `CLAIMS` does not have are
      ignored.
    """
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
    return Verdict(name, text, "not judged", JUDGED_BY.get(name, "needs the stage `analyze`"))


def _verdict(claim: dict[str, Any]) -> Verdict:
    figures = [
        ("estimate", number(claim["estimate"])),
        ("95 % interval", interval_text(claim["ci95"], ".3g")),
        ("null", null_text(claim["null"])),
        ("published", claim["published"]),
        ("rule", claim["rule"]),
    ]
    name, text, verdict, reason = (str(claim[field]) for field in ("id", "claim", "verdict", "reason"))
    return Verdict(name, text, verdict, reason, figures, part_lines(claim))


def _part(section: Any, found: Records) -> Part:
    items: list[Figure | Table] = []
    notes: list[str] = []
    for builder in section.builders:
        made, note = _tried(builder, found)
        items += made
        notes += [note] if note and note not in notes else []
    return Part(section.id, section.title, section.lead, items, notes)


def _tried(builder: Callable[[Records], Any], found: Records) -> tuple[list[Any], str]:
    """Runs a builder: (its items, ""), or ([], why it made nothing).

    Each chart is written out as JSON here, because some damage only shows then.
    """
    try:
        made = builder(found)
        items = list(made) if isinstance(made, Sequence) else [made]
        for item in items:
            if isinstance(item, Figure):
                item.json()
    except Absent as e:
        return [], f"Not shown: {e}."
    except DAMAGED as e:
        return [], f"{builder.__module__.rsplit('.', 1)[-1]}.{builder.__name__}: {_damaged(e)}"
    return items, ""


def _damaged(error: Exception) -> str:
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"Not shown, because a record is damaged or was written by another version: {what}"


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
        # A closing tag in the library's source would end the script element that holds it.
        library=_library().replace("</script", "<\\/script"),
    )


def _library() -> str:
    """The JavaScript that draws the charts, from the user's cache folder, because making it takes seconds."""
    file = programs.user_cache() / f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8")
    made = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]
    with contextlib.suppress(OSError):  # the page does not need the cache
        file.parent.mkdir(parents=True, exist_ok=True)
        records.write_text(file, made)
    return made


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
        lines.append(f"{len(done)} of {len(scored)} stages are done; not yet: {left}. The same command continues.")
    else:
        lines.append(f"All {len(scored)} stages are done.")
    return lines
