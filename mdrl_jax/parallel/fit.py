"""Compiles programs for a device, reads their memory, operations and collectives, and finds the largest size that fits.

A program takes this memory of a device:

    program + arguments + temporaries + outputs − aliased

Aliased is the memory that outputs share with donated arguments. The device also holds arrays that the program does not
take, such as the optimizer's moments while completions are sampled; the caller adds these.

Temporaries are read from the compiler's buffer assignment, which is also its basis for refusing a program that is too
large. `memory_analysis` reports more: it adds on-chip memory and, for loops that keep stacks of layers, gigabytes that
are never allocated (jaxlib 0.10).
"""

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.chips import Chip
from mdrl_jax.parallel.hlo_bytes import traffic
from mdrl_jax.parallel.hlo_text import Measure

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REFUSED = re.compile(r"(?:required for HLO temporaries \(|[Uu]sed )([\d.]+)([KMGT]?)")

# A line of the compiler's plan. On-chip memory has a colour other than 0; jaxlib 0.12 adds a page.
TEMPORARY = re.compile(r"allocation \d+: size (\d+)(?:, page \d+)?(?:, color (\d+))?(?:, page \d+)?, preallocated-temp")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The cost of a compiled program on one device.

    Attributes:
      memory: bytes by "program", "arguments", "temporaries", "outputs" and "aliased". For a program that the compiler
        refused it has only "refused": the bytes that the program needs, as the compiler states them.
      flops: operations of matrix products in one call, kernels included; NaN if refused.
      traffic: bytes to and from memory in one call; NaN if refused.
      collectives: the collectives of one call.
      seconds: time that compiling took.
    """

    memory: Mapping[str, float]
    flops: float
    traffic: float
    collectives: tuple[hlo.Collective, ...]
    seconds: float

    @property
    def bytes(self) -> float:
        """Bytes of a device's memory that the program takes, or would take if refused; infinite if that is unknown."""
        m = self.memory
        if "refused" in m:
            return m["refused"]
        return m["program"] + m["arguments"] + m["temporaries"] + m["outputs"] - m["aliased"]

    def roofline(self, chip: Chip) -> float:
        """The least time of a call in seconds: the larger of flops / peak and traffic / bandwidth; NaN if refused."""
        return max(self.flops / chip.flops, self.traffic / chip.bandwidth)


def compile_for(
    lower: Callable[[], Any],
    unknown_trips: int | Sequence[int] | None = None,
    kernels: Measure = lambda instruction, computation: 0.0,
) -> Compiled:
    """Lowers and compiles a program and reads its cost. A program that is too large is a result, not an error.

    The compiler writes its buffer assignment to a temporary folder, which is removed. JAX's persistent compilation
    cache is not used, because it would give the program without compiling it.

    Args:
      lower: () -> `jax.jit(f).lower(...)`. It is called once; what it raises is not caught, except running out of
        memory.
      unknown_trips: trip count of every loop with something to count whose own cannot be read. A sequence gives one
        count for each depth of such loops, the innermost first.
      kernels: (instruction, its computation) -> operations of an instruction that is opaque to the compiler, 0 for any
        other, such as `flops.kernel_flops`. By default such instructions count 0.

    Returns:
      the cost; if the compiler ran out of memory, its `memory` is {"refused": bytes}, `flops` and `traffic` are NaN,
      and `collectives` is empty.

    Raises:
      jax.errors.JaxRuntimeError: if compiling fails for another reason than memory.
      ValueError: if a loop with something to count has an unknown trip count, and `unknown_trips` has none for it.
      RuntimeError: if this version of XLA describes its plan in an unknown form (`temporaries`).
    """
    started = time.monotonic()
    try:
        compiled, temporary = _planned(lower())
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return Compiled({"refused": needed(str(e))}, math.nan, math.nan, (), time.monotonic() - started)
    seconds = time.monotonic() - started
    m, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        {
            "program": m.generated_code_size_in_bytes,
            "arguments": m.argument_size_in_bytes,
            "temporaries": temporary,
            "outputs": m.output_size_in_bytes,
            "aliased": m.alias_size_in_bytes,
        },
        hlo.matmul_flops(text, unknown_trips, kernels),
        traffic(text, unknown_trips),
        tuple(hlo.collectives(text, unknown_trips)),
        seconds,
    )


