"""The command `bench`: runs benchmarks; JSON lines go to standard output, a table goes to standard error."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mdrl_jax.bench import curvature, decode, peers, speed, start, step, train
from mdrl_jax.bench.measure import Task, records, rounds
from mdrl_jax.bench.work import Work
from mdrl_jax.errors import UserError

Say = Callable[[str], None]
WIDTH = 120  # smallest width of the table, for terminals that are narrow or of unknown width


@dataclasses.dataclass(frozen=True)
class Given:
    """What is measured.

    Attributes:
      sizes: the random decoder of `curvature` and its batch.
      work: the model and the batch of `step`, `decode` and `train`.
    """

    sizes: curvature.Sizes
    work: Work


def bench_curvature(given: Given, repeats: int, say: Say) -> tuple[list[dict[str, Any]], Table]:
    """Measures second-order products of a random decoder, beside those of matfree and of curvlinops.

    Args:
      given: sizes of the model and of the batch.
      repeats: number of timed rounds, at least 1; with 1 the intervals of times are [-inf, inf].
      say: called with a line of text about the progress.

    Returns:
      One record for each line of the table (`bench.measure.records`): those of this package first, then those of
      matfree and of curvlinops. A library that is not installed has one record, with a "reason" and no figures. And the
      table.
    """
    say(f"compiling for {given.sizes}")
    problem = curvature.problem(given.sizes)
    on = curvature.route(problem)
    tasks: dict[str, Task] = {**curvature.whole_tasks(problem), **curvature.route_tasks(problem, on)}
    lines = list(curvature.LINES)
    for make in (lambda: peers.matfree(problem, on), lambda: peers.curvlinops(problem)):
        more, theirs = make()
        tasks.update(more)
        lines += theirs
    found = records("curvature", lines, tasks, rounds(tasks, repeats, say))
    return found, table(f"curvature: {given.sizes}", found)


def bench_decode(given: Given, repeats: int, say: Say) -> tuple[list[dict[str, Any]], Table]:
    """Measures the sampler beside `generate` of transformers.

    Args:
      given: the model and the batch.
      repeats: number of timed rounds, at least 1; with 1 the intervals of ratios are [-inf, inf].
      say: called with a line of text about the progress.

    Returns:
      One record for each line of the table (`bench.speed.records`): those of this package first, then those of the
      other library, which has one record with a "reason" and no figures if it is not installed. And the table.

    Raises:
      UserError: if the folder is not that of a model, or its weights do not fit.
    """
    return _speed("decode", given, repeats, say, [decode.ours(given.work), decode.transformers(given.work)])


def bench_train(given: Given, repeats: int, say: Say) -> tuple[list[dict[str, Any]], Table]:
    """Measures the gradient of log-probs beside torch's; arguments, result and errors as in `bench_decode`."""
    return _speed("train", given, repeats, say, [train.ours(given.work), train.torch(given.work)])


def bench_step(given: Given, repeats: int, say: Say) -> tuple[list[dict[str, Any]], Table]:
    """Measures GRPO steps beside those of TRL and of Tunix; arguments, result and errors as in `bench_decode`."""
    with tempfile.TemporaryDirectory() as folder, step.ours(given.work) as ours:
        sides = [ours, step.trl(given.work, folder), step.tunix(given.work)]
        return _speed("step", given, repeats, say, sides)


def bench_start(given: Given, repeats: int, say: Say) -> tuple[list[dict[str, Any]], Table]:
    """Measures the start of a run, whatever `given` is; arguments and result as in `bench_decode`.

    Raises:
      UserError: if a process that it starts fails, or ends before its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _speed("start", given, repeats, say, [start.tasks(folder)])


def _speed(
    name: str, given: Given, repeats: int, say: Say, sides: Sequence[tuple[dict[str, Task], list[speed.Entry]]]
) -> tuple[list[dict[str, Any]], Table]:
    tasks = {what: task for made, _ in sides for what, task in made.items()}
    found = speed.records(name, [entry for _, made in sides for entry in made], rounds(tasks, repeats, say))
    return found, speed.table(name if name == "start" else f"{name}: {given.work}", found)


BENCHES: dict[str, Callable[[Given, int, Say], tuple[list[dict[str, Any]], Table]]] = {
    "step": bench_step,
    "decode": bench_decode,
    "train": bench_train,
    "curvature": bench_curvature,
    "start": bench_start,
}


def run(names: Sequence[str], repeats: int, given: Given) -> None:
    """Runs benchmarks, prints their records to standard output and a table of each to standard error.

    The records of a benchmark are printed when it ends, one JSON object a line. Progress goes to standard error.

    Args:
      names: names of benchmarks, keys of `BENCHES`; all of them if empty. A name that occurs twice runs twice.
      repeats: number of timed rounds, at least 1; with 1 there is no interval of times, and its ends in the JSON are
        `-Infinity` and `Infinity`.
      given: what is measured.

    Raises:
      UserError: if a benchmark is not known (nothing has run), or the model's folder is missing or not valid.
    """
    for name in names:
        if name not in BENCHES:
            raise UserError(f"benchmark {name!r} is not known; known: {', '.join(BENCHES)}")
    terminal = Console(stderr=True)
    for name in names or BENCHES:
        found, shown = BENCHES[name](given, repeats, lambda text: terminal.print(text, style="dim", highlight=False))
        for record in found:
            print(json.dumps(record), flush=True)
        wide = Console(stderr=True, width=max(terminal.width, WIDTH))
        wide.print(shown, highlight=False)


def table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    """A table of the records of one benchmark; a ratio that misses its target is red, one that meets it is green.

    There is one row for each record, in their order. The columns are the name of the line, the ratio of FLOPs, the
    lowest one that theory allows, the ratio of times, its 95 % interval, and the ratio of memory. All have two
    decimals; behind a ratio that has a target stands the largest acceptable value. A ratio that is equal to its target
    meets it. A ratio that is not known is "-", a limit that is not known is empty.

    Args:
      title: heading of the table.
      found: the records (`bench.measure.records`). The row of one with a "reason" has its name and the reason alone.
    """
    shown = Table(title=title)
    shown.add_column("", no_wrap=True)
    for header in ("FLOPs", "limit", "time", "95 %", "memory"):
        shown.add_column(header, justify="right", no_wrap=True)
    for record in found:
        if record["reason"] is not None:
            shown.add_row(f"{record['what']}: {record['reason']}")
            continue
        low, high = record["time_ci95"]
        limit = "" if record["limit"] is None else f"{record['limit']:.2f}"
        flops, time, memory = (_cell(record, key) for key in ("flops", "time", "memory"))
        shown.add_row(record["what"], flops, limit, time, f"{low:.2f}-{high:.2f}", memory)
    return shown


def _cell(record: dict[str, Any], key: str) -> str:
    ratio, target = record[f"{key}_ratio"], (record["target"] or {}).get(key)
    if ratio is None:
        return "-"
    if target is None:
        return f"{ratio:.2f}"
    return f"[{'red' if ratio > target else 'green'}]{ratio:.2f}[/] (≤ {target:g})"
