"""Looks at a stage while it trains: scores of some of its steps, in a file that is written after each look.

A refresh or a distillation (`refresh/tracker.py`) and a stage with a target (`stages/target.py`) end by these scores. A
step that is in the file already, because the run was killed after it, is not measured again.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.stats.estimate import Record


class Looks:
    """The record of the looks at one stage.

    Attributes:
      record: the record so far, as in the file: "settings", "steps" (one row for each look, with its "costs") and other
        fields, among them "costs" of what was measured before the first look.
      new: whether there was no file, so that this run begins the record.

    Args:
      file: where the record is read from, if the file exists, and written to.
      record: the record before the first look, with "steps" []. Its "settings" are all that the rows depend on. Two of
        them say which steps are looked at: the multiples of "every", and the last step, "steps".
      measure: (step, parameters) -> the row of a step; a dictionary with "step", JSON-able.
      judge: adds to a record with a new row, among other fields, "stopped": why the stage ends with this row, in words;
        "" if it goes on.
      what: what the record is of, for messages, such as "a refresh".
      meter: starts to measure costs, and returns a function that reads them (`recovery.spent.metered`).

    Raises:
      UserError: if the file has other settings or is not valid JSON.
    """

    def __init__(
        self,
        file: Path,
        record: Record,
        measure: Callable[[int, Any], Record],
        judge: Callable[[Record], None],
        what: str,
        meter: Callable[[], Callable[[], dict[str, float]]],
    ):
        self.file, self.measure, self.judge, self.meter = file, measure, judge, meter
        self.record, self.new = record, not file.exists()
        self._found: list[Counter[str]] = []
        if self.new:
            return
        settings, self.record = record["settings"], records.read_json(file)
        self._found = [Counter(x.get("costs", {})) for x in (self.record, *self.record["steps"])]
        before = self.record["settings"]
        if before != settings:
            names = {**settings, **before}
            name = next(k for k in names if k not in before or k not in settings or before[k] != settings[k])
            raise UserError(
                f"{file} holds {what} with another {name}: delete the file to start over, or undo the change"
            )

    def due(self, step: int) -> bool:
        """Whether a step is looked at: every multiple of "every" in the settings, and the last step."""
        settings = self.record["settings"]
        return step % settings["every"] == 0 or step == settings["steps"]

    def look(self, step: int, params: Any) -> str:
        """Measures and records a step, and says whether the stage ends with it. Steps come in their order.

        Args:
          step: number of the step; one that is `due`.
          params: the parameters after it.

        Returns:
          The reason to end, in words; "" if the stage goes on.

        Raises:
          The errors of `measure`; the step is not recorded then.
          KeyError: if the record has no "stopped", because no step has been judged.
        """
        rows = self.record["steps"]
        if step not in [row["step"] for row in rows]:
            read = self.meter()
            row = self.measure(step, params)
            rows.append(row | {"costs": read()})
            self.judge(self.record)
            self.write()
        return self.record["stopped"] if step == rows[-1]["step"] else ""

    def paid(self, known: int | None) -> Counter[str]:
        """The costs of the looks that an earlier run made and that the caller has not counted, in the units of `meter`.

        Args:
          known: number of looks that the caller has counted, together with what was measured before the first look;
            None if it has counted nothing.
        """
        return sum(self._found[known + 1 if known is not None else 0 :], Counter())

    def write(self) -> None:
        """Writes the record to the file."""
        records.write_json(self.file, self.record)
