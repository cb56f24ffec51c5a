"""Figures of a rollback against a record written by hand: every set, every control, the choice and the limit."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.report.figures.recovery import rolled_back
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import check, drawn, figure, texts


def both(gain: float, loss: float) -> dict[str, Any]:
    """Gain and loss with intervals of a point on each side."""
    return {"gain": figure(gain, 1.0), "loss": figure(loss, 1.0)}


def point(gain: float, loss: float, rule: str = "removing", place: str = "all", **more: Any) -> dict[str, Any]:
    """A set of the sweep."""
    return {"rule": rule, "place": place, "fraction": 0.01, "size": 10, "strength": 1.0} | both(gain, loss) | more


def record(**more: Any) -> dict[str, Any]:
    """A rollback of songs for sums: four sets, two controls, a choice."""
    return {
        "stage": "rollback-sums-songs",
        "domain": "sums",
        "donor": "songs",
        "limit": 2.0,
        "prompts": {"sums": 40, "songs": 50},
        "coordinates": 1000,
        "points": [
            point(5, 1), point(9, 4, fraction=0.04, size=40), point(6, 2, strength=0.5),
            point(3, 0, "adding", "route", size=8),
        ],
        "curves": {
            "random": [{"setting": 8} | both(2, 3), {"setting": 10} | both(0, 0), {"setting": 64} | both(3, 3)],
            "whole": [{"setting": 0.5} | both(20, 30)],
        },
        "chosen": point(5, 1) | {"others": {}},
        "same_size": {"random": {"n": 40, "gain": {"mean": -0.01, "percentiles": [-0.5, 1.0]}, "p": 0.024}},
        "test": {
            "prompts": 60, "recovery": figure(0.6, 0.1, "fraction"), **both(4, 2),
            "at_equal_loss": {
                "random": figure(3.0, 1.0) | {"control_gain": 1.0},
                "odd": figure(-2.0, 1.0) | {"control_gain": 6.0},
            },
        },
    } | more  # fmt: skip


def folder(tmp_path: Path, *found: dict[str, Any]) -> Records:
    """A work folder with these rollbacks."""
    (tmp_path / "recovery").mkdir(exist_ok=True)
    for one in found:
        (tmp_path / "recovery" / f"{one['stage']}.json").write_text(json.dumps(one))
    return Records(tmp_path)


def test_every_set_control_and_the_choice_are_where_they_were_measured(tmp_path: Path):
    (made,) = rolled_back.sweep(folder(tmp_path, record()))
    spec = check(made)
    assert made.name == "rollback-sums-songs"
    sets = [(r["loss"], r["gain"], r["rule"], r["place"]) for r in made.rows if r["what"] == "set"]
    assert sets == [
        (1, 5, "removing", "all coordinates"), (4, 9, "removing", "all coordinates"),
        (2, 6, "removing", "all coordinates"), (0, 3, "adding", "shared route"),
    ]  # fmt: skip
    random = [(r["setting"], r["loss"], r["gain"]) for r in made.rows if r["what"] == "random"]
    assert random == [(8, 3, 2), (10, 0, 0), (64, 3, 3)]
    chosen = {r["what"]: r for r in made.rows if r["what"].startswith("chosen")}
    picked, tested = chosen["chosen"], chosen["chosen, on test prompts"]
    assert (picked["loss"], picked["gain"], picked["gain_low"], picked["loss_high"]) == (1, 5, 4, 2)
    assert (tested["loss"], tested["gain"], tested["gain_low"], tested["loss_high"]) == (2, 4, 3, 3)
    assert [r["loss"] for r in drawn(spec) if r.get("shown") == "limit"] == [2.0]
    assert [r["loss"] for r in drawn(spec) if r.get("shown") in ("chosen", "on test prompts")] == [1, 2]
    shown = texts(spec)
    assert "loss of songs, points (40 validation prompts)" in shown
    assert "gain of sums, points (40 validation prompts)" in shown and "the whole edit" in shown
    assert "1.00% of the coordinates by the rule `removing`" in made.caption and "40 validation" in made.caption


def test_a_control_far_off_does_not_squeeze_the_rest(tmp_path: Path):
    (made,) = rolled_back.sweep(folder(tmp_path, record()))
    ends = [layer["encoding"]["x"]["scale"]["domain"] for layer in layers(made.spec()) if scaled(layer)]
    assert ends and all(low < 0 and 4 < high < 5 for low, high in ends)  # the whole edit loses 30


def layers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All layers within a specification."""
    return [spec] + [inner for layer in spec.get("layer", []) for inner in layers(layer)]


def scaled(layer: dict[str, Any]) -> bool:
    """Whether it fixes the ends of its x axis."""
    return "domain" in layer.get("encoding", {}).get("x", {}).get("scale", {})


