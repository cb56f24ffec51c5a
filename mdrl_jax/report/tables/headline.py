"""The run in one sentence: which domain fell most, after which stages, and what won it back."""

from collections.abc import Mapping
from itertools import pairwise

from mdrl_jax.report.intervals import words
from mdrl_jax.report.tables.matrix import Matrix, Quantity, difference, own_rows, rows_on_the_way, training_rows
from mdrl_jax.report.tables.recovered import Recovery, recoveries
from mdrl_jax.report.tables.transfer import fall, lift
from mdrl_jax.stats.estimate import LEVEL, Estimate, student


def headline(matrix: Matrix, steps: Mapping[str, int]) -> str:
    """One plain sentence on a run, with 95 % intervals over test prompts.

    Args:
      matrix: the scores.
      steps: number of training steps of each stage, by its name; a stage may be absent.

    Returns:
      For example "Math fell by 33.7 [30.1, 37.3] points after QA and CW; a refresh of 4 steps won back 87 %
      [80 %, 94 %] of it.". It names the trained domain that fell most until the last training stage, and of its
      refreshes and its rollbacks from there the ones with the largest recovery fraction. If no domain fell by its
      interval, the sentence says so, and names the stage that cost a domain trained before it most, if one did
      measurably (`stage_loss`). If only one domain was trained, it says so. Without a trained domain it is "".
    """
    falls = {d: f.estimate for d in own_rows(matrix) if (f := fall(matrix, d)).estimate is not None}
    if not falls:
        return _only_lifts(matrix)
    worst = max(falls, key=lambda d: falls[d].value)
    name, lost = spoken(worst), falls[worst]
    size = words(lost.record(), ".1f")
    if lost.low <= 0:
        if (found := stage_loss(matrix)) is not None:
            return f"No domain fell measurably below its own peak, but {_cost(matrix, *found, steps)}."
        changed = words(lost.scaled(-1, lost.unit).record(), "+.1f")
        return f"No domain fell measurably; {name} changed most, by {changed} points, after {_after(matrix, worst)}."
    won = [text for text in (_best(matrix, worst, kind, steps) for kind in ("refresh", "rollback")) if text]
    won_back = f"; {' and '.join(won)} of it." if won else "."
    return f"{name} fell by {size} points after {_after(matrix, worst)}{won_back}"


def stage_loss(matrix: Matrix) -> tuple[str, int, Estimate] | None:
    """The largest loss that one training stage measurably caused to a domain trained before it.

    A domain may be above its own peak when that stage begins, because another stage helped it. Of m such losses each is
    measured at the level 1 − 0.05/m (Bonferroni).

    Args:
      matrix: the scores.

    Returns:
      (domain, row of the stage, loss in points with its 95 % interval), or None if no loss is above 0 at that level.
    """
    rows, own = training_rows(matrix), own_rows(matrix)
    effects = [
        (d, now, difference(matrix, "", d, was, now)) for was, now in pairwise(rows) for d in own if own[d] < now
    ]
    losses = [(d, row, q.estimate) for d, row, q in effects if q.estimate is not None and q.estimate.n > 1]
    level = 1 - (1 - LEVEL) / max(len(losses), 1)

    def low(e: Estimate) -> float:
        return student(e.value, e.stderr or 0.0, e.n - 1, e.n, level=level).low

    return max((x for x in losses if low(x[2]) > 0), key=lambda x: x[2].value, default=None)


def spoken(domain: str) -> str:
    """A domain's name in a sentence: "QA" for qa, "Math" for math."""
    return domain.upper() if len(domain) <= 2 else domain.capitalize()


def _only_lifts(matrix: Matrix) -> str:
    lifts = {d: f for d in own_rows(matrix) if (f := lift(matrix, d)).estimate is not None}
    if not lifts:
        return ""
    domain, rose = next(iter(lifts.items()))
    size = words(rose.record(), "+.1f")
    return f"{spoken(domain)} changed by {size} points through its own stage; no stage followed it."


def _cost(matrix: Matrix, domain: str, row: int, loss: Estimate, steps: Mapping[str, int]) -> str:
    """Says how much a stage cost a domain, and the largest gain of a refresh of it from the end of the sequence."""
    said = f"{spoken(matrix.stages[row])} cost {spoken(domain)} {words(loss.record(), '.1f')} points"
    gains = [(r.stage, r.gain.estimate) for r in _from_the_end(matrix, domain, "refresh")]
    stage, gain = max(gains, key=lambda g: g[1].value if g[1] else float("-inf"), default=("", None))
    if gain is None:
        return said
    return f"{said}; {_refresh(steps.get(stage, 0))} gained {words(gain.record(), '.1f')} points"


def _refresh(n: int) -> str:
    return f"a refresh of {n} step{'s' * (n > 1)}" if n else "a refresh"


def _after(matrix: Matrix, domain: str) -> str:
    rows = training_rows(matrix)
    later = dict.fromkeys(spoken(matrix.stages[s]) for s in rows if s > own_rows(matrix)[domain])
    *most, last = later
    return f"{', '.join(most)} and {last}" if most else last


def _best(matrix: Matrix, domain: str, kind: str, steps: Mapping[str, int]) -> str:
    def size(found: Recovery) -> float:
        return found.fraction.estimate.value if found.fraction.estimate is not None else float("-inf")

    best = max(_from_the_end(matrix, domain, kind), key=size, default=None)
    if best is None or best.fraction.estimate is None:
        return ""
    how = "a rollback without training" if kind == "rollback" else _refresh(steps.get(best.stage, 0))
    return f"{how} won back {_percent(best.fraction)}"


def _from_the_end(matrix: Matrix, domain: str, kind: str) -> list[Recovery]:
    """The recoveries of a domain by one kind of stage that start at the end of the sequence or later.

    A domain that is won back earlier had lost something else.
    """
    end = training_rows(matrix)[-1]
    own = [r for r in recoveries(matrix) if r.domain == domain and r.stage.startswith(kind + "-")]
    return [r for r in own if end in rows_on_the_way(matrix, r.stage)]


def _percent(fraction: Quantity) -> str:
    return words(fraction.record(), ".0%").replace("%", " %")
