"""A `progress.Track` for tests: notes every step, and holds each to what a bar needs."""

import contextlib
import dataclasses
from collections.abc import Iterator

from mdrl_jax.progress import Show


@dataclasses.dataclass
class Told:
    """The last step of each label: how many pieces in all, and how many were done at each report."""

    totals: dict[str, int] = dataclasses.field(default_factory=dict)
    reports: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Show]:
        self.totals[label], self.reports[label] = total, []

        def show(done: int, text: str) -> None:
            assert text
            assert max(self.reports[label], default=0) <= done < total, f"{label}: {done} of {total}"
            self.reports[label].append(done)

        yield show

    def counted(self, label: str) -> bool:
        """Whether each piece of a step was reported once, at its start."""
        return self.reports[label] == list(range(self.totals[label]))
