"""What the rules of C1 to C5 judge: figures from the records of a run, put together by `analysis/assembly.py`.

A figure is {"estimate", "ci95", "null", "n", "unit"}. A figure that could not be measured has the estimate None and a
"reason".
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mdrl_jax.stats.estimate import Record


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """How sparse an edit is (definitions §3).

    Attributes:
      unchanged: share of weights whose bfloat16 value did not change.
      small: share of entries with |δ| < 0.1·rms(δ) of their tensor; 0.080 of a Gaussian edit.
      participation: participation ratio within tensors; 1/3 of a Gaussian edit. Smaller is sparser.
    """

    unchanged: Record
    small: Record
    participation: Record


@dataclasses.dataclass(frozen=True)
class Edit:
    """The edit of one domain.

    Attributes:
      domain: the trained domain.
      source: "solo", or "sequential" if there was no solo stage.
      rl: how sparse the edit is.
      sft: the same of supervised training on the domain to the same score; None if it has not run.
      random_signs: the same of each recorded update with fresh random signs; None if updates were not recorded.
      relative_share: share of entries with |δ|/|θ| < 1e-3 (first edition).
      participation: participation ratio over all tensors, (Σδ²)² / (nΣδ⁴) (first edition).
      sft_note: how long and with which learning rate `sft` was trained; if it is None, why it cannot be compared, or ""
        if no supervised stage has run.
    """

    domain: str
    source: str
    rl: Sparsity
    sft: Sparsity | None
    random_signs: Sparsity | None
    relative_share: Record
    participation: Record
    sft_note: str = ""


@dataclasses.dataclass(frozen=True)
class GradientPair:
    """The gradients of an earlier domain A and a later domain B at one point.

    Attributes:
      earlier, later: the names of A and B.
      cosine: cosine over the full model, corrected for noise (disattenuated).
      reliability: ρ of each domain's gradient, by domain.
      positive, negative: cross-fitted sums over tensors of the positive and of the negative inner products.
      conflicting, synergistic: number of tensors whose inner product is measurably below 0 and above 0, by
        Benjamini–Hochberg at q = 0.05.
      damage: measured damage of A's reward by B.
    """

    earlier: str
    later: str
    cosine: Record
    reliability: Mapping[str, Record]
    positive: Record
    negative: Record
    conflicting: int
    synergistic: int
    damage: Record


@dataclasses.dataclass(frozen=True)
class RoutePair:
    """The routes of two domains.

    Attributes:
      domains: names of the two.
      jaccard: their Jaccard index.
      null_high: the 97.5th percentile of its null, random sets of equal sizes.
    """

    domains: tuple[str, str]
    jaccard: Record
    null_high: float


@dataclasses.dataclass(frozen=True)
class CurveStep:
    """One α of the damage curve along θ* + αD.

    Attributes:
      alpha: the share of the displacement D.
      measured: measured damage at α.
      remainder: measured minus predicted damage.
      second_share: share of the prediction that is second order, ½α²DᵀHD / (α g·D + ½α²DᵀHD).
    """

    alpha: float
    measured: Record
    remainder: Record
    second_share: Record


@dataclasses.dataclass(frozen=True)
class Objective:
    """The damage of one pair by one objective (expected reward or success NLL).

    Attributes:
      curvature: 1 − g(θ*)·D / (prediction in the largest number of segments); None if it was not computed.
      removal: the record of the removal test (`analysis.subspace.removal.measure`), of which "undone", "margins", "k"
        and "share_of_norm" are read; empty if there is none.
      steps: the damage curve, one entry for each α (first edition).
      ladder: the record of the conflict subspace that `analysis.subspace.captured.measure` makes (first edition).
      reason: why the subspace could not be measured; then `ladder` and `removal` are empty.
    """

    curvature: Record | None = None
    removal: Record = dataclasses.field(default_factory=dict)
    steps: Sequence[CurveStep] = ()
    ladder: Record = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class DamagePair:
    """The damage that a later domain does to an earlier one.

    Attributes:
      earlier, later: names of the two domains.
      damage: measured damage of the reward at α = 1, with fresh samples.
      objectives: "success_nll" and "reward".
    """

    earlier: str
    later: str
    damage: Record
    objectives: Mapping[str, Objective]
