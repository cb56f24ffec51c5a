"""Set-up of every test, before JAX starts: eight CPU devices, and no implicit rank promotion."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (after the platform is chosen)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from mdrl_jax.model import huggingface  # noqa: E402
from mdrl_jax.model.families import FAMILIES, ModelConfig, RopeScaling  # noqa: E402
from mdrl_jax.model.transformer import Decoder  # noqa: E402
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Keeps xdist from its own order of files, by which those of few tests come last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: they are the long ones (whole runs, several processes), and one core would wait."""
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


SHARED = Path(__file__).parents[2] / "shared"

# At head_dim 8 the scaling's three branches (kept, mixed, divided) each meet a frequency.
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


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A small random model; float32 parameters on a mesh of one device."""

    config: ModelConfig
    model: Decoder
    params: Any
    mesh: Mesh


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the models and data in {SHARED}, which is absent")
    return SHARED


def noisy(params: Any, seed: int = 1) -> Any:
    """Parameters moved far enough that every one of them (biases, norms) matters to the logits."""
    rng = np.random.default_rng(seed)  # on the host: a program for each shape would take seconds to compile

    def move(x: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(x) + 0.15 * rng.normal(size=x.shape).astype(np.float32), x.sharding)

    return jax.tree.map(move, params)


@contextlib.contextmanager
def compiling_fast() -> Iterator[None]:
    """XLA compiles in half the time, to slower code."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def fast_compile() -> Iterator[None]:
    """For tests whose programs are many and tiny."""
    with compiling_fast():
        yield


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, TinyModel]:
    """One `TinyModel` a family: Llama with scaled RoPE and untied, Qwen2 with biases and tied, Qwen3 with qk-norm."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = {}
    for family, config in TINY_CONFIGS.items():
        model = Decoder(config)
        with compiling_fast():
            params = huggingface.random_params(model, mesh, seed=0)
        made[family] = TinyModel(config, model, noisy(params), mesh)
    return made


@pytest.fixture(params=TINY_CONFIGS)
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, TinyModel]) -> TinyModel:
    """Each of `tiny_models` in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def mesh8() -> Mesh:
    """Eight devices, every kind of parallelism at once."""
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
