"""The interference analysis of a sequence of checkpoints: why a domain got worse (definitions §3 to §7, §13).

It is cut into units, each written to `analysis/parts/` when it is done and skipped when the analysis is started again;
samples are kept in `analysis/samples/`. At the end the units become `analysis/*.json` and `claims.json`. One checkpoint
is read at a time, besides the θ*_i in use; nothing here knows how the checkpoints were trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdrl_jax import records
from mdrl_jax.analysis import assembly, checkpoint_figures, conflict, damage, edits, samples, sign_conflict
from mdrl_jax.analysis.probe import Probe, build
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Trained
from mdrl_jax.checkpoints import save_tree
from mdrl_jax.errors import UserError
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.runtime import Runtime
from mdrl_jax.stats.overlap import overlap, top_share, top_share_global

OBJECTIVES = ("reward", "success_nll")  # those whose conflict subspace is sought
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the analysis whose JSON is kept under its name."""

    name: str
    make: Callable[[Progress], dict[str, Any]]


def run(
    runtime: Runtime,
    checkpoints: Checkpoints,
    folder: Path,
    grpo: GRPOConfig,
    track: Callable[[str, int], Any],
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs, or goes on with, the analysis; writes `folder`/analysis/*.json and claims.json and returns the findings.

    `grpo` is the loss the stages were trained with; `track(label, total)` a context manager that gives
    (done, text) -> None; `sources` says where the checkpoints came from, where that is not `folder`.

    Raises:
      UserError: where the folder holds an analysis with other settings or of other checkpoints.
    """
    analysis = Analysis(runtime, checkpoints, folder, build(runtime, grpo), dict(sources or {}))
    analysis.open()
    parts: dict[str, Any] = {}
    units = analysis.units()
    with track("analyze", len(units)) as show:
        for done, unit in enumerate(units):
            parts[unit.name] = analysis.part(
                unit, lambda text, done=done, name=unit.name: show(done, f"{name}: {text}")
            )
        harmed = assembly.harmed(parts, runtime.config.analyze.conflicts)
        more = [analysis.conflict_unit(*pair, objective) for pair in harmed for objective in OBJECTIVES]
    with track("conflict subspaces", len(more)) as show:
        for done, unit in enumerate(more):
            parts[unit.name] = analysis.part(unit, lambda text, done=done: show(done, text))
    found = assembly.assemble(parts, analysis.settings())
    for name, content in found.items():
        place = folder if name == "claims" else folder / "analysis"
        records.write_json(place / f"{name}.json", content)
    return found


def check(runtime: Runtime, checkpoints: Checkpoints) -> None:
    """Refuses, before anything runs, what the analysis cannot work with.

    Raises:
      UserError: for no stage to analyse, too few prompts, or micro-batches that the mesh does not divide.
    """
    if not checkpoints.stages:
        raise UserError("analyze: there is no stage before it that bears a domain's name")
    samples.check(runtime, checkpoints.domains)


@dataclasses.dataclass(eq=False)
class Analysis:
    """One pass over the units."""

    runtime: Runtime
    checkpoints: Checkpoints
    folder: Path
    probe: Probe
    sources: dict[str, str]

    def __post_init__(self) -> None:
        # One θ*_i stays while the later stages of its pairs come and go.
        self.params = functools.lru_cache(maxsize=2)(self.checkpoints.params)

    def settings(self) -> dict[str, Any]:
        """What the figures depend on besides the checkpoints."""
        return {
            "seed": self.runtime.config.seed,
            "analyze": dataclasses.asdict(self.runtime.config.analyze),
            "temperature": self.runtime.config.rollout.sampling.temperature,
            "attention": self.probe.attention_path,
            "stages": [dataclasses.asdict(s) for s in self.checkpoints.stages],
            "solos": [dataclasses.asdict(s) for s in self.checkpoints.solos],
            "sources": self.sources,
        }

    def open(self) -> None:
        """Notes the settings, or refuses to mix them with those of the analysis that is there."""
        file, now = self.folder / "analysis" / "settings.json", self.settings()
        if file.exists():
            before = records.read_json(file)
            for name in now:
                if before.get(name) != now[name]:
                    raise UserError(
                        f"{file.parent} holds an analysis with {name}={_differs(before.get(name), now[name])}; "
                        "remove that folder or undo the change"
                    )
        records.write_json(file, now)

    def part(self, unit: Unit, progress: Progress) -> dict[str, Any]:
        """The unit's JSON, from disk where it was made before."""
        file = self.folder / "analysis" / "parts" / f"{unit.name}.json"
        if not file.exists():
            progress("")
            records.write_json(file, unit.make(progress))
        return records.read_json(file)

    def units(self) -> list[Unit]:
        """All but the conflict subspaces, which depend on what is found."""
        return list(self._units())

    def _units(self) -> Iterator[Unit]:
        c = self.checkpoints
        yield Unit("edits", self.edits)
        for name in (BASE, *(s.name for s in c.stages)):
            yield Unit(f"point-{name}", functools.partial(self.point, name))
        for domain in c.domains:
            for stage in c.later(domain):
                yield Unit(f"damage-{domain}-{stage.name}", functools.partial(self.damage, domain, stage))
            if len(c.later(domain)) > 1:
                yield Unit(f"cross-{domain}", functools.partial(self.cross, domain))

    def conflict_unit(self, domain: str, stage: str, objective: str) -> Unit:
        """The conflict subspace of a domain and a later stage."""
        later = next(s for s in self.checkpoints.stages if s.name == stage)
        return Unit(
            f"conflict-{domain}-{stage}-{objective}", functools.partial(self.conflict, domain, later, objective)
        )

    def sample(self, point: str, domain: str, progress: Progress, params: Any = None) -> Sample:
        """Completions of a domain at a point, kept on disk."""
        file = self.folder / "analysis" / "samples" / f"{point}-{domain}.npz"
        if not file.exists():
            progress(f"samples of {domain}")
            samples.save(file, samples.draw(self.runtime, self.params(point) if params is None else params, domain))
        return samples.load(file)

    def edit(self, trained: Trained) -> Any:
        """θ after a stage minus θ before it."""
        return self.probe.difference(self.params(trained.name), self.params(trained.start))

    def edits(self, progress: Progress) -> dict[str, Any]:
        """§3: every domain's edit, and how two of them overlap."""
        domains: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        for domain in self.checkpoints.domains:
            source, trained = self.checkpoints.edit(domain)
            progress(f"{source} edit of {domain}")
            figures = edits.edit_figures(self.params(trained.start), self.params(trained.name))
            domains[domain] = {"source": source, "stage": trained.name} | figures
            scores[domain] = edits.neuron_scores(self.edit(trained))
        pairs = []
        for i, a in enumerate(domains):
            for b in list(domains)[i + 1 :]:
                progress(f"edits of {a} and {b}")
                signs = sign_conflict.sign_conflict(*(self.edit(self.checkpoints.edit(d)[1]) for d in (a, b)))
                sets = [(top_share(scores[d]), top_share_global(scores[d])) for d in (a, b)]
                by_layer, overall = (overlap(*pair) for pair in zip(*sets, strict=True))
                pairs.append({"domains": [a, b], "by_layer": by_layer, "global": overall, "sign_conflict": signs})
        return {"domains": domains, "pairs": pairs}

    def point(self, name: str, progress: Progress) -> dict[str, Any]:
        """§4 and §5 at one point; samples and rewards of every domain there."""
        c, params = self.checkpoints, self.params(name)
        drawn = {domain: self.sample(name, domain, progress) for domain in c.domains}
        own = next((d for d in c.domains if c.own(d).name == name), None)
        edit = functools.cache(self.edit)  # one that is compared with several is one array
        later = [] if own is None else [self._later(own, s, edit) for s in c.later(own) if c.own(s.domain) == s]
        out: dict[str, Any] = {
            "rewards": {d: s.rewards_PG.mean(axis=1, dtype=np.float64).tolist() for d, s in drawn.items()},
            "informative": {d: s.informative for d, s in drawn.items()},
        }
        if name != BASE and not later:
            return out
        if own is not None:
            drawn = {d: s for d, s in drawn.items() if d in (own, *(x.domain for x in later))}
        figures, effects = checkpoint_figures.gradient_figures(self.probe, params, drawn, own, later, progress)
        activity = {}
        for domain, sample in drawn.items():
            progress(f"routes of {domain}")
            activity[domain] = self.probe.activity(params, sample)
        out |= {"gradients": figures, "routes": checkpoint_figures.route_figures(activity), "shared": {}}
        for x in later:
            assert own is not None
            route_LF = checkpoint_figures.shared_route(activity[own], activity[x.domain])
            out["shared"][x.domain] = checkpoint_figures.on_route(self.probe, route_LF, x, effects[x.domain])
        return out

    def _later(self, own: str, stage: Trained, edit: Callable[[Trained], Any]) -> checkpoint_figures.Later:
        c = self.checkpoints
        return checkpoint_figures.Later(stage.domain, edit(stage), *(edit(c.edit(d)[1]) for d in (own, stage.domain)))

    def _displacement(self, domain: str, stage: Trained) -> tuple[Any, Any]:
        """θ*_i and D_i(t)."""
        start = self.params(self.checkpoints.own(domain).name)
        return start, self.probe.difference(self.params(stage.name), start)

    def damage(self, domain: str, stage: Trained, progress: Progress) -> dict[str, Any]:
        """§6: damage of a domain at a later stage."""
        start, displacement = self._displacement(domain, stage)

        def draw(alpha: float) -> Sample:
            if alpha == 1:
                return self.sample(stage.name, domain, progress)
            name = f"{self.checkpoints.own(domain).name}-to-{stage.name}-{alpha:g}"
            return self.sample(name, domain, progress, self.probe.along(start, displacement, np.float32(alpha)))

        sample = self.sample(self.checkpoints.own(domain).name, domain, progress)
        record = damage.pair(self.probe, start, displacement, sample, draw, progress)
        return {"domain": domain, "stage": stage.name, "objectives": record}

    def cross(self, domain: str, progress: Progress) -> dict[str, Any]:
        """δ_uᵀHδ_v of the stages after a domain's own."""
        own = self.checkpoints.own(domain)
        later = {s.name: self.edit(s) for s in self.checkpoints.later(domain)}
        sample = self.sample(own.name, domain, progress)
        return {
            "domain": domain,
            "terms": damage.cross_terms(self.probe, self.params(own.name), later, sample, progress),
        }

    def conflict(self, domain: str, stage: Trained, objective: str, progress: Progress) -> dict[str, Any]:
        """§7: the conflict subspace of two domains, for one objective."""
        head = {"domain": domain, "stage": stage.name, "other": stage.domain, "objective": objective}
        own = self.checkpoints.own(domain)
        sample = self.sample(own.name, domain, progress)
        reason = damage.uninformative(sample) if objective == "reward" else ""
        parts = self.folder / "analysis" / "parts"
        shared = records.read_json(parts / f"point-{own.name}.json")["shared"][stage.domain]["neurons"]
        if not any(shared):
            reason = "the two domains share no route"
        if reason:
            return head | {"reason": reason}
        start, displacement = self._displacement(domain, stage)
        width = start["layers"]["gate"]["kernel"].shape[-1]
        chosen = np.zeros((len(shared), width), bool)
        for layer, neurons in enumerate(shared):
            chosen[layer, neurons] = True
        at = conflict.place(self.probe, start, displacement, conflict.route(chosen))
        other = (stage.domain, self.sample(own.name, stage.domain, progress))
        record, vectors = conflict.find(self.probe, at, objective, sample, other, progress)
        if vectors:
            kept = {"vectors": vectors, "index_LR": at.route.index_LR, "mask_LR": at.route.mask_LR}
            save_tree(subspace_folder(self.folder, domain, stage.name, objective), kept)
        return head | record


def subspace_folder(folder: Path, domain: str, stage: str, objective: str) -> Path:
    """Where the vectors of a conflict subspace are kept: {"vectors": [each half's], "index_LR", "mask_LR"}."""
    return folder / "analysis" / "subspaces" / f"{domain}-{stage}-{objective}"


def _differs(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
        return f"...{field}={before.get(field)!r}, now {now.get(field)!r}"
    return f"{before!r}, now {now!r}"
