"""Predicted against measured damage over seeds: what the table says, and that the picture is one."""

import json
from pathlib import Path

import numpy as np
import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.report import agreement, findings
from mdrl_jax.report.console import Screen

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
    assert "1 segments, 12 pairs" in one and "Spearman 1.00" in one
    # Half of 0.1 to 0.4 leaves Σ(m/2)² = 0.075 of a spread of 0.05.
    assert "R² -0.50 [-0.50, -0.50]" in one and "R² 1.00" in two
    assert "math after cw: 0.5, 0.5, 0.5" in shown and "code after math: holds, holds, holds" in shown
    assert "C3 claim 3: supported, contradicted, undecided; figure 0.250 [0.250, 0.250] over seeds" in shown


def test_the_picture_is_a_png_of_its_size(folders, tmp_path):
    agreement.save_plot(tmp_path / "plot.png", agreement.load(folders))
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = matplotlib_image.imread(tmp_path / "plot.png")
    assert picture.shape[:2] == (690, 1500) and np.ptp(picture) == 1.0


def test_folders_without_an_analysis(folders, tmp_path):
    assert agreement.load([tmp_path / "none"]) == []
    with pytest.raises(UserError, match=r"none has no claims.json, the other"):
        agreement.load([*folders, tmp_path / "none"])


def test_the_screen_shows_damage_in_points_and_every_verdict(folders, tmp_path):
    content = damage(0, 0.5)
    content["agreement"] = {"reward": {"n": 4, "spearman": figure(1.0), "r_squared": figure(0.5)}}
    with Screen(tmp_path / "log.txt") as screen:
        with screen.steps("analyze", 2) as show:
            show(1, "half")
        screen.print(findings.summary({"damage": content, "claims": claims("supported")}))
    shown = (tmp_path / "log.txt").read_text()
    assert "reward" in shown and " 40 " in shown and "[39, 41]" in shown and "0.4" in shown
    assert shown.count("supported") == 5 and "because" in shown
