"""Tests of references: sections of DEFINITIONS.md that are cited, and documents and files that are named, exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mdrl_jax"
DEFINITIONS = (PACKAGE / "DEFINITIONS.md").read_text()
SECTIONS = {int(n) for n in re.findall(r"^## (\d+)\. ", DEFINITIONS, re.MULTILINE)}
SOURCES = sorted(p for d in ("mdrl_jax", "configs", "tests", "tpu_scripts") for p in (ROOT / d).rglob("*.py"))
TEXTS = sorted([*ROOT.glob("*.md"), *PACKAGE.rglob("*.md"), *(ROOT / "configs").glob("*.md")])
# Examples: "definitions §3, §5", "definitions §8–§10", "definitions §6 to §8", "(§12, §13)".
CITATION = re.compile(r"(?:definitions\s+|\()§\d+(?:(?:,\s*|\s*[–-]\s*|\s+to\s+|\s+and\s+)§\d+)*")


def cited(text: str) -> set[int]:
    """Numbers of the sections that a text cites; a range counts with all sections in it."""
    found: set[int] = set()
    for citation in CITATION.findall(text):
        numbers = [int(n) for n in re.findall(r"§(\d+)", citation)]
        whole = re.search(r"[–-]|\sto\s", citation)
        found |= set(range(numbers[0], numbers[-1] + 1)) if whole else set(numbers)
    return found


def test_citations_are_read() -> None:
    assert cited("(definitions §3, §5; C2)") == {3, 5} and cited("definitions §8–§10") == {8, 9, 10}
    assert cited("definitions §6\n    to §8") == {6, 7, 8} and cited("(§12, §13)") == {12, 13}


def test_sections_are_numbered_without_gaps() -> None:
    assert SECTIONS == set(range(len(SECTIONS))) and len(SECTIONS) >= 15


def test_every_section_that_is_cited_exists() -> None:
    used: set[int] = set()
    for file in SOURCES + TEXTS:
        numbers = cited(file.read_text())
        assert numbers <= SECTIONS, f"{file.relative_to(ROOT)} cites {sorted(numbers - SECTIONS)}"
        used |= numbers
    assert len(used) >= 12


@pytest.mark.parametrize("file", SOURCES + TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_document_that_is_named_is_in_the_repository(file: Path) -> None:
    for name in re.findall(r"[\w./-]*\w\.md\b", file.read_text()):
        places = (ROOT, PACKAGE, file.parent)
        assert any((place / name).exists() for place in places), f"{name} does not exist"


@pytest.mark.parametrize("file", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_source_file_that_a_document_names_exists(file: Path) -> None:
    if file.name == "CHANGELOG.md":
        return  # it also names files that were removed
    for name in re.findall(r"`([\w/]+/[\w]+\.py)`", file.read_text()):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), f"{name} does not exist"
