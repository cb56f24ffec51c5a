"""Objectives on a policy small enough to enumerate: what each (u, w) formula is the derivative of, in expectation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.analysis.samples import Sample
from mdrl_jax.rl.grpo import AGGREGATIONS, GRPOBatch, GRPOConfig, group_advantages, grpo_loss, loss_mask
from mdrl_jax.second_order import objectives
from mdrl_jax.second_order.decoder_parts import DecoderParts, log_probs
from mdrl_jax.second_order.jets import jets
from mdrl_jax.second_order.objectives import CompletionBatch, Forward, derivatives, leave_one_out, token_weights

VOCAB, END, LONGEST, DIRECTIONS = 3, 0, 3, 4
PROMPTS_PT, PROMPTS_VALID_PT = np.array([[0, 1], [2, 1]]), np.array([[False, True], [True, True]])
START = PROMPTS_PT.shape[1]
TEMPERATURE = 0.7

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def head(point, fixed, x_BCD, targets_BC, temperature):
    logp_BCV = jax.nn.log_softmax(x_BCD @ point["readout"] / temperature)
    return jnp.take_along_axis(logp_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


TOY = DecoderParts(
    embed=lambda point, fixed, tokens_BT: point["embedding"][tokens_BT],
    layers=lambda point, fixed: (point["layers"], ()),
    layer=lambda point, fixed, x, rows: x + jnp.tanh(jnp.cumsum(x * rows.valid_BT[:, :, None], axis=1) @ point),
    head=head,
    policy=None,
)


def completions():
    """Every completion: up to 3 tokens, ending at the first end token; tokens and mask, each [15, 3]."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST):
                found.append(tokens + (0,) * (LONGEST - length))
    tokens_ST = np.array(found)
    ended_ST = np.cumsum(tokens_ST == END, axis=1) - (tokens_ST == END) > 0
    return tokens_ST, ~ended_ST


TOKENS_ST, MASK_ST = completions()
REWARDS_PS = np.random.default_rng(3).choice([0.0, 0.25, 1.0], size=(2, len(TOKENS_ST)))


def rows_of(prompt_B, sequence_B, adv_B, weight_B=None):
    """Rows of chosen completions of chosen prompts."""
    mask_BT = MASK_ST[sequence_B]
    return CompletionBatch(
        tokens_BT=np.concatenate([PROMPTS_PT[prompt_B], TOKENS_ST[sequence_B]], axis=1),
        valid_BT=np.concatenate([PROMPTS_VALID_PT[prompt_B], mask_BT], axis=1),
        mask_BT=mask_BT.astype(np.float32),
        adv_B=np.asarray(adv_B, np.float64),
        success_B=(REWARDS_PS[prompt_B, sequence_B] == 1).astype(np.float64),
        weight_B=np.ones(len(prompt_B)) if weight_B is None else weight_B,
    )


@dataclasses.dataclass(frozen=True)
class Enumerated:
    """A policy in full: `prob_PS` of each completion, and u, w [directions, P, S, T] of each of its tokens."""

    params: dict
    directions: list
    prob_PS: np.ndarray
    u: np.ndarray
    w: np.ndarray

    def moved(self, c_K):
        """The parameters plus Σ c_k v_k."""
        return jax.tree.map(
            lambda x, *vs: x + sum(c * v for c, v in zip(c_K, vs, strict=True)), self.params, *self.directions
        )

    def curve(self, function):
        """Value, and first and second derivatives [K] along the directions, of function(log π [P, S, T]): autodiff."""
        rows = every_row()

        def at(c_K):
            logp_BT = Forward(TOY, TEMPERATURE)(self.moved(c_K), rows, ())
            return function(logp_BT.reshape(self.u.shape[1:]))

        slope = jax.jacfwd(at)
        value, gradient, hessian = jax.jit(lambda c: (at(c), slope(c), jax.jacfwd(slope)(c)))(jnp.zeros(DIRECTIONS))
        return value, gradient, jnp.diagonal(hessian)

    def orders(self, name, adv_PS=None, u=None, w=None):
        """An objective along each direction, of every completion as if it were a prompt's only one."""
        u, w = (self.u if u is None else u), (self.w if w is None else w)
        adv_PS = np.zeros_like(self.prob_PS) if adv_PS is None else adv_PS
        mask = np.broadcast_to(MASK_ST, u.shape[1:])
        alone = lambda x: x.reshape((-1, 1) + x.shape[2:])  # noqa: E731
        rest = [alone(x) for x in (mask, adv_PS, (REWARDS_PS == 1).astype(float), adv_PS)]
        mean = token_weights(rest[0], "token", LONGEST)
        return [derivatives(alone(u[k]), alone(w[k]), *rest, *mean)[name] for k in range(DIRECTIONS)]

    def expected(self, *args):
        """(first, second), each [K], of `orders`, every completion weighed by its probability."""
        p = self.prob_PS.reshape(-1)
        mean = lambda x_P, order: (p * x_P).sum() / (p * order.count_P).sum()  # noqa: E731
        return np.array([[mean(o.first_P, o), mean(o.second_P, o)] for o in self.orders(*args)]).T


