"""How much of a domain's damage is undone if the displacement's part in the subspace S is removed (definitions §7).

This tests claim C5 without a Taylor expansion. θ*_A is the peak of domain A, θ_t the end of a later stage,
D = θ_t − θ*_A, and damage(θ) the loss of A at θ minus that at θ*_A. The share undone is

    1 − damage(θ_t − P_S D) / damage(θ_t).

It is compared with what other pieces of D undo when they are removed at the norm of P_S D:

- "random": the component of D in a random subspace that has the dimension and the support of S,
- "complement": D_⊥ = D − P_S D.

`conflict.py` finds S on each half of A's prompts. The damage is measured on the other half, and the results of both
halves are pooled. A prompt counts once, and no vector is judged by a prompt that it was found on. All figures use the
same draws of prompts, so that their differences and ratios are paired. The intervals take the vectors as given.

    record = measure((first, second), space, key, unit="nats")
    record["undone"]                  # the share undone: {"estimate", "ci95", "null", "n", "unit"}
    record["margins"][0]["margin"]    # the same minus the share that the best of 40 random pieces undoes

A figure is a record as in this example, with "reason" if it has no estimate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdrl_jax import tree
from mdrl_jax.analysis.damage import UNITS
from mdrl_jax.analysis.expansion import Draws
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.routes import inside, inside_block
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.subspace.captured import KS
from mdrl_jax.analysis.subspace.conflict import Packed, Place, halves_of, pack
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.tree_programs import norm
from mdrl_jax.second_order import subspace
from mdrl_jax.second_order.lanczos import block_lanczos, random_block
from mdrl_jax.stats.bootstrap import band
from mdrl_jax.stats.estimate import Record, missing

N_RANDOM = 40
SHARE = "share of the damage"
NO_SUCCESS = "one half of the prompts has no completion that succeeded"
NONE = "one half of the prompts has no eigenvector to remove"
NO_RANDOM = "no random piece was removed"
OPEN = "the interval of the damage includes 0"
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Space:
    """The displacement, and the space that S lies in, such as a shared route.

    A *vector* is a tree that has an entry for each coordinate of the space, and 0 at its other entries.

    Attributes:
      name: of the space, for the record.
      size: its number of dimensions.
      start: θ*_A, a tree of all parameters.
      displacement: D, a tree like `start`.
      part: the part of D in the space, a vector.
      support: 1 at the coordinates of the space and 0 elsewhere, a tree that can be broadcast to a vector.
      lift: a vector -> a tree like `start` with the vector's entries, and 0 elsewhere.
      along: (x, v, α) -> x + αv, on trees like `start`.
    """

    name: str
    size: int
    start: Any
    displacement: Any
    part: Any
    support: Any
    lift: Callable[[Any], Any]
    along: Callable[..., Any]

    @functools.cached_property
    def length(self) -> float:
        """‖D‖."""
        return float(norm(self.displacement))


@dataclasses.dataclass(frozen=True)
class Half:
    """One half of A's prompts.

    Attributes:
      vectors: the orthonormal basis of S that was found on it, vectors [k, ...], the leading one first.
      dimension: how many of them are read, from 0 to k.
      damage: parameters -> A's loss there minus that at θ*_A, of each prompt of this half, [P].
    """

    vectors: Any
    dimension: int
    damage: Callable[[Any], ArrayLike]

    def size(self, k: int) -> int:
        """How many vectors are used at the dimension k."""
        return min(k, self.dimension)


def on_route(
    probe: Probe, at: Place, sample: Sample, found: Sequence[tuple[Any, int]], progress: Callable[[str], None]
) -> dict[str, Any]:
    """The record of `measure` for a subspace of a shared route; the damage is that of the success NLL.

    The damage of a prompt is the rise of −log π of its first success at θ*_A [chosen], as in `conflict.pack`.

    Args:
      probe: the compiled device programs and the configuration.
      at: the point, the displacement and the route.
      sample: completions of domain A, sampled at θ*_A.
      found: for each half of the prompts (`conflict.halves_of`), the basis found on it and how many vectors are read.
      progress: told what is being computed.

    Returns:
      the record. All its figures have a "reason" if no completion succeeded in one half.

    Raises:
      ValueError: if a damage is not finite, or as in `conflict.pack`.
    """
    index, mask = at.route.index_LR, at.route.mask_LR
    space = Space(
        name="MLP neurons",
        size=int(sum(np.sum(x) for x in at.support.values())),
        start=at.start,
        displacement=at.displacement,
        part=at.displacement_on_route,
        support=at.support,
        lift=lambda vector: probe.lift(vector, index, mask, at.start),
        along=probe.along,
    )
    return of_sample(probe, space, sample, found, progress)


def elsewhere(
    probe: Probe, name: str, start: Any, displacement: Any, support: Any, sample: Sample,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Finds S among more parameters than the MLP neurons of a route, and gives its record of `measure`.

    The loss and the damage are the success NLL. There is no null of the top eigenvalue, so S has the converged pairs.

    Args:
      probe: the compiled device programs and the configuration.
      name: of the space.
      start: θ*_A, a tree of all parameters.
      displacement: D, a tree like `start`.
      support: 1 at the parameters of the space and 0 elsewhere, a tree that can be broadcast to `start`.
      sample: completions of domain A, sampled at θ*_A.
      progress: told what is being computed.

    Returns:
      the record, with "eigenvalues", those of the pairs that were read on each half. If no completion succeeded in one
      half, all figures have a "reason", and there are no "eigenvalues".

    Raises:
      UserError: as in `lanczos.block_lanczos`, for example because the space is too small for the steps.
      ValueError: if a damage is not finite, or as in `conflict.pack`.
    """
    space = whole(name, start, displacement, support, probe.along)
    found, eigenvalues = search(probe, name, start, support, sample, progress)
    if not found:
        return _nothing(space, (0, 0), UNITS["success_nll"], NO_SUCCESS)
    return of_sample(probe, space, sample, found, progress) | {"eigenvalues": eigenvalues}


