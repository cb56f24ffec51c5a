"""The batches of a training step: which rows come first, and that a row keeps what belongs to it."""

import jax
import numpy as np

from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.policy import MOST_SHAPES, cut_shapes, join, policy_batch, row_order, shared_rows, trained
from mdrl_jax.stages.grpo import _computed


def test_rows_that_are_trained_come_first_and_keep_what_is_theirs():
    rng = np.random.default_rng(0)
    prompts_PT, valid_PT = rng.integers(1, 50, (4, 3)), np.ones((4, 3), bool)
    completions_PGT, logp_PGT = rng.integers(50, 99, (4, 2, 5)), rng.normal(size=(4, 2, 5)).astype(np.float32)
    mask_PGT = (np.arange(5) < rng.integers(1, 6, (4, 2, 1))).astype(np.float32)
    rewards_PG = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], np.float32)  # the first and the third group teach nothing
    kept = trained(rewards_PG, mask_PGT, np.ones((4, 2), bool), GRPOConfig(drop_zero_variance=True))
    length_B = 3 + mask_PGT.sum(axis=-1).reshape(8)
    order_B = row_order(kept.mask_PGT, length_B.reshape(4, 2))
    assert set(order_B[:4]) == {2, 3, 6, 7}
    assert (np.diff(length_B[order_B[:4]]) >= 0).all() and (np.diff(length_B[order_B[4:]]) >= 0).all()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = policy_batch(prompts_PT, valid_PT, completions_PGT, mask_PGT, logp_PGT, kept, 2, mesh)
    tokens_BT, valid_BT = join(prompts_PT, valid_PT, completions_PGT, mask_PGT)
    for found, expected in (
        (batch.tokens_BT, tokens_BT),
        (batch.valid_BT, valid_BT),
        (batch.grpo.sampler_logp_BT, logp_PGT.reshape(8, 5)),
        (batch.grpo.adv_B, kept.adv_PG.reshape(8)),
        (batch.grpo.mask_BT, kept.mask_PGT.reshape(8, 5)),
    ):
        np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected[order_B])
    assert not np.asarray(batch.grpo.mask_BT)[1].any() and np.asarray(batch.grpo.mask_BT)[0].any(axis=1).all()


def test_rows_that_share_their_prompt_stay_together():
    length_PG = np.array([[9, 2, 5, 3], [4, 4, 8, 1], [7, 6, 5, 5]])
    mask_PGT = np.ones((3, 4, 1))
    mask_PGT[0, 2:], mask_PGT[1] = 0, 0
    # Blocks of two: of the first prompt (2, 9) are trained and (3, 5) are not, of the second none, of the third all.
    expected = [[10, 11], [9, 8], [1, 0], [7, 4], [3, 2], [5, 6]]
    assert row_order(mask_PGT, length_PG, 2).reshape(-1, 2).tolist() == expected
    assert sorted(row_order(mask_PGT, length_PG, 4).reshape(-1, 4)[0]) == [8, 9, 10, 11]
    assert (shared_rows(16, 64, 1), shared_rows(12, 8, 1), shared_rows(16, 16, 16), shared_rows(4, 64, 8)) == (
        16, 4, 1, 4
    )  # fmt: skip


def test_the_lengths_of_micro_batches_are_buckets_below_those_of_the_batch():
    assert cut_shapes(12, 16, (), ()) == [(12, 16)]
    assert cut_shapes(12, 16, (12,), (8, 16)) == [(12, 8), (12, 16)]
    assert cut_shapes(12, 8, (12, 64), (8, 16)) == [(12, 8)]
    many = cut_shapes(192, 64, (96, 128, 192), (16, 32, 64))
    assert len(many) == MOST_SHAPES and many[0] == (96, 16) and many[-1] == (192, 64)
    assert [sum(pair) for pair in many] == sorted(sum(pair) for pair in many)


def test_the_share_of_real_tokens_counts_what_is_computed():
    shapes = cut_shapes(4, 6, (2, 4), (2, 6))
    prompt_B, completion_B = np.array([2, 1, 2, 4, 3, 4, 4, 4]), np.array([1, 2, 5, 6, 2, 1, 6, 6])
    trained_B = np.array([1, 1, 1, 0, 1, 1, 0, 0], bool)
    # Micro-batches of two rows: (2, 2), then (2, 6) because the untrained row may be cut, (4, 2), and none.
    found, positions = _computed(prompt_B, completion_B, trained_B, 4, 1, shapes)
    assert positions == 2 * (4 + 8 + 6)
    assert found == (prompt_B + completion_B)[trained_B].sum()
    assert _computed(prompt_B, completion_B, np.zeros(8, bool), 4, 1, shapes) == (0.0, 0)
    # Two prompts of 2 and 4 tokens, each computed once for two rows, of which one is not trained.
    prompt_B, trained_B = np.array([2, 2, 4, 4]), np.array([1, 1, 1, 0], bool)
    assert _computed(prompt_B, completion_B[:4], trained_B, 1, 2, shapes) == (6 + 8, 2 * 4 + 4 * 6)
