"""Tests of the sampler.

It is compared with a numpy oracle, with exact probabilities and with the trainer's log-probs, on one device and on
eight.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mdrl_jax.model import attention, cache
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import named, param_shardings
from mdrl_jax.rl import compaction
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.rollout import completion_mask, make_sampler, row_keys, stage_key
from mdrl_jax.rl.sampling import SamplingConfig
from tests.rl.test_sampling import MIXES, oracle

pytestmark = pytest.mark.usefixtures("fast_compile")

LENGTHS = (5, 2, 3)  # tokens of the prompts, which are left-padded to WIDTH
WIDTH, GROUP, NEW = 5, 3, 6
P = len(LENGTHS)
NEVER = (-1,)  # an end token that is never drawn
# A log-prob is a difference of two numbers of up to 8 nats, each a sum in another order: 20 units in the last place.
LOG_PROBS = 20 * 2.0**-21
PLAIN = SamplingConfig()


def prompts(vocab, seed=0):
    tokens_PT = np.random.default_rng(seed).integers(0, vocab, (P, WIDTH)).astype(np.int32)
    return tokens_PT, np.arange(WIDTH)[None] >= WIDTH - np.array(LENGTHS)[:, None]


def sampler(tiny, sampling=PLAIN, end=NEVER, group=GROUP, new=NEW, name="test"):
    return make_sampler(tiny.model, name, group_size=group, max_new_tokens=new, eos_ids=end, sampling=sampling)


def draw(tiny, sampling=PLAIN, end=NEVER, key=None, group=GROUP, new=NEW):
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    key = stage_key(0, "math", 0) if key is None else key
    ids = np.arange(P, dtype=np.uint32)[:, None]
    return jax.device_get(sampler(tiny, sampling, end, group, new)(tiny.params, tokens_PT, valid_PT, key, ids))


def joined(tiny, done):
    """The trainer's rows: tokens and valid [P * G, WIDTH + NEW], and the mask of completions [P * G, NEW]."""
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    group, new = done.tokens_PGT.shape[1:]
    mask_BT = completion_mask(done.length_PG, new).reshape(-1, new) > 0
    tokens_BT = np.concatenate([np.repeat(tokens_PT, group, axis=0), done.tokens_PGT.reshape(-1, new)], axis=1)
    return tokens_BT, np.concatenate([np.repeat(valid_PT, group, axis=0), mask_BT], axis=1), mask_BT


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.0), MIXES[7], MIXES[8]], ids=str)
def test_recorded_log_probs_are_of_the_distribution_sampled_from(tiny_models, sampling):
    """With top-k or top-p, a log-prob of the distribution without them would be wrong."""
    tiny = tiny_models["qwen3"]
    done = draw(tiny, sampling)
    tokens_BT, valid_BT, _ = joined(tiny, done)
    logits_BTV = np.asarray(jax.jit(tiny.model.apply)({"params": tiny.params}, tokens_BT, valid_BT))
    logits_BTV = logits_BTV[:, WIDTH - 1 : -1]
    expected = [
        [oracle(logits_V, sampling)[token] for logits_V, token in zip(*row, strict=True)]
        for row in zip(logits_BTV, tokens_BT[:, WIDTH:], strict=True)
    ]
    np.testing.assert_allclose(done.logp_PGT.reshape(-1, NEW), expected, atol=2e-5)
    assert (done.length_PG == NEW).all() and not done.ended_PG.any()


@pytest.mark.parametrize(("family", "temperature"), [("llama", 1.0), ("qwen2", 0.6), ("qwen3", 1.7)])
def test_trainer_and_sampler_agree(tiny_models, family, temperature):
    """So GRPO's ratio starts at 1, also with left padding, groups and early ends."""
    tiny = tiny_models[family]
    done = draw(tiny, SamplingConfig(temperature=temperature), end=tuple(range(20)))
    tokens_BT, valid_BT, mask_BT = joined(tiny, done)
    assert 0.1 < done.ended_PG.mean() and mask_BT.mean() < 0.95
    log_probs = jax.jit(functools.partial(token_log_probs, tiny.model, start=WIDTH, temperature=temperature))
    logp_BT = np.where(mask_BT, log_probs(tiny.params, tokens_BT, valid_BT), 0.0)
    np.testing.assert_allclose(logp_BT, done.logp_PGT.reshape(-1, NEW), atol=1e-5)


