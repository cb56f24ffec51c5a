"""Counts the matrix products and collectives that a compiled program executes, from its HLO text.

`compiled.cost_analysis()` counts the body of a loop once, so a scan over layers would cost as much as one layer. Here
every instruction counts as often as it runs: fusions and calls are followed, the body of a while loop is multiplied by
its trip count, and of a conditional only the most expensive branch counts. Shapes in a compiled program are those of
one device, so all figures are for one device.

The counts differ from a profiler's in two ways. Kernels that are opaque to the compiler (Pallas, cuDNN attention) count
0 unless the caller passes their cost. A product with a vector counts 0 if the compiler made it a multiplication and a
sum.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from mdrl_jax.parallel.hlo_text import Computation, Instruction, Measure, Run, arrays, executed

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: size of its inputs or of its outputs on one device, whichever is larger, in one run. For an all-gather this
        is the gathered array, for a reduce-scatter the array before scattering.
      times: number of runs in one call of the program.
      where: the JAX operation that it comes from.
      shapes: dimensions of its outputs; of an asynchronous all-gather or collective-permute also those of its inputs.
    """

    kind: str
    bytes: int
    times: int
    where: str
    shapes: tuple[tuple[int, ...], ...] = ()


def matmul_flops(
    text: str, unknown_trips: int | Sequence[int] | None = None, kernels: Measure = lambda instruction, computation: 0.0
) -> float:
    """Floating-point operations of all dense matrix products that one call executes on one device.

    A dot or a GEMM call counts 2 · |output| · (contracted size). TPU compilers turn dots into convolutions. A
    convolution counts 2 for each multiplication whose operand is neither padding nor a hole of a dilation.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.
      unknown_trips: trip count of every loop with something to count whose own cannot be read. A sequence gives one
        count for each depth: first for such loops that contain no other such loop, then for the loops around those, and
        so on.
      kernels: (instruction, its computation) -> operations of an instruction that is opaque to the compiler. It is
        called for every instruction and added to its count, so it must give 0 for all others. By default it gives 0.

    Returns:
      floating-point operations.

    Raises:
      ValueError: if a loop with matrix products has an unknown trip count and `unknown_trips` has none for it, or if
        the text is not that of a compiled HLO module.
      KeyError: if the text refers to a computation or an operand that it does not contain.
    """

    def measure(instruction: Instruction, computation: Computation) -> float:
        return _matmul_flops(instruction, computation) + kernels(instruction, computation)

    return sum(run.times * run.amount for run in executed(text, measure, unknown_trips))


def collectives(text: str, unknown_trips: int | Sequence[int] | None = None) -> list[Collective]:
    """The collectives that one call executes on one device.

    An asynchronous collective consists of a start and an end, and is listed once, at its start. Of the branches of a
    conditional, only the one whose collectives have the most bytes counts. Collectives of 0 bytes are left out.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.
      unknown_trips: trip count of every loop with collectives whose own cannot be read. A sequence gives one count for
        each depth of such loops, the innermost first.

    Returns:
      one entry for each instruction, and one more for each further place that runs its computation. The order is that
      of the text; a called computation comes where it is called. `times` is 0 in a loop that never runs.

    Raises:
      ValueError: if a loop with collectives has an unknown trip count and `unknown_trips` has none for it, or if the
        text is not that of a compiled HLO module.
      KeyError: if the text refers to a computation or an operand that it does not contain.
    """
    runs = executed(text, _collective_bytes, unknown_trips)
    return [_collective(run) for run in runs]


def _collective(run: Run) -> Collective:
    given = tuple(dims for _, dims in arrays(run.instruction.shape))
    kind = _kind(run.instruction, run.computation)
    return Collective(kind, int(run.amount), run.times, run.instruction.where, given)


def _dims(computation: Computation, name: str) -> tuple[int, ...]:
    return arrays(computation[name].shape)[0][1]


def _matmul_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    output = arrays(instruction.shape)[0][1] if arrays(instruction.shape) else ()
    if instruction.opcode == "dot":
        contracted = [int(i) for i in re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))]
    else:
        numbers = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
        if instruction.attribute("custom_call_target") == '"__onednn$matmul"':
            # The call has no dimension numbers. For [b, m, k] x [b, k, n], either one possibly transposed,
            # |lhs| |rhs| / |output| = b k², which gives k.
            sizes = [math.prod(_dims(computation, name)) for name in instruction.operands[:2]]
            inner = math.isqrt(math.prod(sizes) // math.prod(output) // math.prod(output[:-2]))
            return 2.0 * math.prod(output) * inner
        if numbers is None:
            return 0
        contracted = [int(i) for i in json.loads(numbers[1])]
    lhs = _dims(computation, instruction.operands[0])
    return 2.0 * math.prod(output) * math.prod(lhs[i] for i in contracted)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    lhs_labels, rhs_labels, out_labels = re.split("_|->", instruction.attribute("dim_labels"))
    lhs, rhs = (_dims(computation, name) for name in instruction.operands[:2])
    output = arrays(instruction.shape)[0][1]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))
    flops = 2.0 * lhs[lhs_labels.index("b")] / int(instruction.attribute("batch_group_count") or 1)
    flops *= rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]  # "i" counts the input features of one group
    for i, label in enumerate(sorted(filter(str.isdigit, out_labels))):
        stride, hole, spread = (
            int(window[key].split("x")[i]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        out = np.arange(output[out_labels.index(label)])[:, None] * stride - low
        at = out + np.arange(rhs[rhs_labels.index(label)])[None, :] * spread
        inside = (at >= 0) & (at <= (lhs[lhs_labels.index(label)] - 1) * hole)
        flops *= int(np.sum(inside & (at % hole == 0)))
    return flops


def _kind(instruction: Instruction, computation: Computation) -> str:
    kind = instruction.opcode.removesuffix("-start")
    root = next(i for i in computation.values() if i.is_root)
    # TPU compilers write a reduce-scatter as a fusion of an all-reduce with the slice that the device keeps.
    scattered = kind == "all-reduce" and root.opcode == "dynamic-slice" and root.operands[0] == instruction.name
    return "reduce-scatter" if scattered else kind


def _collective_bytes(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode.removesuffix("-start") not in COLLECTIVES:
        return 0
    # TPU compilers repeat an asynchronous collective in three fusions: its start, the work beside it, and its end. Only
    # the first counts.
    starts = any("AsyncCollectiveStart" in i.attributes for i in computation.values())
    if "chain_id=" in instruction.attributes and not starts:
        return 0

    def size(shape: str) -> int:
        return sum(n * math.prod(dims) for n, dims in arrays(shape))

    taken = sum(size(computation[name].shape) for name in instruction.operands)
    given = size(instruction.shape)
    if instruction.opcode == "all-gather-start" or instruction.opcode == "collective-permute-start":
        given -= taken  # the result tuple of these contains the operand too
    return max(taken, given)
