"""The assumptions of the contraction theorem against dense algebra: explicit matrices, and a tiny decoder."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mdrl_jax.analysis import probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace import conflict, theorem
from mdrl_jax.config import default, parse
from mdrl_jax.model import huggingface
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, param_shardings
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.policy import join
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order.decoder_parts import lift
from mdrl_jax.stats import eigenvalues
from tests.conftest import noisy

R, N = 24, 40  # coordinates of the space of S, and of all parameters
Array = np.ndarray


def to_dense(block: Any) -> Array:
    return np.concatenate([np.asarray(block["route"], float), np.asarray(block["rest"], float)], axis=1)


def judged(basis_kN: Array, h_MNN: Array, g_MN: Array, counts: Any, at_once: int = 3) -> theorem.Judged:
    """S, and each block's mean Hessian and mean gradient as dense arrays; `basis_kN` is 0 outside the space."""

    def product(h_NN: Array) -> Callable[[Any], Any]:
        def times(block: Any) -> Any:
            out = jnp.asarray(to_dense(block) @ h_NN, jnp.float32)
            return {"route": out[:, :R], "rest": out[:, R:]}

        return times

    def split(block: Any) -> tuple[Any, Any]:
        x_bN = to_dense(block)
        rest = jnp.asarray(x_bN - x_bN @ basis_kN.T @ basis_kN, jnp.float32)
        return basis_kN @ x_bN.T, {"route": rest[:, :R], "rest": rest[:, R:]}

    return theorem.Judged(
        vectors={"route": jnp.asarray(basis_kN[:, :R], jnp.float32)},
        values=np.arange(1.0, 1 + len(basis_kN)),
        counts_M=np.asarray(counts, float),
        slopes_Mk=np.asarray(counts, float)[:, None] * (g_MN @ basis_kN.T),
        products=[product(h) for h in h_MNN],
        lift=lambda z: z | {"rest": jnp.zeros((z["route"].shape[0], N - R))},
        split=split,
        at_once=at_once,
    )


def orthonormal(rng: np.random.Generator, k: int) -> Array:
    return np.concatenate([np.linalg.qr(rng.normal(size=(R, k)))[0].T, np.zeros((k, N - R))], axis=1)


def quiet(text: str) -> None:
    pass


def test_figures_are_those_of_dense_matrices_with_products_of_different_blocks_only():
    rng = np.random.default_rng(0)
    counts, basis = np.array([2.0, 3, 2, 1, 3]), orthonormal(rng, 4)
    h = rng.normal(size=(5, N, N)) + 0.7 * basis.T @ basis + np.eye(N) + 2 * np.outer(basis[0], np.eye(N)[-1])
    h, g = h + h.transpose(0, 2, 1), rng.normal(size=(5, N)) + 3 * basis[1]
    record = theorem.assumptions(judged(basis, h, g, counts), "nats", 2.0, quiet)
    assert (record["k"], record["blocks"], record["n_prompts"]) == (4, 5, 11)
    assert record["own"] == {"mu": 1.0, "lambda_max": 4.0}

    rest = np.eye(N) - basis.T @ basis
    r_MNk, c_Mk = counts[:, None, None] * (rest @ h @ basis.T), counts[:, None] * (g @ basis.T)
    apart = [(a, b) for a in range(5) for b in range(5) if a != b]
    pairs = sum(counts[a] * counts[b] for a, b in apart)
    gram = sum(r_MNk[a].T @ r_MNk[b] for a, b in apart) / pairs
    own, rows = r_MNk.transpose(0, 2, 1) @ r_MNk, r_MNk.transpose(0, 2, 1) @ r_MNk.sum(0)
    square = eigenvalues.squared_norm(own, rows, counts)
    # The jackknife's own check: the plain value is the top eigenvalue over pairs of different blocks.
    without = []
    for out in range(5):
        kept = [(a, b) for a, b in apart if out not in (a, b)]
        part = sum(r_MNk[a].T @ r_MNk[b] for a, b in kept) / sum(counts[a] * counts[b] for a, b in kept)
        without.append(np.linalg.eigvalsh((part + part.T) / 2)[-1])
    plain = np.linalg.eigvalsh((gram + gram.T) / 2)[-1]
    corrected = 5 * plain - 4 * np.mean(without)
    assert square.value == pytest.approx(np.clip(corrected, square.low, square.high))
    assert record["epsilon"]["estimate"] == pytest.approx(np.sqrt(max(square.value, 0)), rel=1e-4)
    assert record["epsilon"]["ci95"] == pytest.approx(np.sqrt(np.maximum([square.low, square.high], 0)), rel=1e-4)

    length = sum(c_Mk[a] @ c_Mk[b] for a, b in apart) / pairs
    assert record["gradient"]["estimate"] == pytest.approx(np.sqrt(length), rel=1e-6)
    inside = counts[:, None, None] * (basis @ h @ basis.T)
    for name, largest in (("mu", False), ("lambda_max", True)):
        want = eigenvalues.of_mean(inside, counts, largest)
        assert record[name]["estimate"] == pytest.approx(want.value, rel=1e-4)
        assert record[name]["ci95"] == pytest.approx([want.low, want.high], rel=1e-4)
    assert {record[name]["null"] for name in ("gradient", "mu", "lambda_max", "epsilon", "shift")} == {0.0}
    json.dumps(record, allow_nan=False)


