"""The contraction theorem on quadratic losses: gradient descent, simulated, against the factor and the verdicts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdrl_jax.analysis.subspace.theorem import assumptions
from mdrl_jax.recovery.refresh.contraction import Basis, contraction
from mdrl_jax.report.figures.recovery import refreshed
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.tables.theorem import FAILS, HOLDS, OPEN, PLAIN, SHARE, Check, checks
from tests.analysis.subspace.test_theorem import N, judged, orthonormal, quiet

Array = np.ndarray
BASIS = orthonormal(np.random.default_rng(0), 3)
OUT = np.eye(N)[-1]  # a direction outside S
START = 2.0 * BASIS[2] + 3.0 * OUT  # e₀, along the eigenvector of μ


@dataclasses.dataclass(frozen=True)
class World:
    """The loss g·e + ½eᵀHe with e = θ − θ*, of which all prompts are alike but for `noise`, and a refresh.

    Attributes:
      values: eigenvalues of H on S; H is 1 outside S.
      slope: g along the last vector of S.
      leak: the entry of H between that vector and `OUT`.
      noise: the spread over blocks of the Hessian's part in S.
      alpha: the learning rate.
      optimizer: its name in the report.
    """

    values: tuple[float, ...] = (4.0, 2.0, 0.5)
    slope: float = 0.0
    leak: float = 0.0
    noise: float = 0.0
    alpha: float = 0.2
    optimizer: str = PLAIN

    @property
    def hessian(self) -> Array:
        outside = np.eye(N) - BASIS.T @ BASIS
        coupled = self.leak * (np.outer(BASIS[2], OUT) + np.outer(OUT, BASIS[2]))
        return BASIS.T @ np.diag(self.values) @ BASIS + outside + coupled

    def theorem(self, within: float = 2.0) -> dict[str, Any]:
        """The record of the analysis, whose displacement has the norm `within` in S."""
        rng = np.random.default_rng(1)
        free = self.noise * rng.normal(size=(6, 3, 3))
        h = self.hessian + BASIS.T @ (free + free.transpose(0, 2, 1)) @ BASIS
        g = np.tile(self.slope * BASIS[2], (6, 1))
        half = assumptions(judged(BASIS, h, g, np.ones(6)), "nats", within, quiet)
        return half | {"norms": {"within": within, "outside": 3.0}}

    def refresh(self, start: Array = START, steps: int = 4) -> dict[str, Any]:
        """The record of gradient descent from e₀ = `start`."""
        rows, e = [], start
        for step in range(steps + 1):
            inside, whole = BASIS @ e, float(np.linalg.norm(e))
            within = float(np.linalg.norm(inside))
            rest = float(np.sqrt(max(whole**2 - within**2, 0)))
            norms = {"within": within, "route": rest, "outside": rest, "random": [], "coordinates": inside.tolist()}
            rows.append({"step": step, "subspaces": [norms]})
            e = e - self.alpha * (self.hessian @ e + self.slope * BASIS[2])
        empty = np.zeros((1, 1))
        basis = Basis("success_nll", 0, "qa", None, np.abs(self.values), empty, empty)
        made = contraction(rows, [basis], self.alpha)
        return {"stage": "refresh-math", "domain": "math", "steps": rows, "contraction": made}

    def check(self, start: Array = START, within: float = 2.0) -> Check:
        pair = {
            "domain": "math",
            "stage": "qa",
            "objective": "success_nll",
            "theorem": {"halves": [self.theorem(within)]},
        }
        (found,) = checks(self.refresh(start), [pair], self.optimizer)
        return found


def verdicts(check: Check) -> list[str]:
    return [a.verdict for a in check.assumptions]


def first_step(world: World, start: Array = START) -> float:
    rows = world.refresh(start)["steps"]
    return rows[1]["subspaces"][0]["within"] / rows[0]["subspaces"][0]["within"]


def test_where_the_theorem_holds_its_factor_is_that_of_gradient_descent():
    check = World().check()
    assert verdicts(check) == [HOLDS] * 5
    assert check.factor.value == pytest.approx(1 - 0.2 * 0.5, rel=1e-6)
    assert [check.factor.low, check.factor.high] == pytest.approx([0.9, 0.9], rel=1e-6)
    assert check.bound.value == pytest.approx(0.9, rel=1e-5)
    assert check.measured["estimate"] == pytest.approx(check.factor.value, rel=1e-6)
    assert check.measured["ci95"] == pytest.approx([0.9, 0.9], rel=1e-6)
    assert "So the theorem applies." in check.summary() and check.summary().startswith("Holds: plain gradient descent")
    # From elsewhere the norm shrinks faster, and the factor is a bound.
    across = World().check(BASIS.sum(axis=0) + OUT)
    assert across.measured["estimate"] < across.factor.low - 0.05
    assert World(values=(4.0, 2.5, 2.4)).check(BASIS[0] + OUT).summary().endswith("factor is below the bound.")


@pytest.mark.parametrize(
    ("world", "fails"),
    [
        (World(optimizer="AdamW"), 0),
        (World(slope=-0.4), 1),
        (World(leak=0.3), 2),
        (World(values=(4.0, 2.0, -0.5)), 3),
        (World(alpha=0.3), 4),
    ],
)
def test_an_assumption_that_does_not_hold_is_found(world: World, fails: int):
    check = world.check()
    found = verdicts(check)
    assert found[fails] == FAILS and check.assumptions[fails].name in check.summary().split("oes not hold: ")[1]
    others = [v for i, v in enumerate(found) if i != fails]
    if fails == 0:  # AdamW has no single α
        assert others == [HOLDS, HOLDS, HOLDS, OPEN] and "AdamW" in check.assumptions[0].text
    else:
        assert others == [HOLDS] * 4
    assert "the theorem does not apply" in check.summary()


@pytest.mark.parametrize("world", [World(slope=-0.4), World(leak=-0.3), World(slope=-0.2, leak=-0.2)])
def test_the_bound_with_what_is_left_is_reached_by_the_first_step(world: World):
    """Here the gradient and the leak push straight away from θ*."""
    check = world.check()
    added = world.alpha * (abs(world.leak) * 3 + abs(world.slope)) / 2
    assert check.bound.value == pytest.approx(check.factor.value + added, rel=1e-5)
    assert first_step(world) == pytest.approx(check.bound.value, rel=1e-5)
    assert first_step(world) > check.factor.value + 0.03


def test_small_violations_are_allowed_and_shares_are_of_the_contraction():
    check = World(slope=0.05, leak=0.02).check()
    assert verdicts(check) == [HOLDS] * 5
    gradient, leak = check.assumptions[1:3]
    assert gradient.more[SHARE].value == pytest.approx(0.05 / (0.5 * 2))
    assert leak.more[SHARE].value == pytest.approx(0.02 * 3 / (0.5 * 2), rel=1e-4)
    assert leak.more["in units of |μ|"].value == pytest.approx(0.02 / 0.5, rel=1e-4)
    assert verdicts(World(leak=0.05).check())[2] == FAILS  # 0.15 of the contraction


def test_the_minimum_in_s_is_measured_from_where_the_refresh_starts():
    """The analysis had a displacement of 5 in S, and the refresh one of 2."""
    check = World(slope=0.1).check(within=5.0)
    (name,) = [x for x in check.assumptions[1].more if x.startswith("distance")]
    assert check.assumptions[1].more[name].value == pytest.approx(0.1 / 0.5 / 2)


def test_an_interval_on_both_sides_is_undecided():
    check = World(noise=1.0).check()
    mu = check.assumptions[3]
    assert mu.figure.low < 0 < mu.figure.high and mu.verdict == OPEN
    assert check.assumptions[1].verdict == HOLDS  # it is exactly 0
    assert check.bound.low < check.factor.value < check.bound.high
    assert "ndecided: " in check.summary() and "whether the theorem applies is undecided" in check.summary()


@pytest.mark.parametrize(
    ("name", "ends", "index"),
    [("gradient", [0.01, 0.2], 1), ("epsilon", [0.01, 0.2], 2), ("mu", [-0.1, 0.9], 3), ("lambda_max", [3.0, 6.0], 4)],
)
def test_the_ends_of_the_interval_decide_and_not_the_estimate(name: str, ends: list[float], index: int):
    """Every estimate is that of the world in which the theorem holds."""
    half = World().theorem()
    half[name]["ci95"] = ends
    pair = {"domain": "math", "stage": "qa", "objective": "success_nll", "theorem": {"halves": [half]}}
    (check,) = checks(World().refresh(), [pair], PLAIN)
    also = [2] if name == "mu" else []  # rounding makes ε 5e-8, which is no small share of a μ that may be 0
    assert verdicts(check) == [OPEN if i in (index, *also) else HOLDS for i in range(5)]


def test_a_half_that_was_not_measured_is_undecided_with_its_reason():
    theorem = {"halves": [{"k": 3, "reason": "2 blocks of the other half have something to measure on"}]}
    pair = {"domain": "math", "stage": "qa", "objective": "success_nll", "theorem": theorem}
    (check,) = checks(World().refresh(), [pair], PLAIN)
    assert verdicts(check) == [HOLDS] + [OPEN] * 4 and check.factor is None
    assert check.assumptions[3].text.startswith("2 blocks") and "cannot be compared" in check.summary()
    assert checks(World().refresh(), [pair | {"domain": "code"}], PLAIN) == []
    assert checks(World().refresh(OUT), [pair], PLAIN) == []  # e₀ has no part in S
    del pair["theorem"]
    assert checks(World().refresh(), [pair], PLAIN) == []


def folder(tmp_path: Path, overrides: Any = None, **pair: Any) -> Records:
    (tmp_path / "recovery").mkdir()
    (tmp_path / "analysis").mkdir()
    (tmp_path / "recovery" / "refresh-math.json").write_text(json.dumps(World(slope=-0.4).refresh()))
    head = {"domain": "math", "stage": "qa", "objective": "success_nll"}
    (tmp_path / "analysis" / "subspace.json").write_text(json.dumps({"pairs": [head | pair]}))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"stage_overrides": overrides or {}}}))
    return Records(tmp_path)


def test_the_page_has_a_table_for_each_s(tmp_path: Path):
    (table,) = refreshed.theorem(folder(tmp_path, theorem={"halves": [World(slope=-0.4).theorem()]}))
    assert table.name == "refresh-math-theorem-qa-success_nll-1" and len(table.rows) == 8
    shown = {row[0]: row for row in table.rows}
    assert (
        shown["plain gradient descent on L"][1].startswith("AdamW") and shown["plain gradient descent on L"][3] == FAILS
    )
    assert shown["no gradient in S"][1].startswith("0.4 [0.4, 0.4]; share of |μ|‖P_S e₀‖: 0.4 [0.4, 0.4]")
    assert shown["μ > 0"][1:] == ("0.5 [0.5, 0.5]", "above 0", HOLDS)
    assert shown["factor of the theorem, 1 − αμ"][1] == "1 − 0.1 [1 − 0.1, 1 − 0.1]"
    assert shown["measured factor a step"][1].startswith("0.94")
    assert "oes not hold: plain gradient descent on L, no gradient in S" in table.caption


def test_the_optimizer_is_that_of_the_refresh(tmp_path: Path):
    overrides = {"refresh-math": {"optimizer": {"name": "sgd"}}}
    (table,) = refreshed.theorem(folder(tmp_path, overrides, theorem={"halves": [World(slope=-0.4).theorem()]}))
    assert table.rows[0][1].startswith("clipped gradient descent")


def test_a_folder_without_the_records_says_what_is_missing(tmp_path: Path):
    with pytest.raises(Absent, match=r"recovery/refresh-\*.json"):
        refreshed.theorem(Records(tmp_path))
    with pytest.raises(Absent, match=r"refresh-math: .*analyze\.theorem=True"):
        refreshed.theorem(folder(tmp_path))
    (tmp_path / "analysis" / "subspace.json").unlink()
    with pytest.raises(Absent, match="subspace"):
        refreshed.theorem(Records(tmp_path))
