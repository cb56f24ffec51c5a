"""Tests of properties that every recovery transform must have, whatever its purpose.

A transform takes a tree (parameters or an update), further trees like it (`told`: edits, masks, bases), and a strength.
With strength 0 it must change nothing, for example.
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
from mdrl_jax.parallel.sharding import param_shardings, stacked
from mdrl_jax.recovery.merging import average, dare, ram, task_arithmetic, ties
from mdrl_jax.recovery.prevention.projections import agem, ewc, mgs, pcgrad
from mdrl_jax.recovery.prevention.protect import protect
from mdrl_jax.recovery.rollback.rules import rollback

pytestmark = pytest.mark.usefixtures("fast_compile")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Tree = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform under test.

    Attributes:
      apply: (x, told, strength) -> the transformed tree, like x.
      told: (rng, x) -> its further arguments: random trees like x on the host, whose leaves may have one more leading
        axis.
      mask: (x, told) -> a tree of booleans, True where the transform may change x.
      roundings: number of float32 roundings that results may differ by; larger if it computes sums over the whole tree,
        and again if it divides by them one tensor after another.
    """

    apply: Callable[[Tree, Any, Any], Tree]
    told: Callable[[np.random.Generator, Tree], Any]
    mask: Callable[[Tree, Any], Tree]
    roundings: int = 2


def normal(rng: np.random.Generator, shapes: Tree) -> Tree:
    """A random tree with these shapes; about a tenth of its entries are zeros, of both signs."""

    def leaf(x: Any) -> np.ndarray:
        drawn = rng.normal(size=x.shape).astype(np.float32)
        return np.where(rng.random(x.shape) < 0.1, np.copysign(np.float32(0), drawn), drawn)

    return jax.tree.map(leaf, shapes)


def some(rng: np.random.Generator, shapes: Tree) -> Tree:
    return jax.tree.map(lambda x: rng.random(x.shape) < 0.3, shapes)


def within(rng: np.random.Generator, x: Tree, n: int, share: float = 0.0) -> tuple[Tree, ...]:
    """n trees that are `share` · x plus noise on the same 30 % of coordinates, and 0 elsewhere."""
    mask = some(rng, x)
    return tuple(
        jax.tree.map(lambda m, v, e: np.where(m, share * v + e, np.float32(0)), mask, x, normal(rng, x))
        for _ in range(n)
    )


def orthonormal(trees: tuple[Tree, ...]) -> Tree:
    """An orthonormal basis of the span of the trees, as one tree whose leaves have a leading axis."""
    leaves, structure = jax.tree.flatten(trees[0])
    rows = np.stack([np.concatenate([v.ravel() for v in jax.tree.leaves(t)]) for t in trees]).astype(np.float64)
    q = np.linalg.qr(rows.T)[0].T.astype(np.float32)
    parts = np.split(q, np.cumsum([v.size for v in leaves])[:-1], axis=1)
    return structure.unflatten([p.reshape(-1, *v.shape) for p, v in zip(parts, leaves, strict=True)])


def nonzero(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *v: np.any([np.asarray(x) != 0 for x in v], axis=0), *trees)


def updated(transform: Any, x: Tree, params: Tree = None, **extra: Any) -> Tree:
    return transform.update(x, transform.init(x), params, **extra)[0]


