"""Compares rates of work: one job done by this package and by other libraries, timed in interleaved rounds.

`bench/step.py`, `decode.py`, `train.py` and `start.py` make the tasks and the lines; `measure.rounds` times them.
"""

import dataclasses
import importlib.metadata
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from mdrl_jax.errors import UserError
from mdrl_jax.stats.bootstrap import cluster_bootstrap


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table: the rate of one task, and how it compares with the rate of another.

    Attributes:
      what: name of the task, and text of the line.
      amount: units of work in one call of the task.
      unit: the unit of work, in the plural.
      faster: name of the task whose rate is divided by this one's; "": the line has no ratio.
      least: the smallest ratio that is acceptable; None: no such aim.
      most: the largest ratio that is acceptable; None: no such aim.
      packages: distributions that the task runs, whose versions belong to the figure.
      reason: why nothing is measured; "": it is measured.
    """

    what: str
    amount: float = 1.0
    unit: str = ""
    faster: str = ""
    least: float | None = None
    most: float | None = None
    packages: tuple[str, ...] = ()
    reason: str = ""


def records(bench: str, entries: Sequence[Entry], seconds: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The records of a benchmark, of plain data.

    Args:
      bench: name of the benchmark.
      entries: the lines of its table.
      seconds: name of a task -> seconds in each round, from `measure.rounds`.

    Returns:
      one record for each entry, in the same order. "what", "unit", "faster", "least", "most" and "reason" repeat the
      entry. "seconds" is the median over rounds, "rate" the amount divided by it, "repeats" the number of rounds.
      "ratio" is the rate of `faster` divided by this one, and "ratio_ci95" its 95 % interval by a bootstrap over whole
      rounds, [-inf, inf] with one round. "versions" are those of the packages. What is not known is None.

    Raises:
      KeyError: if an entry that has no reason names a task that was not timed.
    """
    amount = {entry.what: entry.amount for entry in entries}
    out = []
    for entry in entries:
        record: dict[str, Any] = {"bench": bench, "what": entry.what, "unit": entry.unit or None}
        record |= dict.fromkeys(("seconds", "rate", "ratio", "ratio_ci95", "repeats"))
        if not entry.reason:
            median = float(np.median(seconds[entry.what]))
            record |= {"seconds": median, "rate": entry.amount / median, "repeats": len(seconds[entry.what])}
            if entry.faster:
                work = amount[entry.faster] / entry.amount

                def ratio(slow: np.ndarray, fast: np.ndarray, work: float = work) -> float:
                    return float(work * np.median(slow) / np.median(fast))

                found = cluster_bootstrap(ratio, [seconds[entry.what], seconds[entry.faster]])
                record |= {"ratio": found.value, "ratio_ci95": [found.low, found.high]}
        versions = {name: importlib.metadata.version(name) for name in entry.packages} if not entry.reason else None
        record |= {"faster": entry.faster or None, "least": entry.least, "most": entry.most}
        out.append(record | {"versions": versions, "reason": entry.reason or None})
    return out


def table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    """A table of the records of one benchmark, one row for each, in their order.

    The columns are the task, its seconds, its rate, the ratio, its 95 % interval, and the aim. A ratio with an aim is
    green if it meets the aim, else red. The caption names the versions of the packages.

    Args:
      title: heading of the table.
      found: from `records`. The row of one with a "reason" has its name and the reason alone.

    Returns:
      the table.

    Raises:
      KeyError: if a record lacks a field.
    """
    used = {name: version for record in found for name, version in (record["versions"] or {}).items()}
    shown = Table(title=title, caption=", ".join(f"{name} {version}" for name, version in used.items()))
    shown.add_column("", no_wrap=True)
    for header in ("seconds", "rate", "ratio", "95 %", "aim"):
        shown.add_column(header, justify="right", no_wrap=True)
    for record in found:
        if record["reason"]:
            shown.add_row(f"{record['what']}: {record['reason']}")
            continue
        rate = f"{record['rate']:,.4g} {record['unit']}/s" if record["unit"] else ""
        ratio = interval = aim = ""
        if record["ratio"] is not None:
            least, most = record["least"], record["most"]
            met = (least is None or record["ratio"] >= least) and (most is None or record["ratio"] <= most)
            colour = "green" if met else "red"
            aimed = least is not None or most is not None
            ratio = f"[{colour}]{record['ratio']:.2f}[/]" if aimed else f"{record['ratio']:.2f}"
            interval = "{:.2f} to {:.2f}".format(*record["ratio_ci95"])
            aim = " ".join(f"{sign} {value:g}" for sign, value in (("≥", least), ("≤", most)) if value is not None)
        shown.add_row(record["what"], f"{record['seconds']:.3g}", rate, ratio, interval, aim)
    return shown


class Stepped:
    """Runs another library's training loop in a thread, one step at a time.

    Such a loop cannot be called step by step. Its thread calls `wait` before each step and `done` after it; the main
    thread calls the object, which lets the loop make one step and waits for its end.
    """

    def __init__(self, run: Callable[["Stepped"], Any]) -> None:
        """Prepares a loop; the first call starts it.

        Args:
          run: the whole loop. It gets this object.
        """
        self._go: queue.Queue[None] = queue.Queue()
        self._ended: queue.Queue[BaseException | None] = queue.Queue()
        self._run = run
        self._thread: threading.Thread | None = None

    def wait(self) -> None:
        """Called by the loop before a step: returns when the next step may begin."""
        self._go.get()

    def done(self) -> None:
        """Called by the loop after a step."""
        self._ended.put(None)

    def _loop(self) -> None:
        try:
            self._run(self)
        except BaseException as e:
            self._ended.put(e)
        else:
            self._ended.put(UserError("the library's training loop ended before the benchmark"))

    def __call__(self) -> None:
        """Makes one step.

        Raises:
          BaseException: whatever the loop raises.
          UserError: if the loop has ended.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, daemon=True)
            self._thread.start()
        self._go.put(None)
        error = self._ended.get()
        if error is not None:
            raise error
