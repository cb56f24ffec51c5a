"""The batches of a training step: which rows come first, and that a row keeps what belongs to it."""

import jax
import numpy as np

from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.rl.policy import join, policy_batch, trained, trained_first


def test_rows_that_are_trained_come_first_and_keep_what_is_theirs():
    rng = np.random.default_rng(0)
    prompts_PT, valid_PT = rng.integers(1, 50, (4, 3)), np.ones((4, 3), bool)
    completions_PGT, logp_PGT = rng.integers(50, 99, (4, 2, 5)), rng.normal(size=(4, 2, 5)).astype(np.float32)
    mask_PGT = (np.arange(5) < rng.integers(1, 6, (4, 2, 1))).astype(np.float32)
    rewards_PG = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], np.float32)  # the first and the third group teach nothing
    kept = trained(rewards_PG, mask_PGT, np.ones((4, 2), bool), GRPOConfig(drop_zero_variance=True))
    order_B = trained_first(kept.mask_PGT)
    np.testing.assert_array_equal(order_B, [2, 3, 6, 7, 0, 1, 4, 5])
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
