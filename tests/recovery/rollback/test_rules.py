"""Rules and routes against numpy; on a quadratic with a planted conflict the rules beat every control of their size."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mdrl_jax import tree
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import param_shardings
from mdrl_jax.recovery.rollback.controls import matched
from mdrl_jax.recovery.rollback.rules import SCORES, Evidence, magnitude, rollback, route_mask
from mdrl_jax.recovery.rollback.selection import complement, largest, random_set, size, support, top

pytestmark = pytest.mark.usefixtures("fast_compile")

D, F, L = 4, 6, 3
SHAPES = {
    "embedding": (7, D),
    "layers": {
        "gate": {"kernel": (L, D, F)},
        "up": {"kernel": (L, D, F)},
        "down": {"kernel": (L, F, D)},
        "mlp_norm": {"scale": (L, D)},
    },
}
N = 7 * D + 3 * L * D * F + L * D


def flat(x: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(x)])


def to_tree(x: np.ndarray) -> Any:
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    parts = np.split(x, np.cumsum([np.prod(s) for s in leaves])[:-1])
    return structure.unflatten([jax.numpy.asarray(p.reshape(s)) for p, s in zip(parts, leaves, strict=True)])


def draw(rng: np.random.Generator, n: int = 1) -> list[np.ndarray]:
    return [rng.normal(size=N).astype(np.float32) for _ in range(n)]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_rules_are_their_formulas():
    rng = np.random.default_rng(0)
    edit, own, peak, gradient, fisher, moved = draw(rng, 6)
    fisher = fisher**2
    kappa = 1.7
    evidence = Evidence(*map(to_tree, (edit, own, peak, gradient, fisher)), kappa, to_tree(moved))
    expected = {
        "adding": peak * edit + 0.5 * kappa * fisher * edit**2,
        "removing": gradient * edit - 0.5 * kappa * fisher * edit**2,
        "opposition": -own * edit,
        "displacement": edit * moved - 0.5 * edit**2,
        "magnitude": abs(edit),
    }
    assert set(expected) == set(SCORES)
    with jax.numpy_dtype_promotion("strict"):
        for name, rule in SCORES.items():
            np.testing.assert_allclose(flat(rule(evidence)), expected[name], rtol=1e-5, atol=1e-6)
            jitted = program("rule", rule)(evidence)
            np.testing.assert_allclose(flat(jitted), expected[name], rtol=1e-5, atol=1e-6)
    first = evidence.replace(fisher=None)
    np.testing.assert_allclose(flat(SCORES["adding"](first)), peak * edit, rtol=1e-6)
    np.testing.assert_allclose(flat(SCORES["removing"](first)), gradient * edit, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("adding", "peak_gradient"),
        ("removing", "gradient"),
        ("opposition", "own_edit"),
        ("displacement", "displacement"),
    ],
)
def test_a_rule_says_what_it_lacks(rule: str, field: str):
    with pytest.raises(ValueError, match=f"needs {field}, which was not given"):
        SCORES[rule](Evidence(to_tree(np.zeros(N))))


def test_a_rule_predicts_what_one_coordinate_does_to_a_quadratic_loss():
    """Rule (a) is L(θ* + δ_j e_j) − L(θ*), rule (b) L(θ_T) − L(θ_T − δ_j e_j), exactly, with κF the diagonal of H."""
    rng = np.random.default_rng(1)
    edit, gradient = (x.astype(np.float64) for x in draw(rng, 2))
    half = rng.normal(size=(N, N))
    hessian, kappa = half @ half.T / N, 0.5

    def loss(moved: np.ndarray) -> float:
        return gradient @ moved + 0.5 * moved @ hessian @ moved

    adding = [loss(edit * (np.arange(N) == j)) - loss(0 * edit) for j in range(N)]
    removing = [loss(edit) - loss(edit * (np.arange(N) != j)) for j in range(N)]
    evidence = Evidence(
        to_tree(edit.astype(np.float32)),
        peak_gradient=to_tree(gradient.astype(np.float32)),
        gradient=to_tree((gradient + hessian @ edit).astype(np.float32)),
        fisher=to_tree((np.diag(hessian) / kappa).astype(np.float32)),
        kappa=kappa,
    )
    np.testing.assert_allclose(flat(SCORES["adding"](evidence)), adding, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat(SCORES["removing"](evidence)), removing, rtol=1e-4, atol=1e-5)


# --- transform --------------------------------------------------------------------------------------------------------


def test_rollback_is_its_formula():
    rng = np.random.default_rng(2)
    theta, edit = draw(rng, 2)
    mask = rng.random(N) < 0.3
    found = flat(rollback(to_tree(theta), to_tree(edit), to_tree(mask), 0.6))
    np.testing.assert_allclose(found, theta - 0.6 * mask * edit, rtol=1e-6, atol=1e-6)
    whole = flat(rollback(to_tree(theta + edit), to_tree(edit), to_tree(np.ones(N, bool)), 1.0))
    np.testing.assert_allclose(whole, theta, atol=1e-6)


def test_a_route_is_the_columns_and_rows_of_its_neurons(mesh8: Any, tiny_models: Any):
    model = tiny_models["qwen2"].model
    boxed = param_shapes(model)
    shardings = param_shardings(mesh8, boxed)
    like = jax.tree.map(lambda x, s: jax.device_put(np.zeros(x.value.shape, np.float32), s), boxed, shardings,
                        is_leaf=lambda x: hasattr(x, "names"))  # fmt: skip
    width = model.config.d_mlp
    chosen_LF = np.random.default_rng(3).random((model.config.n_layers, width)) < 0.2
    mask = route_mask(like, chosen_LF)
    assert jax.tree.map(lambda m: (m.shape, m.sharding), mask) == jax.tree.map(lambda x: (x.shape, x.sharding), like)
    seen = {tree.path(keys): np.asarray(m) for keys, m in jax.tree_util.tree_leaves_with_path(mask)}
    for layer, neuron in np.ndindex(chosen_LF.shape):
        for name in ("gate", "up"):
            assert (seen.get(f"layers/{name}/kernel")[layer, :, neuron] == chosen_LF[layer, neuron]).all()
        assert (seen["layers/down/kernel"][layer, neuron] == chosen_LF[layer, neuron]).all()
    others = [m for name, m in seen.items() if name.split("/")[1:2] not in (["gate"], ["up"], ["down"])]
    assert len(others) == len(seen) - 3 and not any(m.any() for m in others)
    assert size(mask) == 3 * model.config.d_model * chosen_LF.sum()
    assert size(complement(mask)) == sum(m.size for m in seen.values()) - size(mask)


# --- a planted conflict -----------------------------------------------------------------------------------------------

HARMFUL = 12
COMPILED = program("rollback", rollback)


def planted() -> tuple[Evidence, Callable[[Any], float], Callable[[Any], float], np.ndarray, Any]:
    """Two quadratic domains: (evidence, A's loss, B's loss, the harmful coordinates, θ_T).

    B moves every coordinate to its own minimum, by 0.5 to 1.5 whatever it means to A. A is ten thousand times as
    steep on the harmful coordinates as on the others; how steep B is has nothing to do with that.
    """
    rng = np.random.default_rng(4)
    peak, own = (x.astype(np.float64) for x in draw(rng, 2))
    edit = rng.choice([-1.0, 1.0], N) * rng.uniform(0.5, 1.5, N)
    harmful = rng.permutation(N) < HARMFUL
    steep_A = np.where(harmful, 10.0, 0.001) * rng.uniform(0.5, 1.5, N)
    steep_B = rng.uniform(0.5, 1.5, N)
    gradient = 1e-4 * rng.normal(size=N)  # A stopped near its minimum, not in it

    def loss_A(theta: Any) -> float:
        moved = flat(theta) - peak
        return float(gradient @ moved + 0.5 * np.sum(steep_A * moved**2))

    def loss_B(theta: Any) -> float:
        return float(0.5 * np.sum(steep_B * (flat(theta) - peak - edit) ** 2))

    single = [x.astype(np.float32) for x in (edit, own, gradient, gradient + steep_A * edit, steep_A / 2)]
    return Evidence(*map(to_tree, single), 2.0), loss_A, loss_B, harmful, to_tree((peak + edit).astype(np.float32))


def gain_at(masks: Any, evidence: Evidence, losses: Any, theta: Any, price: float) -> float:
    """A's gain at the β at which B's loss has risen by `price`."""
    loss_A, loss_B = losses
    points = [COMPILED(theta, evidence.edit, masks, np.float32(b)) for b in np.linspace(0, 2, 21)]
    rises = [loss_B(p) - loss_B(theta) for p in points]
    gains = [loss_A(theta) - loss_A(p) for p in points]
    assert rises[-1] > price and np.all(np.diff(rises) > 0)
    return float(np.interp(price, rises, gains))


@pytest.mark.parametrize("rule", ["adding", "removing"])
def test_rules_find_a_planted_conflict_and_beat_controls_at_equal_loss_of_the_donor(rule: str):
    evidence, loss_A, loss_B, harmful, theta = planted()
    scores = SCORES[rule](evidence)
    mask = top(scores, HARMFUL / N)
    assert (flat(mask) == harmful).all()
    everywhere = support(evidence.edit)
    controls: dict[str, Callable[[int], Any]] = {
        "random": lambda seed: random_set(seed, HARMFUL, everywhere),
        "matched": lambda seed: matched(evidence.edit, mask, everywhere, seed),
        "largest": lambda seed: largest(magnitude(evidence.edit), HARMFUL),
        "whole": lambda seed: everywhere,
    }
    whole = loss_B(rollback(theta, evidence.edit, mask, 1.0)) - loss_B(theta)
    price = 0.5 * whole

    def gain(chosen: Any) -> float:
        return gain_at(chosen, evidence, (loss_A, loss_B), theta, price)

    ours = gain(mask)
    at_stake = loss_A(theta)
    assert ours > 0.5 * at_stake
    for name, make in controls.items():
        for seed in range(5 if name in ("random", "matched") else 1):
            control = make(seed)
            assert size(control) == (N if name == "whole" else HARMFUL)
            assert gain(control) < 0.5 * ours, name
