"""The page of a work folder: of a whole run (in tests/test_recovery_stages.py), of a part of one, of a damaged one."""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
import vl_convert

from mdrl_jax import config, main, records
from mdrl_jax.claims.published import CLAIMS
from mdrl_jax.claims.verdicts import Condition, above, all_parts, every, judge, under
from mdrl_jax.errors import UserError
from mdrl_jax.report import glossary, page
from mdrl_jax.report.figure import CATEGORIES, Figure, Table
from mdrl_jax.report.figures import run
from mdrl_jax.report.folder import Records
from mdrl_jax.workfolder import resolved
from tests.report import browser
from tests.report.figures.recovery.test_refreshed_figures import record as refresh

DOMAINS = ("math", "qa")


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Equal charts are drawn once: most tests write the page of the same run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vegalite_to_svg", "svg_to_png", "svg_to_pdf"):
            patch.setattr(vl_convert, name, functools.cache(getattr(vl_convert, name)))
        yield


def evaluation(folder: Path, index: int, stage: str, prompts: int = 8) -> None:
    rng = np.random.default_rng(index)
    rewards = {d: rng.random((prompts, 2)).tolist() for d in DOMAINS}
    head = {"stage": stage, "index": index, "seed": 0, "k": 2, "step": 3}
    records.write_json(
        folder / f"evaluations/{index:02d}-{stage}.json", head | {"rewards": rewards, "accuracy": rewards}
    )
    rows = [
        {"domain": d, "prompt": f"{d} <b> =", "completion": f"</script> {stage}", "reward": 0.5, "accuracy": 0.5}
        for d in DOMAINS
    ]
    records.write_jsonl(folder / f"samples/{index:02d}-{stage}.jsonl", rows)
    if index:
        costs = {"seconds": 2.5, "tokens_sampled": 10, "tokens_trained": 20, "flops": 1e6, "steps": 3}
        records.write_json(folder / f"costs/{index:02d}-{stage}.json", costs | {"stage": stage, "kind": "grpo"})


def started(folder: Path) -> Path:
    """A run of which the base and one of three stages are scored."""
    c = config.default()
    c.stages, c.scored_domains = ("math", "qa", "refresh-math"), DOMAINS
    versions = {"config": resolved(config.parse(c)), "versions": {"jax": "0"}, "devices": ["cpu:0"], "git": None}
    records.write_json(folder / "config.json", versions)
    evaluation(folder, 0, "base")
    evaluation(folder, 1, "math")
    return folder


def notes(html: str) -> list[str]:
    return re.findall(r'<p class="note">(.*?)</p>', html, re.DOTALL)


def test_a_run_under_way_shows_what_is_there_and_says_what_is_missing(tmp_path: Path) -> None:
    html = page.write(started(tmp_path)).read_text()
    state = re.search(r"<p>(\d+) of (\d+) stages are done; not yet: (.*?)\. The", html)
    assert state and state[1] == "1" and state[2] == "3"
    assert re.sub("<.*?>", "", state[3]) == "qa, refresh-math"
    shown = {p.name for p in (tmp_path / "report").iterdir()}
    assert {"index.html", "scores.png", "scores.svg", "scores.pdf", "scores.csv", "paths.png", "costs.png"} <= shown
    assert (tmp_path / "report/scores.pdf").read_bytes().startswith(b"%PDF")
    text = re.sub("<.*?>", "", html)
    assert 'class="verdict ' not in html and all(f"C{i} needs " in text for i in range(1, 9))
    assert "`" not in without_library(tmp_path / "report/index.html")
    assert "analysis/damage.json is not there: the stage analyze or the command analyze writes it" in text
    assert not any("damaged" in note for note in notes(html))


