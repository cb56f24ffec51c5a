"""Writes the report of a work folder: one HTML page that loads nothing from elsewhere, and the files of each figure.

The report can be written at any moment of a run. If the record of a builder is damaged, the page has a line that says
so in place of the figure. What a run has no records of is listed at the end of the page.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from altair.utils import schemapi
from jinja2 import Environment, PackageLoader, StrictUndefined

import mdrl_jax
from mdrl_jax import records
from mdrl_jax.claims.published import CLAIMS
from mdrl_jax.config import parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import programs
from mdrl_jax.report import glossary
from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures import run
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import number as signed
from mdrl_jax.report.screen.analysis import null_text
from mdrl_jax.report.sections import LAST_EVIDENCE, SECTIONS, Section
from mdrl_jax.report.tables import headline
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stats.estimate import figure_text
from mdrl_jax.workfolder import WorkFolder

# What a run needs for a verdict on these claims. The other claims need the stage `analyze`.
JUDGED_BY = {
    "C6": "needs a stage such as `refresh-math`",
    "C7": "needs a stage such as `rollback-math-qa`",
    "C8": "needs a stage such as `circuits-math`",
}
# The errors that a builder raises if a record is damaged or was written by another version.
DAMAGED = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError, UserError),
    # Altair's own error and its base: a text where altair needs a number.
    schemapi.jsonschema.ValidationError,  # pyright: ignore[reportPrivateImportUsage]
)


VERDICTS = ("supported", "contradicted", "undecided")
# The section with the evidence for each claim.
EVIDENCE = {
    **{"C1": "edits", "C2": "edits", "C3": "gradients", "C4": "routes", "C5": "subspace"},
    **{"C6": "recovery", "C7": "recovery", "C8": "circuits"},
}
# Units that stand after a number; the "unit" of a figure without one is what its interval counts, such as "layer".
UNITS = ("points", "reward", "nats", "factor a step", "log factor a step")
NO_FIGURE = "no figure"  # the published figure of a claim without one
COLUMN = 600  # px of the widest figure that goes into one of two columns
LETTER, CELL, WRAPPED = 6.8, 14.0, 20  # px of a letter and around a cell; letters after which a text cell is wrapped


@dataclasses.dataclass(frozen=True)
class Decider:
    """A figure that decides about a part of a claim's rule.

    Attributes:
      part: the part of the rule.
      name: what the figure is.
      value: the figure with its interval and unit.
      asked: what the rule asks for, such as "above 0.5".
      null: the value by chance, of the figure that the record prints; otherwise "".
      others: how many further figures decide about the same part.
    """

    part: str
    name: str
    value: str
    asked: str
    null: str
    others: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The card of a claim on the page.

    Attributes:
      id: for example "C1".
      claim: the published statement.
      verdict: "supported", "contradicted" or "undecided".
      reason: why it has this verdict.
      deciders: one figure of each part that decides; none if nothing was measured, or in records of earlier versions.
      parts: (name, verdict, words) of each part of the rule; none in records of earlier versions.
      notes: (name, text) of further lines: the published figure, the rule, and the verdict by the earlier rule.
    """

    id: str
    claim: str
    verdict: str
    reason: str
    deciders: Sequence[Decider] = ()
    parts: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[tuple[str, str]] = ()

    @property
    def evidence(self) -> str:
        """The section with the evidence; "" if there is none."""
        return EVIDENCE.get(self.id, "")


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page with the results of its builders.

    Attributes:
      id, title, lead: as in `sections.Section`.
      items: figures and tables in the order of the page.
      details: those that the page folds until a reader opens them.
      notes: a line on each record that is damaged.
      absent: a line on each record that is missing.
    """

    id: str
    title: str
    lead: str
    items: Sequence[Figure | Table]
    details: Sequence[Figure | Table]
    notes: Sequence[str]
    absent: Sequence[str]

    @property
    def empty(self) -> bool:
        """Whether the page has nothing to show in this section."""
        return not (self.items or self.details or self.notes)


def blocks(items: Sequence[Figure | Table]) -> Iterator[list[Figure | Table]]:
    """The items in blocks: neighbours that fit into one of two columns together, and every other item alone."""
    for narrow, group in itertools.groupby(items, lambda item: px(item) <= COLUMN):
        block = list(group)
        yield from [block] if narrow else ([item] for item in block)


def write(workdir: str | Path) -> Path:
    """Writes `report/index.html`, the CSV of every figure and table, and the PNG, SVG and PDF of every figure.

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
      ValueError: if a chart cannot be drawn as SVG, or if a text has a lone surrogate.
      HostLost: if another process does not call this in time.
    """
    root = Path(workdir)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the work folder of a run")
    found = Records(root)
    parts = [_part(section, found) for section in SECTIONS]
    folder = root / "report"
    for item in (item for part in parts for item in (*part.items, *part.details)):
        records.write_text(folder / f"{item.name}.csv", item.csv())
        if isinstance(item, Figure):
            records.write_text(folder / f"{item.name}.svg", item.svg)
            records.write_bytes(folder / f"{item.name}.png", item.png())
            records.write_bytes(folder / f"{item.name}.pdf", item.pdf())
    page = folder / "index.html"
    records.write_text(page, _html(root, found, parts))
    return page


def px(item: Figure | Table) -> float:
    """The width of a figure, or about that of a table whose long texts are wrapped, in px."""
    if isinstance(item, Figure):
        return item.width
    total = 0.0
    for i, column in enumerate(item.columns):
        longest = max(len(row[i]) for row in [item.columns, *item.rows])
        total += CELL + LETTER * (longest if column in item.numeric else min(longest, WRAPPED))
    return total


def verdicts(found: Records) -> tuple[list[Verdict], dict[str, str], str]:
    """The cards of the claims.

    Args:
      found: the records of the work folder.

    Returns:
      (cards, open, note): a card for each claim that was judged, in the order of `CLAIMS`; by its id, what a run needs
      for a verdict on each claim that has a rule and was not judged, which is every one if the file is damaged; and a
      line that says how `claims.json` is damaged, "" if it is intact or missing. Records of claims that `CLAIMS` does
      not have are ignored.
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
    left = {i: c for i, c in CLAIMS.items() if i not in known}
    return (
        [known[i] for i in CLAIMS if i in known],
        {i: JUDGED_BY.get(i, "needs the stage `analyze`") for i in left},
        note,
    )


