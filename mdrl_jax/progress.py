"""Progress reports of long computations, independent of how they are shown, and texts that are safe to show.

A computation receives a `Track`. It opens a step with a label and a number of pieces, and reports each piece when it
starts:

    with track("fit", len(jobs)) as show:
        for done, job in enumerate(jobs):
            show(done, job.name)
            ...

The `Track` of a run (`Screen.steps`) checks at every report whether the run must end, and then raises
`preemption.Stopped`.
"""

import datetime
import time
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Show = Callable[[int, str], None]  # (number of pieces done, text about the current piece)
Track = Callable[[str, int], AbstractContextManager[Show]]  # (label, total number of pieces)


_JOINERS = "\u200c\u200d"  # of category Cf, but scripts and emoji need them


def printable(text: str) -> str:
    r"""Returns a text in which a terminal finds no command: control characters become escapes such as `\x1b`.

    Texts of data, completions and file names of others must pass through it on their way to a terminal. Otherwise they
    could move the cursor, set colours, hide links or reverse the direction of writing. All characters of the Unicode
    categories Cc, Cf, Cs, Zl and Zp are escaped, also the carriage return, except the line feed, the tab and the
    zero-width joiner and non-joiner. Backslashes stay as they are, so the text cannot be turned back.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(character: str) -> bool:
    kind = unicodedata.category(character)
    return character in "\n\t" or character in _JOINERS or kind not in ("Cc", "Cf", "Cs", "Zl", "Zp")


class Step:
    """The progress of one long step, and an estimate of the time it still needs.

    The estimate is (time per piece so far) × (pieces left). Pieces that the first report counts as done were finished
    before this run and do not enter the time per piece. The first piece, during which programs are compiled, enters
    only until a second one is done.

    Args:
      label: name of the step.
      total: number of pieces, those that were done before this run included.
      clock: gives the time in seconds, from any start.

    Attributes:
      label: as given.
      total: as given.
      done: number of pieces done by the latest report; 0 before the first.
      text: text of the latest report; "" before the first.
    """

    def __init__(self, label: str, total: int, clock: Callable[[], float] = time.monotonic):
        self.label, self.total, self.done, self.text = label, total, 0, ""
        self._clock = clock
        # (time, pieces done) of the first report, of the first one after a finished piece, and of the latest one.
        self._reports: list[tuple[float, int]] = []

    def report(self, done: int, text: str) -> None:
        """Notes the progress; to be called at the start and whenever a piece is done or the text changes.

        Args:
          done: number of pieces done in all, not since the last report; never smaller than in an earlier report.
          text: about the current piece.
        """
        if not self._reports or done > self.done:
            self._reports = [*self._reports[:2], (self._clock(), done)]
        self.done, self.text = done, text

    def left(self) -> float | None:
        """Estimated seconds until the step ends, at least 0; None until a piece is done after the first report."""
        if len(self._reports) < 2:
            return None
        (begun, before), (ended, done) = self._reports[-2:]
        needed = (ended - begun) / (done - before) * (self.total - done)
        return max(0.0, needed - (self._clock() - ended))

    def left_text(self) -> str:
        """The estimated time left as hours, minutes and seconds, `0:03:20`; `-:--:--` if there is no estimate yet.

        From 24 hours on the text begins with the days: `1 day, 2:03:20`.
        """
        left = self.left()
        return "-:--:--" if left is None else str(datetime.timedelta(seconds=round(left)))

    def line(self) -> str:
        """Label, pieces, text and time left as one line of plain text (`printable`)."""
        label, text = self.shown()
        return f"{label} {self.done}/{self.total}  {text}  {self.left_text()} left"

    def shown(self) -> tuple[str, str]:
        """(label, text), each in the form in which a terminal may show it: on one line, and `printable`."""
        label, text = (printable(" ".join(x.splitlines())) for x in (self.label, self.text))
        return label, text

    def record(self) -> dict[str, Any]:
        """The fields of a progress event for `--output=json`: "label", "done", "total", "text" and "seconds_left".

        "label" and "text" are as given, not `printable`. "seconds_left" has one decimal; it is None if there is no
        estimate yet.
        """
        left = self.left()
        fields = {name: getattr(self, name) for name in ("label", "done", "total", "text")}
        return fields | {"seconds_left": None if left is None else round(left, 1)}
