"""How fast the displacement e_t = θ_t − θ* shrinks, inside the conflict subspaces S and outside (definitions §8, C6).

θ* is the peak of the domain that is refreshed, and θ_t are the parameters after step t of the refresh. The analysis
finds S before the refresh (`analysis/subspace/conflict.py`, definitions §7). `refresh/tracker.py` calls `lengths` at
every step that it scores, and `contraction` on all steps scored so far.

The choices behind the figures [chosen]:
  * S is spanned by the eigenvectors with a positive eigenvalue that the analysis found on one half of the prompts. Each
    half and each objective gives a subspace of its own.
  * The part outside S, P_S⊥ e, is measured twice: over all parameters, and within the shared route only.
  * The rate is the mean log factor a step, (log‖e_last‖ − log‖e_0‖) / steps. A line fitted to all norms would need
    independent residuals, but successive norms share the noise of all earlier steps. The log factors of single steps
    are nearly independent, so the standard error comes from them.
  * That ‖P_S e‖ shrinks faster than ‖P_S⊥ e‖ is no evidence of contraction: random steps lengthen every part of e, the
    complement most surely. So S is compared with random subspaces of its route and dimension, which the same steps
    move, and with the same refresh of other domains.
  * Steps that move P_S e in a direction of their own shorten it in a quarter of all cases. So the movement in S must
    also point at θ*: more than a direction drawn at random in S does.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax.parallel import tree_programs
from mdrl_jax.parallel.programs import program
from mdrl_jax.second_order import subspace
from mdrl_jax.second_order.decoder_parts import route_slice, route_support
from mdrl_jax.second_order.lanczos import random_block
from mdrl_jax.stats.bootstrap import TAILS
from mdrl_jax.stats.estimate import Estimate, Record, clustered, missing, student
from mdrl_jax.stats.tests import null_record, permutation_p

Floats = NDArray[np.float64]
N_RANDOM = 100  # random subspaces that each S is compared with


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """A conflict subspace S that the analysis found on one half of the prompts.

    Attributes:
      objective: the loss whose Hessian has these eigenvectors, "reward" or "success_nll".
      half: the half of the prompts, 0 or 1.
      stage: name of the later stage, whose edit does the damage.
      vectors: orthonormal eigenvectors, as slices of the route: {"gate", "up"} [k, L, D, R] and {"down"} [k, L, R, D].
      values: their eigenvalues [k], descending.
      index_LR: the route's MLP neurons in each layer, as `decoder_parts.route_slice` takes them.
      mask_LR: 1 for a neuron, 0 for padding (layers differ in their number of neurons).
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
        """Which vectors span S, [k]: those with a positive eigenvalue, up to rounding (`subspace.positive`)."""
        return subspace.positive(self.values)

    @property
    def k(self) -> int:
        """Dimension of S."""
        return int(self.spanning.sum())

    def head(self) -> Record:
        """The part of a record that identifies the subspace: objective, half, stage and dimension."""
        return {"objective": self.objective, "half": self.half, "stage": self.stage, "k": self.k}


def lengths(bases: Sequence[Basis], error: Any, seed: int = 0) -> list[Record]:
    """The norm of the displacement inside each S and outside it, and inside random subspaces of the same dimension.

    The random subspaces lie in the same route as S. They depend only on the route, the dimensions and the seed, so each
    of them can be followed over the steps of a refresh.

    Args:
      bases: the conflict subspaces; may be empty.
      error: e_t = θ_t − θ*, a tree like the parameters.
      seed: of the random subspaces.

    Returns:
      One record for each basis, in their order: its `head`; "within", ‖P_S e‖; "coordinates", those of P_S e in the
      vectors that span S, a list; "route", ‖P_S⊥ e‖ within the route; "outside", ‖P_S⊥ e‖ over all parameters; and
      "random", a list of ‖P e‖ for `N_RANDOM` random subspaces. All norms are in units of a parameter. An S without a
      positive eigenvalue has the dimension 0, no coordinates, the norm 0 "within" and norms of 0 in "random". "random"
      is empty if no S of the route has a positive eigenvalue.
    """
    total = float(tree_programs.norm(error))
    found: list[Record] = []
    widest: dict[bytes, tuple[Any, float, Any]] = {}
    for basis in bases:
        name = basis.index_LR.tobytes() + basis.mask_LR.tobytes()
        if name not in widest:  # subspaces of one route share its slice of the displacement and its random vectors
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
                "coordinates": weights.tolist(),
                "route": _rest(on_route, within),
                "outside": _rest(total, within),
                "random": random,
            }
        )
    return found


