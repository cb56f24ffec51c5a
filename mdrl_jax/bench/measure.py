"""Measuring tasks beside one another: FLOPs and memory from the compiled program, time in rounds.

The speed of a machine drifts, so times are only compared within one run: every round runs every task once, each round
beginning with another task, and ratios are of medians over rounds, with a bootstrap over whole rounds.
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
    """Something to run: `call` runs it once, to the end. FLOPs of its matrix products and bytes of its temporary
    memory where they can be known.
    """

    call: Callable[[], Any]
    flops: float | None = None
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: Σ weight · figure over the tasks of `over`, divided by the same over those of `under`.

    Attributes:
      limit: FLOPs ratio that theory allows (definitions §6).
      target: the ratios ("flops", "time", "memory") that are to be kept.
      reason: why there is nothing to measure.
    """

    what: str
    over: Mapping[str, float] = dataclasses.field(default_factory=dict)
    under: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None


def compiled(name: str, function: Callable[..., Any], *args: Any) -> tuple[Task, Callable[..., Any]]:
    """The task of calling a device program on `args`, and the compiled program."""
    executable: Any = program(name, function).lower(*args).compile()
    memory = executable.memory_analysis()
    task = Task(
        call=lambda: jax.block_until_ready(executable(*args)),
        flops=matmul_flops(executable.as_text()),
        bytes=None if memory is None else memory.temp_size_in_bytes,
    )
    return task, executable


def rounds(tasks: Mapping[str, Task], repeats: int, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each task, after one call of each that is not counted."""
    names = list(tasks)
    seconds = {name: np.zeros(repeats) for name in names}
    for n in range(-1, repeats):
        say(f"round {n + 1} of {repeats}" if n >= 0 else "first calls")
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
    """One JSON-ready record a line, with the figures of `over` itself in "seconds", "flops" and "bytes"."""
    out = []
    for line in lines:
        measured = line.reason is None
        elapsed = _elapsed(line, seconds) if measured else None
        flops = _pair(line, {name: task.flops for name, task in tasks.items()})
        once = dataclasses.replace(line, under=dict.fromkeys(line.under, 1.0))  # repetition takes no further memory
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