def test_the_cards_are_the_published_claims_that_were_judged(tmp_path: Path) -> None:
    ruled = [f"C{i}" for i in range(1, 9)]
    cards, unjudged, note = page.verdicts(Records(started(tmp_path)))
    assert cards == [] and list(unjudged) == ruled and note == ""
    claims = [judge(i, Condition("undecided", "too few heads"), None, []) for i in ("C8", "C2")]
    records.write_json(tmp_path / "claims.json", claims)
    cards, unjudged, _ = page.verdicts(Records(tmp_path))
    assert [(c.id, c.claim) for c in cards] == [(i, CLAIMS[i].text) for i in ("C2", "C8")]
    assert (cards[-1].verdict, cards[-1].reason) == ("undecided", "too few heads")
    assert set(unjudged) == set(ruled) - {"C2", "C8"}


def test_a_card_shows_the_figure_that_decides(tmp_path: Path) -> None:
    """The record prints another figure, as in C6, where the recovery fraction is printed and an average decides."""
    printed = {"estimate": 0.9, "ci95": [0.8, 1.0], "null": None, "n": 9, "unit": ""}
    against = [printed | {"estimate": x, "ci95": [x - 1, x + 1], "unit": "points"} for x in (-3.0, -2.0)]
    parts = [
        ("recovery", above(printed, 0.5, "recovery fraction")),
        ("average", every(*(above(f, 0.0, f"average minus that of {n}") for f, n in zip(against, "ab", strict=True)))),
    ]
    old = ("z > 0", Condition("contradicted", "z -1 is not above 0"))
    claim = judge("C6", all_parts(parts), printed, [], parts, old)
    started(tmp_path)
    records.write_json(tmp_path / "claims.json", [claim])
    (card,), _, _ = page.verdicts(Records(tmp_path))
    decider = page.Decider("average", "average minus that of a", "−3 [−4, −2] points", "above 0", "", 1)
    assert (card.verdict, card.deciders) == ("contradicted", (decider,))
    assert [part[:2] for part in card.parts] == [("recovery", "supported"), ("average", "contradicted")]
    html = page.write(tmp_path).read_text()
    assert "−3 [−4, −2] points" in html and "contradicted: z -1 is not above 0" in html
    # Of a rule that holds, the figure that is nearest to its bound.
    parts = [("average", every(*(under(f, 0.0, n) for f, n in zip(against, "ab", strict=True))))]
    records.write_json(tmp_path / "claims.json", [judge("C6", all_parts(parts), printed, [], parts)])
    (card,), _, _ = page.verdicts(Records(tmp_path))
    assert [d.name for d in card.deciders] == ["b"]
    # Records of earlier versions have no parts.
    records.write_json(tmp_path / "claims.json", [{k: v for k, v in claim.items() if k not in ("parts", "old_rule")}])
    (card,), _, _ = page.verdicts(Records(tmp_path))
    assert card.parts == [] and card.deciders == ()


def test_evidence_comes_before_the_verdicts(tmp_path: Path) -> None:
    html = page.write(started(tmp_path)).read_text()
    order = re.findall(r'<section id="([a-z]+)"', html)
    assert order == ["scores", "verdicts", "answers", "samples", "run", "absent", "terms"]


def test_a_term_is_explained_once_and_text_stays_text() -> None:
    mark = glossary.marker()
    said = str(mark("The fall <b> of BWT, `--x` and routes; a fall, P_S, S, refresh-math and joint-S"))
    assert said.count('class="term"') == 4 and said.count(">fall</a>") == 1
    assert "&lt;b&gt;" in said and "<code>--x</code>" in said and ">routes</a>" in said and ">S</a>" in said
    assert set(re.findall('href="#(.*?)"', said)) == {f"term-{t}" for t in ("fall", "BWT", "route", "S")}


