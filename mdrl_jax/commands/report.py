"""The command `report`: builds the report page of a work folder from the records that are there."""

from mdrl_jax.report import page


def run(workdir: str) -> None:
    """Writes the folder `report/` in a work folder and prints the path of the page (`report.page.write`).

    A record that is missing or damaged is no error: the page says so in place of the figure.

    Args:
      workdir: the work folder of a run, which need not have ended.

    Raises:
      UserError: if `workdir` is not a folder.
      ValueError: if a chart cannot be drawn as PNG, or if a text has a lone surrogate.
    """
    print(page.write(workdir))
