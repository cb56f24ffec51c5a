"""Figures of circuits: sizes, convergence, faithfulness, overlap, transfer (definitions §11).

Everything runs on the host. A model has M blocks of pairs, each with a circuit of its own, [M, L, H]: the best end of R
searches, which begin at both starts, the low start first. A circuit is judged on the pairs of the next block, on which
it was not sought. Blocks are the units of the intervals, because the pairs of a block share a circuit.

A margin is log π(source's reply) − log π(base's reply) in nats, of each pair. F is its mean over pairs.
"""

from collections.abc import Sequence

import numpy as np

from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import Record, clustered, missing, ratio_of_means
from mdrl_jax.stats.tests import null_record, permutation_p

DRAWS = 2000  # of random circuits in the nulls
DELTAS = (0.1, 0.5)  # δ of the differential vulnerability
FEW_OPEN = 0.1  # searches have converged if the starts disagree on at most this share of the heads [chosen]
BINS = 10  # of the histogram of m


def best(ends_MRLH: np.ndarray, loss_MR: np.ndarray) -> np.ndarray:
    """The circuit of each block [M, L, H]: the end of the search with the least loss; the first of equals.

    Args:
      ends_MRLH: where the searches ended, boolean.
      loss_MR: their loss with the price of the heads.
    """
    return ends_MRLH[np.arange(len(ends_MRLH)), loss_MR.argmin(axis=1)]


def of_previous(circuits_MLH: np.ndarray) -> np.ndarray:
    """For each block the circuit of the block before it [M, L, H]; the first block has that of the last one."""
    return np.roll(circuits_MLH, 1, axis=0)


def search_record(m_MRLH: np.ndarray, ends_MRLH: np.ndarray, loss_MR: np.ndarray) -> Record:
    """How the searches of a model went.

    Args:
      m_MRLH: masks at the end of each search.
      ends_MRLH: the circuits to which they settled.
      loss_MR: their loss with the price of the heads.

    Returns:
      {"heads": L · H, "size" of the circuits, mean over blocks, "m": share of the blocks whose circuit has the head
      [L][H], "histogram": counts of m of every search in `BINS` equal bins of [0, 1], "open": [[layer, head]] of the
      heads on which the best circuits of the two starts disagree in any block, "open_share": on how many of all heads
      they disagree, mean over blocks, "converged": whether that is at most `FEW_OPEN`}.
    """
    low, high = (best(ends_MRLH[:, start::2], loss_MR[:, start::2]) for start in (0, 1))
    chosen, disagree = best(ends_MRLH, loss_MR), low != high
    counts, _ = np.histogram(m_MRLH, bins=BINS, range=(0.0, 1.0))
    return {
        "heads": int(chosen[0].size),
        "size": float(chosen.sum(axis=(1, 2)).mean()),
        "m": chosen.mean(axis=0).tolist(),
        "histogram": counts.tolist(),
        "open": np.argwhere(disagree.any(axis=0)).tolist(),
        "open_share": float(disagree.mean()),
        "converged": bool(disagree.mean() <= FEW_OPEN),
    }


def share(part_MN: np.ndarray, whole_MN: np.ndarray, what: str, null: Record | float | None = None) -> Record:
    """Σ part / Σ whole with Fieller's interval over blocks; no estimate where the interval of the whole includes 0.

    Args:
      part_MN, whole_MN: margins of the same pairs, by block.
      what: the name of the whole, for the reason.
      null: of the share.
    """
    part_M, whole_M = part_MN.mean(axis=1), whole_MN.mean(axis=1)
    found = ratio_of_means(part_M, whole_M, "share") if clustered(whole_M).low > 0 else None
    if found is None:
        return missing(f"{what} is not measurably above 0", "share", len(whole_M), null)
    return found.record(null)


def random_null(random_KMN: np.ndarray, whole_MN: np.ndarray) -> Record | None:
    """The null of a faithfulness: that of random circuits of the same size; None where the whole is not above 0."""
    whole = float(whole_MN.mean())
    return null_record(random_KMN.mean(axis=(1, 2)) / whole) if whole > 0 and len(random_KMN) else None


def overlap(base_MLH: np.ndarray, other_MLH: np.ndarray) -> Record:
    """How much of base's circuits another model's circuits keep, block by block, with the null.

    The null permutes the heads of the other model, in all its blocks alike.

    Returns:
      {"base", "other", "shared": numbers of heads, means over blocks; "retention": shared / base; "chance": other /
      all; "null": of the shared heads; "p": one-sided}. Without heads in base's circuits "retention" is None.
    """
    base_MK, other_MK = (x.reshape(len(x), -1) for x in (base_MLH, other_MLH))
    blocks, n = base_MK.shape
    shared_KK = base_MK.T.astype(float) @ other_MK / blocks  # [of base, of the other]
    rng, every = np.random.default_rng(0), np.arange(n)
    drawn = np.array([shared_KK[every, rng.permutation(n)].sum() for _ in range(DRAWS)])
    k, size, shared = (float(x.sum() / blocks) for x in (base_MK, other_MK, base_MK & other_MK))
    return {
        "base": k,
        "other": size,
        "shared": shared,
        "retention": shared / k if k else None,
        "chance": size / n,
        "null": null_record(drawn),
        "p": permutation_p(shared, drawn),
    }


