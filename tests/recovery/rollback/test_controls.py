"""Controls: matched one to one against a slow greedy search, sizes, supports, and tensors that are not favoured."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.parallel.sharding import named
from mdrl_jax.recovery.rollback.comparison import controls
from mdrl_jax.recovery.rollback.controls import BLIND_BITS, matched, permuted
from mdrl_jax.recovery.rollback.selection import complement, largest, size, support
from mdrl_jax.recovery.rollback.sweep import ALL, ROUTE

pytestmark = pytest.mark.usefixtures("fast_compile")

N = 600


def to_tree(x: np.ndarray) -> Any:
    x = jnp.asarray(x)
    return {"embedding": x[:120].reshape(12, 10), "layers": {"up": {"kernel": x[120:].reshape(4, 10, 12)}}}


def flat(x: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(x)])


def seen(x: np.ndarray) -> np.ndarray:
    """|δ| as the matching sees it: the middle of its bin."""
    bits = abs(x).astype(np.float32).view(np.int32) >> BLIND_BITS
    return ((bits << BLIND_BITS) + (1 << (BLIND_BITS - 1))).astype(np.int32).view(np.float32)


def greedy(sizes: np.ndarray, chosen: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Sizes of the partners by definition: own bin first, then the largest first, each the nearest that is left."""
    free = sorted(sizes[candidate])
    partners, unmet = [], []
    for s in sorted(sizes[chosen])[::-1]:
        if s in free:
            free.remove(s)
            partners.append(s)
        else:
            unmet.append(s)
    for s in unmet:
        nearest = min(free, key=lambda f, s=s: abs(f - s))
        free.remove(nearest)
        partners.append(nearest)
    return np.sort(partners)


@pytest.mark.parametrize("kind", ["distinct", "tied", "largest"])
def test_partners_are_those_of_a_greedy_search(kind: str):
    rng = np.random.default_rng(0)
    edit = (rng.normal(size=N) * 10.0 ** rng.integers(-7, -3, N)).astype(np.float32)
    if kind == "tied":  # edits of checkpoints in bfloat16 are multiples of a power of two
        edit = np.round(edit * 2**15).astype(np.float32) / 2**15
    inside = (edit != 0) & (rng.random(N) < 0.9)
    chosen = inside & (rng.random(N) < 0.2)
    if kind == "largest":  # no candidate is as large as any of them
        chosen = abs(edit) > np.quantile(abs(edit), 0.8)
        inside = edit != 0
    found = flat(matched(to_tree(edit), to_tree(chosen), to_tree(inside), 0))
    assert found.sum() == chosen.sum() and not (found & chosen).any() and not (found & ~inside).any()
    np.testing.assert_array_equal(np.sort(seen(edit[found])), greedy(seen(edit), chosen, inside & ~chosen))
    other = flat(matched(to_tree(edit), to_tree(chosen), to_tree(inside), 1))
    np.testing.assert_array_equal(np.sort(seen(edit[other])), np.sort(seen(edit[found])))
    if kind == "tied":
        assert (other != found).any()  # seeds draw among equals
    if kind == "distinct":
        assert np.linalg.norm(edit[found]) == pytest.approx(np.linalg.norm(edit[chosen]), rel=0.05)


def test_partners_among_equals_are_drawn_over_the_whole_tree():
    """All of |δ| equal, 100 chosen in the first tensor: partners fall on tensors as candidates do."""
    edit = np.where(np.random.default_rng(1).random(N) < 0.5, 1e-5, -1e-5).astype(np.float32)
    chosen = np.arange(N) < 100
    everywhere = to_tree(np.ones(N, bool))
    drawn = np.stack([flat(matched(to_tree(edit), to_tree(chosen), everywhere, seed)) for seed in range(60)])
    assert (drawn.sum(axis=1) == 100).all() and not drawn[:, :100].any()
    assert drawn[:, 100:120].sum(axis=1).mean() == pytest.approx(100 * 20 / 500, abs=0.5)
    z = (drawn[:, 100:].mean(axis=0) - 0.2) / np.sqrt(0.16 / 60)
    assert abs(z).max() < 4.5


def test_too_few_to_match_with_is_refused():
    edit, chosen = np.ones(N, np.float32), np.arange(N) < 301
    with pytest.raises(ValueError, match="301 coordinates cannot be matched: `within` has only 299 others"):
        matched(to_tree(edit), to_tree(chosen), to_tree(np.ones(N, bool)), 0)
    half = to_tree(np.arange(N) < 300)
    found = matched(to_tree(edit), half, to_tree(np.ones(N, bool)), 0)
    np.testing.assert_array_equal(flat(found), ~flat(half))


def test_partners_in_the_same_tensor_are_those_of_a_greedy_search_there():
    rng = np.random.default_rng(3)
    edit = (rng.normal(size=N) * 10.0 ** rng.integers(-7, -3, N)).astype(np.float32)
    chosen = rng.random(N) < 0.2
    chosen[120:240] = rng.random(120) < 0.7  # more than half of one layer: the smallest have no partner
    found = flat(matched(to_tree(edit), to_tree(chosen), to_tree(np.ones(N, bool)), 0, same_tensor=True))
    assert not (found & chosen).any()
    for start in range(0, N, 120):
        part = slice(start, start + 120)
        own, n = seen(edit[part])[chosen[part]], int((~chosen[part]).sum())
        kept = chosen[part] & (seen(edit[part]) >= np.sort(own)[::-1][min(n, own.size) - 1])
        np.testing.assert_array_equal(
            np.sort(seen(edit[part][found[part]])), greedy(seen(edit[part]), kept, ~chosen[part])
        )


