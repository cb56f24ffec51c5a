"""Runs several processes as one program: JAX's multi-controller SPMD, in which every process runs the same host code.

The devices of all processes run one program. Four rules keep the host code of all processes in step:

- Process 0 writes files while the others wait (`records.py`).
- Process 0 decides everything that depends on a clock or a disk, and the others follow (`agree`).
- A value that only one process knows is sent to all (`share`).
- An array that spans processes is read whole by every process (`gather`).

A collective waits for ever if one of its processes is gone. Therefore every process writes a heartbeat at least every
two seconds. If process 0 sees no heartbeat of a process for the time-out, it ends all processes with a message that
names the host.
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
from mdrl_jax.parallel import rendezvous

LOST = 75  # exit status after a host was lost (EX_TEMPFAIL of sysexits.h: the same command may be started again)
BEATS = 20  # heartbeats within the time-out, at least
AGAIN = "start the same command again on all hosts to go on"
NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # key by which JAX's service tells all processes that one got a SIGTERM
CORRECT = "; correct this and start the command on all hosts"  # after the reason of a `UserError`
# JAX ends this process at once when process 0 is gone, so no code of ours can report it. This shell command runs as a
# child that outlives the process: if its stdin closes before a line arrives, it prints its argument.
LAST_WORDS = 'read -r word || printf "%s\\n" "$1" >&2'


class HostLost(Exception):
    """A process did not reach a barrier within the time-out; the message names it and its host."""


@dataclasses.dataclass(eq=False)
class Cluster:
    """This process and the others of the program.

    Attributes:
      index: index of this process.
      hosts: host name of each process.
      client: client of JAX's coordination service, a key-value store with barriers on process 0.
      timeout: seconds without a heartbeat after which a process counts as lost; also the limit of barriers.
      child: the process that runs `LAST_WORDS`.
      over: set when this process ends normally, which stops its heartbeats.
      calls: number of calls of `barrier` and `share` so far; it makes their keys unique.
      told: set once a process has got a SIGTERM; every process finds out within a `period`.
    """

    index: int
    hosts: tuple[str, ...]
    client: Any
    timeout: float
    child: subprocess.Popen[bytes]
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    calls: int = 0
    told: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def period(self) -> float:
        """Seconds between two heartbeats: `timeout` / 20, and at most 2."""
        return min(self.timeout / BEATS, 2.0)

    def name(self, index: int) -> str:
        """The name of a process in messages: `process 3 on HOST`."""
        return f"process {index} on {self.hosts[index]}"


_cluster: Cluster | None = None  # None: this process is alone


def initialize(coordinator: str | None, processes: int | None, process_id: int | None, timeout: float) -> None:
    """Joins the other processes of the program; it has to be called before anything else of JAX is used.

    The other processes are the ones that the flags name or, without flags, those of the SLURM job or of the TPU pod. If
    there is neither, this process stays alone: it returns and changes nothing.

    With several processes it starts a thread and a child process. The thread writes heartbeats; once a process is lost,
    it prints the reason and ends this process with exit status `LOST`. The child prints a message if this process is
    ended from outside.

    Args:
      coordinator: HOST:PORT of process 0; None: not given, as for the next two.
      processes: number of processes; 1: this process stays alone, also on a host of a pod or in a SLURM job, and the
        other flags are ignored.
      process_id: index of this process, from 0.
      timeout: seconds to wait for the other processes: at the start, at barriers, and for a heartbeat. JAX itself gets
        whole seconds, rounded down.

    Raises:
      UserError: if only some of the flags are given, if one of them or the environment variable SLURM_NTASKS is not
        valid, if the other processes are not found within the time-out, or if JAX cannot join them for another reason,
        such as a second call.
      jax.errors.JaxRuntimeError: if a process joins but does not send its host name within the time-out.
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
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if not tasks.isascii() or not tasks.isdigit():
        raise UserError(f"the environment variable SLURM_NTASKS={tasks!r} is not a whole number; unset or correct it")
    slurm = int(tasks) > 1 and "SLURM_PROCID" in os.environ
    if missing and not slurm and not _tpu_chips():
        return
    if not missing:
        assert processes is not None and process_id is not None and coordinator is not None
        if not 0 <= process_id < processes:
            raise UserError(f"--process_id={process_id} is not valid with --processes={processes}; 0 <= id < processes")
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise UserError(f"--coordinator={coordinator} is not valid; it is HOST:PORT of process 0")
        rendezvous.meet(coordinator, processes, process_id, timeout)
    import jax  # imported here, so that reward code, which needs no device, never loads it
    from orbax.checkpoint import multihost

    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=int(timeout),
            # JAX's service may notice a loss after half of this time-out, and does not name the host. Half of it is
            # longer than `timeout`, so that our message, which names the host, comes first.
            heartbeat_timeout_seconds=int(3 * timeout) + 60,
            shutdown_timeout_seconds=int(timeout),
        )
    except Exception as e:
        where = f"at {coordinator}" if coordinator else "of this SLURM job" if slurm else "of this TPU pod"
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"the other processes {where} were not found within {timeout:.0f} s ({why}); "
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
    """Number of processes; 1 if this process is alone or `initialize` was not called."""
    return len(_cluster.hosts) if _cluster else 1


