"""Where a command's text, events and progress go: a terminal, plain lines, the final lines only, or JSON lines.

The events and their fields: message {text}; progress {label, done, total, text, seconds_left}; scores {rows}; claims
{claims}; program {topology, model, and the record of a program that the command `fit` compiled}; done {seconds, and
fields of the command such as the folder that it wrote}. A number that is not finite becomes null.
"""

import contextlib
import io
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from mdrl_jax.progress import Step, printable

WIDTH = 100  # columns of text that does not go to a terminal
LINE_SECONDS = 30.0  # between lines on a long step
EVENT_SECONDS = 1.0  # between progress events of a step
BOX = re.compile("[\u2500-\u257f]")  # characters that draw the lines of tables


class Output(Protocol):
    """Where text, events and progress go."""

    def show(self, *renderables: Any, final: bool) -> None:
        """Shows text or rich renderables.

        Args:
          *renderables: text with the markup of rich, or rich renderables.
          final: marks the final lines of a command.
        """
        ...

    def warn(self, text: str) -> None:
        """Shows one line of plain text that must not be missed, after "warning: "."""
        ...

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Emits an event for programs; only `JsonLines` writes it.

        Args:
          name: name of the event.
          fields: its fields, which JSON can hold.
        """
        ...

    def watch(self, step: Step) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Shows a step while it lasts; yields a function to call after each report of the step."""
        ...


class Terminal:
    """A terminal: text, tables, and a progress bar of the current step."""

    def __init__(self) -> None:
        self.console = stdout_console()

    def show(self, *renderables: Any, final: bool) -> None:
        write(self.console, *renderables)

    def warn(self, text: str) -> None:
        write(self.console, shown(f"warning: {text}", style="yellow"))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def watch(self, step: Step) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(step),
            # In a narrow terminal only this column is cut, so that the numbers before it stay whole.
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as bars:
            label, text = step.shown()
            bar = bars.add_task(label, total=step.total, completed=step.done, text=text)
            yield lambda: bars.update(bar, completed=step.done, text=step.shown()[1])


class Lines(Terminal):
    """Output that is not a terminal: text and tables without bars.

    A long step prints a line on its progress every 30 s, even in the middle of a piece.
    """

    @contextlib.contextmanager
    def watch(self, step: Step) -> Iterator[Callable[[], None]]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(LINE_SECONDS):
                self.show(Text(step.line()), final=False)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield lambda: None
        finally:
            over.set()
            thread.join()


class Quiet(Terminal):
    """Only the final lines on standard output; warnings go to standard error."""

    def show(self, *renderables: Any, final: bool) -> None:
        if final:
            super().show(*renderables, final=final)

    def warn(self, text: str) -> None:
        print(printable(f"warning: {text}"), file=sys.stderr)

    @contextlib.contextmanager
    def watch(self, step: Step) -> Iterator[Callable[[], None]]:
        yield lambda: None


class Silent(Quiet):
    """Prints nothing, for a process whose text another process prints."""

    def show(self, *renderables: Any, final: bool) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


class JsonLines:
    """Events as JSON, one object a line; each line is written immediately."""

    def show(self, *renderables: Any, final: bool) -> None:
        self.event("message", {"text": plain(*renderables)})

    def warn(self, text: str) -> None:
        self.event("message", {"text": printable(f"warning: {text}")})

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        line = {"event": name, "time": time.time(), **_finite(fields)}
        print(json.dumps(line, allow_nan=False), flush=True)

    @contextlib.contextmanager
    def watch(self, step: Step) -> Iterator[Callable[[], None]]:
        last = -math.inf

        def tell() -> None:
            nonlocal last
            if time.monotonic() - last >= EVENT_SECONDS:
                last = time.monotonic()
                self.event("progress", step.record())

        try:
            yield tell
        finally:
            self.event("progress", step.record())


def screen() -> Output:
    """A new output of the mode screen: bars if standard output is an interactive terminal, otherwise plain lines."""
    return Terminal() if stdout_console().is_interactive else Lines()


OUTPUTS: dict[str, Callable[[], Output]] = {"screen": screen, "quiet": Quiet, "json": JsonLines}


def stdout_console() -> Console:
    """A new rich console on standard output. If that is not a terminal, it has no colours and is 100 columns wide."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=WIDTH, color_system=None, force_terminal=False, force_interactive=False, force_jupyter=False)


def shown(text: str, style: str = "") -> Text:
    """A text without markup and without commands to the terminal (`printable`), in a style of rich.

    Every text that may come from data, from a completion or from a record is shown in this form.
    """
    return Text(printable(text), style=style)


def write(console: Console, *renderables: Any) -> None:
    """Prints text with the markup of rich, or rich renderables, to a console.

    If the console is not a terminal, text is not wrapped, so a line stays one line, however long.
    """
    whole = not console.is_terminal and all(isinstance(x, str | Text) for x in renderables)
    console.print(*renderables, highlight=False, crop=False, soft_wrap=whole)


def plain(*renderables: Any) -> str:
    """The text of rich renderables as it would be printed: no colours, table borders, empty lines or wrapping.

    In a text argument the markup of rich is interpreted and leaves no trace. Lines are joined by line breaks, without
    one at the end.
    """
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(*renderables, highlight=False)
    lines = (BOX.sub("", line).rstrip() for line in captured.get().splitlines())
    return "\n".join(line for line in lines if line)


class _TimeLeft(ProgressColumn):
    """The time left by the step's own estimate. That of rich forgets pieces that took longer than half a minute."""

    def __init__(self, step: Step):
        super().__init__()
        self.step = step

    def render(self, task: Task) -> Text:
        return Text(f"{self.step.left_text()} left")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
