"""How much second-order damage a low-dimensional subspace captures (definitions §7, claim C5).

`conflict.find` supplies the vectors and the ways to measure with them (`Half`). This file judges the vectors, and
`shares.py` turns the terms into records.

H is the Hessian of domain A's loss at θ*_A, ℛ the shared route, S the span of the leading eigenvectors of P_ℛ H P_ℛ,
and D the displacement. With D_P = P D and D_⊥ = D − D_P,

    DᵀHD = D_PᵀHD_P + 2 D_PᵀHD_⊥ + D_⊥ᵀHD_⊥

for the projection P on ℛ, and for that on S. The captured share is c(k) = D_SᵀHD_S / DᵀHD, where S has k vectors.

Domain A's prompts come in two halves. Vectors found on one half are judged on the other, and the results of both
halves are pooled. So every prompt counts once, and no vector is judged by a prompt that it was found on. Every figure
is a mean over prompts or a function of such means. All figures use the same 2,000 draws of prompts, so that their
differences and ratios are paired. The intervals take the vectors as given.

    record = measure((first, second), route_displacement, {"qa": qa_vectors}, key, unit="nats")
    record["captured"][-1]["share"]      # c(16): {"estimate", "ci95", "null", "n", "unit"}
    record["baselines"][0]["margin"]     # c(16) of S minus that of the best of 40 random subspaces

The vectors are those of converged pairs with positive eigenvalues. If there are fewer than k, c(k) uses these, and the
baselines have as few dimensions [chosen]. Each figure records how many it used, for each half, as its "dimension".
Random subspaces are drawn at the largest k only, because the claim is decided there [chosen].
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
N_ANGLES = 10  # random subspaces in the null of the mean angle; few are enough, because its spread is small
# Directions in each call of `Half.quadratic`. The number never varies, so that the program is compiled once.
AT_ONCE = 8

_stack = program("ladder_stack", lambda *directions: jax.tree.map(lambda *x: jnp.stack(x), *directions))


@dataclasses.dataclass(frozen=True)
class Half:
    """One half of domain A's prompts: the vectors found on it, and functions that measure on it.

    Attributes:
      values: leading eigenvalues of P_ℛ H P_ℛ in the loss's sign, in descending algebraic order, [k]; only of pairs
        that have converged (`Spectrum.converged`).
      vectors: their orthonormal eigenvectors, a tree [k, ...] of the route.
      null_top_values: the top eigenvalue of each permutation of rewards. Empty if there is no null; then there is no
        measured dimension.
      quadratic: directions [n, ...] of the route -> dᵀH_p d of each prompt p, [n, P], in the loss's sign.
      complement: a direction d of the route -> (D − d)ᵀH_p(D − d) over all parameters, [P].
      total_P: DᵀH_pD over all parameters.
    """

    values: ArrayLike
    vectors: Any
    null_top_values: ArrayLike
    quadratic: Callable[[Any], ArrayLike]
    complement: Callable[[Any], ArrayLike]
    total_P: ArrayLike

    def dimension(self, k: int) -> int:
        """How many vectors c(k) uses: at most k, and only those with a positive eigenvalue."""
        return min(k, int(subspace.positive(self.values).sum()))

    def measured(self) -> int | None:
        """The measured dimension of S (definitions §7); None if there is no null of the top eigenvalue."""
        null = self.null_top_values
        return subspace.measured_dimension(self.values, null) if np.size(null) else None

    def record(self) -> dict[str, Any]:
        """The search on this half: number of prompts, eigenvalues, the null's 95th percentile, measured dimension."""
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
    """The captured damage of S and of its baselines, with the vectors of each half judged on the other.

    Args:
      halves: the two halves of domain A's prompts.
      displacement: D on the route, a tree like one of the vectors.
      others: orthonormal eigenvectors of other domains' losses in the same space, by domain.
      key: of the random subspaces.
      unit: of the loss ("reward", "nats").
      ks: the dimensions k of c(k), ascending, at least one. The ladder and the margins use the last.
      n_random: number of random subspaces, at least 1.
      support: a tree of ones with zeros where the route is padded; None if the route is not padded.

    Returns:
      the record for JSON (definitions §7), with these keys. A "dimension" is the number of vectors that a figure used
      of each half. Figures are records {"estimate", "ci95", "null", "n", "unit"}.

      - "unit"; "n_prompts", of both halves; "halves": [{"n_prompts", "eigenvalues", "null_top_95",
        "measured_dimension"}], the last two None without a null of the top eigenvalue.
      - "angles": {"dimension", "angles", "mean"}, principal angles in radians between the vectors of the halves.
      - "total": DᵀHD. "residual": ½ |DᵀHD − D_SᵀHD_S| at the last k.
      - "ladder": {"rung", "dimension", "within", "cross", "outside", "share"} for the route, for S at the last k and,
        with a null, for S at its measured dimension. "share" is that of "within" in DᵀHD.
      - "captured": [{"k", "dimension", "share": c(k)}]. "k90": the smallest of `ks` from which on c ≥ 0.9; without an
        estimate if c is below 0.9 at the last.
      - "baselines": [{"name", "k": the last, "dimension", "strongest", "shares", "margin"}] for the random subspaces
        (with "n" and "band95"), the top coordinates, and the eigenvectors of each other domain. "strongest" is the
        baseline's c at the last k, and the null of c of S there is the largest of them. "margin" is c of S minus that
        of the baseline, or of the best random subspace in each draw.

      If the interval of DᵀHD includes 0, shares, margins and "k90" are undefined: their estimate is None and they have
      a "reason". Shares are not cut to [0, 1]. If DᵀHD is below 0, D lowers the loss to second order, and a share is a
      share of that gain.

    Raises:
      ValueError: if a second-order term is not finite, or if `n_random` is 0.
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
        table.random(f"S {top}", top, n_random) | {"dimension": dimension[top]},
        table.baseline("top coordinates", ks) | {"dimension": dimension[top]},
    ]
    for name, other in zip(_titles(others), others.values(), strict=True):
        fewer = [min(n, subspace.size(other)) for n in dimension[top]]
        baselines.append(table.baseline(name, ks) | {"dimension": fewer})
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
        "k90": table.k90(ks) | {"dimension": dimension[top]},
        "residual": table.size((table.mean["total"] - within) / 2) | {"dimension": dimension[top]},
        "baselines": baselines,
    }


def _titles(others: Mapping[str, Any]) -> list[str]:
    return [f"eigenvectors of {name}" for name in others]


Random = Callable[[int, int], Any]  # (index of the draw, dimension) -> an orthonormal basis


def _columns(
    halves: tuple[Half, Half], d: Any, others: Mapping[str, Any], random: Random, ks: Sequence[int], n_random: int
) -> list[dict[str, Floats]]:
    """The second-order terms of each half's prompts, by name, with the vectors of the other half.

    Each random subspace is drawn once and used on both halves. To save memory, directions are made one by one.
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
    """Computes the terms of one half, `AT_ONCE` directions at a time.

    Attributes:
      found: the half that the vectors were found on.
      judged: the other half, whose prompts give the terms.
      ks: the dimensions k of c(k).
      columns: the terms so far, by name, [P] each.
      waiting: directions whose terms are not computed yet, by name.
    """

    found: Half
    judged: Half
    ks: Sequence[int]
    columns: dict[str, Floats] = dataclasses.field(default_factory=dict)
    waiting: dict[str, Any] = dataclasses.field(default_factory=dict)

    def known(self, d: Any, others: Mapping[str, Any]) -> None:
        """Adds the total, the route, S, and all baselines except the random subspaces.

        Args:
          d: D on the route.
          others: eigenvectors of other domains' losses, by domain.
        """
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
        """Adds a direction. Its terms dᵀH_p d are computed when `AT_ONCE` directions are waiting.

        Args:
          name: of the term.
          direction: d, a direction of the route.
          outside: also computes the term (D − d)ᵀH_p(D − d), under the name "outside {name}".
        """
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
        """Computes the terms of the directions that are left, and returns all terms by name."""
        if self.waiting:
            self._compute()
        return self.columns


def _angles(halves: tuple[Half, Half], k: int, random: Random) -> dict[str, Any]:
    """Principal angles, in radians, between the subspaces found on the two halves.

    The interval of the mean is the central 95 % of the k angles, because a bootstrap of prompts would have to repeat
    the Lanczos search. The null is the central 95 % of the mean angle between S and random subspaces.

    Args:
      halves: both halves.
      k: vectors of each half that are compared.
      random: draws the random subspaces of the null.

    Returns:
      {"dimension": k, "angles": list, "mean": record}.
    """
    if k == 0:
        return {"dimension": k, "angles": [], "mean": missing("one half has no positive eigenvalue", "rad")}
    a, b = (jax.tree.map(lambda v: v[:k], half.vectors) for half in halves)
    angles = subspace.principal_angles(a, b)
    null = [subspace.principal_angles(a, random(j, k)).mean() for j in range(N_ANGLES)]
    mean = percentile(float(angles.mean()), angles, k, "rad")
    return {"dimension": k, "angles": angles.tolist(), "mean": mean.record(band(null))}
