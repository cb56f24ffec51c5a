"""The score matrix S[t, i] of a run (definitions §2), from per-prompt rewards paired across stages.

Whatever a run cannot give (one stage, no refresh, no row for the base) is a `Quantity` without an
estimate and with the reason. Scores and differences are in points (100 × mean reward).

Choices where definitions §2 leaves room:
- A training stage bears the plain name of a domain and comes before the first refresh; T is the
  last of them. `solo-*`, `placebo-*`, `protect-*`, `joint`, `refresh-*` and `rollback-*` are rows,
  never part of the path to T.
- A domain trained twice peaks at its last stage.
- Averages over domains treat domains as independent, as they share no prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.errors import UserError
from mdrl_jax.records import read_json
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.estimate import Estimate

POINTS = "points"
BASE = "base"
Rewards = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Matrix:
    """Rows are stages in the order they were run, columns are domains in the order of the records.

    `rewards[s][domain]` has shape (prompts, samples), in [0, 1]; a domain not evaluated at a stage
    is absent there. `score_SD` and `accuracy_SD` (the same replies judged regardless of style) are
    in points, NaN where absent, with standard errors whose cluster is the prompt.
    """

    stages: tuple[str, ...]
    domains: tuple[str, ...]
    rewards: tuple[Rewards, ...]
    accuracy: tuple[Rewards, ...]
    seed: int | None
    score_SD: NDArray[np.float64]
    stderr_SD: NDArray[np.float64]
    accuracy_SD: NDArray[np.float64]
    accuracy_stderr_SD: NDArray[np.float64]


@dataclass(frozen=True)
class Quantity:
    """A named figure, or the reason why there is none. `detail` names the stage or domain that a
    max has chosen.
    """

    name: str
    estimate: Estimate | None
    reason: str = ""
    detail: str = ""

    def record(self) -> dict[str, Any]:
        """As the records of a run have figures (`Estimate.record`), with the reason where there is none."""
        return statistics.missing(self.reason) if self.estimate is None else self.estimate.record()


def load(workdir: str | Path, stages: Sequence[str] | None = None) -> Matrix:
    """The matrix of a work folder's evaluations/*.json. Raises UserError if there are none."""
    paths = sorted(Path(workdir).glob("evaluations/*.json"))
    if not paths:
        raise UserError(f"{workdir} has no evaluations/*.json; run an experiment there first")
    return build([read_json(path) for path in paths], stages)


def build(evaluations: Iterable[Mapping[str, Any]], stages: Sequence[str] | None = None) -> Matrix:
    """The matrix of the records of evaluations/, one a stage (per-prompt rewards and accuracy).

    Rows are sorted by index; `stages`, if given, names those to keep. Raises UserError where a
    domain's prompts differ in number between stages, since everything here is paired.
    """
    records = sorted(evaluations, key=lambda r: r["index"])
    records = [r for r in records if stages is None or r["stage"] in stages]
    rewards = tuple(_arrays(r, "rewards") for r in records)
    accuracy = tuple(_arrays(r, "accuracy") for r in records)
    seed = records[0].get("seed") if records else None
    return _matrix(tuple(r["stage"] for r in records), rewards, accuracy, seed)


