"""The process inside the sandbox: runs one program and carries out what the tests ask of it.

`isolation.py` starts a new interpreter with this file for each program. The process holds no secret: neither a token
nor a wanted answer. A program that takes it over can therefore still do no more than choose the values that its
functions return.
"""

import fcntl
import json
import math
import operator
import os
import random
import resource
import sys
import types
import warnings
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox import wire

_FILE_BYTES = 1 << 20
_OPEN_FILES = 64
_THREADS = 32
_FIRST_FD = 10  # the pipes move to this number or above, because 0, 1 and 2 become the null device

OPERATIONS: dict[str, Any] = {
    "call": lambda f, *args, **kwargs: f(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "delattr": delattr,
    "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "iter": iter, "len": len, "bool": bool, "str": str, "repr": repr, "int": int, "float": float,
    "index": operator.index, "round": round, "abs": abs, "neg": operator.neg, "isinstance": isinstance,
    "eq": lambda a, b: bool(a == b), "lt": lambda a, b: bool(a < b), "le": lambda a, b: bool(a <= b),
    "gt": lambda a, b: bool(a > b), "ge": lambda a, b: bool(a >= b),
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow, "matmul": operator.matmul,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "enter": lambda c: type(c).__enter__(c), "exit": lambda c: type(c).__exit__(c, None, None, None),
}  # fmt: skip


def _next(iterator: Any) -> list[Any]:
    """Returns the next item in a list, or an empty list at the end."""
    for item in iterator:
        return [item]
    return []


def confine(settings: dict[str, Any]) -> list[str]:
    """Sets the limits of this process, and without bwrap confines it for good.

    Args:
      settings: the first line from the parent (`isolation.settings`): "cpu_seconds", "memory_mb" (MiB),
        "deadline_seconds", "bare" (whether there is no bwrap) and "readable" (the folders and files that may be read).

    Returns:
      What could not be confined: some of "network", "files", "processes", "signals"; [] with bwrap.
    """
    seconds = math.ceil(settings["cpu_seconds"])
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)  # a program can ignore SIGXCPU, but not the kill a second later
    _limit(resource.RLIMIT_FSIZE, _FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform != "darwin":
        _limit(resource.RLIMIT_AS, settings["memory_mb"] << 20)
    if not settings["bare"]:
        _limit(resource.RLIMIT_NPROC, _THREADS)
        return []
    from mdrl_jax.rewards.sandbox import lockdown

    return lockdown.apply(settings["readable"], os.getcwd(), math.ceil(settings["deadline_seconds"]) + 1)


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    most = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def _redirect() -> tuple[int, int]:
    """Moves the two pipes to higher numbers, puts the null device at 0, 1 and 2, and returns the pipes' numbers."""
    line = fcntl.fcntl(0, fcntl.F_DUPFD, _FIRST_FD), fcntl.fcntl(1, fcntl.F_DUPFD, _FIRST_FD)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    return line


def main() -> NoReturn:
    """Confines this process, reports that it is ready, and answers requests until it is killed or the other end leaves.

    The first line of its input says how to confine it (`isolation.settings`). If that fails, it reports why and ends.
    """
    program = types.ModuleType("__main__")

    def serve(op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        match op:
            case "load":
                sys.modules["__main__"] = program
                # optimize=0, because PYTHONOPTIMIZE would otherwise switch off the asserts of the program.
                exec(compile(args[0], "<program>", "exec", dont_inherit=True, optimize=0), program.__dict__)
            case "has":
                return args[0] in program.__dict__
            case "get":
                return program.__dict__[args[0]]
            case "next":
                return _next(args[0])
            case _:
                return OPERATIONS[op](*args, **kwargs)

    settings = json.loads(os.read(0, 1 << 16))
    line = _redirect()
    sys.path[:] = settings["path"]
    sys.argv = [""]
    os.environ.clear()
    # One thread, because on a host of many cores the buffers of numpy's threads alone can exceed the address space.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    random.seed(0)
    peer = wire.Peer(*line, serve)
    try:
        peer.send(["ready", confine(settings)])
    except BaseException as e:
        peer.send(["setup", f"{type(e).__name__}: {e}"])
        os._exit(1)
    try:
        peer.serve_forever()
    finally:
        os._exit(0)
