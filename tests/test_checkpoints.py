"""Tests of checkpoints.

They are restored bit by bit onto any mesh, written while the run continues, and not used if they are damaged.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax import manifest
from mdrl_jax.checkpoints import StageCheckpoints, abstract, keep_last, load_params, load_tree, save_tree, steps
from mdrl_jax.errors import UserError
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named, param_shardings, put
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig
from mdrl_jax.rl.policy import PolicyBatch, make_grpo_loss
from mdrl_jax.rl.trainer import (
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    make_train_step,
    micro_batches,
    state_shardings,
)
from tests.rounding import decoder_roundings, tolerance

OPTIMIZER = make_optimizer(OptimizerConfig())
SHAPES = {"embedding": (16, 8), "layers": {"q": (2, 8, 4, 2), "scale": (2, 8)}}
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"q": ("layers", "embed", "heads", None), "scale": ("layers", "embed")},
}
MESHES = [((1, 1, 1), (1, 1, 1)), ((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 2, 1))]
is_tuple = lambda x: isinstance(x, tuple)  # noqa: E731


def mesh_of(*sizes: int) -> Mesh:
    """A mesh of these sizes over the first devices."""
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def shapes() -> Any:
    """Shapes of the parameters."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=is_tuple)


def shardings(mesh: Mesh) -> TrainState:
    """Shardings of a state on a mesh."""
    placed = jax.tree.map(lambda axes: named(mesh, *axes), AXES, is_leaf=is_tuple)
    return state_shardings(OPTIMIZER, shapes(), placed, mesh)


def like(mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state that a restore has to make."""
    opt_state = jax.eval_shape(OPTIMIZER.init, shapes())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step=step, params=shapes(), opt_state=opt_state)
    return abstract(state, shardings(mesh))


def filled(mesh: Mesh, seed: int, step: int) -> TrainState:
    """A random state with values of all magnitudes, with denormals and -0, but no NaN, which equals nothing."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        if x.dtype == jnp.int32:
            return np.int32(step)
        values = rng.normal(size=x.shape) * 10.0 ** rng.integers(-44, 30, x.shape)
        values.flat[0] = -0.0
        return values.astype(np.float32)

    return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), like(mesh))


def assert_same_bits(a: Any, b: Any) -> None:
    """Checks that two trees are equal in structure, dtypes and every bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert jax.tree.structure(a) == jax.tree.structure(b)


def assert_placed(state: Any, wanted: Any) -> None:
    """Checks that every leaf has the wanted sharding."""
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.fixture(autouse=True)
def nothing_is_known_to_be_whole() -> None:
    """Forgets which checkpoints were checked, as in a new process."""
    manifest.check.cache_clear()


def written(folder: Path, *saved: int, keep: int = 2) -> dict[int, TrainState]:
    """Writes checkpoints of these steps into a folder; returns their states."""
    states = {step: filled(mesh_of(1, 1, 1), seed=step, step=step) for step in saved}
    with StageCheckpoints(folder, keep) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"stage": "math"})
    return states


def files(folder: Path) -> list[str]:
    """Paths of all files of a checkpoint, relative to its folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("saved_on, restored_on", MESHES)
def test_a_state_comes_back_bit_by_bit_onto_any_mesh(tmp_path: Path, saved_on: Any, restored_on: Any):
    state, mesh = filled(mesh_of(*saved_on), seed=0, step=6), mesh_of(*restored_on)
    with StageCheckpoints(tmp_path / "01-math") as checkpoints:
        assert checkpoints.latest() is None
        # Step 3 of the stage although the optimizer is at 6: with two updates per batch it makes twice the steps.
        checkpoints.save(3, state, {"stage": "math", "prompts_visited": 48})
    with StageCheckpoints(tmp_path / "01-math") as checkpoints:
        assert checkpoints.latest() == 3
        restored, meta = checkpoints.restore(like(mesh))
        params = checkpoints.restore_params(like(mesh).params)
    assert_same_bits(restored, state)
    assert_same_bits(params, state.params)
    assert_same_bits(load_params(tmp_path / "01-math", like(mesh).params), state.params)
    assert_placed(restored, shardings(mesh))
    assert_placed(params, shardings(mesh).params)
    assert (meta["step"], meta["stage"], meta["prompts_visited"]) == (3, "math", 48)


