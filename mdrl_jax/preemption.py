"""SIGTERM, which schedulers send before they take a machine, ends a run in order.

The run asks `noticed` after each training step, saves, and raises `Stopped`; between pieces of work that is kept only
when it is finished it calls `check`. Where several processes run, all of them ask at the same places of the program:
JAX's service, which takes the signal then, tells all of them at the same one.

A second SIGTERM ends the process at once; where several processes run, once the first was noticed.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from mdrl_jax.parallel import distributed

STATUS = 128 + signal.SIGTERM
AGAIN = "start the same command again to go on"

_told = False  # the signal came; where several processes run: and all of them know it
_asked = 0  # how often; the same on every process


class Stopped(BaseException):
    """The run ends because of a SIGTERM; the message says where. No error: nothing that handles errors may stop it."""

    def __init__(self, where: str, saved: str):
        super().__init__(f"stopped by SIGTERM {where}; {saved}; {AGAIN}")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Takes SIGTERM over while it lasts; to be entered in the main thread."""
    global _told
    if distributed.count() > 1:
        yield
        return
    # The wake-up pipe is written to in the middle of a step or a compilation, when no Python handler can run.
    read, write = os.pipe()
    os.set_blocking(write, False)
    listener = threading.Thread(target=_listen, args=(read,), daemon=True)
    listener.start()
    pipe_before = signal.set_wakeup_fd(write)
    handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler_before)
        signal.set_wakeup_fd(pipe_before)
        os.close(write)
        listener.join()
        os.close(read)
        _told = False


def _listen(read: int) -> None:
    global _told
    for number in iter(lambda: os.read(read, 1), b""):
        if number[0] == signal.SIGTERM:
            if _told:
                os._exit(STATUS)  # reward workers end when their pipes close
            _told = True


def noticed() -> bool:
    """Whether the run is to end; every process asks at the same place of the program."""
    global _told, _asked
    if distributed.count() > 1 and not _told:
        from jax.experimental import multihost_utils

        _asked += 1
        _told = multihost_utils.reached_preemption_sync_point(_asked)
        if _told:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _told


def check(work: str) -> None:
    """Raises Stopped, naming the work, if the run is to end."""
    if noticed():
        raise Stopped(f"during {work}", "what was finished is saved")
