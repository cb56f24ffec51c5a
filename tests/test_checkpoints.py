"""Checkpoints: bit-exact, onto any mesh, one kept, half-written ones ignored."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.checkpoints import StageCheckpoints, abstract
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named
from mdrl_jax.rl.trainer import OptimizerConfig, TrainState, make_optimizer, state_shardings

OPTIMIZER = make_optimizer(OptimizerConfig())
SHAPES = {"embedding": (16, 8), "layers": {"q": (2, 8, 4, 2), "scale": (2, 8)}}
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"q": ("layers", "embed", "heads", None), "scale": ("layers", "embed")},
}
MESHES = [((1, 1, 1), (1, 1, 1)), ((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 2, 1))]
is_tuple = lambda x: isinstance(x, tuple)  # noqa: E731


def mesh_of(*sizes: int) -> Mesh:
    """A mesh over as many of the devices as it takes."""
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def shapes() -> Any:
    """Shapes of the parameters."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=is_tuple)


def shardings(mesh: Mesh) -> TrainState:
    """Where a state lies on a mesh."""
    placed = jax.tree.map(lambda axes: named(mesh, *axes), AXES, is_leaf=is_tuple)
    return state_shardings(OPTIMIZER, shapes(), placed, mesh)


def like(mesh: Mesh) -> TrainState:
    """The abstract state that a restore is told to make."""
    opt_state = jax.eval_shape(OPTIMIZER.init, shapes())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step=step, params=shapes(), opt_state=opt_state)
    return abstract(state, shardings(mesh))


def filled(mesh: Mesh, seed: int, step: int) -> TrainState:
    """A state in which every bit is drawn; float32 by value as well as by bits (no NaN, but denormals and -0)."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        if x.dtype == jnp.int32:
            return np.int32(step)
        values = rng.normal(size=x.shape) * 10.0 ** rng.integers(-44, 30, x.shape)
        values.flat[0] = -0.0
        return values.astype(np.float32)

    return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), like(mesh))


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees are equal in structure, types and every bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert jax.tree.structure(a) == jax.tree.structure(b)


def assert_placed(state: Any, wanted: Any) -> None:
    """Every leaf lies where it should."""
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("saved_on, restored_on", MESHES)
def test_a_state_comes_back_bit_by_bit_onto_any_mesh(tmp_path: Path, saved_on: Any, restored_on: Any):
    state, mesh = filled(mesh_of(*saved_on), seed=0, step=6), mesh_of(*restored_on)
    with StageCheckpoints(tmp_path / "01-math") as checkpoints:
        assert checkpoints.latest() is None
        # With two inner epochs an optimizer has made twice the steps of its stage.
        checkpoints.save(3, state, {"stage": "math", "prompts_visited": 48})
    with StageCheckpoints(tmp_path / "01-math") as checkpoints:
        assert checkpoints.latest() == 3
        restored, meta = checkpoints.restore(like(mesh))
        params = checkpoints.restore_params(like(mesh).params)
    assert_same_bits(restored, state)
    assert_same_bits(params, state.params)
    assert_placed(restored, shardings(mesh))
    assert_placed(params, shardings(mesh).params)
    assert (meta["step"], meta["stage"], meta["prompts_visited"]) == (3, "math", 48)


def test_only_the_newest_is_kept(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    with StageCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, filled(mesh, seed=step, step=step), {})
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["5"]
    with StageCheckpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(like(mesh))
    assert_same_bits(restored, filled(mesh, seed=5, step=5))


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path):
    """What a kill in the middle of a save leaves behind: a folder under Orbax's temporary name."""
    mesh = mesh_of(1, 1, 1)
    state = filled(mesh, seed=0, step=2)
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
    half = tmp_path / "4.orbax-checkpoint-tmp-1700000000"
    (half / "params").mkdir(parents=True)
    (half / "params" / "manifest.ocdbt").write_bytes(b"half")
    with StageCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        restored, _ = checkpoints.restore(like(mesh))
        checkpoints.save(4, filled(mesh, seed=4, step=4), {})
        assert checkpoints.latest() == 4
    assert_same_bits(restored, state)
