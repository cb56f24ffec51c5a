"""Starts the interpreter of a sandbox (`server.py`): inside bubblewrap (bwrap), or as a process that confines itself.

There are two kinds of sandbox:

- "bwrap": the interpreter has its own process, network, IPC and hostname namespaces, no environment, and a root folder
  that holds the libraries of the system, Python's standard library and the listed packages, read-only, and a private
  /tmp of 16 MiB. There is no /proc. Where Python or the packages are installed below /tmp, only the working folder in
  it can be written to.
- "bare", where bwrap is not installed or not allowed: Landlock limits the interpreter to the same files. Where the
  kernel has no Landlock, programs run only if `rewards.sandbox = "none"` allows it.

In both, programs and tests run under the filter of system calls of `lockdown.py`. A sandbox that the superuser
starts gives its children another user, because the kernel counts the threads of other users only.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdrl_jax.errors import UserError
from mdrl_jax.rewards.sandbox import PACKAGES, server
from mdrl_jax.rewards.sandbox import guest as _guest  # noqa: F401  (compiles it, so that sandboxes find its bytecode)
from mdrl_jax.rewards.sandbox import tester as _tester  # noqa: F401  (likewise)

_TMP, _SCRATCH = "/tmp", "/tmp/work"  # a virtual environment may be in /tmp itself
_SCRATCH_BYTES = 16 << 20
_FILES = ("wire.py", "server.py", "guest.py", "tester.py", "remote.py", "names.py", "lockdown.py")
_HERE = Path(__file__).resolve().parent
_ROOT = "/mdrl"  # the folder inside bwrap that holds _FILES
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/lib32")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_START = "import sys; sys.path.insert(0, {root!r}); from mdrl_jax.rewards.sandbox import server; server.main()"
_START_SECONDS, _REMOVE_SECONDS = 20.0, 0.2
_THREADS = 32
_FIRST_USER, _USERS = 61184, 4336  # the range that systemd keeps for users that come and go
_SERVER_CAPABILITIES = ("SETUID", "SETGID", "KILL", "CHOWN", "FOWNER", "DAC_OVERRIDE", "DAC_READ_SEARCH", "SETPCAP")


@dataclass(frozen=True)
class Isolation:
    """How programs are isolated on this machine.

    Attributes:
      kind: "bwrap" or "bare".
      missing: what is not isolated here; some of "network", "files", "processes", "signals", "threads", "disk".
      reason: why the kind is not "bwrap"; "" for "bwrap".
      users: whether bwrap makes a user namespace of its own. The superuser does without one where the kernel lets it.
    """

    kind: str
    missing: tuple[str, ...] = ()
    reason: str = ""
    users: bool = True


class Sandbox:
    """A started sandbox.

    Args:
      isolation: how to isolate it.
      holds: "guest" for programs or "tester" for tests.
      packages: the distributions whose modules programs may import.

    Attributes:
      isolation, packages: those of the arguments.
      process: the first process of the sandbox.
      control: the socket to it (`server.py`).
      folder: the scratch folder outside bwrap; "" with bwrap.
      missing: what the server cannot isolate: some of "files", "calls", "threads". None until `wait` has returned.

    Raises:
      OSError: if the process cannot be started.
    """

    def __init__(self, isolation: Isolation, holds: str = "guest", packages: Sequence[str] = PACKAGES) -> None:
        self.isolation, self.packages = isolation, tuple(packages)
        self.missing: list[str] | None = None
        self.folder = "" if isolation.kind == "bwrap" else tempfile.mkdtemp(prefix="mdrl-")
        self.control, theirs = socket.socketpair()
        command, env = _command(isolation, self.packages)
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=self.folder or "/",
                env=env,
                start_new_session=True,
            )
        try:
            server.send(self.control, _settings(isolation, holds, self.packages, self.folder))
        except OSError:  # it has ended; `wait` says why
            pass

    def wait(self) -> list[str]:
        """Waits until the sandbox is ready, at most 20 s. Returns what it cannot isolate (`missing`).

        Later calls return the same at once.

        Raises:
          RuntimeError: if it does not start in this time; the message has the reason. `end` has still to be called.
        """
        if self.missing is None:
            self.control.settimeout(_START_SECONDS)
            try:
                message, _ = server.receive(self.control)
            except (OSError, EOFError, ValueError):
                message = {}
            self.control.settimeout(None)
            if "ready" not in message:
                reason = message.get("error") or self._errors() or "no answer"
                raise RuntimeError(f"the sandbox did not start ({reason})")
            self.missing = list(message["ready"])
        return self.missing

    def _errors(self) -> str:
        self.process.kill()
        assert self.process.stderr
        return " ".join(self.process.stderr.read().decode(errors="replace").split())[-200:]

    def alive(self) -> bool:
        """Whether the first process still runs."""
        return self.process.poll() is None

    def end(self) -> None:
        """Kills the sandbox, waits for its first process, and removes its scratch folder (`remove_later`).

        With bwrap, every process in its process namespace ends with it.
        """
        try:
            os.killpg(self.process.pid, 9)
        except (ProcessLookupError, PermissionError):
            pass
        self.control.close()
        self.process.wait()
        end = time.monotonic() + 0.05  # longer would wait for zombies where nobody collects them
        while _group_exists(self.process.pid) and time.monotonic() < end:
            time.sleep(0.001)
        assert self.process.stderr
        self.process.stderr.close()
        if self.folder:
            remove_later(self.folder)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def remove_later(folder: str) -> None:
    """Removes a scratch folder and what it holds; what takes longer than 0.2 s is removed in a process of its own.

    That process goes on after the function has returned, for at most ten minutes. An absent folder is no error.
    """
    try:
        if server.remove_contents(folder, _REMOVE_SECONDS):
            os.rmdir(folder)
    except OSError:
        return
    if not os.path.isdir(folder):
        return
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[2])\n"
        "from mdrl_jax.rewards.sandbox import server\n"
        "if os.fork() == 0: server.remove_contents(sys.argv[1], 600.0); os.rmdir(sys.argv[1])"
    )
    none = subprocess.DEVNULL
    command = [*_python(), "-c", code, folder, str(_HERE.parents[2])]
    subprocess.run(command, stdin=none, stdout=none, stderr=none, start_new_session=True, check=False)


def _python() -> list[str]:
    """The command of the interpreter: the real file and not the link in a virtual environment."""
    return [os.path.realpath(sys.executable), "-S", "-s", "-P", "-B"]


def _site_folders() -> list[str]:
    """The folders of installed packages that this interpreter imports from."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(os.path.realpath(paths[k]) for k in ("purelib", "platlib")))


