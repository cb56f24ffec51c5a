"""The terminal tables of one small run."""

from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mdrl_jax.report.screen import analysis, terminal
from mdrl_jax.report.tables import matrix as mx

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


def test_score_table_shows_every_cell_in_80_columns() -> None:
    m = small()
    text = shown(terminal.score_table(m))
    for s, d in np.ndindex(m.score_SD.shape):
        assert f"{m.score_SD[s, d]:.1f} ±{m.stderr_SD[s, d]:.1f}" in text
    assert all(stage in text for stage in ROWS) and "…" not in text
    assert text.count("*") == 6 and "* trained in that stage" in text and "regardless" not in text
    assert "regardless" not in shown(terminal.score_table(small(style=0.1), accuracy=False))
    model = small(("sft-math",))  # a model's folder
    assert not any(
        "*" in shown(t) for t in (terminal.score_table(model, trained=False), terminal.pass_table(model, False))
    )


@pytest.mark.parametrize("width, mean", [(60, True), (45, False)])
def test_a_narrow_terminal_has_every_score_and_stage(width: int, mean: bool) -> None:
    m = small()
    text = shown(terminal.score_table(m), width)
    for s, d in np.ndindex(m.score_SD.shape):
        assert f"{m.score_SD[s, d]:.1f}" in text
    assert all(stage in text for stage in ROWS) and "…" not in text and "±" not in text
    assert ("mean" in text) == mean and max(map(len, text.splitlines())) <= width
    whole = shown(terminal.summary(m), width)
    assert max(map(len, whole.splitlines())) <= width and (width < 60 or "…" not in whole)
    # Each figure has a line of its own: no name is wrapped.
    for stage in ("refresh-math", "rollback-math-qa") if width == 60 else ():
        assert all(f"{stage}: {name}" in whole for name in ("gain", "fraction", "collateral"))


@pytest.mark.parametrize("width, null, interval", [(80, True, True), (60, False, True), (40, False, False)])
def test_verdicts_and_damage_fit_a_narrow_terminal(width: int, null: bool, interval: bool) -> None:
    null_of_draws = {"mean": 0.0123, "low": -0.0456, "high": 0.0789}
    figure = {"estimate": -0.123, "ci95": [-0.456, -0.012], "null": null_of_draws}
    claims = [figure | {"id": f"C{i}", "verdict": "contradicted"} for i in range(1, 9)]
    text = shown(analysis.verdict_table(claims), width)
    assert text.count("contradicted") == 8 and all(f"C{i} " in text for i in range(1, 9)) and "…" not in text
    assert ("0.0123 [-0.0456, 0.0789]" in text) == null and ("[-0.456, -0.012]" in text) == interval
    keys = ("first", "second", "predicted", "measured", "remainder")
    pair = {"domain": "math", "stage": "cw", "objectives": {"reward": dict.fromkeys(keys, figure)}}
    text = shown(analysis.damage_table([pair]), width)
    assert max(map(len, text.splitlines())) <= width and ("first" in text) == (width == 80)
    assert width < 60 or ("[-45.6, -1.2]" in text and "…" not in text)


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


def test_a_missing_cell_is_a_dash() -> None:
    records = [{"stage": "base", "index": 0, "rewards": {"code": [[1.0], [0.0]]}}]
    records.append({"stage": "code", "index": 1, "rewards": {"math": [[1.0], [0.0]]}})
    m = mx.build(records)
    text = shown(terminal.score_table(m))
    assert "–" in text and "nan" not in text
