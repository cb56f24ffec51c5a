"""The command `evaluate`: what it writes, and the answers that were lost and gained since another model."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mdrl_jax import records, runtime
from mdrl_jax.commands import evaluate
from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.parallel.sharding import make_mesh
from tests.odd_pool import OddPool

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_two_models_are_compared_answer_by_answer(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runtime, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    monkeypatch.setattr(runtime, "make_pool", lambda section: OddPool())
    fields: dict[str, Any] = {
        "scored_domains": ("math",),
        "stages": ("math",),
        "domains": {"n_test": 6, "n_validation": 4},
        "rollout": {"prompt_buckets": (12,), "completion_buckets": (4,)},
        "evaluate": {"batch": 6, "samples": 4},
    }
    config = parse(fields | {"model": {"path": str(small_folder), "weights": "random"}})
    pool: Any = OddPool()
    built = runtime.build(config, pool)
    for name, seed in (("one", 0), ("two", 1)):
        params = huggingface.random_params(built.model, built.mesh, seed)
        huggingface.save(tmp_path / name, params, built.model.config)
        built.tokenizer.save_pretrained(tmp_path / name)
    one, two = (str(tmp_path / f"scores-{name}") for name in ("one", "two"))
    evaluate.run(str(tmp_path / "one"), config, "quiet", out=one)
    assert "right → wrong" not in capsys.readouterr().out
    evaluate.run(str(tmp_path / "two"), config, "quiet", out=two, before=one)
    shown = " ".join(capsys.readouterr().out.split())
    right = [
        np.asarray(records.read_json(Path(folder) / "evaluation.json")["rewards"]["math"]) == 1 for folder in (one, two)
    ]
    lost, gained = 100 * (right[0] & ~right[1]).mean(), 100 * (~right[0] & right[1]).mean()
    assert lost > 0 and "math: before to now" in shown and f"{lost:.1f} [" in shown and f"{gained:.1f} [" in shown
    row = json.loads((Path(two) / "scores.jsonl").read_text())
    assert row["pass_at_k"] == pytest.approx(100 * right[1].any(axis=1).mean()) and row["right_from"] == 1.0
    assert f"{row['pass_at_k']:.1f} ±" in shown and "pass@4, points" in shown
    kept = records.read_zipped(Path(two) / "completions.jsonl.gz")
    assert [r["prompt"] for r in kept] == list(range(6)) and {len(r["completions"]) for r in kept} == {4}
    assert [r["text"] for r in kept] == [p.prompt for p in built.prompts["math", "test"].problems]
    for change, what in (
        ({"seed": 1}, "seed=0, now 1"),
        ({"domains": {"n_test": 5, "n_validation": 4}}, "other prompts"),
    ):
        with pytest.raises(UserError, match=f"--before=.* has an evaluation with {what}; transitions need the same"):
            evaluate.run(str(tmp_path / "one"), parse(fields | change), "quiet", before=one)
    with pytest.raises(UserError, match="has no evaluation.json; it takes a folder that"):
        evaluate.run(str(tmp_path / "one"), config, "quiet", before=str(tmp_path / "nowhere"))