@pytest.fixture(scope="module")
def seven(tiny_models):
    """A Llama whose vocabulary has seven tokens, with probabilities far from uniform."""
    tiny = tiny_models["llama"]
    params = {
        **tiny.params,
        "embedding": tiny.params["embedding"][:7],
        "unembedding": tiny.params["unembedding"][:, :7],
    }
    config = dataclasses.replace(tiny.config, vocab_size=7)
    return dataclasses.replace(tiny, config=config, model=Decoder(config), params=params)


def joint_probabilities(tiny, sampling):
    """Exact probability of every completion of two tokens, for each prompt [P, V, V]."""
    vocab = tiny.config.vocab_size
    tokens_PT, valid_PT = prompts(vocab)
    whole_BT = np.repeat(tokens_PT, vocab, axis=0)
    whole_BT = np.concatenate([whole_BT, np.tile(np.arange(vocab, dtype=np.int32), P)[:, None]], axis=1)
    valid_BT = np.concatenate([np.repeat(valid_PT, vocab, axis=0), np.ones((P * vocab, 1), bool)], axis=1)
    logits_BTV = np.asarray(jax.jit(tiny.model.apply)({"params": tiny.params}, whole_BT, valid_BT))
    first_PV = np.exp([oracle(logits_BTV[i * vocab, -2], sampling) for i in range(P)])
    second_PVV = np.exp([oracle(row, sampling) for row in logits_BTV[:, -1]]).reshape(P, vocab, vocab)
    return first_PV[:, :, None] * second_PVV


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.8), SamplingConfig(1.3, 5, 0.9)], ids=str)
def test_frequencies_of_samples_match_probabilities(seven, sampling):
    """A chi-square test of pairs of tokens, at a level that a correct sampler fails for one seed in 10,000."""
    n = 6000
    done = draw(seven, sampling, group=n, new=2)
    p_PVV = joint_probabilities(seven, sampling)
    assert p_PVV.max() > 3 / 49  # far from uniform
    for i, p_VV in enumerate(p_PVV):
        counts_VV = np.zeros((7, 7))
        np.add.at(counts_VV, tuple(done.tokens_PGT[i].T), 1)
        assert counts_VV[p_VV == 0].sum() == 0
        large = n * p_VV >= 5
        rest = n * p_VV[~large].sum()
        observed, expected = counts_VV[large], n * p_VV[large]
        if rest > 0:
            observed, expected = np.append(observed, n - observed.sum()), np.append(expected, rest)
        assert len(observed) > 5
        expected *= observed.sum() / expected.sum()  # the sums differ by rounding
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_noise_is_of_seed_stage_step_prompt_and_sample():
    """Draws that differ in any of these have different keys; a prompt is told apart by all of its integers."""
    prompts = np.array(list(itertools.product((5, 6), (0, 1, 2), (0, 1))), np.uint32)
    rows = [
        np.asarray(jax.random.key_data(row_keys(stage_key(seed, stage, step), prompts, 4)))
        for seed, stage, step in itertools.product((0, 1), ("code", "math"), (0, 1, 2))
    ]
    keys = np.concatenate(rows)
    assert len(np.unique(keys, axis=0)) == len(keys) == 12 * 12 * 4
    again = np.asarray(jax.random.key_data(row_keys(stage_key(0, "code", 0), prompts, 4)))
    np.testing.assert_array_equal(again, rows[0])


