"""The command `report`: builds the report page of a work folder from the records that are there."""

from mdrl_jax.report import page


def run(workdir: str) -> None:
    """Writes the folder `report/` in a work folder and prints the path of the page.

    Args:
      workdir: the work folder of a run, which need not have ended.

    Raises:
      UserError: if `workdir` is not a folder. Damaged records are reported on the page.
    """
    print(page.write(workdir))
