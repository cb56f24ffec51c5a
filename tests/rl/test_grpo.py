"""Tests of the GRPO loss.

It is compared with TRL's own code, and with exact expectations over policies that are small enough to enumerate. Other
tests check properties that must hold for any input.
"""

import collections
import dataclasses
import functools
import itertools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.rl import grpo
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig

P, G, T = 3, 4, 7
B = P * G
LENGTHS = np.array([7, 3, 1, 5, 2, 7, 6, 4, 1, 2, 3, 7])
PLAIN = GRPOConfig(importance_cap=0.0, aggregation="token")
MIXES = [  # (aggregation, ratio, kl): all pairs of two values, except constant with k2
    ("token", "token", "k1"),
    ("token", "sequence", "k2"),
    ("token", "token", "k3"),
    ("sequence", "sequence", "k1"),
    ("sequence", "token", "k2"),
    ("sequence", "sequence", "k3"),
    ("constant", "token", "k1"),
    ("constant", "sequence", "k3"),
]
f32 = functools.partial(np.asarray, dtype=np.float32)
loss_terms = jax.jit(grpo.grpo_loss, static_argnums=(2, 3))


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def draw(seed=0, spread=0.3):
    """Random current log-probs, and a batch with the other ones; far enough off-policy that both clips act."""
    rng = np.random.default_rng(seed)
    logp, old, sampler, ref = (
        f32(base + spread * rng.normal(size=(B, T))) for base in [-2.0 + rng.normal(size=(B, T))] for _ in range(4)
    )
    mask = f32(np.arange(T)[None] < LENGTHS[:, None])
    adv = f32(rng.normal(size=B))
    return jnp.asarray(logp), GRPOBatch(
        old_logp_BT=jnp.asarray(old),
        sampler_logp_BT=jnp.asarray(sampler),
        ref_logp_BT=jnp.asarray(ref),
        adv_B=jnp.asarray(adv),
        mask_BT=jnp.asarray(mask),
    )


def loss_and_grad(logp, batch, config, max_length=T):
    """The mean loss, the means of the metrics, and the gradient of the loss with respect to `logp`."""

    def mean(x):
        total, count, metrics = grpo.grpo_loss(x, batch, config, max_length)
        means = {name: a / jnp.maximum(b, 1.0) for name, (a, b) in metrics.items()}
        return total / jnp.maximum(count, 1.0), means

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logp)
    return loss, metrics, gradient


def rows(batch, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], batch)


# ---------------------------------------------------------------------------- against TRL's own code


@pytest.fixture(scope="module")
def trl_trainer():
    """A function that makes a GRPOTrainer without a model: its methods are TRL's, its model outputs are our arrays."""
    torch = pytest.importorskip("torch", reason="the oracle is TRL's loss, which is torch code")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason="the oracle is TRL's own GRPOTrainer")
        trainer_class = trl.GRPOTrainer

    def make(**attributes):
        model = torch.nn.Identity()
        model.is_gradient_checkpointing = False
        trainer = object.__new__(trainer_class)
        trainer.__dict__.update(
            model=model,
            accelerator=types.SimpleNamespace(
                device="cpu",
                num_processes=1,
                process_index=0,
                gather=lambda x: x,
                reduce=lambda x, reduction: x,
                sync_gradients=True,
            ),
            args=types.SimpleNamespace(
                per_device_train_batch_size=B,
                steps_per_generation=1,
                gradient_accumulation_steps=1,
                gradient_checkpointing_kwargs=None,
                delta=None,
                use_bias_correction_kl=False,
                report_to=[],
            ),
            current_gradient_accumulation_steps=1,
            _metrics={"train": collections.defaultdict(list)},
            aux_loss_enabled=False,
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            _entropy_bonus_enabled=False,
            max_completion_length=T + 2,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=1.5,
            vllm_importance_sampling_clip_min=None,
            **attributes,
        )
        return trainer

    return make