@functools.cache
def package_paths(packages: tuple[str, ...]) -> tuple[str, ...]:
    """The files and folders of installed distributions and of all that they require.

    They are found once in a process for the same packages.

    Args:
      packages: the names of the distributions. Those that are not installed have no paths. What a distribution requires
        only for an extra is left out.

    Returns:
      The paths of their top-level modules, packages and metadata, sorted, without links; only those that exist.
    """
    waiting, seen, found = list(packages), set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__", "."):
                found.add(os.path.realpath(str(distribution.locate_file(top))))
        required = [line for line in distribution.requires or [] if "extra ==" not in line]
        waiting += [match[0] for line in required if (match := re.match(r"[\w.-]+", line))]
    return tuple(sorted(path for path in found if os.path.exists(path)))


def _writable(packages: tuple[str, ...]) -> str:
    """The folder inside bwrap that children may write to, and that is emptied after each of them.

    It is /tmp. If Python or the packages are mounted below /tmp, which can then never be emptied, it is `_SCRATCH`.
    """
    mounted = any(_below(path, _TMP) for path in (*_python_paths(), *package_paths(packages)))
    return _SCRATCH if mounted else _TMP


@functools.cache
def _python_paths() -> tuple[str, ...]:
    """The folders and files of the standard library and the interpreter, without installed packages."""
    paths = sysconfig.get_paths()
    standard = {os.path.realpath(paths[k]) for k in ("stdlib", "platstdlib")}
    library = Path(sys.base_prefix, "lib")
    if Path(sys.base_prefix, "conda-meta").is_dir():  # its packages load shared libraries from one folder
        return (_python()[0], *sorted(standard), str(library.resolve()))
    shared = sorted(str(p.resolve()) for p in library.glob("libpython*.so*"))
    return (_python()[0], *sorted(standard), *shared)


