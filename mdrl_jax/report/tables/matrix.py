"""The score matrix S[t, i] of a run (definitions §2), from rewards of prompts that are the same after every stage.

A figure that a run cannot give (it has one stage, no refresh or no row for the base) is a `Quantity` with a reason and
without an estimate. Scores and differences are in points (100 × mean reward).

Choices where definitions §2 leaves room:
- A training stage has the plain name of a domain and comes before the first refresh. T is the last training stage.
- θ_0 is the end of the warm-up, the supervised stages that the sequence begins with (`stage.origin`); without one it is
  the base, the model that the run loads.
- The path to T consists of the base, the warm-up and the training stages. Every other stage, such as `solo-*`,
  `placebo-*`, `joint` or `refresh-*`, has a row and is no part of it.
- A domain that is trained twice peaks at its last stage.
- Averages over domains treat the domains as independent, because they share no prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.records import read_json, regular
from mdrl_jax.stage import default_start, labelled, names_on_the_way, origin, unlabelled, warm_up
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.estimate import Estimate

POINTS = "points"
BASE = "base"
Rewards = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Matrix:
    """The scores of a run: rows are the stages in the order they were run, columns are the domains.

    Attributes:
      stages: S names of stages.
      domains: D names of domains, in the order of the records.
      rewards: for each stage the rewards by domain, [prompts, samples] in [0, 1]. A domain that was not evaluated after
        a stage is absent there.
      accuracy: the same replies judged regardless of style, in the form of `rewards`.
      seed: seed of the run; None if the records do not say.
      starts: name of each stage but the base -> name of the stage that it started from. Stages that were evaluated but
        are left out of the rows are in it too.
      groups: for each domain whose prompts form groups, the number of each prompt's group [prompts]. Intervals draw
        whole groups.
      right: for each domain the smallest reward of a right answer; 1 for a domain that is not in it.
      score_SD, accuracy_SD: means in points [S, D], NaN where a domain was not evaluated.
      stderr_SD, accuracy_stderr_SD: their standard errors in points [S, D], with the prompt or its group as the
        cluster; NaN where a domain was not evaluated, infinite if it has a single one.
    """

    stages: tuple[str, ...]
    domains: tuple[str, ...]
    rewards: tuple[Rewards, ...]
    accuracy: tuple[Rewards, ...]
    seed: int | None
    starts: Mapping[str, str]
    groups: Mapping[str, NDArray[np.int64]]
    right: Mapping[str, float]
    score_SD: NDArray[np.float64]
    stderr_SD: NDArray[np.float64]
    accuracy_SD: NDArray[np.float64]
    accuracy_stderr_SD: NDArray[np.float64]


@dataclass(frozen=True)
class Quantity:
    """A named figure, or the reason why there is none.

    Attributes:
      name: as in definitions §2, for example "BWT" or "fall math".
      estimate: the figure, or None.
      reason: why there is no estimate.
      detail: the stage or domain that a maximum has selected.
    """

    name: str
    estimate: Estimate | None
    reason: str = ""
    detail: str = ""

    def record(self) -> dict[str, Any]:
        """The figure as JSON (`Estimate.record`); without an estimate it has the reason (`stats.estimate.missing`)."""
        return statistics.missing(self.reason) if self.estimate is None else self.estimate.record()


def load(workdir: str | Path, stages: Sequence[str] | None = None) -> Matrix:
    """The matrix of a work folder, from its `evaluations/*.json`.

    The start of a stage that its record does not name is taken from the folder's `config.json`, if it says.

    Args:
      workdir: the work folder.
      stages: names of the stages to keep; None keeps all. A name without an evaluation is ignored.

    Returns:
      The matrix, as of `build`.

    Raises:
      UserError: if the folder has no evaluations, if one of them is not valid JSON, or if they do not fit together
        (`build`).
      KeyError, ValueError: as in `build`.
    """
    paths = sorted(Path(workdir).glob("evaluations/*.json"))
    if not paths:
        raise UserError(f"{workdir} has no evaluations/*.json; run an experiment there first")
    found = [read_json(regular(path)) for path in paths]
    if all("start" in record for record in found):
        return build(found, stages)
    named = _named_starts(Path(workdir) / "config.json")
    return build([{"start": named.get(record["stage"])} | record for record in found], stages)


def _named_starts(config: Path) -> dict[str, str]:
    """{stage: start} of the stages whose start a run's configuration names; {} if the file is absent or damaged."""
    try:
        recorded = read_json(regular(config))["config"]
        named = {name: fields.get("start") for name, fields in recorded["stage_overrides"].items()}
        return {name: start for name, start in named.items() if isinstance(start, str)}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def build(evaluations: Iterable[Mapping[str, Any]], stages: Sequence[str] | None = None) -> Matrix:
    """The matrix of evaluation records.

    Args:
      evaluations: the content of `evaluations/NN-stage.json` for each stage, in any order; rows are sorted by "index".
        "rewards", "accuracy", "right_from" and "seed" may be absent. So may "start", as in records of earlier versions;
        the stage then started where its name says (`stage.default_start`). So may "groups", if no domain has any.
      stages: names of the stages to keep; None keeps all. A name without an evaluation is ignored.

    Returns:
      The matrix, with the seed of its first row. It has no rows and no domains if no evaluation is kept.

    Raises:
      UserError: if the number of prompts of a domain or their groups differ between stages, because all differences are
        paired; if prompts of one evaluation differ in their number of samples; or if a reward is no finite number.
      KeyError: if an evaluation lacks "index" or "stage".
      ValueError: if a domain of an evaluation has no prompts or no samples, or has groups but another number of
        accuracies than prompts.
    """
    records = sorted(evaluations, key=lambda r: r["index"])
    starts: dict[str, str] = {}
    for r in records:
        if r["stage"] != BASE:
            starts[r["stage"]] = r.get("start") or default_start(r["stage"], starts, _known_domains(records))
    records = [r for r in records if stages is None or r["stage"] in stages]
    rewards = tuple(_arrays(r, "rewards") for r in records)
    accuracy = tuple(_arrays(r, "accuracy") for r in records)
    seed = records[0].get("seed") if records else None
    right = {domain: float(x) for r in records for domain, x in r.get("right_from", {}).items()}
    return _matrix(tuple(r["stage"] for r in records), rewards, accuracy, seed, starts, _groups(records), right)