def test_the_shift_is_the_distance_of_the_minimum_in_s_and_needs_a_positive_mu():
    """All blocks are alike, so nothing is noise: the minimum of gᵀx + ½xᵀHx in S lies at −H_SS⁻¹g."""
    rng = np.random.default_rng(1)
    basis, turn = orthonormal(rng, 3), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    h_SS = turn @ np.diag([4.0, 2.0, 0.5]) @ turn.T
    g_S = np.array([0.3, -0.2, 0.1])
    h, g = np.tile(basis.T @ h_SS @ basis, (6, 1, 1)), np.tile(g_S @ basis, (6, 1))
    record = theorem.assumptions(judged(basis, h, g, np.ones(6)), "nats", 2.0, quiet)
    assert record["shift"]["estimate"] == pytest.approx(np.linalg.norm(np.linalg.solve(h_SS, g_S)) / 2, rel=1e-5)
    assert record["mu"]["estimate"] == pytest.approx(0.5, rel=1e-5)
    assert record["mu"]["ci95"] == pytest.approx([0.5, 0.5], rel=1e-5)
    assert record["lambda_max"]["estimate"] == pytest.approx(4.0, rel=1e-5)
    assert record["epsilon"]["ci95"][1] < 1e-6  # rounding in float32

    flat = theorem.assumptions(judged(basis, -h, g, np.ones(6)), "nats", 2.0, quiet)
    assert flat["mu"]["estimate"] == pytest.approx(-4.0, rel=1e-5)
    assert flat["shift"]["estimate"] is None and "μ includes 0" in flat["shift"]["reason"]
    assert theorem.assumptions(judged(basis, h, g, np.ones(6)), "nats", 0.0, quiet)["shift"]["estimate"] is None
    with pytest.raises(ValueError, match="not finite"):
        theorem.assumptions(judged(basis, np.nan * h, g, np.ones(6)), "nats", 2.0, quiet)


def test_noise_of_single_blocks_adds_nothing_to_what_leaves_s():
    """H leaves S invariant, but every block does not: ‖R_b‖ is far above ε, whose interval begins at 0."""
    rng = np.random.default_rng(2)
    basis = orthonormal(rng, 4)
    noise = rng.normal(size=(12, N, N))
    h = np.eye(N) + 2 * basis.T @ basis + 0.3 * (noise + noise.transpose(0, 2, 1))
    record = theorem.assumptions(judged(basis, h, np.zeros((12, N)), np.full(12, 2)), "nats", 1.0, quiet)
    rest = np.eye(N) - basis.T @ basis
    one = np.mean([np.linalg.norm(rest @ x @ basis.T, 2) for x in h])
    of_mean = np.linalg.norm(rest @ h.mean(0) @ basis.T, 2)
    assert record["epsilon"]["ci95"][0] == 0 and record["epsilon"]["estimate"] < 0.7 * of_mean < 0.3 * one


# --- On a decoder -----------------------------------------------------------------------------------------------------

TINY = ModelConfig("llama", vocab_size=8, n_layers=1, d_model=4, d_mlp=6, n_heads=2, n_kv_heads=2, head_dim=2)
P, G, START, LENGTH = 16, 2, 2, 5
BLOCKS = 5  # of the 8 prompts of a half
ROUTE_LF = np.array([[1, 0, 1, 1, 0, 0]], bool)
TEMPERATURE = 0.7


def on_devices(mesh: Any) -> tuple[Runtime, Any]:
    """A runtime for analyses of the tiny decoder, and parameters."""
    c = default()
    c.rollout.sampling.temperature = TEMPERATURE
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (START,), (LENGTH - START,)
    c.analyze.update({"prompts": P, "batch": 4, "group_size": G, "path_prompts": 4, "lanczos_block": 2, "vectors": 3})
    model = Decoder(TINY)
    boxed = param_shapes(model)
    params = noisy(huggingface.random_params(model, mesh, seed=0))
    runtime = Runtime(parse(c), mesh, model, None, None, param_shardings(mesh, boxed), {}, {}, None)  # pyright: ignore
    return runtime, params


