"""The command `bench`: runs benchmarks; JSON lines go to standard output, a table goes to standard error."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mdrl_jax.bench import curvature, peers
from mdrl_jax.bench.measure import Task, records, rounds
from mdrl_jax.errors import UserError

Say = Callable[[str], None]
WIDTH = 120  # smallest width of the table, for terminals that are narrow or of unknown width


def bench_curvature(sizes: curvature.Sizes, repeats: int, say: Say) -> list[dict[str, Any]]:
    """Measures second-order products of a random decoder, beside those of other libraries if these are installed.

    Args:
      sizes: sizes of the model and of the batch.
      repeats: number of timed rounds, at least 1; with 1 the intervals of times are [-inf, inf].
      say: called with a line of text about the progress.

    Returns:
      One record for each line of the table (`bench.measure.records`): those of this package first, then those of
      matfree and of curvlinops. A library that is not installed has one record, with a "reason" and no figures.
    """
    say(f"compiling for {sizes}")
    given = curvature.problem(sizes)
    on = curvature.route(given)
    tasks: dict[str, Task] = {**curvature.whole_tasks(given), **curvature.route_tasks(given, on)}
    lines = list(curvature.LINES)
    for make in (lambda: peers.matfree(given, on), lambda: peers.curvlinops(given)):
        more, theirs = make()
        tasks.update(more)
        lines += theirs
    return records("curvature", lines, tasks, rounds(tasks, repeats, say))


BENCHES: dict[str, Callable[[curvature.Sizes, int, Say], list[dict[str, Any]]]] = {"curvature": bench_curvature}


def run(names: Sequence[str], repeats: int, layers: int, width: int, rows: int) -> None:
    """Runs benchmarks, prints their records to standard output and a table of each to standard error.

    The records of a benchmark are printed when it ends, one JSON object a line. Progress goes to standard error.

    Args:
      names: names of benchmarks, keys of `BENCHES`; all of them if empty. A name that occurs twice runs twice.
      repeats: number of timed rounds, at least 1; with 1 there is no interval of times, and its ends in the JSON are
        `-Infinity` and `Infinity`.
      layers: layers of the model, at least 1.
      width: embedding size of the model, a multiple of 32.
      rows: sequences in a batch, at least 1.

    Raises:
      UserError: if a benchmark is not known, or `width` is no multiple of 32. Nothing has run.
    """
    for name in names:
        if name not in BENCHES:
            raise UserError(f"benchmark {name!r} is not known; known: {', '.join(BENCHES)}")
    sizes = curvature.Sizes(layers=layers, width=width, rows=rows)
    terminal = Console(stderr=True)
    for name in names or BENCHES:
        found = BENCHES[name](sizes, repeats, lambda text: terminal.print(text, style="dim", highlight=False))
        for record in found:
            print(json.dumps(record), flush=True)
        wide = Console(stderr=True, width=max(terminal.width, WIDTH))
        wide.print(table(f"{name}: {sizes}", found), highlight=False)


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