def _groups(records: Iterable[Mapping[str, Any]]) -> dict[str, NDArray[np.int64]]:
    """The groups of each domain that has any; they have to be the same after every stage."""
    found: dict[str, list[int] | None] = {}
    for r in records:
        for domain, rewards in r.get("rewards", {}).items():
            groups = r.get("groups", {}).get(domain)
            if found.setdefault(domain, groups) != groups or (groups is not None and len(groups) != len(rewards)):
                raise UserError(
                    f"evaluation of {r['stage']}: the groups of {domain} differ from those of an earlier stage, or are "
                    "not one for each prompt; score the stage again"
                )
    return {domain: np.asarray(groups, np.int64) for domain, groups in found.items() if groups is not None}


def _known_domains(records: Iterable[Mapping[str, Any]]) -> set[str]:
    return set(DOMAINS).union(*(r.get("rewards", {}) for r in records))


def resample(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """The matrix of prompts drawn with replacement, as many as each domain has. All stages share the draw of a domain.

    Where prompts form groups, whole groups are drawn, as many as there are, so the number of prompts may change. A
    group that is drawn twice counts as two. The given matrix does not change.

    Args:
      matrix: the scores.
      rng: of the draws; the call changes its state.
    """
    sizes = {d: row[d].shape[0] for row in matrix.rewards for d in row}
    rows, groups = {d: rng.integers(0, n, n) for d, n in sizes.items() if d not in matrix.groups}, {}
    for d, group_P in matrix.groups.items():
        members = [np.flatnonzero(group_P == g) for g in np.unique(group_P)]
        drawn = [members[g] for g in rng.integers(0, len(members), len(members))]
        rows[d], groups[d] = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(x) for x in drawn])

    def take(block: tuple[Rewards, ...]) -> tuple[Rewards, ...]:
        return tuple({d: x_PG[rows[d]] for d, x_PG in row.items()} for row in block)

    rewards, accuracy = take(matrix.rewards), take(matrix.accuracy)
    return _matrix(matrix.stages, rewards, accuracy, matrix.seed, matrix.starts, groups, matrix.right)


