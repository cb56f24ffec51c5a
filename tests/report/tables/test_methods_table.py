"""The comparison of methods against figures worked out by hand: scores, collateral, and what each took."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.records import write_json
from mdrl_jax.report.tables import matrix as mx
from mdrl_jax.report.tables import methods
from mdrl_jax.report.tables.recovered import recoveries
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.workfolder import resolved

DOMAINS = ("math", "qa", "cw")
STAGES = (
    "math", "qa", "cw", "solo-math", "solo-qa", "solo-cw", "refresh-math", "refresh-qa", "rollback-math-cw",
    "protect-qa", "protect-cw", "ewc-qa", "joint", "reversed-cw", "reversed-qa", "reversed-math", "average",
)  # fmt: skip
POINTS = {
    "base": (20.0, 20.0, 20.0),
    "math": (90.0, 20.0, 30.0),
    "qa": (70.0, 80.0, 40.0),
    "cw": (60.0, 78.0, 98.0),
    "refresh-math": (86.0, 75.0, 97.0),
    "refresh-qa": (85.0, 79.0, 92.0),
    "rollback-math-cw": (70.0, 79.0, 90.0),
    "protect-cw": (84.0, 77.0, 96.0),
    "joint": (80.0, 77.0, 96.0),
    "reversed-math": (91.0, 60.0, 70.0),
    "average": (50.0, 50.0, 50.0),
}
OFFSETS_P = np.linspace(-6, 6, 13)
STEPS = {"refresh-math": 4, "refresh-qa": 3, "rollback-math-cw": 0, "average": 0, "joint": 66}
SEEDS = (0, 1, 2)


def evaluation(stage: str, index: int, seed: int, shift: float) -> dict[str, Any]:
    rng = np.random.default_rng((seed, index))
    points = POINTS.get(stage, (10.0, 10.0, 10.0))
    values = [p + shift * (index == 7) + rng.permutation(OFFSETS_P) / 4 for p in points]
    rewards = {d: (v[:, None] / 100).tolist() for d, v in zip(DOMAINS, values, strict=True)}
    return {"stage": stage, "index": index, "seed": seed, "rewards": rewards, "accuracy": rewards}


def write(folder: Path, seed: int, shift: float, without: tuple[str, ...] = (), **changes: dict[str, Any]) -> Path:
    """A work folder; the refresh of math (index 7) scores `shift` better than `POINTS`.

    `changes` are overrides of stages; those with a label are added to the stages.
    """
    c = default()
    stages = (*STAGES, *(name for name in changes if name not in STAGES))
    c.seed, c.stages, c.scored_domains = seed, stages, DOMAINS
    c.stage_overrides = {"joint": {"start": "base", "prompts_per_step": 18}, **changes}
    write_json(folder / "config.json", {"config": resolved(parse(c))})
    for i, stage in enumerate(("base", *stages)):
        name = f"{i:02d}-{stage}.json"
        write_json(folder / "evaluations" / name, evaluation(stage, i, seed, shift))
        if stage not in ("base", *without):
            steps = STEPS.get(stage, 22 if stage in ("protect-qa", "protect-cw") else 20)
            cost = {"stage": stage, "steps": steps, "seconds": 2.0 * steps + seed, "flops": steps * 1e12}
            write_json(folder / "costs" / name, cost)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / str(seed), seed, 2.0 * (seed - 1)) for seed in SEEDS]


def compare(folders: list[Path]) -> methods.MethodsTable | None:
    return methods.compare([methods.load(folder) for folder in folders])


def rows(table: methods.MethodsTable | None) -> dict[str, methods.Method]:
    assert table is not None
    return {row.name: row for row in table.rows}


def value(row: methods.Method, column: str) -> float:
    estimate = row.cells[column].estimate
    assert estimate is not None
    return estimate.value


def test_rows_are_what_was_done_in_a_fixed_order(folders: list[Path]):
    table = compare(folders)
    assert list(rows(table)) == [
        "plain sequence", "refresh-math", "refresh-qa", "rollback-math-cw", "protect-cw", "joint", "reversed-math",
        "average",
    ]  # fmt: skip
    assert table is not None and table.focus == "math" and table.seeds == SEEDS  # falls: math 30, qa 2


def test_scores_and_collateral_by_hand(folders: list[Path]):
    found = rows(compare(folders))
    refresh = found["refresh-math"]
    assert refresh.cells["average"].per_seed == pytest.approx([86 + s for s in (-2, 0, 2)])
    expected = statistics.over_seeds([84.0, 86.0, 88.0])
    estimate = refresh.cells["focus"].estimate
    assert estimate is not None and estimate.n == 3
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((86, expected.low, expected.high))
    assert refresh.cells["collateral"].per_seed == pytest.approx([5, 3, 1]) and refresh.worst == ("qa", "qa", "qa")
    assert found["plain sequence"].cells["collateral"].estimate is None
    assert value(found["plain sequence"], "average") == pytest.approx((60 + 78 + 98) / 3)
    # Qa's refresh starts from that of math: cw fell from 97 to 92, and math's score is that of the first refresh.
    # Of what is about no domain, math's rise does not count.
    assert value(found["refresh-qa"], "collateral") == pytest.approx(5) and found["refresh-qa"].worst[0] == "cw"
    assert value(found["rollback-math-cw"], "collateral") == pytest.approx(8)
    assert value(found["protect-cw"], "collateral") == pytest.approx(2) and found["protect-cw"].worst[0] == "cw"
    assert value(found["reversed-math"], "collateral") == pytest.approx(28)


def test_collateral_of_a_recovery_is_that_of_the_matrix(folders: list[Path]):
    run = methods.load(folders[0])
    (one,) = (methods.summarise([run]),)
    for r in recoveries(run.matrix):
        cell = rows(one)[r.stage].cells["collateral"]
        assert cell.estimate == r.collateral.estimate and rows(one)[r.stage].worst == (r.collateral.detail,)


def test_what_each_took_beyond_the_plain_sequence(folders: list[Path]):
    found = rows(compare(folders))
    steps = {name: row.cells["steps"].per_seed for name, row in found.items()}
    assert steps["plain sequence"] == (0, 0, 0)
    assert steps["refresh-math"] == (4, 4, 4)
    assert steps["refresh-qa"] == (7, 7, 7)  # it starts from the refresh of math
    assert steps["rollback-math-cw"] == (0, 0, 0)
    assert steps["protect-cw"] == (4, 4, 4)  # two stages of 22 in place of two of 20
    assert steps["joint"] == (6, 6, 6)  # 66 from the base in place of three of 20
    assert steps["reversed-math"] == (0, 0, 0)
    assert steps["average"] == (0, 0, 0)  # three solo stages in place of three plain ones
    seconds = found["refresh-math"].cells["seconds"]
    assert seconds.per_seed == (8, 9, 10) and seconds.estimate is not None
    assert seconds.estimate.high - 9 == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert value(found["protect-cw"], "flops") == pytest.approx(4e12)
    assert found["joint"].cells["seconds"].per_seed == (12, 10, 8)  # one stage's `seed` seconds in place of three


def test_a_cost_that_is_missing_leaves_only_what_needs_it_open(tmp_path: Path):
    folder = write(tmp_path / "0", 0, 0.0, without=("math", "protect-qa", "refresh-qa"))
    found = rows(compare([folder]))
    assert value(found["refresh-math"], "steps") == 4  # what both share cancels
    for name in ("refresh-qa", "protect-cw", "joint"):
        cell = found[name].cells["steps"]
        assert cell.estimate is None and cell.reason == "not on record"
    assert "–" in methods.summarise([methods.load(folder)]).text()


def test_one_seed_has_intervals_over_prompts(folders: list[Path]):
    m = mx.load(folders[0])
    found = rows(compare(folders[:1]))
    row = m.stages.index("refresh-math")
    assert found["refresh-math"].cells["focus"].estimate == mx.score_at(m, "", row, "math").estimate
    expected = mx.average("", [mx.score_at(m, "", row, d) for d in DOMAINS]).estimate
    assert found["refresh-math"].cells["average"].estimate == expected
    steps = found["refresh-math"].cells["steps"].estimate
    assert steps is not None and not np.isfinite(steps.high)


def test_seeds_may_lack_rows(folders: list[Path], tmp_path: Path):
    short = write(tmp_path / "3", 3, 0.0)
    (short / "evaluations/07-refresh-math.json").unlink()
    cell = rows(compare([*folders, short]))["refresh-math"].cells["focus"]
    assert cell.per_seed[3] is None and cell.estimate is not None and cell.estimate.n == 3


def test_from_eight_seeds_on_prompts_are_drawn_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "N_REPLICATES", 40)
    stages = ("math", "qa", "cw", "refresh-math")
    runs = []
    for seed in range(8):
        table = [evaluation(s, i, 0, 0.0) | {"seed": seed} for i, s in enumerate(("base", *stages))]
        runs.append(methods.Run(mx.build(table), (), {}))
    # Equal seeds: only the prompts move the scores, while Student's t would say no error at all. All runs have the same
    # prompts, so eight equal runs know as much about other prompts as one.
    estimate = rows(methods.summarise(runs))["refresh-math"].cells["focus"].estimate
    assert estimate is not None
    expected = 2 * 1.96 * (OFFSETS_P / 4).std() / np.sqrt(13)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.35)


def test_a_folder_with_nothing_but_the_plain_sequence_has_no_table(tmp_path: Path):
    for i, stage in enumerate(("base", "math", "qa", "cw")):
        write_json(tmp_path / "evaluations" / f"{i:02d}-{stage}.json", evaluation(stage, i, 0, 0.0))
    assert compare([tmp_path]) is None
    # An unfinished prevention is none yet: it has not seen what the plain sequence ended with.
    write_json(tmp_path / "evaluations" / "04-ewc-qa.json", evaluation("ewc-qa", 4, 0, 0.0))
    assert compare([tmp_path]) is None
    # Costs need the config that says what led to what.
    write_json(tmp_path / "evaluations" / "05-refresh-math.json", evaluation("refresh-math", 5, 0, 0.0))
    assert rows(compare([tmp_path]))["refresh-math"].cells["steps"].estimate is None


def test_screen_text_and_record(folders: list[Path]):
    table = compare(folders)
    assert table is not None
    text = table.text()
    line = next(x for x in text.splitlines() if x.strip().startswith("refresh-math"))
    assert "86.0 ± 5.0" in line and "3.0 ± 5.0 qa" in line and "+4" in line and "+4e+12" in line and "+9 ± 2" in line
    assert "inf" not in text and "nan" not in text and max(map(len, text.splitlines())) <= 120
    written = json.loads(json.dumps(table.record(), allow_nan=False))
    (row,) = (r for r in written["methods"] if r["method"] == "refresh-math")
    assert row["collateral"]["domains"] == ["qa", "qa", "qa"] and row["steps"]["per_seed"] == [4, 4, 4]
    assert row["focus"]["n"] == 3 and written["focus"] == "math"
