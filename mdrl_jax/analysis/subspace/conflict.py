"""Finds the conflict subspace S of two domains A and B (definitions §7, C5).

S is the span of the leading eigenvectors of P_ℛ H_A P_ℛ. H_A is the Hessian of A's loss at θ*_A. ℛ is the shared route:
the MLP neurons that are active for both domains [chosen: MLP neurons only]. P_ℛ projects onto the weights of these
neurons.

`interference.py` calls `place` and `find` for each of the most harmed pairs and each objective. Steps of `find`:

1. Halve A's prompts and keep the completions that the Hessian depends on (`pack`).
2. Find the eigenvectors on each half by block Lanczos (`spectrum_of`), and the null of the top eigenvalue
   (`null_values`). Pairs that have not converged are dropped here, so that nothing later reads them.
3. Judge the vectors of each half on the other half (`captured.measure`).

The search sees neither the displacement D = θ_t − θ*_A (θ_t: the end of the later stage), which only step 3 uses, nor
the prompts that scores are reported on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis.damage import UNITS
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace import captured
from mdrl_jax.second_order.decoder_parts import route_support
from mdrl_jax.second_order.hvp import symmetry_defect
from mdrl_jax.second_order.lanczos import Spectrum, block_lanczos, random_block

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Route:
    """The MLP neurons of a shared route, in arrays of one width R for all layers.

    Attributes:
      index_LR: the neurons of each layer, then padding with 0. R is the largest number of neurons of a layer, rounded
        up by `round_up`.
      mask_LR: 1 for neurons, 0 for padding.
    """

    index_LR: np.ndarray
    mask_LR: np.ndarray

    @property
    def size(self) -> int:
        """The number of neurons in all layers together."""
        return int(self.mask_LR.sum())


def route(chosen_LF: np.ndarray) -> Route:
    """The route of the neurons that are true in `chosen_LF`, booleans [L, F]; it may have no neuron in some layers.

    Each layer lists its neurons in ascending order (`index_LR`, `mask_LR`). The width R is that of the layer with most
    neurons, rounded up to a multiple of 16, and at least 16.
    """
    width = round_up(max(int(chosen_LF.sum(axis=1).max()), 1))
    index = np.zeros((chosen_LF.shape[0], width), np.int32)
    mask = np.zeros((chosen_LF.shape[0], width), np.float32)
    for layer, row in enumerate(chosen_LF):
        found = np.flatnonzero(row)
        index[layer, : found.size], mask[layer, : found.size] = found, 1.0
    return Route(index, mask)


def round_up(width: int) -> int:
    """`width` rounded up to a multiple of 16, so that most numbers of devices that share the neurons divide it."""
    return -(-width // 16) * 16


@dataclasses.dataclass(frozen=True)
class Place:
    """The point and the space in which a subspace is sought.

    A *route tree* has the weights of the route's neurons: {"gate": [L, D, R], "up": [L, D, R], "down": [L, R, D]}.

    Attributes:
      start: θ*_A, a tree of all parameters.
      displacement: D = θ_t − θ*_A, a tree like `start`.
      route: the neurons.
      point: the route tree of θ*_A; derivatives are taken with respect to it.
      fixed: everything else that the model needs, which is not differentiated (`Probe.fixed`).
      displacement_on_route: the route tree of D.
      support: a route tree of ones, with zeros on padding.
    """

    start: Any
    displacement: Any
    route: Route
    point: Any
    fixed: Any
    displacement_on_route: Any
    support: Any


def place(probe: Probe, start: Any, displacement: Any, route: Route) -> Place:
    """Makes the `Place` of a route: it takes the weights of the route's neurons out of θ*_A and D.

    Args:
      probe: the compiled device programs.
      start: θ*_A, the parameters at A's peak, a tree on the devices.
      displacement: D = θ_t − θ*_A, a tree like `start`; θ_t are the parameters at the end of the later stage. The
        search does not use it; `find` measures on it what S captures.
      route: the neurons of the shared route, [L, R].

    Returns:
      The arguments `start`, `displacement` and `route` themselves; what derivatives hold fixed (`fixed`); and three
      route trees {"gate", "up", "down"}, all 0 on padding: θ*_A (`point`), D (`displacement_on_route`) and ones
      (`support`).
    """
    index, mask = route.index_LR, route.mask_LR
    point, moved = (probe.slice(x, index, mask) for x in (start, displacement))
    support = route_support(point, mask)
    return Place(start, displacement, route, point, probe.fixed(start, index, mask), moved, support)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The completions of one half of the prompts that an objective's Hessian depends on.

    For `reward` these are all completions of the prompts whose rewards differ. The advantages of the other prompts are
    0, so they contribute nothing. For `success_nll` it is the first success of each prompt that has one [chosen]:
    further successes of the same prompt add less information than they cost.

    Attributes:
      objective: "reward" or "success_nll".
      sample: these prompts and completions, padded to one length.
      kept: the position of each of these prompts among the `n` prompts [P].
      n: the number of prompts that the loss is a mean over.
      batch: prompts per micro-batch.
    """

    objective: str
    sample: Sample
    kept: np.ndarray
    n: int
    batch: int

    def at_most(self, prompts: int) -> "Packed":
        """The first `prompts` prompts only, so that a baseline costs no more than the search it is compared with.

        `n` stays, which scales the Hessian but not its eigenvectors.
        """
        n = min(prompts, self.sample.n_prompts)
        return dataclasses.replace(self, sample=self.sample.take(np.arange(n)), kept=self.kept[:n])

    def part(self, prompts: np.ndarray, batch: int) -> "Packed":
        """Some of the n prompts alone, as a loss of their own.

        Args:
          prompts: their positions among the n prompts, ascending.
          batch: prompts per micro-batch.
        """
        rows = np.flatnonzero(np.isin(self.kept, prompts))
        kept = np.searchsorted(prompts, self.kept[rows])
        return Packed(self.objective, self.sample.take(rows), kept, len(prompts), batch)

    def by_prompt(self, jets: np.ndarray, order: int = 2) -> np.ndarray:
        """vᵀH_pv or v·g_p for each of the n prompts p, whose mean over prompts is vᵀHv or v·g.

        Args:
          jets: logp, u and w of every token of `sample` along v, [3, ..., P, G, Tc] (`Probe.jets`).
          order: 2 for vᵀH_pv, 1 for the slope v·g_p along v.

        Returns:
          [..., n] in float64, 0 for the prompts that are not in `kept`.
        """
        u_PG, w_PG = (np.where(self.sample.mask_PGT > 0, x, 0.0).sum(-1, dtype=np.float64) for x in jets[1:])
        if self.objective == "success_nll":
            terms = -w_PG if order == 2 else -u_PG
        else:
            terms = -self.sample.adv_PG * (u_PG**2 + w_PG if order == 2 else u_PG)
        out = np.zeros(terms.shape[:-2] + (self.n,))
        out[..., self.kept] = terms.mean(axis=-1)
        return out

    def hessian(self, probe: Probe, at: Place) -> Callable[[Any], Any]:
        """The Hessian of the loss on the route, as a function from a block of route trees to their products.

        Args:
          probe: the compiled device programs.
          at: the point and the route.

        Returns:
          the function, on trees of leaves [b, ...].
        """
        rows = probe.rows(self.sample, self.batch)
        if self.objective == "reward":
            rows = [dataclasses.replace(micro, success_B=np.zeros_like(micro.success_B)) for micro in rows]
        return probe.hessian(at.point, at.fixed, rows, self.n * self.sample.rewards_PG.shape[1])