def training_rows(matrix: Matrix) -> tuple[int, ...]:
    """Rows, from 0, of the training stages in order: stages with the plain name of a domain before the first refresh.

    A refresh with a label is a side branch, after which the sequence goes on. The last row is T. The result is empty if
    there is no training stage.
    """
    refresh = [s for s, name in enumerate(matrix.stages) if name.startswith("refresh-") and not labelled(name)]
    end = min(refresh, default=len(matrix.stages))
    return tuple(s for s in range(end) if matrix.stages[s] in matrix.domains)


def own_rows(matrix: Matrix) -> dict[str, int]:
    """{domain: row of its own stage}, in the order of the rows. Of several own stages the last one counts."""
    rows = {matrix.stages[s]: s for s in training_rows(matrix)}
    return dict(sorted(rows.items(), key=lambda item: item[1]))


def own_row(matrix: Matrix, domain: str) -> int | None:
    """Row, from 0, of the last training stage with the domain's name (`training_rows`); None if there is none."""
    return own_rows(matrix).get(domain)


def path_rows(matrix: Matrix) -> list[int]:
    """Rows, from 0, on the way to T: the base, if it was evaluated, the warm-up, then the training stages in order."""
    first = [BASE, *warm_up(matrix.starts, {*DOMAINS, *matrix.domains})]
    return [matrix.stages.index(name) for name in first if name in matrix.stages] + list(training_rows(matrix))


def origin_row(matrix: Matrix) -> int | None:
    """Row, from 0, of θ_0, the model that the training stages start from; None if it was not evaluated."""
    name = origin(matrix.starts, {*DOMAINS, *matrix.domains})
    return matrix.stages.index(name) if name in matrix.stages else None


def start_row(matrix: Matrix, stage: str) -> int | None:
    """Row, from 0, of the stage that a stage started from.

    None if that stage has no row, if `stage` is the base, or if its start is not known.
    """
    start = matrix.starts.get(stage)
    return matrix.stages.index(start) if start in matrix.stages else None


def rows_on_the_way(matrix: Matrix, stage: str) -> list[int]:
    """Rows, from 0, of the stages that led to the start of a stage, earliest first: the start included, the base not.

    Stages without a row are left out. For the base, or a stage whose start is not known, the list is empty.
    """
    names = names_on_the_way(matrix.starts.get(stage, BASE), matrix.starts)
    return [matrix.stages.index(name) for name in names if name in matrix.stages]


def trained_domain(stage: str, domains: Sequence[str]) -> str | None:
    """The domain that a stage is about: math for math, math@slow and rollback-math-qa; None for base and joint.

    If several domains fit, the one with the longest name counts.

    >>> trained_domain("rollback-math-qa", ("math", "qa"))
    'math'
    """
    stage = unlabelled(stage)
    if stage in domains:
        return stage
    _, dash, rest = stage.partition("-")
    hits = [d for d in domains if dash and (rest == d or rest.startswith(d + "-"))]
    return max(hits, key=len, default=None)


def framed_cells(matrix: Matrix) -> list[tuple[int, int]]:
    """(row, column) in the matrix, from 0, of the domain that each stage trained.

    The base, rollbacks, placebos and stages that are not about a single domain, such as `joint`, have no cell.
    """
    trained = [s for s in range(len(matrix.stages)) if not _untrained(matrix.stages[s])]
    named = [(s, trained_domain(matrix.stages[s], matrix.domains)) for s in trained]
    return [(s, matrix.domains.index(d)) for s, d in named if d is not None]


