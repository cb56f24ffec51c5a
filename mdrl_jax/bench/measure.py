"""Measures tasks side by side: FLOPs and memory from their compiled programs, and time in rounds.

The speed of a machine drifts, so times are compared only within one run. Every round runs every task once, and each
round begins with another task. A ratio of times is the ratio of medians over rounds. Its interval comes from a
bootstrap that resamples whole rounds, because tasks of one round share the machine's speed.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mdrl_jax.parallel.hlo import matmul_flops
from mdrl_jax.parallel.programs import program
from mdrl_jax.stats.bootstrap import cluster_bootstrap
from mdrl_jax.stats.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to measure.

    Attributes:
      call: runs it once and waits for its end.
      flops: FLOPs of its matrix products in one call; None: not known.
      bytes: size of its temporary memory in bytes; None: not known.
    """

    call: Callable[[], Any]
    flops: float | None = None
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table, a ratio: Σ weight · figure over the tasks in `over`, divided by the same sum for `under`.

    Attributes:
      what: the text of the line.
      over: name of a task -> weight.
      under: name of a task -> weight.
      limit: the lowest ratio of FLOPs that theory allows (definitions §6).
      target: "flops", "time" or "memory" -> the largest ratio that is acceptable.
      reason: why nothing is measured; None: it is measured.
    """

    what: str
    over: Mapping[str, float] = dataclasses.field(default_factory=dict)
    under: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None


def compiled(name: str, function: Callable[..., Any], *args: Any) -> tuple[Task, Callable[..., Any]]:
    """Compiles a function, and makes the task of calling it.

    Args:
      name: name of the program, under which its compilations are counted.
      function: a function of JAX arrays.
      *args: arguments of every call.

    Returns:
      the task, which calls the program on `args`; and the compiled program, which can also be called on other arguments
      of the same shapes.

    Raises:
      ValueError: if a loop with matrix products has an unknown number of iterations (`hlo.matmul_flops`).
    """
    executable: Any = program(name, function).lower(*args).compile()
    memory = executable.memory_analysis()
    task = Task(
        call=lambda: jax.block_until_ready(executable(*args)),
        flops=matmul_flops(executable.as_text()),
        bytes=None if memory is None else memory.temp_size_in_bytes,
    )
    return task, executable


def rounds(tasks: Mapping[str, Task], repeats: int, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Times the tasks, after one call of each that is not counted.

    Args:
      tasks: the tasks by name.
      repeats: number of timed rounds, at least 1.
      say: called with a line of text before each round, also before the calls that are not counted.

    Returns:
      name of a task -> seconds in each round [repeats].

    Raises:
      Exception: whatever a task raises.
    """
    names = list(tasks)
    seconds = {name: np.zeros(repeats) for name in names}
    for n in range(-1, repeats):
        say(f"round {n + 1} of {repeats}" if n >= 0 else "first calls, which are not timed")
        for i in range(len(names)):
            name = names[(n + i) % len(names)]
            start = time.perf_counter()
            tasks[name].call()
            if n >= 0:
                seconds[name][n] = time.perf_counter() - start
    return seconds


def records(
    bench: str, lines: Sequence[Line], tasks: Mapping[str, Task], seconds: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The records of a benchmark's lines, of plain data.

    Args:
      bench: name of the benchmark.
      lines: the lines of its table.
      tasks: the tasks by name.
      seconds: name of a task -> seconds in each round, from `rounds`.

    Returns:
      one record for each line, in the same order. "bench", "what", "limit", "target" and "reason" repeat what was given
      ("target" is None if the line has none), and "repeats" is the number of rounds. "flops_ratio", "time_ratio" and
      "memory_ratio" are `over` divided by `under`; for memory each weight in `under` is 1, because repeated calls take
      no more of it. "time_ci95" is [low, high], drawn from a fixed seed, and [-inf, inf] with one round. "seconds"
      (medians over rounds), "flops" and "bytes" are weighted sums over the tasks in `over` alone. What is not known is
      None, as are ratios of FLOPs and memory to 0, and all measured figures and "repeats" of a line with a `reason`.

    Raises:
      KeyError: if a line that has no `reason` names a task that is missing.
      ValueError: if two tasks of a line have different numbers of rounds.
    """
    out = []
    for line in lines:
        measured = line.reason is None
        elapsed = _elapsed(line, seconds) if measured else None
        flops = _pair(line, {name: task.flops for name, task in tasks.items()})
        once = dataclasses.replace(line, under=dict.fromkeys(line.under, 1.0))  # repeated calls take no more memory
        memory = _pair(once, {name: task.bytes for name, task in tasks.items()})
        record = {
            "bench": bench,
            "what": line.what,
            "flops_ratio": _ratio(*flops),
            "time_ratio": None if elapsed is None else elapsed.value,
            "time_ci95": None if elapsed is None else [elapsed.low, elapsed.high],
            "memory_ratio": _ratio(*memory),
            "limit": line.limit,
            "target": dict(line.target) or None,
            "seconds": _sum(line.over, {k: float(np.median(s)) for k, s in seconds.items()}) if measured else None,
            "flops": flops[0],
            "bytes": memory[0],
            "repeats": None if elapsed is None else elapsed.n,
            "reason": line.reason,
        }
        out.append(record)
    return out


def _elapsed(line: Line, seconds: Mapping[str, np.ndarray]) -> Estimate:
    names = [*line.over, *line.under]
    n_over = len(line.over)
    weights = np.array([*line.over.values(), *line.under.values()])

    def ratio(*columns: np.ndarray) -> float:
        medians = weights * np.median(np.stack(columns), axis=1)
        return float(medians[:n_over].sum() / medians[n_over:].sum())

    return cluster_bootstrap(ratio, [seconds[name] for name in names])


def _sum(weights: Mapping[str, float], figures: Mapping[str, float | None]) -> float | None:
    total = 0.0
    for name, weight in weights.items():
        figure = figures[name]
        if figure is None:
            return None
        total += weight * figure
    return total


def _pair(line: Line, figures: Mapping[str, float | None]) -> tuple[float | None, float | None]:
    if line.reason is not None:
        return None, None
    return _sum(line.over, figures), _sum(line.under, figures)


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under
