"""Shows the text and the progress of a command on standard output, and its text in `log.txt`.

The mode changes standard output only; `log.txt` is the same in every mode.

| mode | standard output |
|---|---|
| screen | text, tables and progress bars; if it is not a terminal, plain text and every 30 s a line on a long step |
| quiet | only the final lines; warnings go to standard error |
| json | one JSON object a line: "event", "time" in seconds since the epoch, and the event's fields (`outputs`) |
"""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from mdrl_jax.parallel import distributed, preemption
from mdrl_jax.progress import Show, Step
from mdrl_jax.report.screen.outputs import OUTPUTS, WIDTH, Silent, shown, write


class Screen:
    """Prints to standard output and, without progress, to a log file; use as a context manager.

    If several processes run the same program, only the first one prints.

    Args:
      log: path of the log file, to which lines are added; None for no log.
      output: the mode, a key of `outputs.OUTPUTS`.

    Raises:
      KeyError: if `output` is no mode.
      OSError: if the log file cannot be opened. Its folder is made if needed.
    """

    def __init__(self, log: Path | None, output: str = "screen"):
        self._output = OUTPUTS[output]() if distributed.is_first() else Silent()
        self._stage: tuple[int, int, float | None, float] | None = None
        self._log = None
        if log is not None and distributed.is_first():
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = Console(file=open(log, "a", encoding="utf-8"), width=WIDTH, color_system=None)  # noqa: SIM115

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if isinstance(error, preemption.Stopped):
            self.print(str(error), final=True)
        if self._log is not None:
            self._log.file.close()

    def print(self, *renderables: Any, final: bool = False) -> None:
        """Prints to standard output and to the log file.

        Args:
          *renderables: text, which is shown as it is (`outputs.shown`), or rich renderables.
          final: marks the final lines, which mode quiet shows too.
        """
        renderables = tuple(shown(x) if isinstance(x, str) else x for x in renderables)
        self._output.show(*renderables, final=final)
        self._note(*renderables)

    def warn(self, text: str) -> None:
        """Prints one line of plain text, after "warning: ", in every mode and to the log file."""
        self._output.warn(text)
        self._note(shown(f"warning: {text}"))

    def event(self, name: str, **fields: Any) -> None:
        """Emits an event for programs; only mode json prints it, and the log file does not have it.

        Args:
          name: name of the event.
          **fields: its fields, which JSON can hold (the docstring of `outputs` lists them).

        Raises:
          TypeError: in mode json, if JSON cannot hold a field.
        """
        self._output.event(name, fields)

    def stage(self, index: int, n: int, mean: float | None) -> None:
        """Says beside every progress from now on how far the run is, and how long it still takes.

        Args:
          index: number of the stage that begins now, from 1.
          n: number of stages.
          mean: mean seconds of the stages before; None if there is no estimate.
        """
        self._stage = (index, n, mean, time.monotonic())

    def _overall(self, step: Step) -> str:
        if self._stage is None:
            return ""
        index, n, mean, begun = self._stage
        left = ""
        if mean is not None:  # this stage takes at least as long as the present step of it
            here = max(mean - (time.monotonic() - begun), step.left() or 0.0)
            left = f", run {datetime.timedelta(seconds=round(here + mean * (n - index)))} left"
        return f"  [stage {index} of {n}{left}]"

    def track(self, label: str, total: int, done: int, items: Iterable[tuple[int, str, Any]]) -> Iterator[Any]:
        """Shows a bar with the pieces done, the item's text and the time left, while the items are used.

        Args:
          label: name of the step.
          total: number of pieces in all.
          done: pieces that were done before.
          items: (pieces done with this item, text beside the bar, value) of each item. An item is asked for when the
            value before it was used.

        Yields:
          the value of each item.

        Raises:
          Exception: what `items` raises.
        """
        with self._watched(Step(label, total)) as show:
            show(done, "compiles its programs, once")
            for reached, text, value in items:
                show(reached, text)
                yield value

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Show]:
        """Shows a bar for work that reports its own progress.

        Args:
          label: name of the step.
          total: number of pieces; if it is 0, nothing is shown and no report raises.

        Yields:
          A function to call with (pieces done, what is being done). The first report may start above 0, if pieces were
          done before this run. If the work ends without an error, the bar ends at `total`.

        Raises:
          preemption.Stopped: in a report, or in place of `preemption.Dropped`, if the run was asked to stop.
        """
        step = Step(label, total)
        if not total:
            yield step.report
            return
        with self._watched(step) as show:
            last = ""

            def report(done: int, text: str) -> None:
                nonlocal last
                preemption.check(label)
                last = text
                show(done, text)

            try:
                yield report
            except preemption.Dropped:
                raise preemption.Stopped(f"during {label}") from None
            show(total, last)

    @contextlib.contextmanager
    def _watched(self, step: Step) -> Iterator[Show]:
        with preemption.during(step.label), self._output.watch(step) as tell:

            def show(done: int, text: str) -> None:
                step.report(done, text)
                step.text += self._overall(step)
                tell()

            yield show

    def _note(self, *renderables: Any) -> None:
        if self._log is not None:
            write(self._log, *renderables)
            self._log.file.flush()
