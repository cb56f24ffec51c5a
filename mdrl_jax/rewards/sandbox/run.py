"""Runs an untrusted Python program against tests that it must not see, or on inputs whose outputs it must not see.

A program with tests takes two sandboxes (`isolation.py`). One holds the program (`guest.py`). The other holds the tests
(`tester.py`), which ask the first for values over a socket and compare plain data. A data set's tests are programs of
a stranger too, so both sandboxes are isolated alike. The verdict leaves the tests' sandbox through a pipe that the
program does not have. A program that exits early, prints, patches its interpreter or searches its memory therefore
finds no verdict that it could change.

A program that reads standard input runs once for each input, in a process of its own. This process compares the outputs
(`rewards/outputs.py`).

A sandbox stays for many requests, because its first process runs neither programs nor tests: each request gets a new
child of it, and what a child leaves behind is removed before the next one, or the sandbox is ended. The main limit is
on CPU time, so that the verdict does not depend on how loaded the machine is. Programs that wait without using CPU time
end after `Limits.idle_seconds`.

Three weaknesses remain: tests that ask the program itself for a verdict (see `tester.py`), defects of the kernel, and,
without bubblewrap (bwrap), the kinds of isolation that `isolation.warn` reports as missing.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdrl_jax.rewards.sandbox import PACKAGES, isolation, server
from mdrl_jax.rewards.sandbox.isolation import Sandbox

Outcome = Literal["ok", "failed", "timeout", "memory", "deadline", "idle", "crashed"]

_MOST_OUTPUT = 16 << 20  # bytes of standard output that are read
_STOP_SECONDS = 2.0  # for a child to end and for its sandbox to be cleaned
_MEMORY_STATUS, _SETUP_STATUS = 77, 78  # exit statuses of `guest.run_once` and `server._child`


class UnsupportedTest(Exception):
    """The tests cannot be decided by plain data. This says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
      cpu_seconds: CPU time of the program, and as much again of its tests. Rounded up to whole seconds, the unit of the
        kernel's limit.
      memory_mb: address space in MiB, of which the interpreter takes about 30. Not enforced on macOS.
      deadline_seconds: wall-clock time; None is 20 times the CPU time, and at least 10 s.
      idle_seconds: wall-clock time that may pass while program and tests use no CPU time; None is twice the CPU time,
        at least 3 s, and at most the deadline.

    Raises:
      ValueError: if a limit is not above 0.
    """

    cpu_seconds: float = 5.0
    memory_mb: int = 1024
    deadline_seconds: float | None = None
    idle_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.memory_mb, self.deadline, self.idle) <= 0:
            raise ValueError(f"every limit must be above 0: {self}")

    @property
    def deadline(self) -> float:
        """The wall-clock limit in seconds."""
        default = max(10.0, 20 * self.cpu_seconds)
        return default if self.deadline_seconds is None else self.deadline_seconds

    @property
    def idle(self) -> float:
        """The wall-clock limit in seconds while no CPU time is used."""
        default = min(self.deadline, max(3.0, 2 * self.cpu_seconds))
        return default if self.idle_seconds is None else self.idle_seconds


@dataclass(frozen=True)
class Settings:
    """How the runs of this process are isolated and limited.

    Attributes:
      limits: what one run may use.
      sandbox: "best", "bwrap" or "none" (`isolation.choose`).
      packages: the distributions whose modules programs and tests may import.
    """

    limits: Limits = Limits()
    sandbox: str = "best"
    packages: tuple[str, ...] = PACKAGES


_settings = Settings()
_sandboxes: dict[str, Sandbox] = {}  # by what they hold, "guest" for programs and "tester" for tests


def configure(settings: Settings) -> None:
    """Sets how the later runs of this process are isolated and limited, unless they bring settings of their own.

    A reward worker calls it once.
    """
    global _settings
    _settings = settings


def run(program: str, tests: Sequence[str], entry_point: str = "", settings: Settings | None = None) -> Outcome:
    """Runs a program as `__main__` in a new process of one sandbox, and the tests against it in one of another sandbox.

    Both sandboxes are started if they do not run yet, and stay for later calls; `close` ends them. They belong to this
    process, and only one run may use them at a time, so call it from one thread.

    Args:
      program: Python source.
      tests: Python sources, run in this order in one namespace.
      entry_point: the name of the function under test; needed only where it is a builtin's (`tester.py`).
      settings: isolation and limits; None takes those of `configure`.

    Returns:
      "ok" if the program and every test ran without an exception; "failed" if one of them raised, was not valid Python
      or exited early; "timeout" if the CPU time was used up, or SIGKILL ended the program, the tests or a sandbox for
      another reason; "memory" if there was not enough memory; "deadline" if the wall-clock deadline came first; "idle"
      if neither program nor tests used CPU time for too long; "crashed" if another signal ended the program or the
      tests.

    Raises:
      UnsupportedTest: if the tests ask for what plain data cannot decide.
      RuntimeError: if a sandbox does not start, has ended or could not be set up.
      UserError: if the demanded isolation does not work here (`isolation.choose`).
    """
    chosen = settings or _settings
    guest, tester = _sandbox("guest", chosen), _sandbox("tester", chosen)
    ours, theirs = socket.socketpair()
    read_fd, write_fd = os.pipe()
    try:
        try:
            with ours, theirs:
                _start(guest, {"role": "guest", "seed": _seed(program)}, [theirs.fileno()], chosen.limits)
                # The tests have a seed of their own, which the program does not know.
                request = {"role": "tester", "seed": _seed([program, list(tests)])}
                rest = {"program": program, "tests": list(tests), "entry_point": entry_point}
                _start(tester, request, [ours.fileno(), write_fd], chosen.limits, rest)
        finally:
            os.close(write_fd)
        return _verdict(guest, tester, read_fd, chosen.limits)
    finally:
        os.close(read_fd)


def run_script(program: str, inputs: Sequence[str], settings: Settings | None = None) -> Iterator[tuple[Outcome, str]]:
    """Runs a program as a script on several standard inputs, each in a new process with the whole CPU time.

    It runs the program on an input only when the caller asks for that result. The sandbox stays, as that of `run` does.

    Args:
      program: Python source.
      inputs: the texts that the program reads from its standard input, as UTF-8.
      settings: isolation and limits; None takes those of `configure`.

    Yields:
      For each input, in order, (outcome, the standard output). Outcomes are as those of `run`; to end by SystemExit is
      "ok", whatever its status. A program that fails keeps its output up to then; bytes that are no UTF-8 are replaced.
      With "deadline" and "idle" the output is "". More than 16 MiB of output are "failed" and "".

    Raises:
      RuntimeError: if the sandbox does not start, has ended or could not be set up.
      UserError: if the demanded isolation does not work here (`isolation.choose`).
    """
    chosen = settings or _settings
    for text in inputs:
        yield _run_case(_sandbox("guest", chosen), program, text, chosen.limits)


def _run_case(sandbox: Sandbox, program: str, text: str, limits: Limits) -> tuple[Outcome, str]:
    with tempfile.TemporaryFile() as stdin:
        stdin.write(text.encode(errors="surrogatepass"))
        stdin.flush()
        stdin.seek(0)
        read_fd, write_fd = os.pipe()
        try:
            request = {"role": "script", "seed": _seed(program)}
            try:
                _start(sandbox, request, [stdin.fileno(), write_fd], limits, {"program": program})
            finally:
                os.close(write_fd)
            return _output(sandbox, read_fd, limits)
        finally:
            os.close(read_fd)


def prepare() -> None:
    """Starts anew the sandboxes that the last request has ended, so that the next one need not wait for their start.

    It does not wait until they are ready. Sandboxes that never ran are not started.
    """
    for holds, sandbox in list(_sandboxes.items()):
        if not sandbox.alive():
            _replace(holds, sandbox.isolation, sandbox.packages)


def close() -> None:
    """Ends the sandboxes that wait for the next request. A later run starts new ones."""
    while _sandboxes:
        _sandboxes.popitem()[1].end()


def _seed(of: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(of).encode()).digest()[:8], "big")


def _sandbox(holds: str, settings: Settings) -> Sandbox:
    """Returns the sandbox for programs or tests; starts it if it does not run."""
    found = isolation.choose(settings.sandbox)
    sandbox = _sandboxes.get(holds)
    if sandbox is None or sandbox.isolation != found or sandbox.packages != settings.packages or not sandbox.alive():
        sandbox = _replace(holds, found, settings.packages)
    sandbox.wait()
    return sandbox


def _replace(holds: str, found: isolation.Isolation, packages: tuple[str, ...]) -> Sandbox:
    """Starts a sandbox in place of the one that holds the same, and ends that one."""
    if holds in _sandboxes:
        _sandboxes.pop(holds).end()
    _sandboxes[holds] = Sandbox(found, holds, packages)
    return _sandboxes[holds]


def _start(
    sandbox: Sandbox, request: dict[str, Any], fds: list[int], limits: Limits, rest: dict[str, Any] | None = None
) -> None:
    """Asks a sandbox for a child; `rest` is the part of the request that only the child reads."""
    request |= {
        "cpu_seconds": limits.cpu_seconds,
        "memory_mb": limits.memory_mb,
        "deadline_seconds": limits.deadline,
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump(rest or {}, file)
        file.seek(0)
        try:
            server.send(sandbox.control, request, [*fds, file.fileno()])
        except OSError as e:
            sandbox.end()
            raise RuntimeError(f"the sandbox has ended ({e})") from e


class _Watch:
    """Follows the children of some sandboxes until they end or a limit is reached.

    Args:
      sandboxes: sandboxes that each run one child.
      limits: deadline and idle time.

    Attributes:
      statuses: exit status by sandbox; negative for a signal. A sandbox that has ended gives -9.
    """

    def __init__(self, sandboxes: Sequence[Sandbox], limits: Limits) -> None:
        self._sandboxes, self._limits = sandboxes, limits
        self._end = time.monotonic() + limits.deadline
        self._busy = time.monotonic()  # when CPU time was last seen to be used
        self._cpu: dict[int, float] = {}
        self.statuses: dict[int, int] = {}
        self._ending: list[Sandbox] = []  # which could not remove what their child left

    def limit(self) -> Outcome | None:
        """Returns "deadline" or "idle" if a limit is reached."""
        now = time.monotonic()
        return "deadline" if now > self._end else "idle" if now > self._busy + self._limits.idle else None

    def stop(self) -> None:
        """Ends the children that still run, and waits for that; ends sandboxes that do not react or are not clean."""
        running = [s for s in self._sandboxes if id(s) not in self.statuses]
        for sandbox in running:
            with contextlib.suppress(OSError):
                server.send(sandbox.control, {"stop": True})
        end = time.monotonic() + _STOP_SECONDS
        while any(id(s) not in self.statuses for s in running) and time.monotonic() < end:
            self.step([])
        for sandbox in [*self._ending, *(s for s in running if id(s) not in self.statuses)]:
            sandbox.end()

    def step(self, fds: Sequence[int]) -> list[int]:
        """Waits for something to happen, at most half a second. Returns those of `fds` that can be read."""
        running = [s for s in self._sandboxes if id(s) not in self.statuses]
        ready = select.select([*fds, *(s.control for s in running)], [], [], 0.5)[0]
        for sandbox in running:
            if sandbox.control in ready:
                self._read(sandbox)
        return [fd for fd in fds if fd in ready]

    def _read(self, sandbox: Sandbox) -> None:
        try:
            message, _ = server.receive(sandbox.control)
        except (OSError, EOFError, ValueError):
            message = {"status": -signal.SIGKILL}
        if "status" in message:
            self.statuses[id(sandbox)] = message["status"]
            if not message.get("clean", False):
                self._ending.append(sandbox)
        seconds = message.get("cpu")
        if seconds is None or seconds > self._cpu.get(id(sandbox), -1.0) + 1e-3:
            self._cpu[id(sandbox)] = seconds or 0.0
            self._busy = time.monotonic()


def _verdict(guest: Sandbox, tester: Sandbox, verdict_fd: int, limits: Limits) -> Outcome:
    watch = _Watch([guest, tester], limits)
    verdict, limit = None, None
    while verdict is None and (limit := watch.limit()) is None:
        if watch.step([verdict_fd]):
            verdict = os.read(verdict_fd, 4096).decode(errors="replace")
    # Who has ended by itself says why; that may take a moment.
    ended = None if verdict is None else {"gone": guest, "": tester}.get(verdict)
    end = time.monotonic() + _STOP_SECONDS
    while ended is not None and id(ended) not in watch.statuses and time.monotonic() < end:
        watch.step([])
    watch.stop()
    if limit is not None:
        return limit
    assert verdict is not None
    if verdict.startswith("unsupported: "):
        raise UnsupportedTest(verdict.removeprefix("unsupported: "))
    if ended is None:
        return verdict  # type: ignore[return-value]
    return _reason(watch.statuses.get(id(ended), -signal.SIGKILL))


def _output(sandbox: Sandbox, fd: int, limits: Limits) -> tuple[Outcome, str]:
    watch = _Watch([sandbox], limits)
    parts: list[bytes] = []
    n_bytes, opened, limit = 0, True, None
    while (opened or not watch.statuses) and n_bytes <= _MOST_OUTPUT and (limit := watch.limit()) is None:
        for _ in watch.step([fd] if opened else []):
            part = os.read(fd, 1 << 16)
            opened = part != b""
            n_bytes += len(part)
            parts.append(part)
    watch.stop()
    if limit is not None or n_bytes > _MOST_OUTPUT:
        return limit or "failed", ""
    status = watch.statuses.get(id(sandbox), -signal.SIGKILL)
    outcome: Outcome = "ok" if status == 0 else "memory" if status == _MEMORY_STATUS else _reason(status)
    return outcome, b"".join(parts).decode(errors="replace")


def _reason(status: int) -> Outcome:
    """Returns the outcome of a process that ended before there was a verdict, from its exit status."""
    if status == _SETUP_STATUS:
        raise RuntimeError("the sandbox could not be set up for this request")
    if -status in (signal.SIGXCPU, signal.SIGKILL):  # the kernel kills a process that ignores SIGXCPU
        return "timeout"
    if -status == signal.SIGALRM:
        return "deadline"
    return "crashed" if status < 0 else "failed"
