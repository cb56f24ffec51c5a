"""How much second-order damage a low-dimensional subspace captures (definitions §7, claim C5).

With H the Hessian of domain A's loss at θ*_A, ℛ the route, S the span of the leading eigenvectors of P_ℛ H P_ℛ and D
the displacement, DᵀHD = D_SᵀHD_S + 2 D_SᵀHD_⊥ + D_⊥ᵀHD_⊥ is split on the ladder all → ℛ → S. Domain A's prompts come
in two halves; the vectors found on one are judged on the other, and the two are pooled, so that each prompt is
counted once and never by vectors that saw it. Every figure is a mean over prompts, or a function of such means, with
an interval from one set of 2,000 draws of prompts: differences and ratios are paired. The intervals take the vectors
as given.

    record = measure((first, second), route_displacement, {"qa": qa_vectors}, key, unit="nats")
    record["captured"][-1]["share"]      # c(16): {"estimate", "ci95", "null", "n", "unit"}
    record["baselines"][0]["margin"]     # c(16) minus that of the best of 40 random subspaces

Chosen where the definitions leave it open: fewer than k positive eigenvalues make c(k) that of those there are, and
its baselines have as few dimensions; random subspaces are drawn at the largest k only, where the decision falls.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdrl_jax.analysis.shares import Floats, Means
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order import subspace
from mdrl_jax.stats.bootstrap import band, percentile
from mdrl_jax.stats.estimate import missing

KS = (1, 2, 4, 8, 16)
N_RANDOM = 40
N_ANGLES = 10  # draws of the null of angles, whose spread is small
# Directions a call of `quadratic`: always this many, so that it is compiled once.
AT_ONCE = 8

_stack = program("ladder_stack", lambda *directions: jax.tree.map(lambda *x: jnp.stack(x), *directions))


@dataclasses.dataclass(frozen=True)
class Half:
    """One half of domain A's prompts: what was found on them, and how to measure on them.

    values [k], vectors [k, ...]: leading eigenpairs of P_ℛ H P_ℛ in the loss's sign, by descending algebraic value.
    null_top_values: the top eigenvalue with advantages permuted within groups, one a permutation; empty where the
      objective has no advantages, and then there is no measured dimension.
    quadratic: directions [n, ...] of the route -> dᵀH_p d [n, P] by prompt, in the loss's sign.
    complement: a direction d of the route -> (D − d)ᵀH_p(D − d) [P], in the full space.
    total_P: DᵀH_pD, in the full space.
    """

    values: ArrayLike
    vectors: Any
    null_top_values: ArrayLike
    quadratic: Callable[[Any], ArrayLike]
    complement: Callable[[Any], ArrayLike]
    total_P: ArrayLike

    def dimension(self, k: int) -> int:
        """Vectors behind c(k): those without a positive eigenvalue are dropped."""
        return min(k, int(subspace.positive(self.values).sum()))

    def measured(self) -> int | None:
        """The measured dimension of S."""
        null = self.null_top_values
        return subspace.measured_dimension(self.values, null) if np.size(null) else None

    def record(self) -> dict[str, Any]:
        """What the half's own prompts say of S."""
        null = np.asarray(self.null_top_values, float)
        return {
            "n_prompts": int(np.size(self.total_P)),
            "eigenvalues": np.asarray(self.values, float).tolist(),
            "null_top_95": float(np.quantile(null, 0.95)) if null.size else None,
            "measured_dimension": self.measured(),
        }


def measure(
    halves: tuple[Half, Half],
    displacement: Any,
    others: Mapping[str, Any],
    key: jax.Array,
    unit: str,
    ks: Sequence[int] = KS,
    n_random: int = N_RANDOM,
    support: Any = None,
) -> dict[str, Any]:
    """The cross-fitted record of captured damage, ready for JSON.

    Args:
      halves: domain A's prompts, halved.
      displacement: D on the route, a tree like one of the vectors.
      others: orthonormal eigenvectors of other domains in the same space, by domain.
      key: of the random subspaces.
      unit: of the loss ("reward", "nats").
      support: ones where the route has coordinates and zeros where it is padded; None: it is not padded.
      ks: dimensions to measure at, ascending; the ladder and the margins are at the last.

    Where the interval of DᵀHD includes 0 the shares are undefined: {"estimate": None, "reason": ...}. Shares are not
    clipped; with a DᵀHD below 0, where D lowers the loss to second order, a share is one of that gain.
    """
    first, second = halves

    def random(j: int, k: int) -> Any:
        return subspace.random_basis(jax.random.fold_in(key, j), displacement, k, support)

    judged = _columns(halves, displacement, others, random, ks, n_random)
    table = Means({name: np.concatenate([c[name] for c in judged]) for name in judged[0]}, unit)
    top, within = ks[-1], table.mean[f"S {ks[-1]}"]
    dimension = {k: [half.dimension(k) for half in halves] for k in ks}
    rungs = [("route", "route", None), ("S", f"S {top}", dimension[top])]
    if "measured S" in table.mean:
        rungs.append(("measured S", "measured S", [half.measured() for half in halves]))
    baselines = [
        table.random(f"S {top}", top, n_random),
        *(table.baseline(name, ks) for name in ("top coordinates", *_titles(others))),
    ]
    known = [b["strongest"] for b in baselines if b["strongest"] is not None]
    null = {top: max(known, default=None)}
    return {
        "unit": unit,
        "n_prompts": table.n,
        "halves": [half.record() for half in halves],
        "angles": _angles(halves, min(dimension[top]), random),
        "total": table.figure(table.mean["total"]),
        "ladder": [table.rung(*rung) for rung in rungs],
        "captured": [
            {"k": k, "dimension": dimension[k], "share": table.share(table.mean[f"S {k}"], null.get(k))} for k in ks
        ],
        "k90": table.k90(ks),
        "residual": table.figure(abs(table.mean["total"] - within) / 2),
        "baselines": baselines,
    }


