"""One experiment over several seeds: every figure of the score matrix with its interval over seeds (definitions §12).

With fewer than eight seeds the interval is Student's t over the figures of the seeds; it takes the prompts as given.
From eight seeds on it allows for the prompts, too, which all seeds share: it is Student's t again, and the variance of
the mean of the figures over bootstrap draws of prompts is added to that over seeds (`hierarchical_bootstrap`). If a
seed cannot give a figure, the figure rests on the other seeds, and its `n` says how many. Collateral and forgetting are
each seed's own maximum.

The recovery fraction over seeds is the ratio of the seed means, with a Fieller interval whose unit is the seed
**[chosen]**. So a seed that lost nothing still counts, although it has no fraction of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import Matrix
from mdrl_jax.report.tables.recovered import recovery_points
from mdrl_jax.report.tables.transfer import quantities
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.bootstrap import HIERARCHICAL_FROM, hierarchical_bootstrap
from mdrl_jax.stats.estimate import Estimate
from mdrl_jax.workfolder import FREE, WorkFolder, flat, resolved

SHOWN = 5  # fields that differ, which the refusal of another experiment names
N_REPLICATES = 200
Key = str | tuple[str, str]
Figures = dict[Key, float]


@dataclass(frozen=True)
class Line:
    """A figure over seeds.

    Attributes:
      name: as in definitions §2.
      estimate: the figure with its interval over seeds, or None.
      per_seed: the figure of each seed, in the order of the seeds; None if a seed has none.
      reason: why there is no estimate.
    """

    name: str
    estimate: Estimate | None
    per_seed: tuple[float | None, ...]
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """The figure as JSON, with the fields of `Estimate.record`, "per_seed" and "reason".

        "per_seed" has the figure of each seed, None for a seed without it. "reason" is "" if there is an estimate.
        """
        figure = statistics.missing(self.reason) if self.estimate is None else self.estimate.record()
        return figure | {"per_seed": list(self.per_seed), "reason": self.reason}

    def shown(self, form: str) -> str:
        """The figure with its interval, `value [low, high]`, in a number format such as "+.1f"; "–" without one."""
        if self.estimate is None:
            return "–"
        low, high = self.estimate.low, self.estimate.high
        ends = (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None
        return statistics.figure_text(self.estimate.value, ends, form)

    def around(self, form: str) -> str:
        """The figure with the half-width of its interval, `value ± half`, which is shorter; "–" without a figure."""
        if self.estimate is None:
            return "–"
        half = (self.estimate.high - self.estimate.low) / 2
        value = f"{self.estimate.value:{form}}"
        return f"{value} ± {half:{form.removeprefix('+')}}" if 0 < half < math.inf else value


@dataclass(frozen=True)
class SeedTable:
    """The figures of an experiment over seeds.

    Attributes:
      seeds: seed of each run; None if its records do not say.
      stages, domains: all that any run has.
      scores: the score of each (stage, domain), in points.
      lines: the figures of `transfer.quantities`, in points; a recovery fraction has no unit.
    """

    seeds: tuple[int | None, ...]
    stages: tuple[str, ...]
    domains: tuple[str, ...]
    scores: dict[tuple[str, str], Line]
    lines: tuple[Line, ...]

    def text(self) -> str:
        """A plain-text table. The half-widths in it are those of 95 % intervals over seeds."""
        return "\n".join([*_score_lines(self), "", *_figure_lines(self)]) + "\n"

    def record(self) -> dict[str, Any]:
        """The same as a JSON document.

        Returns:
          {"seeds", "scores", "quantities"}: for each score {"stage", "domain"} and for each figure {"name"}, together
          with the fields of `Line.record`.
        """
        scores = [{"stage": s, "domain": d, **x.record()} for (s, d), x in self.scores.items()]
        figures = [{"name": x.name, **x.record()} for x in self.lines]
        return {"seeds": list(self.seeds), "scores": scores, "quantities": figures}


def summarise_seeds(workdirs: Sequence[str]) -> SeedTable:
    """The table over work folders, one for each seed (`summarise`).

    Configurations may differ in the seed, in fields that change no result (`workfolder.FREE`), and in where models and
    data files lie, but not in the last part of their paths. A folder without `config.json` is not compared.

    Raises:
      UserError: if there is no work folder, if one has no evaluations or damaged ones (`matrix.load`), if two have the
        same seed, if their `config.json` are of different experiments or not valid, or if one has not come as far in
        the plain sequence as another.
      KeyError, ValueError: as in `matrix.load`.
    """
    if not workdirs:
        raise UserError("seeds needs at least one work folder")
    _check_one_experiment(workdirs)
    runs = [matrices.load(w) for w in workdirs]
    _check_sequences(workdirs, runs)
    return summarise(runs)


def _check_one_experiment(workdirs: Sequence[str]) -> None:
    """Refuses work folders whose configurations differ in more than the seed.

    Fields that change no result (`workfolder.FREE`) may differ too, and so may the folders of models and data files,
    but not the files' own names. Folders without a `config.json`, which hold copied evaluations, are not compared.
    """
    known = [w for w in workdirs if (Path(w) / "config.json").exists()]
    fields = [flat(resolved(parse(WorkFolder(Path(w)).recorded()))) for w in known]
    for workdir, other in zip(known[1:], fields[1:], strict=True):
        names = sorted(n for n in fields[0].keys() | other.keys() if n != "seed" and n not in FREE)
        first = {n: _without_folders(n, fields[0].get(n)) for n in names}
        differ = [n for n in names if first[n] != _without_folders(n, other.get(n))]
        if differ:
            shown = ", ".join(f"{n}={fields[0].get(n)!r} and {other.get(n)!r}" for n in differ[:SHOWN])
            more = f" and {len(differ) - SHOWN} more fields" if len(differ) > SHOWN else ""
            raise UserError(
                f"{known[0]} and {workdir} are runs of different experiments: {shown}{more}; "
                "seeds combines runs that differ in nothing but the seed"
            )


def _check_sequences(workdirs: Sequence[str], runs: Sequence[Matrix]) -> None:
    """Refuses runs that have not come equally far in the plain sequence: figures at its end would mix stages."""
    done = [[m.stages[s] for s in matrices.training_rows(m)] for m in runs]
    longest = max(done, key=len)
    for workdir, have in zip(workdirs, done, strict=True):
        missing = [name for name in longest if name not in have]
        if missing:
            other = workdirs[done.index(longest)]
            raise UserError(
                f"{workdir} has no scores of stage {missing[0]}, which {other} has; finish this run, or leave it out"
            )


def _without_folders(name: str, value: Any) -> Any:
    """The value of a field; of a field that holds paths, the names without their folders."""
    if name == "model.path":
        return Path(value).name if isinstance(value, str) else value
    if name.startswith("domains.") and name.endswith("files") and value:
        return [file if file.startswith("hub:") else Path(file).name for file in value]
    return value


def summarise(runs: Sequence[Matrix]) -> SeedTable:
    """The table over score matrices, one for each seed. It has every stage and domain that any seed has.

    If eight or more seeds (`HIERARCHICAL_FROM`) have a figure, its interval comes from a bootstrap with a fixed seed;
    that of a recovery fraction is Fieller's with any number. A figure that only one seed has gets the whole line as its
    interval. A fraction has no estimate with one seed, or unless the interval of the mean loss over seeds lies above 0.
    Without runs the table is empty.

    Raises:
      UserError: if two matrices have the same seed.
    """
    seeds = tuple(m.seed for m in runs)
    known = [s for s in seeds if s is not None]
    if len(set(known)) < len(known):
        raise UserError(f"two of the work folders have the same seed ({known}); give one work folder for each seed")
    stages = tuple(dict.fromkeys(s for m in runs for s in m.stages))
    domains = tuple(dict.fromkeys(d for m in runs for d in m.domains))
    found = [_figures(m) for m in runs]
    replicates = _replicates(runs) if len(runs) >= HIERARCHICAL_FROM else []
    reasons = {q.name: q.reason for m in runs for q in quantities(m) if q.reason}
    scores = {(s, d): _line((s, d), found, replicates) for s in stages for d in domains}
    names = dict.fromkeys(q.name for m in runs for q in quantities(m))
    lines = [
        _fraction(n, runs, found, reasons)
        if n.startswith("fraction ")
        else _line(n, found, replicates, reasons.get(n, ""))
        for n in names
    ]
    return SeedTable(seeds, stages, domains, scores, tuple(lines))


def _figures(m: Matrix) -> Figures:
    """All figures that the run has: scores by (stage, domain), other figures by name."""
    cells = {(s, d): m.score_SD[i, j] for i, s in enumerate(m.stages) for j, d in enumerate(m.domains)}
    named = {q.name: q.estimate.value for q in quantities(m) if q.estimate is not None}
    return {k: float(v) for k, v in cells.items() if math.isfinite(v)} | named


def _replicates(runs: Sequence[Matrix]) -> list[list[Figures]]:
    # Seeds share their prompts, so replicate r has the same draw of prompts in every run.
    rngs = [np.random.default_rng(0) for _ in runs]
    return [
        [_figures(matrices.resample(m, rng)) for _ in range(N_REPLICATES)] for m, rng in zip(runs, rngs, strict=True)
    ]


def _line(key: Key, found: Sequence[Figures], replicates: Sequence[Sequence[Figures]], reason: str = "") -> Line:
    name = key if isinstance(key, str) else f"{key[1]} after {key[0]}"
    per_seed = tuple(f.get(key) for f in found)
    values = [v for v in per_seed if v is not None]
    if not values:
        return Line(name, None, per_seed, reason or "no seed has it")
    if len(values) < HIERARCHICAL_FROM:
        return Line(name, statistics.over_seeds(values, matrices.POINTS), per_seed)
    drawn_NR = [[f[key] for f in r] for r, v in zip(replicates, per_seed, strict=True) if v is not None]
    estimate = hierarchical_bootstrap(values, drawn_NR, unit=matrices.POINTS)
    return Line(name, estimate, per_seed)


def _fraction(name: str, runs: Sequence[Matrix], found: Sequence[Figures], reasons: Mapping[str, str]) -> Line:
    per_seed = tuple(f.get(name) for f in found)
    stage = name.removeprefix("fraction ")
    pairs = [recovery_points(m, stage) for m in runs if stage in m.stages]
    sides = np.array([p for p in pairs if p is not None], float).reshape(-1, 2)
    if len(sides) < 2:
        return Line(name, None, per_seed, reasons.get(name) or "undefined: needs two seeds")
    gain_N, loss_N = sides.T
    loss = statistics.over_seeds(loss_N)
    if loss.low <= 0:
        shown = statistics.figure_text(loss.value, (loss.low, loss.high), "+.2f")
        return Line(name, None, per_seed, f"undefined over seeds: loss {shown} points")
    return Line(name, statistics.ratio_of_means(gain_N, loss_N), per_seed)


def _score_lines(table: SeedTable) -> list[str]:
    width = max([len("after stage"), *map(len, table.stages)])
    seeds = ", ".join("?" if s is None else str(s) for s in table.seeds)
    lines = [f"score, points: mean over seeds {seeds} ± 95 % half-width"]
    lines.append(f"{'after stage':<{width}}" + "".join(f"{d:>14}" for d in table.domains))
    for s in table.stages:
        cells = (_cell(table.scores[s, d].estimate) for d in table.domains)
        lines.append(f"{s:<{width}}" + "".join(f"{c:>14}" for c in cells))
    return lines


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.1f} ± {half:.1f}" if math.isfinite(half) else f"{estimate.value:.1f}"


def _figure_lines(table: SeedTable) -> list[str]:
    width = max([len("figure"), *(len(x.name) for x in table.lines)])
    lines = [f"{'figure':<{width}}{'mean':>9}   {'95 % over seeds':<20}each seed"]
    for x in table.lines:
        form = ".3f" if x.name.startswith("fraction ") else ".2f"
        each = " ".join("–" if v is None else f"{v:{form}}" for v in x.per_seed)
        if x.estimate is None:
            lines.append(f"{x.name:<{width}}{'–':>9}   {'':<20}{each}   {x.reason}")
            continue
        interval = statistics.interval_text(x.estimate.record()["ci95"], form)
        lines.append(f"{x.name:<{width}}{x.estimate.value:>9{form}}   {interval:<20}{each}")
    return lines