def test_what_is_on_disk_is_the_state_that_was_saved_though_the_next_steps_are_given_it(tmp_path: Path):
    """The next steps reuse the memory of the state while it is being written.

    The state has 32 MB, so that several steps are made before it is on the disk.
    """
    mesh = mesh_of(2, 2, 2)
    rows = named(mesh, "batch", "vocab")
    step = jax.jit(lambda s: jax.tree.map(lambda x: -3 * x + 1, s), donate_argnums=0)
    draw = jax.jit(lambda key: jax.random.normal(key, (8, 1 << 19)), out_shardings=rows)
    params, moments = ({"w": draw(jax.random.key(seed))} for seed in (0, 1))
    state = TrainState(step=jnp.int32(0), params=params, opt_state=moments)
    step(jax.tree.map(jnp.copy, state))  # compiles the step
    saved = jax.tree.map(jnp.copy, state)  # on the devices, because a copy on the host would keep the memory alive
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        steps_while_written, deadline = 0, time.monotonic() + 20
        while not (tmp_path / "1").exists() and time.monotonic() < deadline:
            before, state = state, step(state)
            steps_while_written += 1
        assert steps_while_written > 2 and before.params["w"].is_deleted(), "nothing is tested"
        checkpoints.wait()
        kept, _ = checkpoints.restore(abstract(state, jax.tree.map(lambda x: x.sharding, state)))
    assert_same_bits(kept, saved)


def test_the_newest_are_kept_while_a_stage_goes_on_and_the_last_of_a_finished_one(tmp_path: Path):
    states = written(tmp_path, 1, 2, 5, keep=2)
    assert steps(tmp_path) == [2, 5]
    with StageCheckpoints(tmp_path, keep=1) as checkpoints:
        assert_same_bits(checkpoints.restore(like(mesh_of(1, 1, 1)))[0], states[5])
        checkpoints.save_params(7, states[5].params, {})
    assert steps(tmp_path) == [7]
    written(tmp_path, 8, keep=2)
    keep_last(tmp_path)
    assert steps(tmp_path) == [8] and not list(tmp_path.glob("*[!0-9]*"))


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path: Path):
    """A kill in the middle of a save leaves a folder under a temporary name."""
    states = written(tmp_path, 2)
    (tmp_path / "4.unfinished" / "state").mkdir(parents=True)
    (tmp_path / "4.unfinished" / "state" / "manifest.ocdbt").write_bytes(b"half")
    with StageCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2 and not (tmp_path / "4.unfinished").exists()
        restored, _ = checkpoints.restore(like(mesh_of(1, 1, 1)))
        checkpoints.save(4, filled(mesh_of(1, 1, 1), seed=4, step=4), {})
        assert checkpoints.latest() == 4
    assert_same_bits(restored, states[2])