def completions() -> Sample:
    """One block of each half has no prompt whose rewards differ, and a prompt of each half has no success."""
    rng = np.random.default_rng(3)
    rewards = np.array([[1.0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 1], [0, 1], [1, 1]] * 2)
    tokens, mask = rng.integers(1, TINY.vocab_size, (P, G, LENGTH - START)), np.ones((P, G, LENGTH - START))
    mask[::3, 1, -1] = 0
    prompts, valid = rng.integers(1, TINY.vocab_size, (P, START)), np.ones((P, START), bool)
    valid[::4, 0] = False
    return Sample(prompts, valid, tokens, mask, rewards, np.ones((P, G), bool))


def measured(runtime: Runtime, params: Any, objective: str, vectors: list[Any], moved: Any) -> dict[str, Any]:
    with jax.set_mesh(runtime.mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(theorem, "N_BLOCKS", BLOCKS)
        made = probe.build(runtime, runtime.config.train.grpo)
        at = conflict.place(made, params, moved, conflict.route(ROUTE_LF))
        found = [(v, np.array([3.0, 2.0, 1.0])) for v in vectors]
        return theorem.measure(made, at, objective, completions(), found, quiet)


def spanning(seed: int) -> Any:
    """Three orthonormal vectors of the route, 0 on its padding (16 places a layer)."""
    rng, mask = np.random.default_rng(seed), conflict.route(ROUTE_LF).mask_LR
    shapes = {"gate": (1, 4, 16), "up": (1, 4, 16), "down": (1, 16, 4)}
    where = {name: mask[:, :, None] if name == "down" else mask[:, None, :] for name in shapes}
    raw = [{n: rng.normal(size=s) * where[n] for n, s in shapes.items()} for _ in range(3)]
    flat = np.stack([np.concatenate([v[n].ravel() for n in shapes]) for v in raw])
    rows = np.split(np.linalg.qr(flat.T)[0].T, np.cumsum([np.prod(s) for s in shapes.values()])[:-1], axis=1)
    return {n: jnp.asarray(x.reshape(3, *s), jnp.float32) for (n, s), x in zip(shapes.items(), rows, strict=True)}


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple[Runtime, Any, Any]]:
    """A probe of the tiny decoder, its parameters, and a displacement."""
    jax.config.update("jax_disable_most_optimizations", True)
    runtime, params = on_devices(make_mesh(MeshConfig(), jax.devices()[:1]))
    yield runtime, params, jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def dense(tiny) -> tuple[Array, Array]:
    """∇ and ∇² of log π of every completion, [P, G, n] and [P, G, n, n], by the log-probs of the trainer."""
    runtime, params, _ = tiny
    sample = completions()
    flat, unravel = ravel_pytree(jax.tree.map(np.asarray, params))

    def log_prob(x: Any, tokens_T: Any, valid_T: Any, mask_T: Any) -> Any:
        kwargs = {"start": START, "temperature": TEMPERATURE}
        logp = token_log_probs(runtime.model, unravel(x), tokens_T[None], valid_T[None], **kwargs)[0]
        return jnp.where(mask_T > 0, logp, 0.0).sum()

    tokens, valid = join(sample.prompts_PT, sample.valid_PT, sample.tokens_PGT, sample.mask_PGT)
    rows = tokens, valid, sample.mask_PGT.reshape(P * G, -1)
    both = jax.jit(jax.vmap(lambda *row: (jax.grad(log_prob)(flat, *row), jax.hessian(log_prob)(flat, *row))))
    first, second = (np.asarray(x, float) for x in both(*rows))
    return first.reshape(P, G, -1), second.reshape(P, G, flat.size, flat.size)


def to_flat(tree: Any) -> Array:
    return np.asarray(ravel_pytree(jax.tree.map(np.asarray, tree))[0], float)