def test_same_key_draws_the_same_whatever_the_batch(tiny_models):
    tiny = tiny_models["qwen2"]
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    one = sampler(tiny)
    key, ids = stage_key(0, "math", 4), np.array([[11, 0], [11, 1], [12, 0]], np.uint32)
    first = jax.device_get(one(tiny.params, tokens_PT, valid_PT, key, ids)).tokens_PGT
    np.testing.assert_array_equal(first, one(tiny.params, tokens_PT, valid_PT, key, ids).tokens_PGT)
    order = np.array([2, 0, 1])
    moved = one(tiny.params, tokens_PT[order], valid_PT[order], key, ids[order]).tokens_PGT
    np.testing.assert_array_equal(moved, first[order])
    alone = one(tiny.params, tokens_PT[2:], valid_PT[2:], key, ids[2:]).tokens_PGT
    np.testing.assert_array_equal(alone, first[2:])
    fewer = sampler(tiny, group=2)(tiny.params, tokens_PT, valid_PT, key, ids).tokens_PGT
    np.testing.assert_array_equal(fewer, first[:, :2])
    same_prompt = np.repeat(tokens_PT[:1], P, axis=0), np.repeat(valid_PT[:1], P, axis=0)
    rows = [one(tiny.params, *same_prompt, stage_key(*of), ids).tokens_PGT for of in [(0, "math", 4), (0, "math", 5)]]
    rows += [one(tiny.params, *same_prompt, stage_key(*of), ids).tokens_PGT for of in [(1, "math", 4), (0, "code", 4)]]
    drawn = np.concatenate([np.asarray(r).reshape(-1, NEW) for r in rows])
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 4 * P * GROUP


class CountingDecoder(Decoder):
    """Records every decoding step that really runs in `STEPS`, and its number of rows in `ROWS`."""

    def decode(self, tokens_B, step, start_P, prefix, cache):
        jax.debug.callback(lambda s: (STEPS.append(int(s)), ROWS.append(len(tokens_B))), step)
        return super().decode(tokens_B, step, start_P, prefix, cache)


STEPS: list[int] = []
ROWS: list[int] = []


def test_loop_stops_when_every_row_has_ended(tiny_models, monkeypatch):
    """The result equals completions that were drawn without an end token and then cut in numpy.

    This holds because the random numbers of a token do not depend on other rows. Steps have a quarter of the rows as
    soon as no more are running.
    """
    monkeypatch.setattr(compaction, "LEAST_ROWS", 3)
    tiny = tiny_models["llama"]
    tiny = dataclasses.replace(tiny, model=CountingDecoder(tiny.config))
    free = draw(tiny)
    jax.effects_barrier()
    assert STEPS == list(range(NEW - 1))
    at = lambda *columns: tuple(map(int, np.unique(free.tokens_PGT[:, :, list(columns)])))  # noqa: E731
    # With these end tokens, all rows end at the first token; all end by the third; all but one group end by the second.
    lengths, cut, few = [], 0, []
    for end in (at(0), at(2), tuple(map(int, np.unique(free.tokens_PGT[:2, :, 1])))):
        STEPS.clear(), ROWS.clear()
        done = draw(tiny, end=end)
        jax.effects_barrier()
        hit_PGT = np.isin(free.tokens_PGT, end)
        ended_PG = hit_PGT.any(axis=-1)
        length_PG = np.where(ended_PG, hit_PGT.argmax(axis=-1) + 1, NEW)
        kept_PGT = completion_mask(length_PG, NEW)
        np.testing.assert_array_equal(done.ended_PG, ended_PG)
        np.testing.assert_array_equal(done.length_PG, length_PG)
        np.testing.assert_array_equal(done.tokens_PGT, np.where(kept_PGT > 0, free.tokens_PGT, 0))
        np.testing.assert_allclose(done.logp_PGT, np.where(kept_PGT > 0, free.logp_PGT, 0), atol=LOG_PROBS)
        assert STEPS == list(range(length_PG.max() - 1))
        few.append([int(np.sum(length_PG > step + 1)) <= 3 for step in STEPS])
        assert [rows == 3 for rows in ROWS] == few[-1]
        lengths.append(int(length_PG.max()))
        cut += int(np.sum(~ended_PG))
    assert lengths[0] == 1 < lengths[1] < NEW and cut > 0 and {True, False} <= set(itertools.chain(*few))


def test_end_token_zero_is_told_from_the_zeros_after_an_end(seven):
    free = draw(seven, group=20)
    done = draw(seven, end=(0, 3), group=20)
    hit_PGT = np.isin(free.tokens_PGT, (0, 3))
    length_PG = np.where(hit_PGT.any(axis=-1), hit_PGT.argmax(axis=-1) + 1, NEW)
    last_PG = np.take_along_axis(free.tokens_PGT, length_PG[:, :, None] - 1, axis=-1)[:, :, 0]
    assert {0, 3} < set(last_PG.ravel().tolist())  # both end tokens, and others at the limit
    np.testing.assert_array_equal(done.ended_PG, hit_PGT.any(axis=-1))
    np.testing.assert_array_equal(done.length_PG, length_PG)


