"""`report`: the page of a work folder, built anew from what is there."""

from mdrl_jax.report import page


def run(workdir: str) -> None:
    """Writes `report/` of a work folder and says where the page is.

    Raises:
      UserError: if `workdir` is not a folder.
    """
    print(page.write(workdir))
