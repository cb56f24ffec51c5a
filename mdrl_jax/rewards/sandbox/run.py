"""Runs an untrusted Python program against tests that it must not see.

Each program takes two processes. The guest (`guest.py`) holds the program. It runs in a sandbox of its own
(`isolation.py`) with limits on CPU time, address space, file size, open files and threads. The tester (`tester.py`) is
a fork of this process. It holds the tests and asks the guest for values over a pipe.

The tester compares plain data outside the sandbox. A program that exits early, prints, patches its interpreter or
searches its memory therefore finds no verdict that it could change. The main limit is on CPU time, so that the verdict
does not depend on how loaded the machine is. A generous wall-clock deadline ends programs that wait.

Three weaknesses remain: tests that ask the program itself for a verdict (see `tester.py`), defects of the kernel, and,
without bubblewrap (bwrap), the kinds of isolation that `isolation.warn` reports as missing.
"""

import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from mdrl_jax.rewards.sandbox import isolation, tester

Outcome = Literal["ok", "failed", "timeout", "memory", "deadline", "crashed"]

_REAP_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
      cpu_seconds: CPU time of the program, and as much again of its tests. Rounded up to whole seconds, the unit of the
        kernel's limit.
      memory_mb: address space in MiB, of which the interpreter takes about 30. Not enforced on macOS.
      deadline_seconds: wall-clock time; None is 20 times the CPU time, and at least 10 s.

    Raises:
      ValueError: if a limit is not above 0.
    """

    cpu_seconds: float = 5.0
    memory_mb: int = 1024
    deadline_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.memory_mb, self.deadline) <= 0:
            raise ValueError(f"every limit must be above 0: {self}")

    @property
    def deadline(self) -> float:
        """The wall-clock limit in seconds."""
        default = max(10.0, 20 * self.cpu_seconds)
        return default if self.deadline_seconds is None else self.deadline_seconds


_limits = Limits()
_sandbox = "best"


def configure(limits: Limits, sandbox: str = "best") -> None:
    """Sets the limits and the sandbox for the later runs of this process.

    A reward worker calls it once, when it starts.

    Args:
      limits: what a run may use.
      sandbox: "best" or "bwrap"; it is checked when a program runs.
    """
    global _limits, _sandbox
    _limits, _sandbox = limits, sandbox


def run(program: str, tests: Sequence[str], limits: Limits | None = None, sandbox: str | None = None) -> Outcome:
    """Runs a program as `__main__` in a new sandbox, and the tests against it outside the sandbox.

    Args:
      program: Python source.
      tests: Python sources, run in this order in one namespace.
      limits: what the run may use; None takes those of `configure`.
      sandbox: "best" or "bwrap"; None takes that of `configure`.

    Returns:
      "ok" if the program and every test ran without an exception; "failed" if one of them raised, was not valid Python
      or exited early; "timeout" if the CPU time was used up; "memory" if there was not enough memory; "deadline" if the
      wall-clock deadline came first; "crashed" if a signal ended the program or the tests.

    Raises:
      RuntimeError: if the sandbox could not be set up.
      UserError: if `sandbox` is "bwrap" and bubblewrap does not work here, or if no sandbox works here.
    """
    guest = _take(isolation.choose(sandbox or _sandbox).kind)
    try:
        return _watch(guest, program, tests, limits or _limits)
    finally:
        guest.end()


def prepare() -> None:
    """Starts the sandbox of the next run ahead of time. Does nothing before the first run. `close` ends the sandbox."""
    global _spare
    if _spare is None and _kind is not None:
        _spare = _Guest(_kind)


def close() -> None:
    """Ends the sandbox that `prepare` started, if it still waits for a program."""
    global _spare
    if _spare is not None:
        _spare.end()
        _spare = None


def _take(kind: str) -> "_Guest":
    global _spare, _kind
    _kind, guest, _spare = kind, _spare, None
    if guest is not None and (guest.kind != kind or guest.process.poll() is not None):
        guest.end()
        guest = None
    return guest or _Guest(kind)


class _Guest:
    """A started sandbox and, without bwrap, the folder that it may write to."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = tempfile.mkdtemp(prefix="mdrl-") if kind == "bare" else ""
        self.process = isolation.start(kind, self.folder)

    def end(self) -> None:
        """Kills the process group of the sandbox. With bwrap, every process in its process namespace ends with it."""
        process = self.process
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait(_REAP_SECONDS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


_spare: _Guest | None = None
_kind: str | None = None  # the kind of the last run's sandbox


def _watch(sandbox: _Guest, program: str, tests: Sequence[str], limits: Limits) -> Outcome:
    guest = sandbox.process
    assert guest.stdin and guest.stdout and guest.stderr
    end = time.monotonic() + limits.deadline
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        first = isolation.settings(
            {
                "cpu_seconds": limits.cpu_seconds,
                "memory_mb": limits.memory_mb,
                "deadline_seconds": limits.deadline,
            },
            bare=sandbox.kind == "bare",
        )
        _tester(guest.stdout.fileno(), guest.stdin.fileno(), write_fd, first, program, tests, limits)
    try:
        os.close(write_fd)
        ready = select.select([read_fd], [], [], max(0.0, end - time.monotonic()))[0]
        verdict = os.read(read_fd, 4096).decode() if ready else "deadline"
    finally:
        os.close(read_fd)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    match verdict:
        case "ok" | "failed" | "memory" | "deadline":
            return verdict
        case "":
            return _reason(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else 1)
        case "gone":
            guest.kill() if guest.poll() is None and not _ends(guest) else None
            return _reason(guest.wait())
    errors = os.read(guest.stderr.fileno(), 2000).decode(errors="replace") if _ends(guest) else ""
    raise RuntimeError(" ".join(f"{verdict} {errors}".split()))


def _ends(guest: subprocess.Popen[bytes]) -> bool:
    """Whether a guest that has closed its pipe ends by itself within half a second."""
    try:
        guest.wait(0.5)
        return True
    except subprocess.TimeoutExpired:
        return False


def _reason(code: int) -> Outcome:
    """Returns the outcome of a process that ended before there was a verdict.

    Args:
      code: its exit status; negative for a signal. bwrap instead exits with 128 + the number of the guest's signal.
    """
    number = -code if code < 0 else code - 128
    if number in (signal.SIGXCPU, signal.SIGKILL):  # the kernel kills a process that ignores SIGXCPU
        return "timeout"
    if number == signal.SIGALRM:
        return "deadline"
    return "crashed" if number > 0 else "failed"


def _tester(
    read_fd: int, write_fd: int, verdict_fd: int, first: bytes, program: str, tests: Sequence[str], limits: Limits
) -> NoReturn:
    """The body of the forked process that holds the tests: sets its own limits, runs the tests, writes the verdict.

    Args:
      read_fd, write_fd: the pipes from and to the guest.
      verdict_fd: the pipe for the verdict.
      first: the settings, which are the first line that the guest reads.
      program: Python source.
      tests: Python sources.
      limits: what the tests may use.
    """
    verdict = ""
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # undo the handler that the worker has installed
        signal.setitimer(signal.ITIMER_REAL, limits.deadline + 1)  # ends this process even if its parent has died
        seconds = math.ceil(limits.cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        if sys.platform != "darwin":
            size = _mapped_bytes() + (limits.memory_mb << 20)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # a test that prints must not reach the worker's pipes
            os.dup2(null, fd)
        try:
            os.write(write_fd, first)
        except OSError:
            pass  # the guest has ended; `tester.judge` notices when it reads
        verdict = tester.judge(read_fd, write_fd, program, tests)
    except BaseException as e:
        verdict = f"setup {type(e).__name__}: {e}"
    finally:
        os.write(verdict_fd, verdict.encode()[:4000])
        os._exit(0)


def _mapped_bytes() -> int:
    """The address space of this process in bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
