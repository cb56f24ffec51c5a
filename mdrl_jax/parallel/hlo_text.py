"""Parses the HLO text of a compiled program and finds how often each instruction runs.

An HLO module is a set of computations, which are named lists of instructions. One of them is the entry; fusions, calls,
loops and conditionals run others.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

# The name scope (`jax.named_scope`) of conditionals whose branches a program takes equally often.
EQUALLY = "equally_often"

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text.

    Attributes:
      name: name of the instruction, without %.
      shape: text of the result's shape, e.g. f32[8,4]{1,0}, or of a tuple of shapes.
      opcode: e.g. dot or fusion.
      operands: names of the operands; for an instruction without operands the text in its parentheses, which is the
        value of a constant or the number of a parameter.
      attributes: the text after the operands.
      is_root: whether its result is that of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str:
        """The text of the attribute `key=...`, with its braces or quotation marks, if any; "" if it is absent.

        It ends before the next comma, brace or white space. If it begins with a brace, it ends with the closing one; if
        there are further braces between these, the result is "", too.
        """
        found = re.search(rf"\b{key}=(\{{[^{{}}]*\}}|[^\s,{{}}]+)", self.attributes)
        return found[1] if found else ""

    @property
    def where(self) -> str:
        """The JAX operation that it comes from, e.g. `jit(step)/while/body/dot_general`; "" if unknown."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # instructions by name, in the order of the text
