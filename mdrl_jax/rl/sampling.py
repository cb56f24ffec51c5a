"""The distribution that tokens are drawn from, and the draw of one token a row.

`rollout.py` calls `draw` at every step of the decoding loop. On a large vocabulary a sort, or V random numbers a row,
can cost more than the model itself. Therefore the thresholds of top-k and top-p are found by bisection instead of a
sort, and a token is drawn by inverting the cumulative distribution at one uniform number a row, instead of by the
largest of V Gumbel numbers.

Letters of shapes: B rows, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.errors import UserError
from mdrl_jax.model.attention import NEGATIVE
from mdrl_jax.section import section

_ONE = int(np.float32(1).view(np.int32))  # the bit pattern of 1


@section
class SamplingConfig:
    """How completions are drawn.

    Attributes:
      temperature: divides the logits; 0: always take the most probable token.
      top_k: draw only from this many most probable tokens; 0: from all.
      top_p: draw only from the smallest set of most probable tokens whose mass reaches top_p; 1: from all.

    Raises:
      UserError: if temperature or top_k is below 0, or top_p is not above 0 and at most 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} is not valid; it must be >= 0")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is not valid; it must be >= 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not valid; it must be above 0 and at most 1")


def sampling_log_probs(logits_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Log-probs of the distribution that tokens are drawn from.

    Temperature 0 puts all mass on the largest logit, on the first one if several are equal. Otherwise temperature,
    top-k and top-p apply in this order, as in vLLM and transformers. Tokens that tie with the last token kept by top-k
    or top-p are kept too; they tie if their float32 probabilities are equal.

    Args:
      logits_BV: logits of the model [B, V], before the temperature.
      sampling: temperature, top-k and top-p. A top-k of V or more excludes nothing.

    Returns:
      log-probs in nats [B, V]; excluded tokens get about -1e30, a finite number that stands for minus infinity.
    """
    if sampling.temperature == 0:
        best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=bool)
        return jnp.where(best_BV, 0.0, NEGATIVE)
    scaled_BV = logits_BV / sampling.temperature
    if _excludes(sampling, logits_BV.shape[-1]):
        scaled_BV = jnp.where(_kept(scaled_BV, sampling) > 0, scaled_BV, NEGATIVE)
    return jax.nn.log_softmax(scaled_BV, axis=-1)


def draw(logits_BV: jax.Array, uniform_B: jax.Array, sampling: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Draws one token of each row from the distribution of `sampling_log_probs`.

    The token is the first one at which the cumulative probability exceeds the uniform number. An excluded token is
    never drawn.

    Args:
      logits_BV: logits of the model [B, V], before the temperature.
      uniform_B: a uniform random number of each row [B], float32, at least 0 and below 1.
      sampling: temperature, top-k and top-p; with temperature 0 the random numbers do not matter.

    Returns:
      (token ids [B], int32; their log-probs in nats under that distribution [B]). A log-prob is not finite where a row
      has a logit that is NaN or +∞, or becomes +∞ by the temperature; its token means nothing then.
    """
    if sampling.temperature == 0:
        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.where(finite_B, 0.0, jnp.nan)
    if not _excludes(sampling, logits_BV.shape[-1]):
        token_B, chosen_B = _inverse(jnp.exp(sampling_log_probs(logits_BV, sampling)), uniform_B)
        return token_B, jnp.log(chosen_B)
    weight_BV = _kept(logits_BV / sampling.temperature, sampling)
    token_B, chosen_B = _inverse(weight_BV, uniform_B)
    return token_B, jnp.log(chosen_B / jnp.sum(weight_BV, axis=-1))


def _excludes(sampling: SamplingConfig, vocab: int) -> bool:
    return 0 < sampling.top_k < vocab or sampling.top_p < 1


def _kept(logits_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Probabilities in units of the largest [B, V], with 0 at the tokens that top-k and top-p exclude.

    Args:
      logits_BV: the logits divided by the temperature.
      sampling: top-k and top-p.
    """
    vocab = logits_BV.shape[-1]
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    if 0 < sampling.top_k < vocab:
        least_B1 = jnp.min(weight_BV, axis=-1, keepdims=True)
        weight_BV = _heaviest(weight_BV, jnp.full_like(least_B1, sampling.top_k), least_B1, count=True)
    if sampling.top_p < 1:
        all_B1 = jnp.sum(weight_BV, axis=-1, keepdims=True)
        # Each token below this has less than the share (1 − top_p) / V, so all of them have less than 1 − top_p.
        least_B1 = jnp.minimum(all_B1 * ((1 - sampling.top_p) / vocab), 1.0)
        weight_BV = _heaviest(weight_BV, sampling.top_p * all_B1, least_B1, count=False)
    return weight_BV


def _heaviest(weight_BV: jax.Array, wanted_B1: jax.Array, low_B1: jax.Array, *, count: bool) -> jax.Array:
    """The weights of the fewest tokens that have the wanted sum, and 0 elsewhere.

    Bisection finds a threshold, and tokens of at least this weight are kept. It halves the interval of float32 bit
    patterns: those of positive numbers are in the order of the numbers and nearly in proportion to their logarithms. It
    stops for a row as soon as two tokens at most are between its bounds, because close ones would take many more steps.
    Each step is a single sum over the vocabulary; the number of tokens between two thresholds follows from the sums.

    Args:
      weight_BV: the weights, of which the largest of each row is 1.
      wanted_B1: the wanted sum of weights, above 0.
      low_B1: a threshold, at most 1, whose tokens have the wanted sum.
      count: whether each token counts 1 in the sum in place of its weight.
    """

    def number(bits_B1: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)

    def above(bits_B1: jax.Array) -> jax.Array:
        kept_BV = weight_BV >= number(bits_B1)
        return jnp.sum(jnp.where(kept_BV, 1.0 if count else weight_BV, 0.0), axis=-1, keepdims=True)

    # The sum at or above `low` is at least what is wanted, and that at or above `high` is less.
    low_B1 = jax.lax.bitcast_convert_type(low_B1, jnp.int32)
    high_B1 = jnp.full_like(low_B1, _ONE + 1)
    state = low_B1, high_B1, above(low_B1), jnp.zeros_like(wanted_B1)

    def open_rows(state: tuple[jax.Array, ...]) -> jax.Array:
        low_B1, high_B1, sum_low_B1, sum_high_B1 = state
        one_B1 = jnp.ones_like(wanted_B1) if count else number(low_B1)  # the least that one more token has
        return (sum_low_B1 - sum_high_B1 > 2.5 * one_B1) & (high_B1 - low_B1 > 1)

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low_B1, high_B1, sum_low_B1, sum_high_B1 = state
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        sum_B1, going_B1 = above(middle_B1), open_rows(state)
        up_B1 = going_B1 & (sum_B1 >= wanted_B1)
        down_B1 = going_B1 & ~up_B1
        return (
            jnp.where(up_B1, middle_B1, low_B1),
            jnp.where(down_B1, middle_B1, high_B1),
            jnp.where(up_B1, sum_B1, sum_low_B1),
            jnp.where(down_B1, sum_B1, sum_high_B1),
        )

    low_B1, high_B1, *_ = jax.lax.while_loop(lambda state: jnp.any(open_rows(state)), halve, state)
    below_BV = jnp.where(weight_BV < number(high_B1), weight_BV, 0.0)
    larger_B1 = jax.lax.bitcast_convert_type(jnp.max(below_BV, axis=-1, keepdims=True), jnp.int32)
    low_B1 = jnp.where(above(larger_B1) >= wanted_B1, larger_B1, low_B1)
    return jnp.where(weight_BV >= number(low_B1), weight_BV, 0.0)


def _inverse(weight_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first token at which the cumulative weight exceeds `uniform` times the whole, and its weight.

    The vocabulary is cut into about √V blocks: the first search is over sums of blocks, the second within one block. If
    rounding leaves no such block or token, the last one with a weight above 0 is taken, so a token of weight 0 is never
    drawn.
    """
    batch, vocab = weight_BV.shape
    width = 2 ** math.ceil(math.log2(vocab) / 2)
    blocks = -(-vocab // width)
    weight_BNK = jnp.pad(weight_BV, ((0, 0), (0, blocks * width - vocab))).reshape(batch, blocks, width)
    sum_BN = jnp.sum(weight_BNK, axis=-1)
    end_BN = jnp.cumsum(sum_BN, axis=-1)
    target_B = uniform_B * end_BN[:, -1]
    block_BN = _first(end_BN, sum_BN, target_B)
    start_B = jnp.sum(jnp.where(block_BN, end_BN - sum_BN, 0.0), axis=-1)
    # A masked sum in place of a gather, which would collect a sharded vocabulary on every device.
    inside_BK = jnp.sum(jnp.where(block_BN[:, :, None], weight_BNK, 0.0), axis=1)
    token_BK = _first(jnp.cumsum(inside_BK, axis=-1), inside_BK, target_B - start_B)
    token_B = jnp.argmax(block_BN, axis=-1) * width + jnp.argmax(token_BK, axis=-1)
    return token_B.astype(jnp.int32), jnp.sum(jnp.where(token_BK, inside_BK, 0.0), axis=-1)


def _first(end_BN: jax.Array, weight_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """One-hot rows [B, N]: the first entry of positive weight whose cumulative weight is above the target, or the last.

    Args:
      end_BN: cumulative weights.
      weight_BN: the weights, at least one of each row above 0.
      target_B: the target of each row.
    """
    positive_BN = weight_BN > 0
    place_BN = jax.lax.broadcasted_iota(jnp.int32, weight_BN.shape, 1)
    past_BN = positive_BN & (end_BN > target_B[:, None])
    last_B = jnp.max(jnp.where(positive_BN, place_BN, 0), axis=-1)
    chosen_B = jnp.where(jnp.any(past_BN, axis=-1), jnp.argmax(past_BN, axis=-1), last_B)
    return place_BN == chosen_B[:, None]
