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
    """The number n as a node of the form integer."""
    return Node("number", (), "integer", Fraction(n))


def literal(text: str) -> Node:
    """Reads the text of a token of the kind num (`tokens.tokens`), which has no sign, as a number.

    Digits have the form integer, digits with a point the form decimal. "0.1r6", in which the digits after the r repeat
    (0.1666...), is a decimal too. "1.2e5" has the form scientific.

    Raises:
      Unread: if it has over `MAX_DIGITS` characters, or its exponent is beyond ±`MAX_EXPONENT`.
      ValueError: if the text is no number. What else `Fraction` reads, such as "-3" or "1/2", is not refused.
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
    """A whole number and a fraction below 1 as a mixed number; its value is their sum.

    That `whole` is a number is not checked.

    Raises:
      Unread: if `part` is no number of the form fraction between 0 and 1, both excluded.
    """
    if part.kind != "number" or part.name != "fraction" or not 0 < part.value < 1:
        raise Unread
    return Node("number", (), "mixed", whole.value + part.value)


def negated(node: Node) -> Node:
    """The node with a minus sign before it.

    A number of at least 0 stays a number of its form, and a unit stays around its value. Anything else, a negative
    number too ("--3"), gets a node of the kind negative around it.

    Raises:
      Unread: if the node is of the kind plusminus, or a unit around one.
    """
    if node.kind == "number" and node.value >= 0:
        return Node("number", (), node.name, -node.value)
    if node.kind == "unit":
        return Node("unit", (negated(node.args[0]),), node.name)
    if node.kind == "plusminus":
        raise Unread
    return Node("negative", (node,))


def times(a: Node, b: Node) -> Node:
    """The product of two nodes, flat: a factor that is a product gives its own factors. Nothing is multiplied out.

    Raises:
      Unread: if one of them is a list, relation, ratio or text.
    """
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise Unread
    factors = (a.args if a.kind == "product" else (a,)) + (b.args if b.kind == "product" else (b,))
    return Node("product", factors)


def quotient(a: Node, b: Node) -> Node:
    """The quotient of two nodes. Two numbers of the form integer, also 6 and 3, give a number of the form fraction.

    Anything else, a division by the number 0 too, gives a node of the kind quotient.

    Raises:
      Unread: if one of them is a list, relation, ratio or text.
    """
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise Unread
    if a.kind == b.kind == "number" and a.name == b.name == "integer" and b.value != 0:
        return Node("number", (), "fraction", a.value / b.value)
    return Node("quotient", (a, b))


def children(node: Node) -> Iterable[Node]:
    """Yields all nodes of a tree, each before its parts, which follow in order; the tree's own node is the first."""
    yield node
    for arg in node.args:
        yield from children(arg)


def any_node(node: Node, test: Callable[[Node], bool]) -> bool:
    """Whether at least one node of the tree, its own node included, passes the test."""
    return any(test(n) for n in children(node))


def is_closed(node: Node) -> bool:
    """Whether a node is a single value without variables: every symbol in it is `\\pi`, `e` or `i`.

    Infinity, lists, relations, brackets, sets, unions, matrices, texts and calls such as `f(2)` are not closed, and
    neither is what has them as parts. Ratios, numbers with a base and choices are closed, and also formulas with
    plus-minus and values with units if their parts are.
    """
    parts = list(children(node))
    if any(n.kind in ("text", "call", "list", "relation", "matrix", "set", "group", "union") for n in parts):
        return False
    return all(n.name in ("\\pi", "e", "i") for n in parts if n.kind == "symbol")


def is_fixed(node: Node) -> bool:
    """Whether a node, which may hold several values, has no variables, texts or calls such as `f(2)`.

    Its symbols are those of `CONSTANTS`, infinity and the empty set included. Every other symbol, `\\mathbb{R}` too, is
    a variable. Choices are fixed.
    """
    return not any_node(node, lambda n: n.kind in ("text", "call") or (n.kind == "symbol" and n.name not in CONSTANTS))
