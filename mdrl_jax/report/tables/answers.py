"""Single answers of a run: which of them were lost or gained between two stages, and pass@k (definitions §2)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mdrl_jax.report.tables.matrix import Matrix, own_rows, start_row, trained_domain, training_rows
from mdrl_jax.stats import estimate as statistics
from mdrl_jax.stats.estimate import Estimate, Record, missing
from mdrl_jax.stats.transitions import Answers, Transitions, pass_at_k, right, transitions

ONE = "a prompt has a single answer, so that nothing says what other sampling keys change"


@dataclasses.dataclass(frozen=True)
class Change:
    """What happened to the answers of a domain between two stages.

    Attributes:
      domain: the domain.
      before, after: names of the two stages.
      found: the shares, in points.
    """

    domain: str
    before: str
    after: str
    found: Transitions

    def record(self) -> Record:
        """The change as JSON: "domain", "before", "after", and the record of each figure of `Transitions`.

        The null of "lost" and "gained" is `Transitions.resampled`; the null of the differences is 0.
        """
        t = self.found
        null = None if t.resampled is None else t.resampled.value
        beyond = {"lost_beyond": t.lost_beyond, "gained_beyond": t.gained_beyond}
        return {
            "domain": self.domain,
            "before": self.before,
            "after": self.after,
            "lost": t.lost.record(null),
            "gained": t.gained.record(null),
            "net": t.net.record(0.0),
            "resampled": missing(ONE, "points") if t.resampled is None else t.resampled.record(),
            **{name: missing(ONE, "points", null=0.0) if e is None else e.record(0.0) for name, e in beyond.items()},
        }


def answers(matrix: Matrix, row: int, domain: str) -> Answers | None:
    """Which answers of a domain are right after a stage.

    Args:
      matrix: the scores.
      row: the row of the stage, from 0.
      domain: the domain.

    Returns:
      bool [P, G], by prompt and sample; None if the domain was not evaluated after the stage.
    """
    rewards_PG = matrix.rewards[row].get(domain)
    return None if rewards_PG is None else right(rewards_PG, matrix.right.get(domain, 1.0))


def change(matrix: Matrix, domain: str, before: int, after: int) -> Change | None:
    """What happened to the answers of a domain between two stages.

    Args:
      matrix: the scores.
      domain: the domain.
      before, after: rows of the stages, from 0.

    Returns:
      The change; None if the domain was not evaluated after one of them, or with other numbers of samples.
    """
    first, second = (answers(matrix, row, domain) for row in (before, after))
    if first is None or second is None or first.shape != second.shape:
        return None
    found = transitions(first, second, matrix.groups.get(domain))
    return Change(domain, matrix.stages[before], matrix.stages[after], found)


def all_changes(matrix: Matrix) -> list[Change]:
    """The changes of every domain between every two stages, the earlier row first."""
    rows = range(len(matrix.stages))
    found = [change(matrix, d, s, t) for d in matrix.domains for s in rows for t in rows if s < t]
    return [c for c in found if c is not None]


def steps(matrix: Matrix) -> list[Change]:
    """The changes of every domain through each stage, from where the stage started; stages in order."""
    found = []
    for after, stage in enumerate(matrix.stages):
        before = start_row(matrix, stage)
        if before is not None:
            found += [change(matrix, domain, before, after) for domain in matrix.domains]
    return [c for c in found if c is not None]


def headlines(matrix: Matrix) -> list[Change]:
    """The changes that a run is about: of each domain from its peak to T, and of each domain that was to be recovered.

    T is the last training stage; a domain that was trained last has no change to it. A refresh or rollback is compared
    with where it started.
    """
    rows, found = training_rows(matrix), []
    found += [change(matrix, domain, own, rows[-1]) for domain, own in own_rows(matrix).items() if own != rows[-1]]
    for after, stage in enumerate(matrix.stages):
        domain, before = trained_domain(stage, matrix.domains), start_row(matrix, stage)
        if stage.startswith(("refresh-", "rollback-")) and domain is not None and before is not None:
            found.append(change(matrix, domain, before, after))
    return [c for c in found if c is not None]


def passes(matrix: Matrix, row: int, domain: str) -> dict[int, Estimate]:
    """pass@k of a domain after a stage (`pass_at_k`).

    Args:
      matrix: the scores.
      row: the row of the stage, from 0.
      domain: the domain.

    Returns:
      by k, for k = 1, 2, 4, … and the number of samples, pass@k in points with the interval of a score
      (`estimate.score`); {} if the domain was not evaluated after the stage.
    """
    found = answers(matrix, row, domain)
    if found is None:
        return {}
    n = found.shape[1]
    ks = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
    return {k: statistics.score(pass_at_k(found, k), matrix.groups.get(domain)) for k in ks}


def lost_answers(matrix: Matrix, domain: str, before: int, after: int, most: int) -> tuple[list[tuple[int, int]], int]:
    """Answers that were right after one stage and wrong after another, drawn at random with a fixed seed.

    Args:
      matrix: the scores.
      domain: the domain.
      before, after: rows of the stages; the domain was evaluated after both, with as many samples.
      most: the largest number of answers.

    Returns:
      (prompt, sample) of the drawn answers, in ascending order, at most `most`; and the number of all that were lost.
    """
    first, second = (answers(matrix, row, domain) for row in (before, after))
    assert first is not None and second is not None
    lost = np.argwhere(first & ~second)
    drawn = np.random.default_rng(0).permutation(len(lost))[:most]
    return [(int(p), int(k)) for p, k in lost[np.sort(drawn)]], len(lost)


def records(changes: Sequence[Change], matrix: Matrix) -> dict[str, Any]:
    """The record `transitions.json`: the thresholds of right answers, by domain, and the changes."""
    return {
        "right": {d: matrix.right.get(d, 1.0) for d in matrix.domains},
        "transitions": [c.record() for c in changes],
    }
