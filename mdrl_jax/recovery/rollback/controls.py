"""What a conflict set has to beat: controls with as many coordinates (definitions §9, C7).

A control lies in the same support as the set, the coordinates that the edit changed in the set's route [chosen], but
for `out_of_route`, which lies outside the route, and `whole`, which is all of the edit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.recovery.rollback.rules import magnitude
from mdrl_jax.recovery.rollback.selection import complement, largest, random_set, size, support

# Bits of |δ| that a match may differ in: bins are 2^-11 of |δ| wide or less.
BLIND_BITS = 12
N_BINS = 2 ** (31 - BLIND_BITS)
Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Selection:
    """A chosen set `mask` of an `edit`, the scores it was chosen by, and the route it was chosen in (None: all)."""

    edit: Any
    scores: Any
    mask: Any
    route: Any = None


def out_of_route(selection: Selection) -> Any:
    """The same rule and size, outside the route. Raises ValueError for a set that was chosen among all coordinates."""
    if selection.route is None:
        raise ValueError("the set was chosen among all coordinates: nothing is out of its route")
    return largest(selection.scores, size(selection.mask), complement(selection.route))


def matched(edit: Any, mask: Any, within: Any, seed: int) -> Any:
    """A partner for each coordinate of `mask`: another of `within`, not in `mask`, nearest in |δ|; none is used twice.

    Exact: the size, that the sets are disjoint, and |δ| to the 2^-11 of itself that a bin is wide at most. Partners are
    first sought in the coordinate's own bin; those that find none there, the largest first, take the nearest bin that
    has any left, which is greedy, not the assignment of least total distance. Within a bin partners are drawn at
    random over the whole tree, so that no tensor is favoured.

    Two passes on the host, one tensor (a layer's slice) at a time: memory is some 40 bytes an entry of the largest
    tensor, some tens of MB for the bins, and one leaf of booleans.

    Args:
      edit: δ, a tree.
      mask, within: masks like it.
      seed: of the draws within bins.

    Raises:
      ValueError: if fewer coordinates are left in `within` than `mask` has.
    """
    taken, free = np.zeros(N_BINS, np.int64), np.zeros(N_BINS, np.int64)
    for _, bins, chosen, candidate in _tensors(edit, mask, within):
        taken += np.bincount(bins[chosen], minlength=N_BINS)
        free += np.bincount(bins[candidate], minlength=N_BINS)
    if free.sum() < taken.sum():
        raise ValueError(f"{taken.sum()} coordinates have only {free.sum()} others to be matched with")
    needed, rng = _partners(taken, free), np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(mask)
    made: list[Any] = []
    for (leaf, layer), bins, _, candidate in _tensors(edit, mask, within):
        if leaf == len(made):
            made.append(np.zeros(leaves[leaf].shape, bool))
        picked = _draw(bins, candidate, needed, free, rng)
        (made[leaf] if layer is None else made[leaf][layer]).reshape(-1)[picked] = True
        if layer is None or layer == leaves[leaf].shape[0] - 1:
            made[leaf] = jax.device_put(made[leaf], leaves[leaf].sharding)
    return structure.unflatten(made)


CONTROLS: dict[str, Callable[[Selection, int], Any]] = {
    "random": lambda s, seed: random_set(seed, size(s.mask), support(s.edit, s.route)),
    "matched": lambda s, seed: matched(s.edit, s.mask, support(s.edit, s.route), seed),
    "largest": lambda s, seed: largest(magnitude(s.edit), size(s.mask), s.route),
    "out_of_route": lambda s, seed: out_of_route(s),
    "whole": lambda s, seed: support(s.edit),
}


def _tensors(
    edit: Any, mask: Any, within: Any
) -> Iterator[tuple[tuple[int, int | None], NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]]:
    """((leaf, layer), bin of |δ|, in the mask, free to be chosen) of the entries of each tensor, on the host."""
    masks, places = jax.tree.leaves(mask), jax.tree.leaves(within)
    for i, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(edit)):
        for layer in range(leaf.shape[0]) if tree.is_stacked(tree.path(keys)) else [None]:
            delta, chosen, place = (
                np.asarray(x if layer is None else x[layer]).reshape(-1) for x in (leaf, masks[i], places[i])
            )
            bits = np.abs(delta.astype(np.float32)).view(np.int32)
            yield (i, layer), bits >> BLIND_BITS, chosen, place & ~chosen


def _partners(taken: Ints, free: Ints) -> Ints:
    """How many partners each bin gives."""
    needed = np.minimum(taken, free)
    short, left = taken - needed, free - needed
    open_bins = np.flatnonzero(left)
    n, sizes = open_bins.size, _middle(open_bins)
    # The nearest open bin that is not used up: downward of bin i from down[i + 1], where 0 is none; upward from up[i].
    down, up = np.arange(n + 1), np.arange(n + 1)
    for b in np.flatnonzero(short)[::-1]:
        value, at = _middle(b), int(np.searchsorted(open_bins, b))
        while short[b]:
            near = [i for i in (_root(down, at) - 1, _root(up, at)) if 0 <= i < n]
            i = min(near, key=lambda i, value=value: abs(sizes[i] - value))
            given = min(short[b], left[open_bins[i]])
            short[b] -= given
            left[open_bins[i]] -= given
            needed[open_bins[i]] += given
            if not left[open_bins[i]]:
                down[i + 1], up[i] = i, i + 1
    return needed


def _middle(bins: NDArray[np.integer]) -> NDArray[np.float32]:
    """|δ| in the middle of a bin."""
    bits = (np.asarray(bins) << BLIND_BITS) + (1 << (BLIND_BITS - 1))
    return bits.astype(np.int32).view(np.float32)


def _root(parent: NDArray[np.integer], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def _draw(
    bins: NDArray[np.int32], candidate: NDArray[np.bool_], needed: Ints, free: Ints, rng: np.random.Generator
) -> NDArray[np.integer]:
    """Positions of one tensor's partners; what it gives and had is taken off `needed` and `free`.

    Of each bin it gives its share of the candidates there, rounded up or down at random.
    """
    at = np.flatnonzero(candidate & (needed[bins] > 0))
    at = at[np.lexsort((rng.random(at.size), bins[at]))]
    used, first, here = np.unique(bins[at], return_index=True, return_counts=True)
    expected = needed[used] * (here / free[used])
    given = np.floor(expected + rng.random(used.size)).astype(np.int64)
    given = np.clip(given, needed[used] - (free[used] - here), np.minimum(here, needed[used]))
    needed[used] -= given
    free[used] -= here
    rank = np.arange(at.size) - np.repeat(first, here)
    return at[rank < np.repeat(given, here)]