def every_row():
    prompt_PS, sequence_PS = np.indices(REWARDS_PS.shape)
    return rows_of(prompt_PS.reshape(-1), sequence_PS.reshape(-1), np.zeros(REWARDS_PS.size))


@functools.cache
def policy():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCAB, 3), "layers": (2, 3, 3), "readout": (3, VOCAB)}
    params, *directions = (
        {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(1 + DIRECTIONS)
    )
    logp, u, w = jets_at(params, directions, TEMPERATURE)
    prob_PS = np.exp((logp[0] * MASK_ST).sum(-1))
    return Enumerated(params, directions, prob_PS, u, w)


def jets_at(params, directions, temperature):
    """(logp, u, w), each [K, P, S, T], of every completion."""
    rows = every_row()
    run = jax.jit(functools.partial(jets, TOY, start=START, temperature=temperature))
    found = [run(params, (), v, rows.tokens_BT, rows.valid_BT) for v in directions]
    return (np.stack(x).reshape((-1,) + REWARDS_PS.shape + (LONGEST,)) for x in zip(*found, strict=True))


def minus_gain(logp_PST):
    """−J: every completion's reward times its probability, averaged over prompts."""
    prob_PS = jnp.exp(jnp.sum(logp_PST, axis=-1))
    return -jnp.mean(jnp.sum(prob_PS * REWARDS_PS, axis=1))


@functools.cache
def truth():
    """First and second derivatives [2, K] of −J."""
    return np.array(policy().curve(minus_gain)[1:])


BASELINES = {"none": 0.0, "five": 5.0, "mean": None, "by prompt": np.array([[0.3], [-2.0]])}


def advantages(name):
    baseline = BASELINES[name]
    return REWARDS_PS - ((policy().prob_PS * REWARDS_PS).sum(1, keepdims=True) if baseline is None else baseline)


def assert_close(found, expected, relative=1e-11):
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_the_enumeration_is_whole():
    assert len(TOKENS_ST) == 15 and sorted(set(MASK_ST.sum(1))) == [1, 2, 3]
    np.testing.assert_allclose(policy().prob_PS.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(policy().curve(minus_gain)[0], -(policy().prob_PS * REWARDS_PS).sum(1).mean())
    assert np.abs(truth()).min() > 1e-3  # there is something to measure along every direction


@pytest.mark.parametrize("baseline", BASELINES)
def test_reward_is_the_derivative_of_the_gain_to_second_order(baseline):
    """Whatever constant is subtracted from a prompt's rewards."""
    assert_close(policy().expected("reward", advantages(baseline)), truth())


def test_surrogate_has_the_same_gradient_and_another_hessian():
    adv_PS = advantages("mean")
    found = policy().expected("surrogate", adv_PS)

    def surrogate(logp_PST):
        return -jnp.mean(jnp.sum(policy().prob_PS * adv_PS * jnp.sum(logp_PST, axis=-1), axis=1))

    assert_close(found, np.array(policy().curve(surrogate)[1:]))
    assert_close(found[0], truth()[0])
    assert np.linalg.norm(found[1] - truth()[1]) > 0.3 * np.linalg.norm(truth()[1])


def test_the_hessian_of_the_token_ratio_loss_lacks_products_of_tokens():
    """E of its sum over tokens: the gradient of −J; its Hessian has Σ u_t² in place of (Σ u_t)²."""
    adv_PS, p = advantages("mean"), policy()
    length = (p.prob_PS * MASK_ST.sum(-1)).sum() / p.prob_PS.sum()  # tokens a completion: "grpo" is per token
    first, second = length * p.expected("grpo", adv_PS)
    assert_close(first, truth()[0])
    u_KPS = (p.u * MASK_ST).sum(-1)
    crossed = u_KPS**2 - (p.u**2 * MASK_ST).sum(-1)
    assert_close(second - truth()[1], (p.prob_PS * adv_PS * crossed).sum((1, 2)) / 2)
    assert np.linalg.norm(second - truth()[1]) > 1e-2 * np.linalg.norm(truth()[1])


def test_kl_is_the_hessian_of_the_divergence_with_less_variance_than_sequence_scores():
    p = policy()

    def divergence(logp_PST):
        total_PS = jnp.sum(logp_PST, axis=-1)
        return jnp.mean(jnp.sum(p.prob_PS * (np.log(p.prob_PS) - total_PS), axis=1))

    value, gradient, curvature = p.curve(divergence)
    first, second = p.expected("kl")
    np.testing.assert_allclose(value, 0.0, atol=1e-14)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-13)
    np.testing.assert_array_equal(first, 0.0)
    assert_close(second, curvature)
    by_sequence_KS = (p.u * MASK_ST).sum(-1).reshape(DIRECTIONS, -1) ** 2
    by_token_KS = np.array([order.second_P for order in p.orders("kl")])
    mean = lambda x_KS: x_KS @ p.prob_PS.reshape(-1) / 2  # noqa: E731
    assert_close(mean(by_sequence_KS), curvature)
    assert (mean(by_token_KS**2) < 0.9 * mean(by_sequence_KS**2)).all()


def test_derivatives_at_another_temperature_are_wrong():
    """Completions sampled at 0.7, derivatives of the policy at temperature 1 (definitions §1)."""
    p = policy()
    _, u, w = jets_at(p.params, p.directions, temperature=1.0)
    wrong = p.expected("reward", advantages("mean"), u, w)
    for found, right in zip(wrong, truth(), strict=True):
        assert np.linalg.norm(found - right) > 0.2 * np.linalg.norm(right)


GROUP = 4
LOSSES = {"reward": objectives.reward_loss, "success_nll": objectives.success_nll}


def sampled(n_groups, seed):
    """(prompt, completion [GROUP]) of groups that alternate between the prompts, sampled from the policy."""
    rng = np.random.default_rng(seed)
    prompt_N = np.arange(n_groups) % 2
    sequence_NG = np.stack(
        [rng.choice(len(TOKENS_ST), size=(n_groups, GROUP), p=p / p.sum()) for p in policy().prob_PS]
    )
    return prompt_N, sequence_NG[prompt_N, np.arange(n_groups)]


def orders_of(prompt_N, sequence_NG, adv_NG, direction):
    """`derivatives` of sampled groups along one of the directions."""
    at = (prompt_N[:, None], sequence_NG)
    mask_NGT = MASK_ST[sequence_NG]
    return derivatives(
        policy().u[direction][at],
        policy().w[direction][at],
        mask_NGT,
        adv_NG,
        (REWARDS_PS[at] == 1).astype(float),
        adv_NG,
        *token_weights(mask_NGT, "token", LONGEST),
    )


def test_groups_with_a_leave_one_out_baseline_are_unbiased():
    """z-test over groups; a baseline that has the completion's own reward in it is caught."""
    n_groups = 50_000
    prompt_N, sequence_NG = sampled(n_groups, seed=0)
    rewards_NG = REWARDS_PS[prompt_N[:, None], sequence_NG]
    centred_NG = rewards_NG - rewards_NG.mean(axis=1, keepdims=True)

    def z_of(adv_NG):
        z = np.zeros((2, DIRECTIONS))
        for k in range(DIRECTIONS):
            order = orders_of(prompt_N, sequence_NG, adv_NG, k)["reward"]
            for i, part_P in enumerate((order.first_P, order.second_P)):
                each_P = part_P / order.count_P
                z[i, k] = (each_P.mean() - truth()[i, k]) / (each_P.std() / np.sqrt(n_groups))
            assert order.first == pytest.approx(np.mean(order.first_P) / GROUP, rel=1e-12)
        return z

    assert np.abs(z_of(leave_one_out(rewards_NG))).max() < 4
    assert (np.abs(z_of(centred_NG)).max(axis=1) > 8).all()


# Every pair of an aggregation with a ratio; scales take turns, so that each meets every aggregation and every ratio.
SETTINGS = [
    (aggregation, ratio, ("std", "none")[(i + j) % 2])
    for i, aggregation in enumerate(AGGREGATIONS)
    for j, ratio in enumerate(("token", "sequence"))
]


@pytest.mark.parametrize(("aggregation", "ratio", "scale"), SETTINGS)
def test_grpo_is_the_derivative_of_the_trainers_loss(aggregation, ratio, scale):
    """At ratio 1, with its own advantages, mask and mean; float64 autodiff of `grpo_loss` in two micro-batches."""
    prompt_N, sequence_NG = sampled(12, seed=1)
    sequence_NG[4] = sequence_NG[4, 0]  # a group without reward variance, which the trainer drops
    rewards_NG = REWARDS_PS[prompt_N[:, None], sequence_NG]
    config = GRPOConfig(scale=scale, ratio=ratio, aggregation=aggregation, importance_cap=0.0, mask_overlong=True)
    trained_NG, informative_N = group_advantages(jnp.asarray(rewards_NG), scale=config.scale)
    mask_BT = MASK_ST[sequence_NG].reshape(-1, LONGEST)
    cut_B = mask_BT.all(1) & (TOKENS_ST[sequence_NG].reshape(-1, LONGEST)[:, -1] != END)
    informative_B = np.repeat(informative_N, GROUP)
    kept_BT = np.asarray(loss_mask(jnp.asarray(mask_BT), jnp.asarray(informative_B), jnp.asarray(cut_B), config))
    assert 0 < kept_BT.sum() < mask_BT.sum() and cut_B.any() and not informative_B.all()
    rows = rows_of(np.repeat(prompt_N, GROUP), sequence_NG.reshape(-1), np.zeros(mask_BT.shape[0]))
    forward = Forward(TOY, TEMPERATURE)
    old_BT = forward(policy().params, rows, ())
    batch = GRPOBatch(old_BT, old_BT, None, trained_NG.reshape(-1), jnp.asarray(kept_BT))
    halves = slice(None, 20), slice(20, None)  # completions of 1 to 3 tokens

    def loss(c_K):
        logp_BT = forward(policy().moved(c_K), rows, ())
        parts = [
            grpo_loss(logp_BT[at], jax.tree.map(lambda x, at=at: x[at], batch), config, 2 * LONGEST) for at in halves
        ]
        return sum(p[0] for p in parts) / sum(p[1] for p in parts)

    gradient, hessian = (jax.jit(f(loss))(jnp.zeros(DIRECTIONS)) for f in (jax.grad, jax.hessian))
    sample = Sample(
        prompts_PT=PROMPTS_PT[prompt_N],
        valid_PT=PROMPTS_VALID_PT[prompt_N],
        tokens_PGT=TOKENS_ST[sequence_NG],
        mask_PGT=MASK_ST[sequence_NG],
        rewards_PG=rewards_NG,
        ended_PG=~cut_B.reshape(sequence_NG.shape),
    )
    u_KNGT, w_KNGT = (x[:, prompt_N[:, None], sequence_NG] for x in (policy().u, policy().w))
    orders = [sample.derivatives(u, w, config, 2 * LONGEST) for u, w in zip(u_KNGT, w_KNGT, strict=True)]
    found = [order["grpo"] for order in orders]
    assert_close(np.array([order.first for order in found]), gradient)
    assert_close(np.array([order.second for order in found]), jnp.diagonal(hessian))
    assert found[0].count_P[4] == 0 and found[0].first_P[4] == 0


def batch_of(n_groups, seed):
    """Sampled groups, their advantages, and their rows."""
    prompt_N, sequence_NG = sampled(n_groups, seed)
    adv_NG = leave_one_out(REWARDS_PS[prompt_N[:, None], sequence_NG])
    rows = rows_of(np.repeat(prompt_N, GROUP), sequence_NG.reshape(-1), adv_NG.reshape(-1))
    return prompt_N, sequence_NG, adv_NG, rows


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_derivatives_that_tokens_say(name):
    """∇L·v and vᵀ∇²Lv, by jvp of grad, of completions fixed in advance."""
    prompt_N, sequence_NG, adv_NG, rows = batch_of(6, seed=2)
    loss = LOSSES[name](Forward(TOY, TEMPERATURE, chunk=2))

    @jax.jit
    def along(params, v):
        gradient, product = jax.jvp(jax.grad(lambda p: jnp.divide(*loss(p, rows, ()))), (params,), (v,))
        dot = lambda t: sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (v, t)), strict=True))  # noqa: E731
        return dot(gradient), dot(product)

    found = np.array([along(policy().params, v) for v in policy().directions])
    orders = [orders_of(prompt_N, sequence_NG, adv_NG, k)[name] for k in range(DIRECTIONS)]
    assert_close(found, np.array([[order.first, order.second] for order in orders]))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_rows_of_weight_zero_change_nothing(name):
    """Σ sum / Σ count and its gradient; completions have 1 to 3 tokens, and micro-batches unequal numbers of them."""
    *_, rows = batch_of(3, seed=3)
    filler = rows_of(np.array([1, 0]), np.array([14, 3]), np.array([7.0, -7.0]), weight_B=np.zeros(2))
    rows_and_fillers = jax.tree.map(lambda *parts: np.concatenate(parts), rows, filler)
    loss = LOSSES[name](Forward(TOY, TEMPERATURE))

    step = jax.jit(lambda micro: jax.value_and_grad(loss, has_aux=True)(policy().params, micro, ()))

    def mean(rows, sizes):
        at = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        parts = [step(jax.tree.map(lambda x, part=part: x[part], rows)) for part in at]
        ((total, count), gradient) = jax.tree.map(lambda *x: sum(x), *parts)
        assert float(count) > 0
        return {"value": total / count} | {key: g / count for key, g in gradient.items()}

    whole = mean(rows, [12])
    for again in (mean(rows, [5, 7]), mean(rows_and_fillers, [7, 7]), mean(rows_and_fillers, [12, 2])):
        for key, expected in whole.items():
            assert_close(again[key], np.asarray(expected), 1e-12)


