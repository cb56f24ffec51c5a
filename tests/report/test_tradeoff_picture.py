"""The picture of a rollback's sweep shows every point, every control and the limit, also where nothing was chosen."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from mdrl_jax.report import tradeoff


def point(gain: float, loss: float, rule: str = "removing", place: str = "all"):
    figures = {"gain": gain, "loss": loss}
    return {"rule": rule, "place": place} | {
        name: {"estimate": x, "ci95": [x - 1, x + 1]} for name, x in figures.items()
    }


RECORD = {
    "stage": "rollback-math-qa",
    "domain": "math",
    "donor": "qa",
    "limit": 2.0,
    "points": [point(5, 1), point(9, 4), point(3, 0, "adding", "route")],
    "curves": {"random": [point(2, 3), point(0, 0)], "whole": [point(20, 30)]},
    "chosen": point(5, 1),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    """The points of every line that was drawn, by label."""
    lines: dict[str, np.ndarray] = {}
    plot = Axes.plot

    def noted(axes: Axes, *args, **kwargs):
        made = plot(axes, *args, **kwargs)
        lines[str(kwargs.get("label"))] = np.stack(made[0].get_data(), axis=1)
        return made

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


def test_every_point_and_control_is_drawn_where_it_is(drawn: dict[str, np.ndarray], tmp_path: Path):
    tradeoff.save_tradeoff(tmp_path / "picture.png", RECORD)
    np.testing.assert_array_equal(drawn["removing, all coordinates"], [[1, 5], [4, 9]])
    np.testing.assert_array_equal(drawn["adding, shared route"], [[0, 3]])
    np.testing.assert_array_equal(drawn["control: random"], [[0, 0], [3, 2]])
    np.testing.assert_array_equal(drawn["control: whole"], [[30, 20]])
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width > image.height > 500


def test_a_sweep_that_chose_nothing_is_drawn_too(tmp_path: Path):
    tradeoff.save_tradeoff(tmp_path / "picture.png", RECORD | {"chosen": None, "curves": {}})
    assert (tmp_path / "picture.png").stat().st_size > 10_000