def _planned(lowered: Any) -> tuple[Any, float]:
    """Compiles a program; returns it with the bytes of temporaries that it gets in the main memory of a device."""
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (plan,) = Path(folder).glob("*buffer-assignment.txt")
        with plan.open() as lines:
            return compiled, temporaries(lines)


def temporaries(plan: Iterable[str]) -> float:
    """Bytes of temporaries in the main memory of a device.

    Args:
      plan: the lines of the compiler's plan of buffers, as XLA dumps it.

    Raises:
      RuntimeError: if a line of temporaries has a form that is not known, as another version of XLA may write it.
    """
    total = 0
    for line in plan:
        if "preallocated-temp" not in line:
            continue
        found = TEMPORARY.match(line)
        if not found:
            raise RuntimeError(f"this version of XLA describes temporaries in an unknown form: {line.strip()!r}")
        total += int(found[1]) if found[2] in (None, "0") else 0
    return float(total)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it uses the cache, and remembers that
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def needed(message: str) -> float:
    """Bytes that a refused program needs; infinite if the message does not state them.

    Args:
      message: the text of the compiler's error RESOURCE_EXHAUSTED. The size is the first number after "used" or "Used",
        or after "required for HLO temporaries (", with a unit of K, M, G or T (powers of 1024) or none.
    """
    found = REFUSED.search(message)
    return float(found[1]) * UNITS[found[2]] if found else math.inf


def bytes_a_device(tree: Any) -> float:
    """Bytes that a tree of arrays takes on each device.

    Args:
      tree: a tree of JAX arrays or `jax.ShapeDtypeStruct`s. Every leaf must have a sharding that divides it evenly.

    Returns:
      the sum, over the leaves, of the bytes of one device's shard; 0 for an empty tree.

    Raises:
      AttributeError: if a leaf has no sharding, such as a NumPy array.
      ValueError: if a sharding does not divide its leaf evenly.
    """
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves))


