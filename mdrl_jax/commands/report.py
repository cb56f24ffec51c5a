"""The command `report`: builds the report page of a work folder from the records that are there."""

from pathlib import Path

from mdrl_jax.errors import UserError
from mdrl_jax.report import page


def run(workdir: str) -> None:
    """Writes the folder `report/` in a work folder and prints the path of the page (`report.page.write`).

    A record that is missing or damaged is no error: the page says so in place of the figure.

    Args:
      workdir: the work folder of a run, which need not have ended.

    Raises:
      UserError: if `workdir` is not a folder, or not one of a run or an analysis.
      OSError: if a file cannot be written.
      ValueError: if a chart cannot be drawn as PNG, or if a text has a lone surrogate.
    """
    if Path(workdir).is_dir() and not (Path(workdir) / "config.json").exists():
        raise UserError(f"{workdir} has no config.json, so it is not the work folder of a run; name one")
    print(page.write(workdir))
