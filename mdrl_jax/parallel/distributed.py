"""Several processes as one program: JAX's multi-controller SPMD, where every process runs the same host code.

What devices compute is one program over all of them. What hosts do is kept the same by four rules: files are written
by process 0 while the others wait (`records`), what depends on a clock or a disk is decided by process 0 (`agree`),
what only one process knows is told to all (`share`), and arrays that span processes are read whole (`gather`).

Collectives of devices wait for ever for a process that is gone. So each gives a sign of life every few moments, and
process 0 ends all of them, with a line that names the host, when one has given none for the time-out.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mdrl_jax.errors import UserError

LOST = 75  # exit status after a host was lost: try again
BEATS = 20  # signs of life within the time-out, at least
AGAIN = "start the same command again on all hosts to go on"
# JAX ends a process without asking when process 0 is gone; what is said then is said by this child.
LAST_WORDS = 'read -r word || printf "%s\\n" "$1" >&2'


class HostLost(Exception):
    """A host was absent for longer than the time-out; the message names it."""


@dataclasses.dataclass(eq=False)
class Cluster:
    """This process among all: its index, the names of their hosts, and the coordination service."""

    index: int
    hosts: tuple[str, ...]
    client: Any
    timeout: float
    child: subprocess.Popen[bytes]
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    calls: int = 0

    @property
    def period(self) -> float:
        """Seconds between two signs of life."""
        return min(self.timeout / BEATS, 2.0)

    def name(self, index: int) -> str:
        """`process 3 on HOST`."""
        return f"process {index} on {self.hosts[index]}"


_cluster: Cluster | None = None  # of this process; None: it is alone


def initialize(coordinator: str | None, processes: int | None, process_id: int | None, timeout: float) -> None:
    """Joins the other processes: those that the flags name, of the SLURM job, or of the TPU pod; else stays alone.

    Before anything else of JAX is used. `processes=1` stays alone on a pod's host too. `timeout` in seconds: how long
    others are waited for, at the start, at barriers, and for a sign of life.

    Raises:
      UserError: for flags that do not belong together, and where a pod's other hosts cannot be found.
    """
    global _cluster
    flags = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if processes == 1:
        return
    if len(missing) not in (0, 3):
        raise UserError(
            f"--{missing[0]} is missing; name --coordinator=HOST:PORT, --processes=N and --process_id=I together, or "
            "none of them on a TPU pod and under SLURM"
        )
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    if missing and not slurm and not _tpu_chips():
        return
    if not missing:
        assert processes is not None and process_id is not None and coordinator is not None
        if not 0 <= process_id < processes:
            raise UserError(f"--process_id={process_id} is not valid with --processes={processes}: it counts from 0")
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise UserError(f"--coordinator={coordinator} is not valid; it is HOST:PORT of process 0")
    import jax  # here, so that what runs on hosts alone (rewards) never loads it
    from orbax.checkpoint import multihost

    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=int(timeout),
            # The service hears of a process every half of its own time-out. Ours names the host and is to come first.
            heartbeat_timeout_seconds=int(3 * timeout) + 60,
            shutdown_timeout_seconds=int(timeout),
        )
    except Exception as e:
        where = f"at {coordinator}" if coordinator else "of this SLURM job" if slurm else "of this TPU pod"
        raise UserError(
            f"the other processes {where} were not found within {timeout:.0f} s ({str(e).strip().splitlines()[0]}); "
            "start the command on every host, or with --processes=1 for this host alone"
        ) from e
    if jax.process_count() == 1:
        return
    client = multihost.get_jax_distributed_client()
    index, count = jax.process_index(), jax.process_count()
    client.key_value_set(f"mdrl/host/{index}", socket.gethostname())
    hosts = tuple(client.blocking_key_value_get(f"mdrl/host/{i}", int(1000 * timeout)) for i in range(count))
    gone = f", or process 0 on {hosts[0]} is gone" if index else ""
    words = f"mdrl: error: process {index} on {hosts[index]} was ended from outside{gone}; {AGAIN}"
    command = ["sh", "-c", LAST_WORDS, "sh", words]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    _cluster = Cluster(index, hosts, client, timeout, child)
    threading.Thread(target=_watch, args=(_cluster,), daemon=True).start()


def _tpu_chips() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def count() -> int:
    """Number of processes."""
    return len(_cluster.hosts) if _cluster else 1


def index() -> int:
    """Index of this process, from 0."""
    return _cluster.index if _cluster else 0


def is_first() -> bool:
    """Whether this process is the one that writes and decides."""
    return index() == 0


def part(n: int) -> range:
    """The indices of n things that this process does its share of."""
    return range(n * index() // count(), n * (index() + 1) // count())


def barrier(name: str) -> None:
    """Waits until every process is here; nothing where there is one.

    Raises:
      HostLost: naming those that did not come within the time-out.
    """
    if _cluster is None:
        return
    c = _cluster
    c.calls += 1  # the same on every process, which run the same code
    place = f"mdrl/barrier/{c.calls}"
    c.client.key_value_set(f"{place}/{c.index}", "")
    try:
        c.client.wait_at_barrier(place, int(1000 * c.timeout))
    except Exception as e:
        came = {int(key.rpartition("/")[2]) for key, _ in c.client.key_value_dir_get(place)}
        absent = [c.name(i) for i in range(count()) if i not in came]
        raise HostLost(f"{', '.join(absent) or 'a process'} did not come to {name!r} in {c.timeout:.0f} s") from e
    c.client.key_value_delete(f"{place}/{c.index}")


def share(value: Any) -> list[Any]:
    """What each process gave, in order of processes; JSON-able."""
    if _cluster is None:
        return [value]
    c = _cluster
    c.calls += 1
    place = f"mdrl/share/{c.calls}"
    c.client.key_value_set(f"{place}/{c.index}", json.dumps(value))
    barrier("sharing")
    found = [json.loads(c.client.blocking_key_value_get(f"{place}/{i}", int(1000 * c.timeout))) for i in range(count())]
    barrier("sharing")
    c.client.key_value_delete(f"{place}/{c.index}")
    return found


def agree(value: Any) -> Any:
    """What process 0 gave; JSON-able."""
    return share(value if is_first() else None)[0]


def gather(tree: Any) -> Any:
    """Whole arrays on the host, on every process, of a tree of arrays that may span processes."""
    import jax
    from jax.experimental import multihost_utils

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def check_shared(folder: Path) -> None:
    """Refuses a work folder that not every process sees.

    Raises:
      UserError: naming the hosts that do not see it.
    """
    if _cluster is None:
        return
    token = folder / f".shared-{os.getpid()}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    sees = share((folder / agree(token.name)).exists())
    barrier("shared folder")
    if is_first():
        token.unlink()
    barrier("shared folder")
    blind = [_cluster.name(i) for i, seen in enumerate(sees) if not seen]
    if blind:
        raise UserError(
            f"{folder} of {_cluster.name(0)} is not seen by {', '.join(blind)}; name a work folder on a file system "
            "that all hosts share (a mounted bucket or NFS)"
        )


def finish(status: int, error: BaseException | None = None) -> int:
    """Leaves the others: together where all is well; at once, telling them why and ending this process, otherwise."""
    if _cluster is None:
        return status
    c = _cluster
    if error is None:
        import jax

        c.over.set()
        _say_goodbye(c)
        jax.distributed.shutdown()
        return status
    if not isinstance(error, UserError | HostLost):
        # A collective that breaks off is most often another's end: who that is, is known within the time-out.
        sys.stderr.flush()
        time.sleep(c.timeout + 3 * c.period)
    why = str(error) if isinstance(error, HostLost) else f"{c.name(c.index)} ended: {' '.join(str(error).split())}"
    c.client.key_value_set(f"mdrl/lost/{c.index}", why, allow_overwrite=True)
    _leave(c, LOST if isinstance(error, HostLost) else status)
    return status


def _say_goodbye(c: Cluster) -> None:
    try:
        assert c.child.stdin is not None
        c.child.stdin.write(b"done\n")
        c.child.stdin.close()
    except OSError:
        pass  # it was ended with everything else
    c.child.wait()


def _leave(c: Cluster, status: int) -> None:
    """Ends this process: nothing in it can be waited for any more."""
    if c.index == 0:
        time.sleep(3 * c.period)  # the service ends with process 0: the others are to read the reason before
    _say_goodbye(c)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(c: Cluster) -> None:
    """Signs of life, and the end of this process when another gives none: runs in a thread of its own."""
    beat, seen = 0, {i: ("", time.monotonic()) for i in range(len(c.hosts))}
    while not c.over.wait(c.period):
        beat += 1
        c.client.key_value_set(f"mdrl/alive/{c.index}", str(beat), allow_overwrite=True)
        lost = [reason for _, reason in c.client.key_value_dir_get("mdrl/lost")]
        if c.index == 0 and not lost:
            now = time.monotonic()
            for key, value in c.client.key_value_dir_get("mdrl/alive"):
                i = int(key.rpartition("/")[2])
                if seen[i][0] != value:
                    seen[i] = value, now
            silent = [c.name(i) for i, (_, at) in seen.items() if now - at > c.timeout]
            if silent:
                lost = [f"{', '.join(silent)} gave no sign of life for {c.timeout:.0f} s"]
                c.client.key_value_set("mdrl/lost/0", lost[0], allow_overwrite=True)
        if lost and not c.over.is_set():
            print(f"mdrl: error: {lost[0]}; {AGAIN}", file=sys.stderr, flush=True)
            _leave(c, LOST)