def test_stages_with_one_completion_share_a_row_and_the_wanted_answer_is_shown(tmp_path: Path) -> None:
    for i, (stage, reply) in enumerate((("base", "7"), ("math", "8"), ("qa", "7"))):
        row = {"domain": "math", "prompt": "3 + 4 =", "completion": reply, "reward": float(reply == "7")}
        records.write_jsonl(tmp_path / f"samples/{i:02d}-{stage}.jsonl", [row | ({"wanted": "7"} if i else {})])
    (found,) = run.samples(Records(tmp_path))
    assert found.wanted == "7" and found.replies == ((("base", "qa"), "7", 1.0), (("math",), "8", 0.0))


def test_a_single_row_is_enough(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "evaluations/01-math.json").unlink()
    html = page.write(tmp_path).read_text()
    assert "figure-scores" in html and "a path needs the scores of two stages" in html


def test_of_an_empty_folder_all_is_said_to_be_missing(tmp_path: Path) -> None:
    html = page.write(tmp_path).read_text()
    missing = re.search(r'<ul class="absent">(.*?)</ul>', html, re.DOTALL)
    assert "<figure" not in html and missing and missing[1].count("<li>") >= 5


DAMAGE: dict[str, Any] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "other": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "keys": lambda text: json.dumps({k: None for k in json.loads(text)} if text.startswith("{") else {}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["evaluations/01-math.json", "config.json", "costs/01-math.json", "claims.json"])
def test_a_damaged_record_hides_what_rests_on_it_and_nothing_else(tmp_path: Path, file: str, damage: str) -> None:
    started(tmp_path)
    records.write_json(tmp_path / "claims.json", [])
    before = page.write(tmp_path).read_text()
    (tmp_path / file).write_text(DAMAGE[damage]((tmp_path / file).read_text()))
    after = page.write(tmp_path).read_text()
    said = [n for n in notes(after) + re.findall(r"<p>(Not shown.*?)</p>", after, re.DOTALL) if "damaged" in n]
    assert said
    kept = {"evaluations/01-math.json": "figure-costs", "costs/01-math.json": "figure-scores"}
    assert kept.get(file, "figure-scores") in before and kept.get(file, "figure-scores") in after


def test_text_of_a_completion_is_text(tmp_path: Path) -> None:
    html = page.write(started(tmp_path)).read_text()
    assert "&lt;/script&gt; math" in html and "</script> math" not in html
    assert "math &lt;b&gt; =" in html


BAD_NAMES = ("../../x", "/tmp/x", "a/b", "..", ".x", "javascript:alert(1)//", "x\n", 'a" onclick="x', "", "x" * 200, 5)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_plain_file_name_is_refused(name: Any) -> None:
    with pytest.raises(UserError, match="no name of a figure") as e:
        Table(name, "t", ("a",), ())
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no name of a figure"):
        Figure(name, "t", alt.Chart(), (), "c")


@pytest.mark.parametrize("name", ["../../x", "javascript:alert(1)//"])
def test_a_name_in_a_record_neither_leaves_the_folder_nor_becomes_a_link(name: str, tmp_path: Path) -> None:
    root = started(tmp_path / "deep" / "run")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    records.write_json(root / "recovery" / "refresh-math.json", refresh() | {"stage": name})
    html = without_library(page.write(root))
    made = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(root / "report") or p.name == "refresh-math.json" for p in made)
    links = re.findall(r'href="([^"]*)"', html)
    safe = re.compile(r"#[A-Za-z0-9-]+|data:,|\./[A-Za-z0-9_@-]+\.(?:png|svg|pdf|csv)")
    assert links and all(map(safe.fullmatch, links))
    assert "no name of a figure" in html


def without_library(file: Path) -> str:
    """The page up to the source of the library that draws the charts."""
    return file.read_text().partition("<script>")[0]


def test_text_of_a_claim_is_text_in_attributes_too(tmp_path: Path) -> None:
    root, evil = started(tmp_path), '"><b>x</b><a href="javascript:x" onclick=\'x\''
    claim = {"id": "C1", "claim": evil, "verdict": evil, "estimate": 1.0, "ci95": [0.0, 2.0], "null": None}
    claim |= {"published": evil, "rule": evil, "reason": evil}
    records.write_json(root / "claims.json", [claim])
    html = without_library(page.write(root))
    assert html.count("onclick") >= 5 and "<b>x" not in html and 'javascript:x"' not in html