def beyond_chance(base_LH: np.ndarray, other_LH: np.ndarray) -> float:
    """|base ∩ other| / |base| − |other| / all heads; nan without heads in `base_LH`."""
    k = int(base_LH.sum())
    return float((base_LH & other_LH).sum() / k - other_LH.mean()) if k else float("nan")


def by_block(base_MLH: np.ndarray, other_MLH: np.ndarray) -> np.ndarray:
    """`beyond_chance` of the two circuits of every block [M]; nan where base's is empty."""
    return np.array([beyond_chance(*both) for both in zip(base_MLH, other_MLH, strict=True)])


def mean_over_blocks(values_M: np.ndarray, null: float | None = 0.0) -> Record:
    """The mean over blocks with Student's t; nan blocks are left out, and at least two have to be left."""
    known = values_M[np.isfinite(values_M)]
    if len(known) < 2:
        return missing("fewer than two blocks have a circuit in the base model", "share", len(known), null)
    return clustered(known, "share").record(null)


def ceiling(circuits_MLH: np.ndarray) -> Record:
    """The overlap beyond chance of the circuits of two different blocks of one model: what noise in the search leaves.

    The interval is the jackknife over blocks of the mean over ordered pairs of blocks.
    """
    n = len(circuits_MLH)
    table_MM = np.array([[beyond_chance(a, b) for b in circuits_MLH] for a in circuits_MLH])

    def mean_without(left: int | None) -> float:
        keep = [i for i in range(n) if i != left]
        values = [table_MM[i, j] for i in keep for j in keep if i != j and np.isfinite(table_MM[i, j])]
        return float(np.mean(values)) if values else float("nan")

    value, without = mean_without(None), [mean_without(i) for i in range(n)]
    if n < 3 or not np.isfinite([value, *without]).all():
        return missing("too few blocks have a circuit", "share", n, 0.0)
    return jackknife(value, without, "share").record(0.0)


def transfer_difference(
    rl: tuple[np.ndarray, np.ndarray], sft: tuple[np.ndarray, np.ndarray], null: float = 0.0
) -> Record:
    """The faithfulness of base's circuit inside the RL model minus that inside the SFT model, on the same pairs.

    Args:
      rl, sft: (margins with base's circuit, margins with all heads) [M, n] of the same pairs in each model.
      null: its value if both keep as much.

    Returns:
      The record, with a jackknife over blocks; no estimate where F with all heads is not measurably above 0.
    """
    n = len(rl[0])
    if any(clustered(whole_MN.mean(axis=1)).low <= 0 for _, whole_MN in (rl, sft)):
        return missing("F with all heads is not measurably above 0 in both models", "share", n, null)

    def difference(keep: np.ndarray) -> float:
        return float(rl[0][keep].sum() / rl[1][keep].sum() - sft[0][keep].sum() / sft[1][keep].sum())

    every = np.arange(n)
    return jackknife(difference(every), [difference(every[every != i]) for i in every], "share").record(null)


def vulnerable(sft_LH: np.ndarray, rl_LH: np.ndarray) -> list[Record]:
    """Differential circuit vulnerability C_vuln = {h: m_h^SFT < m_h^RL − δ} for each of `DELTAS`.

    Args:
      sft_LH, rl_LH: share of the blocks whose circuit has the head.

    Returns:
      {"delta", "count", "heads": [[layer, head]], "null": counts with the heads of RL permuted, "p"} of each δ.
    """
    rng = np.random.default_rng(0)
    flat = [rng.permutation(rl_LH.ravel()) for _ in range(DRAWS)]
    out = []
    for delta in DELTAS:
        found = sft_LH < rl_LH - delta
        drawn = np.array([(sft_LH.ravel() < other - delta).sum() for other in flat], float)
        record = {"delta": delta, "count": int(found.sum()), "heads": np.argwhere(found).tolist()}
        out.append(record | {"null": null_record(drawn), "p": permutation_p(float(found.sum()), drawn)})
    return out


def head_effects(all_but_HN: np.ndarray, alone_HN: np.ndarray, all_N: np.ndarray, none_N: np.ndarray) -> Record:
    """Necessity and sufficiency of every head.

    Args:
      all_but_HN: log π(source's reply) with every head but one taken from the source, by head and pair.
      alone_HN: the same with one head alone.
      all_N, none_N: the same with all heads, and with none.

    Returns:
      {"necessity": the drop without the head, "sufficiency": the rise by the head alone}, in nats, a list of records
      {"estimate", "ci95", ...} by head.
    """

    def listed(values_HN: np.ndarray) -> list[Record]:
        return [clustered(values_N, "nats").record(0.0) for values_N in values_HN]

    return {"necessity": listed(all_N[None] - all_but_HN), "sufficiency": listed(alone_HN - none_N[None])}


def hidden(in_circuit_LH: np.ndarray, sufficiency: Sequence[Record], whole: float) -> list[list[int]]:
    """Heads outside the circuit that alone do more than a tenth of what all heads do together [chosen].

    They do work that heads of the circuit do too: with those in place, λ switches them off. Redundancy hides them.

    Args:
      in_circuit_LH: the heads of the circuit.
      sufficiency: of each head, from `head_effects`.
      whole: the rise of log π(source's reply) by all heads together, in nats.
    """
    flat = in_circuit_LH.ravel()
    strong = [bool(s["ci95"]) and s["ci95"][0] > 0.1 * whole > 0 for s in sufficiency]
    width = in_circuit_LH.shape[1]
    return [[i // width, i % width] for i in range(flat.size) if strong[i] and not flat[i]]
