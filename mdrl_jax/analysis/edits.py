"""Figures of an edit δ = θ_after − θ_before: sparsity, size, rank, most-changed neurons (definitions §3; C1, C2).

`interference.py` calls `edit_figures` and `neuron_scores` for the edit of each domain, and `sign_conflict` for each
pair of domains. A *leaf* is one array of the parameter tree. A leaf below `layers/` is *stacked*: its first axis counts
the L layers. A *tensor* is one layer of a stacked leaf, or an unstacked leaf.

Parameters may be sharded, so no tensor is gathered. Compiled programs reduce each tensor to counts, sums and scores,
one layer of one leaf at a time, and only these reach the host.

Shares are exact counts. Their intervals say how much a share depends on single layers, not how well it was counted.
They are a jackknife over layers, in which unstacked tensors are never left out. A *record* of a figure is {"estimate",
"ci95", "null", "n", "unit"}, with "reason" if it has no estimate (`stats/estimate.py`).

Choices of this package:

- Relative change is |δ|/|θ_before|. An unchanged entry has relative change 0, even where θ_before is 0 [chosen].
- The score of neuron c is √(‖δW_gate[:,c]‖² + ‖δW_up[:,c]‖² + ‖δW_down[c,:]‖²) [chosen norm].
- A neuron that did not change is in no top set; otherwise the order of the indices would fill the set [chosen].

The nulls of the relative share, of the share unchanged in bfloat16 and of the participation ratio are those of a
Gaussian edit that has the same norm in each tensor. The scale-free figures divide each entry by the rms of its
tensor's edit, so that neither the learning rate nor the number of steps changes them: the share of entries below 0.1
and the participation ratio. Tensors without a changed entry are left out of them [chosen].
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.parallel import counting, distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import constrain
from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import Estimate, missing, over_seeds, student

THRESHOLDS = (1e-7, 1e-6, 1e-5)
RELATIVE = 1e-3
SMALL = 0.1  # an entry is small if |δ| is below this share of the rms of its tensor's edit
GAUSSIAN = {"small": math.erf(SMALL / math.sqrt(2)), "participation": 1 / 3}  # the scale-free figures of a Gaussian
LOG_EDGES = np.arange(-12.0, 0.5, 0.5)  # bin edges of the histogram of log10 |δ|
UNCHANGED, NOT_FINITE = "no entry changed", "an entry is not finite"
FROM_ZERO = "the parameters before the edit are 0"
VECTORS = ("norm", "bias")  # the names of kinds that are not matrices end in these
Sums = dict[str, NDArray[np.float64]]


def by_tensor(function: Callable[..., Any], *trees: Any) -> dict[str, Any]:
    """Applies a function to every tensor, one layer at a time.

    Args:
      function: called as function(kind, *tensors), with the same tensor of each tree. It returns an array or a tree.
        JAX traces it once for each leaf (`jax.lax.map`).
      trees: trees of parameters with the same structure, at least one.

    Returns:
      by path of the leaf: the results of its tensors, stacked to [L, ...], or [1, ...] for an unstacked leaf.
    """
    out = {}
    leaves = [jax.tree.leaves(t) for t in trees]
    for i, (keys, _) in enumerate(jax.tree_util.tree_leaves_with_path(trees[0])):
        name = tree.path(keys)
        of_kind = _with_kind(function, tree.kind(name))
        stacks = tuple(x[i] if tree.is_stacked(name) else x[i][None] for x in leaves)
        out[name] = jax.lax.map(of_kind, stacks)
    return out


def _with_kind(function: Callable[..., Any], kind: str) -> Callable[[tuple[jax.Array, ...]], Any]:
    return lambda slices: function(kind, *slices)


def matrix(kind: str, x: jax.Array) -> jax.Array:
    """A tensor as the matrix that multiplies activations: q, k, v [D, H·h], o [H·h, D]; one with two axes as it is.

    Args:
      kind: the kind of the tensor (`tree.kind`).
      x: one tensor, a single layer of a stacked leaf: [D, H, h] for q, k, v and [H, h, D] for o; not a scalar.

    Returns:
      the matrix. For "o" all axes but the last become rows, for other kinds all axes but the first become columns.
    """
    if x.ndim == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if kind == "o" else x.reshape(x.shape[0], -1)


def _counts(size: jax.Array, before: jax.Array) -> dict[str, jax.Array]:
    """Counts of entries by `size` = |δ|; "below" has one count for each of `LOG_EDGES`."""
    relative = (size < RELATIVE * jnp.abs(before)) | (size <= 0)
    return {
        "below": jax.lax.map(lambda edge: jnp.sum(size < edge), jnp.asarray(10.0**LOG_EDGES, jnp.float32)),
        "unchanged": jnp.sum(size <= 0),
        "relative": jnp.sum(relative),
        "both": jnp.sum(relative & (size < THRESHOLDS[0])),
    }


def _tensor_sums(kind: str, before: jax.Array, after: jax.Array) -> dict[str, Any]:
    """Counts and sums of one tensor.

    "second", "fourth" and "spectrum" are of δ/max|δ|, because powers of δ underflow: (1e-12)⁴ is 0 in float32.
    """
    delta = after - before
    size = jnp.abs(delta)
    largest = jnp.max(size)
    unit = delta / jnp.where(largest > 0, largest, 1.0)
    # A cast to bfloat16 and back would not do: XLA may remove it, because it may compute in excess precision.
    coarse_before, coarse_after = (jax.lax.reduce_precision(x, 8, 7) for x in (before, after))
    rms = jnp.maximum(jnp.sqrt(jnp.mean(delta**2)), 1e-30)
    out = {
        "fp32": _counts(size, before),
        "bf16": _counts(jnp.abs(coarse_after - coarse_before), coarse_before),
        "largest": largest,
        "second": jnp.sum(unit**2),
        "fourth": jnp.sum(unit**4),
        "theta": jnp.sum(before**2),
        # Expected number of entries with a small relative change under a Gaussian edit of the same norm (the null).
        "gauss": jnp.sum(_erf(RELATIVE * jnp.abs(before) / (math.sqrt(2) * rms))),
        "gauss_unchanged": jnp.sum(_stays(before, coarse_before, rms)),
        "small": jnp.sum(unit**2 < SMALL**2 * jnp.mean(unit**2)),
    }
    if not kind.endswith(VECTORS):
        out["spectrum"] = _squared_singular_values(matrix(kind, unit))
    return out


def _erf(x: jax.Array) -> jax.Array:
    """The error function with an error below 4e-4. `jax.lax.erf` is not used: XLA gathers its operand if sharded."""
    return jnp.tanh(1.128379 * x + 0.100911 * x**3)


def _stays(x: jax.Array, coarse: jax.Array, rms: jax.Array) -> jax.Array:
    """The probability that x + δ rounds to the same bfloat16 as x, for a Gaussian δ with this rms.

    The spacing of bfloat16 around `coarse` = m·2^e, ½ ≤ |m| < 1, is 2^(e−8). Below a power of 2 it is half of that,
    which is not told apart here: one value in 128.
    """
    half = jnp.ldexp(0.5, jnp.frexp(coarse)[1] - 8)
    above, below = ((s * (coarse - x) + half) / (math.sqrt(2) * rms) for s in (1.0, -1.0))
    return 0.5 * (_erf(above) + _erf(below))


def _squared_singular_values(x: jax.Array) -> jax.Array:
    # Split x along the axis that x xᵀ sums over: each device multiplies its own part, and only the Gram matrix is
    # all-reduced. Otherwise the whole tensor is gathered.
    x = constrain(x if x.shape[0] <= x.shape[1] else x.T, None, "vocab_split")
    return jnp.linalg.eigvalsh(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST))


_sums_program = program("edit_sums", lambda before, after: by_tensor(_tensor_sums, before, after))


def effective_rank(spectrum: NDArray[np.floating]) -> float | None:
    """The effective rank exp(−Σ p log p) of a matrix, at least 1; None for the zero matrix, or if a value is nan.

    Args:
      spectrum: the squared singular values, in any order; p is these divided by their sum. Values below 0, which are
        rounding errors, count as 0.
    """
    values = np.clip(np.asarray(spectrum, float), 0.0, None)
    total = values.sum()
    if not total > 0:
        return None
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def edit_figures(before: Any, after: Any) -> dict[str, Any]:
    """The figures of one edit (definitions §3), over all tensors and for each kind of tensor.

    Args:
      before, after: parameters at both ends of the edit; two trees with the same shardings.

    Returns:
      {"all": figures, "kinds": {kind: figures}, "histogram"}. "fp32" figures are of float32 weights, "bf16" figures
      after both ends are rounded to bfloat16.

      Figures have these keys. All but "n", "effective_rank" and "layers" are records with an interval over layers
      (`over_layers`). "participation", the "relative" of "fp32" and the "unchanged" of "bf16" have the null of a
      Gaussian edit, if an entry changed; otherwise "participation" and "scale_free" have no estimate.

      - "n": number of entries.
      - "fp32", "bf16": {"below": {"1e-07", "1e-06", "1e-05"}, "relative", "both", "unchanged"}: shares of entries with
        |δ| < τ; with |δ|/|θ_before| < 1e-3; with |δ|/|θ_before| < 1e-3 and |δ| < 1e-7; with δ = 0.
      - "participation": (Σδ²)²/(nΣδ⁴). "norm": ‖δ‖. "relative_norm": ‖δ‖/‖θ_before‖, without an estimate if
        θ_before is 0.
      - "scale_free": {"small", "participation"}: the share of entries with |δ| < 0.1·rms(δ) of their tensor (null
        0.080), and n/Σ(δ/rms)⁴ (null 1/3), both of a Gaussian edit, over tensors with a changed entry.
      - "effective_rank", for kinds of matrices: the mean over the layers that changed, a record with Student's t over
        these layers; without an estimate if none changed.
      - "layers", for stacked kinds: {"relative" (of "fp32"), "norm", "effective_rank"}, a list with one value per layer
        each. The effective rank is None for a layer that did not change, and for kinds of vectors in place of the list.

      "histogram" is {"log10_edges", "counts", "unchanged", "bf16": {"counts", "unchanged"}}: numbers of entries by
      log10 |δ|. "counts" is one longer than "log10_edges": below the first edge, between edges, from the last edge on.
      Unchanged entries are also counted below the first edge.
    """
    fetched = distributed.gather(_sums_program(before, after))
    shapes = {tree.path(keys): x.shape for keys, x in jax.tree_util.tree_leaves_with_path(before)}
    sums = {name: _additive(values, shapes[name]) for name, values in fetched.items()}
    kinds = {}
    for name in sums:
        figures = _figures({name: sums[name]})
        ranks = [effective_rank(s) for s in fetched[name].get("spectrum", ())]
        if ranks:
            known = [r for r in ranks if r is not None]
            absent = missing(_undefined({name: sums[name]}), "layer")
            figures["effective_rank"] = over_seeds(known, "layer").record() if known else absent
        if tree.is_stacked(name):
            s = sums[name]
            norms = np.sqrt(s["second"]).tolist()
            figures["layers"] = {"relative": (s["fp32_relative"] / s["n"]).tolist(), "norm": norms}
            figures["layers"]["effective_rank"] = ranks or None
        kinds[tree.kind(name)] = figures
    return {"all": _figures(sums), "kinds": kinds, "histogram": _histogram(sums)}


def _additive(values: dict[str, Any], shape: tuple[int, ...]) -> Sums:
    """Sums that may be added over tensors, from the values of `_tensor_sums` of one leaf of `shape`.

    Returns:
      by name, one float64 sum for each tensor of the leaf, [L] or [1]. Powers of δ are no longer scaled by max|δ|.
    """
    rows = values["largest"].shape[0]
    scale = np.asarray(values["largest"], float)
    out: Sums = {
        "n": np.full(rows, math.prod(shape) / rows),
        "second": scale**2 * values["second"],
        "fourth": scale**4 * values["fourth"],
        "theta": np.asarray(values["theta"], float),
        "gauss_relative": np.asarray(values["gauss"], float),
        "gauss_unchanged": np.asarray(values["gauss_unchanged"], float),
    }
    changed = out["second"] > 0
    out["changed_n"] = np.where(changed, out["n"], 0.0)
    out["small"] = np.where(changed, values["small"], 0.0)
    # Σ(δ/rms)⁴ of a tensor is n² Σδ⁴/(Σδ²)², in which max|δ| cancels.
    fourth, second = np.asarray(values["fourth"], float), np.asarray(values["second"], float)
    out["scaled_fourth"] = np.where(changed, out["n"] ** 2 * fourth / np.where(changed, second, 1.0) ** 2, 0.0)
    out["gauss_fourth"] = 3 * out["second"] ** 2 / out["n"]
    at = [int(np.flatnonzero(np.isclose(LOG_EDGES, math.log10(t)))[0]) for t in THRESHOLDS]
    for cast in ("fp32", "bf16"):
        counts = values[cast]
        out[f"{cast}_histogram"] = np.asarray(counts["below"], float)
        out |= {f"{cast}_{t:.0e}": out[f"{cast}_histogram"][:, i] for i, t in zip(at, THRESHOLDS, strict=True)}
        out |= {f"{cast}_{k}": np.asarray(counts[k], float) for k in ("relative", "both", "unchanged")}
    return out


def _undefined(sums: dict[str, Sums]) -> str:
    """Why a figure of an edit is not finite, if the figure is a ratio of sums of powers of δ."""
    return NOT_FINITE if sum(s["second"].sum() for s in sums.values()) else UNCHANGED


def over_layers(
    sums: dict[str, Sums],
    f: Callable[[Callable[[str], Any]], Any],
    size: str = "n",
    high: float = 1.0,
    reason: str = NOT_FINITE,
) -> dict[str, Any]:
    """A figure made of sums over tensors, with its jackknife interval over layers.

    To leave out a layer, its slice of every stacked leaf is left out, and the other layers count L/(L − 1) times, so
    that unstacked tensors keep their weight. If no leaf is stacked, the figure has no interval.

    Args:
      sums: by path of the leaf, its sums by name, with one value per tensor each.
      f: the figure. It gets a function from the name of a sum to that sum's total over tensors. It is called
        with totals that are numbers; and, if a leaf is stacked, with totals [L], each without one layer, to return [L].
      size: the sum that becomes the record's n if no leaf is stacked; otherwise n is the number of layers.
      high: the largest possible value. The interval is cut to [0, high].
      reason: why the figure is not finite, if it is not.

    Returns:
      the record, with the unit "layer", or "entry" if no leaf is stacked. It has no estimate, but the reason, if the
      figure is not finite, and no interval if there is only one layer, or if the figure is not finite without one of
      the layers.

    Raises:
      KeyError: if a leaf lacks a sum that `f` asks for, or `size` if no leaf is stacked.
    """
    value = float(f(lambda key: sum(s[key].sum() for s in sums.values())))
    if not math.isfinite(value):
        return missing(reason, "layer")
    stacked = [s for name, s in sums.items() if tree.is_stacked(name)]
    if not stacked:
        return student(value, math.inf, 0, int(sum(s[size].sum() for s in sums.values())), "entry").record()

    def without(key: str) -> Any:
        per_layer = np.sum([s[key] for s in stacked], axis=0)
        n = per_layer.size
        fixed = sum(s[key].sum() for name, s in sums.items() if not tree.is_stacked(name))
        return fixed + (per_layer.sum() - per_layer) * n / max(n - 1, 1)

    with np.errstate(invalid="ignore", divide="ignore"):  # without its only layer a stacked kind has no entry
        e = jackknife(value, f(without), "layer")
    if math.isfinite(e.low):
        e = Estimate(value, max(e.low, 0.0), min(e.high, high), e.n, e.unit)
    return e.record()


def _figures(sums: dict[str, Sums]) -> dict[str, Any]:
    """The figures of `edit_figures` that every group of tensors has."""

    def share(key: str) -> dict[str, Any]:
        return over_layers(sums, lambda s: s(key) / s("n"))

    out: dict[str, Any] = {"n": int(sum(s["n"].sum() for s in sums.values()))}
    for cast in ("fp32", "bf16"):
        out[cast] = {"below": {f"{t:.0e}": share(f"{cast}_{t:.0e}") for t in THRESHOLDS}}
        out[cast] |= {key: share(f"{cast}_{key}") for key in ("relative", "both", "unchanged")}
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 if no entry changed
        total = {
            key: sum(s[key].sum() for s in sums.values())
            for key in ("n", "second", "theta", "gauss_fourth", "gauss_relative", "gauss_unchanged")
        }
        why, participation = _undefined(sums), lambda s: np.divide(s("second") ** 2, s("n") * s("fourth"))
        out["participation"] = over_layers(sums, participation, reason=why)
        if out["participation"]["estimate"] is not None:
            out["participation"]["null"] = float(total["second"] ** 2 / (total["n"] * total["gauss_fourth"]))
            out["fp32"]["relative"]["null"] = float(total["gauss_relative"] / total["n"])
            out["bf16"]["unchanged"]["null"] = float(total["gauss_unchanged"] / total["n"])
        scale_free = {
            "small": over_layers(sums, lambda s: np.divide(s("small"), s("changed_n")), reason=why),
            "participation": over_layers(sums, lambda s: np.divide(s("changed_n"), s("scaled_fourth")), reason=why),
        }
        out["scale_free"] = {key: figure | {"null": GAUSSIAN[key]} for key, figure in scale_free.items()}
        out["norm"] = over_layers(sums, lambda s: np.sqrt(s("second")), high=math.inf)
        why = FROM_ZERO if total["theta"] == 0 else NOT_FINITE
        ratio = over_layers(sums, lambda s: np.sqrt(np.divide(s("second"), s("theta"))), high=math.inf, reason=why)
    return out | {"relative_norm": ratio}


def _histogram(sums: dict[str, Sums]) -> dict[str, Any]:
    """The "histogram" of `edit_figures`."""
    n = sum(s["n"].sum() for s in sums.values())

    def of(cast: str) -> dict[str, Any]:
        below = sum(s[f"{cast}_histogram"].sum(axis=0) for s in sums.values())
        counts = np.diff(np.concatenate([[0.0], np.asarray(below), [n]])).astype(int).tolist()
        return {"counts": counts, "unchanged": int(sum(s[f"{cast}_unchanged"].sum() for s in sums.values()))}

    return {"log10_edges": LOG_EDGES.tolist()} | of("fp32") | {"bf16": of("bf16")}


def _neuron_scores(mlp: dict[str, jax.Array]) -> jax.Array:
    square = {name: x.astype(jnp.float32) ** 2 for name, x in mlp.items()}
    inner_LF = jnp.sum(square["gate"], axis=1) + jnp.sum(square["up"], axis=1)
    return constrain(jnp.sqrt(inner_LF + jnp.sum(square["down"], axis=2)), None, None)


_neuron_program = program("neuron_scores", _neuron_scores)


def neuron_scores(edit: Any) -> NDArray[np.float32]:
    """The score of each MLP neuron c of each layer in an edit δ, [L, F]: how much the neuron changed.

    s_c = √(‖δW_gate[:,c]‖² + ‖δW_up[:,c]‖² + ‖δW_down[c,:]‖²) [chosen norm].

    Args:
      edit: δ, a difference of parameters, a tree like them.

    Returns:
      the scores on the host, float32, 0 for a neuron that did not change.
    """
    return np.asarray(_neuron_program({name: edit["layers"][name]["kernel"] for name in ("gate", "up", "down")}))


def _conflicts(share: float, kind: str, a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    """Of one tensor: the number of entries in both top sets, and how many of them have opposite signs."""
    k = counting.split(max(1, round(share * a.size)))
    in_a, in_b = (counting.highest(x, k) & (x != 0) for x in (a, b))
    shared = in_a & in_b
    return {"shared": jnp.sum(shared), "conflicts": jnp.sum(shared & ((a > 0) != (b > 0)))}


_conflicts_program = program(
    "sign_conflict",
    lambda a, b, share: by_tensor(lambda *tensors: _conflicts(share, *tensors), a, b),
    static_argnums=2,
)


def sign_conflict(edit_a: Any, edit_b: Any, share: float = 0.2) -> dict[str, Any]:
    """The TIES sign conflict (arXiv 2306.01708): the share of entries with opposite signs among the largest.

    The largest are those in the top `share` by |δ| of both edits. A top set is taken in each tensor: the round(share ·
    size) largest entries, at least one, and all others that are as large as the smallest of them. Unchanged entries are
    never in it. Sets are found by counting, so no sharded tensor is sorted or gathered. Intervals are a jackknife over
    layers.

    Args:
      edit_a, edit_b: two trees δ with the same structure.
      share: the size of a top set, as a share of the tensor, in [0, 1].

    Returns:
      {"all": record, "kinds": {kind: record}}. Each record adds "chance", which is ½, and "shared", the number of
      entries that are in both top sets of their tensor. It has no estimate if there are no such entries. It has no
      interval if there is only one layer, if leaving out one layer leaves no such entry, or if no leaf is stacked
      (`over_layers`).
    """
    counted = distributed.gather(_conflicts_program(edit_a, edit_b, share))
    sums = {name: {k: np.asarray(v, float) for k, v in counts.items()} for name, counts in counted.items()}

    def record(part: dict[str, Sums]) -> dict[str, Any]:
        shared = int(sum(s["shared"].sum() for s in part.values()))
        if not shared:
            reason = "no coordinate is in both top sets"
            return missing(reason, "layer") | {"chance": 0.5, "shared": 0}
        return over_layers(part, lambda s: s("conflicts") / s("shared"), "shared") | {"chance": 0.5, "shared": shared}

    return {"all": record(sums), "kinds": {tree.kind(name): record({name: s}) for name, s in sums.items()}}
