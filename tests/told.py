"""A `progress.Track` for tests: it records all reports and checks that a progress bar could show them."""

import contextlib
import dataclasses
from collections.abc import Iterator

from mdrl_jax.progress import Show


@dataclasses.dataclass
class Told:
    """The reports of the last step with each label.

    Attributes:
      totals: label -> number of pieces of the step.
      reports: label -> number of pieces done at each report.
    """

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
        """Whether the step reported each of its pieces exactly once, before it was done."""
        return self.reports[label] == list(range(self.totals[label]))
