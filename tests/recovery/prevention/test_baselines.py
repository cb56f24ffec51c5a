"""Gradient transforms against their formulas and known optima, merges against dense numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdrl_jax.recovery.merging import average, task_arithmetic, ties
from mdrl_jax.recovery.prevention.projections import agem, ewc, pcgrad

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {"embedding": (4, 3), "layers": {"gate": (2, 3, 5)}, "norm": (6,)}
N = 48


def to_tree(x_N: Any) -> Any:
    """The coordinates of a vector as a tree."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    ends = np.cumsum([np.prod(s) for s in leaves])
    parts = np.split(np.asarray(x_N, np.float32), ends[:-1])
    return structure.unflatten([jnp.asarray(p.reshape(s)) for p, s in zip(parts, leaves, strict=True)])


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def changed(transform: Any, g_N: Any, params: Any = None, **extra: Any) -> np.ndarray:
    g = to_tree(g_N)
    return flat(transform.update(g, transform.init(g), params, **extra)[0])


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, N))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_ewc_ends_where_the_penalized_quadratic_has_its_minimum():
    """B's loss ½ Σ h (θ − b)² with two anchors: θ = (h b + λ Σ F_i θ*_i) / (h + λ Σ F_i), coordinate by coordinate."""
    rng = np.random.default_rng(0)
    weight, h, b = 0.7, rng.uniform(0.5, 1.5, N), rng.normal(size=N)
    fishers, peaks = rng.uniform(0, 2, (2, N)), draw(rng, 2)
    anchors = tuple((to_tree(f), to_tree(p)) for f, p in zip(fishers, peaks, strict=True))
    optimizer = optax.chain(ewc(weight), optax.identity(), optax.sgd(0.2))
    theta = to_tree(np.zeros(N))

    @jax.jit
    def step(theta: Any, state: Any, anchors: Any) -> Any:
        g = jax.tree.map(lambda x, steep, low: steep * (x - low), theta, to_tree(h), to_tree(b))
        update, state = optimizer.update(g, state, theta, anchors=anchors)
        return optax.apply_updates(theta, update), state

    state = optimizer.init(theta)
    for _ in range(200):
        theta, state = step(theta, state, anchors)
    best = (h * b + weight * (fishers * peaks).sum(0)) / (h + weight * fishers.sum(0))
    np.testing.assert_allclose(flat(theta), best, atol=1e-5)


def test_ewc_without_parameters_is_refused():
    with pytest.raises(ValueError, match="needs the parameters"):
        changed(ewc(1.0), np.ones(N), anchors=())


def test_pcgrad_is_the_example_of_its_paper():
    """Figure 2 of arXiv 2001.06782: of conflicting gradients each is laid on the normal plane of the other."""
    g, r = np.zeros((2, N))
    g[:2], r[:2] = (1.0, 0.0), (-1.0, 1.0)
    expected = np.zeros(N)
    expected[:2] = 0.5, 0.5
    np.testing.assert_allclose(changed(pcgrad(), g, references=(to_tree(r),)), expected, atol=1e-6)
    expected[:2] = 0.0, 1.0
    np.testing.assert_allclose(changed(pcgrad(), r, references=(to_tree(g),)), expected, atol=1e-6)
    np.testing.assert_array_equal(changed(pcgrad(), g, references=(to_tree(-r),)), g)


def by_formula(g: np.ndarray, r: np.ndarray) -> np.ndarray:
    return g - (g @ r) / (r @ r) * r if g @ r < 0 else g


def test_agem_takes_the_mean_of_the_references_and_pcgrad_each_in_turn():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(8):
        g, *rs = draw(rng, 4)
        told = tuple(map(to_tree, rs))
        expected = by_formula(g, np.mean(rs, axis=0))
        np.testing.assert_allclose(changed(agem(), g, references=told), expected, atol=2e-6)
        seen.add(bool((expected != g).any()))
        assert expected @ np.mean(rs, axis=0) > -1e-9
        expected = g
        for r in rs:
            expected = by_formula(expected, r)
        np.testing.assert_allclose(changed(pcgrad(), g, references=told), expected, atol=2e-6)
    assert seen == {True, False}


def test_a_zero_reference_changes_nothing():
    g = np.random.default_rng(2).normal(size=N).astype(np.float32)
    for transform in (agem(), pcgrad()):
        np.testing.assert_array_equal(changed(transform, g, references=(to_tree(np.zeros(N)),)), g)


def test_all_work_together_in_a_jitted_chain_that_gets_everything():
    rng = np.random.default_rng(3)
    g, r, theta, peak, fisher = draw(rng, 5)
    chain = optax.chain(ewc(0.5), pcgrad(), optax.clip_by_global_norm(1e9))
    extra = {"anchors": ((to_tree(fisher**2), to_tree(peak)),), "references": (to_tree(r),), "protected": None}
    found, _ = jax.jit(chain.update)(to_tree(g), chain.init(to_tree(g)), to_tree(theta), **extra)
    expected = by_formula(g + 0.5 * fisher**2 * (theta - peak), r)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-4)


# --- merges -----------------------------------------------------------------------------------------------------------


def dense_ties(base: np.ndarray, edits: np.ndarray, density: float, scale: float) -> np.ndarray:
    """TIES of arXiv 2306.01708, coordinate by coordinate."""
    kept = np.zeros_like(edits)
    for i, edit in enumerate(edits):
        best = np.argsort(-np.abs(edit))[: round(density * edit.size)]
        kept[i, best] = edit[best]
    out = base.copy()
    for j in range(base.size):
        sign = np.sign(kept[:, j].sum())
        agreed = [x for x in kept[:, j] if x != 0 and np.sign(x) == sign]
        if agreed:
            out[j] += scale * np.mean(agreed)
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_dense_ties(density: float):
    rng = np.random.default_rng(4)
    base, *edits = draw(rng, 4).astype(np.float32)
    edits[0][5], edits[1][5], edits[2][5] = 3.0, -3.0, 0.0  # a tie elects no sign
    found = flat(ties(to_tree(base), tuple(map(to_tree, edits)), density, 0.8))
    np.testing.assert_allclose(found, dense_ties(base, np.stack(edits), density, 0.8), rtol=1e-6, atol=1e-6)


def test_a_coordinate_that_ties_in_sign_stays():
    base, a = np.ones((2, N), np.float32)
    found = flat(ties(to_tree(base), (to_tree(a), to_tree(-a)), 1.0, 1.0))
    np.testing.assert_array_equal(found, base)


def test_averages_and_task_arithmetic_are_their_formulas():
    rng = np.random.default_rng(5)
    base, *edits = draw(rng, 4)
    told = tuple(map(to_tree, edits))
    np.testing.assert_allclose(flat(average(told)), np.mean(edits, axis=0), atol=1e-6)
    found = flat(task_arithmetic(to_tree(base), told, 0.3))
    np.testing.assert_allclose(found, base + 0.3 * np.sum(edits, axis=0), atol=1e-6)
    averaged = average(tuple(to_tree(base + e) for e in edits))
    np.testing.assert_allclose(flat(averaged), flat(task_arithmetic(to_tree(base), told, 1 / 3)), atol=1e-6)
