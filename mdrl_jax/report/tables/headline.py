"""The run in one sentence: which domain fell most, after which stages, and what won it back."""

from collections.abc import Mapping

from mdrl_jax.report.intervals import words
from mdrl_jax.report.tables.matrix import Matrix, Quantity, own_rows, rows_on_the_way, training_rows
from mdrl_jax.report.tables.recovered import Recovery, recoveries
from mdrl_jax.report.tables.transfer import fall, lift


def headline(matrix: Matrix, steps: Mapping[str, int]) -> str:
    """One plain sentence on a run, with 95 % intervals over test prompts.

    Args:
      matrix: the scores.
      steps: number of training steps of each stage, by its name; a stage may be absent.

    Returns:
      For example "Math fell by 33.7 [30.1, 37.3] points after QA and CW; a refresh of 4 steps won back 87 %
      [80 %, 94 %] of it.". It names the trained domain that fell most until the last training stage, and of its
      refreshes and its rollbacks from there the ones with the largest recovery fraction. If no domain fell by its
      interval, or if only one was trained, the sentence says so. Without a trained domain it is "".
    """
    falls = {d: f.estimate for d in own_rows(matrix) if (f := fall(matrix, d)).estimate is not None}
    if not falls:
        return _only_lifts(matrix)
    worst = max(falls, key=lambda d: falls[d].value)
    name, lost = spoken(worst), falls[worst]
    size = words(lost.record(), ".1f")
    if lost.low <= 0:
        changed = words(lost.scaled(-1, lost.unit).record(), "+.1f")
        return f"No domain fell measurably; {name} changed most, by {changed} points, after {_after(matrix, worst)}."
    won = [text for text in (_best(matrix, worst, kind, steps) for kind in ("refresh", "rollback")) if text]
    won_back = f"; {' and '.join(won)} of it." if won else "."
    return f"{name} fell by {size} points after {_after(matrix, worst)}{won_back}"


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


def _after(matrix: Matrix, domain: str) -> str:
    rows = training_rows(matrix)
    later = dict.fromkeys(spoken(matrix.stages[s]) for s in rows if s > own_rows(matrix)[domain])
    *most, last = later
    return f"{', '.join(most)} and {last}" if most else last


def _best(matrix: Matrix, domain: str, kind: str, steps: Mapping[str, int]) -> str:
    def size(found: Recovery) -> float:
        return found.fraction.estimate.value if found.fraction.estimate is not None else float("-inf")

    end = training_rows(matrix)[-1]  # what the domain had lost before the end of the sequence is another loss
    own = [r for r in recoveries(matrix) if r.domain == domain and r.stage.startswith(kind + "-")]
    own = [r for r in own if end in rows_on_the_way(matrix, r.stage)]
    best = max(own, key=size, default=None)
    if best is None or best.fraction.estimate is None:
        return ""
    n = steps.get(best.stage, 0)
    how = "a rollback without training" if kind == "rollback" else "a refresh"
    if kind == "refresh" and n:
        how += f" of {n} step{'s' * (n > 1)}"
    return f"{how} won back {_percent(best.fraction)}"


def _percent(fraction: Quantity) -> str:
    return words(fraction.record(), ".0%").replace("%", " %")
