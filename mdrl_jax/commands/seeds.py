"""`seeds`: one experiment over several seeds, as a plain table and as JSON."""

from collections.abc import Sequence
from pathlib import Path

from mdrl_jax.errors import UserError
from mdrl_jax.records import write_json
from mdrl_jax.report.tables import agreement, methods
from mdrl_jax.report.tables.seeds import summarise_seeds


def run(workdirs: Sequence[str], out: str | Path | None = None, plot: str | Path | None = None) -> None:
    """Prints the table of one work folder a seed, and what their analyses say together, if they have any.

    The table goes to `out` as JSON, predicted against measured damage to `plot` as PNG, where given. Raises UserError
    for a folder without evaluations, a seed that comes twice, or a plot of folders without an analysis.
    """
    table, damage = summarise_seeds(workdirs), agreement.load(workdirs)
    if plot is not None and not damage:
        raise UserError("--plot needs folders with an analysis; run their stage analyze first")
    compared = methods.compare(workdirs)
    print(table.text(), end="")
    if compared:
        print("\n" + compared.text(), end="")
    if damage:
        print("\n" + agreement.text(damage), end="")
    if plot is not None:
        agreement.save_plot(plot, damage)
    if out is not None:
        write_json(out, table.record() | ({"methods": compared.record()} if compared else {}))
