"""Runs Python sources that nobody has read, in a forked child with limits.

The child has its own session, limits on CPU time, address space, file size and open files, no
standard input or output, an empty folder to work in, no environment, and may not start processes,
signal others or use the network. CPU time is counted, not wall-clock time, so that a verdict does
not depend on how loaded the machine is; the wall clock is a generous backstop.

The verdict comes over a pipe: "ok" is a random token that the child writes only after every source
has run, so that leaving early or printing cannot score. The guard is against accidents and lazy
cheats: sources run in the interpreter that holds the token, so one that searches its memory, or
calls native code, can still escape. Isolation by the kernel belongs in `_fork`, behind `run`.
"""

import bisect  # noqa: F401
import copy  # noqa: F401
import fcntl
import heapq  # noqa: F401
import itertools  # noqa: F401
import math
import os
import random
import resource
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import types
import typing  # noqa: F401
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

# The unused imports above are those that programs ask for most: a child inherits them from the
# worker, where loading typing alone would cost each child more than its fork.

Outcome = Literal["ok", "failed", "timeout", "memory", "deadline", "crashed"]

_VERDICT_FD = 3
_FILE_BYTES = 1 << 20
_OPEN_FILES = 64
_MOST_FDS = 1 << 16  # closed in one system call where the system has it
_FORBIDDEN = frozenset(
    "os.fork os.forkpty os.system os.exec os.posix_spawn os.spawn pty.spawn subprocess.Popen "
    "os.kill os.killpg socket.connect socket.bind socket.sendto socket.getaddrinfo".split()
)


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    cpu_seconds: rounded up to whole seconds, the unit of the kernel's limit.
    memory_mb: address space in MiB beyond what the worker itself maps (not enforced on macOS).
    deadline_seconds: wall clock; by default 20 times the CPU time, and at least 10 s.
    """

    cpu_seconds: float = 5.0
    memory_mb: int = 1024
    deadline_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.memory_mb, self.deadline) <= 0:
            raise ValueError(f"limits must be positive: {self}")

    @property
    def deadline(self) -> float:
        """The wall-clock limit in seconds."""
        default = max(10.0, 20 * self.cpu_seconds)
        return default if self.deadline_seconds is None else self.deadline_seconds


_limits = Limits()


def configure(limits: Limits) -> None:
    """Sets the limits of this process's runs; a reward worker does so once, when it starts."""
    global _limits
    _limits = limits


def run(sources: Sequence[str], limits: Limits | None = None) -> Outcome:
    """Runs the sources one after the other in one namespace, as `__main__`, in a new process.

    "ok": all ran without an exception. "failed": one raised, was not Python, or left early.
    "timeout": CPU time used up. "memory": out of memory. "deadline": the wall clock ran out first.
    "crashed": ended by a signal. Raises RuntimeError if the child could not be set up.
    """
    limits = limits or _limits
    folder = tempfile.mkdtemp(prefix="mdrl-")
    try:
        return _fork(sources, limits, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fork(sources: Sequence[str], limits: Limits, folder: str) -> Outcome:
    token = secrets.token_bytes(16)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(sources, limits, folder, write_fd, token)
    ended = None
    verdict = b""
    try:
        os.close(write_fd)
        poller = select.poll()
        poller.register(read_fd, select.POLLIN)
        end = time.monotonic() + limits.deadline
        while (left := end - time.monotonic()) > 0:
            if poller.poll(min(50.0, 1000 * left)):
                verdict = os.read(read_fd, 4096)
                break
            # The pipe stays open while a process that the child left behind holds it.
            pid_ended, status, usage = os.wait4(pid, os.WNOHANG)
            if pid_ended:
                ended = status, usage
                if poller.poll(0):  # written since the first look
                    verdict = os.read(read_fd, 4096)
                break
        else:
            verdict = b"deadline"
    finally:
        os.close(read_fd)
        _kill(pid, reaped=ended is not None)
        if ended is None:
            ended = os.wait4(pid, 0)[1:]
    if secrets.compare_digest(verdict, token):
        return "ok"
    if verdict.startswith(b"setup "):
        raise RuntimeError(f"the sandbox could not be set up: {verdict[6:].decode()}")
    return _reason(verdict, *ended, limits)


def _reason(verdict: bytes, status: int, usage: resource.struct_rusage, limits: Limits) -> Outcome:
    """The outcome of a run without the token."""
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    used = usage.ru_utime + usage.ru_stime
    if ended_by == signal.SIGXCPU or used >= math.ceil(limits.cpu_seconds):
        return "timeout"
    if verdict == b"deadline" or ended_by == signal.SIGALRM:
        return "deadline"
    if verdict == b"memory":
        return "memory"
    # A child that closed the pipe and then had to be killed has failed, not crashed.
    return "crashed" if ended_by not in (0, signal.SIGKILL) and not verdict else "failed"


def _kill(pid: int, reaped: bool) -> None:
    """Kills the child's process group, and the child if it has not made its group yet."""
    for kill in (os.killpg,) if reaped else (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _child(sources: Sequence[str], limits: Limits, folder: str, write_fd: int, token: bytes) -> NoReturn:
    # Taken before the sources run: they may rebind any of these names in their modules.
    write, leave, out_of_memory, anything = os.write, os._exit, MemoryError, BaseException
    try:
        _redirect(write_fd)
        write_fd = _VERDICT_FD
        _confine(limits, folder)
    except BaseException as e:
        write(write_fd, f"setup {type(e).__name__}: {e}".encode()[:4000])
        leave(1)
    verdict = b"failed"
    try:
        _execute(sources)
        verdict = token
    except out_of_memory:
        verdict = b"memory"
    except anything:
        pass
    try:
        write(_VERDICT_FD, verdict)
    finally:
        leave(0)


def _execute(sources: Sequence[str], run: Any = exec) -> None:
    """Compiles all sources, then runs them; `run` is bound early, as in `_child`."""
    # optimize=0: under PYTHONOPTIMIZE every assert would vanish, and every program pass.
    compiled = [compile(s, "<program>", "exec", dont_inherit=True, optimize=0) for s in sources]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for code in compiled:
        run(code, module.__dict__)


def _redirect(write_fd: int) -> None:
    """Leaves this process the null device as 0, 1 and 2, and the verdict pipe as `_VERDICT_FD`."""
    null = os.open(os.devnull, os.O_RDWR)
    above = fcntl.fcntl(write_fd, fcntl.F_DUPFD, _VERDICT_FD + 1)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(above, _VERDICT_FD)
    os.closerange(_VERDICT_FD + 1, _MOST_FDS)


def _confine(limits: Limits, folder: str) -> None:
    """Sets the limits of this newly forked process and gives it nothing of the worker's."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    # Ends the child even if the worker that waits for it is killed.
    signal.setitimer(signal.ITIMER_REAL, limits.deadline + 1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.argv = [""]
    os.chdir(folder)
    os.environ.clear()
    # On a host of many cores numpy's thread buffers alone would exceed the address space.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    random.seed(0)
    seconds = math.ceil(limits.cpu_seconds)
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    _limit(resource.RLIMIT_FSIZE, _FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform != "darwin":
        _limit(resource.RLIMIT_AS, _mapped_bytes() + (limits.memory_mb << 20))
    _forbid(_FORBIDDEN)


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    most = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def _mapped_bytes() -> int:
    """The address space of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _forbid(events: frozenset[str]) -> None:
    def hook(event: str, args: Any, events: frozenset[str] = events) -> None:
        if event in events:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)
