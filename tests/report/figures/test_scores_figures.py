"""The heat map of scores, the paths over stages, and the table of transfer."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from mdrl_jax import records
from mdrl_jax.config import AnalyzeSection
from mdrl_jax.report.figures import run, scores
from mdrl_jax.report.folder import Absent, Records
from tests.report.browser import contrast
from tests.report.figures.rendered import check, drawn

STAGES = ("base", "code", "math", "refresh-code", "rollback-code-math")
DOMAINS = ("code", "math")


def folder(root: Path, stages: tuple[str, ...] = STAGES, prompts: int = 8) -> Records:
    rng = np.random.default_rng(0)
    for i, stage in enumerate(stages):
        rewards = {d: rng.random((prompts, 2)).tolist() for d in DOMAINS}
        record = {"stage": stage, "index": i, "seed": 0, "k": 2, "step": 1, "rewards": rewards, "accuracy": rewards}
        records.write_json(root / f"evaluations/{i:02d}-{stage}.json", record)
    return Records(root)


def test_the_heat_map_has_every_score_and_frames_what_was_trained(tmp_path: Path) -> None:
    found = folder(tmp_path)
    figure = scores.matrix(found)
    check(figure)
    for row in figure.rows:
        file = next((tmp_path / "evaluations").glob(f"*-{row['stage']}.json"))
        rewards = np.asarray(json.loads(file.read_text())["rewards"][row["domain"]])
        means = 100 * rewards.mean(axis=1)
        assert row["score"] == pytest.approx(means.mean())
        assert row["stderr"] == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)))
    trained = {(r["stage"], r["domain"]) for r in figure.rows if r["trained"]}
    assert trained == {("code", "code"), ("math", "math"), ("refresh-code", "code")}


def test_text_on_every_colour_of_the_heat_map_meets_wcag_aa(tmp_path: Path) -> None:
    n = 64
    for i in range(n):
        rewards = {"code": [[i / (n - 1)]] * 2}
        record = {"stage": f"s{i}", "index": i, "seed": 0, "k": 1, "step": 1, "rewards": rewards, "accuracy": rewards}
        records.write_json(tmp_path / f"evaluations/{i:02d}-s{i}.json", record)
    svg = vl_convert.vegalite_to_svg(json.dumps(scores.matrix(Records(tmp_path)).spec()))
    cells = re.findall(r'<path aria-label="[^"]*score, points: [^"]*"[^>]*?fill="(rgb[^"]*)"', svg)
    texts = re.findall(r'<text aria-label="[^"]*score, points: [^"]*"[^>]*?fill="(black|white)"', svg)
    assert len(cells) >= n and len(texts) == n
    for cell, ink in zip(cells, texts, strict=False):
        assert contrast(cell, {"black": "rgb(0,0,0)", "white": "rgb(255,255,255)"}[ink]) >= 4.5, (cell, ink)


def test_a_path_goes_through_the_stages_to_the_refreshes_and_rollbacks(tmp_path: Path) -> None:
    figure = scores.paths(folder(tmp_path))
    check(figure)
    assert [r["stage"] for r in figure.rows if r["domain"] == "math"] == list(STAGES)
    assert {r["stage"] for r in figure.rows if r["part"] == "recovery"} == {"refresh-code", "rollback-code-math"}
    assert all(r["low"] < r["score"] < r["high"] for r in figure.rows)
    links = [row for row in drawn(figure.spec()) if "to" in row]
    ends = {r["domain"]: r["score"] for r in figure.rows if r["stage"] == "math"}
    assert {(d["stage"], d["to"], d["domain"]) for d in links} == {("math", "refresh-code", d) for d in DOMAINS}
    assert all(d["score"] == ends[d["domain"]] for d in links)


def test_without_two_stages_there_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="two stages"):
        scores.paths(folder(tmp_path, ("base",)))
    with pytest.raises(Absent, match="evaluations"):
        scores.matrix(Records(tmp_path / "none"))


def test_one_prompt_has_no_error_and_no_infinity(tmp_path: Path) -> None:
    found = folder(tmp_path, prompts=1)
    for figure in (scores.matrix(found), scores.paths(found)):
        assert "Infinity" not in figure.json() and "NaN" not in figure.json()


def test_costs_add_up(tmp_path: Path) -> None:
    for i, seconds in enumerate((1.5, 2.0)):
        record = {"stage": f"s{i}", "kind": "grpo", "seconds": seconds, "steps": 1, "flops": 10.0}
        records.write_json(tmp_path / f"costs/{i:02d}-s{i}.json", record | {"tokens_sampled": 1, "tokens_trained": 1})
    figure = run.costs(Records(tmp_path))
    check(figure)
    assert figure.caption.startswith("4 s and 20 FLOPs")
    records.write_json(tmp_path / "costs/02-s2.json", record | {"tokens_sampled": 1, "tokens_trained": 1} | peak(3))
    assert run.costs(Records(tmp_path)).caption.endswith("at most 3.0 GiB of memory.")


def peak(gib: int) -> dict[str, int]:
    return {"peak_bytes": gib * 2**30}


def test_what_an_analysis_took_and_left_out(tmp_path: Path) -> None:
    settings = dataclasses.asdict(AnalyzeSection(permutations=0, removal_spaces=("heads",), vectors=2))
    records.write_json(tmp_path / "analysis/settings.json", {"analyze": settings})
    records.write_json(tmp_path / "analysis/spent.json", {"edits": {"seconds": 61.2} | peak(5)})
    table = run.analysed(Records(tmp_path))
    assert table.rows[0] == ("edits", "61", "5.0")
    left = {row[0].split(" (")[1][:-1]: row[2] for row in table.rows[1:] if row[1] == "not run"}
    assert list(left) == ["analyze.permutations", "analyze.removal_spaces", "analyze.theorem"]
    assert left["analyze.removal_spaces"].startswith("48 Hessian products")
    assert left["analyze.theorem"].startswith("4 Hessian products")
