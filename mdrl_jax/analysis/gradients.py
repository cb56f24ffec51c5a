"""Do two domains' gradients point the same way: in all, by tensor, by layer (definitions §4; C3).

Gradients are of the loss: a positive inner product is synergy (a step down B's gradient lowers A's loss), a negative
one is conflict. A domain's prompts come as blocks of equal size, and the gradient of each block, too large to keep, is
seen only through the products of all pairs of blocks, tensor by tensor. All figures are arithmetic on that Gram
matrix; `stats.cosines` has the estimators and their intervals.

A domain with so few informative prompts that its halves do not agree (the interval of r holds 0) has no cosine that
could be measured: "near-orthogonal" would be noise.
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

_products = program("gradient_products", lambda a, b: tree.per_tensor(tree.vdot, a, b))


def gram(block_gradient: Callable[[int], Any], n: int, held: int) -> Gram:
    """Products of the gradients of all pairs of n blocks, by leaf path: [L, n, n], or [1, n, n] if not stacked.

    `block_gradient(i)` gives the gradient tree of block i. At most `held` of them live at a time: held − 1 are kept
    while the later ones pass by one at a time, then the next held − 1. With held ≥ n each is computed once, else about
    n/(2(held − 1)) times. Sums are float32 on the devices (all-reduces), float64 here. Raises ValueError for held < 2.
    """
    if held < 2:
        raise ValueError("a product takes two gradients at a time: held must be at least 2")
    products: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
    for first in range(0, max(n - 1, 1), held - 1):
        kept: list[Any] = []
        for j in range(first, n):
            passing = block_gradient(j)
            made = {(first + i, j): _products(x, passing) for i, x in enumerate(kept)}
            if first == 0:
                made[j, j] = _products(passing, passing)
            products |= distributed.gather(made)  # waits, so that no gradient outlives its turn in a queue
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
    """Figures of domain A against domain B, whose blocks are these rows of the Gram (at least four each).

    {"model": row, "kinds": [row], "layers": [row], "tensors": [row], "conflicting", "synergistic", "cancellation"}.
    A row has "name", "kind", "layer", and records "inner", "cosine" (raw), "disattenuated" (None with a "reason" where
    it is not measurable), "halves" and "reliability" (r and ρ of A and of B), and "p", two-sided, of inner ≠ 0.
    "conflicting" and "synergistic": {"tensors": names, "count": record} of the tensors called by Benjamini–Hochberg
    at `q`. "cancellation": records "positive" and "negative", sums over the inner products of tensors of that sign
    (`cosines.sums_by_sign`), and "net", their sum.

    Nulls change the sign of whole blocks at random, of A's in half of the draws and of B's in the other: the noise,
    and how it is shared by tensors, stays; a direction that the domain's blocks agree on goes. Exchanging blocks
    between domains would test another thing, that both gradients are equal.
    """
    tensors = [(name, layer) for name, g in gram.items() for layer in range(g.shape[0])]
    stacked = [(name, layer if tree.is_stacked(name) else None) for name, layer in tensors]
    full_Tnn = np.concatenate([np.asarray(g, float) for g in gram.values()])
    groups, rows = _groups(stacked)
    all_Tnn = np.einsum("gt,tij->gij", groups, full_Tnn, optimize=True)
    a, b = (cosines.within(all_Tnn[:, np.asarray(x)[:, None], np.asarray(x)]) for x in (blocks_a, blocks_b))
    cross = all_Tnn[:, np.asarray(blocks_a)[:, None], np.asarray(blocks_b)]
    ab = cosines.between(cross)
    inner, p = cosines.inner_product(ab)
    n = a.n + b.n
    raw, clean = cosines.raw_cosine(ab, a, b), cosines.disattenuated_cosine(ab, a, b)
    halves = [cosines.half_cosine(x) for x in (a, b)]
    reliable = [cosines.reliability(h) for h in halves]
    for t, row in enumerate(rows):
        row["inner"] = _record(inner, t, n, "")
        row["cosine"] = _record(raw, t, n, "a gradient is zero")
        why = _unmeasurable(halves, t)
        row["disattenuated"] = _record(clean, t, n, "no signal") if why is None else missing(why, "block", n)
        row["halves"] = [_record(h, t, x.n, "the gradient is zero") for h, x in zip(halves, (a, b), strict=True)]
        row["reliability"] = [_record(r, t, x.n, "the gradient is zero") for r, x in zip(reliable, (a, b), strict=True)]
        row["p"] = float(p[t])
    at = len(rows) - len(stacked)  # tensors come last
    null = _null(cross[at:], n_null, q, seed)
    squared = a.squared_norm[0] * b.squared_norm[0]
    if squared > 0:
        rows[0]["cosine"]["null"] = null_record(null["net"] / np.sqrt(squared))
    called = benjamini_hochberg(p[at:], q)
    out: dict[str, Any] = {
        "model": rows[0],
        "kinds": [r for r in rows[1:at] if r["layer"] is None],
        "layers": [r for r in rows[1:at] if r["layer"] is not None],
        "tensors": rows[at:],
    }
    for word, sign in (("conflicting", -1), ("synergistic", 1)):
        names = [r["name"] for r, c, x in zip(rows[at:], called, inner.value[at:], strict=True) if c and sign * x > 0]
        count = {"estimate": len(names), "ci95": None, "null": null_record(null[word]), "n": len(called)}
        out[word] = {"tensors": names, "count": count | {"unit": "tensor"}}
    sums = cosines.sums_by_sign(cross[at:], np.random.default_rng(seed))
    names = ("positive", "negative", "net")
    return out | {"cancellation": {name: _record(sums, g, n, "") | {"null": 0.0} for g, name in enumerate(names)}}


def _groups(tensors: list[tuple[str, int | None]]) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
    """Which tensors [T] each row sums: the model, kinds, layers, and every tensor by itself."""
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
    return np.array(member, float), rows


def _null(cross_Tnm: NDArray[np.float64], n_null: int, q: float, seed: int) -> dict[str, NDArray[np.float64]]:
    """Draws of the counts of called tensors and of the net inner product when block signs are random."""
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
    for name, half in zip("AB", halves, strict=True):
        if not half.low[t] > 0:  # nan, of a zero gradient, included
            return f"two halves of {name}'s blocks do not agree: the interval of their cosine includes 0 or less"
    return None


def _record(figures: StackedEstimates, t: int, n: int, reason: str) -> Record:
    """The record of the t-th figure, of n blocks; `reason` says why it is undefined if it is."""
    estimate = figures.estimate(t, n)
    return missing(reason, "block", n) if estimate is None else estimate.record()
