"""The edit with random signs: sums and signs against NumPy, and that training itself is unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdrl_jax import tree
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named
from mdrl_jax.rl.random_signs import moved, random_signs, signed_edit
from mdrl_jax.rl.trainer import OptimizerConfig, Transforms, make_optimizer, state_shardings

RATES = (0.1, 0.1, 0.02, 0.02, 0.02)


def parameters(rng: np.random.Generator, size: int = 1):
    return {
        "embedding": jnp.asarray(rng.normal(size=(40 * size, 30)), jnp.float32),
        "layers": {"up": {"kernel": jnp.asarray(rng.normal(size=(3, 50 * size, 20)), jnp.float32)}},
    }


def followed(seed: int, updates, rates=RATES, first: int = 0, state=None):
    """The state of the transformation after some updates; each update comes out as it went in."""
    transform = random_signs(seed)
    state = transform.init(updates[0]) if state is None else state
    step = jax.jit(lambda u, s, rate: transform.update(u, s, None, learning_rate=rate))
    for update, rate in list(zip(updates, rates, strict=True))[first:]:
        out, state = step(update, state, rate)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, out, update))
    return state


def flat(x) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(x)])


def test_each_update_enters_with_its_size_its_learning_rate_and_a_sign():
    rng = np.random.default_rng(0)
    updates = [parameters(rng) for _ in RATES]
    before = np.zeros_like(flat(updates[0]))
    for n in range(1, len(RATES) + 1):
        now = flat(signed_edit((optax.EmptyState(), followed(3, updates[:n], RATES[:n]))))
        np.testing.assert_allclose(np.abs(now - before), RATES[n - 1] * np.abs(flat(updates[n - 1])), atol=1e-6)
        before = now


def test_signs_are_balanced_and_independent_of_step_entry_and_seed():
    ones = jax.tree.map(jnp.ones_like, parameters(np.random.default_rng(0), 20))
    per_step = {}
    for seed in (0, 1):
        total, signs = np.zeros(1), []
        for n in range(1, 5):
            now = flat(followed(seed, [ones] * n, (1.0,) * n).total)
            signs.append(now - total)
            total = now
        per_step[seed] = np.stack(signs)
    everything = np.concatenate([per_step[0], per_step[1]])
    assert set(np.unique(everything)) == {-1.0, 1.0}
    bound = 4.5 / np.sqrt(everything.shape[1])
    assert abs(everything.mean(axis=1)).max() < bound
    correlations = np.corrcoef(everything)[np.triu_indices(8, 1)]
    assert abs(correlations).max() < bound
    leaf = everything[:, : 800 * 30].reshape(8, 800, 30)  # neighbours along rows and columns of one tensor
    for lag in range(1, 9):
        for product in (leaf[:, lag:] * leaf[:, :-lag], leaf[:, :, lag:] * leaf[:, :, :-lag]):
            assert abs(product.mean()) < 4.5 / np.sqrt(product.size)


def test_the_sum_is_gaussian_after_many_equal_steps():
    """Equal steps with random signs are the null of the scale-free figures: kurtosis 3 − 2/n after n of them."""
    ones, n = jax.tree.map(jnp.ones_like, parameters(np.random.default_rng(0), 20)), 20
    total = flat(followed(5, [ones] * n, (1.0,) * n).total)
    assert abs(total.var() / n - 1) < 0.03
    assert abs(np.mean(total**4) / total.var() ** 2 - (3 - 2 / n)) < 0.1


def test_a_resumed_sum_goes_on_and_another_seed_gives_another():
    rng = np.random.default_rng(1)
    updates = [parameters(rng) for _ in RATES]
    whole, half = followed(7, updates), followed(7, updates[:2], RATES[:2])
    again = followed(7, updates, first=2, state=half)
    assert np.array_equal(flat(whole.total), flat(again.total))
    assert not np.array_equal(flat(whole.total), flat(followed(8, updates).total))


def test_in_the_chain_it_is_sharded_like_the_parameters_and_changes_no_update():
    params = parameters(np.random.default_rng(2), 4)
    grads = parameters(np.random.default_rng(3), 4)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    shardings = jax.tree.map(lambda _: named(mesh), params)
    shardings["embedding"] = named(mesh, "batch")
    plain, signed = (make_optimizer(OptimizerConfig(), t) for t in (Transforms(), Transforms((), (random_signs(0),))))
    placed = state_shardings(signed, jax.eval_shape(lambda: params), shardings, mesh)
    assert signed_edit(placed.opt_state)["embedding"] == shardings["embedding"]
    expected, _ = plain.update(grads, plain.init(params), params)
    found, state = signed.update(grads, signed.init(params), params, learning_rate=0.5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, expected, found))
    np.testing.assert_allclose(np.abs(flat(signed_edit(state))), 0.5 * np.abs(flat(expected)), rtol=1e-6)
    np.testing.assert_array_equal(flat(moved(params, state)), flat(tree.add(params, signed_edit(state))))
