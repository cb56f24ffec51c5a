"""Set-up and fixtures of all tests.

JAX gets eight CPU devices, so that shardings can be tested on any machine, and refuses implicit rank promotion. Both
are set before any test module imports the package. So are flags that let XLA compile small programs in less than half
the time; the runs that tests start inherit them. GPUs and a JAX_ENABLE_X64 of the user's shell are not seen.
"""

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch, the oracle of some tests, stays on the CPU, too
os.environ.pop("JAX_ENABLE_X64", None)  # tests that need float64 turn it on themselves
# Most of the tests' time goes into compilation. The older emitters compile the tests' programs in 40 % of the time, and
# one part per program is enough for small ones. XLA ends the process if it does not know a flag, so another process
# tries them first.
FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "MDRL_TESTS_XLA" not in os.environ:
    os.environ["MDRL_TESTS_XLA"] = flags = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()
    tried = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(tried, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = flags

import jax  # noqa: E402  (imported after the platform is chosen)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from mdrl_jax.config import EMBEDDED_MODEL  # noqa: E402
from mdrl_jax.domains import vocabulary  # noqa: E402
from mdrl_jax.model import huggingface  # noqa: E402
from mdrl_jax.model.families import FAMILIES, ModelConfig, RopeScaling  # noqa: E402
from mdrl_jax.model.transformer import Decoder  # noqa: E402
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh  # noqa: E402
from tests import compiled  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Keeps xdist from sorting the files by their number of tests (`pytest_collection_modifyitems` orders them).

    Makes the folder of compiled programs.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    compiled.make(config.add_cleanup)
    # Programs that take long to compile are compiled once, also where several tests of this process make them anew.
    jax.config.update("jax_compilation_cache_dir", os.environ[compiled.FOLDER])
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[compiled.FOLDER]  # commands that tests start use it, too
    os.environ["XDG_CACHE_HOME"] = os.environ[compiled.FOLDER]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts files with few tests first.

    Their tests take longest (whole runs, several processes). If they came last, one core would work on them while the
    others are idle.
    """
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


SHARED = Path(__file__).parents[2] / "shared"

# With head_dim 8, RoPE scaling keeps one frequency, interpolates another and divides a third: every branch is tested.
LLAMA = ModelConfig(
    family="llama",
    vocab_size=96,
    n_layers=2,
    d_model=32,
    d_mlp=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, original_max_position=64),
    norm_eps=1e-5,
    tied=False,
    max_positions=256,
)
TINY_CONFIGS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(
        LLAMA, family="qwen2", rope_theta=1e6, rope_scaling=None, tied=True, **FAMILIES["qwen2"]
    ),
    "qwen3": dataclasses.replace(
        LLAMA, family="qwen3", n_layers=3, head_dim=12, rope_scaling=None, **FAMILIES["qwen3"]
    ),
}
# Every part that other families have, in one model: no family has all of them.
MIXED = dataclasses.replace(
    LLAMA,
    **FAMILIES["gemma3_text"] | {"qk_norm_joint": True},
    **{"family": "gemma3_text", "n_layers": 3, "tied": True, "rope_scaling": RopeScaling(4.0), "query_scalar": 20.0},
    **{
        "qkv_bias": True,
        "window": 4,
        "sliding": (True, False, True),
        "local_theta": 100.0,
        "no_rope": (False, True, False),
    },
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A small model with random float32 parameters on a mesh of one device."""

    config: ModelConfig
    model: Decoder
    params: Any
    mesh: Mesh


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the models and data in {SHARED}, which is absent")
    return SHARED


def noisy(params: Any, seed: int = 1) -> Any:
    """Adds noise to all parameters, so that each of them (biases and norms too) has an effect on the logits."""
    rng = np.random.default_rng(seed)  # on the host, because JAX would compile a program for each shape

    def move(x: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(x) + 0.15 * rng.normal(size=x.shape).astype(np.float32), x.sharding)

    return jax.tree.map(move, params)


@contextlib.contextmanager
def compiling_fast() -> Iterator[None]:
    """Within it, XLA compiles in half the time, but to slower code."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def fast_compile() -> Iterator[None]:
    """Fast compilation, for tests with many tiny programs."""
    with compiling_fast():
        yield


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, TinyModel]:
    """One `TinyModel` per family.

    Llama has scaled RoPE and an untied embedding, Qwen2 has biases and a tied embedding, Qwen3 has qk-norm. "mixed" has
    the parts of all other families.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = {}
    for family, config in (TINY_CONFIGS | {"mixed": MIXED}).items():
        model = Decoder(config)
        with compiling_fast():
            params = huggingface.random_params(model, mesh, seed=0)
        made[family] = TinyModel(config, model, noisy(params), mesh)
    return made


@pytest.fixture(params=TINY_CONFIGS)
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, TinyModel]) -> TinyModel:
    """Each of `tiny_models` but "mixed" in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def mesh8() -> Mesh:
    """A mesh of eight devices with data, fsdp and tensor parallelism at once."""
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of one small layer, with the procedural domains' tokenizer and without weights."""
    folder = tmp_path_factory.mktemp("small")
    shipped = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(shipped | sizes | heads))
    vocabulary.make_tokenizer().save_pretrained(folder)
    return folder
