"""How a long computation says how far it is, and how long the rest takes, whoever shows it."""

import datetime
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Show = Callable[[int, str], None]  # (pieces done, what is being done)
Track = Callable[[str, int], AbstractContextManager[Show]]  # (label, pieces in all)


class Step:
    """How far a long step is, and how long the rest takes at the pace of its pieces so far.

    What the first report says is done was done before and tells nothing of the pace; nor does the first piece, in which
    programs are compiled, once there are others.
    """

    def __init__(self, label: str, total: int, clock: Callable[[], float] = time.monotonic):
        self.label, self.total, self.done, self.text = label, total, 0, ""
        self._clock = clock
        self._reports: list[tuple[float, int]] = []  # the first one, the first one after a piece, the last one

    def report(self, done: int, text: str) -> None:
        """Notes that `done` pieces are done, and what is being done."""
        if not self._reports or done > self.done:
            self._reports = [*self._reports[:2], (self._clock(), done)]
        self.done, self.text = done, text

    def left(self) -> float | None:
        """Seconds; None before a piece is done."""
        if len(self._reports) < 2:
            return None
        (begun, before), (ended, done) = self._reports[-2:]
        needed = (ended - begun) / (done - before) * (self.total - done)
        return max(0.0, needed - (self._clock() - ended))

    def left_text(self) -> str:
        """`0:03:20`, or `-:--:--`."""
        left = self.left()
        return "-:--:--" if left is None else str(datetime.timedelta(seconds=round(left)))

    def line(self) -> str:
        """All of it as plain text."""
        return f"{self.label} {self.done}/{self.total}  {self.text}  {self.left_text()} left"

    def record(self) -> dict[str, Any]:
        """The fields of a progress event."""
        left = self.left()
        fields = {name: getattr(self, name) for name in ("label", "done", "total", "text")}
        return fields | {"seconds_left": None if left is None else round(left, 1)}
