"""How far a point is from being Pareto-stationary for two domains A and B (definitions §8).

The measure is min over w in [0, 1] of ‖w g_A + (1 − w) g_B‖, with the gradients of the `reward` losses. It is 0 where
no small step lowers the loss of both domains. An alternating refresh leads towards such a point.

A norm of noisy gradients is too large. So the prompts of a domain are divided into blocks, and every square is a mean
of inner products of different blocks, which is unbiased for a given w. Its interval is a jackknife over blocks, with w
found anew each time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis import gradients, samples
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.recovery.spent import spend
from mdrl_jax.stats.estimate import Record, missing, student

UNIT = "norm of a gradient"


def stationarity(probe: Probe, params: Any, domains: Sequence[str]) -> Record:
    """Samples completions of two domains at a point, and measures how far it is from Pareto-stationary.

    The completions are those of `samples.draw`; each micro-batch of `analyze.batch` prompts is a block. Tokens of the
    gradients are added to `rollouts.spent`.

    Args:
      probe: of the run.
      params: the point.
      domains: A and B.

    Returns:
      the record of `smallest`, with "domains".

    Raises:
      UserError, RuntimeError, ValueError, KeyError: as in `samples.draw`.
      Stopped: after a SIGTERM, while completions are sampled.
    """
    drawn = [probe.rows(samples.draw(probe.runtime, params, domain)) for domain in domains]
    blocks = [block for rows in drawn for block in rows]
    spend(probe.runtime, "gradient", blocks)
    held = probe.runtime.config.analyze.held
    gram = gradients.gram(lambda i: probe.gradient(params, blocks[i]), len(blocks), held)
    whole_nn = np.sum([x.sum(axis=0) for x in gram.values()], axis=0)
    return {"domains": list(domains)} | smallest(whole_nn, len(drawn[0]))


def smallest(gram_nn: NDArray[np.float64], n_a: int) -> Record:
    """The smallest norm of a convex combination of two gradients, from the inner products of their blocks.

    Args:
      gram_nn: ⟨g_i, g_j⟩ of all blocks [n, n], those of A first.
      n_a: number of A's blocks. A and B must have at least three each, which is not checked.

    Returns:
      "norm": the record of the norm, with Student's t on its square over blocks and the null 0; a square below 0 gives
      0. "weight": w, the weight of g_A. "norms": ‖g_A‖ and ‖g_B‖, estimated alike. "noise": the norm that the same
      combination would have by the noise of the blocks alone. If a gradient is not finite, "norm" has that reason and
      the rest is None.
    """
    n = len(gram_nn)
    if not np.all(np.isfinite(gram_nn)):
        return {"norm": missing("a gradient is not finite", UNIT, n), "weight": None, "norms": None, "noise": None}
    rows = np.arange(n)
    (square, weight), parts = _minimum(gram_nn, rows[:n_a], rows[n_a:])
    variance = 0.0
    for side in (rows[:n_a], rows[n_a:]):
        left = np.array([_minimum(gram_nn, *_without(rows, n_a, i))[0][0] for i in side])
        variance += (len(side) - 1) / len(side) * float(np.sum((left - left.mean()) ** 2))
    figure = student(square, float(np.sqrt(variance)), n - 2, n, UNIT)
    ends = [float(np.sqrt(max(x, 0.0))) for x in (square, figure.low, figure.high)]
    blocks = ((weight, rows[:n_a], parts[0]), (1 - weight, rows[n_a:], parts[1]))
    noise = sum(w**2 * (gram_nn[np.ix_(r, r)].mean() - signal) for w, r, signal in blocks)
    return {
        "norm": {"estimate": ends[0], "ci95": ends[1:], "null": 0.0, "n": n, "unit": UNIT},
        "weight": weight,
        "norms": [float(np.sqrt(max(x, 0.0))) for x in parts],
        "noise": float(np.sqrt(max(noise, 0.0))),
    }


def _without(rows: NDArray[Any], n_a: int, i: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return rows[:n_a][rows[:n_a] != i], rows[n_a:][rows[n_a:] != i]


def _minimum(
    gram_nn: NDArray[np.float64], a: NDArray[Any], b: NDArray[Any]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(smallest square, its w), and the squares of both gradients, from the blocks `a` and `b`."""
    own = []
    for rows in (a, b):
        block, k = gram_nn[np.ix_(rows, rows)], len(rows)
        own.append(float((block.sum() - np.trace(block)) / (k * (k - 1))))
    cross = float(gram_nn[np.ix_(a, b)].mean())
    curved = own[0] + own[1] - 2 * cross  # ‖g_A − g_B‖²
    weight = float(np.clip((own[1] - cross) / curved, 0, 1)) if curved > 0 else float(own[0] < own[1])
    square = weight**2 * own[0] + 2 * weight * (1 - weight) * cross + (1 - weight) ** 2 * own[1]
    return (square, weight), (own[0], own[1])
