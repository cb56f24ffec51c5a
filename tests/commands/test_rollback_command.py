"""`rollback` on Hugging Face folders edited by torch: exact at its ends, and one line for every wrong call."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mdrl_jax import runtime
from mdrl_jax.commands import rollback
from mdrl_jax.config import EMBEDDED_MODEL, default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, then keep, before and after, each an edit of the one before it; model = after with one more edit."""
    torch = pytest.importorskip("torch", reason="the folders are edited by torch")
    transformers = pytest.importorskip("transformers")
    source, root = shared / "models" / "tinystories-656k", tmp_path_factory.mktemp("folders")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    made = {}
    torch.manual_seed(0)
    for name in ("base", "keep", "before", "after", "model"):
        oracle.save_pretrained(root / name)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(root / name)
        made[name] = root / name
        with torch.no_grad():
            for p in oracle.parameters():
                p += 0.01 * p.std() * torch.randn_like(p) * (torch.rand_like(p) < 0.5)
    return made


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def call(folders: dict[str, Path], out: Path, **changes) -> dict[str, np.ndarray]:
    """The written weights."""
    places = {name: str(folders[name]) for name in ("model", "before", "after", "keep")}
    rollback.run(**(places | {"out": str(out)} | changes))
    return weights(out)


def joined(x: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    return np.concatenate([np.asarray(x[name], np.float32).reshape(-1) for name in names])


def test_all_of_the_edit_at_full_strength_is_model_minus_edit(folders: dict[str, Path], tmp_path: Path):
    model, before, after = (weights(folders[n]) for n in ("model", "before", "after"))
    found = call(folders, tmp_path / "out", fraction=1.0, strength=1.0)
    assert set(found) <= set(model)
    for name, x in found.items():
        np.testing.assert_array_equal(x, model[name] - (after[name] - before[name]))


def test_the_folder_loads_in_torch_with_its_tokenizer_and_config(folders: dict[str, Path], tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found = call(folders, tmp_path / "out", fraction=0.01)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = loaded.state_dict()
    for name, x in found.items():
        np.testing.assert_array_equal(state[name].numpy(), x)
    text = "Once upon a time"
    tokens = [
        transformers.AutoTokenizer.from_pretrained(f)(text).input_ids for f in (tmp_path / "out", folders["model"])
    ]
    assert tokens[0] == tokens[1]
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", folders["model"])]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_number_format_stays(folders: dict[str, Path], tmp_path: Path, dtype):
    source = tmp_path / "model"
    shutil.copytree(folders["model"], source)
    cast = {name: x.astype(dtype) for name, x in weights(source).items()}
    save_file(cast, source / "model.safetensors", metadata={"format": "pt"})
    found = call(folders | {"model": source}, tmp_path / "out", fraction=1e-9)  # a single coordinate
    assert {x.dtype for x in found.values()} == {np.dtype(dtype)}
    assert sum(int(np.any(x != cast[name])) for name, x in found.items()) <= 1


def test_rules_choose_their_coordinates(folders: dict[str, Path], tmp_path: Path):
    """The share asked for, by numpy, at half strength; nothing else changes."""
    names = sorted(call(folders, tmp_path / "names"))
    theta, before, after, keep, base = (
        joined(weights(folders[n]), names).astype(np.float64) for n in ("model", "before", "after", "keep", "base")
    )
    edit = after - before
    scores = {
        "magnitude": abs(edit),
        "displacement": edit * (theta - keep) - 0.5 * edit**2,
        "opposition": -(keep - base) * edit,
    }
    n = round(0.01 * edit.size)
    for rule, score in scores.items():
        asked = {"rule": rule, "fraction": 0.01, "strength": 0.5, "base": str(folders["base"])}
        found = joined(call(folders, tmp_path / rule, **asked), names)
        changed = found != theta.astype(np.float32)
        expected = theta - 0.5 * edit * changed
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert 0.98 * n <= changed.sum() <= n
        # Rounding of the edit leaves a few at the threshold in doubt.
        top = np.sort(score)[-n]
        assert (score[changed] > 0.99 * top).all() and changed[score > 1.01 * top].mean() > 0.98
    assert (joined(weights(tmp_path / "names"), names) != theta.astype(np.float32)).mean() == pytest.approx(
        1e-3, rel=0.02
    )


@pytest.mark.slow  # 20 s; test_recovery_stages.py runs a rollback whose rule takes gradients
def test_rules_with_data_take_gradients_of_the_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """On the embedded model, which knows the domains; gradients on one device, everything else on eight."""
    monkeypatch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    folders = {"keep": EMBEDDED_MODEL, "before": EMBEDDED_MODEL}
    rng = np.random.default_rng(0)
    edited = {n: x + 0.05 * x.std() * rng.normal(size=x.shape) for n, x in weights(EMBEDDED_MODEL).items()}
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "after")
    save_file({n: x.astype(np.float32) for n, x in edited.items()}, tmp_path / "after" / "model.safetensors")
    folders["after"] = folders["model"] = tmp_path / "after"
    c = default()
    c.scored_domains = ("math", "qa")
    c.stages = ("math",)
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (16,)
    c.mesh.data = c.rewards.workers = 1
    c.evaluate.batch = 8
    c.analyze.update({"prompts": 16, "group_size": 4, "batch": 4, "path_prompts": 4})
    found = call(folders, tmp_path / "out", rule="removing", fraction=0.01, config=parse(c), domain="math")
    model, names = weights(folders["model"]), sorted(found)
    changed = joined(found, names) != joined(model, names)
    assert changed.mean() == pytest.approx(0.01, rel=0.02)
    assert "coordinates (rule: removing) at strength 1" in capsys.readouterr().out


WRONG = {
    "fraction": ({"fraction": 0.0}, r"--fraction=0.0 is not valid"),
    "percent": ({"fraction": 3.0}, r"--fraction=3.0 is not valid"),
    "strength": ({"strength": -1.0}, r"--strength=-1.0 is not valid"),
    "no strength": ({"strength": 0.0}, r"--strength=0.0 is not valid; it must be from 1.2e-38"),
    "beyond float32": ({"strength": 1e39}, r"--strength=1e\+39 is not valid; it must be from 1.2e-38"),
    "below float32": ({"strength": 1e-60}, r"--strength=1e-60 is not valid"),
    "infinite": ({"strength": float("inf")}, r"--strength=inf is not valid"),
    "rule": ({"rule": "best"}, r"--rule=best is not known; known: adding, removing"),
    "no base": ({"rule": "opposition"}, r"--rule=opposition needs --base"),
    "no data": ({"rule": "removing"}, r"--rule=removing needs --config and --domain"),
    "domain": ({"rule": "removing", "config": parse(default()), "domain": "law"}, r"--domain=law is not in the config"),
    "split": (
        {"rule": "adding", "config": parse({"stages": ("qa",), "analyze": {"split": "test"}}), "domain": "qa"},
        r"analyze.split='test' must be 'train' with --rule=adding",
    ),
    "absent": ({"keep": "nowhere"}, r"model folder nowhere does not exist"),
    "other": ({"keep": "tiny"}, r"the model in tiny \(--keep\) has a different config.json"),
    "nothing": ({"after": "BEFORE"}, r"rule displacement finds nothing to take back"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_one_line(folders: dict[str, Path], tmp_path: Path, case: str):
    changes, message = WRONG[case]
    changes = {k: str(folders["before"]) if v == "BEFORE" else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message) as e:
        call(folders, tmp_path / "out", **changes)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_result_that_is_not_finite_writes_nothing(folders: dict[str, Path], tmp_path: Path):
    """Finite weights whose difference overflows in the number format of the model."""
    huge = {}
    for name, factor in (("before", 3e38), ("after", -3e38)):
        huge[name] = Path(shutil.copytree(folders[name], tmp_path / name))
        tensors = weights(huge[name])
        tensors["model.norm.weight"][:] = factor
        save_file(tensors, huge[name] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight has numbers that are NaN or, as float32, infinite"):
        call(folders | huge, tmp_path / "out", fraction=1.0)
    assert {p.name for p in tmp_path.iterdir()} == {"before", "after"}


def test_an_out_folder_with_something_in_it_is_refused(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "note").write_text("mine")
    for out in (tmp_path, tmp_path / "note"):
        with pytest.raises(UserError, match="exists and is not empty|is a file"):
            call(folders, out)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