def score_at(matrix: Matrix, name: str, row: int, domain: str) -> Quantity:
    """S[row, domain] in points, with Wilson's interval over prompts, or over their groups.

    Args:
      matrix: the scores.
      name: name of the resulting figure.
      row: row of the stage.
      domain: the domain.

    Returns:
      The figure, without an estimate if the domain was not evaluated after the stage.
    """
    rewards_PG = matrix.rewards[row].get(domain)
    if rewards_PG is None:
        return Quantity(name, None, f"{domain} was not evaluated after {matrix.stages[row]}")
    return Quantity(name, statistics.score(rewards_PG, matrix.groups.get(domain)))


def difference(matrix: Matrix, name: str, domain: str, row: int, minus: int, detail: str = "") -> Quantity:
    """S[row, domain] − S[minus, domain] in points, with Student's t over paired prompts, or over their groups.

    Args:
      matrix: the scores.
      name: name of the resulting figure.
      domain: the domain.
      row: row of the stage.
      minus: row of the stage that is subtracted.
      detail: detail of the resulting figure.

    Returns:
      The figure, without an estimate if the domain was not evaluated after one of the stages.
    """
    for s in (row, minus):
        if domain not in matrix.rewards[s]:
            return Quantity(name, None, f"{domain} was not evaluated after {matrix.stages[s]}")
    after, before = (matrix.rewards[s][domain] for s in (row, minus))
    paired = statistics.paired_difference(after, before, matrix.groups.get(domain))
    return Quantity(name, paired.in_points(), detail=detail)


def average(name: str, terms: Sequence[Quantity]) -> Quantity:
    """The plain average over domains. If one domain has no estimate, the average has none, for the first such reason.

    Args:
      name: name of the resulting figure.
      terms: one figure for each domain, at least one, all in one unit.

    Returns:
      The average in the unit of the terms (`stats.estimate.independent_mean`).
    """
    missing = [q.reason for q in terms if q.estimate is None]
    if missing:
        return Quantity(name, None, missing[0])
    return Quantity(name, statistics.independent_mean([q.estimate for q in terms if q.estimate is not None]))


def _arrays(record: Mapping[str, Any], key: str) -> Rewards:
    return {d: _array(f"evaluation of {record['stage']}: {key} of {d}", x) for d, x in record.get(key, {}).items()}


def _array(what: str, prompts: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    for value in (v for group in prompts for v in group):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise UserError(f"{what}: {value!r} is no number; score the stage again")
    if len({len(group) for group in prompts}) > 1:
        raise UserError(f"{what}: prompts differ in their number of samples")
    return np.array([list(group) for group in prompts], float)


def _matrix(
    stages: tuple[str, ...],
    rewards: tuple[Rewards, ...],
    accuracy: tuple[Rewards, ...],
    seed: int | None,
    starts: Mapping[str, str],
    groups: Mapping[str, NDArray[np.int64]],
    right: Mapping[str, float],
) -> Matrix:
    domains = tuple(dict.fromkeys(d for row in rewards for d in row))
    for domain in domains:
        sizes = {row[domain].shape[0]: stage for stage, row in zip(stages, rewards, strict=True) if domain in row}
        if len(sizes) > 1:
            counts = ", ".join(f"{n} at {stage}" for n, stage in sizes.items())
            raise UserError(f"the stages evaluated {domain} on different numbers of prompts: {counts}")

    def table(block: tuple[Rewards, ...]) -> NDArray[np.float64]:
        cells = [[_points(row.get(d), groups.get(d)) for d in domains] for row in block]
        return np.array(cells, float).reshape(len(stages), len(domains), 2)

    score_SDx2, accuracy_SDx2 = table(rewards), table(accuracy)
    return Matrix(
        stages, domains, rewards, accuracy, seed, starts, groups, right,
        score_SDx2[..., 0], score_SDx2[..., 1], accuracy_SDx2[..., 0], accuracy_SDx2[..., 1],
    )  # fmt: skip


def _points(rewards_PG: NDArray[np.float64] | None, groups: NDArray[np.int64] | None) -> tuple[float, float]:
    if rewards_PG is None:
        return np.nan, np.nan
    mean, stderr = statistics.clustered_mean(rewards_PG, groups)
    return 100 * mean, 100 * stderr


def _untrained(stage: str) -> bool:
    return stage.startswith(("rollback-", "placebo-"))
