"""Counts the bytes that a compiled program moves between a device and its memory, from its HLO text.

Each run of an instruction counts its operands as read once and its result as written once. A fusion is one instruction.
Of each of its operands only the elements count that its result needs: of an operand that it slices, the slices, even
where a fusion inside it does the slicing. Of an array that it updates in place, only the update counts. Arrays that the
compiler keeps on chip (memory spaces other than 0) count 0. A kernel that reads an operand several times counts as one
that reads it once.
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
# Instructions that need no more elements of an operand than they give.
ELEMENTWISE = {
    "abs", "add", "and", "atan2", "bitcast", "bitcast-convert", "broadcast", "cbrt", "ceil", "clamp", "compare",
    "complex", "concatenate", "convert", "copy", "cosine", "divide", "erf", "exponential", "exponential-minus-one",
    "floor", "imag", "is-finite", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate", "not",
    "or", "pad", "popcnt", "power", "real", "reduce-precision", "remainder", "reshape", "reverse",
    "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan", "tanh", "transpose", "xor",
}  # fmt: skip


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
            return _fusion_bytes(instruction, computation, computations)
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


def _fusion_bytes(fusion: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    inner = _body(fusion, computations)
    asked = _asked(inner, computations)
    total = 0.0
    for parameter in inner.values():
        if parameter.opcode != "parameter":
            continue
        operand = fusion.operands[int(parameter.operands[0])]
        whole = held(computation[operand].shape) if operand in computation else 0.0
        total += min(whole, asked.get(parameter.name, 0.0) * _element(parameter.shape))
    updated = [
        (root, where)
        for root, where in (_behind(r, inner, computations) for r in _roots(inner))
        if root.opcode == "dynamic-update-slice"
    ]
    total += sum(_plain(where[root.operands[1]].shape) for root, where in updated)
    return total + max(held(fusion.shape) - sum(_plain(root.shape) for root, _ in updated), 0.0)


def _asked(
    inner: Computation, computations: dict[str, Computation], whole: float = math.inf, in_place: bool = True
) -> dict[str, float]:
    """How many elements of each instruction's result a fusion needs, by name; at most all of them.

    It goes backwards from the root. An elementwise instruction needs as many elements of an operand as of its result, a
    slice likewise, and other instructions all elements. An array that the root updates in place is not read.

    Args:
      inner: the computation of the fusion.
      computations: all computations, for fusions inside it.
      whole: how many elements of the root are needed.
      in_place: whether the root may update an array in place.
    """
    asked: dict[str, float] = {}

    def ask(name: str, elements: float) -> None:
        if name in inner:
            asked[name] = min(asked.get(name, 0.0) + elements, _elements(inner[name].shape))

    roots = _roots(inner)
    for root in roots:
        ask(root.name, whole)
    for i in reversed(inner.values()):
        if i.name not in asked or i.opcode in ("parameter", "constant", "iota", "tuple"):
            continue
        need, updates = asked[i.name], in_place and i in roots
        if i.opcode == "fusion":
            body = _body(i, computations)
            below = _asked(body, computations, need, updates)
            for parameter in body.values():
                if parameter.opcode == "parameter":
                    ask(i.operands[int(parameter.operands[0])], below.get(parameter.name, 0.0))
        elif i.opcode == "dynamic-update-slice":
            update = _elements(inner[i.operands[1]].shape)
            ask(i.operands[0], 0.0 if updates else max(need - update, 0.0))
            ask(i.operands[1], min(update, need))
            for index in i.operands[2:]:
                ask(index, 1.0)
        elif i.opcode in SLICES:
            ask(i.operands[0], need)
            for index in i.operands[1:]:
                ask(index, math.inf)
        else:
            for name in i.operands:
                ask(name, need if i.opcode in ELEMENTWISE else math.inf)
    return asked


def _body(fusion: Instruction, computations: dict[str, Computation]) -> Computation:
    return computations[fusion.attribute("calls").lstrip("%")]


def _roots(inner: Computation) -> list[Instruction]:
    """The instructions that a computation returns; bitcasts are looked through."""
    root = next(i for i in inner.values() if i.is_root)
    found = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    out = []
    for instruction in found:
        while instruction.opcode == "bitcast":
            instruction = inner[instruction.operands[0]]
        out.append(instruction)
    return out


def _behind(
    root: Instruction, inner: Computation, computations: dict[str, Computation]
) -> tuple[Instruction, Computation]:
    """A root, or the root of the fusion that it is, and the computation that contains it."""
    while root.opcode == "fusion":
        inner = _body(root, computations)
        root = _roots(inner)[0]
    return root, inner


def _elements(shape: str) -> float:
    return float(sum(math.prod(dims) for _, dims in arrays(shape)))


def _element(shape: str) -> float:
    """Bytes of an element of an array; of a tuple, of its largest one."""
    return float(max((size for size, _ in arrays(shape)), default=0))


def _plain(shape: str) -> float:
    return float(sum(size * math.prod(dims) for size, dims in arrays(shape)))