def test_one_new_token_needs_no_decoding(tiny_models):
    tiny = tiny_models["llama"]
    done = draw(tiny, new=1)
    np.testing.assert_array_equal(done.tokens_PGT, draw(tiny).tokens_PGT[:, :, :1])
    assert (done.length_PG == 1).all() and not done.ended_PG.any()


@pytest.mark.parametrize("chunk", [4, 5])
def test_chunked_log_probs_equal_unchunked(tiny_models, chunk):
    """Values and gradients of ten positions, with a chunk that does not divide ten and with one that does."""
    tiny = tiny_models["qwen2"]
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, tiny.config.vocab_size, (3, 14)), jnp.int32)
    valid_BT = jnp.asarray(np.arange(14)[None] >= np.array([0, 2, 3])[:, None])
    weights_BT = rng.normal(size=(3, 10)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def both(params, chunk):
        def weighted(params):
            logp_BT = token_log_probs(tiny.model, params, tokens_BT, valid_BT, start=4, temperature=0.7, chunk=chunk)
            return jnp.sum(weights_BT * logp_BT), logp_BT

        return jax.value_and_grad(weighted, has_aux=True)(params)

    (_, whole_BT), gradient = both(tiny.params, 0)
    (_, parts_BT), in_parts = both(tiny.params, chunk)
    assert parts_BT.shape == (3, 10)
    np.testing.assert_allclose(parts_BT, whole_BT, atol=1e-5)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["none", "full, blockwise"])
def test_rows_that_share_their_prompt_have_the_same_log_probs(tiny_models, kind):
    """Values and gradients, of two prompts of unequal lengths with three completions each, most of which end early."""
    tiny = tiny_models["qwen3"]
    blocks = functools.partial(attention.blockwise, block=2)
    model = tiny.model if kind == "none" else dataclasses.replace(tiny.model, remat="full", attention=blocks)
    rng = np.random.default_rng(0)
    prompts_BT = np.repeat(rng.integers(0, tiny.config.vocab_size, (2, 4)), 3, axis=0)
    own_BT = rng.integers(0, tiny.config.vocab_size, (6, 5))
    tokens_BT = jnp.asarray(np.concatenate([prompts_BT, own_BT], axis=1), jnp.int32)
    real_BT = np.arange(5) < np.array([5, 1, 3, 2, 5, 4])[:, None]
    padding_BT = np.arange(4)[None] >= np.array([0, 0, 0, 2, 2, 2])[:, None]
    valid_BT = jnp.asarray(np.concatenate([padding_BT, real_BT], axis=1))
    weights_BT = rng.normal(size=(6, 5)).astype(np.float32) * real_BT

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def both(model, params, group):
        def weighted(params):
            logp_BT = token_log_probs(model, params, tokens_BT, valid_BT, start=4, chunk=2, group=group)
            return jnp.sum(weights_BT * logp_BT), logp_BT

        return jax.value_and_grad(weighted, has_aux=True)(params)

    (_, alone_BT), gradient = both(tiny.model, tiny.params, 1)
    (_, shared_BT), of_shared = both(model, tiny.params, 3)
    np.testing.assert_allclose(shared_BT[real_BT], alone_BT[real_BT], atol=1e-5)
    for a, b in zip(jax.tree.leaves(of_shared), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_chunked_log_probs_never_hold_all_logits(tiny_models):
    tiny = tiny_models["qwen2"]
    shape = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    valid = jax.ShapeDtypeStruct((3, 16), bool)

    def kept(chunk):
        f = functools.partial(token_log_probs, tiny.model, start=1, chunk=chunk)
        residuals = jax.eval_shape(lambda p, t, v: jax.vjp(lambda q: f(q, t, v), p)[1], tiny.params, shape, valid)
        vocab = tiny.config.vocab_size
        return sum(leaf.size for leaf in jax.tree.leaves(residuals) if leaf.shape[-1:] == (vocab,) and leaf.ndim > 2)

    assert kept(0) >= 3 * 15 * tiny.config.vocab_size
    assert kept(5) == 0


def test_compilations_are_counted(tiny_models):
    tiny = tiny_models["llama"]
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    one = sampler(tiny, name="counted", new=2)
    ids = np.arange(P, dtype=np.uint32)[:, None]
    before = compilations["counted"]
    for step in range(3):
        one(tiny.params, tokens_PT, valid_PT, stage_key(0, "math", step), ids)
    assert compilations["counted"] == before + 1
    wider = np.pad(tokens_PT, ((0, 0), (3, 0))), np.pad(valid_PT, ((0, 0), (3, 0)))
    for step in range(2):
        done = one(tiny.params, *wider, stage_key(0, "math", step), ids)
        narrow = one(tiny.params, tokens_PT, valid_PT, stage_key(0, "math", step), ids)
        np.testing.assert_array_equal(done.tokens_PGT, narrow.tokens_PGT)  # padding changes no draw
    assert compilations["counted"] == before + 2


def test_one_device_equals_eight(tiny_models, mesh8):
    tiny = tiny_models["qwen3"]
    rows = [np.tile(x, (4, 1))[:8] for x in prompts(tiny.config.vocab_size)]
    key, ids = stage_key(0, "math", 0), np.arange(8, dtype=np.uint32)[:, None]
    sampling = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95)
    end = tuple(range(12))
    one = jax.device_get(sampler(tiny, sampling, end)(tiny.params, *rows, key, ids))
    params = jax.device_put(tiny.params, param_shardings(mesh8, param_shapes(tiny.model)))
    with jax.set_mesh(mesh8):
        sharded = [jax.device_put(x, named(mesh8, "batch", None)) for x in rows]
        eight = sampler(tiny, sampling, end)(params, *sharded, key, jax.device_put(ids, named(mesh8, "batch", None)))
    assert len(eight.tokens_PGT.sharding.device_set) == 8
    assert 0 < one.ended_PG.mean() < 1
    eight = jax.device_get(eight)
    np.testing.assert_array_equal(one.tokens_PGT, eight.tokens_PGT)
    np.testing.assert_array_equal(one.length_PG, eight.length_PG)
    np.testing.assert_array_equal(one.ended_PG, eight.ended_PG)
    np.testing.assert_allclose(one.logp_PGT, eight.logp_PGT, atol=2e-5)


