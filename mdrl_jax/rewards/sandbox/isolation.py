"""Starts the interpreter of a sandbox: inside bubblewrap (bwrap), or as a process that confines itself.

There are two kinds of sandbox:

- "bwrap": the interpreter has its own user, process, network, IPC and hostname namespaces, no capabilities, no
  environment but a fixed hash seed, and the system-call filter of `lockdown.py`. Its root folder holds the libraries of
  the system and of Python, read-only, and a private /tmp of 16 MiB. There is no /proc.
- "bare", where bwrap is not installed or not allowed: the interpreter applies the filter itself, with more calls
  forbidden, and confines its access to files by Landlock, both as far as the kernel supports them.
"""

import fcntl
import functools
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mdrl_jax.errors import UserError
from mdrl_jax.rewards.sandbox import guest as _guest  # noqa: F401  (compiles it, so that every guest finds its bytecode)
from mdrl_jax.rewards.sandbox import lockdown

CHOICES = ("best", "bwrap")

_SCRATCH = "/tmp/work"  # below /tmp, because a virtual environment may be in /tmp itself
_SCRATCH_BYTES = 16 << 20
_FILES = ("wire.py", "guest.py", "lockdown.py")
_HERE = Path(__file__).resolve().parent
_ROOT = "/mdrl"  # the folder inside bwrap that holds _FILES
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_START = "import sys; sys.path.insert(0, {root!r}); from mdrl_jax.rewards.sandbox import guest; guest.main()"


@dataclass(frozen=True)
class Isolation:
    """How programs are isolated on this machine.

    Attributes:
      kind: "bwrap" or "bare".
      missing: what a bare sandbox does not isolate here; some of "network", "files", "processes", "signals", "disk".
      reason: why the kind is "bare"; "" for "bwrap".
    """

    kind: str
    missing: tuple[str, ...] = ()
    reason: str = ""


def _python() -> list[str]:
    """The command of the interpreter.

    It is the real file and not the link in a virtual environment, because `_libraries` names the folders of the
    environment one by one.
    """
    return [os.path.realpath(sys.executable), "-S", "-s", "-P", "-B"]


def _libraries() -> list[str]:
    """The folders of Python that programs may read. They may read no other folder of the user."""
    paths = sysconfig.get_paths()
    standard = {paths["stdlib"], paths["platstdlib"], os.path.dirname(os.path.dirname(_python()[0]))}
    return sorted({os.path.realpath(p) for p in standard | {paths["purelib"], paths["platlib"]}} - {"/"})


def settings(limits: Mapping[str, float], bare: bool) -> bytes:
    """Returns the first line that a guest reads: JSON with its limits, its import path and the folders it may read.

    Args:
      limits: "cpu_seconds", "memory_mb" (MiB) and "deadline_seconds".
      bare: whether the guest has to confine itself.
    """
    site = [sysconfig.get_paths()[k] for k in ("purelib", "platlib")]
    path = [p for p in sys.path if p and os.path.realpath(p).startswith(sys.base_prefix) and "site-packages" not in p]
    message = {
        **limits,
        "bare": bare,
        "path": list(dict.fromkeys([*path, *(os.path.realpath(p) for p in site)])),
        "readable": [*_SYSTEM, *_libraries(), "/etc/ld.so.cache", "/dev/urandom", "/dev/zero"],
    }
    return json.dumps(message).encode() + b"\n"


@functools.cache
def _bwrap() -> list[str]:
    command = [shutil.which("bwrap") or "bwrap"]
    command += ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--cap-drop", "ALL"]
    command += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    command += ["--size", str(_SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for path in _libraries():
        if not path.startswith("/usr/"):
            command += ["--ro-bind", path, path]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for name in _FILES:
        for path in (str(_HERE / name), importlib.util.cache_from_source(str(_HERE / name))):
            command += ["--ro-bind-try", path, f"{_ROOT}/mdrl_jax/rewards/sandbox/{os.path.relpath(path, _HERE)}"]
    return [*command, "--dir", _SCRATCH, "--remount-ro", "/", "--chdir", _SCRATCH]


@functools.cache
def _filter_file() -> int | None:
    program = lockdown.seccomp_filter()
    if program is None:
        return None
    fd = os.memfd_create("filter", os.MFD_ALLOW_SEALING)
    os.write(fd, program)
    # Every sandbox of this process reads this file, so it is sealed against changes.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def start(kind: str, folder: str) -> subprocess.Popen[bytes]:
    """Starts a guest, which then waits for its settings.

    Args:
      kind: "bwrap" or "bare".
      folder: the folder that a bare guest may write to; not used with "bwrap".

    Returns:
      The process, with pipes for standard input, output and errors.
    """
    if kind == "bare":
        command = [*_python(), "-c", _START.format(root=str(_HERE.parents[2]))]
        return _popen(command, folder, (), {"PYTHONHASHSEED": "0"})
    fd = _filter_file()
    extra = ["--seccomp", str(fd)] if fd is not None else []
    if fd is not None:
        os.lseek(fd, 0, os.SEEK_SET)  # the last bwrap has read the shared file to its end
    command = [*_bwrap(), *extra, "--", *_python(), "-c", _START.format(root=_ROOT)]
    return _popen(command, "/", (fd,) if fd is not None else (), None)


def _popen(
    command: list[str], folder: str, fds: tuple[int, ...], env: dict[str, str] | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=folder,
        env=env,
        pass_fds=fds,
        start_new_session=True,
    )


@functools.cache
def probe() -> Isolation:
    """Finds out which isolation works on this machine by starting a guest; done once in a process.

    Raises:
      UserError: if neither kind of sandbox works here.
    """
    reason = "bwrap is not installed"
    if shutil.which("bwrap"):
        missing, error = _try("bwrap")
        if missing is not None:
            return Isolation("bwrap")
        reason = f"bwrap does not work here ({error})"
    missing, error = _try("bare")
    if missing is None:
        raise UserError(f"no sandbox for programs works here ({error}); install bubblewrap")
    return Isolation("bare", (*missing, "disk"), reason)


def _try(kind: str) -> tuple[list[str] | None, str]:
    limits = {"cpu_seconds": 5, "memory_mb": 512, "deadline_seconds": 20}
    with tempfile.TemporaryDirectory(prefix="mdrl-") as folder, start(kind, folder) as guest:
        try:
            out, errors = guest.communicate(settings(limits, kind == "bare"), timeout=20)
        except subprocess.TimeoutExpired:
            guest.kill()
            return None, "no answer"
    try:
        word, missing = json.loads(out.splitlines()[0])
        return (missing, "") if word == "ready" else (None, str(missing))
    except (IndexError, ValueError):
        return None, " ".join(errors.decode(errors="replace").split())[-200:]


def choose(sandbox: str) -> Isolation:
    """Returns the isolation to use for a value of `rewards.sandbox`.

    Args:
      sandbox: "best", which takes what works here, or "bwrap".

    Raises:
      UserError: if `sandbox` is "bwrap" and bubblewrap does not work here, or if no sandbox works here.
    """
    found = probe()
    if sandbox == "bwrap" and found.kind != "bwrap":
        raise UserError(
            f"rewards.sandbox='bwrap', but {found.reason}; install bubblewrap, "
            "or set rewards.sandbox='best' to run programs with less isolation"
        )
    return found


def warn(found: Isolation) -> None:
    """Logs a warning about what the isolation that `choose` found lacks; nothing for the kind "bwrap"."""
    if found.kind != "bwrap":
        logging.getLogger(__name__).warning(
            "code reward: %s; programs run with limits but without isolation of: %s",
            found.reason,
            ", ".join(found.missing),
        )
