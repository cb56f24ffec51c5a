"""One suite for every recovery transform: what each must do whatever it is for.

A transform takes a tree (parameters or updates), trees like it that it is told (edits, masks), and a strength.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.sharding import param_shardings
from mdrl_jax.recovery.rollback import rollback

pytestmark = pytest.mark.usefixtures("fast_compile")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Tree = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform under test.

    Attributes:
      apply: (x, told, strength) -> a tree like x.
      told: (rng, shapes) -> what it is told, trees on the host with leaves of the shapes of x.
      mask: told -> where it may change x, booleans.
    """

    apply: Callable[[Tree, Any, Any], Tree]
    told: Callable[[np.random.Generator, Tree], Any]
    mask: Callable[[Any], Tree]


def normal(rng: np.random.Generator, shapes: Tree) -> Tree:
    """Numbers of a tree's shapes, with zeros of both signs among them."""

    def leaf(x: Any) -> np.ndarray:
        drawn = rng.normal(size=x.shape).astype(np.float32)
        return np.where(rng.random(x.shape) < 0.1, np.copysign(np.float32(0), drawn), drawn)

    return jax.tree.map(leaf, shapes)


def some(rng: np.random.Generator, shapes: Tree) -> Tree:
    return jax.tree.map(lambda x: rng.random(x.shape) < 0.3, shapes)


CASES = {
    "rollback": Case(
        apply=lambda x, told, strength: rollback(x, *told, strength),
        told=lambda rng, shapes: (normal(rng, shapes), some(rng, shapes)),
        mask=lambda told: told[1],
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case with its arguments, of one dtype, on one device and on eight."""

    case: Case
    x: Tree
    told: Any
    x8: Tree
    told8: Any
    mask: Tree

    def run(self, strength: float) -> Tree:
        with jax.numpy_dtype_promotion("strict"):
            return jax.jit(self.case.apply)(self.x, self.told, np.float32(strength))

    def run8(self, strength: float) -> Tree:
        return jax.jit(self.case.apply)(self.x8, self.told8, np.float32(strength))


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> Any:
    return DTYPES[request.param]


@pytest.fixture(params=CASES)
def setting(request: pytest.FixtureRequest, dtype: Any, tiny_models: Any, mesh8: Mesh) -> Setting:
    case, rng = CASES[request.param], np.random.default_rng(0)
    boxed = param_shapes(Decoder(tiny_models["qwen2"].config))
    shapes, shardings = nn.unbox(boxed), param_shardings(mesh8, boxed)
    x = jax.tree.map(lambda v: v.astype(dtype), normal(rng, shapes))
    told = case.told(rng, shapes)
    structure = jax.tree.structure(shapes)
    # Every tree it is told lies where x lies.
    places = jax.tree.map(lambda _: shardings, told, is_leaf=lambda t: jax.tree.structure(t) == structure)
    return Setting(
        case, *jax.tree.map(jnp.asarray, (x, told)), *jax.tree.map(jax.device_put, (x, told), (shardings, places)),
        case.mask(told),
    )  # fmt: skip


def bits(x: Tree) -> Tree:
    return jax.tree.map(lambda v: np.asarray(v).view(f"u{v.dtype.itemsize}"), x)


def wide(x: Tree) -> Tree:
    return jax.tree.map(lambda v: np.asarray(v, np.float32), x)


def assert_close(a: Tree, b: Tree, dtype: Any) -> None:
    """Within a rounding: fused multiplications may round once where separate ones round twice."""
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), wide(a), wide(b))


def test_nothing_changes_at_zero_strength(setting: Setting):
    for found in (setting.run(0.0), setting.run8(0.0), setting.case.apply(setting.x, setting.told, 0.0)):
        jax.tree.map(np.testing.assert_array_equal, bits(found), bits(setting.x))


def test_structure_shapes_dtypes_and_shardings_are_kept(setting: Setting):
    for found, x in ((setting.run(0.7), setting.x), (setting.run8(0.7), setting.x8)):
        assert jax.tree.structure(found) == jax.tree.structure(x)
        assert jax.tree.map(lambda v: (v.shape, v.dtype), found) == jax.tree.map(lambda v: (v.shape, v.dtype), x)
        same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim), found, x)
        assert all(jax.tree.leaves(same))


def test_compiled_equals_eager(setting: Setting, dtype: Any):
    assert_close(setting.run(0.7), setting.case.apply(setting.x, setting.told, 0.7), dtype)


def test_eight_devices_equal_one(setting: Setting, dtype: Any):
    assert_close(setting.run8(0.7), setting.run(0.7), dtype)


def test_nothing_changes_outside_the_mask_and_something_inside(setting: Setting):
    found, x = bits(setting.run(0.7)), bits(setting.x)
    changed = jax.tree.map(np.not_equal, found, x)
    assert not any(jax.tree.leaves(jax.tree.map(lambda c, m: (c & ~m).any(), changed, setting.mask)))
    assert all(jax.tree.leaves(jax.tree.map(lambda c, m: c.sum() > 0.5 * m.sum(), changed, setting.mask)))


def test_no_parameter_is_gathered(setting: Setting):
    compiled = jax.jit(setting.case.apply).lower(setting.x8, setting.told8, np.float32(0.7)).compile()
    largest = max(v.nbytes for v in jax.tree.leaves(setting.x8))
    for c in hlo.collectives(compiled.as_text(), unknown_trips=1):
        assert c.kind == "all-reduce" and c.bytes < largest / 8, c