def _titles(others: Mapping[str, Any]) -> list[str]:
    return [f"eigenvectors of {name}" for name in others]


Random = Callable[[int, int], Any]  # (number of the draw, dimension) -> an orthonormal basis


def _columns(
    halves: tuple[Half, Half], d: Any, others: Mapping[str, Any], random: Random, ks: Sequence[int], n_random: int
) -> list[dict[str, Floats]]:
    """Second-order terms by prompt of each half, with the vectors of the other; directions are made as they are used.

    A random subspace is drawn once for both.
    """
    first, second = halves
    judges = [_Judge(found, judged, ks) for found, judged in ((second, first), (first, second))]
    for judge in judges:
        judge.known(d, others)
    for j in range(n_random):
        basis = random(j, ks[-1])
        for judge in judges:
            judge.add(f"random {j}", subspace.project(basis, d, judge.found.dimension(ks[-1])))
    return [judge.finish() for judge in judges]


@dataclasses.dataclass
class _Judge:
    """Collects the terms of one half, `AT_ONCE` directions a call."""

    found: Half
    judged: Half
    ks: Sequence[int]
    columns: dict[str, Floats] = dataclasses.field(default_factory=dict)
    waiting: dict[str, Any] = dataclasses.field(default_factory=dict)

    def known(self, d: Any, others: Mapping[str, Any]) -> None:
        """Everything but random subspaces."""
        found, vectors = self.found, self.found.vectors
        self.columns["total"] = np.asarray(self.judged.total_P, float)
        self.add("route", d, outside=True)
        for k in self.ks:
            n = found.dimension(k)
            self.add(f"S {k}", subspace.project(vectors, d, n), outside=k == self.ks[-1])
            self.add(f"top coordinates {k}", subspace.top_coordinates(d, n))
            for title, other in zip(_titles(others), others.values(), strict=True):
                self.add(f"{title} {k}", subspace.project(other, d, n))
        if found.measured() is not None and self.judged.measured() is not None:
            self.add("measured S", subspace.project(vectors, d, found.measured()), outside=True)

    def add(self, name: str, direction: Any, outside: bool = False) -> None:
        """A direction, whose terms are computed once enough have come together."""
        if outside:
            self.columns[f"outside {name}"] = np.asarray(self.judged.complement(direction), float)
        self.waiting[name] = direction
        if len(self.waiting) == AT_ONCE:
            self._compute()

    def _compute(self) -> None:
        directions = list(self.waiting.values())
        directions += directions[-1:] * (AT_ONCE - len(directions))
        terms_nP = np.asarray(self.judged.quadratic(_stack(*directions)), float)
        self.columns |= dict(zip(self.waiting, terms_nP, strict=False))
        self.waiting.clear()

    def finish(self) -> dict[str, Floats]:
        """All terms, by name."""
        if self.waiting:
            self._compute()
        return self.columns


def _angles(halves: tuple[Half, Half], k: int, random: Random) -> dict[str, Any]:
    """Principal angles between the halves' S; the null is the band of the mean angle of S to random subspaces.

    The interval of the mean is the central 95 % of the k angles (bootstrapping prompts would repeat Lanczos).
    """
    if k == 0:
        return {"angles": [], "mean": missing("one half has no positive eigenvalue", "rad")}
    a, b = (jax.tree.map(lambda v: v[:k], half.vectors) for half in halves)
    angles = subspace.principal_angles(a, b)
    null = [subspace.principal_angles(a, random(j, k)).mean() for j in range(N_ANGLES)]
    mean = percentile(float(angles.mean()), angles, k, "rad")
    return {"angles": angles.tolist(), "mean": mean.record(band(null))}
