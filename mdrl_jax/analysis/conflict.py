"""The shared conflict subspace S of two domains on a model, and how much damage lies in it (definitions §7, C5).

S is spanned by the leading eigenvectors of P_ℛ H_A P_ℛ, with H_A the Hessian of domain A's loss at θ*_A and ℛ the MLP
neurons that are active routes of both domains [chosen: MLP neurons only]. Vectors come from one half of A's prompts,
figures from the other, both ways. They never see the displacement, nor the prompts that scores are reported on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis import captured
from mdrl_jax.analysis.damage import UNITS
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.second_order.hvp import symmetry_defect
from mdrl_jax.second_order.lanczos import Spectrum, block_lanczos, random_block

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Route:
    """Neurons of a shared route: indices [L, R]; R is of the widest layer, up to `round_up`, and `mask_LR` 0 beyond."""

    index_LR: np.ndarray
    mask_LR: np.ndarray

    @property
    def size(self) -> int:
        """Neurons in all layers."""
        return int(self.mask_LR.sum())


def route(chosen_LF: np.ndarray) -> Route:
    """The route of a boolean [L, F]."""
    width = round_up(max(int(chosen_LF.sum(axis=1).max()), 1))
    index = np.zeros((chosen_LF.shape[0], width), np.int32)
    mask = np.zeros((chosen_LF.shape[0], width), np.float32)
    for layer, row in enumerate(chosen_LF):
        found = np.flatnonzero(row)
        index[layer, : found.size], mask[layer, : found.size] = found, 1.0
    return Route(index, mask)


def round_up(width: int) -> int:
    """The next multiple of 16: so devices that neurons are split over, most often, divide it."""
    return -(-width // 16) * 16


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a subspace is sought: θ*_A, the displacement D, the route's slices of both; `support`: 0 on its padding."""

    start: Any
    displacement: Any
    route: Route
    point: Any
    fixed: Any
    displacement_on_route: Any
    support: Any