def flip(file: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "was changed": flip,
    "bytes instead of": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "has 0 bytes instead of": lambda file: file.write_bytes(b""),
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("wrong", DAMAGES)
def test_damage_of_any_file_is_told_and_the_one_before_is_used(tmp_path: Path, wrong: str):
    states = written(tmp_path / "01-math", 1, 2)
    for number, name in enumerate(files(tmp_path / "01-math" / "2")):
        manifest.check.cache_clear()
        folder, told = tmp_path / str(number) / "01-math", []
        shutil.copytree(tmp_path / "01-math", folder)
        DAMAGES[wrong](folder / "2" / name)
        with StageCheckpoints(folder, tell=told.append) as checkpoints:
            assert checkpoints.latest() == 1 and checkpoints.latest() == 1
        said = "was changed" if name == manifest.NAME and "instead" in wrong else wrong
        assert len(told) == 1 and "\n" not in told[0] and said in told[0], (name, told)
        assert told[0].startswith("01-math: checkpoint 2 is damaged (") and name in told[0]
        assert told[0].endswith("renamed to 2.damaged; the one of step 1 is used instead")
        assert steps(folder) == [1] and (folder / "2.damaged").is_dir()
    with StageCheckpoints(folder) as checkpoints:
        assert_same_bits(checkpoints.restore(like(mesh_of(1, 1, 1)))[0], states[1])


def test_where_none_is_whole_the_stage_begins_anew_and_nothing_is_removed(tmp_path: Path):
    told: list[str] = []
    for _ in range(2):  # the second time, the names of the damaged ones are taken
        written(tmp_path, 1, 2)
        flip(tmp_path / "1" / "meta.json")
        (tmp_path / "2" / manifest.NAME).unlink()
        with StageCheckpoints(tmp_path, tell=told.append) as checkpoints:
            assert checkpoints.latest() is None
    assert len(told) == 4 and all("there is no other: the stage starts over" in line for line in told)
    names = {"1.damaged", "2.damaged", "1.damaged2", "2.damaged2"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_a_finished_stage_that_is_damaged_is_refused_and_left_alone(tmp_path: Path):
    folder = tmp_path / "checkpoints" / "03-qa"
    states, params = written(folder, 4, 9), like(mesh_of(1, 1, 1)).params
    optimizer = next(f for f in (folder / "9/state/opt_state").rglob("*") if f.is_file())
    flip(optimizer)  # the optimizer of a finished stage is not read
    assert_same_bits(load_params(folder, params), states[9].params)
    manifest.check.cache_clear()
    flip(next((folder / "9/state/params/d").iterdir()))
    with pytest.raises(UserError, match=f"checkpoint 9 in {folder} is damaged .*remove that folder and.*03-qa.json"):
        load_params(folder, params)
    assert steps(folder) == [4, 9]
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_params(tmp_path / "absent", params)


def test_a_write_that_fails_in_the_background_ends_the_run_with_a_line(tmp_path: Path):
    states = written(tmp_path, 1)
    (tmp_path / "2").write_text("in the way")  # like a full disk, it fails in the thread that writes
    with pytest.raises(UserError, match=f"checkpoint in {tmp_path} could not be written.*NotADirectoryError"):
        with StageCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(2, states[1], {})
            checkpoints.save(3, states[1], {})
    (tmp_path / "2").unlink()
    with StageCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        (tmp_path / "2").write_text("in the way")
        with pytest.raises(UserError, match="could not be written"):
            checkpoints.save(2, states[1], {})
            checkpoints.__exit__(None, None, None)


def test_a_tree_goes_onto_another_mesh_and_what_has_no_place_to_the_host(tmp_path: Path):
    rng = np.random.default_rng(0)
    tree = {"vectors": [{"up": rng.normal(size=(3, 8, 5)).astype(np.float32)} for _ in range(2)], "index": np.arange(4)}
    place = lambda *mesh: named(mesh_of(*mesh), None, "embed", None)  # noqa: E731
    (tmp_path / "kept.orbax-checkpoint-tmp-17" / "half").mkdir(parents=True)  # a kill left this
    save_tree(tmp_path / "kept", jax.tree.map(lambda x: jax.device_put(x, place(2, 2, 2)) if x.ndim == 3 else x, tree))
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    for mesh in ((1, 1, 1), (1, 4, 1)):
        read = load_tree(tmp_path / "kept", {"up": place(*mesh)})
        assert_same_bits(read, tree)
        assert isinstance(read["index"], np.ndarray)
        assert_placed([half["up"] for half in read["vectors"]], [place(*mesh)] * 2)
    with pytest.raises(UserError, match="absent does not exist"):
        load_tree(tmp_path / "absent", {})


def batch() -> PolicyBatch:
    """A batch of rows, the same for every mesh."""
    rng = np.random.default_rng(1)
    mask_BT: Any = (np.arange(6) < rng.integers(1, 7, 8)[:, None]).astype(np.float32)
    logp_BT = rng.normal(-4.5, 0.3, (3, 8, 6)).astype(np.float32)
    return PolicyBatch(
        tokens_BT=rng.integers(1, 96, (8, 10)).astype(np.int32),
        valid_BT=np.concatenate([np.ones((8, 4), bool), mask_BT > 0], axis=1),
        grpo=GRPOBatch(logp_BT[0], logp_BT[1], logp_BT[2], rng.normal(size=8).astype(np.float32), mask_BT),
    )


def signed(params: Any, seed: int, size: float) -> Any:
    """Makes each parameter larger or smaller by the relative amount `size`, at random."""
    rng = np.random.default_rng(seed)

    def moved(x: jax.Array) -> jax.Array:
        factors = 1 + size * rng.choice([-1, 1], x.shape)
        return jax.device_put((np.asarray(x) * factors).astype(np.float32), x.sharding)

    return jax.tree.map(moved, params)


@pytest.mark.usefixtures("fast_compile")
def test_loss_and_gradient_after_a_restore_are_the_same_on_1_4_and_8_devices(tmp_path: Path, tiny_models: Any):
    """A state is saved after two steps on eight devices. Restored, it is exact on any mesh.

    Loss and gradient, computed from it on each mesh, are equal up to rounding.
    """
    tiny, small = tiny_models["qwen3"], 1e-3  # `small` is far above rounding, but small enough for linear changes
    loss_fn = make_grpo_loss(tiny.model, GRPOConfig(kl_coef=0.1), 1.0, 6, 0)
    shapes = jax.eval_shape(lambda: tiny.params)

    def mean(params: Any, rows: PolicyBatch) -> jax.Array:
        loss, (count, _) = loss_fn(params, rows)
        return loss / count

    def at(mesh: Mesh) -> TrainState:
        return state_shardings(OPTIMIZER, shapes, param_shardings(mesh, param_shapes(tiny.model)), mesh)

    first = mesh_of(2, 2, 2)
    with jax.set_mesh(first), StageCheckpoints(tmp_path) as checkpoints:
        state = init_state(OPTIMIZER, jax.device_put(tiny.params, at(first).params), at(first))
        step = make_train_step("elastic", loss_fn, OPTIMIZER, at(first), first)
        for _ in range(2):
            state, _ = step(state, put(micro_batches(batch(), 2), first, None, "batch"), jnp.float32(1e-2), {})
        checkpoints.save(2, state, {})
    found, moved = {}, []
    for sizes in ((1, 1, 1), (2, 2, 1), (2, 2, 2)):
        mesh = mesh_of(*sizes)
        abstract_state = abstract(jax.eval_shape(lambda: state), at(mesh))
        with jax.set_mesh(mesh), StageCheckpoints(tmp_path) as checkpoints:
            restored, _ = checkpoints.restore(abstract_state)
            assert_same_bits(restored, state)
            differentiate = jax.jit(jax.value_and_grad(mean))
            loss, gradient = differentiate(restored.params, put(batch(), mesh))
            if mesh.size == 1:  # gradients after all parameters were changed by `small`, up or down
                moved = [differentiate(signed(restored.params, s, small), put(batch(), mesh))[1] for s in range(4)]
        assert all(len(x.sharding.device_set) == mesh.size for x in jax.tree.leaves(restored))
        found[sizes] = np.float64(loss), jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))  # noqa: E731
    loss, gradient = found[1, 1, 1]
    assert abs(loss) > 1e-3 and norm(gradient) > 1e-3
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    # Independent relative changes of all parameters change the loss by the root of the sum of their squared effects.
    of_loss = norm(jax.tree.map(np.multiply, params, gradient)) / abs(loss)
    of_gradient = max(norm(jax.tree.map(np.subtract, there, gradient)) for there in moved) / small / norm(gradient)
    roundings = decoder_roundings(tiny.config, 10, 8 * 6)
    tolerances = tolerance(roundings, of_loss), tolerance(roundings, of_gradient)
    assert max(tolerances) < 1e-3  # a row that is lost or counted twice changes both by more than 10 %
    for other_loss, other in found.values():
        assert abs(other_loss - loss) <= tolerances[0] * abs(loss)
        assert norm(jax.tree.map(np.subtract, other, gradient)) <= tolerances[1] * norm(gradient)
