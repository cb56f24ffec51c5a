"""What is seen of a command at work; `log.txt` has the same whatever the output is.

| output | standard output |
|---|---|
| screen | text, tables and bars; where it is no terminal, plain text, and every 30 s a line on a long step |
| quiet | the final lines alone; warnings go to standard error |
| json | one JSON object a line: "event", "time" in seconds since the epoch, and the event's fields (`outputs`) |
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mdrl_jax import preemption
from mdrl_jax.parallel import distributed
from mdrl_jax.progress import Show, Step
from mdrl_jax.report.screen.outputs import OUTPUTS, WIDTH, Silent, write


class Screen:
    """Prints to an output and, without progress, to `log.txt` if there is one; use as a context manager.

    Of several processes that run the same program the first one prints.
    """

    def __init__(self, log: Path | None, output: str = "screen"):
        self._output = OUTPUTS[output]() if distributed.is_first() else Silent()
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
        """Shows text or rich renderables in both places; `final`: part of what the command ends with."""
        self._output.show(*renderables, final=final)
        self._note(*renderables)

    def warn(self, text: str) -> None:
        """Shows one line that must not be missed."""
        self._output.warn(text)
        self._note(Text(f"warning: {text}"))

    def event(self, name: str, **fields: Any) -> None:
        """Tells programs; people do not see it."""
        self._output.event(name, fields)

    def track(self, label: str, total: int, done: int, items: Iterable[tuple[int, str, Any]]) -> Iterator[Any]:
        """Passes on each item of (done, text, value) while a bar shows `done` of `total`, text and time left."""
        with self._watched(Step(label, total)) as show:
            show(done, "compiling")
            for reached, text, value in items:
                show(reached, text)
                yield value

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Show]:
        """A bar for work that reports its own progress: yields (pieces done, what is being done) -> None.

        The first report may say that pieces were done before. Where nothing fails, all are done at the end. A report
        raises `preemption.Stopped` where the run is to end.
        """
        step = Step(label, total)
        if not total:
            yield step.report
            return
        with self._watched(step) as show:

            def report(done: int, text: str) -> None:
                preemption.check(label)
                show(done, text)

            yield report
            show(total, step.text)

    @contextlib.contextmanager
    def _watched(self, step: Step) -> Iterator[Show]:
        with self._output.watch(step) as tell:

            def show(done: int, text: str) -> None:
                step.report(done, text)
                tell()

            yield show

    def _note(self, *renderables: Any) -> None:
        if self._log is not None:
            write(self._log, *renderables)
            self._log.file.flush()
