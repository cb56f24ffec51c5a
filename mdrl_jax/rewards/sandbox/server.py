"""The first process inside a sandbox. It starts one confined child after another: a program, or tests.

`isolation.py` starts a new interpreter with this file, connected to the reward worker by a socket at its standard
input. The first message holds the settings of the sandbox; the answer says what could not be isolated. Each later
message asks for one child (`_child`). While the child runs, the server reports its CPU time four times a second; then
it removes what the child has left in the scratch folder and reports how the child ended. The server itself runs neither
programs nor tests, so a child finds the sandbox as the first one did; if something cannot be removed, the server ends.
It ends, and its child with it, when the worker closes the socket.
"""

import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox import lockdown

_FILE_BYTES = 1 << 20
_OPEN_FILES = 64
_FIRST_FD = 10  # the link moves to this number or above, because 0, 1 and 2 become the null device
_REPORT_SECONDS = 0.25
_MESSAGE_BYTES = 64 << 20
_CLEAN_SECONDS = 1.0


def receive(control: socket.socket) -> tuple[Any, list[int]]:
    """Reads one message: a length in 8 bytes, then as much JSON; file descriptors come with its first byte.

    Returns:
      (the message, the file descriptors). There are at most 4, and the caller has to close them.

    Raises:
      EOFError: if the other end has closed the socket, or the message has over 64 MiB.
      ValueError: if the message is not JSON.
      OSError: if the socket fails or its time limit passes.
    """
    data, fds, _, _ = socket.recv_fds(control, 8, 4)
    try:
        size = int.from_bytes(_exactly(control, 8, bytearray(data)) if data else b"", "big")
        if not data or size > _MESSAGE_BYTES:
            raise EOFError
        return json.loads(_exactly(control, size, bytearray())), list(fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _exactly(control: socket.socket, size: int, read: bytearray) -> bytearray:
    """Reads on until there are `size` bytes; EOFError if the other end closes the socket before."""
    while len(read) < size:
        part = control.recv(min(1 << 20, size - len(read)))
        if not part:
            raise EOFError
        read += part
    return read


def send(control: socket.socket, message: Any, fds: list[int] | None = None) -> None:
    """Writes one message, as `receive` reads it.

    Args:
      control: the socket.
      message: what JSON can hold.
      fds: file descriptors to pass on, at most 4; they stay open here. None passes none.

    Raises:
      OSError: if the other end has closed the socket.
      TypeError, ValueError: if the message is not JSON-serialisable.
    """
    data = json.dumps(message).encode()
    header = len(data).to_bytes(8, "big")
    sent = socket.send_fds(control, [header], fds) if fds else control.send(header)
    control.sendall(header[sent:] + data)


def remove_contents(folder: str, seconds: float) -> bool:
    """Removes all that a folder holds, however deep, for a limited time. It raises nothing and follows no links.

    Folders below are first moved up into `folder` under random names, so that no path grows long and nothing recurses.

    Args:
      folder: the folder. It stays itself.
      seconds: the limit, in wall-clock time. What is left then stays.

    Returns:
      Whether the folder is empty; False if it does not exist or is a link.
    """
    end = time.monotonic() + seconds
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        top = os.open(folder, flags)
    except OSError:
        return False
    waiting = ["."]
    while time.monotonic() < end:
        if not waiting:
            if not os.listdir(top):
                break
            time.sleep(0.01)  # another process may be removing a folder below
            waiting = ["."]
        name = waiting.pop()
        try:
            fd = os.open(name, flags, dir_fd=top)
            try:
                with os.scandir(fd) as entries:
                    for entry in list(entries):
                        if not entry.is_dir(follow_symlinks=False):
                            os.unlink(entry.name, dir_fd=fd)
                            continue
                        if entry.stat(follow_symlinks=False).st_mode & 0o700 != 0o700:
                            _open_up(entry.name, fd)
                        waiting.append(os.urandom(8).hex())
                        os.rename(entry.name, waiting[-1], src_dir_fd=fd, dst_dir_fd=top)
                        if time.monotonic() > end:
                            break
            finally:
                os.close(fd)
            if name != ".":
                os.rmdir(name, dir_fd=top)
        except OSError:
            continue
    try:
        return not os.listdir(top)
    except OSError:
        return False
    finally:
        os.close(top)


def _open_up(name: str, fd: int) -> None:
    """Gives the owner every right to a folder; follows no link.

    Args:
      name: the folder.
      fd: the folder that holds it.
    """
    if not hasattr(os, "O_PATH"):  # not Linux, where the call below fails
        os.chmod(name, 0o700, dir_fd=fd, follow_symlinks=False)
        return
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        path = f"/proc/self/fd/{found}"
        if os.path.isdir(path):
            os.chmod(path, 0o700)
        else:  # in a sandbox, where nothing else runs that could put a link in the folder's place
            os.chmod(name, 0o700, dir_fd=fd)
    finally:
        os.close(found)


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    most = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def _confine(request: dict[str, Any], settings: dict[str, Any]) -> None:
    """Takes from this process all that a child has no use for. Its limits are set by the request."""
    seconds = math.ceil(request["cpu_seconds"])
    os.chdir(settings["scratch"])
    signal.setitimer(signal.ITIMER_REAL, math.ceil(request["deadline_seconds"]) + 1)
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)  # a program can ignore SIGXCPU, but not the kill a second later
    _limit(resource.RLIMIT_FSIZE, _FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform != "darwin":
        _limit(resource.RLIMIT_AS, request["memory_mb"] << 20)
        _limit(resource.RLIMIT_NPROC, settings["threads"])
    if settings["uid"]:
        lockdown.drop_user(settings["uid"])
    lockdown.die_with_parent()
    if settings["strict"]:
        _confine_calls()


def _redirect(fds: list[int]) -> list[int]:
    """Moves descriptors to higher numbers, puts the null device at 0, 1 and 2, and closes all others."""
    import fcntl

    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_FD) for fd in fds]
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, _FIRST_FD)
    low = _FIRST_FD
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 256)
    return kept


