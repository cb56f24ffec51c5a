"""The folder of compiled programs of every run that a test starts: most of these runs compile the same programs."""

import os
import shutil
import tempfile
from collections.abc import Callable

FOLDER = "MDRL_TESTS_COMPILED"  # environment variable that names it


def make(add_cleanup: Callable[[Callable[[], None]], None]) -> None:
    """Makes the folder, unless a parent process has made it; workers and children inherit the variable."""
    if FOLDER not in os.environ:
        folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="mdrl-compiled-")
        add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
