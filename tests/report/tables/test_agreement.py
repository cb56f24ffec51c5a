"""Predicted against measured damage over seeds: what the table says, and that the picture is one."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.report.screen import analysis
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.tables import agreement
from tests.report.figures.rendered import check, drawn, texts

PAIRS = (("code", "math"), ("code", "qa"), ("math", "qa"), ("math", "cw"))


def figure(value: float) -> dict:
    """A record."""
    return {"estimate": value, "ci95": [value - 0.01, value + 0.01], "null": 0.0, "n": 9, "unit": ""}


def damage(seed: int, off: float) -> dict:
    """A damage.json whose one-segment predictions are `off` times the measured; those of two segments are exact."""
    pairs = []
    for i, (domain, stage) in enumerate(PAIRS):
        measured = 0.1 * (i + 1)
        rows = [
            {"segments": n, "predicted": figure(k * measured), "measured": figure(measured), "remainder": figure(0.0)}
            for n, k in ((1, off), (2, 1.0))
        ]
        terms = {k: figure(measured) for k in ("first", "second", "predicted", "measured", "remainder")}
        objective = terms | {"segments": rows, "breaks_at": 0.5 if i == 3 else None}
        names = ("reward", "success_nll")
        pairs.append({"domain": domain, "stage": stage, "objectives": dict.fromkeys(names, objective)})
    return {"settings": {"seed": seed}, "pairs": pairs}


def claims(verdict: str) -> list[dict]:
    """Five claims with one verdict."""
    rest = {
        "estimate": 0.25,
        "ci95": [0.1, 0.4],
        "null": {"mean": 0.0, "low": -1.0, "high": 1.0},
        "reason": "because",
        "published": "0.3",
    }
    return [{"id": f"C{i}", "claim": f"claim {i}", "verdict": verdict} | rest for i in range(1, 6)]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Work folders of three seeds with an analysis."""
    made = []
    for seed, verdict in enumerate(("supported", "contradicted", "undecided")):
        folder = tmp_path / str(seed)
        (folder / "analysis").mkdir(parents=True)
        (folder / "analysis" / "damage.json").write_text(json.dumps(damage(seed, 0.5)))
        (folder / "claims.json").write_text(json.dumps(claims(verdict)))
        made.append(folder)
    return made


def test_the_table_tells_segments_apart_and_lists_every_seed(folders):
    shown = agreement.text(agreement.load(folders))
    one, two = (line for line in shown.splitlines() if "success NLL, nats" in line)
    assert "1 segment, 12 pairs" in one and "Spearman 1.00" in one
    # Half of 0.1 to 0.4 leaves Σ(m/2)² = 0.075 of a spread of 0.05.
    assert "R² -0.50 [-0.50, -0.50]" in one and "R² 1.00" in two
    assert "math after cw: 0.5, 0.5, 0.5" in shown and "code after math: holds, holds, holds" in shown
    assert "C3 claim 3: supported, contradicted, undecided; figure 0.250 [0.250, 0.250] over seeds" in shown


def test_every_pair_is_drawn_at_its_damage_by_one_segment_and_by_most(folders):
    made = agreement.picture(agreement.load(folders))
    spec = check(made)
    assert len(made.rows) == 3 * 4 * 2 * 2  # seeds, pairs, numbers of segments, objectives
    rows = {(r["objective"], r["seed"], r["pair"], r["segments"]): r for r in made.rows}
    half = rows["reward", 2, "math after cw", 1]
    ends = [half[k] for k in ("predicted", "predicted_low", "predicted_high", "measured", "measured_low")]
    np.testing.assert_allclose(ends, [20, 19, 21, 40, 39])
    np.testing.assert_allclose(rows["success_nll", 0, "code after math", 2]["predicted"], 0.1)
    shown = texts(spec)
    assert "hollow: one segment; filled: 2" in shown and all(f"{d} after {s}" in shown for d, s in PAIRS)
    lines = sorted(r["at"] for r in drawn(spec) if "at" in r)
    # From the least value or 0 to the end of the longest interval; no interval goes further than the points do.
    assert lines[0] == 0 and lines[-1] == 41


def test_other_numbers_of_segments_are_left_out(folders):
    found = agreement.load(folders[:1])
    for pair in found[0]["pairs"]:
        rows = pair["objectives"]["reward"]["segments"]
        pair["objectives"]["reward"]["segments"] = [*rows, rows[0] | {"segments": 8}]
    rows = agreement.picture(found).rows
    assert {r["segments"] for r in rows if r["objective"] == "reward"} == {1, 8}


def test_the_picture_is_a_png_of_two_panels(folders):
    picture = agreement.picture(agreement.load(folders)).png()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert 1.5 * height < width < 1800 and height > 600


def test_folders_without_an_analysis(folders, tmp_path):
    assert agreement.load([tmp_path / "none"]) == []
    recovered = tmp_path / "recovered"  # a refresh has judged its claim
    recovered.mkdir()
    (recovered / "claims.json").write_text(json.dumps(claims("undecided")))
    assert agreement.load([recovered]) == []
    with pytest.raises(UserError, match=r"none has no analysis/damage.json, others have one"):
        agreement.load([*folders, tmp_path / "none"])


def test_the_screen_shows_damage_in_points_and_every_verdict(folders, tmp_path):
    content = damage(0, 0.5)
    content["agreement"] = {"reward": {"n": 4, "spearman": figure(1.0), "r_squared": figure(0.5)}}
    with Screen(tmp_path / "log.txt") as screen:
        with screen.steps("analyze", 2) as show:
            show(1, "half")
        screen.print(analysis.summary({"damage": content, "claims": claims("supported")}))
    shown = (tmp_path / "log.txt").read_text()
    assert "reward" in shown and " 40 " in shown and "[39, 41]" in shown and "0.4" in shown
    assert shown.count("supported") == 5 and "because" in shown


def test_one_seed_of_two_pairs_has_no_interval_and_one_segment_is_one() -> None:
    few = damage(0, 0.5)
    few["pairs"] = few["pairs"][:2]
    for pair in few["pairs"]:
        for row in pair["objectives"]["reward"]["segments"]:
            row["segments"] = 1
    text = agreement.text([few | {"claims": []}])
    assert "inf" not in text and "1 segments" not in text and ", 1 segment, " in text and "(no interval)" in text


def test_a_record_with_one_objective_is_shown() -> None:
    one = damage(0, 0.5)
    for pair in one["pairs"]:
        pair["objectives"] = {"reward": pair["objectives"]["reward"]}
    text = agreement.text([one | {"claims": []}])
    assert "success NLL, nats" not in text and "code after math: not measured" in text
    check(agreement.picture([one]))
    assert analysis.damage_table(one["pairs"]).forms[0].row_count == len(PAIRS)  # pyright: ignore[reportAttributeAccessIssue]