@pytest.mark.parametrize(("family", "at_once"), [("llama", 0), ("qwen3", 1), ("mixed", 5), ("mixed", 3)])
def test_slots_draw_what_all_at_once_draws(tiny_models, family, at_once, monkeypatch):
    """Prompts wait for a slot, begin while other completions are being decoded, and wrap around the cache.

    At the end the rows left are moved together, twice if all prompts have a slot or five of them. In slots, the cache
    counts as a long one, which is read in parts.
    """
    monkeypatch.setattr(compaction, "LEAST_ROWS", 1)
    tiny, n, new = tiny_models[family], 11, 9
    rng = np.random.default_rng(3)
    tokens_NT = rng.integers(0, tiny.config.vocab_size, (n, WIDTH)).astype(np.int32)
    valid_NT = np.arange(WIDTH)[None] >= WIDTH - rng.integers(1, WIDTH + 1, n)[:, None]
    key, ids = stage_key(0, "qa", 1), rng.permutation(n).astype(np.uint32)[:, None]
    made = []
    for slots, compact in ((0, False), (at_once, True)):
        monkeypatch.setattr(cache, "LONG", new if slots else new + 1)
        sample = make_sampler(
            tiny.model,
            "slots",
            group_size=2,
            max_new_tokens=new,
            eos_ids=tuple(range(12)),
            sampling=PLAIN,
            at_once=slots,
            compact=compact,
        )
        made.append(jax.device_get(sample(tiny.params, tokens_NT, valid_NT, key, ids)))
    whole, slotted = made
    assert 0.2 < whole.ended_PG.mean() < 0.98 and len(np.unique(whole.length_PG)) > 4
    for name in ("tokens_PGT", "length_PG", "ended_PG"):
        np.testing.assert_array_equal(getattr(slotted, name), getattr(whole, name))
    np.testing.assert_allclose(slotted.logp_PGT, whole.logp_PGT, atol=LOG_PROBS)


