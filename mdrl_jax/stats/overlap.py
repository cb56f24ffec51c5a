"""Sets of channels, and how much two sets overlap compared with chance (definitions §3, §5; C2, C4).

A channel is an MLP neuron or an attention head. `scores_LC` has one score for each of C channels in L layers; a set of
channels is a boolean array of the same shape. Everything runs on the host. A *record* of a figure is {"estimate",
"ci95", "null", "n", "unit"}, with "reason" if it has no estimate (`stats/estimate.py`).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import Estimate, Record, missing, over_seeds, student, wilson
from mdrl_jax.stats.tests import null_record, permutation_p


def top_share(scores_LC: ArrayLike, share: float = 0.1) -> NDArray[np.bool_]:
    """The round(share · C) channels, or one if that is 0, with the largest scores of each layer.

    A channel with a score of 0 or less is never in the set [chosen]; otherwise the index would decide among unchanged
    channels. The same holds for a score of nan. So a layer may have fewer channels in the set, or none. Of equal scores
    the lower index comes first. A half is rounded to the even number.

    Args:
      scores_LC: the scores.
      share: share of the channels of a layer, in [0, 1].

    Returns:
      The set, a boolean array [L, C].

    Raises:
      IndexError: if the scores have fewer than two axes.
      ValueError: if a layer has no channels, or if `share` asks for more than it has.
    """
    scores = np.asarray(scores_LC, float)
    k = max(1, round(share * scores.shape[1]))
    scores = np.where(np.isnan(scores), -np.inf, scores)
    least = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    ties = scores == least
    room = k - np.sum(scores > least, axis=1, keepdims=True)
    return ((scores > least) | (ties & (np.cumsum(ties, axis=1) <= room))) & (scores > 0)


def top_share_global(scores_LC: ArrayLike, share: float = 0.1) -> NDArray[np.bool_]:
    """The round(share · L · C) channels, or one if that is 0, with the largest scores of all layers together.

    A channel with a score that is nan, 0 or less is never in the set. Of equal scores the lower layer comes first, then
    the lower index.

    Args:
      scores_LC: the scores; any shape will do.
      share: share of all channels, in [0, 1]. A half is rounded to the even number.

    Returns:
      The set, a boolean array of the shape of the scores.

    Raises:
      ValueError: if there are no channels, or if `share` asks for more than there are.
    """
    scores = np.asarray(scores_LC, float)
    return top_share(scores.reshape(1, -1), share).reshape(scores.shape)


def jaccard(a_LC: ArrayLike, b_LC: ArrayLike) -> float:
    """Jaccard index |A ∩ B| / |A ∪ B| of two sets; nan if both are empty.

    Args:
      a_LC, b_LC: the two sets, boolean arrays of one shape.

    Raises:
      ValueError: if their shapes cannot be broadcast together.
    """
    a, b = np.asarray(a_LC, bool), np.asarray(b_LC, bool)
    union = int(np.sum(a | b))
    return int(np.sum(a & b)) / union if union else math.nan


def half_sets(n_blocks: int, n_halves: int = 64) -> NDArray[np.bool_]:
    """Random halves of M blocks, from a fixed seed, boolean [n_halves, M]: ⌊M/2⌋ blocks of each half are true.

    The halves are drawn independently, so a half may occur several times.
    """
    ranks = np.argsort(np.argsort(np.random.default_rng(0).random((n_halves, n_blocks)), axis=1), axis=1)
    return ranks < n_blocks // 2


def half_sampled(value: float, halves: ArrayLike, n_blocks: int, unit: str = "") -> Estimate:
    """`value`, a figure of M blocks, with Student's t interval from the same figure on random halves of the blocks.

    This is the jackknife that leaves out d = M − ⌊M/2⌋ blocks at a time: stderr² = (M − d)/d · variance over halves
    (Shao and Wu, 1989). It suits figures that jump, such as the overlap of two sets that thresholds cut. Leaving out
    one block at a time makes their intervals almost twice too wide or, where few channels are near a threshold, too
    narrow. The interval is for the mean of the figure over samples of as many blocks. It does not allow for a bias that
    shrinks with more blocks.

    Args:
      value: the figure on all blocks.
      halves: the figure on each of the halves of `half_sets`, at least one. If one of them is nan or infinite, the
        interval is the whole line.
      n_blocks: M. With fewer than two blocks the interval is the whole line.
      unit: of the figure.

    Returns:
      The estimate, with M as its `n`; Student's t has M − 1 degrees of freedom.
    """
    drawn, kept = np.asarray(halves, float), n_blocks // 2
    if kept < 1 or not np.isfinite(drawn).all():
        return student(value, math.inf, 0, n_blocks, unit)
    return student(value, math.sqrt(kept / (n_blocks - kept) * float(drawn.var())), n_blocks - 1, n_blocks, unit)


def overlap(
    a_LC: ArrayLike, b_LC: ArrayLike, n_permutations: int = 10_000, rng: np.random.Generator | None = None
) -> Record:
    """The Jaccard index of two sets as a record with its null.

    The null draws random sets with the sizes of each layer kept. Their overlap is hypergeometric, so only the overlap
    is drawn. The interval is Wilson's of the Dice coefficient D = 2|A∩B|/(|A|+|B|) over (|A|+|B|)/2 channels, mapped by
    J = D/(2 − D). Its unit is the channel, so it does not cover the variation over training seeds. It is somewhat too
    wide if the sets are very similar.

    Args:
      a_LC, b_LC: the two sets, boolean.
      n_permutations: draws of the null, at least 1.
      rng: of the draws, whose state changes; by default a new one with the seed 0.

    Returns:
      the record, whose "n" is L · C, whose unit is "channel" and whose null is that of `tests.null_record`. It also has
      "chance", the ratio of the expected intersection to the expected union, which is k/(2 − k) if both sets are the
      same share k of every layer; "p", one-sided, of an overlap larger than chance (`tests.permutation_p`); and
      "shared", |A ∩ B|. If both sets are empty, it has no estimate, "n" and "shared" are 0, and its null, chance and p
      are None.

    Raises:
      ValueError: if the sets differ in shape, or do not have the two axes [L, C].
      IndexError: if there are no draws.
    """
    a, b = np.asarray(a_LC, bool), np.asarray(b_LC, bool)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"the two sets of channels need the same shape [L, C], not {a.shape} and {b.shape}")
    rng = np.random.default_rng(0) if rng is None else rng
    n_a, n_b, channels = a.sum(axis=1), b.sum(axis=1), a.shape[1]
    size, shared = int(n_a.sum() + n_b.sum()), int(np.sum(a & b))
    if not size:
        return missing("both sets are empty", "channel") | {"chance": None, "p": None, "shared": 0}
    drawn = rng.hypergeometric(n_a, channels - n_a, n_b, (n_permutations, a.shape[0])).sum(axis=1)
    null = drawn / (size - drawn)
    expected = float(np.sum(n_a * n_b / channels))
    value = shared / (size - shared)
    low, high = (d / (2 - d) for d in wilson(2 * shared / size, size / 2))
    record = Estimate(value, low, high, a.size, "channel").record(null_record(null))
    return record | {"chance": expected / (size - expected), "p": permutation_p(value, null), "shared": shared}


def mean_jaccard(pairs: Mapping[tuple[str, str], Sequence[float]]) -> Estimate:
    """Mean Jaccard index over all pairs of domains.

    With two seeds or more the unit is the seed: Student's t over the seeds' means. With one seed the unit is the
    domain: a jackknife that leaves out all pairs of one domain, because pairs that share a domain are not independent.
    The jackknife needs three domains; with fewer, the interval is the whole line.

    Args:
      pairs: by pair of domains, its Jaccard index in each seed; the same number of seeds for every pair. The jackknife
        needs every pair of the domains that occur; this is not checked. A nan among the indices makes the mean nan.

    Returns:
      The estimate, with "seed" or "domain" as its unit and their number as its `n`. With one seed and fewer than three
      domains `n` is 1.

    Raises:
      ValueError: if there are no pairs, or if they differ in their number of seeds.
    """
    values_PS = np.asarray(list(pairs.values()), float)
    if values_PS.ndim != 2 or values_PS.size == 0:
        raise ValueError("every pair of domains needs a Jaccard index for each seed")
    if values_PS.shape[1] > 1:
        return over_seeds(values_PS.mean(axis=0), "seed")
    domains = sorted({d for pair in pairs for d in pair})
    mean = float(values_PS.mean())
    if len(domains) < 3:
        return student(mean, math.inf, 0, 1, "domain")
    left = [np.mean([v for p, v in zip(pairs, values_PS[:, 0], strict=True) if d not in p]) for d in domains]
    return jackknife(mean, left, "domain")
