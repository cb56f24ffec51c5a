"""Curves for a tracking service: one run however often it is resumed, steps of each stage on their own."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.report import track


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls of a module that stands for `wandb`."""
    made: list[tuple[str, Any]] = []

    def noted(name: str):
        return lambda *args, **kwargs: made.append((name, args or kwargs))

    run = types.SimpleNamespace(**{name: noted(name) for name in ("log", "define_metric", "finish")})

    def init(**kwargs: Any) -> Any:
        made.append(("init", kwargs))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return made


def test_a_resumed_run_continues_its_curves(calls: list[tuple[str, Any]], tmp_path: Path):
    for step in (1, 2):
        with track.tracking("wandb", tmp_path / "run", {"seed": 3}) as curves:
            curves.scalars("01-math", step, {"train/loss": 0.5})
    starts = [fields for name, fields in calls if name == "init"]
    assert [s["name"] for s in starts] == ["run", "run"] and starts[0]["id"] == starts[1]["id"]
    assert starts[0]["config"] == {"seed": 3} and starts[0]["resume"] == "allow"
    logged = [args[0] for name, args in calls if name == "log"]
    assert logged == [{"01-math/step": s, "01-math/train/loss": 0.5} for s in (1, 2)]
    assert [name for name, _ in calls].count("finish") == 2


def test_nothing_is_sent_by_default(calls: list[tuple[str, Any]], tmp_path: Path):
    assert parse(default()).track == ""
    with track.tracking("", tmp_path, {}) as curves:
        curves.scalars("scores", 0, {"score/math": 1.0})
    assert not calls and not list(tmp_path.iterdir())


def test_a_service_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'mdrl-jax\[wandb\]'"), track.tracking("wandb", tmp_path, {}):
        pass
    c = default()
    c.track = "mlflow"
    with pytest.raises(UserError, match="track='mlflow' is not known; known: '', wandb"):
        parse(c)
