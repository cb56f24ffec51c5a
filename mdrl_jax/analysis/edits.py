"""Edits δ = θ_after − θ_before: how sparse, how small, of what rank, on which neurons (definitions §3; C1, C2).

Parameters may be sharded: everything here is a reduction compiled with them, one layer of one leaf at a time, and
only counts, sums and score vectors reach the host. Shares are exact counts; their intervals say how much they hang
on single layers (jackknife over layers, unstacked tensors always in), not how well they were counted.

Choices: relative change divides by |θ_before|, and an entry that did not move has a relative change of 0 even where
θ is 0 [chosen]; a neuron's score is √(‖δW_gate[:,c]‖² + ‖δW_up[:,c]‖² + ‖δW_down[c,:]‖²) [chosen norm]; a channel
that did not change at all is in no top set, which would otherwise be filled by index [chosen]. Nulls of the share of
small relative changes and of the participation ratio are those of a Gaussian edit with each tensor's norm.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import constrain
from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import Estimate, missing, over_seeds, student

THRESHOLDS = (1e-7, 1e-6, 1e-5)
RELATIVE = 1e-3
LOG_EDGES = np.arange(-12.0, 0.5, 0.5)  # of the histogram of log10 |δ|
UNCHANGED = "no entry changed"
VECTORS = ("norm", "bias")  # endings of the kinds that are no matrices
Sums = dict[str, NDArray[np.float64]]


def by_tensor(function: Callable[..., Any], *trees: Any) -> dict[str, Any]:
    """`function(kind, *slices)` of each tensor, by leaf path, stacked to [L, ...] or [1, ...], a layer at a time."""
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
    """A tensor as the matrix it multiplies with: q, k, v [D, H·h], o [H·h, D], the others as they are."""
    if x.ndim == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if kind == "o" else x.reshape(x.shape[0], -1)


def _counts(size: jax.Array, before: jax.Array) -> dict[str, jax.Array]:
    relative = (size < RELATIVE * jnp.abs(before)) | (size <= 0)
    return {
        "below": jax.lax.map(lambda edge: jnp.sum(size < edge), jnp.asarray(10.0**LOG_EDGES, jnp.float32)),
        "unchanged": jnp.sum(size <= 0),
        "relative": jnp.sum(relative),
        "both": jnp.sum(relative & (size < THRESHOLDS[0])),
    }


def _tensor_sums(kind: str, before: jax.Array, after: jax.Array) -> dict[str, Any]:
    """Counts and sums of one tensor; powers of δ are of δ/max|δ|, since (1e-12)⁴ is 0 in float32."""
    delta = after - before
    size = jnp.abs(delta)
    largest = jnp.max(size)
    unit = delta / jnp.where(largest > 0, largest, 1.0)
    # XLA may drop a plain cast there and back (excess precision is allowed to it).
    coarse_before, coarse_after = (jax.lax.reduce_precision(x, 8, 7) for x in (before, after))
    out = {
        "fp32": _counts(size, before),
        "bf16": _counts(jnp.abs(coarse_after - coarse_before), coarse_before),
        "largest": largest,
        "second": jnp.sum(unit**2),
        "fourth": jnp.sum(unit**4),
        "theta": jnp.sum(before**2),
        # What a Gaussian edit of the same norm would leave relatively unchanged.
        "gauss": jnp.sum(_erf(RELATIVE * jnp.abs(before) / jnp.maximum(jnp.sqrt(2 * jnp.mean(delta**2)), 1e-30))),
    }
    if not kind.endswith(VECTORS):
        out["spectrum"] = _squared_singular_values(matrix(kind, unit))
    return out


def _erf(x: jax.Array) -> jax.Array:
    """The error function to 4e-4: XLA gathers the operand of its own where that is sharded."""
    return jnp.tanh(1.128379 * x + 0.100911 * x**3)


def _squared_singular_values(x: jax.Array) -> jax.Array:
    # Split along the sum, the product is local and only the Gram matrix is reduced; else a tensor is gathered.
    x = constrain(x if x.shape[0] <= x.shape[1] else x.T, None, "vocab_split")
    return jnp.linalg.eigvalsh(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST))


_sums_program = program("edit_sums", lambda before, after: by_tensor(_tensor_sums, before, after))


def effective_rank(spectrum: NDArray[np.floating]) -> float | None:
    """exp(−Σ p log p) of p = squared singular values over their sum; None of the zero matrix."""
    values = np.clip(np.asarray(spectrum, float), 0.0, None)
    total = values.sum()
    if not total > 0:
        return None
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def edit_figures(before: Any, after: Any) -> dict[str, Any]:
    """The figures of the edit from `before` to `after`, two trees of parameters with the same shardings.

    {"all": figures, "kinds": {kind: figures}, "histogram": {"log10_edges", "counts", "unchanged", "bf16": {"counts",
    "unchanged"}}}, with counts one longer than edges: below the first, between, above the last (unchanged entries are
    below the first), in fp32 and with both ends cast. Figures:
    "n" entries; "fp32" and "bf16" (both ends cast): {"below": {"1e-07", "1e-06", "1e-05"}, "relative", "both",
    "unchanged"}, shares of entries with |δ| < τ, with |δ|/|θ| < 1e-3, with both it and |δ| < 1e-7, and with δ = 0;
    "participation" (Σδ²)²/(nΣδ⁴); "norm" ‖δ‖; "relative_norm" ‖δ‖/‖θ‖. Kinds of matrices add "effective_rank", its
    mean over layers, and kinds of stacked tensors "layers": {"relative", "norm", "effective_rank"}, a list each.
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
            figures["effective_rank"] = over_seeds(known, "layer").record() if known else missing(UNCHANGED, "layer")
        if tree.is_stacked(name):
            s = sums[name]
            norms = np.sqrt(s["second"]).tolist()
            figures["layers"] = {"relative": (s["fp32_relative"] / s["n"]).tolist(), "norm": norms}
            figures["layers"]["effective_rank"] = ranks or None
        kinds[tree.kind(name)] = figures
    return {"all": _figures(sums), "kinds": kinds, "histogram": _histogram(sums)}


