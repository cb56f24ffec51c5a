"""Figures of circuits from masks and log-probs: sizes, convergence, faithfulness, overlap, transfer (definitions §11).

Everything runs on the host. The masks of a model are m [M, R, L, H]: M blocks of pairs, each with R searches (seeds at
both starts, the low start first). The circuit of some blocks has the heads whose m, averaged over these blocks and
their searches, is above 0.5. What depends on a circuit is measured on pairs of the other half of the blocks.

A margin is log π(source's reply) − log π(base's reply) in nats, of each pair. F is its mean over pairs.
"""

from collections.abc import Sequence

import numpy as np

from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import Record, clustered, missing, ratio_of_means
from mdrl_jax.stats.tests import null_record, permutation_p

DRAWS = 2000  # of random circuits in the nulls
DELTAS = (0.1, 0.5)  # δ of the differential vulnerability
FEW_OPEN = 0.1  # a search has converged if the starts disagree on at most this share of the heads [chosen]
BINS = 10  # of the histogram of m


def circuit(m_MRLH: np.ndarray, blocks: Sequence[int] | None = None) -> np.ndarray:
    """The heads of the circuit, boolean [L, H].

    Args:
      m_MRLH: the masks.
      blocks: the blocks that count; None: all.
    """
    chosen = m_MRLH if blocks is None else m_MRLH[list(blocks)]
    return chosen.mean(axis=(0, 1)) > 0.5


def halves(n_blocks: int) -> tuple[list[int], list[int]]:
    """The even and the odd blocks."""
    return list(range(0, n_blocks, 2)), list(range(1, n_blocks, 2))


def cross_circuits(m_MRLH: np.ndarray) -> np.ndarray:
    """For each block the circuit of the half of the blocks that it is not in, boolean [M, L, H]."""
    even, odd = halves(len(m_MRLH))
    by_half = circuit(m_MRLH, odd), circuit(m_MRLH, even)
    return np.stack([by_half[block % 2] for block in range(len(m_MRLH))])


def search_record(m_MRLH: np.ndarray) -> Record:
    """How a search went.

    Returns:
      {"heads": L · H, "size" of the circuit, "m": mean m [L][H], "histogram": counts of m of every search in `BINS`
      equal bins of [0, 1], "open": [[layer, head]] of the heads on whose membership the two starts disagree,
      "open_share": their share of all heads, "converged": whether it is at most `FEW_OPEN`}.
    """
    low, high = (m_MRLH[:, start::2].mean(axis=(0, 1)) for start in (0, 1))
    disagree = (low > 0.5) != (high > 0.5)
    counts, _ = np.histogram(m_MRLH, bins=BINS, range=(0.0, 1.0))
    return {
        "heads": int(disagree.size),
        "size": int(circuit(m_MRLH).sum()),
        "m": m_MRLH.mean(axis=(0, 1)).tolist(),
        "histogram": counts.tolist(),
        "open": np.argwhere(disagree).tolist(),
        "open_share": float(disagree.mean()),
        "converged": bool(disagree.mean() <= FEW_OPEN),
    }


def share(part_N: np.ndarray, whole_N: np.ndarray, what: str, null: Record | float | None = None) -> Record:
    """Σ part / Σ whole over pairs with Fieller's interval; no estimate where the interval of the whole includes 0.

    Args:
      part_N, whole_N: margins of the same pairs.
      what: the name of the whole, for the reason.
      null: of the share.
    """
    whole = clustered(whole_N)
    found = ratio_of_means(part_N, whole_N, "share") if whole.low > 0 else None
    if found is None:
        return missing(f"{what} is not measurably above 0", "share", len(whole_N), null)
    return found.record(null)


def random_null(random_KN: np.ndarray, whole_N: np.ndarray) -> Record | None:
    """The null of a faithfulness: that of random circuits of the same size; None where the whole is not above 0."""
    whole = float(whole_N.mean())
    return null_record(random_KN.mean(axis=1) / whole) if whole > 0 and len(random_KN) else None


def overlap(base_LH: np.ndarray, other_LH: np.ndarray) -> Record:
    """How much of base's circuit another model's circuit keeps, as exact counts with their null.

    The null draws as many heads as the other circuit has from all heads, so that the number of base's heads among them
    is hypergeometric.

    Returns:
      {"base", "other", "shared": numbers of heads; "retention": shared / base; "chance": its expectation, other / all;
      "null": of the shared heads; "p": one-sided}. Without heads in base's circuit "retention" is None.
    """
    n, k, size = base_LH.size, int(base_LH.sum()), int(other_LH.sum())
    shared = int((base_LH & other_LH).sum())
    drawn = np.random.default_rng(0).hypergeometric(k, n - k, size, DRAWS).astype(float)
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


def by_block(base_MRLH: np.ndarray, other_MRLH: np.ndarray) -> np.ndarray:
    """`beyond_chance` of the two circuits of every block [M]; nan where base's is empty."""
    both = zip(base_MRLH, other_MRLH, strict=True)
    return np.array([beyond_chance(circuit(base[None]), circuit(other[None])) for base, other in both])


def mean_over_blocks(values_M: np.ndarray, null: float | None = 0.0) -> Record:
    """The mean over blocks with Student's t; nan blocks are left out, and at least two have to be left."""
    known = values_M[np.isfinite(values_M)]
    if len(known) < 2:
        return missing("fewer than two blocks have a circuit in the base model", "share", len(known), null)
    return clustered(known, "share").record(null)


def ceiling(m_MRLH: np.ndarray) -> Record:
    """The overlap beyond chance of the circuits of two different blocks of one model: what noise in the search leaves.

    The interval is the jackknife over blocks of the mean over ordered pairs of blocks.
    """
    own = [circuit(block[None]) for block in m_MRLH]
    n = len(own)
    table_MM = np.array([[beyond_chance(a, b) for b in own] for a in own])

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
    """The faithfulness of base's circuit inside the RL model minus that inside the SFT model, paired by pair.

    Args:
      rl, sft: (margins with base's circuit, margins with all heads) of the same pairs [N] in each model.
      null: its value if both keep as much.

    Returns:
      The record, with a jackknife over pairs; no estimate where F with all heads is not measurably above 0.
    """
    n = len(rl[0])
    if any(clustered(whole).low <= 0 for _, whole in (rl, sft)):
        return missing("F with all heads is not measurably above 0 in both models", "share", n, null)

    def difference(keep: np.ndarray) -> float:
        return float(rl[0][keep].sum() / rl[1][keep].sum() - sft[0][keep].sum() / sft[1][keep].sum())

    every = np.arange(n)
    return jackknife(difference(every), [difference(every[every != i]) for i in every], "share").record(null)


def vulnerable(sft_LH: np.ndarray, rl_LH: np.ndarray) -> list[Record]:
    """Differential circuit vulnerability C_vuln = {h: m_h^SFT < m_h^RL − δ} for each of `DELTAS`.

    Args:
      sft_LH, rl_LH: mean m of each head.

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
      in_circuit_LH: the circuit.
      sufficiency: of each head, from `head_effects`.
      whole: the rise of log π(source's reply) by all heads together, in nats.
    """
    flat = in_circuit_LH.ravel()
    strong = [bool(s["ci95"]) and s["ci95"][0] > 0.1 * whole > 0 for s in sufficiency]
    width = in_circuit_LH.shape[1]
    return [[i // width, i % width] for i in range(flat.size) if strong[i] and not flat[i]]