def test_permuted_magnitudes_keep_the_set_and_its_length_and_take_the_gradients_sign():
    rng = np.random.default_rng(4)
    edit, gradient = rng.normal(size=(2, N)).astype(np.float32)
    chosen = rng.random(N) < 0.3
    made = flat(permuted(to_tree(edit), to_tree(chosen), to_tree(gradient), 0))
    assert not made[~chosen].any()
    np.testing.assert_array_equal(np.sort(abs(made[chosen])), np.sort(abs(edit[chosen])))
    np.testing.assert_array_equal(np.sign(made[chosen]), np.sign(gradient[chosen]))
    assert abs(np.corrcoef(abs(made[chosen]), abs(edit[chosen]))[0, 1]) < 4 / np.sqrt(chosen.sum())


def test_controls_have_the_size_and_the_support_of_the_set():
    rng = np.random.default_rng(2)
    edit, scores = rng.normal(size=(2, N)).astype(np.float32)
    edit[rng.random(N) < 0.1] = 0.0
    scores[edit == 0] = 0.0
    route, gradient = rng.random(N) < 0.4, rng.normal(size=N).astype(np.float32)
    trial: Any = SimpleNamespace(
        edit=to_tree(edit), n=N, scores={"rule": to_tree(scores)}, gradient=to_tree(gradient),
        chosen_mask=lambda c: largest(trial.scores["rule"], c.size, trial.places[c.place]),
        places={ROUTE: support(to_tree(edit), to_tree(route)), ALL: support(to_tree(edit))},
    )  # fmt: skip
    chosen: Any = SimpleNamespace(rule="rule", place=ROUTE, size=25, strength=0.5)
    mask = largest(trial.scores["rule"], 25, trial.places[ROUTE])
    curves = controls(trial, chosen)
    made = {name: flat(curve.make(0.25 if name == "whole" else 25, 0)[0]) for name, curve in curves.items()}
    informed = {"matched_in_tensor", "permuted", "sign_step"}
    assert set(made) == {"random", "matched", "largest", "out_of_route", "whole"} | informed
    assert {name: curve.make(curve.least, 0)[1] for name, curve in curves.items()} == dict.fromkeys(made, 0.5) | {
        "whole": curves["whole"].least
    }
    inside = route & (edit != 0)
    for name in ("random", "matched", "largest"):
        assert made[name].sum() == 25 and not (made[name] & ~inside).any(), name
    biggest = np.argsort(-abs(edit) * route)[:25]
    assert set(np.flatnonzero(made["largest"])) == set(biggest)
    best_outside = np.argsort(-scores * ~route)[:25]
    assert set(np.flatnonzero(made["out_of_route"])) == set(best_outside)
    np.testing.assert_array_equal(made["whole"], edit != 0)
    assert not (made["matched"] & flat(mask)).any()
    np.testing.assert_array_equal(made["permuted"], flat(mask))
    # As many coordinates as the set, anywhere, and together a step as long as the set's.
    assert set(np.flatnonzero(made["sign_step"])) == set(np.argsort(-abs(gradient))[:25])
    step = flat(curves["sign_step"].make(25, 0)[2]) * made["sign_step"]
    assert np.linalg.norm(step) == pytest.approx(np.linalg.norm(edit * flat(mask)), rel=1e-5)
    np.testing.assert_array_equal(np.sign(step), np.sign(gradient) * made["sign_step"])
    trial.gradient = None
    assert set(controls(trial, chosen)) == set(made) - {"permuted", "sign_step"}
    trial.gradient = to_tree(gradient)
    chosen.place = ALL
    anywhere = controls(trial, chosen)
    assert set(anywhere) == set(made) - {"out_of_route"}
    assert size(anywhere["random"].make(25, 0)[0]) == 25


def test_eight_devices_match_what_one_matches(mesh8: Mesh):
    rng = np.random.default_rng(3)
    edit = np.round(4 * rng.normal(size=N)).astype(np.float32)
    axes = {"embedding": ("rows", "embed"), "layers": {"up": {"kernel": (None, "embed", "mlp")}}}

    def place(x: Any) -> Any:
        return jax.tree.map(
            lambda a, v: jax.device_put(v, named(mesh8, *a)), axes, x, is_leaf=lambda a: type(a) is tuple
        )

    mask = largest(to_tree(abs(edit)), 60)
    one = matched(to_tree(edit), mask, support(to_tree(edit)), 7)
    edit8, mask8 = place(to_tree(edit)), place(mask)
    eight = matched(edit8, mask8, support(edit8), 7)
    np.testing.assert_array_equal(flat(one), flat(eight))
    assert jax.tree.map(lambda x: x.sharding, eight) == jax.tree.map(lambda x: x.sharding, edit8)
    assert not (flat(eight) & flat(mask)).any() and size(complement(eight)) == N - 60
