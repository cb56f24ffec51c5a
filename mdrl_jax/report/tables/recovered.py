"""The gain of a refresh, distillation, alternating refresh or rollback, and its cost elsewhere (definitions §2).

Choices where definitions §2 leaves room:
- "Before" is the stage that the recovery started from: after `refresh-qa`, a stage `refresh-math` starts where this
  one ended. The peak is the domain's own stage on the way there, the last one if there are several: a plain one, one of
  another order, a solo stage, or one with a prevention, each also with a label. A recovery or a placebo is no peak.
- If a score rose since its peak, there is nothing to recover, so the fraction is undefined.
- The interval of the collateral is the paired one of the domain that dropped most. It does not account for the
  selection by the maximum.
"""

from dataclasses import dataclass

import numpy as np

from mdrl_jax.report.tables.matrix import Matrix, Quantity, difference, rows_on_the_way, start_row, trained_domain
from mdrl_jax.stage import is_own
from mdrl_jax.stats import estimate


@dataclass(frozen=True)
class Recovery:
    """The gain and the cost of one refresh, distillation, alternating refresh or rollback stage.

    Attributes:
      stage, domain: the stage, and the domain that it recovers.
      loss: S_peak − S_before of the domain, in points: what there was to recover.
      gain: S_after − S_before of the domain, in points.
      fraction: gain / loss.
      collateral: the largest drop of any other domain, in points.
    """

    stage: str
    domain: str
    loss: Quantity
    gain: Quantity
    fraction: Quantity
    collateral: Quantity


def recoveries(matrix: Matrix) -> list[Recovery]:
    """The recovery of each `refresh-*`, `distill-*`, `alternate-*` and `rollback-*` row, in order.

    A row whose name has no domain of the matrix, such as `distill-all`, is left out. A row has figures without
    estimates if no stage on the way to its start ends at the peak of its domain, or if its start was not evaluated.
    """
    prefixes = ("refresh-", "distill-", "alternate-", "rollback-")
    rows = [s for s, name in enumerate(matrix.stages) if name.startswith(prefixes)]
    return [r for r in (_recovery(matrix, s) for s in rows) if r is not None]


def recovery_points(matrix: Matrix, stage: str) -> tuple[float, float] | None:
    """Numerator and denominator of the recovery fraction of a stage.

    Args:
      matrix: the scores.
      stage: name of a refresh, distillation or rollback stage. "Before" is the stage that it started from, and the peak
        is that of `peak_row`.

    Returns:
      (S_after − S_before, S_peak − S_before) of the recovered domain, in points; None if one of them is unknown, if the
      stage's name has no domain of the matrix, or if no stage on the way to its start ends at the domain's peak.

    Raises:
      ValueError: if the matrix has no such stage.
    """
    after = matrix.stages.index(stage)
    domain = trained_domain(stage, matrix.domains)
    rows = None if domain is None else _ends(matrix, domain, after)
    if domain is None or rows is None:
        return None
    score_S = matrix.score_SD[:, matrix.domains.index(domain)]
    top, before = rows
    gain, loss = score_S[after] - score_S[before], score_S[top] - score_S[before]
    return (float(gain), float(loss)) if np.isfinite(gain + loss) else None


def peak_row(matrix: Matrix, domain: str, stage: str) -> int | None:
    """Row, from 0, of the last stage on the way to a stage's start that ends at the peak of a domain; None without one.

    Args:
      matrix: the scores.
      domain: the domain.
      stage: name of the stage; it is not on the way itself.
    """
    own = [s for s in rows_on_the_way(matrix, stage) if is_own(matrix.stages[s], domain)]
    return own[-1] if own else None


def _ends(matrix: Matrix, domain: str, after: int) -> tuple[int, int] | None:
    """Rows of the peak and of "before" for the recovery stage in row `after`; None if there is no such row."""
    stage = matrix.stages[after]
    top, before = peak_row(matrix, domain, stage), start_row(matrix, stage)
    return (top, before) if top is not None and before is not None else None


def _recovery(matrix: Matrix, after: int) -> Recovery | None:
    stage = matrix.stages[after]
    domain = trained_domain(stage, matrix.domains)
    if domain is None:
        return None
    names = f"loss {stage}", f"gain {stage}", f"fraction {stage}", f"collateral {stage}"
    ends = _ends(matrix, domain, after)
    if ends is None:
        why = f"no stage on the way to {matrix.starts[stage]}, where {stage} started, trained {domain} alone"
        if start_row(matrix, stage) is None:
            why = f"{stage} started from {matrix.starts[stage]}, which was not evaluated"
        missing = (Quantity(n, None, why) for n in names)
        return Recovery(stage, domain, *missing)
    top, before = ends
    return Recovery(
        stage, domain,
        difference(matrix, names[0], domain, top, before),
        difference(matrix, names[1], domain, after, before),
        _fraction(matrix, names[2], domain, top, before, after),
        collateral(matrix, names[3], domain, before, after),
    )  # fmt: skip


def _fraction(matrix: Matrix, name: str, domain: str, top: int, before: int, after: int) -> Quantity:
    """(S_after − S_before) / (S_peak − S_before), with a Fieller interval over paired prompts."""
    if top == before:
        return Quantity(name, None, f"undefined: {domain} was trained last, so nothing was lost")
    loss = difference(matrix, name, domain, top, before)
    if loss.estimate is None or domain not in matrix.rewards[after]:
        return Quantity(name, None, loss.reason or f"{domain} was not evaluated after {matrix.stages[after]}")
    if loss.estimate.low <= 0:
        shown = estimate.figure_text(loss.estimate.value, (loss.estimate.low, loss.estimate.high), "+.2f")
        risen = loss.estimate.high < 0
        why = f"{domain} rose since its peak" if risen else "the interval of the loss includes 0"
        return Quantity(name, None, f"undefined: {why} (loss {shown} points)")
    peak_P, before_P, after_P = (matrix.rewards[s][domain].mean(axis=1) for s in (top, before, after))
    gain_P, lost_P = after_P - before_P, peak_P - before_P
    return Quantity(name, estimate.ratio_of_means(gain_P, lost_P, groups=matrix.groups.get(domain)))


def collateral(matrix: Matrix, name: str, domain: str, before: int, after: int) -> Quantity:
    """The largest drop of any other domain between two rows; positive is harm, negative if every other domain rose.

    Args:
      matrix: the scores.
      name: name of the resulting figure.
      domain: the domain that does not count; "" if all count.
      before, after: the two rows; a drop is the score in `before` minus that in `after`.

    Returns:
      The drop in points, paired over prompts, with the domain that dropped most (the first of equal ones) as its
      `detail`; without an estimate if no other domain was evaluated in both rows.
    """
    drops = [
        difference(matrix, name, d, before, after, d)
        for d in matrix.domains
        if d != domain and d in matrix.rewards[before] and d in matrix.rewards[after]
    ]
    if not drops:
        return Quantity(name, None, "no other domain was evaluated before and after")
    return max(drops, key=lambda q: q.estimate.value if q.estimate is not None else -np.inf)