@pytest.mark.parametrize("objective", ["success_nll", "reward"])
def test_a_decoder_has_the_figures_of_its_dense_hessian(tiny, dense, objective: str):
    runtime, params, moved = tiny
    sample, vectors = completions(), [spanning(1), spanning(2)]
    record = measured(runtime, params, objective, vectors, moved)
    first_PGN, second_PGNN = dense
    route = conflict.route(ROUTE_LF)
    for half, found in enumerate(record["halves"]):
        prompts = np.arange(P).reshape(2, -1)[1 - half]  # judged on the other half
        if objective == "success_nll":
            prompts = prompts[sample.success_PG[prompts].any(axis=1)]
            chosen = prompts, sample.success_PG[prompts].argmax(axis=1)
            g_P, h_P = -first_PGN[chosen], -second_PGNN[chosen]
        else:
            adv_PG = (sample.rewards_PG - sample.rewards_PG[:, ::-1])[prompts]  # of two completions
            g_P = -np.einsum("pg,pgn->pn", adv_PG, first_PGN[prompts]) / G
            outer = first_PGN[..., None] * first_PGN[..., None, :] + second_PGNN
            h_P = -np.einsum("pg,pgmn->pmn", adv_PG, outer[prompts]) / G
        parts = np.array_split(np.arange(len(g_P)), BLOCKS)
        one = [jax.tree.map(lambda x, i=i: x[i], vectors[half]) for i in range(3)]
        v_kN = np.stack([to_flat(lift(z, route.index_LR, route.mask_LR, params)) for z in one])
        np.testing.assert_allclose(v_kN @ v_kN.T, np.eye(3), atol=1e-5)
        counts = np.array([len(part) for part in parts], float)
        h_M, g_M = (np.stack([x[part].sum(0) for part in parts]) for x in (h_P, g_P))
        inside = v_kN @ h_M @ v_kN.T
        r_M = h_M @ v_kN.T - v_kN.T @ inside
        square = eigenvalues.squared_norm(r_M.transpose(0, 2, 1) @ r_M, r_M.transpose(0, 2, 1) @ r_M.sum(0), counts)
        want = {
            "gradient": eigenvalues.root(eigenvalues.squared_length(g_M @ v_kN.T, counts)),
            "mu": eigenvalues.of_mean(inside, counts, False),
            "lambda_max": eigenvalues.of_mean(inside, counts, True),
            "epsilon": eigenvalues.root(square),
        }
        assert (found["blocks"], found["n_prompts"], found["k"]) == (BLOCKS, len(g_P), 3)
        for name, x in want.items():
            close = pytest.approx([x.value, x.low, x.high], abs=5e-4 * max(abs(x.low), abs(x.high)))
            assert [found[name]["estimate"], *found[name]["ci95"]] == close, name
        within = np.linalg.norm(v_kN @ to_flat(moved))
        assert found["norms"]["within"] == pytest.approx(within, rel=1e-4)
        outside = np.sqrt(to_flat(moved) @ to_flat(moved) - within**2)
        assert found["norms"]["outside"] == pytest.approx(outside, rel=1e-4)


@pytest.mark.parametrize("objective", ["success_nll", "reward"])
def test_a_part_of_the_prompts_has_its_share_of_the_terms(tiny, objective: str):
    runtime, rng = tiny[0], np.random.default_rng(4)
    packed = conflict.pack(probe.build(runtime, runtime.config.train.grpo), objective, completions(), np.arange(P))
    jets, prompts = rng.normal(size=(3, *packed.sample.mask_PGT.shape)), np.array([1, 2, 5, 7, 11, 13])
    part = packed.part(prompts, 2)
    rows = np.flatnonzero(np.isin(packed.kept, prompts))
    assert 0 < part.sample.n_prompts == rows.size and part.n == 6
    for order in (1, 2):
        whole = packed.by_prompt(jets, order)
        assert np.abs(whole).sum() > 0
        np.testing.assert_allclose(part.by_prompt(jets[:, rows], order), whole[prompts])


def test_too_few_blocks_with_something_to_measure_are_a_reason(tiny):
    runtime, params, moved = tiny
    sample = completions()
    few = np.zeros((P, G))
    few[:3, 0] = few[8:11, 0] = 1.0
    with jax.set_mesh(runtime.mesh):
        made = probe.build(runtime, runtime.config.train.grpo)
        at = conflict.place(made, params, moved, conflict.route(ROUTE_LF))
        found = [(spanning(1), [1.0])] * 2
        for objective in ("reward", "success_nll"):
            scarce = dataclasses.replace(sample, rewards_PG=few)
            halves = theorem.measure(made, at, objective, scarce, found, quiet)["halves"]
            assert [h["k"] for h in halves] == [3, 3] and all("3 blocks" in h["reason"] for h in halves)


@pytest.mark.slow  # compiles every program a second time
def test_eight_devices_give_the_figures_of_one(tiny, mesh8):
    vectors, found = [spanning(1), spanning(2)], []
    for runtime, params, moved in (tiny, (*on_devices(mesh8), tiny[2])):
        moved = jax.device_put(moved, runtime.shardings)
        found.append(measured(runtime, params, "success_nll", vectors, moved)["halves"])
    for one, eight in zip(*found, strict=True):
        for name in ("gradient", "mu", "lambda_max", "epsilon"):
            close = pytest.approx([one[name]["estimate"], *one[name]["ci95"]], abs=1e-3 * one["lambda_max"]["ci95"][1])
            assert [eight[name]["estimate"], *eight[name]["ci95"]] == close, name
