"""How often the rule of C8 errs in simulated runs; the table of `mdrl_jax/claims/README.md`.

A world says which share of base's circuit RL and SFT keep, how many of its heads each block of pairs finds, and which
share of F base's circuit gives inside each model. The figures are made by the code that makes them in a run.
"""

import collections

import numpy as np
import pytest

from mdrl_jax.analysis.circuits import figures
from mdrl_jax.claims.circuits import c8

HEADS, SIZE = (4, 8), 10  # of the embedded model, and of its circuit
BLOCKS, PAIRS = 8, 64  # as in configs/circuits.py
# (share of base's circuit that RL and SFT keep, faithfulness of base's circuit in RL and in SFT)
WORLDS = {
    "true": (0.9, 0.5, 0.9, 0.6),
    "limit: a difference of two heads": (0.9, 0.7, 0.9, 0.75),
    "false: both keep as much": (0.7, 0.7, 0.8, 0.8),
    "false: SFT keeps more": (0.5, 0.9, 0.6, 0.9),
    "false: structure alone": (0.9, 0.5, 0.6, 0.9),
    "noise": (None, None, None, None),
}
VERDICTS = ("supported", "undecided", "contradicted")


def found(rng, circuit):
    """The circuit of every block [M, L, H]: each misses a tenth of the true one and adds a few other heads."""
    m = np.broadcast_to(circuit, (BLOCKS, *HEADS)).copy()
    return m ^ (rng.random(m.shape) < np.where(m, 0.1, 0.03))


def drawn(rng, size=SIZE):
    return (rng.permutation(np.prod(HEADS)) < size).reshape(HEADS)


def kept(rng, base, share):
    """A circuit of the same size that keeps heads of base's with this probability."""
    stay = base & (rng.random(HEADS) < share)
    new = drawn(rng, SIZE) if share is None else np.zeros(HEADS, bool)
    free = np.flatnonzero(~base.ravel() & ~new.ravel())
    new.ravel()[rng.choice(free, SIZE - int(stay.sum()), replace=False)] = True
    return stay | new


def margins(rng, share):
    """Margins with base's circuit and with all heads, of pairs that differ and of a noisy pass."""
    whole = rng.gamma(4.0, 1.0, PAIRS) if share is not None else rng.normal(0, 1, PAIRS)
    part = (share or 0.0) * whole + rng.normal(0, 0.5, PAIRS)
    return part.reshape(BLOCKS, -1), whole.reshape(BLOCKS, -1)


def verdict(rng, world):
    rl, sft, in_rl, in_sft = WORLDS[world]
    base = drawn(rng)
    m = {"base": found(rng, base)}
    for name, share in (("rl", rl), ("sft", sft)):
        m[name] = found(rng, drawn(rng) if share is None else kept(rng, base, share))
    beyond = figures.by_block(m["base"], m["rl"]) - figures.by_block(m["base"], m["sft"])
    comparison = {
        "rl": "qa",
        "sft": "sft-qa",
        "doubts": [],
        "score": None,
        "overlap": figures.mean_over_blocks(beyond),
        "transfer": figures.transfer_difference(margins(rng, in_rl), margins(rng, in_sft)),
    }
    return c8([{"domain": "qa", "comparisons": [comparison]}])["verdict"]


def rates(world, draws):
    rng = np.random.default_rng(0)
    counts = collections.Counter(verdict(rng, world) for _ in range(draws))
    return {v: counts[v] / draws for v in VERDICTS}


def holds(world, found):
    if world == "true":
        return found["supported"] >= 0.8 and found["contradicted"] <= 0.05
    return world.startswith("limit") or found["supported"] <= 0.05


@pytest.mark.parametrize("world", WORLDS)
def test_the_rule_seldom_errs(world):
    assert holds(world, rates(world, 60))


@pytest.mark.slow
def test_the_table_of_error_rates():
    for world in WORLDS:
        found = rates(world, 400)
        print(f"| C8 | {world} | " + " | ".join(f"{100 * found[v]:.1f} %" for v in VERDICTS) + " |")
        assert holds(world, found)


def test_doubts_and_no_pair_leave_the_claim_undecided():
    comparison = {"rl": "qa", "sft": "sft-qa", "score": None, "overlap": None, "transfer": None}
    doubted = c8([{"domain": "qa", "comparisons": [comparison | {"doubts": ["not converged"]}]}])
    assert (doubted["verdict"], doubted["reason"]) == ("undecided", "overlap: not converged; transfer: not converged")
    assert c8([{"domain": "qa", "comparisons": []}])["verdict"] == "undecided"


def test_retention_is_that_of_the_published_sizes():
    """Of 576 heads base has 297, of which SFT keeps 153; 137 are expected by chance."""
    heads = np.arange(576)
    base = (heads < 297).reshape(36, 16)
    sft = ((heads < 153) | ((heads >= 297) & (heads < 297 + 266 - 153))).reshape(36, 16)
    record = figures.overlap(base[None], sft[None])
    assert (record["shared"], record["base"], record["other"]) == (153, 297, 266)
    assert record["null"]["mean"] == pytest.approx(297 * 266 / 576, abs=0.5)
    assert record["p"] < 0.05