def _additive(values: dict[str, Any], shape: tuple[int, ...]) -> Sums:
    """Float64 sums of each tensor of a leaf, arrays [L or 1], that may be added over tensors."""
    rows = values["largest"].shape[0]
    scale = np.asarray(values["largest"], float)
    out: Sums = {
        "n": np.full(rows, math.prod(shape) / rows),
        "second": scale**2 * values["second"],
        "fourth": scale**4 * values["fourth"],
        "theta": np.asarray(values["theta"], float),
        "gauss_relative": np.asarray(values["gauss"], float),
    }
    out["gauss_fourth"] = 3 * out["second"] ** 2 / out["n"]
    at = [int(np.flatnonzero(np.isclose(LOG_EDGES, math.log10(t)))[0]) for t in THRESHOLDS]
    for cast in ("fp32", "bf16"):
        counts = values[cast]
        out[f"{cast}_histogram"] = np.asarray(counts["below"], float)
        out |= {f"{cast}_{t:.0e}": out[f"{cast}_histogram"][:, i] for i, t in zip(at, THRESHOLDS, strict=True)}
        out |= {f"{cast}_{k}": np.asarray(counts[k], float) for k in ("relative", "both", "unchanged")}
    return out


def over_layers(
    sums: dict[str, Sums], f: Callable[[Callable[[str], Any]], Any], size: str = "n", high: float = 1.0
) -> dict[str, Any]:
    """Record of f(totals of sums over tensors), between 0 and `high`, with its jackknife interval over layers.

    Leaving out a layer leaves out its slice of every stacked leaf and counts the other layers L/(L − 1) times, so
    that unstacked tensors keep their weight. Unstacked tensors alone are a count without an interval, with n their
    total `size`.
    """
    value = float(f(lambda key: sum(s[key].sum() for s in sums.values())))
    if not math.isfinite(value):
        return missing(UNCHANGED, "layer")
    stacked = [s for name, s in sums.items() if tree.is_stacked(name)]
    if not stacked:
        return student(value, math.inf, 0, int(sum(s[size].sum() for s in sums.values())), "entry").record()

    def without(key: str) -> Any:
        per_layer = np.sum([s[key] for s in stacked], axis=0)
        n = per_layer.size
        fixed = sum(s[key].sum() for name, s in sums.items() if not tree.is_stacked(name))
        return fixed + (per_layer.sum() - per_layer) * n / max(n - 1, 1)

    e = jackknife(value, f(without), "layer")
    if math.isfinite(e.low):
        e = Estimate(value, max(e.low, 0.0), min(e.high, high), e.n, e.unit)
    return e.record()


def _figures(sums: dict[str, Sums]) -> dict[str, Any]:
    def share(key: str) -> dict[str, Any]:
        return over_layers(sums, lambda s: s(key) / s("n"))

    out: dict[str, Any] = {"n": int(sum(s["n"].sum() for s in sums.values()))}
    for cast in ("fp32", "bf16"):
        out[cast] = {"below": {f"{t:.0e}": share(f"{cast}_{t:.0e}") for t in THRESHOLDS}}
        out[cast] |= {key: share(f"{cast}_{key}") for key in ("relative", "both", "unchanged")}
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 where nothing changed
        total = {
            key: sum(s[key].sum() for s in sums.values()) for key in ("n", "second", "gauss_fourth", "gauss_relative")
        }
        out["participation"] = over_layers(sums, lambda s: np.divide(s("second") ** 2, s("n") * s("fourth")))
        if out["participation"]["estimate"] is not None:
            out["participation"]["null"] = float(total["second"] ** 2 / (total["n"] * total["gauss_fourth"]))
            out["fp32"]["relative"]["null"] = float(total["gauss_relative"] / total["n"])
        out["norm"] = over_layers(sums, lambda s: np.sqrt(s("second")), high=math.inf)
        ratio = over_layers(sums, lambda s: np.sqrt(np.divide(s("second"), s("theta"))), high=math.inf)
    return out | {"relative_norm": ratio}


def _histogram(sums: dict[str, Sums]) -> dict[str, Any]:
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
    """s_c [L, F] = √(‖δW_gate[:,c]‖² + ‖δW_up[:,c]‖² + ‖δW_down[c,:]‖²) of a tree δ [chosen norm]."""
    return np.asarray(_neuron_program({name: edit["layers"][name]["kernel"] for name in ("gate", "up", "down")}))
