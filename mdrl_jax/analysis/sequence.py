"""The checkpoints of an analysis: names, domains and starts, in the order of training.

The stage `analyze` fills these classes from a work folder, the command `analyze` from Hugging Face folders. Everything
else in `analysis/` sees only this description.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint at the end of a stage that trained one domain.

    Attributes:
      name: of the stage, and of its checkpoint.
      domain: the domain that was trained.
      start: the name of the checkpoint that training started from; `BASE` is the model that was loaded.
    """

    name: str
    domain: str
    start: str


@dataclasses.dataclass(frozen=True)
class Supervised(Trained):
    """A checkpoint at the end of a supervised stage of one domain.

    Attributes:
      target: the name of the checkpoint whose score the stage had to reach; "" for none.
    """

    target: str


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """All checkpoints of an analysis.

    Attributes:
      stages: the sequence, in the order of training.
      solos: stages that trained one domain from θ_0 alone.
      params: reads the parameters of a checkpoint (`BASE`, or the name of any stage).
      supervised: supervised stages that trained one domain, at most one stage of each domain.
      looks: (name of one of `supervised` with a target) -> the record of its looks (`stages/target.py`).
      random_signs: (name of one of `stages` or `solos`) -> the figures of its edit if every entry of every
        update had had a random sign (`edits.edit_figures`); None if the stage did not record them.
      origin: the name of θ_0, the checkpoint that the sequence starts from: `BASE`, or the end of a supervised warm-up.
    """

    stages: tuple[Trained, ...]
    solos: tuple[Trained, ...]
    params: Callable[[str], Any]
    supervised: tuple[Supervised, ...] = ()
    looks: Callable[[str], Mapping[str, Any]] = lambda name: {}
    random_signs: Callable[[str], Mapping[str, Any] | None] = lambda name: None
    origin: str = BASE

    @property
    def points(self) -> tuple[str, ...]:
        """The names of the checkpoints at which completions are sampled, each once.

        Returns:
          θ_0, then the start and the end of each stage of the sequence, in order.
        """
        return tuple(dict.fromkeys((self.origin, *(name for s in self.stages for name in (s.start, s.name)))))

    def own(self, domain: str) -> Trained:
        """The last stage of the sequence that trained a domain. Its end is the domain's peak θ*_i (definitions §1).

        Raises:
          StopIteration: if no stage of the sequence trained it.
        """
        return next(s for s in reversed(self.stages) if s.domain == domain)

    def later(self, domain: str) -> tuple[Trained, ...]:
        """The stages of the sequence after a domain's own stage.

        Args:
          domain: the domain.

        Returns:
          the stages after `own(domain)`, in order.

        Raises:
          StopIteration: if the domain has no stage of its own.
        """
        return self.stages[self.stages.index(self.own(domain)) + 1 :]

    def edit(self, domain: str) -> tuple[str, Trained]:
        """The stage that gives a domain's edit (definitions §3), and its kind.

        Returns:
          ("solo", the domain's solo stage) if it has one, otherwise ("sequential", `own(domain)`).

        Raises:
          StopIteration: if no stage at all trained it.
        """
        solo = next((s for s in self.solos if s.domain == domain), None)
        return ("solo", solo) if solo else ("sequential", self.own(domain))

    @property
    def domains(self) -> tuple[str, ...]:
        """Trained domains, in the order of their own stages."""
        return tuple(sorted({s.domain for s in self.stages}, key=lambda d: self.stages.index(self.own(d))))