def whole_parameters(compiled: Compiled, params: Any, gathered: Callable[[Any], Any]) -> list[str]:
    """Finds all-gathers whose result is a whole parameter: all layers of a stack at once, or a table without layers.

    FSDP gathers the weights of one layer at a time; these gathers are not reported. The compiler may split one gather
    into several, or gather along one dimension and rearrange afterwards, so the shape alone does not identify it. A
    result counts as a whole parameter if it has as many elements as the parameter, and if one of these holds:

    - it has as many dimensions as the parameter's shard, and each is a multiple of the shard's;
    - one of its dimensions is the number of layers of the stack (for a table without layers: its longest dimension).

    Parameters of one dimension, such as the scale of the last norm, are not looked for.

    Args:
      compiled: the program; a refused one has no gathers.
      params: tree of arrays or `jax.ShapeDtypeStruct`s, one for each parameter. Each must have a NamedSharding that
        divides it evenly. Leaves whose path begins with `layers/` are stacks of layers, along their first axis.
      gathered: sharding -> the sharding after a gather that leaves tensor parallelism as it is
        (`sharding.over_tensor`). A result of the size of one device's part under it counts as whole, too.

    Returns:
      a text for each such gather: the parameter, the shape of the result, and the JAX operation that it comes from. The
      order is that of the gathers in the program, and for one gather that of the parameters. A gather that fits several
      parameters, or whose arrays (with the operands of an asynchronous one) fit one several times, is listed once for
      each. The list is empty if there is none.

    Raises:
      AttributeError: if the program has an all-gather and a parameter of two or more dimensions has no sharding.
    """
    named = [
        (jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    found = []
    for c in compiled.collectives:
        if c.kind != "all-gather":
            continue
        for name, x in named:
            for dims in c.shapes:
                if len(x.shape) > 1 and _is_whole(dims, name.startswith("layers/"), x, gathered):
                    found.append(f"{name} {list(dims)} at {c.where or 'a place without a name'}")
    return found


def _is_whole(dims: tuple[int, ...], layered: bool, x: Any, gathered: Callable[[Any], Any]) -> bool:
    if math.prod(dims) not in {math.prod(x.shape), math.prod(gathered(x.sharding).shard_shape(x.shape))}:
        return False
    shard = x.sharding.shard_shape(x.shape)
    grown = len(dims) == len(shard) and all(n % m == 0 for n, m in zip(dims, shard, strict=True))
    return grown or (x.shape[0] if layered else max(x.shape)) in dims


def by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, tuple[float, int]]:
    """Sums the collectives of one call by kind.

    Returns:
      kind -> (bytes of all runs on one device, number of runs), for the kinds that occur, in the order in which they
      first occur; {} without collectives.
    """
    kinds: dict[str, tuple[float, int]] = {}
    for c in collectives:
        total, times = kinds.get(c.kind, (0.0, 0))
        kinds[c.kind] = total + float(c.bytes) * c.times, times + c.times
    return kinds


def largest(bytes_of: Callable[[int], float], room: float, unit: int, most: int, known: Mapping[int, float]) -> int:
    """The largest multiple of `unit` up to `most` at which `bytes_of` is at most `room`; 0 if there is none.

    Memory grows about linearly with the size, so interpolation needs few compilations. Between the largest size known
    to fit and the smallest known not to fit, the next size is where a line meets `room`; the line goes through the two
    compiled sizes nearest to this interval. The size returned was always compiled, or is in `known`. That one unit more
    does not fit was either compiled or follows from the line.

    Args:
      bytes_of: size -> bytes of a device, by compiling the program at this size. It must not fall as the size grows,
        and may be infinite. It is called at most once for each size, and not for those in `known`; what it raises is
        not caught.
      room: bytes of a device that the program may take.
      unit: the step between sizes, 1 or more.
      most: the largest size of interest; below `unit` the answer is 0, and nothing is compiled.
      known: sizes that were compiled before, multiples of `unit` up to `most`, with their bytes; it may be empty. It is
        not changed.
    """
    most -= most % unit
    seen = dict(known)

    def measured(size: int) -> float:
        if size not in seen:
            seen[size] = bytes_of(size)
        return seen[size]

    if most < unit:
        return 0
    if len(seen) < 2:
        at = next(iter(seen), unit)
        measured(at)
        measured(at + unit if at + unit <= most and at == unit else max(unit, at // 2 // unit * unit))
    while True:
        low = max((n for n in seen if seen[n] <= room), default=0)
        high = min((n for n in seen if seen[n] > room), default=most + unit)
        guess = _guess(seen, low, high, room, unit)
        if low and (guess <= low or high - low <= unit):
            return low
        if not low and high <= unit:
            return 0
        measured(min(max(guess, low + unit), high - unit))


def _guess(seen: Mapping[int, float], low: int, high: int, room: float, unit: int) -> int:
    """The size at which the line through two compiled sizes meets `room`, rounded down to a multiple of `unit`."""
    points = sorted((n for n in seen if math.isfinite(seen[n])), key=lambda n: min(abs(n - low), abs(n - high)))[:2]
    middle = (low + high) // 2 // unit * unit
    if len(points) < 2 or seen[points[0]] == seen[points[1]]:
        return middle
    slope = (seen[points[0]] - seen[points[1]]) / (points[0] - points[1])
    if slope <= 0:
        return middle
    at = points[0] + (room - seen[points[0]]) / slope
    return int(min(max(at, 0), high) // unit * unit)
