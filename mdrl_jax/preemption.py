"""Ends a run in order after SIGTERM, which schedulers send before they take a machine away.

After each training step the run calls `noticed`; if the signal has come, it saves a checkpoint and raises `Stopped`.
Other work is only saved when a piece of it is finished, so there the run calls `check` between two pieces, which raises
`Stopped` at once.

If a run has several processes, JAX's coordination service receives the signal. All processes must call `noticed` at the
same places of the program, and the service answers all of them with True at the same call.

A second SIGTERM ends the process at once. With several processes this holds once the run has noticed the first one.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from mdrl_jax.parallel import distributed

STATUS = 128 + signal.SIGTERM
AGAIN = "start the same command again to go on"

_told = False  # whether the signal has come and, with several processes, all of them know
_asked = 0  # number of questions to JAX's service; the same on every process


class Stopped(BaseException):
    """Ends the run because of a SIGTERM; the message says where and what is saved.

    It is a BaseException so that no `except Exception` catches it.

    Args:
      where: the place in the work, such as "after step 3 of math".
      saved: a clause that says what is saved, such as "what was finished is saved".
    """

    def __init__(self, where: str, saved: str):
        super().__init__(f"stopped by SIGTERM {where}; {saved}; {AGAIN}")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Makes `noticed` see a SIGTERM inside the `with` block; afterwards the signal has its earlier handler again.

    With several processes it does nothing, because JAX's service receives the signal.

    Raises:
      ValueError: if the block is entered outside the main thread; nothing has changed then.
    """
    global _told
    if distributed.count() > 1:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("only the main thread can watch for a SIGTERM")
    # During a step or a compilation no Python signal handler can run, but the wake-up pipe is written to even then.
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
                os._exit(STATUS)  # the reward workers end by themselves when their pipes close
            _told = True


def noticed() -> bool:
    """Whether the run must end because of a SIGTERM; all processes must call this at the same place of the program.

    With one process it sees a signal only inside `watch`, and once it is True it stays True until `watch` ends; outside
    it is always False. With several processes it needs no `watch`, and once it is True it stays True until the process
    ends. From then on a second SIGTERM ends the process at once.

    Raises:
      ValueError: with several processes, if the call that first finds True is made outside the main thread.
    """
    global _told, _asked
    if distributed.count() > 1 and not _told:
        from jax.experimental import multihost_utils

        _asked += 1
        _told = multihost_utils.reached_preemption_sync_point(_asked)
        if _told:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _told


def check(work: str) -> None:
    """Ends the run between two pieces of work if a SIGTERM has come; like `noticed`, to be called by all processes.

    Args:
      work: what is being done, for the message "stopped by SIGTERM during WORK; ...".

    Raises:
      Stopped: if the run must end.
      ValueError: as in `noticed`.
    """
    if noticed():
        raise Stopped(f"during {work}", "what was finished is saved")
