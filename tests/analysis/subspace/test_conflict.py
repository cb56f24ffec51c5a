"""The search for the conflict subspace and its null, on completions whose Hessians are dense matrices."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace import conflict
from mdrl_jax.config import AnalyzeSection
from mdrl_jax.parallel.programs import program

pytestmark = pytest.mark.usefixtures("fast_compile")

N, P, G = 40, 12, 4
POINT = {"gate": jnp.zeros((N // 2,)), "up": jnp.zeros((N // 2,))}
AT: Any = SimpleNamespace(point=POINT, fixed=())
TOLD: list[str] = []


def multiply(matrix: Any, block: Any) -> Any:
    rows = jnp.concatenate([block["gate"], block["up"]], axis=1) @ matrix
    return {"gate": rows[:, : N // 2], "up": rows[:, N // 2 :]}


multiplied = program("dense conflict operator", multiply)


def completion_hessians(seed: int, bulk: float = 0.1) -> np.ndarray:
    """[P·G, N, N]: each completion curves strongly along a direction of its own, and a little along all others."""
    rng = np.random.default_rng(seed)
    x_RN = rng.normal(size=(P * G, N)) * np.linspace(3.0, 0.3, N)
    noise_RNN = bulk * rng.normal(size=(P * G, N, N))
    return x_RN[:, :, None] * x_RN[:, None, :] + noise_RNN + noise_RNN.transpose(0, 2, 1)


def dense_probe(h_RNN: np.ndarray, **analyze: Any) -> Any:
    """Stands for a `Probe`: a completion's only token is its number, which is that of its Hessian in `h_RNN`."""
    fields = {"batch": 4, "group_size": G, "vectors": 4, "lanczos_steps": 6} | analyze
    section = dataclasses.replace(AnalyzeSection(), **fields)
    config = SimpleNamespace(seed=0, analyze=section, rollout=SimpleNamespace(completion_buckets=(2,)))

    def hessian(point: Any, fixed: Any, rows: Any, count: float) -> Any:
        of_row = lambda r: r.weight_B * (r.adv_B + r.success_B)  # noqa: E731
        matrix = sum(np.einsum("b,bij->ij", of_row(r), h_RNN[np.asarray(r.tokens_BT)[:, 1]]) for r in rows) / count
        return lambda block: multiplied(matrix.astype(np.float32), block)

    return SimpleNamespace(
        runtime=SimpleNamespace(config=config),
        rows=lambda sample, batch: sample.rows(batch),
        hessian=hessian,
    )


def completions(rewards_PG: np.ndarray) -> Sample:
    number_PG1 = np.arange(P * G).reshape(P, G, 1)
    return Sample(
        np.zeros((P, 1), int), np.ones((P, 1), bool), number_PG1, np.ones((P, G, 1)), rewards_PG, np.ones((P, G), bool)
    )


REWARDS_PG = np.random.default_rng(1).choice([0.0, 0.5, 1.0], (P, G))


def reward_matrix(h_RNN: np.ndarray, rewards_PG: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The Hessian of Σ A·h over completions, divided by their number, with leave-one-out advantages."""
    adv_PG = (rewards_PG - rewards_PG.mean(axis=1, keepdims=True)) * G / (G - 1)
    return np.einsum("pg,pgij->ij", adv_PG, h_RNN.reshape(P, G, N, N)[prompts]) / rewards_PG.size


def success_matrix(h_RNN: np.ndarray, rewards_PG: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean of h over the first success of each prompt."""
    first = [(p, row.tolist().index(1.0)) for p, row in zip(prompts, rewards_PG, strict=True) if 1.0 in row]
    return np.mean([h_RNN[p * G + g] for p, g in first], axis=0)


@pytest.mark.parametrize("objective", ["reward", "success_nll"])
def test_the_null_is_the_top_eigenvalue_under_permuted_rewards(objective: str) -> None:
    h_RNN = completion_hessians(0)
    probe = dense_probe(h_RNN, permutations=40)
    sample = completions(REWARDS_PG)
    parts = conflict.halves_of(sample)
    found, reason = conflict.null_values(probe, AT, objective, [sample.take(p) for p in parts], TOLD.append)
    assert [len(values) for values in found] == [40, 40] and reason == ""
    rng, exact = np.random.default_rng(0), np.zeros((40, 2))
    for i in range(80):
        prompts = parts[i % 2]
        rewards_PG = REWARDS_PG[prompts]
        if objective == "reward":
            shuffled = rng.permuted(rewards_PG, axis=1)
            assert (np.sort(shuffled, 1) == np.sort(rewards_PG, 1)).all()
            matrix = reward_matrix(h_RNN, shuffled, prompts)
        else:
            shuffled = rng.permutation(rewards_PG)
            matrix = success_matrix(h_RNN, shuffled, prompts)
        exact[i // 2, i % 2] = np.linalg.eigvalsh(matrix)[-1]
    # A search that stops at a residual of 0.1·λ comes from below, and is nearly there.
    ratio = np.transpose(found) / exact
    assert ratio.max() < 1 + 1e-4 and ratio.min() > 0.9 and ratio.mean() > 0.98
    assert (np.ptp(exact, axis=0) > 0.05 * exact.mean(axis=0)).all()


def test_there_is_no_null_of_what_has_not_converged_and_none_without_draws() -> None:
    sample = completions(REWARDS_PG)
    halves = [sample.take(p) for p in conflict.halves_of(sample)]
    flat = dense_probe(completion_hessians(0, bulk=3.0), permutations=40, lanczos_steps=1)
    found, reason = conflict.null_values(flat, AT, "reward", halves, TOLD.append)
    assert found == [[], []] and reason.endswith("of 80 permutations has not converged")
    off = dense_probe(completion_hessians(0), permutations=0)
    assert conflict.null_values(off, AT, "reward", halves, TOLD.append) == (
        [[], []], "not measured, since analyze.permutations is 0; configs/claims.py has 40",
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["reward", "success_nll"])
def test_only_converged_pairs_of_the_dense_hessian_are_found(objective: str) -> None:
    h_RNN = completion_hessians(2)
    sample = completions(REWARDS_PG)
    prompts = conflict.halves_of(sample)[1]
    matrix = {"reward": reward_matrix, "success_nll": success_matrix}[objective](h_RNN, REWARDS_PG[prompts], prompts)
    exact = np.linalg.eigvalsh(matrix)[::-1]

    def search(**analyze: Any) -> Any:
        probe = dense_probe(h_RNN, **analyze)
        return conflict.spectrum_of(probe, AT, conflict.pack(probe, objective, sample, prompts), 0, "", TOLD.append)

    enough, short = search(vectors=4, lanczos_steps=12), search(vectors=12, lanczos_steps=6)
    np.testing.assert_allclose(enough.values, exact[:4], rtol=0.02)
    assert 0 < short.values.size < 12
    assert (short.residuals <= 0.1 * short.values).all()
    assert (np.abs(short.values[:, None] - exact[None]).min(axis=1) <= short.residuals + 1e-4 * exact[0]).all()


def test_a_half_without_a_converged_pair_is_a_reason() -> None:
    probe = dense_probe(-np.tile(np.eye(N), (P * G, 1, 1)))
    sample = completions(REWARDS_PG)
    record, vectors = conflict.find(probe, AT, "success_nll", sample, ("qa", sample), TOLD.append)
    assert "no converged eigenpair" in record["reason"] and vectors == []