def _verdict(claim: dict[str, Any]) -> Verdict:
    name, text, verdict, reason = (str(claim[field]) for field in ("id", "claim", "verdict", "reason"))
    parts = [(str(p["part"]), str(p["verdict"]), str(p["words"])) for p in claim.get("parts", ())]
    notes = [("published", str(claim["published"]))] if claim["published"] != NO_FIGURE else []
    notes.append(("rule", str(claim["rule"])))
    if old := claim.get("old_rule"):
        notes.append(("earlier rule", f"{old['verdict']}: {old['reason']}"))
    return Verdict(name, text, verdict, reason, tuple(_deciders(claim)), parts, notes)


def _deciders(claim: Mapping[str, Any]) -> Iterator[Decider]:
    for part in claim.get("parts", ()):
        figures = part.get("figures")
        if not figures or part["verdict"] != claim["verdict"]:
            continue
        # The one that the record prints; otherwise, of a part that holds, the one that is nearest to its bound.
        chosen = next((f for f in figures if f["estimate"] == claim["estimate"]), None)
        if chosen is None and part["verdict"] == "supported":
            chosen = min(figures, key=lambda f: abs(f["estimate"] - float(f["asked"].split()[-1])))
        chosen = chosen or figures[0]
        unit = f" {chosen['unit']}" if chosen["unit"] in UNITS else ""
        value = figure_text(chosen["estimate"], chosen["ci95"], ".3g", number=signed) + unit
        named = str(chosen["name"]).removesuffix(" in points")
        by_chance = claim["null"] is not None and chosen["estimate"] == claim["estimate"]
        null = null_text(claim["null"]).replace("-", "−") if by_chance else ""
        yield Decider(str(part["part"]), named, value, str(chosen["asked"]), null, len(figures) - 1)


def _part(section: Section, found: Records) -> Part:
    items: list[Figure | Table] = []
    details: list[Figure | Table] = []
    notes: list[str] = []
    absent: list[str] = []
    for made, builders in ((items, section.builders), (details, section.details)):
        for builder in builders:
            built, note, missing = tried(builder, found)
            made += built
            notes += [note] if note and note not in notes else []
            absent += [missing] if missing and missing not in absent else []
    return Part(section.id, section.title, section.lead, items, details, notes, absent)


def tried(builder: Callable[[Records], Any], found: Records) -> tuple[list[Any], str, str]:
    """Runs a builder. Each chart is drawn and written out as JSON here, because some damage only shows then.

    Args:
      builder: makes a figure or a table, or several of them.
      found: the records of the work folder.

    Returns:
      (its items, how a record is damaged, what is missing). The first is [] and one of the two texts is not "" if there
      are no items; otherwise both texts are "".
    """
    try:
        made = builder(found)
        items = list(made) if isinstance(made, Sequence) else [made]
        for item in items:
            if isinstance(item, Figure):
                item.json()
                px(item)
    except Absent as e:
        return [], "", str(e)
    except DAMAGED as e:
        return [], f"{builder.__module__.rsplit('.', 1)[-1]}.{builder.__name__}: {_damaged(e)}", ""
    return items, "", ""


def _damaged(error: Exception) -> str:
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"Not shown, because a record is damaged or was written by another version: {what}"


def _html(root: Path, found: Records, parts: Sequence[Part]) -> str:
    environment = Environment(loader=PackageLoader("mdrl_jax.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters["slug"] = lambda text: text.lower().replace(" ", "-")
    cards, unjudged, note = verdicts(found)
    readings, unread, _ = tried(run.samples, found)
    before = [part.id for part in parts].index(LAST_EVIDENCE) + 1
    return environment.get_template("page.html.j2").render(
        title=root.resolve().name,
        headline=_headline(found),
        state=_state(found),
        version=mdrl_jax.__version__,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        verdicts=cards,
        counts=[(verdict, sum(c.verdict == verdict for c in cards)) for verdict in VERDICTS],
        unjudged=unjudged,
        claims_note=note,
        evidence=[part for part in parts[:before] if not part.empty],
        others=[part for part in parts[before:] if not part.empty],
        absent=list(dict.fromkeys(line for part in parts for line in part.absent)),
        readings=readings,
        unread=unread,
        terms={glossary.anchor(term): (term, text) for term, text in sorted(glossary.TERMS.items(), key=_by_letter)},
        marker=glossary.marker,
        blocks=blocks,
        is_figure=lambda item: isinstance(item, Figure),
        # A closing tag in the library's source would end the script element that holds it.
        library=_library().replace("</script", "<\\/script"),
    )


def _by_letter(entry: tuple[str, str]) -> str:
    return entry[0].lower()


def _headline(found: Records) -> str:
    """The run in one sentence; "" if it has no scores yet, or if they are damaged, which the scores' section says."""
    try:
        matrix = found.matrix()
    except (Absent, *DAMAGED):
        return ""
    steps = {}
    with contextlib.suppress(Absent, *DAMAGED):  # the sentence then has no number of steps
        steps = {c["stage"]: int(c["steps"]) for c in map(found.json, found.files("costs/*.json"))}
    return headline.headline(matrix, steps)


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
