"""`seeds`: one experiment over several seeds, as a plain table and as JSON."""

from collections.abc import Sequence
from pathlib import Path

from mdrl_jax.records import write_json
from mdrl_jax.report.seeds import summarise_seeds


def run(workdirs: Sequence[str], out: str | Path | None = None) -> None:
    """Prints the table of one work folder a seed; writes it to `out` as JSON where given.

    Raises UserError for a folder without evaluations or a seed that comes twice.
    """
    table = summarise_seeds(workdirs)
    print(table.text(), end="")
    if out is not None:
        write_json(out, table.record())
