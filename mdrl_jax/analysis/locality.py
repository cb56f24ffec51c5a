"""How local the theory is: one expansion at a peak against the damage of edits of several sizes (definitions §7).

The theory of interference expands the loss of a domain A to second order at its peak θ*_A. Several trainings of other
domains start there, with other learning rates or optimizers, and move by D of other lengths. For each of them this
module measures

- how long D is, and which share of weights keeps its bfloat16 value,
- A's damage by prompt, and the R² over prompts of the damage that one expansion at θ*_A predicts,
- the curvature share of the damage (definitions §6),
- the share of the damage that removing P_S D undoes, with S in the space of all parameters (definitions §7).

The damage is the rise of −log π of the completions that succeeded at θ*_A, in nats a completion. S is sought once,
because it depends on θ*_A alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis import edits
from mdrl_jax.analysis.damage import SEGMENTS, UNITS
from mdrl_jax.analysis.expansion import Draws, expansion, nll_rise, segment_records
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace import removal
from mdrl_jax.second_order.objectives import DirectionalDerivatives
from mdrl_jax.stats.bootstrap import band
from mdrl_jax.stats.estimate import Estimate, Record, missing

OBJECTIVE = "success_nll"
SPACE = "all parameters"
PERMUTATIONS = 400  # of the predictions among the prompts, for the null of R²


def measure(
    probe: Probe,
    start: Any,
    names: Sequence[str],
    params: Callable[[str], Any],
    sample: Sample,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The figures of several edits that start at one peak.

    Args:
      probe: the compiled device programs and the configuration.
      start: θ*_A, a tree of parameters.
      names: names of the stages that start there.
      params: (name of a stage) -> the parameters at its end.
      sample: completions of domain A, sampled at θ*_A, at least two for each prompt.
      progress: told what is being computed.

    Yields:
      for each stage, in order: {"stage", "norm": ‖D‖, "relative_norm": ‖D‖/‖θ*_A‖, "unchanged", "damage", "predicted",
      "ratio", "r2", "curvature_share", "removal"}. "unchanged" is the record of the share of weights whose bfloat16
      value did not change. The other figures are records over prompts: the measured and the predicted damage, predicted
      / measured, `explained`, and the curvature share of 8 segments on the first `analyze.path_prompts` prompts.
      "removal" is the record of `removal.measure` with the "eigenvalues" of S on each half of the prompts; it is absent
      if no completion succeeded in one half.

    Raises:
      UserError: as in `lanczos.block_lanczos`, if the search for S fails.
      ValueError: if a damage is not finite, there is only one completion of each prompt, or as in `conflict.pack`.
      IndexError: if `sample` has fewer prompts than `analyze.path_prompts`.
    """
    everywhere = jax.tree.map(lambda _: np.ones((), np.float32), start)
    found, eigenvalues = removal.search(probe, SPACE, start, everywhere, sample, progress)
    before_PGT, draws, unit = probe.log_probs(start, sample), Draws(sample.n_prompts), UNITS[OBJECTIVE]
    for name in names:
        progress(f"{name}: expansion")
        end = params(name)
        displacement = probe.difference(end, start)
        figures = edits.edit_figures(start, end)["all"]
        order = probe.derivatives(start, displacement, sample)[OBJECTIVE]
        after_PGT = probe.log_probs(end, sample)
        measured_R = nll_rise(sample, before_PGT, after_PGT, draws)
        once = expansion(order, draws, 1.0, measured_R)
        fall_PG = (before_PGT - after_PGT).sum(axis=2, dtype=np.float64)
        row = {
            "stage": name,
            "norm": figures["norm"]["estimate"],
            "relative_norm": figures["relative_norm"]["estimate"],
            "unchanged": figures["bf16"]["unchanged"],
            "damage": draws.figure(measured_R, unit),
            "predicted": draws.figure(once.predicted_R, unit),
            "ratio": draws.share(once.predicted_R, measured_R, "predicted / measured"),
            "r2": explained(order, (sample.success_PG * fall_PG).sum(axis=1)),
            "curvature_share": _curvature_share(probe, start, displacement, sample, progress, name),
        }
        if found:
            told = lambda text, name=name: progress(f"{name}: {text}")  # noqa: E731
            space = removal.whole(SPACE, start, displacement, everywhere, probe.along)
            row["removal"] = removal.of_sample(probe, space, sample, found, told) | {"eigenvalues": eigenvalues}
        yield row