def test_a_pipe_among_the_records_is_named_and_not_waited_for(tmp_path: Path) -> None:
    root = started(tmp_path)
    os.mkfifo(root / "claims.json")
    (root / "costs" / "01-math.json").unlink()
    os.mkfifo(root / "costs" / "01-math.json")
    html = page.write(root).read_text()
    assert "claims.json is a named pipe" in html and "01-math.json is a named pipe" in html


def test_csv_has_the_scores(tmp_path: Path) -> None:
    page.write(started(tmp_path))
    rewards = records.read_json(tmp_path / "evaluations/01-math.json")["rewards"]["qa"]
    rows = (tmp_path / "report/scores.csv").read_text().splitlines()
    head = rows[0].split(",")
    row = next(r.split(",") for r in rows[1:] if r.startswith("math,qa,"))
    assert float(row[head.index("score")]) == pytest.approx(100 * np.mean(rewards))


def test_the_command_writes_the_page_and_refuses_what_is_no_folder(tmp_path: Path, capsys: Any) -> None:
    assert main.main(["mdrl", "report", f"--workdir={started(tmp_path)}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report/index.html")
    assert main.main(["mdrl", "report", f"--workdir={tmp_path / 'none'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_test_sees_what_is_wrong(tmp_path: Path) -> None:
    good = page.write(started(tmp_path))
    for dark in (False, True):
        for width, met in browser.look(good, tmp_path, dark, (400, 1400)).items():
            assert met["errors"] == met["blocked"] == browser.faults(met, width) == [], (dark, width)
            assert all(c["marks"] > 0 for c in met["charts"])
    html = good.read_text()
    spec = html.index('"$schema"')
    broken = html[:spec] + "not JSON" + html[spec:]
    pale = broken.replace("--quiet: #59636e", "--quiet: #d0d0d0")
    worse = pale.replace("<footer>", '<img src="https://example.org/a.png" alt=""><footer style="font-size: 9px">')
    worse = worse.replace("<footer ", '<div style="width: 1500px">wide</div><footer ')
    worse = worse.replace(CATEGORIES[0], "#D0E4F0").replace('toggle("cropped"', 'toggle("other"')
    worse = worse.replace("? 1 : 8", "? 0 : 0")  # charts keep their width
    (tmp_path / "report/worse.html").write_text(worse)
    met = browser.look(tmp_path / "report/worse.html", tmp_path, widths=(400,))[400]
    assert met["errors"] and any("example.org" in b for b in met["blocked"])
    found = " ".join(browser.faults(met, 400))
    said = ("the page is 15", "text 'mdrl_jax", ": 9 px", "cropped without a cue")
    for fault in (*said, "paths, mark-symbol: contrast 1.", "paths, legend: contrast 1."):
        assert fault in found, fault


def test_a_text_where_a_chart_needs_a_number_hides_its_figure_alone(tmp_path: Path) -> None:
    """Altair checks values itself, some when they are set and some when the chart is written out."""

    def early(found: Any) -> Figure:
        chart: Any = alt.Chart(alt.Data(values=[])).mark_point()
        return Figure("early", "t", chart.properties(width="wide"), (), "c")

    def late(found: Any) -> Figure:
        scale: Any = alt.Scale(domain=5)  # pyright: ignore
        chart = alt.Chart(alt.Data(values=[])).mark_point().encode(x=alt.X("a:Q", scale=scale))
        return Figure("late", "t", chart, (), "c")

    for builder in (early, late):
        items, said, _ = page.tried(builder, Records(tmp_path))
        assert items == [] and "ValidationError" in said and "damaged" in said
