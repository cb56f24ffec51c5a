"""The heat map and the terminal tables of one small run."""

from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from rich.console import Console

from mdrl_jax.report import heatmap, terminal
from mdrl_jax.report import matrix as mx

DOMAINS = ("code", "math", "qa", "cw")
ROWS = ("base", "code", "math", "qa", "cw", "refresh-math", "rollback-math-qa", "placebo-cw")


def small(stages: tuple[str, ...] = ROWS, style: float = 0.0, prompts: int = 8) -> mx.Matrix:
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i, stage in enumerate(stages):
        rewards = {d: rng.random((prompts, 2)) for d in DOMAINS}
        accuracy = {d: np.minimum(1.0, x + style) for d, x in rewards.items()}
        records.append({"stage": stage, "index": i, "rewards": rewards, "accuracy": accuracy})
    return mx.build(records)


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(renderable, highlight=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("stages", [ROWS, ("base",)])
def test_heat_map_is_a_png_of_the_expected_size(tmp_path: Path, stages: tuple[str, ...]) -> None:
    m = small(stages)
    heatmap.save_matrix(tmp_path / "report/scores.png", m)
    with Image.open(tmp_path / "report/scores.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", heatmap.size_pixels(m))
        # More than a plain surface: colours of the map and both text colours.
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_heat_map_draws_the_scores_and_frames() -> None:
    a, b = small(), small()
    assert heatmap.png(a) == heatmap.png(b)
    b.stderr_SD[2, 1] = 12.3
    assert heatmap.png(a) != heatmap.png(b)
    pixels = np.asarray(Image.open(BytesIO(heatmap.png(a))).convert("RGB")).reshape(-1, 3)
    low, high = a.score_SD.min(), a.score_SD.max()
    for score in a.score_SD.ravel():
        colour = colormaps[heatmap.COLOURS]((score - low) / (high - low), bytes=True)[:3]
        assert (pixels == colour).all(axis=1).sum() > 500
    rows = [(ROWS[s], DOMAINS[d]) for s, d in heatmap.framed_cells(a)]
    assert rows == [(d, d) for d in DOMAINS] + [("refresh-math", "math")]


def test_cell_text() -> None:
    assert heatmap.cell_text(66.49, 1.23) == "66.5 ± 1.2"
    assert heatmap.cell_text(np.nan, np.nan) == "–"
    assert heatmap.cell_text(50.0, np.inf) == "50.0"


def test_text_on_every_colour_of_the_map_meets_wcag_aa() -> None:
    for x in np.linspace(0, 1, 256):
        colour = tuple(colormaps[heatmap.COLOURS](float(x))[:3])
        paper = heatmap.relative_luminance(colour)
        ink = 0.0 if heatmap.legible_on(colour) == "black" else 1.0
        light, dark = max(paper, ink), min(paper, ink)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_map_gets_brighter_all_the_way() -> None:
    # Then it reads without colour vision, and in print.
    shades = [colormaps[heatmap.COLOURS](float(x))[:3] for x in np.linspace(0, 1, 64)]
    luminance = [heatmap.relative_luminance(s) for s in shades]
    assert (np.diff(luminance) > 0).all()


def test_score_table_shows_every_cell_in_80_columns() -> None:
    m = small()
    text = shown(terminal.score_table(m))
    for s, d in np.ndindex(m.score_SD.shape):
        assert f"{m.score_SD[s, d]:.1f} ±{m.stderr_SD[s, d]:.1f}" in text
    assert all(stage in text for stage in ROWS) and "…" not in text
    assert text.count("*") == 5 and "regardless" not in text


def test_accuracy_is_a_second_block_where_style_matters() -> None:
    m = small(style=0.1)
    _, _, block = shown(terminal.score_table(m)).partition("accuracy regardless of style")
    for s, d in np.ndindex(m.score_SD.shape):
        assert f"{m.accuracy_SD[s, d]:.1f} ±{m.accuracy_stderr_SD[s, d]:.1f}" in block


def test_summary_shows_transfer_and_recovery_with_reasons() -> None:
    text = shown(terminal.summary(small()), width=120)
    for label in ("BWT", "FWT", "forgetting of code", "refresh-math: fraction", "collateral"):
        assert label in text
    assert "undefined" in text  # random rewards lose nothing that could be told from 0
    alone = shown(terminal.summary(small(("base", "code"))))
    assert "needs two training stages" in alone and "recovery" not in alone


def test_one_prompt_shows_no_error_and_no_infinity() -> None:
    m = small(("base", "code", "math"), prompts=1)
    assert "inf" not in shown(terminal.summary(m)) and "nan" not in shown(terminal.summary(m))
    heatmap.png(m)


def test_a_missing_cell_is_a_dash() -> None:
    records = [{"stage": "base", "index": 0, "rewards": {"code": [[1.0], [0.0]]}}]
    records.append({"stage": "code", "index": 1, "rewards": {"math": [[1.0], [0.0]]}})
    m = mx.build(records)
    text = shown(terminal.score_table(m))
    assert "–" in text and "nan" not in text
    heatmap.png(m)
