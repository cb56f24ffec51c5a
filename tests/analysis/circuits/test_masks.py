"""Circuits of models whose circuit is known, and masks and attributions against their laws."""

import jax
import numpy as np
from flax import linen as nn

from mdrl_jax.analysis.circuits import figures, masks
from mdrl_jax.analysis.circuits.masks import Search
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.stats.overlap import top_share_global
from tests.analysis.circuits import planted

PROGRAMS = masks.build(planted.MODEL, 1.0, Search(steps=60, at_once=12))
PENALTIES = np.array([0.01, 0.03, 0.1], np.float32)


def found(params, rows, seeds=1):
    """The masks of one block at every λ, [3, R, L, H]."""
    start = masks.start_logits(seeds, planted.CONFIG.n_layers, planted.CONFIG.n_heads)
    logits, penalty = np.tile(start, (3, 1, 1, 1)), np.repeat(PENALTIES, len(start))
    m = PROGRAMS.search(params, rows, logits.reshape(-1, *start.shape[1:]), penalty)
    return np.asarray(m).reshape(3, len(start), *start.shape[1:])


def heads(mask_LH):
    return {tuple(h) for h in np.argwhere(mask_LH).tolist()}


def log_probs(params, rows, *sets):
    """log π of both replies with these sets of heads from the source, [sets, N, 2]."""
    return PROGRAMS.of_masks(params, rows, np.stack([planted.on(s) for s in sets]))


EVERY = {(layer, h) for layer in range(3) for h in range(4)}


def test_a_planted_circuit_is_found_and_nothing_else_at_every_penalty_and_from_both_starts():
    params, rows = planted.params(redundant=False), planted.pairs(8, redundant=False)
    m = found(params, rows)
    for at in range(3):
        for search in m[at]:
            assert heads(search > 0.5) == planted.NEEDED  # precision and recall 1
    assert figures.search_record(m[1][None])["converged"]
    # Activity selects the distractors: so the plants are not found by it.
    source = np.asarray(masks.head_outputs(planted.MODEL, params, rows.source_N2T[:, 0], rows.valid_N2T[:, 0]))
    sizes = np.linalg.norm(np.einsum("lbhi,lhid->lbhd", source[:, :, -1], params["layers"]["o"]["kernel"]), axis=-1)
    active = heads(top_share_global(sizes.mean(axis=1), len(planted.NEEDED) / 12))
    assert set(planted.ACTIVE) <= active and active != planted.NEEDED
    # Every head of the circuit is needed: without one, the log-prob falls by what a slot is worth.
    whole, circuit, *less = log_probs(
        params, rows, EVERY, planted.NEEDED, *(planted.NEEDED - {h} for h in sorted(planted.NEEDED))
    )
    np.testing.assert_allclose(circuit[:, 0], whole[:, 0], atol=0.05)
    assert all((x[:, 0] < whole[:, 0] - 5).all() for x in less)
    # Integrated gradients rank the needed heads above all others, and add up to about the whole effect.
    score = np.asarray(PROGRAMS.attribution(params, rows))
    assert heads(top_share_global(score, len(planted.NEEDED) / 12)) == planted.NEEDED


def test_of_a_redundant_pair_one_is_found_and_the_other_is_named():
    params, rows = planted.params(redundant=True), planted.pairs(8, redundant=True)
    m = found(params, rows)[0]
    circuit = figures.circuit(m[None])
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


def test_masks_of_an_untrained_model_are_at_the_null():
    shapes, rng = nn.unbox(param_shapes(planted.MODEL)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(np.float32), shapes)
    m = found(params, planted.pairs(8, redundant=False))
    assert not figures.circuit(m[2][None]).any()
    margins = log_probs(params, planted.pairs(8, redundant=False), EVERY, planted.NEEDED)
    margins = margins[:, :, 0] - margins[:, :, 1]
    assert figures.share(margins[1], margins[0], "F(M)")["estimate"] is None