def contraction(
    rows: Sequence[Record],
    bases: Sequence[Basis],
    learning_rate: float,
    streams: Sequence[Sequence[Record]] = (),
    others: Mapping[str, Sequence[Record]] | None = None,
) -> list[Record]:
    """How fast the norms shrink a step inside each S and outside it, and what contraction has to beat.

    Args:
      rows: the scored steps of a refresh in order, at least one, each with "step" and "subspaces" (the result of
        `lengths`). They may be several steps apart.
      bases: the conflict subspaces, in the order of `lengths`.
      learning_rate: α of the refresh, for the bound.
      streams: the rows of the same refresh from the same start with other sampling keys, for each further stream.
      others: the rows of the same refresh of another domain, by the name of that domain.

    Returns:
      One record for each basis: its `head` and these figures. Those that C6 asks to be below 0 are log factors a step.

      - "within", "route" and "outside": the factor exp(rate) a step of the norm of that name in `rows`, Student's t
        over its steps. Below 1 is contraction.
      - "shrinks": the mean rate of "within" over all streams, Student's t over streams; with one stream over its steps.
      - "than_random": the mean rate of "within" over streams, minus that of each random subspace of `lengths`: the mean
        and the central 95 % over the random subspaces, a rank test in the form of an interval. It has "p", the share of
        random subspaces that shrink at least as fast, as in `permutation_p`.
      - "toward": the movement m of P_S e a step, averaged over streams, along P_S e at the start, as a share of its
        length: m·e/(e·e). It is below 0 if it points at θ*. Student's t over the k dimensions of S with k − 1
        degrees of freedom, which is exact for a movement whose direction in S is random.
      - "than_other": for each domain of `others`, the mean rate of "within" over streams minus that in the refresh of
        the other domain, with the interval for the difference to one more stream. One stream gives no interval.
      - "streams": the number of streams, `rows` included.
      - "faster": rate of "within" − rate of "outside" in `rows`, paired by step. "faster_in_route" subtracts the rate
        of "route". Both are descriptive, because random steps make them negative, too.
      - "bound": see `bound`.

      "within" and the two differences have the random subspaces as their null. A figure has a reason in place of an
      estimate with fewer than two rows, if one of its norms is 0, or if S has no vector; with two rows it has no
      interval over steps.
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
        record |= _against(basis, i, [rows, *streams], others or {})
        found.append(record | {"bound": bound(basis, learning_rate)})
    return found


def _against(basis: Basis, i: int, streams: Sequence[Sequence[Record]], others: Mapping[str, Sequence[Record]]) -> Any:
    """The figures of the i-th basis that C6 judges: "shrinks", "than_random", "toward", "than_other", "streams"."""
    unit = "log factor a step"
    names = ["shrinks", "than_random", "toward"]
    if not basis.k:
        none = missing("S has no converged vector with a positive eigenvalue", unit)
        return dict.fromkeys(names, none) | {"than_other": dict.fromkeys(others, none), "streams": len(streams)}
    rate_S = np.array([_rate(rows, i, "within") for rows in streams])
    random_SN = np.array([_rate(rows, i, "random") for rows in streams])
    if not np.all(np.isfinite(rate_S)):
        none = missing("a norm is 0" if all(len(rows) > 1 for rows in streams) else "needs two steps", unit)
        return dict.fromkeys(names, none) | {"than_other": dict.fromkeys(others, none), "streams": len(streams)}
    n, mean, random_N = rate_S.size, float(rate_S.mean()), random_SN.mean(axis=0)
    one = _slope([r["step"] for r in streams[0]], _log([r["subspaces"][i]["within"] for r in streams[0]]), None, unit)
    ranked = missing("there are no random subspaces that can be followed", unit)
    if random_N.size and np.all(np.isfinite(random_N)):
        low, high = np.quantile(mean - random_N, TAILS)
        ranked = Estimate(mean - float(random_N.mean()), float(low), float(high), random_N.size, unit).record(0.0)
        ranked["p"] = permutation_p(-mean, -random_N)
    spread = float(rate_S.std(ddof=1)) * math.sqrt(1 + 1 / n) if n > 1 else math.inf
    return {
        "shrinks": one if n == 1 else clustered(rate_S, unit).record(),
        "than_random": ranked,
        "toward": _toward(streams, i),
        "than_other": {
            d: student(mean - float(_rate(rows, i, "within")), spread, n - 1, n, unit).record(0.0)
            for d, rows in others.items()
        },
        "streams": n,
    }


def _toward(streams: Sequence[Sequence[Record]], i: int) -> Record:
    """The figure "toward" of the i-th basis: the regression of the movement m_k on e_k through the origin."""
    unit = "share of ‖P_S e‖ a step"
    if any("coordinates" not in rows[t]["subspaces"][i] for rows in streams for t in (0, -1)):
        return missing("the record has no coordinates in S", unit)
    ends = np.array([[rows[t]["subspaces"][i]["coordinates"] for t in (0, -1)] for rows in streams])  # [streams, 2, k]
    steps = np.array([rows[-1]["step"] - rows[0]["step"] for rows in streams], float)
    moved_k, start_k = ((ends[:, 1] - ends[:, 0]) / steps[:, None]).mean(axis=0), ends[0, 0]
    size, dof = float(start_k @ start_k), start_k.size - 1
    slope = float(moved_k @ start_k) / size
    left_k = moved_k - slope * start_k
    stderr = math.sqrt(float(left_k @ left_k) / dof / size) if dof else math.inf
    return student(slope, stderr, dof, start_k.size, unit).record(0.0)


def _rate(rows: Sequence[Record], i: int, name: str) -> Floats:
    """The mean log factor a step of a norm or a list of norms of the i-th basis; nan if it is not measurable."""
    ends = [_log(rows[t]["subspaces"][i][name]) for t in (0, -1)]
    steps = rows[-1]["step"] - rows[0]["step"]
    return (ends[1] - ends[0]) / steps if steps else np.full_like(ends[0], np.nan)


def bound(basis: Basis, learning_rate: float) -> Record:
    """The bound 1 − αμ on the factor by which one step of plain gradient descent changes the norm inside S.

    It holds for a quadratic loss with minimum θ*, S invariant under its Hessian and αλmax ≤ 1. Under Adam it is
    descriptive only.

    Args:
      basis: S and its eigenvalues.
      learning_rate: α of the refresh.

    Returns:
      "factor" 1 − αμ, "alpha" the learning rate, "mu" the smallest positive eigenvalue μ on S, and "alpha_top" αλmax,
      where λmax is the largest. If no eigenvalue is positive: only "factor", which is None, and a "reason".
    """
    positive = np.asarray(basis.values, float)[basis.spanning].tolist()
    if not positive:
        return {"factor": None, "reason": "not applicable: no eigenvalue on S is positive"}
    mu, top = min(positive), max(positive)
    return {"factor": 1 - learning_rate * mu, "alpha": learning_rate, "mu": mu, "alpha_top": learning_rate * top}


def _slope(steps: Sequence[int], y: Floats, null: Floats | None, unit: str) -> Record:
    """The mean change of y a step, (y_last − y_0) / steps, with Student's t over steps.

    Rows may be several steps apart. The change over g steps has g times the variance of the change over one step.

    Args:
      steps: step numbers of the rows.
      y: one value for each row.
      null: [rows, N], N paths whose mean changes are the null; None for no null.
      unit: of the figure.
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
    """exp of `_slope`, and of its interval and null: the factor by which exp(y) changes a step."""
    record = _slope(steps, y, null, "factor a step")
    if record["estimate"] is None:
        return record
    record["estimate"] = math.exp(record["estimate"])
    record["ci95"] = record["ci95"] and [math.exp(x) for x in record["ci95"]]
    if record["null"]:
        record["null"] = {k: v if k == "n" else math.exp(v) for k, v in record["null"].items()}
    return record


