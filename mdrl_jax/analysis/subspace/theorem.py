"""Measures the assumptions of the contraction theorem at the peak of a domain A (definitions §8, C6).

The theorem: θ* is the peak of A, S the conflict subspace, and H the Hessian of A's loss L at θ*. If P_S ∇L(θ*) = 0, if
S is invariant under H, and if μ = λmin(H|_S) > 0, then each step of gradient descent with a step size α ≤ 1/λmax
multiplies ‖P_S(θ − θ*)‖ by at most 1 − αμ. Without the first two assumptions

    ‖P_S e₁‖ ≤ (1 − αμ) ‖P_S e₀‖ + α (ε ‖P_S⊥ e₀‖ + ‖P_S ∇L(θ*)‖),    e = θ − θ*,  ε = ‖H_{S⊥,S}‖.

`conflict.py` finds S on each half of A's prompts. This module judges it on blocks of prompts of the other half, so no
figure repeats the noise that S was found with. A refresh moves all parameters, so S⊥ is the complement of S among all
of them. `report/tables/theorem.py` combines the figures with a refresh.

With R_b = (I − P_S) H_b V for the k vectors V of S and a block b, ε² is the largest eigenvalue of RᵀR. The products
R_aᵀR_b of different blocks give it without the noise of single blocks. A first pass adds up R = Σ_b R_b, and a second
one multiplies each R_b with R, so that no block's vectors are kept. Both passes take k Hessian products with every
prompt of a half.

Memory on the devices, in trees of all parameters: 2k for R and the products of one block, and about 4·b more for b =
`analyze.lanczos_block` vectors that are multiplied at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mdrl_jax import tree
from mdrl_jax.analysis.damage import UNITS
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace.captured import AT_ONCE
from mdrl_jax.analysis.subspace.conflict import Packed, Place, halves_of, pack
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.sharding import batch_divisor
from mdrl_jax.parallel.tree_programs import norm
from mdrl_jax.second_order import blocks, subspace
from mdrl_jax.stats import eigenvalues
from mdrl_jax.stats.cosines import FEWEST_BLOCKS
from mdrl_jax.stats.estimate import Record, missing

N_BLOCKS = 12  # of the prompts of one half; fewer if there are fewer prompts
FLAT = "the interval of μ includes 0, so the loss may have no minimum in S"
Floats = NDArray[np.float64]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Judged:
    """S of one half of the prompts, and functions that measure on blocks of prompts of the other half.

    Attributes:
      vectors: orthonormal vectors that span S, a tree [k, ...] of the space that S lies in.
      values: their eigenvalues on the half that they were found on, [k].
      counts_M: number of prompts of each block.
      slopes_Mk: V^T Σ_p ∇L_p over the prompts p of each block.
      products: for each block the Hessian of its mean loss, a function from trees of all parameters [b, ...] to their
        products.
      lift: vectors of the space [b, ...] -> the same as trees of all parameters, 0 outside the space.
      split: trees x of all parameters [b, ...] -> (V^T x [k, b], x − P_S x).
      at_once: b, the number of vectors that are multiplied at a time.
    """

    vectors: Any
    values: np.ndarray
    counts_M: np.ndarray
    slopes_Mk: np.ndarray
    products: Sequence[Callable[[Any], Any]]
    lift: Callable[[Any], Any]
    split: Callable[[Any], tuple[jax.Array, Any]]
    at_once: int

    @property
    def k(self) -> int:
        """Dimension of S."""
        return subspace.size(self.vectors)


def measure(
    probe: Probe, at: Place, objective: str, sample: Sample, found: Sequence[tuple[Any, Any]], progress: Progress
) -> Record:
    """The assumptions of the theorem for S of each half of the prompts.

    Args:
      probe: the compiled device programs and the configuration.
      at: the point, the displacement and the route.
      objective: "reward" or "success_nll".
      sample: completions of domain A, sampled at θ*_A.
      found: for each half of the prompts the vectors that span S and were found on it, and their eigenvalues.
      progress: told what is being computed.

    Returns:
      {"halves": for each half on which S was found, the record of `assumptions` with "norms": {"within", "outside"},
      the numbers ‖P_S D‖ and ‖P_S⊥ D‖}. A half has only "k" and a "reason" if fewer than four blocks of the other half
      have a completion that the Hessian depends on.

    Raises:
      ValueError: if a derivative is not finite, or as in `conflict.pack`.
    """
    length, records = float(norm(at.displacement)), []
    parts = [pack(probe, objective, sample, part) for part in halves_of(sample)]
    for half, (vectors, values) in enumerate(found):
        packed, k = parts[1 - half], subspace.size(vectors)
        blocks_M = np.array_split(np.arange(packed.n), max(min(N_BLOCKS, packed.n), 1))
        filled = sum(bool(np.isin(packed.kept, block).any()) for block in blocks_M)
        if filled < FEWEST_BLOCKS:
            why = f"{filled} blocks of the other half have something to measure on; {FEWEST_BLOCKS} are needed"
            records.append({"k": k, "reason": why})
            continue
        judged = _judged(probe, at, packed, blocks_M, vectors, np.asarray(values, float))
        told = lambda text, half=half: progress(f"theorem, S of half {half + 1}: {text}")  # noqa: E731
        within = float(np.linalg.norm(np.asarray(subspace.coefficients(vectors, at.displacement_on_route))))
        record = assumptions(judged, UNITS[objective], within, told)
        outside = math.sqrt(max(length**2 - within**2, 0.0))
        records.append(record | {"norms": {"within": within, "outside": outside}})
    return {"halves": records}


def _judged(probe: Probe, at: Place, packed: Packed, parts: list[np.ndarray], vectors: Any, values: Any) -> Judged:
    index, mask, config = at.route.index_LR, at.route.mask_LR, probe.runtime.config.analyze
    slopes_kP = []
    for chunk in _chunks(vectors, AT_ONCE):
        jets = probe.route_jets(at.point, at.fixed, chunk, packed.sample, packed.batch)
        slopes_kP.append(packed.by_prompt(jets, order=1))
    slopes_kP = np.concatenate(slopes_kP)[: subspace.size(vectors)]
    # One shape of micro-batches for all blocks, which the mesh divides.
    rows = packed.sample.rewards_PG.shape[1]
    step = math.lcm(batch_divisor(probe.runtime.mesh), rows) // rows
    batch = min(packed.batch, -(-max(len(part) for part in parts) // step) * step)
    everywhere = dataclasses.replace(at, point=at.start, fixed=())
    return Judged(
        vectors=vectors,
        values=values,
        counts_M=np.array([len(part) for part in parts], float),
        slopes_Mk=np.stack([slopes_kP[:, part].sum(1) for part in parts]),
        products=[packed.part(part, batch).hessian(probe, everywhere) for part in parts],
        lift=lambda block: probe.lift_block(block, index, mask, at.start),
        split=lambda block: probe.split(block, vectors, index, mask),
        at_once=config.lanczos_block,
    )


def assumptions(judged: Judged, unit: str, within: float, progress: Progress) -> Record:
    """The measured assumptions for one S (definitions §8), with intervals over the blocks of prompts (§12).

    Args:
      judged: S and the blocks.
      unit: of the loss ("reward", "nats").
      within: ‖P_S D‖, D the displacement; its share "shift" is missing if this is 0.
      progress: told what is being computed.

    Returns:
      The record for JSON: "k", the dimension of S; "blocks", their number M; "n_prompts"; and the figures "gradient"
      ‖P_S ∇L(θ*)‖, "mu" and "lambda_max", the extreme eigenvalues of VᵀHV, "epsilon" ‖H_{S⊥,S}‖, and "shift"
      ‖H_SS⁻¹ P_S ∇L(θ*)‖/‖P_S D‖, how far the point that gradient descent in S goes to lies from θ*; it has a "reason"
      in place of an estimate if `within` is 0 or the interval of "mu" reaches down to 0. The figures are records
      {"estimate", "ci95", "null", "n", "unit"} with the null 0 and M as "n". "own" has the numbers "mu" and
      "lambda_max", the extreme eigenvalues of the half that S was found on.

    Raises:
      ValueError: if a derivative is not finite, or if there are fewer than four blocks.
    """
    curved_Mkk, own_Mkk, rows_Mkk = _curvature(judged, progress)
    counts, sums_Mkk = judged.counts_M, judged.counts_M[:, None, None] * curved_Mkk
    if not all(np.isfinite(x).all() for x in (judged.slopes_Mk, curved_Mkk, own_Mkk, rows_Mkk)):
        raise ValueError("a derivative in the conflict subspace is not finite")
    slope, curvature = f"{unit} / unit of a parameter", f"{unit} / (unit of a parameter)²"
    gradient = eigenvalues.root(eigenvalues.squared_length(judged.slopes_Mk, counts), slope)
    mu, top = (eigenvalues.of_mean(sums_Mkk, counts, largest, curvature) for largest in (False, True))
    epsilon = eigenvalues.root(eigenvalues.squared_norm(own_Mkk, rows_Mkk, counts), curvature)
    share, n = "share of ‖P_S D‖", counts.size
    if mu.low <= 0 or within == 0:
        shift = missing(FLAT if mu.low <= 0 else "P_S D is 0", share, n, 0.0)
    else:
        away = eigenvalues.root(eigenvalues.squared_length(judged.slopes_Mk, counts, matrices_Mkk=sums_Mkk))
        shift = away.scaled(1 / within, share).record(0.0)
    return {
        "k": judged.k,
        "blocks": n,
        "n_prompts": int(counts.sum()),
        "gradient": gradient.record(0.0),
        "shift": shift,
        "mu": mu.record(0.0),
        "lambda_max": top.record(0.0),
        "epsilon": epsilon.record(0.0),
        "own": {"mu": float(judged.values.min()), "lambda_max": float(judged.values.max())},
    }


def _curvature(judged: Judged, progress: Progress) -> tuple[Floats, Floats, Floats]:
    """VᵀH_bV of each block's mean loss, and R_bᵀR_b and R_bᵀ Σ_a R_a of sums over prompts, [M, k, k] each."""
    chunks, k, n = _chunks(judged.vectors, judged.at_once), judged.k, len(judged.products)
    curved, own, rows = [], [], []
    total: list[Any] = []
    for b, product in enumerate(judged.products):
        progress(f"block {b + 1} of {n}")
        weights, rests = zip(*(judged.split(product(judged.lift(chunk))) for chunk in chunks), strict=True)
        curved.append(np.concatenate([np.asarray(w, np.float64) for w in weights], axis=1)[:, :k])
        count = np.float32(judged.counts_M[b])
        own.append(count**2 * np.asarray(_products(rests, rests), np.float64)[:k, :k])
        total = [_add(count, r, t) for r, t in zip(rests, total or map(_zeros, rests), strict=True)]
        del rests
    for b, product in enumerate(judged.products):
        progress(f"block {b + 1} of {n} again")
        # `total` is orthogonal to S, so the part of the product in S does not matter.
        against = [np.asarray(_products([product(judged.lift(chunk))], total), np.float64) for chunk in chunks]
        rows.append(judged.counts_M[b] * np.concatenate(against)[:k, :k])
    return np.stack(curved), np.stack(own), np.stack(rows)


def _chunks(vectors: Any, size: int) -> list[Any]:
    """The vectors in blocks of `size`, the last one filled up with zeros."""
    k = subspace.size(vectors)
    more = -k % size
    filled = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((more, *x.shape[1:]), x.dtype)]), vectors)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], filled) for i in range(0, k, size)]


def _all_products(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """Inner products of the vectors of two lists of blocks, [vectors of a, vectors of b]."""
    return jnp.concatenate([jnp.concatenate([blocks.products(x, y) for y in b], axis=1) for x in a])


_products = program("theorem_products", _all_products)
_zeros = functools.partial(jax.tree.map, jnp.zeros_like)
_add = program("theorem_add", tree.axpy, donate_argnums=2)
