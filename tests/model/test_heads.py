"""The outputs of attention heads: they are exposed, and a changed output is what the rest of the model sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdrl_jax.analysis.circuits import masks
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.rope import positions_of
from mdrl_jax.model.transformer import Block, Projection, kinds, of_kind

pytestmark = pytest.mark.usefixtures("fast_compile")


def by_hand(tiny, tokens_BT, valid_BT, put=None):
    """Hidden states before the final norm, and the inputs of W_O, by a loop over layers outside of the decoder.

    Args:
      tiny: the model.
      tokens_BT, valid_BT: the rows.
      put: (layer, the input of its W_O [B, T, H, h]) -> what takes its place.
    """
    weights, kind = tiny.params["layers"], kinds(tiny.config)
    x_BTD = tiny.model.apply({"params": tiny.params}, tokens_BT, method="embed")
    heads = []
    for layer in range(tiny.config.n_layers):

        def replace(call: Any, args: Any, kwargs: Any, context: Any, layer: int = layer) -> Any:
            if not (isinstance(context.module, Projection) and context.module.name == "o"):
                return call(*args, **kwargs)
            heads.append(args[0] if put is None else put(layer, args[0]))
            return call(heads[-1])

        own = jax.tree.map(lambda x, i=layer: x[i], kind)
        attend = of_kind(tiny.model.attention, own)(valid_BT)
        with nn.intercept_methods(replace):
            block = Block(tiny.config, jnp.float32)
            at = jax.tree.map(lambda x, i=layer: x[i], weights)
            x_BTD = block.apply({"params": at}, x_BTD, positions_of(valid_BT), attend, kind=own)[0]
    return x_BTD, jnp.stack(heads)


def test_a_masked_pass_equals_one_with_the_source_heads_put_in_by_hand(tiny_models):
    tiny = tiny_models["mixed"]  # with layers that slide, layers without RoPE, and norms after attention
    rng, c = np.random.default_rng(0), tiny.config
    base_BT, source_BT = rng.integers(0, c.vocab_size, (2, 3, 7)).astype(np.int32)
    valid_BT = np.arange(7) >= np.array([[0], [2], [4]])
    mask_LH = rng.random((c.n_layers, c.n_heads)).astype(np.float32) * (rng.random((c.n_layers, c.n_heads)) < 0.7)
    _, source_LBTHh = jax.jit(lambda t: by_hand(tiny, t, valid_BT))(source_BT)

    def mix(out_BTHh, given):
        source_BTHh, m_H = given
        return out_BTHh + m_H[None, None, :, None] * (source_BTHh - out_BTHh)

    @jax.jit
    def wanted(tokens_BT):
        x_BTD, _ = by_hand(tiny, tokens_BT, valid_BT, lambda i, out: mix(out, (source_LBTHh[i], mask_LH[i])))
        return tiny.model.apply({"params": tiny.params}, x_BTD, method="normed_logits")

    @jax.jit
    def masked(base_BT, source_BT, mask_LH):
        apply = lambda *args, **more: tiny.model.apply({"params": tiny.params}, *args, **more)  # noqa: E731
        rows = Grouped(jnp.asarray(valid_BT), valid_BT.shape[1])
        _, heads, _ = apply(apply(source_BT, method="embed"), rows, method="through_heads")
        start = apply(base_BT, method="embed")
        hidden, _, _ = apply(start, rows, mix, (heads, mask_LH), method="through_heads")
        return heads, apply(hidden, method="logits"), apply(base_BT, valid_BT)

    heads_LBTHh, got_BTV, plain_BTV = masked(base_BT, source_BT, mask_LH)
    real = np.asarray(valid_BT)
    np.testing.assert_allclose(heads_LBTHh[:, real], source_LBTHh[:, real], atol=1e-5)
    np.testing.assert_allclose(got_BTV[real], wanted(base_BT)[real], atol=1e-5)
    assert np.abs(got_BTV - plain_BTV)[real].max() > 0.01  # the mask has an effect
    np.testing.assert_allclose(masked(base_BT, source_BT, 0 * mask_LH)[1][real], plain_BTV[real], atol=1e-5)


def pairs_of(tiny, same: int):
    """Three pairs of prompts of 6 tokens, of which the first 4 are equal, with two replies of 2 tokens."""
    rng, c = np.random.default_rng(1), tiny.config
    base_N2T = np.repeat(rng.integers(0, c.vocab_size, (3, 1, 8)), 2, axis=1).astype(np.int32)
    base_N2T[:, :, 6:] = rng.integers(0, c.vocab_size, (3, 2, 2))  # the replies
    source_N2T = base_N2T.copy()
    source_N2T[:, :, 4:6] = rng.integers(0, c.vocab_size, (3, 1, 2))
    valid_NT = np.arange(8) >= np.array([[0], [2], [5]])
    valid_N2T = np.repeat(valid_NT[:, None], 2, axis=1)
    return masks.PairRows(base_N2T, source_N2T, valid_N2T, np.ones((3, 2, 2), np.float32), same)


@pytest.mark.parametrize("same", [0, 1, 4])
def test_two_replies_that_share_a_prompt_and_its_equal_tokens_get_the_log_probs_of_whole_rows(tiny_models, same: int):
    tiny, rows = tiny_models["mixed"], pairs_of(tiny_models["mixed"], same)
    base_N2T, source_N2T, c = rows.base_N2T, rows.source_N2T, tiny.config
    mask_LH = np.random.default_rng(2).random((c.n_layers, c.n_heads)).astype(np.float32)
    programs = masks.build(tiny.model, 0.7, masks.Search())
    got_N2 = masks.MaskedPasses(programs, tiny.params, rows).log_probs(mask_LH[None])[0]

    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    valid_BT = flat(np.asarray(rows.valid_N2T))

    @jax.jit
    def wanted(base_BT, source_BT):
        _, source_LBTHh = by_hand(tiny, source_BT, valid_BT)
        put = lambda i, out: masks.mix(out, (source_LBTHh[i], mask_LH[i]))  # noqa: E731
        x_BTD, _ = by_hand(tiny, base_BT, valid_BT, put)
        return jax.nn.log_softmax(tiny.model.apply({"params": tiny.params}, x_BTD, method="normed_logits") / 0.7)

    logp_BTV = np.asarray(wanted(flat(base_N2T), flat(source_N2T)))
    replies_B2 = flat(base_N2T)[:, 6:]
    wanted_B = np.take_along_axis(logp_BTV[:, 5:7], replies_B2[:, :, None], axis=2).sum(axis=(1, 2))
    np.testing.assert_allclose(got_N2, wanted_B.reshape(3, 2), atol=1e-5)
    # With one reply, and for derivatives, it does not matter either how many tokens are run before.
    score = jax.jit(lambda rows: masks.attribution(tiny.model, 0.7, 2, tiny.params, rows))
    whole_LH = np.asarray(score(dataclasses.replace(rows, same=0)))
    assert np.abs(whole_LH).max() > 1e-3
    np.testing.assert_allclose(score(rows), whole_LH, atol=1e-5)


@pytest.mark.parametrize("same, remat", [(0, "none"), (4, "none"), (4, "dots")])
def test_a_pass_that_differs_in_one_head_runs_the_layers_from_this_head_on(tiny_models, same: int, remat: str):
    tiny, rows = tiny_models["mixed"], pairs_of(tiny_models["mixed"], same)
    shape = (tiny.config.n_layers, tiny.config.n_heads)
    programs = masks.build(tiny.model.clone(remat=remat), 0.7, masks.Search(at_once=3))
    passes = masks.MaskedPasses(programs, tiny.params, rows)
    mask_LH = np.random.default_rng(3).random(shape) < 0.5
    heads = np.random.default_rng(4).permutation(mask_LH.size)
    changed = masks.flipped(mask_LH, heads)
    assert (changed != mask_LH).sum(axis=(1, 2)).tolist() == [1] * len(heads)
    wanted_KN2 = passes.log_probs(changed)
    np.testing.assert_allclose(passes.changes(mask_LH)(heads), wanted_KN2, atol=1e-5)
    assert np.ptp(wanted_KN2, axis=0).max() > 1e-3  # the heads have different effects

    # The layers before are not used: with NaN in their weights the pass gives the same. A branch skips them.
    last = shape[0] - 1
    shared = programs.shared(tiny.params, rows)
    like = (programs.inputs(tiny.params, rows, mask_LH.astype(np.float32), shared), np.int32(last))
    broken = tiny.params | {"layers": jax.tree.map(lambda x: x.at[:last].set(np.nan), tiny.params["layers"])}
    of_last = np.flatnonzero(heads // shape[1] == last)[:3]
    masked = changed[of_last].astype(np.float32)
    np.testing.assert_allclose(programs.log_probs(broken, rows, masked, shared, like), wanted_KN2[of_last], atol=1e-5)
    assert "stablehlo.case" in programs.log_probs.lower(broken, rows, masked, shared, like).as_text()


def test_derivatives_of_each_pair_by_the_masks_are_those_of_small_changes(tiny_models):
    tiny, rows = tiny_models["mixed"], pairs_of(tiny_models["mixed"], 4)
    shape = (tiny.config.n_layers, tiny.config.n_heads)
    passes = masks.MaskedPasses(masks.build(tiny.model, 0.7, masks.Search(at_once=3)), tiny.params, rows)
    mask_LH, step = np.random.default_rng(5).uniform(0.2, 0.8, shape), 0.005
    moved = step * np.eye(mask_LH.size).reshape(-1, *shape)
    more, less = (passes.log_probs(mask_LH + sign * moved) for sign in (1, -1))
    wanted_N2LH = np.moveaxis((more - less) / (2 * step), 0, -1).reshape(3, 2, *shape)
    assert np.abs(wanted_N2LH).max() > 0.1
    np.testing.assert_allclose(passes.slopes(mask_LH), wanted_N2LH, atol=3e-3)
