"""The controls of a rollback that are more than a set of coordinates by size (definitions §9, C7).

- `matched`: for each chosen coordinate another one of nearly equal |δ|, in the whole model or in the same tensor. It
  tests whether the chosen set helps because of which coordinates it holds, or only because of how far they moved.
- `permuted`: the chosen coordinates with each other's |δ| and with the sign of A's gradient. It tests whether B's edit
  matters there at all.
- `sign_step`: a sparse step against the sign of A's gradient that never saw B's edit.

`comparison.controls` uses them beside the other controls. A control draws from the coordinates that the edit changed in
the place of the chosen set, the shared route or the whole model [chosen]. There are three exceptions: `out_of_route`
lies outside the route, `whole` is all of the edit, and `sign_step` takes the largest gradients of the whole model.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree

# Low bits of a float32 that a bin ignores. The 11 highest mantissa bits stay, so a bin is at most 2^-11 · |δ| wide.
BLIND_BITS = 12
N_BINS = 2 ** (31 - BLIND_BITS)
Ints = NDArray[np.int64]


def matched(edit: Any, mask: Any, within: Any, seed: int, same_tensor: bool = False) -> Any:
    """A random set of as many coordinates as `mask` has, disjoint from it, with nearly the same values of |δ|.

    Each coordinate of the mask gets a partner from `within`, and none is used twice. Coordinates are binned by |δ|. A
    partner comes from the coordinate's own bin if that has one left, and its |δ| then agrees to 2^-11. After that, the
    coordinates without a partner, those with the largest |δ| first, take the nearest bin that has one left. This is
    greedy and need not minimise the total distance. Within a bin partners are drawn at random over the whole tree, so
    that no tensor is favoured.

    The work is done on the host in two passes, one tensor (or one layer of a stacked tensor) at a time. It needs about
    40 bytes for each entry of the largest tensor, some tens of MB for the bins, and one leaf of booleans.

    Args:
      edit: δ, a tree like the parameters.
      mask: booleans, a tree like the edit: the coordinates to be matched.
      within: booleans, a tree like the edit: where partners may lie. Coordinates of `mask` are left out.
      seed: of the draws within bins.
      same_tensor: whether a partner must lie in the same tensor, and in the same layer of a stacked one. In a tensor
        with too few partners only the coordinates with the largest |δ| then get one, and the set is smaller.

    Returns:
      The partners, booleans, a tree like the edit with the shardings of `mask`.

    Raises:
      ValueError: if `within` has fewer coordinates outside `mask` than `mask` has, unless `same_tensor` is set.
    """
    taken, free = np.zeros(N_BINS, np.int64), np.zeros(N_BINS, np.int64)
    for _, bins, chosen, candidate in () if same_tensor else _tensors(edit, mask, within):
        taken += np.bincount(bins[chosen], minlength=N_BINS)
        free += np.bincount(bins[candidate], minlength=N_BINS)
    if free.sum() < taken.sum():
        raise ValueError(f"{taken.sum()} coordinates cannot be matched: `within` has only {free.sum()} others")
    needed, rng = _partners(taken, free), np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(mask)
    made: list[Any] = []
    for (leaf, layer), bins, chosen, candidate in _tensors(edit, mask, within):
        if leaf == len(made):
            made.append(np.zeros(leaves[leaf].shape, bool))
        if same_tensor:
            taken, free = (np.bincount(bins[x], minlength=N_BINS) for x in (chosen, candidate))
            needed = _partners(_fewest(taken, int(free.sum())), free)
        picked = _draw(bins, candidate, needed, free, rng)
        (made[leaf] if layer is None else made[leaf][layer]).reshape(-1)[picked] = True
        if layer is None or layer == leaves[leaf].shape[0] - 1:
            made[leaf] = jax.device_put(made[leaf], leaves[leaf].sharding)
    return structure.unflatten(made)


def permuted(edit: Any, mask: Any, gradient: Any, seed: int) -> Any:
    """An edit on the same coordinates with permuted magnitudes and the sign of a gradient: sign(g_j)·|δ_π(j)|.

    Taking it back moves each coordinate of the mask against its gradient. π is a random permutation of all coordinates
    of the mask, over the whole tree, so each |δ| is used once. The work is done on the host, one tensor at a time.

    Args:
      edit: δ, a tree like the parameters.
      mask: booleans, a tree like the edit.
      gradient: g, a tree like the edit.
      seed: of the permutation π.

    Returns:
      The edit, 0 outside the mask and where g is 0, a tree with the dtypes and shardings of `edit`.
    """
    parts = [jax.tree.leaves(x) for x in (edit, mask, gradient)]
    sizes = np.concatenate([np.abs(np.asarray(d)[np.asarray(m)]) for d, m, _ in zip(*parts, strict=True)])
    sizes, made, at = np.random.default_rng(seed).permutation(sizes), [], 0
    for delta, chosen, slope in zip(*parts, strict=True):
        on = np.asarray(chosen)
        leaf, n = np.zeros(delta.shape, delta.dtype), int(on.sum())
        leaf[on] = np.sign(np.asarray(slope)[on]) * sizes[at : at + n]
        made.append(jax.device_put(leaf, delta.sharding))
        at += n
    return jax.tree.structure(edit).unflatten(made)


def _fewest(taken: Ints, most: int) -> Ints:
    """The coordinates of each bin that get a partner if there are only `most` partners, those of the largest |δ|."""
    upward = np.cumsum(taken[::-1])[::-1]  # coordinates in this bin and the ones above it
    return np.clip(most - (upward - taken), 0, taken)


def _tensors(
    edit: Any, mask: Any, within: Any
) -> Iterator[tuple[tuple[int, int | None], NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]]:
    """The entries of each tensor in turn, flat, on the host.

    Yields:
      (leaf, layer), the tensor's place, with layer None for a leaf that is not stacked; the bin of each entry's |δ|;
      whether the entry is in the mask; whether it may become a partner.
    """
    masks, places = jax.tree.leaves(mask), jax.tree.leaves(within)
    for i, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(edit)):
        for layer in range(leaf.shape[0]) if tree.is_stacked(tree.path(keys)) else [None]:
            delta, chosen, place = (
                np.asarray(x if layer is None else x[layer]).reshape(-1) for x in (leaf, masks[i], places[i])
            )
            bits = np.abs(delta.astype(np.float32)).view(np.int32)
            yield (i, layer), bits >> BLIND_BITS, chosen, place & ~chosen


def _partners(taken: Ints, free: Ints) -> Ints:
    """How many partners each bin gives [N_BINS].

    Args:
      taken: number of coordinates of the mask in each bin.
      free: number of possible partners in each bin, in total at least as many.
    """
    needed = np.minimum(taken, free)
    short, left = taken - needed, free - needed
    open_bins = np.flatnonzero(left)
    n, sizes = open_bins.size, _middle(open_bins)
    # Union-find over the open bins, so that used-up bins are skipped quickly. _root(down, i) − 1 is the nearest bin
    # below i that has a partner left (−1: none), and _root(up, i) the nearest one from i upwards (n: none).
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
    """The end of the chain i → parent[i] → …, which is shortened on the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def _draw(
    bins: NDArray[np.int32], candidate: NDArray[np.bool_], needed: Ints, free: Ints, rng: np.random.Generator
) -> NDArray[np.integer]:
    """Draws one tensor's partners: for each bin in proportion to its candidates there, rounded at random.

    Args:
      bins: bin of each entry of the tensor.
      candidate: whether the entry may become a partner.
      needed: partners that each bin still has to give; those drawn here are subtracted in place.
      free: candidates of each bin in this tensor and the ones after it; those of this tensor are subtracted in place.
      rng: generator of the draws.

    Returns:
      Flat positions of the partners.
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
