"""`configs/smollm2_135m.py` in two steps: a small random model with a chat template, on the real data."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import smollm2_135m
from mdrl_jax import experiment, runtime
from mdrl_jax.config import parse
from mdrl_jax.parallel.sharding import make_mesh
from tests.odd_pool import OddPool

pytestmark = pytest.mark.usefixtures("fast_compile")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end_story|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def small(shared: Path, folder: Path) -> Path:
    """The shape of SmolLM2 scaled down, with a real tokenizer of 2,048 entries and a chat template; without weights."""
    folder.mkdir()
    real = shared / "models" / "tinystories-656k"
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(json.loads((real / "config.json").read_text()) | sizes | heads))
    shutil.copy(real / "tokenizer.json", folder)
    settings = json.loads((real / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_sequence_runs_on_real_data(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    monkeypatch.setattr(runtime, "make_pool", lambda section: OddPool())
    monkeypatch.setattr("mdrl_jax.report.page.write", lambda root: None)
    monkeypatch.setattr("mdrl_jax.report.tensorboard.save_figures", lambda root: None)
    c: Any = smollm2_135m.get_config(str(shared / "data"))
    assert parse(c).stages[:2] == ("sft", "code") and parse(c).model.path.startswith("hub:HuggingFaceTB/SmolLM2")
    c.stages, c.stage_overrides = ("sft", "code"), {}
    c.model.path, c.model.weights = str(small(shared, tmp_path / "model")), "random"
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (256,), (8,)
    c.domains.n_train, c.domains.n_validation, c.domains.n_test = 16, 4, 8
    c.evaluate.batch, c.evaluate.samples = 8, 2
    c.sft.steps = c.train.steps = 2
    c.sft.batch_size, c.sft.grad_accum_steps, c.sft.length = 6, 1, 264
    c.train.prompts_per_step, c.train.group_size, c.train.grad_accum_steps = 8, 2, 1
    experiment.run(parse(c), tmp_path / "run", "quiet")

    def read(name: str) -> Any:
        return json.loads((tmp_path / "run" / f"{name}.json").read_text())

    starts = [read(f"evaluations/{name}")["start"] for name in ("00-base", "01-sft", "02-code")]
    assert starts == [None, "base", "sft"]
    data = read("data")
    shown = {d: r["demonstrations"]["sft"]["prompts"] for d, r in data.items() if "demonstrations" in r}
    assert shown == {"code": 16, "math": 16, "qa": 16}  # IFEval has no demonstrations
    sft, code = (read(f"costs/{name}") for name in ("01-sft", "02-code"))
    assert (sft["kind"], sft["steps"], sft["tokens_sampled"]) == ("sft", 2, 0) and code["tokens_sampled"] > 0
    assert sft["tokens_trained"] > 0 and sft["flops"] / sft["tokens_trained"] == pytest.approx(
        code["flops"] / (code["tokens_trained"] + (code["tokens_read"] + code["tokens_sampled"]) / 3)
    )  # one price of a token for both kinds of stages
    changes = read("transitions")
    assert changes["right"] == {"code": 1.0, "math": 1.0, "qa": 0.5, "cw": 1.0} and len(changes["transitions"]) == 12
    lost = next(t for t in changes["transitions"] if (t["domain"], t["before"], t["after"]) == ("qa", "sft", "code"))
    before, after = (np.asarray(read(f"evaluations/{n}")["rewards"]["qa"]) >= 0.5 for n in ("01-sft", "02-code"))
    assert lost["lost"]["estimate"] == pytest.approx(100 * (before & ~after).mean())
    log = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "code: 16 of 16 training prompts have a demonstration of at most 264 tokens; left out 0 too long" in log
    assert "groups in " in log and "pass@2" in log