def place(probe: Probe, start: Any, displacement: Any, route: Route) -> Place:
    """Slices parameters and displacement."""
    index, mask = route.index_LR, route.mask_LR
    point, moved = (probe.slice(x, index, mask) for x in (start, displacement))
    widths = {"gate": mask[:, None, :], "up": mask[:, None, :], "down": mask[:, :, None]}
    support = {name: np.broadcast_to(widths[name], x.shape) for name, x in point.items()}
    return Place(start, displacement, route, point, probe.fixed(start, index, mask), moved, support)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The completions that an objective's second derivative depends on, of one half of the prompts.

    `reward`: prompts whose rewards differ (the others' advantages, and so their terms, are 0). `success_nll`: the first
    success of each prompt that has one [chosen]: more from the same prompt add less than their cost.

    Attributes:
      sample: those prompts, all completions cut or padded to one length.
      kept: their places among the `n` prompts that figures are means over.
      batch: prompts a micro-batch.
    """

    objective: str
    sample: Sample
    kept: np.ndarray
    n: int
    batch: int

    def at_most(self, prompts: int) -> "Packed":
        """Its first prompts: a baseline need not cost more than what it is compared with."""
        n = min(prompts, self.sample.n_prompts)
        return dataclasses.replace(self, sample=self.sample.take(np.arange(n)), kept=self.kept[:n])

    def by_prompt(self, jets: np.ndarray) -> np.ndarray:
        """vᵀH_pv [..., n] from logp, u and w [3, ..., P, G, Tc], such that the mean over n is vᵀHv."""
        u_PG, w_PG = (np.where(self.sample.mask_PGT > 0, x, 0.0).sum(-1, dtype=np.float64) for x in jets[1:])
        terms = -w_PG if self.objective == "success_nll" else -self.sample.adv_PG * (u_PG**2 + w_PG)
        out = np.zeros(terms.shape[:-2] + (self.n,))
        out[..., self.kept] = terms.mean(axis=-1)
        return out

    def hessian(self, probe: Probe, at: Place, adv_PG: np.ndarray | None = None) -> Callable[[Any], Any]:
        """Products of route vectors with the loss's Hessian; `adv_PG` stands in for the sample's advantages."""
        rows = probe.rows(self.sample, self.batch, adv_PG)
        if self.objective == "reward":
            rows = [dataclasses.replace(micro, success_B=np.zeros_like(micro.success_B)) for micro in rows]
        return probe.hessian(at.point, at.fixed, rows, self.n * self.sample.rewards_PG.shape[1])


def pack(probe: Probe, objective: str, sample: Sample, prompts: np.ndarray) -> Packed:
    """Packs some prompts of a sample."""
    config = probe.runtime.config.analyze
    half = sample.take(prompts).padded(probe.runtime.config.rollout.completion_buckets[-1])
    if objective == "success_nll":
        chosen = np.flatnonzero(half.success_PG.any(axis=1))
        half = half.take(chosen).completions(half.success_PG[chosen].argmax(axis=1))
        return Packed(objective, half, np.arange(chosen.size), chosen.size, config.batch * config.group_size)
    kept = np.flatnonzero(np.ptp(half.rewards_PG, axis=1) > 0)
    return Packed(objective, half.take(kept), kept, half.n_prompts, config.batch)


def find(
    probe: Probe, at: Place, objective: str, sample: Sample, other: tuple[str, Sample], progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    """The record of S for one objective: spectra, nulls, angles, captured damage, baselines (`captured.measure`).

    With the vectors of each half; none where there is a "reason" in the record.

    Args:
      sample: of domain A, sampled at θ*_A.
      other: another domain's name and its sample at θ*_A, whose own leading eigenvectors are a baseline.
    """
    config = probe.runtime.config.analyze
    middle = sample.n_prompts // 2
    parts = np.arange(middle), np.arange(middle, sample.n_prompts)
    packed = [pack(probe, objective, sample, part) for part in parts]
    theirs = pack(probe, objective, other[1], parts[0]).at_most(max(p.sample.n_prompts for p in packed))
    if min(p.sample.n_prompts for p in (*packed, theirs)) == 0:
        return {"reason": "one half of the prompts has nothing to measure on"}, []
    spectra = [
        spectrum_of(probe, at, half, config.lanczos_steps, i, f"half {i + 1}", progress)
        for i, half in enumerate(packed)
    ]
    others = spectrum_of(probe, at, theirs, config.lanczos_steps, 2, other[0], progress)
    null = null_values(probe, at, packed, progress) if objective == "reward" else []
    progress("captured damage")
    halves = [
        captured.Half(
            values=spectrum.values,
            vectors=spectrum.vectors,
            null_top_values=null,
            quadratic=lambda d, p=p: p.by_prompt(probe.route_jets(at.point, at.fixed, d, p.sample, p.batch)),
            complement=lambda d, p=p: outside(probe, at, p, d),
            total_P=p.by_prompt(probe.jets(at.start, at.displacement, p.sample, p.batch)),
        )
        for spectrum, p in zip(spectra, packed, strict=True)
    ]
    record = captured.measure(
        (halves[0], halves[1]),
        at.displacement_on_route,
        {other[0]: others.vectors},
        jax.random.fold_in(jax.random.key(probe.runtime.config.seed), 3),
        UNITS[objective],
        support=at.support,
        ks=[k for k in captured.KS if k < config.vectors] + [config.vectors],
    )
    solver = {
        "residuals": [s.residuals.tolist() for s in spectra],
        "products": [s.products for s in spectra],
        "symmetry_defect": [defect(probe, at, half) for half in packed],
    }
    return record | {"route_neurons": at.route.size, "solver": solver}, [s.vectors for s in spectra]


def outside(probe: Probe, at: Place, packed: Packed, direction: Any) -> np.ndarray:
    """(D − d)ᵀH_p(D − d) by prompt, in the space of all parameters."""
    rest = probe.outside(at.displacement, direction, at.route.index_LR, at.route.mask_LR)
    return packed.by_prompt(probe.jets(at.start, rest, packed.sample, packed.batch))


def spectrum_of(
    probe: Probe, at: Place, packed: Packed, steps: int, number: int, name: str, progress: Progress,
    adv_PG: np.ndarray | None = None,
) -> Spectrum:  # fmt: skip
    """Leading eigenpairs of the loss's Hessian on the route."""
    config = probe.runtime.config.analyze
    product = packed.hessian(probe, at, adv_PG)
    key = jax.random.fold_in(jax.random.key(probe.runtime.config.seed), number)
    start = random_block(key, at.point, config.lanczos_block)

    def step(done: int, total: int) -> None:
        progress(f"{name}: Lanczos {done} of {total}")

    permuted = adv_PG is not None  # then the same operator with other weights was seen to be repeatable
    k = 1 if permuted else min(config.vectors, steps * config.lanczos_block)
    return block_lanczos(product, start, steps, k, step, repeatable=permuted)


def defect(probe: Probe, at: Place, packed: Packed) -> float:
    """The symmetry defect of the products that the spectrum came from, on two random vectors."""
    start = random_block(
        jax.random.key(probe.runtime.config.seed), at.point, probe.runtime.config.analyze.lanczos_block
    )
    made = packed.hessian(probe, at)(start)
    (v, hv), (w, hw) = (jax.tree.map(lambda x, i=i: x[i], (start, made)) for i in (0, 1))
    return symmetry_defect(lambda x: hv if x is v else hw, v, w)


def null_values(probe: Probe, at: Place, packed: list[Packed], progress: Progress) -> list[float]:
    """Top eigenvalues with advantages permuted within the groups of the same completions, of both halves in turn."""
    config = probe.runtime.config.analyze
    rng = np.random.default_rng(probe.runtime.config.seed)
    values = []
    for i in range(config.permutations):
        half = packed[i % 2]
        shuffled_PG = rng.permuted(half.sample.adv_PG, axis=1)
        spectrum = spectrum_of(probe, at, half, config.null_steps, 3 + i, f"null {i + 1}", progress, shuffled_PG)
        values.append(float(spectrum.values[0]))
    return values