def halves_of(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of a sample's P prompts.

    Returns:
      the indices of the first P // 2 prompts, and those of the rest.
    """
    middle = sample.n_prompts // 2
    return np.arange(middle), np.arange(middle, sample.n_prompts)


def pack(probe: Probe, objective: str, sample: Sample, prompts: np.ndarray) -> Packed:
    """The completions of some prompts of a sample that an objective's Hessian depends on.

    Args:
      probe: gives the configuration.
      objective: "reward" or "success_nll".
      sample: completions of a domain at θ*_A.
      prompts: indices of the prompts in the sample.

    Returns:
      for "reward" all completions of the prompts whose rewards differ, and as `n` the number of `prompts`; for
      "success_nll" the first success of each prompt that has one, and as `n` the number of these prompts. Completions
      are padded to the last bucket. `kept` has the positions of the P kept prompts among the n; P may be 0. `batch`
      gives every micro-batch the rows of `analyze.batch` whole prompts.

    Raises:
      ValueError: if completions are longer than the last one of `rollout.completion_buckets`.
    """
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
    """Finds and judges S for one objective.

    Args:
      probe: the compiled device programs.
      at: the point, the displacement and the route.
      objective: "reward" or "success_nll".
      sample: completions of domain A, sampled at θ*_A. Its halves are the first P // 2 of its P prompts, and the rest.
      other: the name of domain B, and its completions sampled at θ*_A. The leading eigenvectors of B's loss, on the
        first P // 2 of these prompts, are a baseline.
      progress: told what is being computed.

    Returns:
      the record: that of `captured.measure` with "route_neurons", their number; "null", why there is no null of the top
      eigenvalue, or "" if there is; and "solver": {"residuals": of each eigenpair that is read, "dropped": number of
      pairs that were sought but may not be read, "products": number of vectors that were multiplied with H,
      "symmetry_defect": `defect`}, each a list over the two halves. Or only a "reason", if one half of A's prompts, or
      the first half of B's, has no completion that the Hessian depends on, or if a half of A's has no eigenpair that
      may be read.

      the vectors found on each half, as trees [k, ...] like `Place.point`; none with a "reason".

    Raises:
      UserError: if a Lanczos search fails (`lanczos.block_lanczos`), for example because the route is too small for
        its steps.
      ValueError: if a second-order term is not finite, or as in `pack`.
    """
    config = probe.runtime.config.analyze
    parts = halves_of(sample)
    packed = [pack(probe, objective, sample, part) for part in parts]
    theirs = pack(probe, objective, other[1], parts[0]).at_most(max(p.sample.n_prompts for p in packed))
    if min(p.sample.n_prompts for p in (*packed, theirs)) == 0:
        return {"reason": "one half of the prompts has nothing to measure on"}, []
    spectra = [spectrum_of(probe, at, half, i, f"half {i + 1}", progress) for i, half in enumerate(packed)]
    others = spectrum_of(probe, at, theirs, 2, other[0], progress)
    if min(s.values.size for s in spectra) == 0:
        return {"reason": "one half of the prompts has no converged eigenpair with a positive eigenvalue"}, []
    null, no_null = null_values(probe, at, objective, [sample.take(part) for part in parts], progress)
    progress("captured damage")
    halves = [
        captured.Half(
            values=spectrum.values,
            vectors=spectrum.vectors,
            null_top_values=null_top_values,
            quadratic=lambda d, p=p: p.by_prompt(probe.route_jets(at.point, at.fixed, d, p.sample, p.batch)),
            complement=lambda d, p=p: outside(probe, at, p, d),
            total_P=p.by_prompt(probe.jets(at.start, at.displacement, p.sample, p.batch)),
        )
        for spectrum, p, null_top_values in zip(spectra, packed, null, strict=True)
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
        "dropped": [config.vectors - s.values.size for s in spectra],
        "products": [s.products for s in spectra],
        "symmetry_defect": [defect(probe, at, half) for half in packed],
    }
    found = {"route_neurons": at.route.size, "null": no_null, "solver": solver}
    return record | found, [s.vectors for s in spectra]


def outside(probe: Probe, at: Place, packed: Packed, direction: Any) -> np.ndarray:
    """(D − d)ᵀH_p(D − d) over all parameters, for each of the n prompts p of `packed`; their mean is (D − d)ᵀH(D − d).

    Args:
      probe: the compiled device programs.
      at: gives D.
      packed: the completions to measure on.
      direction: d, a route tree.

    Returns:
      the terms [n], float64; 0 for a prompt that `packed` has no completions of.

    Raises:
      ValueError: if `packed` has no completions.
    """
    rest = probe.outside(at.displacement, direction, at.route.index_LR, at.route.mask_LR)
    return packed.by_prompt(probe.jets(at.start, rest, packed.sample, packed.batch))


def spectrum_of(
    probe: Probe, at: Place, packed: Packed, number: int, name: str, progress: Progress, top: bool = False
) -> Spectrum:
    """Leading eigenpairs of the loss's Hessian on the route, by block Lanczos; only those that have converged.

    Args:
      probe: the compiled device programs and the configuration.
      at: the point and the route.
      packed: the completions that define the loss.
      number: folded into the seed, so that every search has its own start vectors.
      name: shown in the progress.
      progress: told each step.
      top: True to seek the top pair alone, for the null; the search then ends once it has converged.

    Returns:
      those of the `analyze.vectors` leading pairs (with `top`, of the leading pair) that may be read
      (`Spectrum.converged`), which may be none; the vectors are a block of route trees.

    Raises:
      UserError: as in `lanczos.block_lanczos`.
    """
    config = probe.runtime.config.analyze
    product = packed.hessian(probe, at)
    key = jax.random.fold_in(jax.random.key(probe.runtime.config.seed), number)
    start = random_block(key, at.point, config.lanczos_block)

    def step(done: int, total: int) -> None:
        progress(f"{name}: Lanczos {done} of {total}")

    # The null comes after a search with the same program, which checked that the products are repeatable.
    k = 1 if top else config.vectors
    return block_lanczos(product, start, config.lanczos_steps, k, step, repeatable=top, stop=top).converged()


def defect(probe: Probe, at: Place, packed: Packed) -> float:
    """How far the Hessian products on `packed` are from symmetric, on two random vectors (`hvp.symmetry_defect`).

    Args:
      probe: the compiled device programs and the configuration, with `analyze.lanczos_block` of at least 2.
      at: the point and the route.
      packed: the completions that define the loss.

    Returns:
      The relative difference of wᵀHv and vᵀHw, without a unit: about 1e-5 or less for correct products in float32.
    """
    start = random_block(
        jax.random.key(probe.runtime.config.seed), at.point, probe.runtime.config.analyze.lanczos_block
    )
    made = packed.hessian(probe, at)(start)
    (v, hv), (w, hw) = (jax.tree.map(lambda x, i=i: x[i], (start, made)) for i in (0, 1))
    return symmetry_defect(lambda x: hv if x is v else hw, v, w)


def null_values(
    probe: Probe, at: Place, objective: str, halves: Sequence[Sample], progress: Progress
) -> tuple[list[list[float]], str]:
    """The null of the top eigenvalue of each half: one value for each of `analyze.permutations` draws (definitions §7).

    Each draw permutes the rewards of the half (`permuted`). A null with an eigenvalue that has not converged is too
    low, so it is not given.

    Args:
      probe: the compiled device programs and the configuration.
      at: the point and the route.
      objective: "reward" or "success_nll".
      halves: completions of both halves of the prompts, in which the objective has something to measure on.
      progress: told each step.

    Returns:
      the top eigenvalues of each half, in the order of the draws, and ""; or an empty list for each half, and the
      reason why there is no null, for example because `analyze.permutations` is 0. The draws come from the run's seed.

    Raises:
      UserError: as in `lanczos.block_lanczos`.
      ValueError: as in `pack`.
    """
    config = probe.runtime.config.analyze
    rng = np.random.default_rng(probe.runtime.config.seed)
    values: list[list[float]] = [[] for _ in halves]
    wanted = config.permutations * len(halves)
    for i in range(wanted):
        number = i % len(halves)
        half = permuted(halves[number], objective, rng)
        packed = pack(probe, objective, half, np.arange(half.n_prompts))
        found = spectrum_of(probe, at, packed, 3 + i, f"null {i + 1} of {wanted}", progress, top=True)
        values[number] += found.values.tolist()
    lost = wanted - sum(map(len, values))
    if lost:
        return [[] for _ in halves], f"the top eigenvalue of {lost} of {wanted} permutations has not converged"
    return values, "" if wanted else "not measured, since analyze.permutations is 0; configs/claims.py has 40"


def permuted(sample: Sample, objective: str, rng: np.random.Generator) -> Sample:
    """The sample with permuted rewards, as the null of an objective's top eigenvalue has them (definitions §7).

    For `reward` the rewards of each prompt are permuted among its completions. For `success_nll` the rewards of whole
    prompts are permuted across prompts, so that as many prompts as before have a success [chosen].

    Args:
      sample: the completions; it is not changed.
      objective: "reward" or "success_nll".
      rng: of the permutation; the call changes its state.

    Returns:
      the sample with the same completions and other rewards.
    """
    within = objective == "reward"
    rewards_PG = rng.permuted(sample.rewards_PG, axis=1) if within else rng.permutation(sample.rewards_PG)
    return dataclasses.replace(sample, rewards_PG=rewards_PG)