def _rest(whole: float, part: float) -> float:
    """The norm that is left of a vector of norm `whole` without its orthogonal component of norm `part`."""
    return math.sqrt(max(whole**2 - part**2, 0.0))


def _log(x: Any) -> Floats:
    """log x, and NaN where x is not above 0."""
    values = np.asarray(x, float)
    return np.log(np.where(values > 0, values, np.nan))


def _draw(part: Any, mask_LR: np.ndarray, k: int, seed: int) -> tuple[Floats, Floats]:
    """`_gram` for `N_RANDOM` subspaces, each spanned by k Gaussian vectors of the route: [N, k, k] and [N, k]."""
    support, key = route_support(part, mask_LR), jax.random.key(seed)
    made = [_gram_program(random_block(jax.random.fold_in(key, i), part, k), part, support) for i in range(N_RANDOM)]
    gram_Nkk, weights_Nk = (np.stack([np.asarray(m[j], np.float64) for m in made]) for j in (0, 1))
    return gram_Nkk, weights_Nk


def _gram(block: Any, part: Any, support: Any) -> tuple[jax.Array, jax.Array]:
    """⟨g_i, g_j⟩ [k, k] and ⟨g_j, e⟩ [k] of Gaussian vectors g_j that are set to 0 on padding of the route."""
    block = jax.tree.map(lambda x, s: x * s[None], block, support)
    return jax.vmap(lambda v: subspace.coefficients(block, v))(block), subspace.coefficients(block, part)


def _random_lengths(gram_Nkk: np.ndarray, weights_Nk: np.ndarray, k: int) -> Floats:
    """‖P e‖ = √(wᵀ G⁻¹ w) [N], P the projection onto the span of the first k vectors, G and w from `_gram`."""
    gram, weights = np.asarray(gram_Nkk, float)[:, :k, :k], np.asarray(weights_Nk, float)[:, :k]
    solved = np.linalg.solve(gram, weights[:, :, None])[:, :, 0]
    return np.sqrt(np.maximum(np.sum(weights * solved, axis=1), 0.0))


_slice = program("refresh_slice", route_slice)
_gram_program = program("refresh_random", _gram)
