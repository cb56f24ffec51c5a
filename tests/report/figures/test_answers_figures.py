"""Lost and gained answers on the page: every share against the rewards, thresholds, and the lost completions."""

import gzip
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.report.figures import answers
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.screen import terminal
from mdrl_jax.report.tables import answers as table
from tests.report.figures.rendered import texts
from tests.report.figures.whole import whole

STAGES = ("base", "sft", "math", "qa", "refresh-math")
DOMAINS, P, G = ("math", "qa"), 30, 4
THRESHOLDS = {"math": 1.0, "qa": 0.5}


def rewards(stage: str, domain: str) -> np.ndarray:
    """Math falls through qa; rewards of qa are multiples of a quarter."""
    rng = np.random.default_rng([STAGES.index(stage), DOMAINS.index(domain)])
    if domain == "qa":
        return rng.integers(0, 5, (P, G)) / 4
    level = {"math": 0.9, "qa": 0.4}.get(stage, 0.6)
    return (rng.random((P, G)) < level).astype(float)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, stage in enumerate(STAGES):
        by_domain = {d: rewards(stage, d).tolist() for d in DOMAINS}
        record = {"stage": stage, "index": i, "seed": 0, "rewards": by_domain, "accuracy": by_domain}
        records.write_json(tmp_path / f"evaluations/{i:02d}-{stage}.json", record | {"right_from": THRESHOLDS})
        rows = [
            {
                "domain": d,
                "prompt": p,
                "text": f"prompt {p}\nof {d}",
                "completions": [f"{stage} {d} {p}.{k}" for k in range(G)],
            }
            for d in DOMAINS
            for p in range(P)
        ]
        records.write_zipped(tmp_path / f"completions/{i:02d}-{stage}.jsonl.gz", rows)
    return tmp_path


def test_every_bar_is_the_share_of_answers_that_changed(folder: Path):
    found = answers.shares(Records(folder))
    seen = texts(whole(found))
    assert "right → wrong" in seen and "from a reward of 1 in math, 0.5 in qa" in found.caption
    assert [(r["stage"], r["start"]) for r in found.rows][::4] == list(zip(STAGES[1:], STAGES, strict=False))
    for row in found.rows:
        before, after = (rewards(row[s], row["domain"]) >= THRESHOLDS[row["domain"]] for s in ("start", "stage"))
        one, two = (before, after) if row["way"] == "right → wrong" else (after, before)
        sign = -1 if row["way"] == "right → wrong" else 1
        assert row["share"] == pytest.approx(sign * 100 * (one & ~two).mean()) and row["points"] == abs(row["share"])
        assert row["points_low"] < row["points"] < row["points_high"] and row["tick"] == sign * row["null"] != 0


def test_lost_answers_are_shown_with_both_completions(folder: Path):
    found = answers.lost(Records(folder))
    before, after = (rewards(s, "math") == 1 for s in ("math", "qa"))
    assert found.columns == ("prompt", "after math", "after qa") and len(found.rows) == 10
    assert f"10 of {(before & ~after).sum()} answers" in found.caption and "Other sampling keys" in found.caption
    assert len({row[1] for row in found.rows}) == 10
    for prompt, first, second in found.rows:
        p, k = map(int, first.removesuffix(" (1)").removeprefix("math math ").split("."))
        assert before[p, k] and not after[p, k]
        assert (prompt, second) == (f"prompt {p} ⏎ of math", f"qa math {p}.{k} (0)")
    assert found.rows == answers.lost(Records(folder)).rows
    (folder / "completions/02-math.jsonl.gz").unlink()
    with pytest.raises(Absent, match="completions after math were not kept"):
        answers.lost(Records(folder))
    damaged = folder / "completions/03-qa.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(UserError, match="03-qa.jsonl.gz is damaged"):
        records.read_zipped(damaged)


def test_tables_and_record_have_what_the_rewards_say(folder: Path):
    found = Records(folder).matrix()
    lines = answers.headline(Records(folder)).rows
    assert [row[:3] for row in lines] == [("math", "math", "qa"), ("math", "qa", "refresh-math")]
    by_k = answers.pass_at(Records(folder))
    assert by_k.columns[2:] == ("mean reward", "pass@1", "pass@2", "pass@4") and len(by_k.rows) == len(STAGES) * 2
    row = next(r for r in by_k.rows if r[:2] == ("qa", "math"))
    solved = rewards("qa", "math") == 1
    assert row[3].startswith(f"{100 * solved.mean():.1f} [") and row[5].startswith(
        f"{100 * solved.any(axis=1).mean():.1f} ["
    )
    record = table.records(table.all_changes(found), found)
    assert record["right"] == THRESHOLDS and len(record["transitions"]) == 2 * 10
    for change in record["transitions"]:
        parts = [change[name]["estimate"] for name in ("gained", "lost", "net")]
        assert parts[0] - parts[1] == pytest.approx(parts[2])
        assert change["lost"]["null"] == change["resampled"]["estimate"]
    console = Console(file=StringIO(), width=100)
    console.print(terminal.summary(found), highlight=False)
    shown = " ".join(console.file.getvalue().split())  # type: ignore
    assert "pass@4, points; right from 0.5 in qa" in shown
    assert "math: math to qa" in shown and "right → wrong" in shown


def test_rows_are_zipped_alike_each_time(tmp_path: Path):
    rows = [{"text": "ünï\u2028code"}, {"text": "b"}]
    for name in ("a", "b"):
        records.write_zipped(tmp_path / name, rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert records.read_zipped(tmp_path / "a") == rows
    assert [json.loads(x) for x in gzip.decompress((tmp_path / "a").read_bytes()).splitlines()] == rows
    with pytest.raises(UserError, match="does not exist"):
        records.read_zipped(tmp_path / "c")
