"""Tests of sampling and scoring in parts, and of the number of prompts that fit on a device."""

import dataclasses
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax import config, runtime
from mdrl_jax.errors import UserError
from mdrl_jax.model.cache import Prefix
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.rewards.base import Score
from mdrl_jax.rl import rollouts
from mdrl_jax.rl.rollout import SamplingConfig, cache_bytes
from tests.odd_pool import OddPool
from tests.rl.test_rollout import LOG_PROBS


class Pool(OddPool):
    """A pool that scores completions by their length.

    Attributes:
      launched: number of parts given to the devices so far; the test counts them.
      asked: (`launched`, number of requests) at each call of `score`.
    """

    def __init__(self) -> None:
        self.launched, self.asked = 0, []

    def score(self, requests: Any) -> list[Score]:
        self.asked.append((self.launched, len(requests)))
        return [Score(len(text) % 7 / 7, 0.5, "late: 60 s" if len(text) % 3 == 0 else None) for _, text, _ in requests]


@pytest.fixture(scope="module")
def built() -> Iterator[runtime.Runtime]:
    """The embedded model on one device."""
    c = config.default()
    c.scored_domains, c.stages = ("math", "qa"), ("math",)
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (8,)
    c.domains.n_train = c.domains.n_test = c.domains.n_validation = 12
    c.rewards.max_error_share = 1.0
    c.evaluate.batch = 4
    c.mesh.data = 1
    parsed = config.parse(c)
    with pytest.MonkeyPatch.context() as patch, jax.default_device(jax.devices()[0]):
        patch.setattr("mdrl_jax.runtime.make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        made = runtime.build(parsed, Pool())  # type: ignore
        with jax.set_mesh(made.mesh):
            yield made


def test_a_policy_whose_logits_overflow_is_refused(built: runtime.Runtime):
    params = jax.tree.map(lambda x: x * np.float32(3e38), built.base_params())
    sets = [(built.prompts["math", "train"], np.arange(2))]
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="logits, divided by the temperature, are not finite at 32 of 32"):
            built.rollouts.sample(params, sets, (0, "math", 0), 2, SamplingConfig(temperature=temperature))