def test_a_sweep_that_chose_nothing_is_drawn_too(tmp_path: Path):
    nothing = {"chosen": None}
    bare = {k: v for k, v in record().items() if k not in ("curves", "test", "same_size")}
    (made,) = rolled_back.sweep(folder(tmp_path, bare | nothing))
    check(made)
    assert {r["what"] for r in made.rows} == {"set"} and "nothing was taken back" in made.caption
    with pytest.raises(Absent, match="no rollback found a set"):
        rolled_back.at_equal_loss(Records(tmp_path))


def test_what_c7_judges_is_shown_against_0(tmp_path: Path):
    other = {k: v for k, v in record(stage="rollback-a-b", chosen=None).items() if k != "test"}
    (made,) = rolled_back.at_equal_loss(folder(tmp_path, record(), other))
    spec = check(made)
    assert made.name == "rollback-sums-songs-controls"
    rows = [("random", 1.0, None, 3.0, 2.0, 4.0), ("odd", 6.0, None, -2.0, -3.0, -1.0)]
    assert [tuple(r.values()) for r in made.rows] == rows and "completions" not in made.caption
    more = record()
    for n, one in enumerate(more["test"]["at_equal_loss"].values(), 1):
        one["completions"] = 2 * n
    (made,) = rolled_back.at_equal_loss(folder(tmp_path, more, other))
    assert "at the same loss with 2 to 4 completions of each prompt" in made.caption
    assert [r for r in drawn(spec) if "zero" in r] == [{"zero": 0.0}]
    assert "gains 4.0 [3.0, 5.0] points of sums and costs 2.0 [1.0, 3.0] of songs" in made.caption
    assert "recovery fraction 0.60 [0.50, 0.70]" in made.caption
    assert "40 random sets of the same size gained 0.0 points" in made.caption
    assert "−0.5 to 1.0; p = 0.024" in made.caption


def test_the_gain_of_the_score_matrix_is_named_before_that_of_other_samples(tmp_path: Path):
    records = folder(tmp_path, record())
    (tmp_path / "evaluations").mkdir()
    scores = {"base": 0.2, "sums": 0.9, "songs": 0.4, "rollback-sums-songs": 0.7}
    for i, (stage, mean) in enumerate(scores.items()):
        # The prompts differ, so every difference has an interval.
        rewards = {d: [[mean], [mean + 0.01], [mean - 0.01 * i]] for d in ("sums", "songs")}
        head = {"stage": stage, "index": i, "start": (None, "base", "sums", "songs")[i]}
        (tmp_path / f"evaluations/{i:02d}-{stage}.json").write_text(json.dumps(head | {"rewards": rewards}))
    (made,) = rolled_back.at_equal_loss(records)
    first, _, other = made.caption.partition("has other samples: on 60 test prompts the chosen set gains 4.0")
    assert other and "In the score matrix the stage gains 29.7 [" in first and "recovery fraction 0.59 [" in first


def test_shares_are_those_taken_and_at_full_strength(tmp_path: Path):
    (made,) = rolled_back.fractions(folder(tmp_path, record()))
    spec = check(made)
    found = [(r["rule"], r["place"], r["side"], r["share"], r["points"]) for r in made.rows]
    gain, loss = "gain of sums", "loss of songs"
    assert found == [
        ("removing", "all coordinates", gain, 0.01, 5), ("removing", "all coordinates", loss, 0.01, 1),
        ("removing", "all coordinates", gain, 0.04, 9), ("removing", "all coordinates", loss, 0.04, 4),
        ("adding", "shared route", gain, 0.008, 3), ("adding", "shared route", loss, 0.008, 0),
    ]  # fmt: skip
    assert sorted(r["level"] for r in drawn(spec) if "level" in r) == [0.0, 2.0]


def test_a_run_without_a_shared_route_or_with_a_new_rule(tmp_path: Path):
    one = record(points=[point(5, 1, "novel")], chosen=point(5, 1, "novel"))
    (made,) = rolled_back.fractions(folder(tmp_path, one))
    spec = check(made)
    assert len(spec["hconcat"]) == 1 and "novel" in texts(spec)
    (made,) = rolled_back.sweep(Records(tmp_path))
    assert "novel" in texts(check(made))


def test_a_run_without_rollbacks_says_what_makes_them(tmp_path: Path):
    for builder in (rolled_back.sweep, rolled_back.at_equal_loss, rolled_back.fractions):
        with pytest.raises(Absent, match="rollback-"):
            builder(Records(tmp_path))


def test_a_rollback_that_tried_nothing_says_so(tmp_path: Path) -> None:
    """Every rule's evidence may be left out, as where no completion succeeded."""
    empty = record(points=[], curves={}, chosen=None)
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / "rollback-sums-songs.json").write_text(json.dumps(empty))
    for builder in (rolled_back.sweep, rolled_back.fractions):
        with pytest.raises(Absent, match="no rollback tried a set of coordinates"):
            builder(Records(tmp_path))
