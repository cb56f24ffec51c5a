"""How fast the displacement θ_t − θ* shrinks inside the conflict subspaces S and outside them (definitions §8, C6).

Chosen where the definitions leave it open:
  * S is spanned by the eigenvectors found on one half of the prompts whose eigenvalues are positive; each half, and
    each objective, is a subspace of its own;
  * P_S⊥ is taken over all parameters, and beside it within the route;
  * the rate is the mean log factor a step, which is the log-linear slope through the ends: successive norms share the
    noise of all earlier steps, so their residuals about a line are not independent; the factors of steps nearly are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax.parallel import tree_programs
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order import subspace
from mdrl_jax.second_order.decoder_parts import route_slice
from mdrl_jax.second_order.lanczos import random_block
from mdrl_jax.stats.estimate import Record, missing, student
from mdrl_jax.stats.tests import null_record

Floats = NDArray[np.float64]
N_RANDOM = 100  # random subspaces that each S is compared with


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """A conflict subspace found by the analysis, of one half of the prompts.

    Attributes:
      objective: whose Hessian it comes from, "reward" or "success_nll".
      half: 0 or 1.
      stage: the later stage of the pair.
      vectors: orthonormal, {"gate", "up"} [k, L, D, R] and {"down"} [k, L, R, D], in the space of the route's slices.
      values: their eigenvalues [k], descending.
      index_LR, mask_LR: the route, as `decoder_parts.route_slice` takes it.
    """

    objective: str
    half: int
    stage: str
    vectors: Any
    values: np.ndarray
    index_LR: np.ndarray
    mask_LR: np.ndarray

    @property
    def spanning(self) -> NDArray[np.bool_]:
        """Which vectors span S: those with a positive eigenvalue."""
        return subspace.positive(self.values)

    @property
    def k(self) -> int:
        """Dimensions of S."""
        return int(self.spanning.sum())

    def head(self) -> Record:
        """What tells it from the others."""
        return {"objective": self.objective, "half": self.half, "stage": self.stage, "k": self.k}


def lengths(bases: Sequence[Basis], error: Any, seed: int = 0) -> list[Record]:
    """‖P_S e‖ and ‖P_S⊥ e‖ of each basis, and ‖P e‖ of random subspaces of as many dimensions in the same route.

    Random subspaces are the same at every call with the same seed, so that each has its own path over steps.

    Args:
      error: e_t = θ_t − θ*, a tree like the parameters.

    Returns:
      for each basis its head, "within" ‖P_S e‖, "route" ‖P_S⊥ e‖ within the route, "outside" ‖P_S⊥ e‖ over all
      parameters, and "random", `N_RANDOM` of "within".
    """
    total = float(tree_programs.norm(error))
    found: list[Record] = []
    widest: dict[bytes, tuple[Any, float, Any]] = {}
    for basis in bases:
        name = basis.index_LR.tobytes() + basis.mask_LR.tobytes()
        if name not in widest:  # all S of one route share its slice and its random vectors
            k = max(b.k for b in bases if b.index_LR.tobytes() + b.mask_LR.tobytes() == name)
            part = _slice(error, basis.index_LR, basis.mask_LR)
            widest[name] = part, float(tree_programs.norm(part)), _draw(part, basis.mask_LR, k, seed) if k else None
        part, on_route, drawn = widest[name]
        random = _random_lengths(drawn[0], drawn[1], basis.k).tolist() if drawn else []
        weights = np.asarray(subspace.coefficients(basis.vectors, part), np.float64)[basis.spanning]
        within = float(np.linalg.norm(weights))
        found.append(
            basis.head()
            | {
                "within": within,
                "route": _rest(on_route, within),
                "outside": _rest(total, within),
                "random": random,
            }
        )
    return found


def contraction(rows: Sequence[Record], bases: Sequence[Basis], learning_rate: float) -> list[Record]:
    """Of each basis, how fast the rows' norms shrink a step, inside S and outside, and which shrinks faster.

    Figures are factors a step (below 1: contraction) with Student's t over steps and the same of random subspaces as
    null; "faster" is the difference of log factors, S less S⊥ over all parameters ("faster_in_route": in the route),
    paired by step: below 0 where S contracts faster. The bound 1 − αμ holds for plain gradient descent on a quadratic
    with S invariant under its Hessian; under Adam it is descriptive only. Intervals over steps say nothing of another
    seed.
    """
    steps = [row["step"] for row in rows]
    found = []
    for i, basis in enumerate(bases):
        paths = [row["subspaces"][i] for row in rows]
        logs = {name: _log([p[name] for p in paths]) for name in ("within", "route", "outside")}
        random = _log([p["random"] for p in paths])  # [steps, N_RANDOM]
        null = {}
        for name in ("route", "outside"):
            squares = np.array([[p["within"] ** 2 + p[name] ** 2] for p in paths]) - np.exp(2 * random)
            null[name] = random - 0.5 * _log(squares)
        record = basis.head()
        for name, y in logs.items():
            record[name] = _factor(steps, y, random if name == "within" else None)
        for key, name in (("faster", "outside"), ("faster_in_route", "route")):
            record[key] = _slope(steps, logs["within"] - logs[name], null[name], "log factor a step")
        found.append(record | {"bound": bound(basis, learning_rate)})
    return found


def bound(basis: Basis, learning_rate: float) -> Record:
    """1 − αμ with μ = λmin(H|_S), beside αλmax, which has to be at most 1 for it to hold."""
    positive = np.asarray(basis.values, float)[basis.spanning].tolist()
    if not positive:
        return {"factor": None, "reason": "not applicable: no eigenvalue on S is positive"}
    mu, top = min(positive), max(positive)
    return {"factor": 1 - learning_rate * mu, "alpha": learning_rate, "mu": mu, "alpha_top": learning_rate * top}


def _slope(steps: Sequence[int], y: Floats, null: Floats | None, unit: str) -> Record:
    """Mean change a step of y [steps], Student's t over steps; of each column of `null` [steps, N] as its null.

    Looks that are g steps apart have g times the variance of one step.
    """
    gaps = np.diff(np.asarray(steps, float))
    if gaps.size == 0:
        return missing("needs two steps", unit)
    if not np.all(np.isfinite(y)):
        return missing("a norm is 0", unit)
    total = gaps.sum()
    mean = float((y[-1] - y[0]) / total)
    residuals = (np.diff(y) - mean * gaps) / np.sqrt(gaps)
    dof = gaps.size - 1
    stderr = math.sqrt(float(residuals @ residuals) / dof / total) if dof else math.inf
    drawn = None
    if null is not None and null.size and np.all(np.isfinite(null)):
        drawn = null_record((null[-1] - null[0]) / total)
    return student(mean, stderr, dof, gaps.size, unit).record(drawn)


def _factor(steps: Sequence[int], y: Floats, null: Floats | None) -> Record:
    """exp of `_slope` with its interval and null."""
    record = _slope(steps, y, null, "factor a step")
    if record["estimate"] is None:
        return record
    record["estimate"] = math.exp(record["estimate"])
    record["ci95"] = record["ci95"] and [math.exp(x) for x in record["ci95"]]
    if record["null"]:
        record["null"] = {k: v if k == "n" else math.exp(v) for k, v in record["null"].items()}
    return record


def _rest(whole: float, part: float) -> float:
    return math.sqrt(max(whole**2 - part**2, 0.0))


def _log(x: Any) -> Floats:
    """log x; nan where there is none."""
    values = np.asarray(x, float)
    return np.log(np.where(values > 0, values, np.nan))


def _support(part: Any, mask_LR: np.ndarray) -> Any:
    """1 where a slice is not padding."""
    masks = {"gate": mask_LR[:, None, :], "up": mask_LR[:, None, :], "down": mask_LR[:, :, None]}
    return {name: np.broadcast_to(masks[name], x.shape) for name, x in part.items()}


def _draw(part: Any, mask_LR: np.ndarray, k: int, seed: int) -> tuple[Floats, Floats]:
    """Of `N_RANDOM` subspaces, each spanned by k Gaussian vectors of the route: [N, k, k] and [N, k] of `_gram`."""
    support, key = _support(part, mask_LR), jax.random.key(seed)
    made = [_gram_program(random_block(jax.random.fold_in(key, i), part, k), part, support) for i in range(N_RANDOM)]
    gram_Nkk, weights_Nk = (np.stack([np.asarray(m[j], np.float64) for m in made]) for j in (0, 1))
    return gram_Nkk, weights_Nk


def _gram(block: Any, part: Any, support: Any) -> tuple[jax.Array, jax.Array]:
    """⟨g_i, g_j⟩ [k, k] and ⟨g_j, e⟩ [k] of Gaussian vectors g_j, cut to the route."""
    block = jax.tree.map(lambda x, s: x * s[None], block, support)
    return jax.vmap(lambda v: subspace.coefficients(block, v))(block), subspace.coefficients(block, part)


def _random_lengths(gram_Nkk: np.ndarray, weights_Nk: np.ndarray, k: int) -> Floats:
    """‖P e‖ = √(wᵀ G⁻¹ w) on the span of the first k vectors."""
    gram, weights = np.asarray(gram_Nkk, float)[:, :k, :k], np.asarray(weights_Nk, float)[:, :k]
    solved = np.linalg.solve(gram, weights[:, :, None])[:, :, 0]
    return np.sqrt(np.maximum(np.sum(weights * solved, axis=1), 0.0))


_slice = program("refresh_slice", route_slice)
_gram_program = program("refresh_random", _gram)