def test_the_cache_is_filled_from_its_start_when_no_row_is_left(tiny_models, monkeypatch):
    """Completions of equal length end together; the next ones then read a long cache only as far as they fill it."""
    monkeypatch.setattr(cache, "LONG", 1)
    tiny = tiny_models["llama"]
    free = draw(tiny)
    tiny = dataclasses.replace(tiny, model=CountingDecoder(tiny.config))
    tokens_PT, valid_PT = prompts(tiny.config.vocab_size)
    options = {"group_size": GROUP, "max_new_tokens": NEW, "eos_ids": NEVER, "sampling": PLAIN, "at_once": 1}
    STEPS.clear()
    ids = np.arange(P, dtype=np.uint32)[:, None]
    done = make_sampler(tiny.model, "again", **options)(tiny.params, tokens_PT, valid_PT, stage_key(0, "math", 0), ids)
    jax.effects_barrier()
    assert STEPS == list(range(NEW - 1)) * P
    np.testing.assert_array_equal(done.tokens_PGT, free.tokens_PGT)
    np.testing.assert_allclose(done.logp_PGT, free.logp_PGT, atol=LOG_PROBS)


def test_slots_wait_for_no_longest_completion(tiny_models):
    """The next prompt of a slot begins as soon as the last one has ended.

    This takes fewer steps than waves of two prompts, in which both slots wait for the longer completion.
    """
    tiny, n, new = tiny_models["llama"], 8, 24
    model = CountingDecoder(tiny.config)
    tokens_NT = np.random.default_rng(0).integers(0, tiny.config.vocab_size, (n, WIDTH)).astype(np.int32)
    sample = make_sampler(
        model, "wait", group_size=1, max_new_tokens=new, eos_ids=tuple(range(20)), sampling=PLAIN, at_once=2
    )
    STEPS.clear()
    ids = np.arange(n, dtype=np.uint32)[:, None]
    done = sample(tiny.params, tokens_NT, np.ones_like(tokens_NT, bool), stage_key(1, "qa", 0), ids)
    lengths = np.asarray(done.length_PG)[:, 0]
    jax.effects_barrier()
    loads = [0, 0]
    for length in lengths:
        loads[int(np.argmin(loads))] += length - 1  # the prefill draws the first token
    waves = sum(max(lengths[i : i + 2]) - 1 for i in range(0, n, 2))
    assert max(loads) < waves, (loads, waves)
    assert len(STEPS) == max(loads), (len(STEPS), loads)


@pytest.mark.parametrize(("slots", "group"), [(32, 4), (8, 6), (1, 100), (50, 1)])
def test_rows_get_places_beside_rows_of_their_prompt(slots, group):
    """Each wanted row gets one place, and a slot has rows of one prompt only, as many as it can."""
    rng = np.random.default_rng(0)
    prompt_B, taken_R = np.repeat(np.arange(slots), group), True
    sizes = compaction.sizes(slots, group)
    assert 0 < len(sizes) <= compaction.MOST
    for n_slots, size in sizes:
        wanted_B = (rng.random(len(prompt_B)) < 0.1) & taken_R
        places = compaction.Places(jnp.asarray(wanted_B), jnp.asarray(prompt_B, jnp.int32), slots, size)
        expected = sum(-(-int(n) // size) for n in np.bincount(prompt_B[wanted_B]))
        assert int(places.slots()) == expected <= n_slots
        from_R, taken_R = map(np.asarray, places.origins(n_slots))
        np.testing.assert_array_equal(np.sort(from_R[taken_R]), np.flatnonzero(wanted_B))
        np.testing.assert_array_equal(np.asarray(places.of_rows())[from_R[taken_R]], np.flatnonzero(taken_R))
        for rows, taken in zip(from_R.reshape(n_slots, size), taken_R.reshape(n_slots, size), strict=True):
            assert len(np.unique(prompt_B[rows[taken]])) <= 1 and (taken[0] or not taken.any())
        assert compaction.LEAST_ROWS <= len(from_R) < 0.35 * len(prompt_B)
        prompt_B = prompt_B[from_R]
