"""Runs the interference analysis of a sequence of checkpoints: why a domain got worse (definitions §3 to §7, §13).

This is the entry of `analysis/`. The stage `analyze` (`experiment.py`) and the command `analyze` call `check` before
anything runs, and `run` for the work. Both describe the checkpoints as `sequence.Checkpoints`: names, domains, and a
function that reads parameters. The analysis does not depend on how the checkpoints were trained.

The work is cut into units (`Analysis.units`):

| unit | content | definitions |
|---|---|---|
| `edits` | the edit of every domain, and the overlap of each pair of edits | §3 |
| `point-<checkpoint>` | samples and rewards; at θ_0 and at peaks also gradients and routes | §4, §5 |
| `damage-<domain>-<stage>` | predicted and measured damage of a domain at a later stage | §6 |
| `peak-gradients` | gradients, at θ_0, of the NLL of successes from each domain's peak | §4 |
| `solo-effects` | predicted and measured effect of each solo edit on each prompt of another domain | §5 |
| `cross-<domain>` | curvature between the edits of two later stages | §6 |
| `conflict-<domain>-<stage>-<objective>` | the conflict subspace, for the most harmed pairs | §7 |

Each finished unit is written to `analysis/parts/`, and each set of samples to `analysis/samples/`. An analysis that is
started again reads finished units instead of computing them. At the end `assembly.py` turns the units into
`analysis/*.json` and `claims.json`. At most two checkpoints are cached: one θ*_i and one later stage.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import records
from mdrl_jax.analysis import assembly, checkpoint_figures, damage, edits, routes, samples
from mdrl_jax.analysis.probe import Probe, build
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Supervised, Trained
from mdrl_jax.analysis.subspace import conflict, removal, theorem
from mdrl_jax.checkpoints import save_tree
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.programs import peak_bytes
from mdrl_jax.rl.grpo import GRPOConfig
from mdrl_jax.runtime import Runtime
from mdrl_jax.second_order import subspace
from mdrl_jax.stats.overlap import overlap, top_share, top_share_global

OBJECTIVES = ("reward", "success_nll")  # the conflict subspace is sought for these
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One resumable part of the analysis.

    Attributes:
      name: the file name of its JSON in `analysis/parts/`, without the ending.
      make: computes that JSON; it reports progress through its argument.
    """

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
    """Starts or resumes the analysis; writes `folder`/analysis/*.json and `folder`/claims.json.

    It also writes finished units, samples and the vectors of conflict subspaces to folders below `folder`/analysis. The
    caller runs `check` first.

    Args:
      runtime: the model, prompts, rewards and configuration.
      checkpoints: the checkpoints to analyse.
      folder: the work folder that the records are written to.
      grpo: the settings of the loss that the stages were trained with; the objective `grpo` uses them.
      track: `track(label, total)` is a context manager for a progress bar. It gives a function (done, text) -> None.
      sources: the folder of each checkpoint, by name, if the checkpoints do not come from `folder`. They are part of
        the settings, so a resumed analysis must have the same ones.

    Returns:
      the content of the written files, by file name without ending: "edits", "gradients", "peak_gradients",
      "solo_effects", "routes", "damage", "subspace" and "claims" (`assembly.assemble`).

    Raises:
      UserError: if `folder` holds an analysis with other settings or of other checkpoints, or its settings or a unit
        are not valid JSON; if sampling fails (`samples.draw`); or if a Lanczos search fails (`lanczos.block_lanczos`).
      RuntimeError: if reward workers do not start (`samples.draw`).
      ValueError: if a second-order term, a damage or a derivative of a conflict subspace is not finite.
      Stopped: after a SIGTERM, if `track` is that of a `Screen`; finished units are saved.
      The errors of `samples.load`, if the file of a sample is damaged, and of `checkpoints.params`.
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
            parts[unit.name] = analysis.part(
                unit, lambda text, done=done, name=unit.name: show(done, f"{name}: {text}")
            )
    found = assembly.assemble(parts, analysis.settings())
    for name, content in found.items():
        place = folder if name == "claims" else folder / "analysis"
        records.write_json(place / f"{name}.json", content)
    return found


def check(runtime: Runtime, checkpoints: Checkpoints) -> None:
    """Checks, before anything runs, that the analysis can run on these checkpoints.

    Args:
      runtime: the prompts, the mesh and the configuration.
      checkpoints: the checkpoints to analyse; their parameters are not read.

    Raises:
      UserError: if there is no stage to analyse, if a domain has too few prompts or groups of prompts, or if the mesh
        does not divide the micro-batches or the prompts that are sampled at once.
      KeyError: if the run has no prompts of a domain.
    """
    if not checkpoints.stages:
        raise UserError("analyze: there is no stage before it to analyze; at least one must have the name of a domain")
    samples.check(runtime, checkpoints.domains)


@dataclasses.dataclass(eq=False)
class Analysis:
    """The units of one analysis, and the caches and files that they share.

    Attributes:
      runtime, checkpoints, folder, sources: as in `run`.
      probe: the compiled device programs.
      params: reads the parameters of a checkpoint by name; the last two are cached.
    """

    runtime: Runtime
    checkpoints: Checkpoints
    folder: Path
    probe: Probe
    sources: dict[str, str]

    def __post_init__(self) -> None:
        # Units of one domain compare its θ*_i with one later stage after another: room for θ*_i and one of them.
        self.params = functools.lru_cache(maxsize=2)(self.checkpoints.params)

    def settings(self) -> dict[str, Any]:
        """The settings that the figures depend on: configuration, names of the checkpoints, and their sources."""
        supervised = [dataclasses.asdict(s) for s in self.checkpoints.supervised]
        return {
            "seed": self.runtime.config.seed,
            "analyze": records.as_read(dataclasses.asdict(self.runtime.config.analyze)),
            "temperature": self.runtime.config.rollout.sampling.temperature,
            "attention": self.probe.attention_path,
            "stages": [dataclasses.asdict(s) for s in self.checkpoints.stages],
            "solos": [dataclasses.asdict(s) for s in self.checkpoints.solos],
            "sources": self.sources,
            **({"supervised": supervised} if supervised else {}),
            **({"origin": self.checkpoints.origin} if self.checkpoints.origin != BASE else {}),
        }

    def open(self) -> None:
        """Writes the settings to `analysis/settings.json`.

        Raises:
          UserError: if that file already exists with other settings, because old and new units would be mixed.
        """
        file, now = self.folder / "analysis" / "settings.json", self.settings()
        if file.exists():
            before = records.read_json(file)
            for name in now:
                if before.get(name) != now[name]:
                    raise UserError(
                        f"{file.parent} holds an analysis with {name}{_differs(before.get(name), now[name])}; "
                        "remove that folder to start over, or undo the change to resume"
                    )
        records.write_json(file, now)

    def part(self, unit: Unit, progress: Progress) -> dict[str, Any]:
        """The unit's JSON. It is computed and written on the first call, and read from its file afterwards.

        The seconds that it took, and the most memory of the process until then, go to `analysis/spent.json`.

        Args:
          unit: the unit.
          progress: told what is being computed; not called if the file exists.

        Raises:
          UserError: if the file is not valid JSON.
          The errors of `unit.make`.
        """
        file = self.folder / "analysis" / "parts" / f"{unit.name}.json"
        if not file.exists():
            progress("compiles its programs")
            started, account = time.monotonic(), self.folder / "analysis" / "spent.json"
            made = unit.make(progress)
            spent = records.read_json(account) if account.exists() else {}
            took = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
            records.write_json(account, spent | {unit.name: took})
            records.write_json(file, made)
        return records.read_json(file)

    def units(self) -> list[Unit]:
        """All units except the conflict subspaces, whose pairs are chosen by the damage that these units measure."""
        return list(self._units())

    def _units(self) -> Iterator[Unit]:
        c = self.checkpoints
        yield Unit("edits", self.edits)
        for name in c.points:
            yield Unit(f"point-{name}", functools.partial(self.point, name))
        if len(c.domains) > 1:
            yield Unit("peak-gradients", self.peak_gradients)
        if len(self._alone()) > 1:
            yield Unit("solo-effects", self.solo_effects)
        for domain in c.domains:
            for stage in c.later(domain):
                yield Unit(f"damage-{domain}-{stage.name}", functools.partial(self.damage, domain, stage))
            if len(c.later(domain)) > 1:
                yield Unit(f"cross-{domain}", functools.partial(self.cross, domain))

    def conflict_unit(self, domain: str, stage: str, objective: str) -> Unit:
        """The unit of one conflict subspace.

        Args:
          domain: the earlier domain A.
          stage: the name of the later stage, one of `checkpoints.stages`.
          objective: one of `OBJECTIVES`.

        Raises:
          StopIteration: if no stage of the sequence has this name.
        """
        later = next(s for s in self.checkpoints.stages if s.name == stage)
        return Unit(
            f"conflict-{domain}-{stage}-{objective}", functools.partial(self.conflict, domain, later, objective)
        )

    def sample(self, point: str, domain: str, progress: Progress, params: Any = None) -> Sample:
        """Completions of a domain, sampled at one point and then kept in `analysis/samples/`.

        Args:
          point: the name of a checkpoint. With `params` it may be any name; the name is also that of the file.
          domain: whose prompts are sampled.
          progress: told before anything is sampled.
          params: the parameters at the point; by default those of the checkpoint `point`. They are not used if the
            file exists.

        Returns:
          The completions, `analyze.group_size` of each of `analyze.prompts` prompts, as the file holds them.

        Raises:
          UserError: if sampling fails (`samples.draw`).
          The errors of `samples.load`, if the file is damaged.
        """
        file = self.folder / "analysis" / "samples" / f"{point}-{domain}.npz"
        if not file.exists():
            progress(f"samples of {domain}")
            samples.save(file, samples.draw(self.runtime, self.params(point) if params is None else params, domain))
        return samples.load(file)

    def edit(self, trained: Trained) -> Any:
        """The edit of a stage, θ after it minus θ before it, a tree of parameters on the devices."""
        return self.probe.difference(self.params(trained.name), self.params(trained.start))

    def edits(self, progress: Progress) -> dict[str, Any]:
        """The unit `edits` (definitions §3): every domain's edit, and how far each pair of edits overlaps.

        Args:
          progress: told what is being computed.

        Returns:
          {"domains", "pairs", "again"}:

          - "domains": {domain: {"source", "stage", figures of `edits.edit_figures`}}. If a supervised stage of the
            domain has run, "sft" has the same figures of training on demonstrations to the same score (`matched`). If
            the stage recorded them, "random_signs" has the same figures of its updates with random signs.
          - "pairs": [{"domains": [a, b], "by_layer", "global", "sign_conflict"}]; the second and third key have the
            Jaccards of the most-changed neurons.
          - "again": [{"domain", "stages": [its first solo stage, another], "by_layer", "global"}], which compares two
            solo stages of one domain.

        Raises:
          UserError: if the record of a supervised stage with a target cannot be read.
          The errors of `checkpoints.params`.
        """
        domains: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        for domain in self.checkpoints.domains:
            source, trained = self.checkpoints.edit(domain)
            progress(f"{source} edit of {domain}")
            figures = edits.edit_figures(self.params(trained.start), self.params(trained.name))
            domains[domain] = {"source": source, "stage": trained.name} | figures
            if (signed := self.checkpoints.random_signs(trained.name)) is not None:
                domains[domain]["random_signs"] = signed
            for supervised in (s for s in self.checkpoints.supervised if s.domain == domain):
                domains[domain]["sft"] = self.matched(trained, supervised)
            scores[domain] = edits.neuron_scores(self.edit(trained))
        pairs = []
        for i, a in enumerate(domains):
            for b in list(domains)[i + 1 :]:
                progress(f"edits of {a} and {b}")
                signs = edits.sign_conflict(*(self.edit(self.checkpoints.edit(d)[1]) for d in (a, b)))
                sets = [(top_share(scores[d]), top_share_global(scores[d])) for d in (a, b)]
                by_layer, overall = (overlap(*pair) for pair in zip(*sets, strict=True))
                pairs.append({"domains": [a, b], "by_layer": by_layer, "global": overall, "sign_conflict": signs})
        again = []
        for i, first in enumerate(self.checkpoints.solos):
            for second in self.checkpoints.solos[i + 1 :]:
                if first.domain == second.domain and first == self.checkpoints.edit(first.domain)[1]:
                    progress(f"edits of {first.name} and {second.name}")
                    head = {"domain": first.domain, "stages": [first.name, second.name]}
                    one, two = (edits.neuron_scores(self.edit(s)) for s in (first, second))
                    by_layer = overlap(top_share(one), top_share(two))
                    overall = overlap(top_share_global(one), top_share_global(two))
                    again.append(head | {"by_layer": by_layer, "global": overall})
        return {"domains": domains, "pairs": pairs, "again": again}

    def matched(self, trained: Trained, supervised: Supervised) -> dict[str, Any]:
        """Compares the edit of supervised training with that of RL at a matched score (definitions §3).

        Args:
          trained: the stage of the RL edit.
          supervised: a supervised stage of the same domain.

        Returns:
          {"stage", "matched", figures of `edits.edit_figures`}. "matched" has the target, the step and the learning
          rate of the supervised stage, its score at this step and the difference to the target's. A stage that starts
          elsewhere, has another target or did not reach it has a "reason" in place of the figures.
        """
        head: dict[str, Any] = {"stage": supervised.name}
        if supervised.start != trained.start:
            return head | {"reason": f"{supervised.name} starts from {supervised.start}, not from {trained.start}"}
        if supervised.target != trained.name:
            return head | {"reason": f"{supervised.name} does not have the target {trained.name}"}
        looks = self.checkpoints.looks(supervised.name)
        last = {key: looks["steps"][-1][key] for key in ("step", "score", "difference")}
        head["matched"] = {"target": trained.name, "learning_rate": looks["settings"]["learning_rate"], **last}
        if not looks["reached"]:
            return head | {"reason": f"{supervised.name}: score of {trained.name} {looks['stopped']}"}
        return head | edits.edit_figures(self.params(supervised.start), self.params(supervised.name))

    def peak_gradients(self, progress: Progress) -> dict[str, Any]:
        """The unit `peak-gradients` (definitions §4): gradients at θ_0, of completions from the peaks.

        Args:
          progress: told what is being computed.

        Returns:
          by pair "a-b" of domains, the figures of `checkpoint_figures.gradient_figures` of the success NLL.

        Raises:
          UserError: if sampling fails (`samples.draw`).
        """
        drawn = {d: self.sample(self.checkpoints.own(d).name, d, progress) for d in self.checkpoints.domains}
        base = self.params(self.checkpoints.origin)
        return checkpoint_figures.gradient_figures(self.probe, base, drawn, None, (), progress, successes=True)[0]

    def _alone(self) -> list[str]:
        """The domains of the sequence that also have a solo stage."""
        return [d for d in self.checkpoints.domains if self.checkpoints.edit(d)[0] == "solo"]

    def solo_effects(self, progress: Progress) -> dict[str, Any]:
        """The unit `solo-effects` (definitions §5): what each solo edit does to each prompt of another domain.

        Args:
          progress: told what is being computed.

        Returns:
          {"pairs": the records of `checkpoint_figures.solo_effects`}, between all domains of the sequence that have a
          solo stage.

        Raises:
          UserError: if sampling fails (`samples.draw`).
        """
        c, domains = self.checkpoints, self._alone()
        at_peak = {d: self.sample(c.own(d).name, d, progress) for d in domains}
        at_base = {d: self.sample(c.origin, d, progress) for d in domains}
        base = self.params(c.origin)
        activity = {d: self.probe.activity(base, sample) for d, sample in at_base.items()}
        solo = lambda d: self.params(c.edit(d)[1].name)  # noqa: E731
        return {"pairs": checkpoint_figures.solo_effects(self.probe, base, activity, at_peak, solo, progress)}

    def point(self, name: str, progress: Progress) -> dict[str, Any]:
        """The unit `point-<name>`: every domain is sampled at a checkpoint; gradients and routes are compared.

        Gradients and routes (definitions §4, §5) are compared at θ_0, among all domains, and at each θ*_A
        that has a later stage, among A and the later domains. Other checkpoints have no comparisons.

        Args:
          name: the name of the checkpoint.
          progress: told what is being computed.

        Returns:
          "rewards": {domain: mean reward of each prompt}; "informative": {domain: share of prompts whose completions
          have different rewards}; "gradients" and "routes": figures by pair "a-b" (`gradient_figures` and
          `route_figures` of `checkpoint_figures.py`); "shared": {later domain: figures on the shared route
          (`on_route`), with "heads", the indices of its attention heads by layer}, empty at θ_0. A checkpoint
          without comparisons has only the first two.

        Raises:
          UserError: if sampling fails (`samples.draw`).
        """
        c, params = self.checkpoints, self.params(name)
        drawn = {domain: self.sample(name, domain, progress) for domain in c.domains}
        own = next((d for d in c.domains if c.own(d).name == name), None)
        edit = functools.cache(self.edit)  # an edit that occurs in several comparisons is held in memory once
        later = [] if own is None else [self._later(own, s, edit) for s in c.later(own) if c.own(s.domain) == s]
        out: dict[str, Any] = {
            "rewards": {d: s.rewards_PG.mean(axis=1, dtype=np.float64).tolist() for d, s in drawn.items()},
            "informative": {d: s.informative for d, s in drawn.items()},
        }
        if name != c.origin and not later:
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
            heads_LH = checkpoint_figures.shared_route(activity[own], activity[x.domain], "heads")
            figures = checkpoint_figures.on_route(self.probe, route_LF, x, effects[x.domain])
            out["shared"][x.domain] = figures | {"heads": [np.flatnonzero(row).tolist() for row in heads_LH]}
        return out

    def _later(self, own: str, stage: Trained, edit: Callable[[Trained], Any]) -> checkpoint_figures.Later:
        c = self.checkpoints
        return checkpoint_figures.Later(stage.domain, edit(stage), *(edit(c.edit(d)[1]) for d in (own, stage.domain)))

    def _displacement(self, domain: str, stage: Trained) -> tuple[Any, Any]:
        """The peak θ*_i and the displacement D_i(t) = θ_t − θ*_i of a domain i and a later stage t."""
        start = self.params(self.checkpoints.own(domain).name)
        return start, self.probe.difference(self.params(stage.name), start)

    def damage(self, domain: str, stage: Trained, progress: Progress) -> dict[str, Any]:
        """The unit `damage-<domain>-<stage>` (definitions §6): the damage of a domain at a later stage.

        Args:
          domain: the earlier domain.
          stage: the later stage, one of `checkpoints.later(domain)`.
          progress: told what is being computed.

        Returns:
          {"domain", "stage": its name, "objectives": the record of `damage.pair`}.

        Raises:
          UserError: if sampling fails (`samples.draw`).
          StopIteration: if no stage trained the domain.
        """
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
        """The unit `cross-<domain>`: δ_uᵀHδ_v for every two stages u, v after the domain's own (definitions §6).

        Args:
          domain: the earlier domain.
          progress: told what is being computed.

        Returns:
          {"domain", "terms": the records of `damage.cross_terms`}.

        Raises:
          UserError: if sampling fails (`samples.draw`).
          StopIteration: if no stage trained the domain.
        """
        own = self.checkpoints.own(domain)
        later = {s.name: self.edit(s) for s in self.checkpoints.later(domain)}
        sample = self.sample(own.name, domain, progress)
        return {
            "domain": domain,
            "terms": damage.cross_terms(self.probe, self.params(own.name), later, sample, progress),
        }

    def conflict(self, domain: str, stage: Trained, objective: str, progress: Progress) -> dict[str, Any]:
        """The unit `conflict-…` (definitions §7): the conflict subspace of a domain A and a later stage.

        It also writes the vectors of the subspace (`subspace_folder`).

        Args:
          domain: the earlier domain A.
          stage: the later stage, which trains B; one of `checkpoints.later(domain)`.
          objective: one of `OBJECTIVES`.
          progress: told what is being computed.

        Returns:
          {"domain", "stage", "other", "objective"} with the record of `conflict.find` and with "removal", that of
          `removal.measure`; or with a "reason" why the subspace cannot be sought. For the success NLL, "removal" has
          the records of `analyze.removal_spaces` under "wider". With `analyze.theorem` there is "theorem", the record
          of `theorem.measure`.

        Raises:
          UserError: if the unit `point-<checkpoint>` of the domain's peak is not written yet, if sampling fails
            (`samples.draw`), or if the Lanczos search fails (`lanczos.block_lanczos`).
          ValueError: if a second-order term is not finite.
        """
        head = {"domain": domain, "stage": stage.name, "other": stage.domain, "objective": objective}
        own = self.checkpoints.own(domain)
        sample = self.sample(own.name, domain, progress)
        reason = damage.uninformative(sample) if objective == "reward" else ""
        parts = self.folder / "analysis" / "parts"
        shared = records.read_json(parts / f"point-{own.name}.json")["shared"][stage.domain]
        if not any(shared["neurons"]):
            reason = "the two domains share no route"
        if reason:
            return head | {"reason": reason}
        start, displacement = self._displacement(domain, stage)
        width = start["layers"]["gate"]["kernel"].shape[-1]
        chosen = np.zeros((len(shared["neurons"]), width), bool)
        for layer, neurons in enumerate(shared["neurons"]):
            chosen[layer, neurons] = True
        at = conflict.place(self.probe, start, displacement, conflict.route(chosen))
        other = (stage.domain, self.sample(own.name, stage.domain, progress))
        record, vectors = conflict.find(self.probe, at, objective, sample, other, progress)
        if vectors:
            kept = {"vectors": vectors, "index_LR": at.route.index_LR, "mask_LR": at.route.mask_LR}
            save_tree(subspace_folder(self.folder, domain, stage.name, objective), kept)
            found = [(v, subspace.size(v)) for v in vectors]
            record["removal"] = removal.on_route(self.probe, at, sample, found, progress)
            if objective == "success_nll":
                supports = self._supports(start, chosen, shared["heads"])
                record["removal"]["wider"] = [
                    removal.elsewhere(self.probe, name, start, displacement, support, sample, progress)
                    for name, support in supports.items()
                ]
            if self.runtime.config.analyze.theorem:
                bases = [(v, h["eigenvalues"]) for v, h in zip(vectors, record["halves"], strict=True)]
                record["theorem"] = theorem.measure(self.probe, at, objective, sample, bases, progress)
        return head | record

    def _supports(self, start: Any, neurons_LF: np.ndarray, heads: list[list[int]]) -> dict[str, Any]:
        """The supports of `analyze.removal_spaces`, by the names that the records give them.

        Args:
          start: a tree of all parameters.
          neurons_LF: true for the neurons of the shared route.
          heads: indices of its attention heads, by layer.
        """
        heads_LH = np.zeros((len(heads), self.runtime.model.config.n_heads), bool)
        for layer, chosen in enumerate(heads):
            heads_LH[layer, chosen] = True
        every = {
            "heads": ("MLP neurons and heads", lambda: routes.support(start, neurons_LF, heads_LH)),
            "all": ("all parameters", lambda: jax.tree.map(lambda _: np.ones((), np.float32), start)),
        }
        return {every[name][0]: every[name][1]() for name in self.runtime.config.analyze.removal_spaces}


def subspace_folder(folder: Path, domain: str, stage: str, objective: str) -> Path:
    """The path of the folder of a conflict subspace's vectors: `folder`/analysis/subspaces/DOMAIN-STAGE-OBJECTIVE.

    It exists only if the subspace was found; it is not made here. It holds the tree {"vectors": [basis found on each
    half of A's prompts], "index_LR", "mask_LR"}. The last two are those of the route (`conflict.Route`).

    Args:
      folder: the work folder.
      domain, stage, objective: the earlier domain, the name of the later stage, and the objective.
    """
    return folder / "analysis" / "subspaces" / f"{domain}-{stage}-{objective}"


def _differs(before: Any, now: Any) -> str:
    """The difference of two settings, to follow their name in a message: "=1, now 2" or ".field=1, now 2"."""
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
        return f".{field}={before.get(field)!r}, now {now.get(field)!r}"
    return f"={before!r}, now {now!r}"