def _hidden(folders: Sequence[str]) -> list[str]:
    """The folders of installed packages below some folders. They may hold anything of the user's."""
    found: set[str] = set()
    for folder in folders:
        for pattern in ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages"):
            found |= {str(path.resolve()) for path in Path(folder).glob(pattern) if path.is_dir()}
    return sorted(found | {site for site in _site_folders() if any(_below(site, folder) for folder in folders)})


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


@functools.cache
def _readable(packages: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For Landlock: (the folders and files that may be read, the folders that may be listed).

    Landlock grants whole folders. The interpreter has to list the folder of the standard library, which holds the
    hidden folder of installed packages.
    """
    folders = [p for p in (*_SYSTEM, *_python_paths()) if os.path.isdir(p) and not os.path.islink(p)]
    hidden = _hidden(folders)
    granted = [p for p in _python_paths() if not os.path.isdir(p)]
    waiting, listed = list(folders), list[str]()
    while waiting:
        folder = waiting.pop()
        if folder in hidden:
            continue
        if any(_below(path, folder) for path in hidden):
            listed.append(folder)
            waiting += [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            granted += [entry.path for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
        else:
            granted.append(folder)
    return (*granted, *_SYSTEM_FILES, *package_paths(packages), *_DEVICES[1:]), (*listed, *_site_folders())


def _settings(isolation: Isolation, holds: str, packages: tuple[str, ...], folder: str) -> dict[str, Any]:
    """The first message to the server (`server._prepare`)."""
    bwrap = isolation.kind == "bwrap"
    root = os.geteuid() == 0
    standard = [p for p in sys.path if p and _below(os.path.realpath(p), sys.base_prefix) and "-packages" not in p]
    return {
        "holds": holds,
        "path": list(dict.fromkeys([*standard, *_site_folders()])),
        "scratch": _SCRATCH if bwrap else folder,
        "clean": _writable(packages) if bwrap else folder,
        "files": [] if bwrap else list(_readable(packages)),
        "uid": _FIRST_USER + os.getpid() % _USERS if root and not (bwrap and isolation.users) else 0,
        "threads": _THREADS if bwrap or root else _THREADS + _running(),
    }


def _running() -> int:
    """The number of threads that this user runs, which the kernel counts with those of a program outside bwrap."""
    user, total = os.geteuid(), 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            total += int(fields["Threads"]) if int(fields["Uid"].split()[0]) == user else 0
        except (OSError, ValueError, KeyError):
            continue
    return total


@functools.cache
def _command(isolation: Isolation, packages: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """(the command that starts the server, its environment)."""
    if isolation.kind != "bwrap":
        return [*_python(), "-c", _START.format(root=str(_HERE.parents[2]))], {"PYTHONHASHSEED": "0"}
    command = [shutil.which("bwrap") or "bwrap", *(["--unshare-user"] if isolation.users else [])]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--cap-drop", "ALL"]
    if not isolation.users:
        command += [part for name in _SERVER_CAPABILITIES for part in ("--cap-add", f"CAP_{name}")]
    command += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    private = ["--size", str(_SCRATCH_BYTES), "--tmpfs"]
    command += [*private, _TMP]
    folders = [p for p in _SYSTEM if os.path.isdir(p) and not os.path.islink(p)]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
    bound = [*folders, *(p for p in _python_paths() if not any(_below(p, f) for f in folders))]
    for path in bound:
        command += ["--ro-bind", path, path]
    for path in _SYSTEM_FILES:
        command += ["--ro-bind-try", path, path]
    hidden = _hidden([p for p in bound if os.path.isdir(p)])
    for path in hidden:
        command += ["--tmpfs", path]
    for path in package_paths(packages):
        command += ["--ro-bind", path, path]
    for path in hidden:
        command += ["--remount-ro", path]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for name in _FILES:
        for path in (str(_HERE / name), importlib.util.cache_from_source(str(_HERE / name))):
            command += ["--ro-bind-try", path, f"{_ROOT}/mdrl_jax/rewards/sandbox/{os.path.relpath(path, _HERE)}"]
    if _writable(packages) == _TMP:
        command += ["--dir", _SCRATCH]
    else:
        command += [*private, _SCRATCH, "--remount-ro", _TMP]
    command += ["--remount-ro", "/", "--chdir", _SCRATCH]
    return [*command, "--", *_python(), "-c", _START.format(root=_ROOT)], {}


@functools.cache
def probe() -> Isolation:
    """Finds out which isolation works on this machine by starting sandboxes; done once in a process.

    Returns:
      The best that works: "bwrap", or "bare", whose `missing` has "files" where the kernel cannot isolate them.

    Raises:
      UserError: if no sandbox works here. A later call then tries again.
    """
    reason = "bwrap is not installed" if _linux() else "bwrap needs Linux"
    if shutil.which("bwrap"):
        error = ""
        for users in [False, True] if os.geteuid() == 0 else [True]:
            missing, error = _try(Isolation("bwrap", users=users))
            if missing is not None and "calls" not in missing:
                return Isolation("bwrap", tuple(missing), users=users)
        reason = f"bwrap does not work here ({error or 'the kernel refuses the filter of system calls'})"
    missing, error = _try(Isolation("bare"))
    if missing is None:
        raise UserError(f"no sandbox for programs works here ({error}); {_remedy()}")
    lacks = [m for m in missing if m != "calls"] + (["network", "processes", "signals"] if "calls" in missing else [])
    return Isolation("bare", (*lacks, "disk"), reason)


def _try(isolation: Isolation) -> tuple[list[str] | None, str]:
    sandbox = Sandbox(isolation)
    try:
        return sandbox.wait(), ""
    except RuntimeError as e:
        return None, str(e)
    finally:
        sandbox.end()


def choose(sandbox: str) -> Isolation:
    """Returns the isolation to use for a value of `rewards.sandbox`: the best that works here, if it is good enough.

    Args:
      sandbox: "best", which demands that files are isolated; "bwrap", which demands bubblewrap; or "none", which runs
        programs even where files are not isolated. Any other text means "none", so check it before (`CHOICES`).

    Raises:
      UserError: if `sandbox` is "bwrap" and bubblewrap does not work here; if it is "best" and files cannot be isolated
        here; or if no sandbox works here.
    """
    found = probe()
    if sandbox == "bwrap" and found.kind != "bwrap":
        raise UserError(
            f"rewards.sandbox='bwrap', but {found.reason}; {_remedy()}, "
            "or set rewards.sandbox='best' to run programs with less isolation"
        )
    if sandbox == "best" and "files" in found.missing:
        raise UserError(
            f"{found.reason}, and this kernel has no Landlock, so a program could read and write your files; "
            f"{_remedy()}, or set rewards.sandbox='none' to run programs all the same"
        )
    return found


def _linux() -> bool:
    return sys.platform.startswith("linux")


def _remedy() -> str:
    return "install bubblewrap" if _linux() else "use a Linux container or virtual machine"


def warn_of_slow_imports(packages: Sequence[str]) -> None:
    """Logs a warning about packages without compiled bytecode, which every program that imports one compiles again.

    That costs up to seconds of a program's CPU time. pip compiles what it installs; uv does so only if it is asked to.

    Args:
      packages: names of the distributions that programs may import. Those that they require count, too; those that are
        not installed do not.
    """
    slow = []
    for path in map(Path, package_paths(tuple(packages))):
        source = path / "__init__.py" if path.is_dir() else path
        compiled = importlib.util.cache_from_source(source) if source.suffix == ".py" and source.exists() else ""
        if compiled and not os.path.exists(compiled):
            slow.append(path)
    if slow:
        logging.getLogger(__name__).warning(
            "code reward: there is no compiled bytecode of %s, so programs that import them may run out of CPU time; "
            "run %s -m compileall -q %s",
            ", ".join(path.stem for path in slow),
            shlex.quote(sys.executable),
            " ".join(shlex.quote(str(path)) for path in slow),
        )


def warn(found: Isolation) -> None:
    """Logs a warning about what the isolation that `choose` found lacks; nothing if it lacks nothing.

    Each call logs it again.
    """
    if found.missing:
        reason = f"{found.reason}; " if found.reason else ""
        logging.getLogger(__name__).warning(
            "code reward: %sprograms run with limits but without isolation of: %s", reason, ", ".join(found.missing)
        )
