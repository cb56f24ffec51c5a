"""The contraction theorem on a run: its assumptions as measured, the factor that it gives, and the measured factor.

The theorem bounds what a step of a refresh does to the displacement e = θ − θ* in a conflict subspace S (definitions
§8). Plain gradient descent multiplies ‖P_S e‖ by at most 1 − αμ if there is no gradient in S at θ*, S is invariant
under the Hessian, μ > 0, and αλmax ≤ 1. `analysis/subspace/theorem.py` measures the assumptions at θ*, and the refresh
records the factor (`recovery/refresh/contraction.py`).

An assumption *holds* or *does not hold* if its interval lies wholly on one side of what is asked. Otherwise it is
*undecided*. No measurement shows that a gradient is 0 or that S is invariant. These two hold if ‖P_S ∇L(θ*)‖ and
ε‖P_S⊥ e₀‖, which the theorem leaves out, are at most a tenth of |μ|‖P_S e₀‖, which it counts on [chosen].

Intervals of sums and ratios take the worst ends of their parts. They cover more than 95 %.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.stats.estimate import Estimate, Record

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
TOLERANCE = 0.1  # of |μ|‖P_S e₀‖: how large the gradient in S, and what H brings into S from outside, may be
PLAIN = "gradient descent"  # the name of an optimizer without momentum and without a scale of its own
FACTOR = "factor a step"
SHARE = "share of |μ|‖P_S e₀‖"


@dataclasses.dataclass(frozen=True)
class Assumption:
    """One assumption of the theorem.

    Attributes:
      name: what is assumed.
      asked: what the measured figure has to be.
      verdict: `HOLDS`, `FAILS` or `OPEN`.
      figure: the measured figure; None if there is none.
      text: what was found in place of a figure, or why there is no figure.
      more: further figures, by what they are.
    """

    name: str
    asked: str
    verdict: str
    figure: Estimate | None = None
    text: str = ""
    more: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Check:
    """The theorem for one S and one refresh.

    Attributes:
      head: "objective", "half", "stage" and "k" of S.
      alpha: α, the learning rate of the refresh.
      assumptions: the five assumptions, in the order of the module docstring, the optimizer first.
      factor: 1 − αμ; None if μ was not measured.
      bound: 1 − αμ + α(ε‖P_S⊥ e₀‖ + ‖P_S ∇L(θ*)‖)/‖P_S e₀‖, which allows for a gradient in S and for the part of e
        outside S; for the first step, from e₀ at its start.
      measured: the mean factor of ‖P_S e‖ a step of the refresh, a record.
    """

    head: Record
    alpha: float
    assumptions: tuple[Assumption, ...]
    factor: Estimate | None
    bound: Estimate | None
    measured: Record

    def summary(self) -> str:
        """Which assumptions hold, what follows, and how the measured factor compares with the bound."""
        parts = []
        for verdict in (HOLDS, FAILS, OPEN):
            names = [a.name for a in self.assumptions if a.verdict == verdict]
            parts += [f"{verdict}: {', '.join(names)}"] if names else []
        verdicts = {a.verdict for a in self.assumptions}
        so = "the theorem applies"
        if FAILS in verdicts:
            so = "the theorem does not apply, and its factor is only descriptive"
        elif OPEN in verdicts:
            so = "whether the theorem applies is undecided"
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}. So {so}. {self._compared()}."

    def _compared(self) -> str:
        ends = self.measured["ci95"]
        if self.bound is None or ends is None:
            return "The measured factor cannot be compared with the bound, because one of them has no interval"
        if ends[1] <= self.bound.low:
            return "The measured factor is below the bound"
        over = ends[0] > self.bound.high
        return "The measured factor is above the bound" if over else "The intervals of factor and bound overlap"


def checks(refresh: Record, pairs: Sequence[Record], optimizer: str) -> list[Check]:
    """The theorem for every S of which both the analysis and the refresh have a record.

    Args:
      refresh: `recovery/refresh-A.json`.
      pairs: "pairs" of `analysis/subspace.json`.
      optimizer: the name of the optimizer of the refresh; `PLAIN`, "gradient descent", if it has no momentum and no
        scale of its own. With any other name the first assumption does not hold.

    Returns:
      One check for each such S, in the order of the refresh. S without a vector is left out, and so is S in which e₀
      has no part. If the analysis could not measure S, its check has no factor and no bound, and the assumptions about
      S are undecided.

    Raises:
      KeyError: if a record lacks a field.
    """
    known = {(p["stage"], p["objective"]): p.get("theorem") for p in pairs if p["domain"] == refresh["domain"]}
    found = []
    for i, basis in enumerate(refresh.get("contraction", ())):
        theorem, start = known.get((basis["stage"], basis["objective"])), refresh["steps"][0]["subspaces"][i]
        if theorem is not None and basis["bound"]["factor"] is not None and start["within"] > 0:
            found.append(_check(basis, start, theorem["halves"][basis["half"]], optimizer))
    return found


def _check(basis: Record, start: Mapping[str, Any], half: Record, optimizer: str) -> Check:
    """The check of one S.

    Args:
      basis: its record of the contraction.
      start: ‖P_S e₀‖ ("within") and ‖P_S⊥ e₀‖ ("outside").
      half: its record of the analysis.
      optimizer: as in `checks`.
    """
    head = {name: basis[name] for name in ("objective", "half", "stage", "k")}
    alpha, within, outside = basis["bound"]["alpha"], start["within"], start["outside"]
    names = ("no gradient in S", "S invariant under H", "μ > 0", "α ≤ 1/λmax")
    little = f"0, or a share of at most {TOLERANCE:g}"
    asked = (little, little, "above 0", "αλmax at most 1")
    descends = optimizer == PLAIN
    why = "" if descends else f", whose steps have no single α (learning rate {alpha:g})"
    first = Assumption("plain gradient descent on L", PLAIN, HOLDS if descends else FAILS, text=f"{optimizer}{why}")
    if "reason" in half:
        rest = (Assumption(n, a, OPEN, text=half["reason"]) for n, a in zip(names, asked, strict=True))
        return Check(head, alpha, (first, *rest), None, None, basis["within"])
    gradient, mu, top, epsilon = (_read(half[name]) for name in ("gradient", "mu", "lambda_max", "epsilon"))
    leak, contraction = epsilon.scaled(outside, ""), _size(mu).scaled(within, "")
    of_gradient, of_leak = (_ratio(x, contraction, SHARE) for x in (gradient, leak))
    more = {SHARE: of_gradient}
    if half["shift"]["estimate"] is not None:
        # The analysis has it as a share of its own displacement. The refresh may start elsewhere.
        share = half["norms"]["within"] / within
        more["distance of the minimum in S from θ*, in ‖P_S e₀‖"] = _read(half["shift"]).scaled(share, "")
    alpha_top = top.scaled(alpha, "αλmax")
    rest = (
        Assumption(names[0], asked[0], _below(of_gradient, TOLERANCE), gradient, more=more),
        Assumption(
            names[1], asked[1], _below(of_leak, TOLERANCE), epsilon,
            more={"in units of |μ|": _ratio(epsilon, _size(mu), "|μ|"), SHARE: of_leak},
        ),
        Assumption(names[2], asked[2], HOLDS if mu.low > 0 else OPEN if mu.high > 0 else FAILS, mu),
        Assumption(names[3], asked[3], _below(alpha_top, 1.0) if descends else OPEN, alpha_top),
    )  # fmt: skip
    factor = Estimate(1 - alpha * mu.value, 1 - alpha * mu.high, 1 - alpha * mu.low, mu.n, FACTOR)
    bound = _sum(factor, gradient.scaled(alpha / within, ""), leak.scaled(alpha / within, ""))
    return Check(head, alpha, (first, *rest), factor, bound, basis["within"])


def _read(figure: Record) -> Estimate:
    low, high = figure["ci95"] or (-math.inf, math.inf)
    return Estimate(figure["estimate"], low, high, figure["n"], figure["unit"])


def _sum(first: Estimate, *others: Estimate) -> Estimate:
    """The sum, with the sums of the ends as its interval, in the unit of the first one."""
    every = (first, *others)
    value, low, high = (sum(getattr(x, name) for x in every) for name in ("value", "low", "high"))
    return dataclasses.replace(first, value=value, low=low, high=high, stderr=None)


def _size(figure: Estimate) -> Estimate:
    """The estimate of the absolute value."""
    ends = abs(figure.low), abs(figure.high)
    return dataclasses.replace(
        figure, value=abs(figure.value), low=0.0 if figure.includes(0.0) else min(ends), high=max(ends)
    )


def _ratio(part: Estimate, whole: Estimate, unit: str) -> Estimate:
    """part / whole, both at least 0; infinite where the whole is 0 and the part is not."""

    def over(x: float, y: float) -> float:
        return x / y if y > 0 else math.inf if x > 0 else 0.0

    low, high = over(part.low, whole.high), over(part.high, whole.low)
    return Estimate(over(part.value, whole.value), low, high, part.n, unit)


def _below(figure: Estimate, most: float) -> str:
    """Whether the figure is at most `most`, by its interval."""
    return HOLDS if figure.high <= most else FAILS if figure.low > most else OPEN
