"""Circuits of models whose circuit is known, and masks and attributions against their laws."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.analysis.circuits import figures, masks
from mdrl_jax.analysis.circuits.masks import Search
from mdrl_jax.config import CIRCUIT_LOSSES
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.stats.overlap import top_share_global
from tests.analysis.circuits import planted

PROGRAMS = {loss: masks.build(planted.MODEL, 1.0, Search(60, at_once=12, loss=loss)) for loss in CIRCUIT_LOSSES}
PENALTIES = np.array([0.01, 0.03, 0.1], np.float32)


def searched(params, rows, loss="margin"):
    """The masks of one block at every λ [3, R, L, H]; the circuits to which they settle; their loss [3, R]."""
    start = masks.start_logits(1, planted.CONFIG.n_layers, planted.CONFIG.n_heads)
    logits, penalty = np.tile(start, (3, 1, 1)), np.repeat(PENALTIES, len(start))
    m = np.asarray(PROGRAMS[loss].search(params, rows, logits, penalty))
    ends, value = PROGRAMS[loss].settle(params, rows, m > 0.5, penalty, 12)
    return (*(x.reshape(3, len(start), *start.shape[1:]) for x in (m, ends)), value.reshape(3, -1))


def heads(mask_LH):
    return {tuple(h) for h in np.argwhere(mask_LH).tolist()}


def log_probs(params, rows, *sets):
    """log π of both replies with these sets of heads from the source, [sets, N, 2]."""
    return masks.MaskedPasses(PROGRAMS["margin"], params, rows).log_probs(np.stack([planted.on(s) for s in sets]))


EVERY = {(layer, h) for layer in range(3) for h in range(4)}


@pytest.mark.parametrize("loss", CIRCUIT_LOSSES)
def test_a_planted_circuit_is_found_and_nothing_else_at_every_penalty_and_from_both_starts(loss):
    params, rows = planted.params(redundant=False), planted.pairs(8, redundant=False)
    m, ends, value = searched(params, rows, loss)
    for at in range(3):
        for search, end in zip(m[at], ends[at], strict=True):
            assert heads(search > 0.5) == heads(end) == planted.NEEDED  # precision and recall 1
    record = figures.search_record(m[1][None], ends[1][None], value[1][None])
    assert record["converged"] and record["open"] == [] and record["size"] == 3


def test_activity_does_not_find_the_plants_and_attribution_does():
    params, rows = planted.params(redundant=False), planted.pairs(8, redundant=False)
    # Activity selects the distractors: so the plants are not found by it.
    passes = masks.Passes(planted.MODEL, 1.0, params, rows)
    source = np.asarray(passes.heads(passes.source_RQD))[:, :, -3]  # after the prompt come two replies of one token
    sizes = np.linalg.norm(np.einsum("lbhi,lhid->lbhd", source, params["layers"]["o"]["kernel"]), axis=-1)
    active = heads(top_share_global(sizes.mean(axis=1), len(planted.NEEDED) / 12))
    assert set(planted.ACTIVE) <= active and active != planted.NEEDED
    # Every head of the circuit is needed: without one, the log-prob falls by what a slot is worth.
    whole, circuit, *less = log_probs(
        params, rows, EVERY, planted.NEEDED, *(planted.NEEDED - {h} for h in sorted(planted.NEEDED))
    )
    np.testing.assert_allclose(circuit[:, 0], whole[:, 0], atol=0.05)
    assert all((x[:, 0] < whole[:, 0] - 5).all() for x in less)
    # Integrated gradients rank the needed heads above all others, and add up to about the whole effect.
    score = np.asarray(PROGRAMS["margin"].attribution(params, rows))
    assert heads(top_share_global(score, len(planted.NEEDED) / 12)) == planted.NEEDED


def test_of_a_redundant_pair_one_is_found_and_the_other_is_named():
    params, rows = planted.params(redundant=True), planted.pairs(8, redundant=True)
    _, ends, value = searched(params, rows)
    (circuit,) = figures.best(ends[:1], value[:1])
    assert planted.NEEDED <= heads(circuit) <= planted.NEEDED | planted.PAIR
    assert heads(circuit) & planted.PAIR
    alone = log_probs(params, rows, EVERY, set(), *({h} for h in sorted(EVERY)))[:, :, 0]
    effects = figures.head_effects(alone[2:], alone[2:], alone[0], alone[1])
    rise = float((alone[0] - alone[1]).mean())
    redundant = {
        tuple(h) for h in figures.hidden(planted.on(planted.NEEDED | {(0, 3)}) > 0, effects["sufficiency"], rise)
    }
    assert redundant == {(2, 2)}
    # The rest of the model still does the work of the pair: the circuit is not complete.
    rest, none = log_probs(params, rows, EVERY - planted.NEEDED - {(0, 3)}, set())[:, :, 0]
    assert (rest > none + 3).all()


def test_an_untrained_model_has_no_circuit():
    """By the published loss its masks are empty; the margin, a share, has nothing to be a share of."""
    shapes, rng = nn.unbox(param_shapes(planted.MODEL)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(np.float32), shapes)
    rows = planted.pairs(8, redundant=False)
    _, ends, _ = searched(params, rows, "log_prob")
    assert not ends[2].any()
    _, ends, value = searched(params, rows)
    own = heads(figures.best(ends[2:], value[2:])[0])
    margins = log_probs(params, rows, EVERY, own, planted.NEEDED)
    whole, *parts = (margins[:, :, 0] - margins[:, :, 1]).reshape(3, 4, 2)
    assert all(figures.share(part, whole, "F(M)")["estimate"] is None for part in parts)


def brute(params, rows, loss, penalty):
    """The circuit with the least loss among all 2 ^ 12, and its loss."""
    sets = np.array(list(itertools.product((0, 1), repeat=12)), bool).reshape(-1, 3, 4)
    logp = masks.MaskedPasses(PROGRAMS[loss], params, rows).log_probs(sets)
    margin = logp[:, :, 0] - logp[:, :, 1]
    whole = margin[-1]
    value = -logp[:, :, 0].mean(1) if loss == "log_prob" else np.abs(margin - whole).mean(1) / np.abs(whole).mean()
    value = value + penalty * sets.sum((1, 2))
    return sets[value.argmin()], value.min()


@pytest.mark.parametrize("loss", CIRCUIT_LOSSES)
@pytest.mark.parametrize("tried", [3, 12])
def test_from_anywhere_the_descent_ends_at_the_best_of_all_circuits(loss, tried):
    params, rows = planted.params(redundant=False), planted.pairs(8, redundant=False)
    rng = np.random.default_rng(0)
    starts = np.concatenate([np.zeros((1, 3, 4)), np.ones((1, 3, 4)), rng.random((3, 3, 4)) < 0.5]).astype(bool)
    ends, value = PROGRAMS[loss].settle(params, rows, starts, np.full(5, 0.03), tried)
    best, least = brute(params, rows, loss, 0.03)
    for end, reached in zip(ends, value, strict=True):
        assert heads(end) == heads(best) == planted.NEEDED
        assert reached == pytest.approx(least, abs=1e-5)


def test_the_descent_makes_several_good_changes_in_a_round():
    params, rows = planted.params(redundant=False), planted.pairs(8, redundant=False)
    rounds = []

    def counted(*args):
        rounds.append(None)
        return PROGRAMS["margin"].slopes(*args)

    programs = dataclasses.replace(PROGRAMS["margin"], slopes=counted)
    ends, _ = programs.settle(params, rows, np.ones((1, 3, 4), bool), np.full(1, 0.03), tried=11)
    assert heads(ends[0]) == planted.NEEDED
    assert len(rounds) < 1 + 9  # nine heads are taken out


def test_of_a_confident_model_the_published_loss_hardly_sees_what_the_margin_does():
    """With all heads the margin is 12 nats, with a part of them 6: log π differs by 0.0025 nats, the margin by half."""
    margin = np.array([[12.0, 12.0], [6.0, 6.0]])
    logp = np.stack([-np.log1p(np.exp(-margin)), -np.log1p(np.exp(margin))], axis=-1)
    whole, part = masks.loss_of("log_prob", logp, logp[:1])
    assert 0 < part - whole < 0.003
    np.testing.assert_allclose(masks.loss_of("margin", logp, logp[:1]), [0.0, 0.5], atol=1e-12)