def resample(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """The matrix of prompts drawn with replacement: one draw a domain, the same at every stage."""
    sizes = {d: row[d].shape[0] for row in matrix.rewards for d in row}
    rows = {d: rng.integers(0, n, n) for d, n in sizes.items()}

    def take(block: tuple[Rewards, ...]) -> tuple[Rewards, ...]:
        return tuple({d: x_PG[rows[d]] for d, x_PG in row.items()} for row in block)

    return _matrix(matrix.stages, take(matrix.rewards), take(matrix.accuracy), matrix.seed)


def training_rows(matrix: Matrix) -> tuple[int, ...]:
    """Rows of the training stages before any refresh, in order; the last is T."""
    refresh = [s for s, name in enumerate(matrix.stages) if name.startswith("refresh-")]
    end = min(refresh, default=len(matrix.stages))
    return tuple(s for s in range(end) if matrix.stages[s] in matrix.domains)


def own_rows(matrix: Matrix) -> dict[str, int]:
    """Row of each trained domain's own (last) stage, in the order of those rows."""
    rows = {matrix.stages[s]: s for s in training_rows(matrix)}
    return dict(sorted(rows.items(), key=lambda item: item[1]))


def own_row(matrix: Matrix, domain: str) -> int | None:
    """Row of the domain's own (last) stage; None if no training stage bears its name."""
    return own_rows(matrix).get(domain)


def path_rows(matrix: Matrix) -> list[int]:
    """Rows on the way to T: the base, then the training stages."""
    base = [matrix.stages.index(BASE)] if BASE in matrix.stages else []
    return base + list(training_rows(matrix))


def trained_domain(stage: str, domains: Sequence[str]) -> str | None:
    """The domain that `stage` is about: math for math, refresh-math and rollback-math-qa.

    None for base and joint. Of several domains that fit, the longest name.

    >>> trained_domain("rollback-math-qa", ("math", "qa"))
    'math'
    """
    if stage in domains:
        return stage
    _, dash, rest = stage.partition("-")
    hits = [d for d in domains if dash and (rest == d or rest.startswith(d + "-"))]
    return max(hits, key=len, default=None)


def framed_cells(matrix: Matrix) -> list[tuple[int, int]]:
    """(row, column) of the domain that each stage trained; a rollback or placebo trains none."""
    trained = [s for s in range(len(matrix.stages)) if not _untrained(matrix.stages[s])]
    named = [(s, trained_domain(matrix.stages[s], matrix.domains)) for s in trained]
    return [(s, matrix.domains.index(d)) for s, d in named if d is not None]


def score_at(matrix: Matrix, name: str, row: int, domain: str) -> Quantity:
    """S[row, domain] in points, Student t over prompts."""
    rewards_PG = matrix.rewards[row].get(domain)
    if rewards_PG is None:
        return Quantity(name, None, f"{domain} was not evaluated after {matrix.stages[row]}")
    return Quantity(name, statistics.clustered(rewards_PG).scaled(100, POINTS))


def difference(matrix: Matrix, name: str, domain: str, row: int, minus: int, detail: str = "") -> Quantity:
    """S[row, domain] − S[minus, domain] in points, paired over prompts."""
    for s in (row, minus):
        if domain not in matrix.rewards[s]:
            return Quantity(name, None, f"{domain} was not evaluated after {matrix.stages[s]}")
    paired = statistics.paired_difference(matrix.rewards[row][domain], matrix.rewards[minus][domain])
    return Quantity(name, paired.scaled(100, POINTS), detail=detail)


def average(name: str, terms: Sequence[Quantity]) -> Quantity:
    """Plain average over domains; none where one of them is missing, with its reason."""
    missing = [q.reason for q in terms if q.estimate is None]
    if missing:
        return Quantity(name, None, missing[0])
    return Quantity(name, statistics.independent_mean([q.estimate for q in terms if q.estimate is not None]))


def _arrays(record: Mapping[str, Any], key: str) -> Rewards:
    try:
        return {d: np.array([np.asarray(g, float) for g in x], float) for d, x in record.get(key, {}).items()}
    except ValueError:
        raise UserError(f"evaluation of {record['stage']}: prompts differ in their number of samples") from None


def _matrix(
    stages: tuple[str, ...],
    rewards: tuple[Rewards, ...],
    accuracy: tuple[Rewards, ...],
    seed: int | None,
) -> Matrix:
    domains = tuple(dict.fromkeys(d for row in rewards for d in row))
    for domain in domains:
        sizes = {row[domain].shape[0]: stage for stage, row in zip(stages, rewards, strict=True) if domain in row}
        if len(sizes) > 1:
            counts = ", ".join(f"{n} at {stage}" for n, stage in sizes.items())
            raise UserError(f"the stages evaluated {domain} on different numbers of prompts: {counts}")

    def table(block: tuple[Rewards, ...]) -> NDArray[np.float64]:
        cells = [[_points(row.get(d)) for d in domains] for row in block]
        return np.array(cells, float).reshape(len(stages), len(domains), 2)

    score_SDx2, accuracy_SDx2 = table(rewards), table(accuracy)
    return Matrix(
        stages, domains, rewards, accuracy, seed,
        score_SDx2[..., 0], score_SDx2[..., 1], accuracy_SDx2[..., 0], accuracy_SDx2[..., 1],
    )  # fmt: skip


def _points(rewards_PG: NDArray[np.float64] | None) -> tuple[float, float]:
    if rewards_PG is None:
        return np.nan, np.nan
    mean, stderr = statistics.clustered_mean(rewards_PG)
    return 100 * mean, 100 * stderr


def _untrained(stage: str) -> bool:
    return stage.startswith(("rollback-", "placebo-"))
