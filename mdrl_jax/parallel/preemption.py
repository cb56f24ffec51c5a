"""Ends a run in order after SIGTERM, which schedulers send before they take a machine away, or after Ctrl-C.

A machine may be gone 30 seconds after its notice, so the run acts at once:

- `until_ready` and `give_up_if_told` end the wait for a device or for rewards: they raise `Dropped`. Training then
  saves its last complete step and drops the unfinished one, whose draws come again from their keys.
- `noticed` is called after each training step, and `check` between two pieces of other work.
- Where no such call comes within `PATIENCE` seconds, for example during a compilation, the process ends all the same,
  unless it holds training steps that are not saved (`unsaved`). Nothing is lost then: records are written whole, so a
  run can be killed at any moment.

If a run has several processes, JAX's coordination service receives the signal. All processes must call these functions
at the same places of the program, and all of them learn at the same call that the run must end. There the run waits for
every device program that has begun, except for the sampler.

A second signal ends the process at once. With several processes this holds once the run has noticed the first one.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mdrl_jax.parallel import distributed

STATUS = 128 + signal.SIGTERM
AGAIN = "start the same command again to go on"
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
PATIENCE = 5.0  # seconds from a signal until a process that does not stop in order is ended
LONGEST_SLEEP = 0.05  # seconds between two looks at whether a device is done

_told = False  # whether the signal has come and, with several processes, all of them know
_by = signal.SIGTERM  # the signal that came
_asked = 0  # number of questions to JAX's service; the same on every process
_watching = False
_work = ""  # what is being done, for the message
_unsaved = False
_whole = False


class Stopped(BaseException):
    """Ends the run because of a signal; the message says where and what is saved.

    It is a BaseException so that no `except Exception` catches it.

    Args:
      where: the place in the work, such as "after step 3 of math".
      saved: a clause that says what is saved, such as "what was finished is saved".
    """

    def __init__(self, where: str, saved: str = "what was finished is saved"):
        super().__init__(f"stopped by {SIGNALS[_by]} {where}; {saved}; {AGAIN}")


class Dropped(Stopped):
    """Ends a piece of work in its middle. Whoever knows what the piece belongs to catches it and raises `Stopped`."""

    def __init__(self) -> None:
        super().__init__("while completions were sampled and judged")


def status() -> int:
    """The exit status of a run that ended by `Stopped`: 128 + the number of the signal, 143 or, for Ctrl-C, 130."""
    return 128 + _by


@contextlib.contextmanager
def watch(patience: float = PATIENCE) -> Iterator[None]:
    """Makes the functions of this module see SIGTERM and Ctrl-C inside the `with` block.

    Afterwards the signals have their earlier handlers again. A `watch` inside another one does nothing. So does one
    with several processes, because JAX's service receives SIGTERM; in a block that was entered before the processes
    joined, Ctrl-C becomes a SIGTERM.

    Args:
      patience: seconds from a signal until the process is ended, if it has not stopped in order and nothing is
        `unsaved`.

    Raises:
      ValueError: if the block is entered outside the main thread; nothing has changed then.
    """
    global _told, _watching, _by
    if _watching or distributed.count() > 1:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("only the main thread can watch for a signal")
    # During a step or a compilation no Python signal handler can run, but the wake-up pipe is written to even then.
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(read, patience, over), daemon=True)
    listener.start()
    pipe_before = signal.set_wakeup_fd(write)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    _watching = True
    try:
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(write)
        listener.join()
        os.close(read)
        _told, _watching, _by = False, False, signal.SIGTERM


def _listen(read: int, patience: float, over: threading.Event) -> None:
    global _told, _by
    for number in iter(lambda: os.read(read, 1), b""):
        came = number[0]
        if came not in SIGNALS:
            continue
        if distributed.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # only Ctrl-C arrives here: SIGTERM is JAX's
        elif _told:
            os._exit(128 + came)  # the reward workers end by themselves when their pipes close
        else:
            _by, _told = signal.Signals(came), True
            threading.Thread(target=_end, args=(patience, over), daemon=True).start()


def _end(patience: float, over: threading.Event) -> None:
    """Ends the process once its patience is over and nothing is unsaved."""
    while not over.wait(patience):
        if not _unsaved:
            print(Stopped(f"during {_work}" if _work else "at its start"), file=sys.stderr, flush=True)
            os._exit(status())


@contextlib.contextmanager
def during(work: str) -> Iterator[None]:
    """Names the work of the block in the message of a process that is ended because it does not stop in order."""
    global _work
    before, _work = _work, work
    try:
        yield
    finally:
        _work = before


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
    """Marks the time in which the process holds training steps that would be lost if it ended without saving them."""
    global _unsaved
    before, _unsaved = _unsaved, True
    try:
        yield
    finally:
        _unsaved = before


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Marks work that must not be dropped in its middle: `until_ready` and `give_up_if_told` raise nothing inside."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def told() -> bool:
    """Whether a signal has come. With several processes the answers of different processes may differ for seconds."""
    return _told or distributed.told()


def noticed() -> bool:
    """Whether the run must end because of a signal; all processes must call this at the same place of the program.

    With one process it sees a signal only inside `watch`, and once it is True it stays True until `watch` ends; outside
    it is always False. With several processes it needs no `watch`, and once it is True it stays True until the process
    ends. From then on a second signal ends the process at once.

    Raises:
      ValueError: with several processes, if the call that first finds True is made outside the main thread.
    """
    global _told, _asked
    if distributed.count() > 1 and not _told:
        from jax.experimental import multihost_utils

        _asked += 1
        _told = multihost_utils.reached_preemption_sync_point(_asked)
        if _told:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
    return _told


def check(work: str) -> None:
    """Ends the run between two pieces of work if a signal has come; like `noticed`, to be called by all processes.

    Args:
      work: what is being done, for the message "stopped by SIGTERM during WORK; ...".

    Raises:
      Stopped: if the run must end.
      ValueError: as in `noticed`.
    """
    if noticed():
        raise Stopped(f"during {work}")


def until_ready(tree: Any) -> None:
    """Waits until the devices have computed arrays, or gives up when a signal comes; to be called by all processes.

    Args:
      tree: a tree of `jax.Array`s.

    Raises:
      Dropped: if the run must end, on all processes; the devices may still be computing then.
      HostLost: if another process does not come within the time-out.
    """
    import jax

    arrays, started = jax.tree.leaves(tree), time.monotonic()
    while not all(x.is_ready() for x in arrays) and (_whole or not told()):
        time.sleep(min(LONGEST_SLEEP, (time.monotonic() - started) / 50))
    if not _whole and any(distributed.share(told())):
        raise Dropped


def give_up_if_told() -> None:
    """Ends a wait of this process alone if a signal has come; the caller has to tell the other processes.

    Raises:
      Dropped: if a signal has come.
    """
    if told() and not _whole:
        raise Dropped