def trl_rollout(trl_trainer, rewards_B, old, sampler, scale):
    """TRL's advantages and importance weights, from `_generate_and_score_completions` on our arrays."""
    import torch

    trainer = trl_trainer(
        environment_factories=None,
        environments=None,
        tools=[],
        _tokenizer=types.SimpleNamespace(
            pad_token_id=0, batch_decode=lambda ids, **_: [""] * len(ids)
        ),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=True,
        beta=0.0,
        num_generations=G,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        reward_funcs=[None],
        log_completions=False,
        _logs=collections.defaultdict(list, rewards=collections.defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _calculate_rewards=lambda *_: torch.tensor(np.asarray(rewards_B))[:, None],
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            torch.tensor(np.asarray(old)), None, None
        ),
        _generate=lambda prompts: (
            [[3]] * B,
            [[5] * n for n in LENGTHS],
            None,
            [""] * B,
            [np.asarray(row)[:n].tolist() for row, n in zip(sampler, LENGTHS, strict=True)],
            {},
            None,
            None,
        ),
    )  # fmt: skip
    trainer.processing_class = trainer._tokenizer
    return trainer._generate_and_score_completions([{"prompt": "x"}] * B)


def trl_loss_and_grad(trl_trainer, logp, batch, config, importance=None):
    """TRL's loss from `_compute_loss`, its gradient with respect to the log-probs, and TRL's metrics."""
    import torch

    def tensor(x):
        return torch.tensor(np.asarray(x))

    leaf = tensor(logp).requires_grad_()
    names = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
    trainer = trl_trainer(
        loss_type=names[config.aggregation],
        importance_sampling_level=config.ratio,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        beta=config.kl_coef,
        use_vllm=importance is not None,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros(B, T), None),
    )
    mask = tensor(batch.mask_BT)
    inputs = {
        "prompt_ids": torch.zeros(B, 1),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T),
        "completion_mask": mask,
        "advantages": tensor(batch.adv_B),
        "ref_per_token_logps": tensor(batch.ref_logp_BT),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": importance,
    }
    if batch.old_logp_BT is not None:
        inputs["old_per_token_logps"] = tensor(batch.old_logp_BT)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
    return loss.item(), np.asarray(leaf.grad), metrics


@pytest.mark.parametrize("kl_coef, on_policy", [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_loss_gradient_and_metrics_are_those_of_trl(trl_trainer, aggregation, ratio, kl_coef, on_policy):
    logp, batch = draw()
    if on_policy:
        batch = dataclasses.replace(batch, old_logp_BT=None)
    low, high = (0.2, 0.28) if ratio == "token" else (0.03, 0.05)  # a sequence's ratio varies less
    config = dataclasses.replace(
        PLAIN,
        aggregation=aggregation,
        ratio=ratio,
        kl_coef=kl_coef,
        clip_low=low,
        clip_high=high,
    )
    expected_loss, expected_grad, expected = trl_loss_and_grad(trl_trainer, logp, batch, config)
    loss, metrics, grad = loss_and_grad(logp, batch, config, T + 2)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)
    if kl_coef:
        np.testing.assert_allclose(metrics["kl"], expected["kl"], rtol=1e-5)
    if ratio == "token":  # with "sequence", TRL's share counts sequences, ours counts tokens
        for side in ("low", "high"):
            share = metrics[f"clip_{side}"]
            np.testing.assert_allclose(share, expected[f"clip_ratio/{side}_mean"], rtol=1e-6)
            assert on_policy or share > 0.02, "the arrays must reach both clips"


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_importance_weights_and_their_loss_are_those_of_trl(trl_trainer, aggregation):
    logp, batch = draw(1)
    config = GRPOConfig(aggregation=aggregation, kl_coef=0.1, importance_cap=1.5)
    rewards = np.random.default_rng(0).random(B, dtype=np.float32)
    out = trl_rollout(trl_trainer, rewards, batch.old_logp_BT, batch.sampler_logp_BT, "group")
    assert batch.old_logp_BT is not None
    weight = grpo.truncated_importance(batch.old_logp_BT, batch.sampler_logp_BT, 1.5)
    keep = np.asarray(batch.mask_BT) > 0
    expected_weight = out["importance_sampling_ratio"]
    np.testing.assert_allclose(weight[keep], expected_weight.numpy()[keep], rtol=1e-6)
    assert (weight[keep] == 1.5).any() and (weight[keep] < 1).any()

    expected_loss, expected_grad, _ = trl_loss_and_grad(trl_trainer, logp, batch, config, expected_weight)
    loss, _, grad = loss_and_grad(logp, batch, config, T + 2)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_are_those_of_trl(trl_trainer, scale):
    rewards = np.random.default_rng(3).random((P, G), dtype=np.float32)
    rewards[1] = [1, 0, 0, 1]
    _, batch = draw()
    trl_scale = {"std": "group", "none": "none"}[scale]
    old, sampler = batch.old_logp_BT, batch.sampler_logp_BT
    expected = trl_rollout(trl_trainer, rewards.reshape(-1), old, sampler, trl_scale)
    adv, informative = grpo.group_advantages(jnp.asarray(rewards), scale=scale)
    np.testing.assert_allclose(adv.reshape(-1), expected["advantages"].numpy(), rtol=1e-5)
    assert informative.all()


# ------------------------------------------------------------------- against enumerated policies

V = 3
SEQUENCES = [(0, 0), *itertools.product((1, 2), range(V))]  # token 0 ends; "0" has length 1
TOKENS = np.array(SEQUENCES)
ENDS_EARLY = TOKENS[:, 0] == 0
MASK = f32(np.stack([np.ones(len(TOKENS)), ~ENDS_EARLY], axis=1))
LENGTH_ONE = MASK * f32([1, 0])


def token_logps(logits):
    """Log-probs [sequences, 2] of the tokens of every sequence.

    `logits` are those of the first token [V], and those of the second token given the first [V, V].
    """
    first, second = (jax.nn.log_softmax(x, axis=-1) for x in logits)
    both = [first[TOKENS[:, 0]], second[TOKENS[:, 0], TOKENS[:, 1]]]
    return jnp.stack(both, axis=1) * MASK


def logits(seed):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (V,)), jax.random.normal(b, (V, V))


