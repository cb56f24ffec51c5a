"""The command `seeds`: combines runs of one experiment with several seeds, as a table and as JSON."""

from collections.abc import Sequence
from pathlib import Path

from mdrl_jax.errors import UserError
from mdrl_jax.progress import printable
from mdrl_jax.records import write_bytes, write_json
from mdrl_jax.report.figures import locality
from mdrl_jax.report.tables import agreement, methods, pairs, rivals
from mdrl_jax.report.tables.seeds import summarise_seeds


def run(workdirs: Sequence[str], out: str | Path | None = None, plot: str | Path | None = None) -> None:
    """Prints means and intervals over seeds and, if there are any, comparisons of methods, pairs and analyses.

    There is no comparison of methods if no other method than the plain sequence was run, no verdict on the best average
    without a refresh, and no comparison of pairs unless domains were won back from two different places.

    Args:
      workdirs: one work folder for each seed.
      out: JSON file for the table (`SeedTable.record`), with the comparison of methods, if any, under "methods"
        (`MethodsTable.record`), the best average under "best_average" (`BestAverage.record`) and the pairs under
        "repairs" (`PairsTable.record`); None writes none.
      plot: PNG file for a plot of predicted against measured damage or, of runs with a stage `locality-A`, of the
        theory's validity against the length of an edit; None draws none.

    Raises:
      UserError: if there is no folder, a folder has no evaluations, a record is not valid JSON, the evaluations of a
        folder do not fit together, a `config.json` has fields or stages that this version does not know, the folders
        hold different experiments (their configurations differ in more than the seed), a seed occurs twice, only some
        of the folders have an analysis (an `analysis/damage.json`), one with an analysis lacks `claims.json`, or `plot`
        is given but no folder has an analysis and not all have the same record of `locality-A`.
      KeyError, ValueError: if a record lacks a field or a domain has no prompts.
      OSError: if `out` or `plot` cannot be written; the tables have been printed.
    """
    table, damage = summarise_seeds(workdirs), agreement.load(workdirs)
    picture = None
    if plot is not None:
        picture = agreement.picture(damage) if damage else locality.over_seeds(workdirs)
        if picture is None:
            raise UserError("--plot needs work folders with an analysis; run their stage analyze or locality-D first")
    runs = [methods.load(w) for w in workdirs]
    found = {
        "best_average": rivals.best_average(runs),
        "methods": methods.compare(runs),
        "repairs": pairs.compare(runs),
    }
    found = {name: x for name, x in found.items() if x is not None}
    texts = [table.text(), *(x.text() for x in found.values()), *([agreement.text(damage)] if damage else [])]
    print(printable("\n".join(texts)), end="")
    if plot is not None and picture is not None:
        write_bytes(plot, picture.png())
    if out is not None:
        write_json(out, table.record() | {name: x.record() for name, x in found.items()})