Measure = Callable[[Instruction, Computation], float]  # (instruction, its computation) -> amount of one run


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction with the number of its runs in one call of the program.

    Attributes:
      instruction: the instruction.
      computation: the computation that contains it.
      times: number of runs.
      amount: the measure of one run; in a branch of a conditional marked `EQUALLY`, divided by the number of branches.
    """

    instruction: Instruction
    computation: Computation
    times: int
    amount: float


def executed(
    text: str,
    measure: Measure,
    unknown_trips: int | Sequence[int] | None = None,
    fusions: bool = True,
) -> list[Run]:
    """The instructions whose measure is above 0, with the number of their runs in one call of the program.

    The trip count of a loop is the compiler's (`known_trip_count`). If that is absent, it is (bound − start) / step,
    rounded up, from the comparison `counter < bound` in the loop's condition. Bound and start are constants; step is
    the constant that the body adds to the counter, or 1 if it cannot be read. If there is not exactly one such
    comparison, the trip count is unknown. A loop that may also stop early for another reason counts up to the bound.
    The condition of a loop counts as often as its body.

    It looks into fusions, calls, asynchronous calls, loops and conditionals. Computations that other instructions apply
    to elements, such as the sum of a reduce, are not measured.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.
      measure: the amount to count, for one run of an instruction. Of the branches of a conditional, the one with the
        largest total counts; on a tie, the first. Of one in the name scope `EQUALLY`, the mean over branches counts.
      unknown_trips: trip count of every loop with something to count whose own cannot be read. A sequence gives one
        count for each depth: first for such loops that contain no other such loop, then for the loops around those, and
        so on.
      fusions: whether instructions inside fusions are measured, in addition to the fusion itself.

    Returns:
      one entry for each measured instruction, and one more for each further place that runs its computation. The order
      is that of the text; instructions of a called computation come where it is called. `times` is 0 in a loop that
      never runs.

    Raises:
      ValueError: if a loop contains something to count, has an unknown trip count, and `unknown_trips` has none for it;
        or if the text has no entry computation or a line cannot be parsed.
      KeyError: if the text refers to a computation that it does not contain.
    """
    computations, entry = parse(text)
    heights: dict[str, int] = {}  # per computation: depth to which loops of unknown trip count are nested in it

    def largest(branches: list[list[Run]]) -> list[Run]:
        return max(branches, key=lambda runs: sum(run.times * run.amount for run in runs))

    def shared(branches: list[list[Run]]) -> list[Run]:
        n = len(branches)
        return [dataclasses.replace(run, amount=run.amount / n) for runs in branches for run in runs]

    @functools.cache
    def runs_of(name: str) -> list[Run]:
        computation, found = computations[name], []
        for instruction in computation.values():
            amount = measure(instruction, computation)
            if amount > 0:
                found.append(Run(instruction, computation, 1, amount))
            if instruction.opcode == "fusion" and not fusions:
                continue
            called = _called(instruction)
            equally = EQUALLY in instruction.where
            inner = [(shared if equally else largest)([runs_of(c) for c in choice]) for choice in called]
            runs = [run for one in inner for run in one]
            height = max((heights[c] for choice in called for c in choice), default=0)
            times = 1
            if runs and instruction.opcode == "while":
                times = _trips(instruction, computation, computations)
                if times is None:
                    times, height = _given(unknown_trips, height), height + 1
                if times is None:
                    raise ValueError(f"the trip count of loop {instruction.where or name} cannot be read")
            heights[name] = max(heights.get(name, 0), height)
            found += [dataclasses.replace(run, times=run.times * times) for run in runs]
        heights.setdefault(name, 0)
        return found

    return runs_of(entry)


def _given(unknown_trips: int | Sequence[int] | None, height: int) -> int | None:
    if unknown_trips is None or isinstance(unknown_trips, int):
        return unknown_trips
    return unknown_trips[height] if height < len(unknown_trips) else None


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses the text of an HLO module.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`. Lines that are neither the header of a computation nor an
        instruction (`%name = ...`) are skipped.

    Returns:
      the computations by name, in the order of the text, and the name of the entry computation.

    Raises:
      ValueError: if the text has no entry computation, or if an instruction cannot be parsed.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif start := _INSTRUCTION.match(line):
            instruction = _instruction(start[1], line[start.end() :], line.lstrip().startswith("ROOT"))
            current[start[1]] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is not that of a compiled HLO module")
    return computations, entry


def arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """Parses the text of a shape, e.g. f32[8,4]{1,0}, or of a tuple of shapes.

    Returns:
      (bytes per element, dimensions) of the array, or of each array if the shape is a tuple, in the order of the text;
      nested tuples are flattened, and the list is empty if there is no array. Types of less than 8 bits count 1 byte. A
      token gives (0, ()). A scalar has the dimensions (). A dynamic dimension counts as its bound.
    """
    found = []
    for dtype, dims in _ARRAY.findall(shape):
        bits = re.sub(r"\D", "", dtype)
        size = max(int(bits) // 8, 1) if bits else (1 if dtype == "pred" else 0)
        found.append((size, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)))
    return found


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    operands = tuple(_NAME.findall(inside)) or (inside,)
    return Instruction(name, shape, rest[:opening], operands, rest[closing:], is_root)


def _closing(text: str, opening: int) -> int:
    """The index behind the parenthesis that closes the one at index `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _called(instruction: Instruction) -> list[list[str]]:
    """The computations that an instruction runs: one from each list. A conditional has a list of its branches."""
    one = lambda key: [_NAME.findall(instruction.attribute(key))]  # noqa: E731
    match instruction.opcode:
        case "fusion" | "async-start":
            found = one("calls")
        case "call":
            found = one("to_apply")
        case "while":
            found = one("body") + one("condition")
        case "conditional":
            found = [_NAME.findall(instruction.attribute(key)) for key in ("branch_computations", "true_computation")]
            found = [found[0] or found[1] + _NAME.findall(instruction.attribute("false_computation"))]
        case _:
            found = []
    return [names for names in found if names]


def _trips(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[_NAME.findall(loop.attribute("condition"))[0]]
    initial = computation[loop.operands[0]]
    bounds = []
    for counter, bound in _less_than(condition, computations):
        index = condition[counter].attribute("index") if counter in condition else ""
        if bound is None or not index or initial.opcode != "tuple":
            continue
        first = _constant(computation, initial.operands[int(index)])
        if first is not None:
            bounds.append(-(-max(bound - first, 0) // _step(loop, int(index), computations)))
    return bounds[0] if len(bounds) == 1 else None


def _step(loop: Instruction, index: int, computations: dict[str, Computation]) -> int:
    """The constant that the body adds to the loop's counter, above 1 in an unrolled loop; 1 if it cannot be found."""
    body = computations[_NAME.findall(loop.attribute("body"))[0]]
    root = next(i for i in body.values() if i.is_root)
    new, within = (body.get(root.operands[index]) if root.opcode == "tuple" else None), body
    if new is not None and new.opcode == "fusion":
        within = computations[_called(new)[0][0]]
        new = next(i for i in within.values() if i.is_root)
    if new is None or new.opcode != "add":
        return 1
    added = [c for c in (_constant(within, name) for name in new.operands) if c is not None]
    return max(added[0], 1) if len(added) == 1 else 1


def _less_than(condition: Computation, computations: dict[str, Computation]) -> list[tuple[str, int | None]]:
    """The comparisons a < b in a loop's condition, also inside its fusions: (name of a in `condition`, the constant b).

    The constant is None if b is not one.
    """
    found = []
    for outer in condition.values():
        inside = computations[_called(outer)[0][0]] if outer.opcode == "fusion" else condition
        for compare in inside.values() if outer.opcode == "fusion" else [outer]:
            if compare.opcode == "compare" and compare.attribute("direction") == "LT":
                names = list(compare.operands)
                constants = [_constant(inside, name) for name in names]
                if outer.opcode == "fusion":
                    places = [inside[name].operands[0] if inside[name].opcode == "parameter" else "" for name in names]
                    names = [outer.operands[int(place)] if place else "" for place in places]
                known = _constant(condition, names[1]) if constants[1] is None else constants[1]
                found.append((names[0], known))
    return found


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, also behind copies and bitcasts; None if the instruction is anything else."""
    while name in computation and computation[name].opcode in ("copy", "bitcast"):
        name = computation[name].operands[0]
    instruction = computation.get(name)
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