def expectation_of_gradient(parameters, per_sequence_loss, sampler=None):
    """E_y[∇ loss(y)] for y from `sampler` (default: the policy), whose probabilities get no gradient."""
    logp = token_logps(parameters if sampler is None else sampler)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.sum(logp, axis=1)))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weight * per_sequence_loss(token_logps(x)))))
    return gradient(parameters)


def assert_trees_close(a, b, scale=1.0, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, scale * y, rtol=1e-4, atol=atol), a, b)


def size(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def loss_by_sequence(config, mask=MASK, **fields):
    """A function from log-probs to the loss sum of each enumerated sequence alone, computed by `grpo_loss`."""
    arrays = {"old_logp_BT": None, "ref_logp_BT": None, "adv_B": jnp.zeros(len(TOKENS))} | fields
    if "mask_BT" not in arrays:
        arrays["mask_BT"] = jnp.asarray(mask)

    def losses(logp):
        batch = GRPOBatch(**({"sampler_logp_BT": jax.lax.stop_gradient(logp)} | arrays))
        one = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(lambda x, b: grpo.grpo_loss(x, b, config, 2)[0])(logp[:, None], one)

    return losses


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_gradient_is_the_policy_gradient(ratio):
    theta = logits(0)
    reward = jnp.asarray(f32([0.1, 0.9, 0.3, -0.4, 0.5, 0.7, 0.0]))
    config = dataclasses.replace(PLAIN, ratio=ratio)
    gradient = expectation_of_gradient(theta, loss_by_sequence(config, adv_B=reward - 0.37))
    of_j = jax.grad(lambda x: jnp.sum(jnp.exp(jnp.sum(token_logps(x), axis=1)) * reward))(theta)
    assert_trees_close(gradient, of_j, scale=-1.0)
    assert size(of_j) > 0.01


def sequence_kl(parameters, reference):
    logp = token_logps(parameters)
    total = jnp.sum(logp, axis=1)
    return jnp.sum(jnp.exp(total) * (total - jnp.sum(token_logps(reference), axis=1)))


def per_prefix_kl(parameters, reference, forward):
    """Σ_t E_prefix[KL of token t]; the probabilities of the prefixes get no gradient."""
    ours, theirs = ([jax.nn.log_softmax(x, axis=-1) for x in tree] for tree in (parameters, reference))
    p, q = (theirs, ours) if forward else (ours, theirs)
    first, second = (jnp.sum(jnp.exp(a) * (a - b), axis=-1) for a, b in zip(p, q, strict=True))
    reached = jax.lax.stop_gradient(jnp.exp(ours[0])) * f32([0, 1, 1])
    return first + jnp.sum(reached * second)


TRUE_KL = {
    "k1": sequence_kl,
    "k2": lambda x, ref: per_prefix_kl(x, ref, forward=False),
    "k3": lambda x, ref: per_prefix_kl(x, ref, forward=True),
}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_expected_gradient_of_each_kl_is_the_documented_one(kind):
    theta, reference = logits(0), logits(1)
    config = dataclasses.replace(PLAIN, kl_coef=0.7, kl=kind)
    losses = loss_by_sequence(config, ref_logp_BT=token_logps(reference))
    gradient = expectation_of_gradient(theta, losses)
    truth = {name: jax.grad(kl)(theta, reference) for name, kl in TRUE_KL.items()}
    assert_trees_close(gradient, truth[kind], scale=0.7)
    for other in truth.keys() - {kind}:  # the policies are far enough apart to tell the KLs apart
        assert size(jax.tree.map(lambda a, b: a - b, truth[kind], truth[other])) > 0.02


@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_k1_and_k2_have_the_reverse_kl_gradient_on_one_token(kind):
    theta, reference = logits(2), logits(3)
    config = dataclasses.replace(PLAIN, kl_coef=1.0, kl=kind)
    losses = loss_by_sequence(config, LENGTH_ONE, ref_logp_BT=token_logps(reference))

    def kl(x):
        a, b = (jax.nn.log_softmax(y[0]) for y in (x, reference))
        return jnp.sum(jnp.exp(a) * (a - b))

    assert_trees_close(expectation_of_gradient(theta, losses), jax.grad(kl)(theta))


def test_k1_differentiated_as_it_stands_has_no_gradient_and_ours_does():
    theta, reference = logits(0), token_logps(logits(1))
    naive = expectation_of_gradient(theta, lambda logp: jnp.sum(grpo.kl_estimate(logp, reference, "k1") * MASK, axis=1))
    assert size(naive) < 1e-6
    ours = loss_by_sequence(dataclasses.replace(PLAIN, kl_coef=1.0, kl="k1"), ref_logp_BT=reference)
    assert size(expectation_of_gradient(theta, ours)) > 0.05


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased_and_the_loss_shows_their_value(kind):
    theta, reference = logits(0), logits(1)
    logp, ref = token_logps(theta), token_logps(reference)
    weight = jnp.exp(jnp.sum(logp, axis=1))
    config = dataclasses.replace(PLAIN, kl_coef=1.0, kl=kind)
    value = jnp.sum(weight * loss_by_sequence(config, ref_logp_BT=ref)(logp))
    np.testing.assert_allclose(value, sequence_kl(theta, reference), rtol=1e-5)


@pytest.mark.parametrize("kind", [None, "k1"])
def test_importance_weight_undoes_another_sampler(kind):
    """With one token that another policy sampled, uncapped weights give exactly the policy gradient."""
    theta, other, reference = logits(0), logits(4), token_logps(logits(1))
    sampler = token_logps(other)
    reward = jnp.asarray(f32([0.1, 0.9, 0.9, 0.9, -0.5, -0.5, -0.5]))
    config = GRPOConfig(importance_cap=1e6, clip_high=1e6, clip_low=1.0, kl_coef=0.5 if kind else 0.0, kl="k1")
    fields = {"adv_B": reward, "ref_logp_BT": reference}
    ours = loss_by_sequence(config, LENGTH_ONE, sampler_logp_BT=sampler, **fields)
    plain = loss_by_sequence(dataclasses.replace(config, importance_cap=0.0), LENGTH_ONE, **fields)
    expected = expectation_of_gradient(theta, plain)
    assert_trees_close(expectation_of_gradient(theta, ours, sampler=other), expected)
    biased = expectation_of_gradient(theta, plain, sampler=other)
    assert size(jax.tree.map(lambda a, b: a - b, biased, expected)) > 0.02


# ------------------------------------------------------------------------------- properties and known defects


@pytest.mark.parametrize(
    "log_ratio, adv, clipped, loss, slope",
    [
        (np.log(1.5), 1.0, True, -1.28, 0.0),  # r is above the clip already: no gradient
        (np.log(0.5), 1.0, False, -0.5, -0.5),
        (np.log(0.5), -1.0, True, 0.8, 0.0),  # r is below the clip already: no gradient
        (np.log(1.5), -1.0, False, 1.5, 1.5),  # must not be clipped
        (0.0, 2.0, False, -2.0, -2.0),
        (500.0, 1.0, True, -1.28, 0.0),  # exp overflows, but the gradient is 0, not NaN
    ],
)
def test_clip_is_pessimistic_for_either_sign(log_ratio, adv, clipped, loss, slope):
    def surrogate(logp):
        value, where = grpo.clipped_surrogate(
            logp, jnp.zeros((1, 1)), jnp.full((1,), adv), jnp.ones((1, 1)),
            clip_low=0.2, clip_high=0.28, ratio="token",
        )  # fmt: skip
        return jnp.sum(value), where

    logp = jnp.full((1, 1), np.float32(log_ratio))
    (value, where), gradient = jax.value_and_grad(surrogate, has_aux=True)(logp)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], slope, rtol=1e-6)
    assert bool(where[0, 0]) == clipped