def _child(request: dict[str, Any], fds: list[int], settings: dict[str, Any], alive: int, body: Any) -> NoReturn:
    """The body of a child.

    Args:
      request: limits, "seed" and "role": "guest" serves tests over the link; "script" runs a program from a standard
        input to a standard output; "tester" runs tests against the program at the other end of the link.
      fds: by role: the link; the standard input and output; the link and the pipe for the verdict. The last one is a
        file with the rest of the request, JSON, so that the server's memory, of which each child has a copy, never
        holds another request's program.
      settings: those of the sandbox.
      alive: a descriptor that stays open while this process lives.
      body: the module that carries the request out.
    """
    try:
        with open(fds.pop(), encoding="utf-8") as file:
            request |= json.load(file)
        alive, *fds = _redirect([alive, *fds])
        os.environ.update(TMPDIR=settings["scratch"], HOME=settings["scratch"])
        if request["role"] == "script":
            os.dup2(fds[0], 0)
            os.dup2(fds[1], 1)
            for fd in fds:
                os.close(fd)
        sys.path[:] = settings["path"]
        for name in [n for n in sys.modules if n.partition(".")[0] == "mdrl_jax"]:
            del sys.modules[name]
        _confine(request, settings)
    except BaseException:
        os._exit(78)
    try:
        match request["role"]:
            case "guest":
                body.serve(fds[0], request["seed"])
            case "script":
                body.run_once(request["program"], request["seed"])
            case _:
                body.run(fds[0], fds[1], request)
    finally:
        os._exit(1)


def _cpu_seconds(pid: int) -> float | None:
    """The CPU time of a process; None where it cannot be read."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)
    except (OSError, OverflowError):
        return None


def _run(control: socket.socket, request: dict[str, Any], fds: list[int], settings: dict[str, Any], body: Any) -> int:
    """Runs one child to its end. Returns its exit status, negative for a signal."""
    ended, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        control.close()
        os.close(ended)
        _child(request, fds, settings, alive, body)
    for fd in [alive, *fds]:
        os.close(fd)
    while True:
        ready = select.select([ended, control], [], [], _REPORT_SECONDS)[0]
        if ready:
            break
        send(control, {"cpu": _cpu_seconds(pid)})
    os.close(ended)
    if ended not in ready:  # the worker has closed the socket or says {"stop": true}
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(_reap(pid))


def _reap(pid: int) -> int:
    """Waits for a child whose end was announced; one that only closed its descriptors is killed."""
    for _ in range(200):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main() -> NoReturn:
    """Serves the worker until it closes the socket, then ends this process.

    The socket is the standard input. The process also ends if a scratch folder cannot be cleaned, or after an error,
    whose text it sends as {"error": text}. The exit status is always 0.
    """
    control = socket.socket(fileno=os.dup(0))
    try:
        settings, _ = receive(control)
        lockdown.die_with_parent()
        # Imported now, because the files of this package cannot be read any more after `_prepare`.
        body = importlib.import_module(f"mdrl_jax.rewards.sandbox.{settings['holds']}")
        missing = _prepare(settings)
        send(control, {"ready": missing})
        while True:
            request, fds = receive(control)
            if "stop" in request:  # the child has ended by itself meanwhile
                continue
            _make_scratch(settings)
            status = _run(control, request, fds, settings, body)
            clean = remove_contents(settings["clean"], _CLEAN_SECONDS)
            send(control, {"status": status, "clean": clean})
            if not clean:  # a later child must find nothing of this one: the worker starts another sandbox
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except BaseException as e:
        try:
            send(control, {"error": f"{type(e).__name__}: {e}"})
        except OSError:
            pass
    os._exit(0)


def _prepare(settings: dict[str, Any]) -> list[str]:
    """Isolates the whole sandbox as far as its first process can, and checks in a child what each child will do.

    Returns:
      What cannot be isolated here: some of "files", "calls", "threads".
    """
    # One thread, because on a host of many cores the buffers of numpy's threads alone can exceed the address space.
    os.environ.clear()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    missing: list[str] = []
    if settings["uid"]:
        uid = settings["uid"]
        if not _works(lambda: lockdown.drop_user(uid)):
            settings["uid"] = 0
    if os.geteuid() == 0 and not settings["uid"]:  # the kernel does not count the superuser's threads
        missing.append("threads")
    if settings["clean"] != settings["scratch"]:
        os.chmod(settings["clean"], 0o1777)
    if settings["files"]:
        readable, listed = settings["files"]
        if not lockdown.confine_files(readable, listed, settings["clean"]):
            missing.append("files")
    if not _works(_confine_calls):
        missing.append("calls")
    settings["strict"] = "calls" not in missing
    return missing


def _make_scratch(settings: dict[str, Any]) -> None:
    """Makes the folder that the next child works in."""
    os.makedirs(settings["scratch"], exist_ok=True)
    if settings["uid"]:
        os.chown(settings["scratch"], settings["uid"], settings["uid"])


def _confine_calls() -> None:
    if not lockdown.confine_calls():
        raise OSError("the kernel refuses the filter of system calls")


def _works(action: Any) -> bool:
    """Whether an action succeeds, tried in a child because it cannot be undone."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