def explained(order: DirectionalDerivatives, measured_P: np.ndarray) -> Record:
    """R² over prompts of the damage that one expansion predicts: 1 − Σ(m_p − q_p)² / Σ(m_p − m̄)².

    m_p and q_p are the measured and the predicted mean damage of prompt p over its successes. R² is 1 if every prompt
    is predicted without error, 0 if the prediction is as good as the mean damage, and negative if it is worse.

    Args:
      order: first and second orders of the success NLL along D, by prompt.
      measured_P: Σ of the measured rises of −log π over the prompt's successes.

    Returns:
      the record over the prompts with a success. Its null is [low, high], the central 95 % of R² with the predictions
      permuted among the prompts. The interval is bootstrap-t of log(Σ(m_p − q_p)² / Σ(m_p − m̄)²), because both sums
      are above 0 and have long tails. It has no estimate if fewer than three prompts have a success or if their
      damages do not differ, and no interval if every prompt is predicted without error.
    """
    known = order.count_P > 0
    count_P = order.count_P[known]
    m_P = measured_P[known] / count_P
    q_P = (order.first_P[known] + 0.5 * order.second_P[known]) / count_P
    n = m_P.size
    if n < 3:
        return missing("fewer than three prompts have a success", "share", n)
    draws, rng = Draws(n), np.random.default_rng(0)
    one_R = draws.total(np.ones(n))
    spread_R = draws.total(m_P**2) - draws.total(m_P) ** 2 / one_R
    missed_R = draws.total((m_P - q_P) ** 2)
    total, missed = (float(((m_P - x) ** 2).sum()) for x in (m_P.mean(), q_P))
    if not total > 1e-12 * float((m_P**2).sum()):
        return missing("the damages of the prompts do not differ", "share", n)
    permuted = [1 - float(((m_P - rng.permutation(q_P)) ** 2).sum()) / total for _ in range(PERMUTATIONS)]
    ends = -math.inf, math.inf
    if missed > 1e-12 * total:
        known = (missed_R > 0) & (spread_R > 0)  # a draw of one prompt alone has no spread
        log_R = np.full(known.shape, np.nan)
        log_R[known] = np.log(missed_R[known] / spread_R[known])
        found = draws.interval(log_R)
        ends = 1 - math.exp(found.high), 1 - math.exp(found.low)
    return Estimate(1 - missed / total, *ends, n, "share").record() | {"null": band(np.array(permuted))}


def _curvature_share(
    probe: Probe, start: Any, displacement: Any, sample: Sample, progress: Callable[[str], None], name: str
) -> Record:
    """1 − g(θ*)·D / (prediction in 8 segments), on the first `analyze.path_prompts` prompts."""
    sample = sample.take(np.arange(probe.runtime.config.analyze.path_prompts))
    draws, n, orders = Draws(sample.n_prompts), SEGMENTS[-1], {}
    for j in range(n):
        progress(f"{name}: segment {j + 1} of {n}")
        point = probe.along(start, displacement, np.float32(j / n)) if j else start
        orders[j / n] = probe.derivatives(point, displacement, sample)[OBJECTIVE]
    measured_R = np.full(draws.total(np.ones(sample.n_prompts)).shape, np.nan)
    return segment_records(orders, [n], measured_R, draws, UNITS[OBJECTIVE])[0]["curvature_share"]