@pytest.mark.parametrize("aggregation, ratio, kl", MIXES)
def test_micro_batches_of_unequal_tokens_make_the_whole_batch(aggregation, ratio, kl):
    logp, batch = draw()
    kept = np.isin(np.arange(B), [1, 2], invert=True)  # makes the micro-batches' numbers of sequences unequal too
    batch = dataclasses.replace(batch, mask_BT=batch.mask_BT * f32(kept[:, None]))
    config = GRPOConfig(aggregation=aggregation, ratio=ratio, kl=kl, kl_coef=0.2)
    gradient_of_sum = jax.jit(jax.grad(lambda x, b: grpo.grpo_loss(x, b, config, T)[0]))
    whole = loss_terms(logp, batch, config, T)
    pieces = np.arange(B).reshape(3, 4)
    parts = [loss_terms(logp[i], rows(batch, i), config, T) for i in pieces]
    added = jax.tree.map(lambda *x: sum(x), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), added, whole)
    gradient = np.concatenate([gradient_of_sum(logp[i], rows(batch, i)) for i in pieces])
    np.testing.assert_allclose(gradient, gradient_of_sum(logp, batch), rtol=1e-5, atol=1e-6)

    mean_of_means = np.mean([s / c for s, c, _ in parts])  # the result of a wrong normaliser
    assert abs(mean_of_means - whole[0] / whole[1]) > 1e-3


