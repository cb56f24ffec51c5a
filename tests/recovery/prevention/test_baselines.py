"""Gradient transforms against their formulas and known optima, merges against dense numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdrl_jax.recovery.merging import average, changed_entries, dare, ram, task_arithmetic, ties
from mdrl_jax.recovery.prevention.projections import agem, ewc, mgs, pcgrad

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


def modules(kind: str) -> list[np.ndarray]:
    """The coordinates of each module: the tensors of each layer, or each layer; and every other tensor."""
    numbers = to_tree(np.arange(N))
    layers = [np.asarray(x) for x in numbers["layers"].values()]
    inside = [x[i].ravel() for x in layers for i in range(2)]
    if kind == "layer":
        inside = [np.concatenate([x[i].ravel() for x in layers]) for i in range(2)]
    return [m.astype(int) for m in (*inside, *(np.asarray(numbers[k]).ravel() for k in ("embedding", "norm")))]


@pytest.mark.parametrize("kind", ["tensor", "layer"])
def test_mgs_is_pcgrad_on_each_module_alone(kind: str):
    rng = np.random.default_rng(0)
    g, references = draw(rng, 1)[0], draw(rng, 2)
    expected = g.copy()
    for at in modules(kind):
        for r in references:
            inner = expected[at] @ r[at]
            expected[at] -= min(inner, 0) / (r[at] @ r[at]) * r[at]
    found = changed(mgs(kind), g, references=tuple(map(to_tree, references)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    # Modules that conflict are hidden from the whole gradient by one that agrees.
    one = modules(kind)[0]
    r = np.where(np.isin(np.arange(N), one), -g, 9 * g)
    np.testing.assert_array_equal(changed(pcgrad(), g, references=(to_tree(r),)), flat(to_tree(g)))
    np.testing.assert_allclose(changed(mgs(kind), g, references=(to_tree(r),))[one], 0, atol=1e-6)


def test_ram_adds_what_one_edit_changed_and_averages_what_several_did():
    rng = np.random.default_rng(0)
    base, edits = draw(rng, 1)[0], draw(rng, 3)
    sets = np.zeros(edits.shape, bool)
    for edit, chosen in zip(edits, sets, strict=True):
        for at in modules("tensor"):
            chosen[at] = np.abs(edit[at]) > 0.8 * np.sqrt(np.mean(edit[at] ** 2))
        np.testing.assert_array_equal(flat(changed_entries(to_tree(edit), 0.8)), chosen)
    n = sets.sum(axis=0)
    assert set(n) == {0, 1, 2, 3}
    total = np.where(sets, edits, 0).sum(axis=0)
    expected = base + 0.5 * total / np.maximum(n, 1)
    np.testing.assert_allclose(flat(ram(to_tree(base), list(map(to_tree, edits)), 0.8, 0.5)), expected, atol=1e-6)
    np.testing.assert_allclose(expected[n == 1], (base + 0.5 * edits.sum(axis=0, where=sets))[n == 1])
    everything = ram(to_tree(base), list(map(to_tree, edits)), 0.0, 1.0)
    np.testing.assert_allclose(flat(everything), base + edits.mean(axis=0), atol=1e-6)


def test_dare_keeps_the_edits_on_average_and_its_rates_are_nested():
    rng = np.random.default_rng(0)
    base, edits, n = np.zeros(N), np.abs(draw(rng, 2)) + 1, 1000
    trees, keys, rates = list(map(to_tree, edits)), jax.random.split(jax.random.key(0), n), np.array([0.0, 0.5, 0.9])
    merges = jax.vmap(lambda rate: jax.vmap(lambda key: dare(to_tree(base), trees, rate, 1.0, key))(keys))
    leaves = [np.asarray(x, float).reshape(3, n, -1) for x in jax.tree.leaves(jax.jit(merges)(np.float32(rates)))]
    same, *rest = np.concatenate(leaves, axis=-1)
    np.testing.assert_allclose(same, np.tile(edits.sum(axis=0), (n, 1)), rtol=1e-6)
    drawn = dict(zip((0.5, 0.9), rest, strict=True))
    for rate, merged in drawn.items():
        stderr = np.sqrt((edits**2).sum(axis=0) * rate / (1 - rate) / n)
        assert (np.abs(merged.mean(axis=0) - edits.sum(axis=0)) < 5 * stderr).all()
        nothing = (merged == 0).mean()  # dropped from both edits, independently
        assert abs(nothing - rate**2) < 5 * np.sqrt(rate**2 / merged.size)
    assert not ((drawn[0.5] == 0) & (drawn[0.9] != 0)).any()


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