def whole(name: str, start: Any, displacement: Any, support: Any, along: Callable[..., Any]) -> Space:
    """A space whose vectors are trees of all parameters.

    Args:
      name: of the space, for the record.
      start: θ*_A, a tree of all parameters.
      displacement: D, a tree like `start`.
      support: 1 at the parameters of the space and 0 elsewhere, a tree that can be broadcast to `start`.
      along: (x, v, α) -> x + αv, on trees like `start`.

    Returns:
      the space; `part` is D times the support, and `lift` returns a vector as it is.
    """
    return Space(
        name=name,
        size=sum(jax.tree.leaves(jax.tree.map(lambda x, s: int(np.sum(s)) * (x.size // s.size), start, support))),
        start=start,
        displacement=displacement,
        part=inside(displacement, support),
        support=support,
        lift=lambda vector: vector,
        along=along,
    )


def search(
    probe: Probe, name: str, start: Any, support: Any, sample: Sample, progress: Callable[[str], None]
) -> tuple[list[tuple[Any, int]], list[list[float]]]:
    """Finds S on each half of the prompts, for the success NLL, among the parameters of a support.

    Args:
      probe: the compiled device programs and the configuration.
      name: of the space, for `progress`.
      start: θ*_A, a tree of all parameters.
      support: 1 at the parameters of the space and 0 elsewhere, a tree that can be broadcast to `start`.
      sample: completions of domain A, sampled at θ*_A.
      progress: told what is being computed.

    Returns:
      (found, eigenvalues): for each half, (the converged eigenvectors, their number), and their eigenvalues, the
      largest first. Both are empty if no completion succeeded in one half.

    Raises:
      UserError: as in `lanczos.block_lanczos`, for example because the space is too small for the steps.
      ValueError: as in `conflict.pack`.
    """
    config, seed = probe.runtime.config.analyze, jax.random.key(probe.runtime.config.seed)
    found, eigenvalues = [], []
    for i, part in enumerate(halves_of(sample)):
        packed = pack(probe, "success_nll", sample, part)
        if packed.sample.n_prompts == 0:
            return [], []
        product = probe.hessian(start, (), probe.rows(packed.sample, packed.batch), packed.n, support)
        block = inside_block(random_block(jax.random.fold_in(seed, i), start, config.lanczos_block), support)
        told = lambda done, total, i=i: progress(f"{name}, half {i + 1}: Lanczos {done} of {total}")  # noqa: E731
        spectrum = block_lanczos(product, block, config.lanczos_steps, config.vectors, told).converged()
        found.append((spectrum.vectors, spectrum.values.size))
        eigenvalues.append(spectrum.values.tolist())
    return found, eigenvalues


def of_sample(
    probe: Probe, space: Space, sample: Sample, found: Sequence[tuple[Any, int]], progress: Callable[[str], None]
) -> dict[str, Any]:
    """The record of `measure` for a subspace of any space; the damage is that of the success NLL, as in `on_route`.

    Args:
      probe: the compiled device programs and the configuration.
      space: the displacement and the space of S.
      sample: completions of domain A, sampled at θ*_A.
      found: for each half of the prompts (`conflict.halves_of`), the basis found on it and how many vectors are read.
      progress: told what is being computed.

    Returns:
      the record. All its figures have a "reason" if no completion succeeded in one half.

    Raises:
      ValueError: if a damage is not finite, or as in `conflict.pack`.
    """
    halves = []
    for part, (vectors, dimension) in zip(halves_of(sample), found, strict=True):
        packed = pack(probe, "success_nll", sample, part)
        if packed.sample.n_prompts == 0:
            return _nothing(space, [n for _, n in found], UNITS["success_nll"], NO_SUCCESS)
        before_PGT = probe.log_probs(space.start, packed.sample, packed.batch)

        def damage(params: Any, packed: Packed = packed, before_PGT: np.ndarray = before_PGT) -> Floats:
            after_PGT = probe.log_probs(params, packed.sample, packed.batch)
            return (before_PGT - after_PGT).sum(axis=(1, 2), dtype=np.float64)

        halves.append(Half(vectors, dimension, damage))
    config = probe.runtime.config
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    ks = [k for k in KS if k < config.analyze.vectors] + [config.analyze.vectors]
    return measure((halves[0], halves[1]), space, key, UNITS["success_nll"], ks, N_RANDOM, progress)


def measure(
    halves: tuple[Half, Half],
    space: Space,
    key: jax.Array,
    unit: str,
    ks: Sequence[int] = KS,
    n_random: int = N_RANDOM,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The share of the damage that is undone by removing P_S D, beside that of other pieces of D.

    Args:
      halves: the two halves of A's prompts.
      space: the displacement and the space of S.
      key: of the random pieces.
      unit: of the damage ("nats").
      ks: dimensions k on the curve, ascending, at least one. A half with fewer vectors to read uses those that it has.
        S of all other figures has the last k.
      n_random: number of random pieces. With 0, the "margin" over them has no estimate.
      progress: told what is being computed.

    Returns:
      the record for JSON (definitions §7), with these keys:

      - "space", its name; "unit"; "n_prompts", of both halves; "k", the dimension of S of each half.
      - "damage": damage(θ_t). "added": damage(θ*_A + P_S D).
      - "undone": the share undone by removing P_S D; its null is the largest share that one of the other pieces undoes.
      - "route": the share undone by removing the whole part of D in the space.
      - "share_of_norm": ‖P_S D‖²/‖D‖². "route_share_of_norm": the same of the part of D in the space. Both are numbers,
        means over both halves.
      - "curve": [{"k", "dimension": of each half, "left": damage(θ_t − P_S D)/damage(θ_t)}] for S at each k.
      - "margins": [{"name": "random", "n", "shares": undone by each piece, "band95": their central 95 %, "margin"},
        {"name": "complement", "share", "margin"}]. A "margin" is "undone" minus the share that the piece undoes, for
        "random" the best piece in each draw of prompts.

      Shares and margins have a "reason" in place of an estimate if the interval of damage(θ_t) includes 0; "shares" is
      then empty and "band95" None. If one half has no vector to read, all figures of S have a "reason", and
      "share_of_norm" is 0.

    Raises:
      ValueError: if a damage is not finite.
    """
    found = min(half.dimension for half in halves) > 0
    judges = [_Judge(vectors, prompts, space) for vectors, prompts in (halves[::-1], halves)]
    progress(f"removal on {space.name}")
    for judge in judges:
        judge.whole()
        if found:
            judge.leading(ks)
    for j in range(n_random if found else 0):
        progress(f"removal on {space.name}: random piece {j + 1} of {n_random}")
        aside = _aside_program(random_block(jax.random.fold_in(key, j), space.part, 1), space.part, space.support)
        for judge in judges:
            judge.random(j, ks[-1], aside)
    columns = {name: np.concatenate([judge.columns[name] for judge in judges]) for name in judges[0].columns}
    norms = {name: float(np.mean([judge.norms[name] for judge in judges])) for name in judges[0].norms}
    figures, top = _Figures(columns, unit), f"S {ks[-1]}"
    return {
        "space": space.name,
        "unit": unit,
        "n_prompts": figures.draws.n,
        "k": [half.size(ks[-1]) for half in halves],
        "share_of_norm": norms.get(top, 0.0),
        "damage": figures.damage("total"),
        "undone": figures.undone(top) | {"null": figures.strongest()},
        "margins": figures.margins(top),
        "curve": [{"k": k, "dimension": [half.size(k) for half in halves], "left": figures.left(f"S {k}")} for k in ks],
        "added": figures.damage("added"),
        "route": figures.undone("route"),
        "route_share_of_norm": norms["route"],
    }


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Measures, on the prompts of one half, the damage that is left without a piece of D.

    Attributes:
      found: the half that the vectors were found on.
      judged: the other half.
      space: the displacement and the space of S.
      columns: the damages so far by name of the point, [P] each.
      norms: ‖piece‖²/‖D‖² of the removed pieces so far, by name.
    """

    found: Half
    judged: Half
    space: Space
    columns: dict[str, Floats] = dataclasses.field(default_factory=dict)
    norms: dict[str, float] = dataclasses.field(default_factory=dict)

    def whole(self) -> None:
        """Measures at θ_t, and without the whole part of D in the space."""
        self.columns["total"] = self._damage(self._end())
        self._remove("route", self.space.lift(self.space.part))

    def leading(self, ks: Sequence[int]) -> None:
        """Measures without P_S D for every k; for the last k also without the complement, and at θ*_A + P_S D."""
        space, piece = self.space, None
        for i, k in enumerate(ks):
            if i and self.found.size(k) == self.found.size(ks[i - 1]):
                self.columns[f"S {k}"] = self.columns[f"S {ks[i - 1]}"]
                self.norms[f"S {k}"] = self.norms[f"S {ks[i - 1]}"]
                continue
            piece = space.lift(subspace.project(self.found.vectors, space.part, self.found.size(k)))
            self._remove(f"S {k}", piece)
        self._remove("complement", space.along(space.displacement, piece, np.float32(-1)), f"S {ks[-1]}")
        self.columns["added"] = self._damage(space.along(space.start, piece, np.float32(1)))

    def random(self, j: int, k: int, aside: Any) -> None:
        """Measures without the component of D in a random subspace, at the norm of P_S D.

        In a space with N dimensions let c be the cosine of D and its component in a uniformly random subspace with n
        dimensions. Then c² has the distribution Beta(n/2, (N − n)/2), and the rest of the component is uniformly random
        among the directions orthogonal to D. So no basis of the subspace is needed.

        Args:
          j: the number of the draw; it gives the cosine.
          k: the last dimension k.
          aside: a random unit vector that is orthogonal to the part of D in the space.
        """
        n, size = self.found.size(k), self.space.size
        cosine2 = np.random.default_rng(j).beta(n / 2, (size - n) / 2) if n < size else 1.0
        piece = _mix_program(self.space.part, aside, np.float32(math.sqrt(cosine2)), np.float32(math.sqrt(1 - cosine2)))
        self._remove(f"random {j}", self.space.lift(piece), f"S {k}")

    def _end(self) -> Any:
        return self.space.along(self.space.start, self.space.displacement, np.float32(1))

    def _damage(self, point: Any) -> Floats:
        return np.asarray(self.judged.damage(point), float)

    def _remove(self, name: str, piece: Any, like: str | None = None) -> None:
        """Measures at θ_t minus a piece of D, scaled to the norm of the removed piece `like` if that is given."""
        whole, length = self.space.length, float(norm(piece))
        target = length if like is None else whole * math.sqrt(self.norms[like])
        factor = target / length if length > 0 else 0.0
        self.columns[name] = self._damage(self.space.along(self._end(), piece, np.float32(-factor)))
        self.norms[name] = (factor * length / whole) ** 2 if whole > 0 else 0.0


def _aside(block: Any, part: Any, support: Any) -> Any:
    """The first vector of a block without its component along `part` and outside the support, at length 1."""
    vector = jax.tree.map(lambda x, s: x[0] * s, block, support)
    squared = tree.vdot(part, part)
    vector = tree.axpy(-tree.vdot(vector, part) / jnp.where(squared > 0, squared, 1), part, vector)
    return tree.scale(1 / tree.norm(vector), vector)


def _mix(part: Any, aside: Any, cosine: jax.Array, sine: jax.Array) -> Any:
    length = tree.norm(part)
    return tree.axpy(cosine / jnp.where(length > 0, length, 1), part, tree.scale(sine, aside))


_aside_program, _mix_program = program("removal_aside", _aside), program("removal_mix", _mix)


class _Figures:
    """Figures of the pooled damages, with intervals over prompts; an array with the axis R is one of `draws`.

    Args:
      columns: the damage of each prompt [P], by name of the point; "total" must be among them.
      unit: of the damage.

    Raises:
      ValueError: if a damage is not finite.
    """

    def __init__(self, columns: dict[str, Floats], unit: str) -> None:
        bad = [name for name, damage_P in columns.items() if not np.isfinite(damage_P).all()]
        if bad:
            raise ValueError(f"damages that are not finite: {', '.join(bad)}")
        self.unit, self.n = unit, columns["total"].size
        self.draws = Draws(self.n)
        self.mean_R = {name: self.draws.ratio(x, np.ones(self.n)) for name, x in columns.items()}
        self.total_R = self.mean_R["total"]
        self.random = [mean_R for name, mean_R in self.mean_R.items() if name.startswith("random")]
        self.reason = OPEN if self.draws.fieller(self.total_R, self.total_R) is None else ""

    def damage(self, name: str) -> Record:
        """The record of the damage at a point."""
        return self._absent(name, self.unit) or self.draws.figure(self.mean_R[name], self.unit)

    def left(self, name: str) -> Record:
        """The record of the share of the damage that is left without a piece."""
        return self._absent(name) or self._share(self.mean_R[name])

    def undone(self, name: str) -> Record:
        """The record of the share of the damage that is undone without a piece."""
        return self._absent(name) or self._share(self.total_R - self.mean_R[name])

    def margins(self, top: str) -> list[dict[str, Any]]:
        """What the other pieces undo, and the margin of S over them.

        Args:
          top: the name of S.

        Returns:
          "random" with "n", the "shares" undone by each piece and their central 95 %, "band95"; its "margin" is over
          the best piece in each draw of prompts. "complement" with its "share" and its "margin".
        """
        shares = [] if self.reason else [float(1 - left_R[0] / self.total_R[0]) for left_R in self.random]
        head = {"name": "random", "n": len(self.random), "shares": shares, "band95": band(shares) if shares else None}
        if absent := self._absent(top):
            return [head | {"margin": absent}, {"name": "complement", "share": absent, "margin": absent}]
        margin = missing(NO_RANDOM, SHARE, self.n, 0.0)
        if self.random:
            # The best piece leaves least of a damage, and most of a gain.
            best_R = np.where(self.total_R > 0, np.min(self.random, axis=0), np.max(self.random, axis=0))
            margin = self._share(best_R - self.mean_R[top])
        return [
            head | {"margin": margin},
            {
                "name": "complement",
                "share": self.undone("complement"),
                "margin": self._share(self.mean_R["complement"] - self.mean_R[top]),
            },
        ]

    def strongest(self) -> float | None:
        """The largest share that one of the other pieces undoes; None if shares are undefined."""
        if self.reason or "complement" not in self.mean_R:
            return None
        return float(max(1 - left_R[0] / self.total_R[0] for left_R in (*self.random, self.mean_R["complement"])))

    def _share(self, part_R: Floats) -> Record:
        return self.draws.share(part_R, self.total_R, SHARE, self.reason)

    def _absent(self, name: str, unit: str = SHARE) -> Record | None:
        return None if name in self.mean_R else missing(NONE, unit, self.n, 0.0)


def _nothing(space: Space, dimensions: Sequence[int], unit: str, reason: str) -> dict[str, Any]:
    """The record of `measure` if there is no prompt to measure on."""
    figure = missing(reason, SHARE, 0, 0.0)
    return {
        "space": space.name,
        "unit": unit,
        "n_prompts": 0,
        "k": list(dimensions),
        "share_of_norm": 0.0,
        "damage": figure | {"unit": unit},
        "undone": figure,
        "margins": [{"name": name, "margin": figure} for name in ("random", "complement")],
        "curve": [],
        "added": figure | {"unit": unit},
        "route": figure,
        "route_share_of_norm": 0.0,
    }