@pytest.mark.parametrize("aggregation, ratio, kl", MIXES)
def test_padding_changes_nothing(aggregation, ratio, kl):
    logp, batch = draw()
    config = GRPOConfig(aggregation=aggregation, ratio=ratio, kl=kl, kl_coef=0.2)
    keep = batch.mask_BT > 0
    sign = np.where(np.arange(B)[:, None] % 2, 1, -1)

    def run(x, b):
        total, count, metrics = grpo.grpo_loss(x, b, config, T)
        return total, (count, metrics)

    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    expected = run(logp, batch)
    for garbage in (1e4, -1e4, np.inf, np.nan):

        def spoil(x, by, garbage=garbage):  # unequal factors, so that the log-probs do not cancel
            return jnp.where(keep, x, f32(garbage * sign * by))

        spoiled = dataclasses.replace(
            batch,
            old_logp_BT=spoil(batch.old_logp_BT, -1),
            sampler_logp_BT=spoil(batch.sampler_logp_BT, 2),
            ref_logp_BT=spoil(batch.ref_logp_BT, -3),
        )
        actual = run(spoil(logp, 1), spoiled)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        np.testing.assert_array_equal(np.where(keep, 0, actual[1]), 0)

    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 5))) if x.ndim == 2 else x, batch)
    wide = loss_terms(jnp.pad(logp, ((0, 0), (0, 5))), wider, config, T)[0]
    np.testing.assert_allclose(wide, expected[0][0], rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, b, spoil: grpo.clipped_surrogate(
            x, spoil(b.old_logp_BT), b.adv_B, b.mask_BT, clip_low=0.2, clip_high=0.28, ratio="token"
        )[0],
        lambda x, b, spoil: grpo.clipped_surrogate(
            x, spoil(b.old_logp_BT), b.adv_B, b.mask_BT, clip_low=0.2, clip_high=0.28,
            ratio="sequence",
        )[0],
        lambda x, b, spoil: grpo.kl_penalty(x, spoil(b.ref_logp_BT), jnp.exp(x), b.mask_BT, "k1"),
        lambda x, b, spoil: grpo.kl_penalty(x, spoil(b.ref_logp_BT), jnp.exp(x), b.mask_BT, "k3"),
        *(
            lambda x, b, spoil, how=how: grpo.aggregate(x, b.mask_BT, how, T)[0]
            for how in grpo.AGGREGATIONS
        ),
    ],
)  # fmt: skip
def test_padding_changes_no_function_called_by_itself(function):
    logp, batch = draw()

    def run(spoil):
        return jax.value_and_grad(lambda x: jnp.sum(function(x, batch, spoil)))(spoil(logp))

    expected = run(lambda x: x)
    actual = run(lambda x: jnp.where(batch.mask_BT > 0, x, f32(np.nan)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_fully_masked_sequence_adds_to_neither_sum_nor_count(aggregation):
    logp, batch = draw()
    config = GRPOConfig(aggregation=aggregation, kl_coef=0.2)
    dropped = np.arange(B) % 3 == 1
    mask = jnp.where(dropped[:, None], np.float32(0), batch.mask_BT)
    masked = dataclasses.replace(batch, mask_BT=mask)
    expected = loss_terms(logp[~dropped], rows(batch, ~dropped), config, T)
    actual = loss_terms(logp, masked, config, T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)
    nothing = dataclasses.replace(batch, mask_BT=jnp.zeros_like(batch.mask_BT))
    total, count, metrics = loss_terms(logp, nothing, config, T)
    assert all(float(x) == 0 for x in (total, count, *jax.tree.leaves(metrics)))


def test_aggregations_by_hand():
    value = jnp.asarray(f32([[1, 2, 3], [4, 50, 60], [70, 80, 90]]))
    mask = jnp.asarray(f32([[1, 1, 1], [1, 0, 0], [0, 0, 0]]))
    pairs = {how: grpo.aggregate(value, mask, how, 10) for how in grpo.AGGREGATIONS}
    expected = {"token": (10, 4), "sequence": (6, 2), "constant": (10, 20)}
    assert {k: tuple(map(float, v)) for k, v in pairs.items()} == expected


def test_groups_without_variance_are_dropped_and_counted():
    tenth = np.float32(0.1)
    rewards = f32([[0, 1, 1, 0], [tenth] * 4, [0.3, tenth + np.float32(0.2), 0.3, 0.3 + 3e-8], [1, 1, 1, 0.9]])
    adv, informative = grpo.group_advantages(jnp.asarray(rewards), scale="std")
    assert informative.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(adv[1:3], 0)
    assert float(jnp.min(jnp.abs(adv[0]))) > 0.8

    mask, informative_B = jnp.ones((16, T)), jnp.repeat(informative, 4)
    none_cut = jnp.zeros(16, dtype=bool)
    logp = jnp.full((16, T), -1.0)
    for drop, tokens in ((True, 8 * T), (False, 16 * T)):
        config = GRPOConfig(drop_zero_variance=drop)
        kept = grpo.loss_mask(mask, informative_B, none_cut, config)
        batch = GRPOBatch(
            old_logp_BT=None,
            sampler_logp_BT=logp,
            ref_logp_BT=None,
            adv_B=adv.reshape(-1),
            mask_BT=kept,
        )
        _, count, metrics = loss_terms(logp, batch, config, T)
        assert float(count) == tokens == float(metrics["importance"][1])


def test_overlong_completions_are_masked_only_when_asked():
    mask = jnp.ones((4, T), dtype=jnp.int32)
    informative = jnp.asarray([True, True, False, False])
    cut = jnp.asarray([True, False, True, False])
    kept = {
        (overlong, drop): grpo.loss_mask(
            mask, informative, cut, GRPOConfig(mask_overlong=overlong, drop_zero_variance=drop)
        )[:, 0].tolist()
        for overlong in (True, False)
        for drop in (True, False)
    }
    assert kept == {
        (True, True): [0, 1, 0, 0],
        (True, False): [0, 1, 0, 1],
        (False, True): [1, 1, 0, 0],
        (False, False): [1, 1, 1, 1],
    }


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_sum_to_zero_and_ignore_a_shift(scale):
    rewards = jax.random.uniform(jax.random.key(0), (5, 8))
    adv, _ = grpo.group_advantages(rewards, scale=scale)
    np.testing.assert_allclose(jnp.sum(adv, axis=1), np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(grpo.group_advantages(rewards + 1, scale=scale)[0], adv, atol=1e-5)
    with pytest.raises(ValueError, match="1 completion; allowed: 2 or more"):
        grpo.group_advantages(rewards[:, :1], scale=scale)


def test_metrics_by_hand():
    logp, batch = draw(5)
    keep = np.asarray(batch.mask_BT) > 0
    old, sampler = np.asarray(batch.old_logp_BT), np.asarray(batch.sampler_logp_BT)
    config = GRPOConfig(importance_cap=1.2)
    total, _, metrics = loss_terms(logp, batch, config, T)
    assert all(float(count) == keep.sum() for _, count in metrics.values())
    expected = {
        "importance": np.minimum(np.exp(old - sampler), 1.2)[keep].sum(),
        "sampler_gap": np.abs(old - sampler)[keep].sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-5)
    assert "kl" in metrics  # reported, though not penalised
    without = loss_terms(logp, dataclasses.replace(batch, ref_logp_BT=None), config, T)
    assert "kl" not in without[2] and float(without[0]) == float(total)


def test_only_the_current_policy_gets_a_gradient():
    logp, batch = draw()
    config = GRPOConfig(kl="k1", kl_coef=0.3)
    gradient = jax.grad(lambda b: grpo.grpo_loss(logp, b, config, T)[0])(batch)
    for name in ("old_logp_BT", "sampler_logp_BT", "ref_logp_BT"):
        assert not np.any(getattr(gradient, name)), name


def test_a_penalty_without_reference_is_refused():
    logp, batch = draw()
    batch = dataclasses.replace(batch, ref_logp_BT=None)
    with pytest.raises(ValueError, match="kl_coef is 0.1 but the batch has no reference"):
        grpo.grpo_loss(logp, batch, GRPOConfig(kl_coef=0.1), T)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("scale", "batch", "one of std, none"),
        ("aggregation", "mean", "one of token, sequence, constant"),
        ("ratio", "group", "one of token, sequence"),
        ("kl", "k4", "one of k1, k2, k3"),
        ("clip_low", 1.5, "a number from 0 to 1"),
        ("clip_high", -0.1, "a number of at least 0"),
        ("kl_coef", float("nan"), "a number of at least 0"),
        ("importance_cap", 0.5, "0 (off) or a number from 1 up"),
        ("updates_per_batch", 0, "a whole number of at least 1"),
    ],
)
def test_config_names_the_field_the_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        GRPOConfig(**{field: value})
    assert str(error.value) == f"{field} is {value!r}; allowed: {allowed}"


def test_a_batch_over_four_devices_agrees_with_one():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    logp, batch = draw()
    config = GRPOConfig(kl="k1", kl_coef=0.3, ratio="sequence", aggregation="sequence")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = loss_and_grad(logp, batch, config)
    logp, batch = jax.device_put((logp, batch), spread)
    actual = loss_and_grad(logp, batch, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)
