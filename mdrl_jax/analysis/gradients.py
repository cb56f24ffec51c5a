"""Do the gradients of two domains point the same way: in the model, by layer, by tensor (definitions §4; C3)?

Gradients are those of the loss. A positive inner product is synergy: a step down B's gradient lowers A's loss. A
negative one is conflict.

A domain's prompts are divided into blocks of equal size, and each block has its own gradient. Block gradients are too
large to keep, so `gram` keeps only the inner products of all pairs of blocks, tensor by tensor. All figures of
`compare` are arithmetic on this Gram matrix. `stats/cosines.py` has the estimators and their intervals.
`checkpoint_figures.py` calls both functions at each point of the sequence where gradients are compared.

The disattenuated cosine is not measurable if, for one of the two domains, the gradients of two halves of the blocks do
not agree: the interval of their cosine r does not lie above 0. Such a domain has too few prompts whose completions
differ in reward. A cosine near 0 would then only show that the gradient is noise.

A *record* of a figure is {"estimate", "ci95", "null", "n", "unit"}, with "reason" if it has no estimate
(`stats/estimate.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.stats import cosines
from mdrl_jax.stats.cosines import StackedEstimates
from mdrl_jax.stats.estimate import Record, missing
from mdrl_jax.stats.tests import benjamini_hochberg, null_record

Gram = dict[str, NDArray[np.float64]]
NOT_FINITE = "a gradient is not finite"

_products = program("gradient_products", lambda a, b: tree.per_tensor(tree.vdot, a, b))


def gram(block_gradient: Callable[[int], Any], n: int, held: int) -> Gram:
    """Inner products of the gradients of all pairs of n blocks.

    At most `held` gradients exist at a time. held − 1 of them are kept, and each later one is computed, multiplied with
    the kept ones and dropped; then the next held − 1 are kept. With held ≥ n each gradient is computed once, otherwise
    about n/(2(held − 1)) times. Devices sum in float32.

    Args:
      block_gradient: i -> the gradient of block i, a tree of parameters.
      n: the number of blocks, at least 1.
      held: how many gradients fit into memory, at least 2.

    Returns:
      by path of the leaf: symmetric [L, n, n] float64 for a leaf stacked by layer, otherwise [1, n, n].

    Raises:
      ValueError: if `held` is below 2.
    """
    if held < 2:
        raise ValueError("an inner product needs two gradients at a time: held must be at least 2")
    products: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
    for first in range(0, max(n - 1, 1), held - 1):
        kept: list[Any] = []
        for j in range(first, n):
            passing = block_gradient(j)
            made = {(first + i, j): _products(x, passing) for i, x in enumerate(kept)}
            if first == 0:
                made[j, j] = _products(passing, passing)
            # Waits for the products; otherwise queued work would keep more than `held` gradients alive.
            products |= distributed.gather(made)
            if len(kept) < held - 1:
                kept.append(passing)
            del passing
    out = {name: np.zeros((x.shape[0], n, n)) for name, x in products[0, 0].items()}
    for (i, j), made in products.items():
        for name, x in made.items():
            out[name][:, i, j] = out[name][:, j, i] = x
    return out


def compare(
    gram: Mapping[str, NDArray[np.float64]],
    blocks_a: Sequence[int],
    blocks_b: Sequence[int],
    q: float = 0.05,
    n_null: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """The gradients of two domains A and B compared (definitions §4).

    The null of the model's cosine and of the two counts changes the sign of whole blocks at random: of A's blocks in
    half of the draws, of B's blocks in the other half. This removes the direction that the blocks of a domain have in
    common. It keeps the noise and its correlation between tensors. Exchanging blocks between A and B would be the null
    of another hypothesis: that both gradients are equal.

    Args:
      gram: as returned by `gram`, for the blocks of all domains.
      blocks_a, blocks_b: the indices of A's and of B's blocks in it, at least four each.
      q: the false discovery rate of Benjamini and Hochberg.
      n_null: draws of the null, at least 1.
      seed: of the null, and of the half splits of "cancellation".

    Returns:
      {"model": row, "kinds": [row], "layers": [row], "tensors": [row], "conflicting", "synergistic", "cancellation"}.

      - A row has "name"; "kind" and "layer", None where it sums over several or has none; the records "inner", "cosine"
        (raw, without an estimate if a gradient is 0) and "disattenuated" (without an estimate if it is not measurable);
        "halves" and "reliability", the records of r and of ρ, [of A, of B]; and "p", the two-sided p-value of
        inner ≠ 0. Only the "cosine" of "model" has a null. "n" of a record counts blocks, of A and B together or of the
        one domain. If a gradient is not finite in one of the tensors that a row sums over, the row's records have that
        reason in place of an estimate, and "p" is None; "halves" and "reliability" of the other domain stay.
      - "conflicting" and "synergistic" are {"tensors": names, "count": record}: the tensors whose inner product is
        negative, or positive, by Benjamini–Hochberg at `q`. "n" of the count is the number of tensors with a p-value;
        without any, the count has no estimate.
      - "cancellation" has the records "positive" and "negative", the sums over tensors of the inner products of one
        sign (`cosines.sums_by_sign`), and "net", their sum; without estimates if a gradient is not finite.

    Raises:
      ValueError: if A or B has fewer than four blocks.
    """
    tensors = [(name, layer) for name, g in gram.items() for layer in range(g.shape[0])]
    stacked = [(name, layer if tree.is_stacked(name) else None) for name, layer in tensors]
    full_Tnn = np.concatenate([np.asarray(g, float) for g in gram.values()])
    full_Tnn = np.where(np.isfinite(full_Tnn), full_Tnn, np.nan)
    groups, rows = _groups(stacked)
    all_Tnn = np.stack([full_Tnn[member].sum(axis=0) for member in groups])
    a, b = (cosines.within(all_Tnn[:, np.asarray(x)[:, None], np.asarray(x)]) for x in (blocks_a, blocks_b))
    cross = all_Tnn[:, np.asarray(blocks_a)[:, None], np.asarray(blocks_b)]
    ab = cosines.between(cross)
    inner, p = cosines.inner_product(ab)
    n = a.n + b.n
    raw, clean = cosines.raw_cosine(ab, a, b), cosines.disattenuated_cosine(ab, a, b)
    halves = [cosines.half_cosine(x) for x in (a, b)]
    reliable = [cosines.reliability(h) for h in halves]
    for t, row in enumerate(rows):
        finite = [bool(np.isfinite(x.power[t])) for x in (a, b)]
        row["inner"] = _record(inner, t, n, NOT_FINITE)
        row["cosine"] = _record(raw, t, n, "a gradient is zero" if all(finite) else NOT_FINITE)
        why = _unmeasurable(halves, t) if all(finite) else NOT_FINITE
        row["disattenuated"] = _record(clean, t, n, "no signal") if why is None else missing(why, "block", n)
        own = ["the gradient is zero" if good else "the gradient is not finite" for good in finite]
        for key, figures in (("halves", halves), ("reliability", reliable)):
            row[key] = [_record(f, t, x.n, text) for f, x, text in zip(figures, (a, b), own, strict=True)]
        row["p"] = None if np.isnan(p[t]) else float(p[t])
    at = len(rows) - len(stacked)  # the rows of single tensors come last
    null = _null(cross[at:], n_null, q, seed)
    squared = a.squared_norm[0] * b.squared_norm[0]
    if squared > 0:
        rows[0]["cosine"]["null"] = null_record(null["net"] / np.sqrt(squared))
    called, tested = benjamini_hochberg(p[at:], q), int(np.isfinite(p[at:]).sum())
    out: dict[str, Any] = {
        "model": rows[0],
        "kinds": [r for r in rows[1:at] if r["layer"] is None],
        "layers": [r for r in rows[1:at] if r["layer"] is not None],
        "tensors": rows[at:],
    }
    for word, sign in (("conflicting", -1), ("synergistic", 1)):
        names = [r["name"] for r, c, x in zip(rows[at:], called, inner.value[at:], strict=True) if c and sign * x > 0]
        count = {"estimate": len(names), "ci95": None, "null": null_record(null[word]), "n": tested, "unit": "tensor"}
        out[word] = {"tensors": names, "count": count if tested else missing(NOT_FINITE, "tensor")}
    sums = cosines.sums_by_sign(cross[at:], np.random.default_rng(seed))
    names = ("positive", "negative", "net")
    return out | {
        "cancellation": {name: _record(sums, g, n, NOT_FINITE) | {"null": 0.0} for g, name in enumerate(names)}
    }


def _groups(tensors: list[tuple[str, int | None]]) -> tuple[NDArray[np.bool_], list[dict[str, Any]]]:
    """The rows of `compare`: the model, kinds, layers, and every tensor by itself.

    Args:
      tensors: path of the leaf and layer (None if it is not stacked) of each of T tensors.

    Returns:
      for each of R rows, which tensors it sums over, [R, T]; and its "name", "kind" and "layer".
    """
    kinds = list(dict.fromkeys(tree.kind(name) for name, _ in tensors))
    layers = sorted({layer for _, layer in tensors if layer is not None})
    member = [[True] * len(tensors)]
    member += [[tree.kind(name) == kind for name, _ in tensors] for kind in kinds]
    member += [[layer == own for _, own in tensors] for layer in layers]
    member += np.eye(len(tensors), dtype=bool).tolist()
    rows: list[dict[str, Any]] = [{"name": "model", "kind": None, "layer": None}]
    rows += [{"name": kind, "kind": kind, "layer": None} for kind in kinds]
    rows += [{"name": f"layer {layer}", "kind": None, "layer": layer} for layer in layers]
    rows += [{"name": tree.label(name, i), "kind": tree.kind(name), "layer": i} for name, i in tensors]
    return np.array(member), rows


def _null(cross_Tnm: NDArray[np.float64], n_null: int, q: float, seed: int) -> dict[str, NDArray[np.float64]]:
    """Draws of the null of `compare`: numbers of tensors that are called, and the net inner product, [n_null] each."""
    rng = np.random.default_rng(seed)
    n, m = cross_Tnm.shape[1:]
    found = []
    for grams, blocks, draws in ((cross_Tnm, n, n_null // 2), (cross_Tnm.swapaxes(1, 2), m, n_null - n_null // 2)):
        found.append(cosines.permuted_tests(grams, rng.choice([-1.0, 1.0], (draws, blocks))))
    inner_RT, p_RT = (np.concatenate(x) for x in zip(*found, strict=True))
    called_RT = benjamini_hochberg(p_RT, q)
    return {
        "conflicting": np.sum(called_RT & (inner_RT < 0), axis=1),
        "synergistic": np.sum(called_RT & (inner_RT > 0), axis=1),
        "net": inner_RT.sum(axis=1),
    }


def _unmeasurable(halves: list[StackedEstimates], t: int) -> str | None:
    """The reason why the t-th cosine of A and B is not measurable; None if it is."""
    for name, half in zip("AB", halves, strict=True):
        if not half.low[t] > 0:  # also true of nan, which a zero gradient has
            return f"two halves of {name}'s blocks do not agree: the interval of their cosine includes 0 or less"
    return None


def _record(figures: StackedEstimates, t: int, n: int, reason: str) -> Record:
    """The record of the t-th figure, which rests on n blocks; `reason` is used if the figure is undefined."""
    estimate = figures.estimate(t, n)
    return missing(reason, "block", n) if estimate is None else estimate.record()
