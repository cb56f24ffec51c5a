"""Brings the processes of a program together before JAX does, because JAX ends a process that finds no others.

JAX aborts with a stack trace of C++ if the coordinator is absent or process 0 stays alone. `meet` finds that out first,
on the same port, and says which process is missing.
"""

import contextlib
import re
import socket
import time

from mdrl_jax.errors import UserError

HELLO, GO = b"mdrl %d of %d\n", b"go\n"
HELLO_FORM = re.compile(r"mdrl (\d+) of (\d+)")
PAUSE = 0.2  # seconds between two attempts to reach process 0
ALONE = "start the command on every host, or with --processes=1 for this host alone"


def meet(coordinator: str, processes: int, index: int, timeout: float) -> None:
    """Waits until all processes have started; each of them has to call it.

    Args:
      coordinator: HOST:PORT of process 0; the port is free again afterwards.
      processes: number of processes.
      index: index of this process, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UserError: if the others do not come within the time-out, two have the same index, they disagree about their
        number, or the port cannot be opened or is that of another program.
    """
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + timeout
    if index:
        _join(host.strip("[]"), int(port), coordinator, processes, index, timeout, until)
    else:
        _gather(int(port), coordinator, processes, timeout, until)


def _gather(port: int, coordinator: str, processes: int, timeout: float, until: float) -> None:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"the port of --coordinator={coordinator} cannot be opened ({why}); name a free one") from e
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened, server:
        while len(came) < processes - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                other = opened.enter_context(server.accept()[0])
                other.settimeout(2.0)
                words = HELLO_FORM.fullmatch(_line(other))
            except OSError:
                words = None
            if time.monotonic() >= until:
                absent = ", ".join(str(i) for i in range(1, processes) if i not in came)
                raise UserError(f"process {absent} did not come to {coordinator} within {timeout:.0f} s; {ALONE}")
            if words is None:
                continue  # another program, or one that ended at once
            index, count = int(words[1]), int(words[2])
            if count != processes:
                raise UserError(f"process {index} was started with --processes={count}, process 0 with {processes}")
            if index in came:
                raise UserError(f"two processes were started with --process_id={index}; each host has its own")
            came[index] = other
        server.close()  # JAX opens the port next
        for other in came.values():
            with contextlib.suppress(OSError):  # one that has ended meanwhile is found missing by JAX
                other.sendall(GO)


def _join(host: str, port: int, coordinator: str, processes: int, index: int, timeout: float, until: float) -> None:
    why = "no answer"
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=max(0.01, until - time.monotonic())) as server:
                server.sendall(HELLO % (index, processes))
                if _line(server) + "\n" == GO.decode():
                    return
                why = "process 0 ended, or another program uses the port"
        except (OSError, OverflowError) as e:
            why = getattr(e, "strerror", None) or str(e)
        time.sleep(PAUSE)
    raise UserError(f"process 0 was not found at {coordinator} within {timeout:.0f} s ({why}); {ALONE}")


def _line(connection: socket.socket) -> str:
    """The first line that a connection sends, at most 100 bytes; shorter if it ends before."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 100:
        more = connection.recv(1)
        if not more:
            break
        data += more
    return data.decode(errors="replace").rstrip("\n")
