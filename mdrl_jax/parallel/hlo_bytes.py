"""Counts the bytes that a compiled program moves between a device and its memory, from its HLO text.

Each run of an instruction counts its operands as read once and its result as written once. A fusion is one instruction.
If it only slices an operand, the slices count; if it updates an array in place, the update counts. Arrays that the
compiler keeps on chip (memory spaces other than 0) count 0. If a kernel reads an operand several times, this is not
seen.
"""

import math
import re
from collections.abc import Sequence

from mdrl_jax.parallel.hlo_text import Computation, Instruction, arrays, executed, parse

_PLACED = re.compile(r"[a-z]+\d*\w*\[[\d,<=]*\](\{[^{}]*\})?")
# Instructions that count 0: they move no bytes, or their bytes count in the computation that they run, or at the start
# of their transfer.
FREE = {
    "add-dependency", "after-all", "async-done", "async-start", "async-update", "bitcast", "call", "conditional",
    "constant", "copy-done", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "recv-done",
    "replica-id", "send-done", "tuple", "while",
}  # fmt: skip
NO_WORK = ('"AllocateBuffer"', '"ConcatBitcast"', '"AsyncCollectiveStart"', '"AsyncCollectiveDone"')
SLICES = ("dynamic-slice", "slice", "gather")


def traffic(text: str, unknown_trips: int | Sequence[int] | None = None) -> float:
    """Bytes that one call on one device reads from the device's memory and writes to it.

    Of the branches of a conditional, only the one that moves the most bytes counts.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.
      unknown_trips: trip count of every loop that moves bytes and whose own cannot be read. A sequence gives one count
        for each depth of such loops, the innermost first.

    Raises:
      ValueError: if a loop that moves bytes has an unknown trip count and `unknown_trips` has none for it, or if the
        text is not that of a compiled HLO module.
      KeyError: if the text refers to a computation or an operand that it does not contain.
    """
    computations, _ = parse(text)

    def measure(instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") in NO_WORK:
            return 0
        if instruction.opcode == "fusion":
            inner = computations[instruction.attribute("calls").lstrip("%")]
            return _fusion_bytes(instruction, computation, inner)
        if instruction.opcode in SLICES:
            return 2 * held(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * held(computation[instruction.operands[1]].shape)
        read = sum(held(computation[name].shape) for name in instruction.operands if name in computation)
        given = held(instruction.shape)
        if instruction.opcode.endswith("-start"):
            given = max(given - read, 0)  # the result tuple contains the operand too
        return read + given

    return sum(run.times * run.amount for run in executed(text, measure, unknown_trips, fusions=False))


def held(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in the device's main memory, which is memory space 0.

    Args:
      shape: text of an HLO shape, e.g. f32[8,4]{1,0}, or of a tuple of shapes. Its layout names the memory space, e.g.
        {1,0:S(1)}; without one the array lies in main memory. Elements of less than 8 bits count 1 byte, tokens 0.
    """
    total = 0.0
    for match in _PLACED.finditer(shape):
        if "S(" not in (match[1] or ""):
            total += sum(size * math.prod(dims) for size, dims in arrays(match[0]))
    return total


def _fusion_bytes(fusion: Instruction, computation: Computation, inner: Computation) -> float:
    total = 0.0
    for parameter in inner.values():
        if parameter.opcode != "parameter":
            continue
        operand = fusion.operands[int(parameter.operands[0])]
        whole = held(computation[operand].shape) if operand in computation else 0.0
        total += min(whole, _read(parameter.name, inner)) if whole else 0.0
    for root in _roots(inner):
        update = root.opcode == "dynamic-update-slice"
        total += _plain(inner[root.operands[1]].shape) if update else 0.0
    in_place = [r for r in _roots(inner) if r.opcode == "dynamic-update-slice"]
    kept = held(fusion.shape) - sum(_plain(r.shape) for r in in_place)
    return total + max(kept, 0.0)


def _read(name: str, inner: Computation) -> float:
    """Bytes of a fusion's parameter that its users read: the sum of slices, or infinite if a user reads all of it."""
    total = 0.0
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user.name, inner)
        elif user.opcode in SLICES and user.operands[0] == name:
            total += _plain(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # an array that is updated in place is not read
        else:
            return math.inf
    return total


def _roots(inner: Computation) -> list[Instruction]:
    root = next(i for i in inner.values() if i.is_root)
    found = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [_behind(i, inner) for i in found]


def _behind(instruction: Instruction, inner: Computation) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = inner[instruction.operands[0]]
    return instruction


def _plain(shape: str) -> float:
    return float(sum(size * math.prod(dims) for size, dims in arrays(shape)))
