"""Figures of routes against records written by hand: two domains, one followed by the other."""

from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.records import write_json
from mdrl_jax.report.figures import routes
from mdrl_jax.report.folder import Absent, Records
from tests.report.figures.rendered import drawn, figure
from tests.report.figures.whole import whole

NULL = {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 100}
# The stage of QA has another name than its domain.
STAGES = [{"name": "math", "domain": "math"}, {"name": "qa2", "domain": "qa"}, {"name": "cw", "domain": "cw"}]


def overlap(neurons: float, heads: float, a: str = "math", b: str = "qa") -> dict[str, Any]:
    def of(value: float) -> dict[str, Any]:
        return {"all": figure(value, 0.1) | {"null": NULL}, "correct": figure(0.9)}

    return {"domains": [a, b], "neurons": of(neurons), "heads": of(heads)}


SHARED = {
    "neurons": [[1, 2], [5]],
    "edit_cosine": {"route": figure(-0.4, 0.2) | {"null": NULL}, "complement": figure(0.1, 0.05)},
}


def transfer(stage: str, effect: float, measured: float, domain: str = "math") -> dict[str, Any]:
    on = figure(effect, 0.001) | {"null": {"mean": 0.0, "low": -0.002, "high": 0.003, "n": 9}}
    effects = {"route": on, "complement": figure(2 * effect, 0.002)}
    return {"domain": domain, "stage": stage, "measured": figure(measured, 0.05), "effect": effects}


def write(folder: Path, points: dict[str, Any], transfers: list[Any]) -> Records:
    write_json(folder / "analysis" / "routes.json", points)
    write_json(folder / "analysis" / "damage.json", {"transfers": transfers})
    write_json(folder / "analysis" / "settings.json", {"stages": STAGES})
    return Records(folder)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    base = {"overlaps": {"math-qa": overlap(0.3, 0.5)}, "shared": {}}
    peak = {"overlaps": {"math-qa": overlap(0.2, 0.0)}, "shared": {"qa": SHARED}}
    return write(tmp_path, {"base": base, "math": peak}, [transfer("qa2", 0.01, -0.2)])


def test_overlaps_at_the_base_and_at_the_peak_beside_chance(records: Records):
    made = routes.overlap(records)
    spec = whole(made)
    assert [(r["pair"], r["at"], r["channels"], r["estimate"]) for r in made.rows] == [
        ("math – qa", "at the base", "MLP neurons", 0.3),
        ("math – qa", "at the base", "attention heads", 0.5),
        ("math – qa", "at the earlier domain's peak", "MLP neurons", 0.2),
        ("math – qa", "at the earlier domain's peak", "attention heads", 0.0),
    ]
    first = made.rows[0]
    assert (first["low"], first["high"]) == pytest.approx((0.2, 0.4))
    assert (first["null"], first["null_low"], first["null_high"]) == (0.05, 0.02, 0.08)
    # The matrix is that of neurons at the base.
    assert spec["hconcat"][0]["title"]["text"] == "neurons, at the base"


def test_at_a_peak_only_pairs_of_its_domain_count(tmp_path: Path):
    pairs = {"math-qa": overlap(0.2, 0.1), "qa-cw": overlap(0.7, 0.1, "qa", "cw")}
    points = {"math": {"overlaps": pairs, "shared": {}}, "qa2": {"overlaps": {"qa-cw": pairs["qa-cw"]}, "shared": {}}}
    made = routes.overlap(write(tmp_path, points, []))
    whole(made)
    assert [(r["pair"], r["estimate"]) for r in made.rows if r["channels"] == "MLP neurons"] == [
        ("math – qa", 0.2),
        ("qa – cw", 0.7),
    ]


def test_effects_and_transfer_in_points(records: Records):
    made = routes.effects(records)
    spec = whole(made)
    found = [(r["pair"], r["where"], r["estimate"], r["transfer"]) for r in made.rows]
    assert found == [
        ("math after qa2", "on the shared route", 1.0, -20.0),
        ("math after qa2", "outside the shared route", 2.0, -20.0),
    ]
    row = made.rows[0]
    assert (row["low"], row["high"]) == pytest.approx((0.9, 1.1))
    assert (row["null_low"], row["null_high"]) == pytest.approx((-0.2, 0.3))
    assert (row["transfer_low"], row["transfer_high"]) == pytest.approx((-25, -15))
    assert "1 pairs are too few" in made.caption
    assert len([r for r in drawn(spec) if "transfer" in r]) == 2


def test_the_order_of_effects_against_that_of_transfers(tmp_path: Path):
    """Six pairs in reversed order off by nothing: Spearman −1."""
    made = routes.effects(write(tmp_path, {}, [transfer(f"s{i}", 0.01 * i, -0.1 * i) for i in range(1, 7)]))
    whole(made)
    assert "6 pairs: −1.00" in made.caption


def test_cosines_of_edits_on_the_shared_route_and_off_it(records: Records):
    made = routes.edit_cosines(records)
    whole(made)
    assert [(r["pair"], r["where"], r["estimate"], r["neurons"], r["null_high"]) for r in made.rows] == [
        ("math – qa", "on the shared route", -0.4, 3, 0.08),
        ("math – qa", "outside the shared route", 0.1, 3, None),
    ]


def test_what_is_missing_is_said(tmp_path: Path):
    for build in (routes.overlap, routes.edit_cosines):
        with pytest.raises(Absent, match="routes.json is not there"):
            build(Records(tmp_path))
    with pytest.raises(Absent, match="damage.json is not there"):
        routes.effects(Records(tmp_path))
    unshared = transfer("qa2", 0.0, 0.1) | {"effect": None}
    empty = write(tmp_path, {"base": {"overlaps": {}, "shared": {}}}, [unshared])
    with pytest.raises(Absent, match="fewer than two"):
        routes.overlap(empty)
    with pytest.raises(Absent, match="no domain was followed"):
        routes.effects(empty)
    with pytest.raises(Absent, match="no shared routes"):
        routes.edit_cosines(empty)
