"""The typed values that answers are read into, and how they are built."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000  # of a number; longer ones are text, so that a reply cannot cause slow integer arithmetic
MAX_EXPONENT = 1000  # of ten, in scientific notation
CONSTANTS = ("\\pi", "e", "i", "\\infty", "\\emptyset")


@dataclass(frozen=True)
class Node:
    """A value that was read.

    Attributes:
      kind: one of the kinds in the package's table.
      args: its parts.
      name: of a number its form: integer, decimal, fraction, mixed, scientific, scaled (a number times a power of ten
        that is not scientific notation) or percent. Of a relation its signs, of a group its brackets, of a list the
        word that joins it ("or" or ","), of a unit the unit. Of a symbol, a function or a text the name or text itself.
      value: of a number. A percentage has its value over 100.
    """

    kind: str
    args: tuple["Node", ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)


class Unread(Exception):
    """The tokens are no formula that this parser reads."""


def integer(n: int) -> Node:
    """The number n as a node."""
    return Node("number", (), "integer", Fraction(n))


def literal(text: str) -> Node:
    """The number of a token. "0.1r6" is 0.1666..., and "1.2e5" is scientific notation.

    Raises:
      Unread: if it has too many digits.
    """
    if len(text) > MAX_DIGITS:
        raise Unread
    if "r" in text:
        whole, _, rest = text.partition(".")
        fixed, _, repeated = rest.partition("r")
        scale = 10 ** len(fixed)
        value = Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), scale)
        return Node("number", (), "decimal", value + Fraction(int(repeated), scale * (10 ** len(repeated) - 1)))
    if "e" in text:
        mantissa, _, power = text.partition("e")
        if abs(int(power)) > MAX_EXPONENT:
            raise Unread
        return Node("number", (), "scientific", Fraction(mantissa) * Fraction(10) ** int(power))
    return Node("number", (), "decimal" if "." in text else "integer", Fraction(text))


def mixed(whole: Node, part: Node) -> Node:
    """A whole number and a fraction below 1 as a mixed number.

    Raises:
      Unread: if the fraction is none below 1.
    """
    if part.kind != "number" or part.name != "fraction" or not 0 < part.value < 1:
        raise Unread
    return Node("number", (), "mixed", whole.value + part.value)


def negated(node: Node) -> Node:
    """The node with a minus sign before it. A number stays a number; "--3" does not."""
    if node.kind == "number" and node.value >= 0:
        return Node("number", (), node.name, -node.value)
    if node.kind == "unit":
        return Node("unit", (negated(node.args[0]),), node.name)
    if node.kind == "plusminus":
        raise Unread
    return Node("negative", (node,))


def times(a: Node, b: Node) -> Node:
    """The product of two nodes, flat. A unit may be in no factor."""
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise Unread
    factors = (a.args if a.kind == "product" else (a,)) + (b.args if b.kind == "product" else (b,))
    return Node("product", factors)


def quotient(a: Node, b: Node) -> Node:
    """The quotient of two nodes. A fraction of two integers is a number."""
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise Unread
    if a.kind == b.kind == "number" and a.name == b.name == "integer" and b.value != 0:
        return Node("number", (), "fraction", a.value / b.value)
    return Node("quotient", (a, b))


def children(node: Node) -> Iterable[Node]:
    """All nodes of a tree, itself first."""
    yield node
    for arg in node.args:
        yield from children(arg)


def any_node(node: Node, test: Callable[[Node], bool]) -> bool:
    """Whether a node of the tree passes the test."""
    return any(test(n) for n in children(node))


def is_closed(node: Node) -> bool:
    """Whether a value has no variables: every symbol in it is a known constant."""
    parts = list(children(node))
    if any(n.kind in ("text", "call", "list", "relation", "matrix", "set", "group", "union") for n in parts):
        return False
    return all(n.name in ("\\pi", "e", "i") for n in parts if n.kind == "symbol")


def is_fixed(node: Node) -> bool:
    """Whether a value has no variables, texts or unknown functions."""
    return not any_node(node, lambda n: n.kind in ("text", "call") or (n.kind == "symbol" and n.name not in CONSTANTS))