def index() -> int:
    """Index of this process, from 0; 0 if it is alone."""
    return _cluster.index if _cluster else 0


def is_first() -> bool:
    """Whether this is process 0, which writes files and decides."""
    return index() == 0


def told() -> bool:
    """Whether this process knows of a SIGTERM that any process got; always False if this process is alone."""
    return _cluster is not None and _cluster.told.is_set()


def part(n: int) -> range:
    """This process's share of the indices 0 … n − 1, a contiguous range; it may be empty if n is below `count()`.

    The shares of processes 0, 1, … follow each other and together hold every index once. Their sizes differ by at most
    1. A process that is alone gets all indices.
    """
    return range(n * index() // count(), n * (index() + 1) // count())


def barrier(name: str) -> None:
    """Waits until every process has reached this call; returns at once if there is only one process.

    Args:
      name: the name of the barrier in the message. The calls of all processes are matched by their order, not by it.

    Raises:
      HostLost: if a process does not come within the time-out, or waiting fails for another reason. The message names
        the absent processes with their hosts, or says "a process" if none is known to be absent.
      jax.errors.JaxRuntimeError: if the coordination service on process 0 cannot be reached.
    """
    if _cluster is None:
        return
    c = _cluster
    c.calls += 1  # the same number on every process, because all run the same code
    place = f"mdrl/barrier/{c.calls}"
    c.client.key_value_set(f"{place}/{c.index}", "")
    try:
        c.client.wait_at_barrier(place, int(1000 * c.timeout))
    except Exception as e:
        came = {int(key.rpartition("/")[2]) for key, _ in c.client.key_value_dir_get(place)}
        absent = [c.name(i) for i in range(count()) if i not in came]
        raise HostLost(f"{', '.join(absent) or 'a process'} did not reach barrier {name!r} in {c.timeout:.0f} s") from e
    c.client.key_value_delete(f"{place}/{c.index}")


def share(value: Any) -> list[Any]:
    """Collects one value from each process; every process has to call it.

    Args:
      value: a value that JSON can hold. With several processes all values come back as copies, in which tuples are
        lists and the keys of dicts are text. A process that is alone gets `value` itself and may pass anything.

    Returns:
      the values of all processes, in the order of their indices, on every process.

    Raises:
      HostLost: if a process does not come within the time-out.
      TypeError: with several processes, if JSON cannot hold `value` (ValueError if it contains itself); the other
        processes then wait for this one.
      jax.errors.JaxRuntimeError: if the coordination service on process 0 cannot be reached.
    """
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
    """The value that process 0 passed, on every process; the values of the others are ignored.

    Every process has to call it.

    Args:
      value: on process 0, a value that JSON can hold. With several processes it comes back as a copy, in which tuples
        are lists and the keys of dicts are text. A process that is alone gets `value` itself and may pass anything.

    Raises:
      HostLost: if a process does not come within the time-out.
      TypeError: on process 0 of several, if JSON cannot hold `value` (ValueError if it contains itself); the other
        processes then wait for this one.
      jax.errors.JaxRuntimeError: if the coordination service on process 0 cannot be reached.
    """
    return share(value if is_first() else None)[0]


def gather(tree: Any) -> Any:
    """Copies a tree of arrays to the host of every process; every process has to call it.

    An array that is split over processes is first copied whole to every device, one array at a time.

    Returns:
      the tree with NumPy arrays, each whole also where the array spans processes; arrays may be read-only. Other leaves
      stay as they are, but NumPy scalars become arrays without axes.
    """
    import jax
    from jax.experimental import multihost_utils

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def check_shared(folder: Path) -> None:
    """Refuses a work folder that is not on a file system shared by all processes; every process has to call it.

    Process 0 makes the folder, with its parents, if it does not exist. For the check it makes an empty file in the
    folder and removes it afterwards. A process that is alone does nothing.

    Raises:
      UserError: on every process, if a process does not see the folder of process 0; the message names the processes
        that do not see it and their hosts.
      HostLost: if a process does not come within the time-out.
      OSError: on process 0, if it cannot make the folder or write there.
      jax.errors.JaxRuntimeError: if the coordination service on process 0 cannot be reached.
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
            f"{folder} of {_cluster.name(0)} is not visible to {', '.join(blind)}; name a work folder on a file system "
            "that all hosts share (a mounted bucket or NFS)"
        )


def finish(status: int, error: BaseException | None = None) -> int:
    """Leaves the program: together with the others if there was no error, otherwise by ending all processes.

    A process that is alone only returns `status`.

    Without an error it waits until every process has come here, and returns. If one does not come within the time-out,
    JAX aborts the processes; no exception is raised.

    With an error it tells the other processes the reason and ends this process by `os._exit`; the caller prints the
    error before. The exit status is `LOST` for a `HostLost`, otherwise `status`. The other processes end with `LOST`,
    with two exceptions. A process that also calls this function with a `UserError` ends with its own `status`; with
    another error it may. JAX aborts a process that already waits here without an error, and no reason is printed.
    An error that is neither a `UserError` nor a `HostLost` waits for the time-out first, because the loss of another
    process may have caused it; if a loss is reported meanwhile, this process ends with `LOST`, too.

    Args:
      status: exit status of the command on this process.
      error: the exception that ended the command; None: it ended normally.

    Returns:
      `status`, if this process does not end.

    Raises:
      jax.errors.JaxRuntimeError: with an error, if the coordination service on process 0 cannot be reached.
    """
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
        # A collective mostly fails because another process ended. Within the time-out the watching thread learns which
        # one, and then ends this process with that reason.
        sys.stderr.flush()
        time.sleep(c.timeout + 3 * c.period)
    why = str(error) if isinstance(error, HostLost) else f"{c.name(c.index)} ended: {' '.join(str(error).split())}"
    if isinstance(error, UserError):
        c.over.set()  # the watching thread would advise to start again, but the same command would fail again
        why = f"{why}{CORRECT}"
    c.client.key_value_set(f"mdrl/lost/{c.index}", why, allow_overwrite=True)
    _leave(c, LOST if isinstance(error, HostLost) else status)
    return status


def _say_goodbye(c: Cluster) -> None:
    try:
        assert c.child.stdin is not None
        c.child.stdin.write(b"done\n")
        c.child.stdin.close()
    except OSError:
        pass  # the child was killed together with its process group
    c.child.wait()


def _leave(c: Cluster, status: int) -> None:
    """Ends this process without waiting for threads or collectives, which may never return."""
    if c.index == 0:
        time.sleep(3 * c.period)  # the service ends with process 0, and the others have to read the reason before
    _say_goodbye(c)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(c: Cluster) -> None:
    """Writes heartbeats, and ends this process when another one is lost or has left a reason; runs in its own thread.

    Only process 0 checks heartbeats; it writes the reason for an end, and the others read it.
    """
    beat, seen = 0, {i: ("", time.monotonic()) for i in range(len(c.hosts))}
    while not c.over.wait(c.period):
        beat += 1
        c.client.key_value_set(f"mdrl/alive/{c.index}", str(beat), allow_overwrite=True)
        if not c.told.is_set() and _exists(c, NOTICE):
            c.told.set()
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
            told = lost[0] if lost[0].endswith(CORRECT) else f"{lost[0]}; {AGAIN}"
            print(f"mdrl: error: {told}", file=sys.stderr, flush=True)
            _leave(c, LOST)


def _exists(c: Cluster, key: str) -> bool:
    try:
        return bool(c.client.key_value_try_get(key))
    except Exception as e:  # JAX's own class of errors does not tell an absent key from other failures
        if "NOT_FOUND" in str(e):
            return False
        raise
