"""`distill` on Hugging Face folders: what it writes, and one line for every wrong call."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mdrl_jax.commands import distill, loaded
from mdrl_jax.config import EMBEDDED_MODEL, default
from mdrl_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compile")


def settings() -> Any:
    c = default()
    c.scored_domains, c.train.steps, c.train.prompts_per_step, c.train.group_size = ("math", "qa"), 1, 8, 2
    c.train.learning_rate, c.recover.limit = 3e-4, 100.0
    c.domains.n_test, c.domains.n_validation, c.evaluate.batch = 4, 4, 8
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.rewards.workers, c.mesh.data = 1, 8
    return c


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """The embedded model with noise on its weights."""
    folder, rng = tmp_path / "teacher", np.random.default_rng(0)
    shutil.copytree(EMBEDDED_MODEL, folder)
    (file,) = folder.glob("*.safetensors")
    noisy = {k: x + 0.02 * x.std() * rng.normal(size=x.shape).astype(x.dtype) for k, x in load_file(file).items()}
    save_file(noisy, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.slow  # the stage itself is tested in tests/stages/test_recovery_stages.py
def test_the_best_step_is_written_with_its_record(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    distill.run("tiny", [f"math:{teacher}"], settings(), str(out))
    assert (out / "tokenizer_config.json").exists() and (out / "config.json").exists()
    record = json.loads((tmp_path / "out-run/recovery/distill-math.json").read_text())
    assert [row["step"] for row in record["steps"]] == [0, 1] and record["stage"] == "distill-math"
    assert record["steps"][0]["distance"] > record["steps"][1]["path"] > 0  # the peak is the teacher's folder
    (file,), (before,) = out.glob("*.safetensors"), EMBEDDED_MODEL.glob("*.safetensors")
    moved = [np.abs(x - np.asarray(load_file(before)[k], x.dtype)).max() for k, x in load_file(file).items()]
    assert (max(moved) > 0) == (record["chosen"] == 1)
    assert "validation scores from step 0" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="has other teachers"):
        distill.run("tiny", ["math:tiny"], settings(), str(tmp_path / "other"), str(tmp_path / "out-run"))


def test_the_student_may_be_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run is built of the base and the adapter, which are read as the merged model; nothing trains here."""
    folder, found = tmp_path / "adapter", []
    folder.mkdir()
    (name,) = (
        n for n in load_file(EMBEDDED_MODEL / "model.safetensors") if n.endswith("layers.0.self_attn.q_proj.weight")
    )
    rows, width = load_file(EMBEDDED_MODEL / "model.safetensors")[name].shape
    a, b = np.ones((1, width), np.float32), np.ones((rows, 1), np.float32)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 0.25}))

    class Begun(Exception):
        pass

    def begin(config: Any, pool: Any) -> Any:
        found.append(config.model)
        raise Begun

    monkeypatch.setattr(distill.runtime, "build", begin)
    with pytest.raises(Begun):
        distill.run(str(folder), ["math:tiny"], settings(), str(tmp_path / "out"), base=str(EMBEDDED_MODEL))
    assert (found[0].path, found[0].adapter) == (str(EMBEDDED_MODEL), str(folder))
    ours, base = (loaded.load_folder(path, b).params for path, b in ((found[0].adapter, found[0].path), ("tiny", None)))
    moved = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(base), strict=True)]
    assert max(moved) == pytest.approx(0.25, abs=1e-6) and sum(m > 0 for m in moved) == 1


@pytest.mark.parametrize(
    ("teachers", "changes", "told"),
    [
        ([], {}, "--teacher is missing"),
        (["math"], {}, "--teacher=math is not understood; it must be DOMAIN:FOLDER"),
        (["math:tiny", "math:tiny"], {}, "names math twice"),
        (["code:tiny"], {}, "code, which is not in the config's scored_domains: math, qa"),
        (["math:nowhere"], {}, "nowhere"),
        (["math:tiny"], {"distill": {"teacher": "base"}}, "distill.teacher='base' has no meaning here"),
        (["math:tiny"], {"distill": {"form": "ful"}}, "sampled, top_k, full, fixed"),
    ],
)
def test_a_wrong_call_is_one_line(teachers: list[str], changes: dict, told: str, tmp_path: Path):
    c = settings()
    c.stage_overrides = {"distill-math": changes}
    with pytest.raises(UserError, match=told) as caught:
        distill.run("tiny", teachers, c, str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