def test_parts_give_the_same_and_one_is_scored_while_the_next_is_sampled(built: runtime.Runtime):
    params, sets = built.base_params(), [(built.prompts[name, "train"], np.arange(6)) for name in ("math", "qa")]
    lengths = sorted(len(prompts.tokens[i]) for prompts, rows in sets for i in rows)
    assert lengths[3] < lengths[-1], "prompts of two buckets are needed"
    buckets = dataclasses.replace(built.rollouts.config, prompt_buckets=(lengths[3], 12))
    inner, drawn, padded = rollouts.Rollouts._launch, [], []
    for parts in (1, 3):
        pool = Pool()

        def launch(self: Any, *args: Any, pool: Pool = pool) -> Any:
            pool.launched += 1
            padded.append(args[4].shape)
            return inner(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollouts.Rollouts, "_launch", launch)
            scoring = dataclasses.replace(built.rollouts, pool=pool, config=buckets)  # type: ignore
            shown: list[int] = []
            drawn.append(scoring.sample(params, sets, (0, "math", 3), 2, SamplingConfig(), parts, shown.append))
        # When part i is scored, part i + 1 has already been given to the devices.
        assert pool.asked == [(min(i + 2, parts), 24 // parts) for i in range(parts)] and shown == list(range(parts))
    # Prompts of the shorter bucket are sampled together, and the results come in the order of the prompts.
    assert padded == [(12, 12), (4, lengths[3]), (4, 12), (4, 12)]
    whole, joined = drawn
    assert whole.errors == joined.errors and whole.errors
    pairs = (jax.tree.leaves({k: v for k, v in vars(x).items() if k != "errors"}) for x in (whole, joined))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, atol=LOG_PROBS)
    np.testing.assert_array_equal(whole.completions.tokens_PGT, joined.completions.tokens_PGT)


def test_no_two_prompts_of_a_run_share_a_draw(built: runtime.Runtime):
    """Sampled at a temperature so high that tokens are uniform: they depend on the draws alone, not on the prompts.

    So completions are equal only if two prompts share their draws: over splits, domains, or a prompt taken twice. The
    probability that two of them agree by chance in all of 8 tokens is below 1e-12.
    """
    splits = ("train", "validation", "test")
    sets = [(built.prompts[name, split], np.arange(6)) for name in ("math", "qa") for split in splits]
    twice = [(built.prompts["math", "train"], np.array([0, 7, 7, 7, 0, 8]))]
    noise = SamplingConfig(temperature=1e6)
    drawn = dataclasses.replace(built.rollouts, eos_ids=(-1,), pool=Pool())  # type: ignore
    for chosen, parts in ((sets, 6), (twice, 1), ([*twice, *twice], 2)):  # parts of one shape, compiled once
        rows = drawn.sample(built.base_params(), chosen, (0, "math", 3), 4, noise, parts).completions.tokens_PGT
        rows = rows.reshape(-1, rows.shape[-1])
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_scores_of_validation_and_test_prompts_are_not_correlated(built: runtime.Runtime):
    """Rewards of validation row i and test row i are independent draws; equal keys made them correlate (0.35–0.75).

    With a reward of the drawn tokens alone, equal keys give a correlation of 1.
    """

    class OfTokens(Pool):
        def score(self, requests: Any) -> list[Score]:
            return [Score(zlib.crc32(text.encode()) % 1000 / 1000, 0.0) for _, text, _ in requests]

    scoring = dataclasses.replace(built.rollouts, eos_ids=(-1,), pool=OfTokens())  # type: ignore
    noise, params = SamplingConfig(temperature=1e6), built.base_params()
    rewards = [
        scoring.sample(params, [(built.prompts["math", split], np.arange(12))], (0, "evaluate", 0), 32, noise)
        for split in ("validation", "test")
    ]
    n = 12 * 32
    r = np.corrcoef(*(x.rewards_PG.ravel() for x in rewards))[0, 1]
    assert abs(r) < 4 / np.sqrt(n)


def test_devices_sample_while_rewards_are_computed(built: runtime.Runtime):
    """The second part is sampled before the rewards of the first one are ready."""
    params, sets = built.base_params(), [(built.prompts["math", "train"], np.arange(12))]
    ready, launched = threading.Event(), []
    inner = rollouts.Rollouts._launch

    def launch(self: Any, *args: Any) -> Any:
        launched.append(inner(self, *args))
        return launched[-1]

    class Slow(Pool):
        def score(self, requests: Any) -> list[Score]:
            if not ready.is_set():
                launched[1].completions.tokens_PGT.block_until_ready()  # it must have been launched before
                ready.set()
            return super().score(requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.Rollouts, "_launch", launch)
        dataclasses.replace(built.rollouts, pool=Slow()).sample(params, sets, (0, "a", 0), 2, SamplingConfig(), 2)  # type: ignore
    assert ready.is_set()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_room_for_keys_and_values_is_counted_as_they_are_kept(built: runtime.Runtime, dtype: Any):
    model, group, prompt, new = Decoder(built.model.config, dtype), 3, 12, 8
    tokens_PT = np.zeros((1, prompt), np.int32)
    shapes = jax.eval_shape(
        lambda p: (
            model.apply({"params": p}, tokens_PT, tokens_PT == 0, method="prefill")[1],
            model.apply({"params": p}, group, new, method="empty_cache"),
        ),
        built.shapes,
    )
    prefix: Prefix = shapes[0]
    kept = [prefix.k_LPTKh, prefix.v_LPTKh, *jax.tree.leaves(shapes[1])]
    each = sum(x.size * x.dtype.itemsize for x in kept)
    assert cache_bytes(model, group, prompt, new) == each
    mesh = make_mesh(MeshConfig(2, 2, 2))
    section = rollouts.RolloutConfig(
        prompt_buckets=(8, prompt), completion_buckets=(4, new), cache_gib=3.5 * each / 2 / 2**30
    )
    assert rollouts.prompts_at_once(section, model, mesh, group) == 3 * 4  # `tensor` halves the keys and values
    assert rollouts.prompts_at_once(dataclasses.replace(section, cache_gib=0.0), model, mesh, group) == 0
    with pytest.raises(UserError, match="rollout.cache_gib=1e-06 is too small"):
        rollouts.prompts_at_once(dataclasses.replace(section, cache_gib=1e-6), model, mesh, group)
