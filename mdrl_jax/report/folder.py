"""Reads the records of a work folder for the report, at any moment of a run. A missing record raises `Absent`."""

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.records import regular
from mdrl_jax.report import tensorboard
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.matrix import Matrix

# Who writes the records whose path starts with a prefix. The first prefix that fits counts.
MADE_BY = {
    "analysis/locality-": "a stage such as `locality-math` writes it",
    "analysis/circuits-": "a stage such as `circuits-math` writes it",
    "analysis/": "the stage `analyze` or the command `analyze` writes it",
    "recovery/refresh-": "a stage such as `refresh-math` writes it",
    "recovery/distill-": "a stage such as `distill-math` writes it",
    "recovery/alternate-": "a stage such as `alternate-math-qa` writes it",
    "recovery/rollback-": "a stage such as `rollback-math-qa` writes it",
    "recovery/plan": "the stage `plan` writes it",
    "recovery/outcomes": "the stage `trials` writes it",
    "recovery/orders": "the stage `orders` writes it",
    "recovery/": "stages such as `refresh-…`, `distill-…` and `rollback-…` write it",
    "claims.json": "an analysis, a refresh or a rollback writes it",
    "evaluations": "every stage of a run writes one when it is done",
    "config.json": "a run writes it when it begins",
    "costs": "every stage of a run writes one when it is done",
    "tensorboard": "every training stage writes them",
    "samples": "every stage of a run writes one when it is done",
    "completions": "every stage of a run with `evaluate.keep_texts` writes one when it is done",
}


class Absent(Exception):
    """The work folder lacks something that the report would show. The message says what, and how to get it."""


# What `Records.matrix` raises. A figure that only adds scores to its own records is shown without them.
UNSCORED = (Absent, UserError, KeyError, ValueError)


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one work folder. Each JSON document and the score matrix are read once and kept.

    A later call returns the same object, so callers must not change it. Every method raises Absent if the record is
    missing, and UserError if it is not valid JSON or no regular file, or if it is missing and no stage writes a record
    of this name (`MADE_BY`). No method checks which fields a record has.
    """

    root: Path
    _read: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def json(self, path: str) -> Any:
        """One JSON document.

        Args:
          path: its path in the folder, e.g. `analysis/damage.json`.

        Returns:
          the document, of plain data.

        Raises:
          Absent, UserError: as the class says.
        """
        if path not in self._read:
            if not (self.root / path).exists():
                raise Absent(f"{path} is not there: {_made_by(path)}")
            self._read[path] = records.read_json(regular(self.root / path))
        return self._read[path]

    def jsonl(self, path: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file, read anew in each call.

        Args:
          path: its path in the folder, e.g. `samples/01-math.jsonl`.

        Returns:
          the rows, in the order of the file.

        Raises:
          Absent, UserError: as the class says.
        """
        if not (self.root / path).exists():
            raise Absent(f"{path} is not there: {_made_by(path)}")
        return records.read_jsonl(regular(self.root / path))

    def files(self, pattern: str) -> list[str]:
        """Paths that match a glob pattern, relative to the folder and sorted; at least one.

        Args:
          pattern: the pattern, relative to the folder, e.g. `costs/*.json`.

        Raises:
          Absent: if no path matches.
        """
        found = sorted(str(p.relative_to(self.root)) for p in self.root.glob(pattern))
        if not found:
            raise Absent(f"{pattern} is not there: {_made_by(pattern)}")
        return found

    def curves(self, tags: Collection[str]) -> dict[str, dict[str, dict[int, float]]]:
        """The curves that the training stages logged, read anew in each call.

        Args:
          tags: names of the curves, e.g. "train/reward".

        Returns:
          By folder of the stage, `NN-stage`, in the order of the stages; by tag and by step the value.

        Raises:
          Absent: if no stage has logged one of the curves.
          UserError: if an event file is no regular file.
        """
        folders = sorted(path for path in self.root.glob("tensorboard/[0-9]*-*") if path.is_dir())
        found = {path.name: made for path in folders if (made := tensorboard.scalars(path, tags))}
        if not found:
            raise Absent(f"tensorboard has no curves of a stage: {MADE_BY['tensorboard']}")
        return found

    def matrix(self) -> Matrix:
        """The score matrix S[t, i] of the run (definitions §2).

        Raises:
          Absent: if there are no evaluations.
          UserError, KeyError, ValueError: as in `tables.matrix.load`.
        """
        return self._matrix

    @functools.cached_property
    def _matrix(self) -> Matrix:
        self.files("evaluations/*.json")
        return matrices.load(self.root)


def _made_by(path: str) -> str:
    for start, text in MADE_BY.items():
        if path.startswith(start):
            return text
    raise UserError(f"no stage writes {path}")
