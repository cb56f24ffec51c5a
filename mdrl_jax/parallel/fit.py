"""What a program asks of a device, from the compiler of that device: memory, work, collectives; the largest that fits.

Memory is program + arguments + temporaries + outputs − what outputs share with donated arguments, and beside it lies
what the program does not see, such as the optimizer's moments while completions are sampled. Temporaries are those of
the compiler's plan, by which it refuses what is too large: to them `memory_analysis` adds on-chip memory, and, of loops
that keep stacks of layers, gigabytes that are nowhere allocated (jaxlib 0.10).
"""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax.parallel import hlo
from mdrl_jax.parallel.chips import Chip
from mdrl_jax.parallel.hlo_bytes import traffic
from mdrl_jax.parallel.hlo_text import Measure

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REFUSED = re.compile(r"(?:required for HLO temporaries \(|[Uu]sed )([\d.]+)([KMGT]?)")

TEMPORARY = re.compile(r"allocation \d+: size (\d+), preallocated-temp")  # of on-chip memory there is a color before it


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, of one device.

    Attributes:
      memory: bytes it takes, by "program", "arguments", "temporaries", "outputs" and "aliased"; of a program that the
        compiler refused, "refused": what it says that it needs.
      flops: of matrix products, kernels included, of one call.
      traffic: bytes to and from memory of one call.
      collectives: what moves between devices.
      seconds: that compiling took.
    """

    memory: Mapping[str, float]
    flops: float
    traffic: float
    collectives: tuple[hlo.Collective, ...]
    seconds: float

    @property
    def bytes(self) -> float:
        """What it takes of a device's memory."""
        m = self.memory
        if "refused" in m:
            return m["refused"]
        return m["program"] + m["arguments"] + m["temporaries"] + m["outputs"] - m["aliased"]

    def roofline(self, chip: Chip) -> float:
        """Seconds that a call takes at least: at the chip's peak, or at its bandwidth."""
        return max(self.flops / chip.flops, self.traffic / chip.bandwidth)


def compile_for(
    lower: Callable[[], Any],
    unknown_trips: int | Sequence[int] | None = None,
    kernels: Measure = lambda instruction, computation: 0.0,
) -> Compiled:
    """Lowers and compiles a program and reads what it does; one that is too large is a result, not an error.

    Args:
      lower: () -> `jax.jit(f).lower(...)`.
      unknown_trips: as in `hlo.matmul_flops`.
      kernels: as in `hlo.matmul_flops`.
    """
    started = time.monotonic()
    try:
        compiled, temporaries = _planned(lower())
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
            "temporaries": temporaries,
            "outputs": m.output_size_in_bytes,
            "aliased": m.alias_size_in_bytes,
        },
        hlo.matmul_flops(text, unknown_trips, kernels),
        traffic(text, unknown_trips),
        tuple(hlo.collectives(text, unknown_trips)),
        seconds,
    )


def _planned(lowered: Any) -> tuple[Any, float]:
    """A program compiled, and the bytes of temporaries in the main memory of a device that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (plan,) = Path(folder).glob("*buffer-assignment.txt")
        with plan.open() as lines:
            return compiled, float(sum(int(found[1]) for found in map(TEMPORARY.match, lines) if found))


def needed(message: str) -> float:
    """Bytes that a refused program needs, as the compiler says; infinite where it does not."""
    found = REFUSED.search(message)
    return float(found[1]) * UNITS[found[2]] if found else math.inf


def bytes_a_device(tree: Any) -> float:
    """Bytes that arrays, or their shapes with shardings, take of each device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves))


def whole_parameters(compiled: Compiled, params: Any, gathered: Callable[[Any], Any]) -> list[str]:
    """All-gathers whose result is a whole parameter: a stack of layers, or a table that is not layered.

    One gather may be written in stages, or along one dimension and rearranged afterwards: what tells it is that a
    result has as many elements as the parameter, and the stack's layers or dimensions that are multiples of a shard's.

    Args:
      params: shapes of the parameters with their shardings.
      gathered: sharding -> one that leaves alone what layer-by-layer gathers may leave alone (tensor parallelism).

    Returns:
      one text each: the parameter and where the gather comes from. Gathers of one layer are FSDP's own.
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
    """(bytes, times) of all collectives of each kind, of one call."""
    kinds: dict[str, tuple[float, int]] = {}
    for c in collectives:
        total, times = kinds.get(c.kind, (0.0, 0))
        kinds[c.kind] = total + float(c.bytes) * c.times, times + c.times
    return kinds


def largest(bytes_of: Callable[[int], float], room: float, unit: int, most: int, known: Mapping[int, float]) -> int:
    """The largest multiple of `unit` up to `most` at which `bytes_of` is at most `room`; 0 if there is none.

    Memory grows about linearly, so that a bisection needs few compilations: sizes between one that fits and one that
    does not are taken where the line through the two compiled sizes nearest to them meets `room`. The answer itself was
    compiled; that one unit more does not fit was compiled or is said by the line.

    Args:
      bytes_of: compiles a size.
      known: sizes that were compiled before, with their bytes.
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
