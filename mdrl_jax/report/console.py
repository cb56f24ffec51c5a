"""What a person sees: the terminal with progress bars, and the same without them in `log.txt`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Screen:
    """Prints to the terminal and to `log.txt`; use as a context manager."""

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(log, "a", encoding="utf-8")  # noqa: SIM115
        self.terminal = Console()
        self.log = Console(file=self._file, width=120)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def print(self, *renderables: Any) -> None:
        """Shows text or rich renderables in both places."""
        for console in (self.terminal, self.log):
            console.print(*renderables, highlight=False)
        self._file.flush()

    def track(self, label: str, total: int, done: int, items: Iterable[tuple[int, str, Any]]) -> Iterator[Any]:
        """Passes on each item of (done, text, value) while a bar shows `done` of `total`, text and time left."""
        with self._bar() as progress:
            task = progress.add_task(label, total=total, completed=done, text="compiling")
            for done, text, value in items:
                progress.update(task, completed=done, text=text)
                yield value

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar for work that reports its own progress: yields (steps done, text) -> None."""
        with self._bar() as progress:
            task = progress.add_task(label, total=total, text="")
            yield lambda done, text: progress.update(task, completed=done, text=text)

    def _bar(self) -> Progress:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.terminal, transient=True)


def print_plain(renderable: Any) -> None:
    """Shows one rich renderable on standard output."""
    Console().print(renderable, highlight=False)
