"""pass@k and transitions: against enumerations of all draws, and the coverage of their intervals."""

import itertools

import numpy as np
import pytest

from mdrl_jax.stats.transitions import pass_at_k, right, transitions

RNG = np.random.default_rng(0)
BEFORE = RNG.random((30, 4)) < RNG.random((30, 1))
AFTER = RNG.random((30, 4)) < RNG.random((30, 1))


def test_an_answer_is_right_from_its_threshold():
    assert right(np.float32([[0.1 + 0.2, 0.29, 1.0]]), 0.3).tolist() == [[True, False, True]]
    assert right([[0.5, 0.99]], 0.5).all() and not right([[0.5, 0.99]], 1.0).any()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_sets_of_k_answers(k: int):
    every = [BEFORE[:, list(chosen)].any(axis=1) for chosen in itertools.combinations(range(4), k)]
    np.testing.assert_allclose(pass_at_k(BEFORE, k), np.mean(every, axis=0))


def test_pass_at_k_needs_k_answers():
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} needs 1 to 4 answers"):
            pass_at_k(BEFORE, k)


def test_transitions_count_answers_and_their_null_is_every_other_pairing_of_keys():
    found = transitions(BEFORE, AFTER)
    pairs = [(bool(a), bool(b)) for a, b in zip(BEFORE.ravel(), AFTER.ravel(), strict=True)]
    assert found.lost.value == pytest.approx(100 * pairs.count((True, False)) / 120)
    assert found.gained.value == pytest.approx(100 * pairs.count((False, True)) / 120)
    assert found.net.value == pytest.approx(100 * (AFTER.mean() - BEFORE.mean()))
    assert found.net.value == pytest.approx(found.gained.value - found.lost.value)
    others = [BEFORE[:, i] & ~BEFORE[:, j] for i, j in itertools.permutations(range(4), 2)]
    assert found.resampled and found.resampled.value == pytest.approx(100 * np.mean(others))
    assert found.lost_beyond and found.lost_beyond.value == pytest.approx(found.lost.value - found.resampled.value)
    same = transitions(BEFORE, BEFORE)  # the same keys at the same checkpoint change nothing
    assert same.lost.value == same.gained.value == 0 < same.lost.high
    alone = transitions(BEFORE[:, :1], AFTER[:, :1])
    assert alone.resampled is None and alone.lost_beyond is None
    with pytest.raises(ValueError, match="same prompts and samples"):
        transitions(BEFORE, AFTER[:, :2])


def test_whole_groups_are_the_unit():
    groups = np.arange(30) // 10
    assert transitions(BEFORE, AFTER, groups).lost.n == 3 and transitions(BEFORE, AFTER).lost.n == 30
    twice = transitions(*(np.concatenate([x, x]) for x in (BEFORE, AFTER)), np.tile(np.arange(30), 2))
    assert twice.lost.stderr == pytest.approx(transitions(BEFORE, AFTER).lost.stderr)


def test_intervals_cover_the_truth_where_few_answers_are_lost():
    """250 prompts × 4: most prompts are solved always or never; one in eight loses part of its success."""
    rng, n = np.random.default_rng(1), 300

    def world(prompts: int) -> tuple[np.ndarray, np.ndarray]:
        p = np.where(rng.random(prompts) < 0.5, rng.choice([0.0, 1.0], prompts), rng.random(prompts))
        return p, p * np.where(rng.random(prompts) < 0.125, rng.random(prompts), 1.0)

    p, q = world(300_000)
    truth = {"lost": p * (1 - q), "gained": (1 - p) * q, "net": q - p, "lost_beyond": p * (p - q)}
    covered: dict[str, list[bool]] = {name: [] for name in truth}
    for _ in range(n):
        p, q = world(250)
        found = transitions(*(rng.random((250, 4)) < x[:, None] for x in (p, q)))
        for name, values in truth.items():
            covered[name].append(getattr(found, name).includes(100 * values.mean()))
    for name, hits in covered.items():
        assert 0.92 - 0.014 < np.mean(hits) < 0.98 + 0.01, (name, np.mean(hits))
