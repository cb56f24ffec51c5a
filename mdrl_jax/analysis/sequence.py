"""What is analysed: checkpoints in the order they were trained, however that was done."""

import dataclasses
from collections.abc import Callable
from typing import Any

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint of the sequence: its name, the domain it was trained on, and where it started."""

    name: str
    domain: str
    start: str


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """What is analysed: stages in the order they were trained, solo stages, and how parameters are read by name."""

    stages: tuple[Trained, ...]
    solos: tuple[Trained, ...]
    params: Callable[[str], Any]

    def own(self, domain: str) -> Trained:
        """The stage a domain peaks at: its last."""
        return next(s for s in reversed(self.stages) if s.domain == domain)

    def later(self, domain: str) -> tuple[Trained, ...]:
        """Stages after the domain's own."""
        return self.stages[self.stages.index(self.own(domain)) + 1 :]

    def edit(self, domain: str) -> tuple[str, Trained]:
        """("solo" or "sequential", stage) of a domain's edit: solo where there is one (definitions §3)."""
        solo = next((s for s in self.solos if s.domain == domain), None)
        return ("solo", solo) if solo else ("sequential", self.own(domain))

    @property
    def domains(self) -> tuple[str, ...]:
        """Trained domains, in the order of their own stages."""
        return tuple(sorted({s.domain for s in self.stages}, key=lambda d: self.stages.index(self.own(d))))
