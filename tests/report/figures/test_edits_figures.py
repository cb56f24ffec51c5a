"""Figures of edits against a record written by hand: two domains, two layers, half decades."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures import edits
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import drawn, figure, texts
from tests.report.figures.whole import whole

EDGES = [-8.0, -7.5, -7.0, -6.5]
CAST = {
    "below": {"1e-07": figure(0.25, 0.05), "1e-06": figure(0.5, 0.05)},
    "relative": figure(0.6, 0.1) | {"null": 0.1},
    "both": figure(0.2),
}


def edit(share: float) -> dict[str, Any]:
    """10 entries, 1 of them unmoved; in bf16 4."""
    bf16 = copy.deepcopy(CAST) | {"relative": figure(0.7, 0.1)}
    return {
        "all": {"n": 10, "fp32": CAST, "bf16": bf16, "participation": figure(share, 0.1) | {"null": 1 / 3}},
        "kinds": {
            "embedding": {"effective_rank": figure(3.0), "fp32": {"relative": figure(0.9)}},
            "gate": {"layers": {"relative": [0.1, 0.2], "effective_rank": [1.0, None]}},
            "attn_norm": {"layers": {"relative": [0.3, 0.4], "effective_rank": None}},
        },
        "histogram": {
            "log10_edges": EDGES,
            "counts": [3, 4, 0, 3, 0],
            "unchanged": 1,
            "bf16": {"counts": [4, 0, 0, 6, 0], "unchanged": 4},
        },
    }


def overlap(value: float) -> dict[str, Any]:
    return figure(value, 0.02) | {"null": {"mean": 0.05, "low": 0.03, "high": 0.08, "n": 100}}


def record() -> dict[str, Any]:
    pair = {"domains": ["math", "qa"], "by_layer": overlap(0.2), "global": overlap(0.3)}
    pair["sign_conflict"] = {"all": figure(0.45, 0.03) | {"chance": 0.5}}
    return {"domains": {"math": edit(0.2), "qa": edit(0.4)}, "pairs": [pair], "mean_jaccard": figure(0.2)}


def write(folder: Path, content: dict[str, Any]) -> Records:
    write_json(folder / "analysis" / "edits.json", content)
    return Records(folder)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return write(tmp_path, record())


def test_every_entry_is_in_one_bin_and_the_unmoved_ones_stand_apart(records: Records):
    made = edits.histogram(records)
    spec = whole(made)
    math = [r for r in made.rows if r["domain"] == "math"]
    bins = [(r["values"], r["size"], r["log10_size"], r["count"], r["share"]) for r in math]
    assert bins == [
        ("fp32", "unchanged", None, 1, 10),
        ("fp32", "below 1e-8", -8.25, 2, 20),
        ("fp32", "1e-8 to 1e-7.5", -7.75, 4, 40),
        ("fp32", "1e-7.5 to 1e-7", -7.25, 0, 0),
        ("fp32", "1e-7 to 1e-6.5", -6.75, 3, 30),
        ("fp32", "above 1e-6.5", -6.25, 0, 0),
        ("after a bf16 cast", "unchanged", None, 4, 40),
        ("after a bf16 cast", "below 1e-8", -8.25, 0, 0),
        ("after a bf16 cast", "1e-8 to 1e-7.5", -7.75, 0, 0),
        ("after a bf16 cast", "1e-7.5 to 1e-7", -7.25, 0, 0),
        ("after a bf16 cast", "1e-7 to 1e-6.5", -6.75, 6, 60),
        ("after a bf16 cast", "above 1e-6.5", -6.25, 0, 0),
    ]
    assert " 0 1e-8 1e-7 " in texts(spec)


def test_empty_bins_far_from_all_sizes_are_left_out(tmp_path: Path):
    content = record()
    for each in content["domains"].values():
        each["histogram"] |= {"counts": [1, 0, 9, 0, 0], "bf16": {"counts": [1, 0, 9, 0, 0], "unchanged": 1}}
    made = edits.histogram(write(tmp_path, content))
    assert {r["log10_size"] for r in made.rows} == {None, -7.75, -7.25, -6.75}


def test_a_record_without_bf16_counts_shows_the_others_and_says_so(tmp_path: Path):
    content = record()
    for each in content["domains"].values():
        del each["histogram"]["bf16"]
    made = edits.histogram(write(tmp_path, content))
    whole(made)
    assert {r["values"] for r in made.rows} == {"fp32"}
    assert "did not count entries after a bf16 cast" in made.caption
    assert "bf16" not in edits.histogram(write(tmp_path, record())).caption


def test_shares_by_rule_and_cast_with_null_and_published_range(records: Records):
    made = edits.sparsity(records)
    whole(made)
    math = {(r["rule"], r["values"]): r for r in made.rows if r["domain"] == "math"}
    assert {key: r["estimate"] for key, r in math.items()} == {
        ("|δ| < 1e-7", "fp32"): 25,
        ("|δ| < 1e-7", "after a bf16 cast"): 25,
        ("|δ| < 1e-6", "fp32"): 50,
        ("|δ| < 1e-6", "after a bf16 cast"): 50,
        ("|δ|/|θ| < 1e-3", "fp32"): 60,
        ("|δ|/|θ| < 1e-3", "after a bf16 cast"): 70,
        (edits.BOTH, "fp32"): 20,
        (edits.BOTH, "after a bf16 cast"): 20,
        ("participation ratio", "fp32"): 20,
    }
    relative = math["|δ|/|θ| < 1e-3", "fp32"]
    assert (relative["low"], relative["high"], relative["null"]) == pytest.approx((50, 70, 10))
    published = {key[0] for key, r in math.items() if r["published_low"] is not None}
    assert published == {edits.BOTH} and "77–89 %" in made.caption


def test_modules_by_kind_and_layer(records: Records):
    made = edits.ranks(records)
    spec = whole(made)
    math = [(r["kind"], r["layer"], r["effective_rank"], r["relative"]) for r in made.rows if r["domain"] == "math"]
    assert math == [
        ("embedding", "–", 3.0, 90),
        ("gate", "0", 1.0, 10),
        ("gate", "1", None, 20),
        ("attn_norm", "0", None, 30),
        ("attn_norm", "1", None, 40),
    ]
    shown = texts(spec)  # numbers of the first map in the order of the rows, kinds in the order of a layer
    assert " 3 1 " in shown and "embedding attn_norm gate" in shown


def test_neurons_beside_chance_and_sign_conflict_in_percent(records: Records):
    made = edits.neurons(records)
    spec = whole(made)
    assert [(r["figure"], r["set"], r["estimate"], r["null"], r["null_high"]) for r in made.rows] == [
        ("Jaccard", "top 10 % of each layer", 0.2, 0.05, 0.08),
        ("Jaccard", "top 10 % of the model", 0.3, 0.05, 0.08),
        ("sign conflict", "top 20 % of entries", 45, 50, None),
    ]
    assert {"at": 0.19} in drawn(spec)


def test_many_domains_with_long_names_are_no_wider_than_a_page(tmp_path: Path):
    names = ["reasoning", "code", "science", "dialogue", "writing", "tools"]
    content = record()
    shared = {k: v for k, v in content["pairs"][0].items() if k != "domains"}
    content["pairs"] = [{"domains": pair} | shared for pair in itertools.combinations(names, 2)]
    content["domains"] = {name: edit(0.2) for name in names}
    records = write(tmp_path, content)
    for build in (edits.histogram, edits.sparsity, edits.ranks, edits.neurons):
        whole(build(records))


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(Absent, match="edits.json is not there"):
        edits.histogram(Records(tmp_path))
    content = record()
    del content["domains"]["qa"]["histogram"]
    with pytest.raises(Absent, match="no histogram"):
        edits.histogram(write(tmp_path, content))
    alone: dict[str, Any] = record() | {"pairs": []}
    del alone["domains"]["qa"]
    records = write(tmp_path, alone)
    for build in (edits.histogram, edits.sparsity, edits.ranks):
        whole(build(records))
    with pytest.raises(Absent, match="fewer than two domains"):
        edits.neurons(records)
    with pytest.raises(Absent, match="nothing was trained"):
        edits.sparsity(write(tmp_path, {"domains": {}, "pairs": []}))