def scaled(strength: Any, trees: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """The references of A-GEM or PCGrad times the strength.

    These transforms have no strength of their own and ignore the length of references, unless it is 0.
    """
    return jax.tree.map(lambda v: jnp.asarray(strength, v.dtype) * v, trees)


def averaged(x: Tree, other: Tree, strength: Any) -> Tree:
    """The average of x and another tree, or of x and itself if the strength is 0."""
    return average((x, jax.tree.map(lambda v, o: jnp.where(strength != 0, o.astype(v.dtype), v), x, other)))


CASES = {
    "rollback": Case(
        apply=lambda x, told, strength: rollback(x, *told, strength),
        told=lambda rng, x: (normal(rng, x), some(rng, x)),
        mask=lambda x, told: told[1],
    ),
    "protect": Case(
        apply=lambda x, told, strength: updated(protect(strength), x, protected=told),
        told=lambda rng, x: orthonormal(within(rng, x, 3, share=1.0)),
        mask=lambda x, told: jax.tree.map(lambda b: (b != 0).any(axis=0), told),
        roundings=20,
    ),
    "ewc": Case(
        apply=lambda x, told, strength: updated(ewc(strength), x, told[0], anchors=((told[1], told[2]),)),
        told=lambda rng, x: (normal(rng, x), jax.tree.map(np.abs, within(rng, x, 1)[0]), normal(rng, x)),
        mask=lambda x, told: nonzero(told[1]),
    ),
    "agem": Case(
        apply=lambda x, told, strength: updated(agem(), x, references=scaled(strength, told)),
        told=lambda rng, x: within(rng, x, 2, share=-1.0),
        mask=lambda x, told: nonzero(*told),
        roundings=20,
    ),
    "pcgrad": Case(
        apply=lambda x, told, strength: updated(pcgrad(), x, references=scaled(strength, told)),
        told=lambda rng, x: within(rng, x, 2, share=-1.0),
        mask=lambda x, told: nonzero(*told),
        roundings=20,
    ),
    "mgs": Case(
        apply=lambda x, told, strength: updated(mgs(), x, references=scaled(strength, told)),
        told=lambda rng, x: within(rng, x, 2, share=-1.0),
        mask=lambda x, told: nonzero(*told),
        roundings=60,
    ),
    "average": Case(
        apply=averaged,
        told=lambda rng, x: jax.tree.map(lambda v, d: np.where(d != 0, v + d, v), x, within(rng, x, 1)[0]),
        mask=lambda x, told: nonzero(jax.tree.map(np.subtract, told, x)),
    ),
    "arithmetic": Case(
        apply=task_arithmetic,
        told=lambda rng, x: within(rng, x, 3),
        mask=lambda x, told: nonzero(*told),
    ),
    "ties": Case(
        apply=lambda x, told, strength: ties(x, told, 0.2, strength),
        told=lambda rng, x: within(rng, x, 2),
        mask=lambda x, told: nonzero(*told),
    ),
    "ram": Case(
        apply=lambda x, told, strength: ram(x, told, 0.5, strength),
        told=lambda rng, x: within(rng, x, 2),
        mask=lambda x, told: nonzero(*told),
    ),
    "dare": Case(
        apply=lambda x, told, strength: dare(x, told, 0.25, strength, jax.random.key(0)),
        told=lambda rng, x: within(rng, x, 2),
        mask=lambda x, told: nonzero(*told),
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case with arguments of one dtype, on one device (x, told) and on eight (x8, told8), and its results."""

    case: Case
    x: Tree
    told: Any
    x8: Tree
    told8: Any
    mask: Tree
    found: dict[Any, Tree] = dataclasses.field(default_factory=dict)

    def run(self, strength: float) -> Tree:
        if ("one", strength) not in self.found:
            with jax.numpy_dtype_promotion("strict"):
                self.found["one", strength] = jax.jit(self.case.apply)(self.x, self.told, np.float32(strength))
        return self.found["one", strength]

    def run8(self, strength: float) -> Tree:
        if ("eight", strength) not in self.found:
            self.found["eight", strength] = jax.jit(self.case.apply)(self.x8, self.told8, np.float32(strength))
        return self.found["eight", strength]


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> Any:
    return DTYPES[request.param]


# Compiling these takes long; `recovery/prevention/test_baselines.py` checks them on one device in every run.
SLOW = ("ram", "dare")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def setting(request: pytest.FixtureRequest, dtype: Any, tiny_models: Any, mesh8: Mesh) -> Setting:
    case, rng = CASES[request.param], np.random.default_rng(0)
    boxed = param_shapes(Decoder(tiny_models["qwen2"].config))
    shapes, shardings = nn.unbox(boxed), param_shardings(mesh8, boxed)
    x = jax.tree.map(lambda v: v.astype(dtype), normal(rng, shapes))
    rounded = wide(x)
    told = case.told(rng, rounded)
    structure = jax.tree.structure(shapes)

    def beside_x(tree: Tree) -> Tree:
        return jax.tree.map(lambda v, x, place: place if v.ndim == x.ndim else stacked(place), tree, x, shardings)

    places = jax.tree.map(beside_x, told, is_leaf=lambda t: jax.tree.structure(t) == structure)
    return Setting(
        case, *jax.tree.map(jnp.asarray, (x, told)), *jax.tree.map(jax.device_put, (x, told), (shardings, places)),
        case.mask(rounded, told),
    )  # fmt: skip


def bits(x: Tree) -> Tree:
    return jax.tree.map(lambda v: np.asarray(v).view(f"u{v.dtype.itemsize}"), x)


def wide(x: Tree) -> Tree:
    return jax.tree.map(lambda v: np.asarray(v, np.float32), x)


def assert_close(a: Tree, b: Tree, dtype: Any, roundings: int) -> None:
    """Allows for fused operations, which round once instead of twice, and for sums in another order."""
    tolerance = max(2 * float(jnp.finfo(dtype).eps), roundings * float(jnp.finfo(jnp.float32).eps))
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
    assert_close(setting.run(0.7), setting.case.apply(setting.x, setting.told, 0.7), dtype, setting.case.roundings)


def test_eight_devices_equal_one(setting: Setting, dtype: Any):
    assert_close(setting.run8(0.7), setting.run(0.7), dtype, setting.case.roundings)


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
