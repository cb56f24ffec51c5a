"""How a sandboxed interpreter is started: inside bubblewrap, or confined by itself.

"bwrap": its own user, process, network and IPC namespaces, no capabilities, a root folder that holds the
system's and Python's libraries read-only and a private /tmp of 16 MiB, no /proc, no environment, and
the system-call filter of lockdown.py. "bare", where bwrap is not installed or not allowed: the same
filter, and Landlock on files, as far as the kernel has them.
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
from mdrl_jax.rewards.sandbox import guest as _guest  # noqa: F401  (so that its bytecode is there for every guest)
from mdrl_jax.rewards.sandbox import lockdown

CHOICES = ("best", "bwrap")

_SCRATCH = "/tmp/work"  # a virtual environment may itself lie in /tmp
_SCRATCH_BYTES = 16 << 20
_FILES = ("wire.py", "guest.py", "lockdown.py")
_HERE = Path(__file__).resolve().parent
_ROOT = "/mdrl"  # where bwrap shows _FILES
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_START = "import sys; sys.path.insert(0, {root!r}); from mdrl_jax.rewards.sandbox import guest; guest.main()"


@dataclass(frozen=True)
class Isolation:
    """How programs are run here.

    kind: "bwrap" or "bare". missing: what a bare one does not isolate, of network, files, processes, signals
    and disk. reason: why it is bare.
    """

    kind: str
    missing: tuple[str, ...] = ()
    reason: str = ""


def _python() -> list[str]:
    """The interpreter itself, not the link in a virtual environment, whose folders are bound one by one."""
    return [os.path.realpath(sys.executable), "-S", "-s", "-P", "-B"]


def _libraries() -> list[str]:
    """Folders of Python that programs may read; nothing else of the user's."""
    paths = sysconfig.get_paths()
    standard = {paths["stdlib"], paths["platstdlib"], os.path.dirname(os.path.dirname(_python()[0]))}
    return sorted({os.path.realpath(p) for p in standard | {paths["purelib"], paths["platlib"]}} - {"/"})


def settings(limits: Mapping[str, float], bare: bool) -> bytes:
    """The first line that a guest reads."""
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
    # Every sandbox of this process loads it, so none may change it.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def start(kind: str, folder: str) -> subprocess.Popen[bytes]:
    """Starts a guest that waits for its settings; `folder` is what a bare one may write to."""
    if kind == "bare":
        command = [*_python(), "-c", _START.format(root=str(_HERE.parents[1]))]
        return _popen(command, folder, (), {"PYTHONHASHSEED": "0"})
    fd = _filter_file()
    extra = ["--seccomp", str(fd)] if fd is not None else []
    if fd is not None:
        os.lseek(fd, 0, os.SEEK_SET)  # bwrap reads it to its end
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
    """What this machine can do, found by starting a guest; asked once a process."""
    reason = "bwrap is not installed"
    if shutil.which("bwrap"):
        missing, error = _try("bwrap")
        if missing is not None:
            return Isolation("bwrap")
        reason = f"bwrap does not work here ({error})"
    missing, error = _try("bare")
    if missing is None:
        raise UserError(f"programs cannot be run in a sandbox here: {error}; install bubblewrap")
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
    """The isolation for `rewards.sandbox`; raises UserError where "bwrap" is wanted and does not work."""
    found = probe()
    if sandbox == "bwrap" and found.kind != "bwrap":
        raise UserError(
            f"rewards.sandbox='bwrap', but {found.reason}; install bubblewrap, "
            "or set rewards.sandbox='best' to run programs with less isolation"
        )
    return found


def warn(found: Isolation) -> None:
    """Says what is not isolated, if anything."""
    if found.kind != "bwrap":
        logging.getLogger(__name__).warning(
            "code reward: %s; programs run with limits but without isolation of: %s",
            found.reason,
            ", ".join(found.missing),
        )