def test_both_losses_are_either_where_the_other_is_left_out():
    """As a sum over completions: value, gradient and Hessian product."""
    *_, rows = batch_of(3, seed=4)
    rows = rows.replace(weight_B=np.arange(12) % 3 > 0)
    nothing_B = np.zeros(12)

    @functools.partial(jax.jit, static_argnums=0)
    def orders(loss, rows):
        total = jax.value_and_grad(lambda p: loss(Forward(TOY, TEMPERATURE))(p, rows, ())[0])
        return jax.jvp(total, (policy().params,), (policy().directions[0],))

    for name, part in (("reward", {"success_B": nothing_B}), ("success_nll", {"adv_B": nothing_B})):
        found, expected = orders(objectives.both_losses, rows.replace(**part)), orders(LOSSES[name], rows)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert float(jnp.max(jnp.abs(y))) > 1e-3
            assert_close(x, np.asarray(y))
    assert objectives.both_losses(Forward(TOY, TEMPERATURE))(policy().params, rows, ())[1] == 1


def test_forward_gives_nothing_on_padding():
    rows = every_row()
    logp_BT = Forward(TOY, TEMPERATURE)(policy().params, rows, ())
    everywhere = log_probs(
        TOY, policy().params, (), rows.tokens_BT, rows.valid_BT, start=START, temperature=TEMPERATURE
    )
    np.testing.assert_array_equal(logp_BT, np.where(rows.mask_BT > 0, everywhere, 0.0))
    assert (rows.mask_BT == 0).any() and np.all(np.asarray(everywhere) < 0)


def test_leave_one_out():
    rewards_PG = np.random.default_rng(0).choice([0.0, 0.1, 1.0], size=(20, 5))
    rewards_PG[3], rewards_PG[4] = 0.1, 1 / 3  # whose means round to something else
    before = rewards_PG.copy()
    adv_PG = leave_one_out(rewards_PG)
    others_PG = np.array([[np.delete(row, i).mean() for i in range(5)] for row in rewards_PG])
    np.testing.assert_allclose(adv_PG, rewards_PG - others_PG, atol=1e-15)
    np.testing.assert_allclose(adv_PG.sum(1), 0.0, atol=1e-14)
    np.testing.assert_array_equal(adv_PG[3:5], 0.0)
    np.testing.assert_array_equal(rewards_PG, before)
    np.testing.assert_array_equal(leave_one_out(np.array([[0, 1], [1, 1]])), [[-1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="2 or more"):
        leave_one_out(np.ones((3, 1)))
