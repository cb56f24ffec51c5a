"""Reads intervals, and their unions, from inequalities and sets of numbers."""

from fractions import Fraction

from mdrl_jax.rewards.formulas import proof
from mdrl_jax.rewards.formulas.nodes import CONSTANTS, Node, is_fixed
from mdrl_jax.rewards.formulas.values import exact

# Intervals: (left bracket, left end, right end, right bracket).
Interval = tuple[str, Node, Node, str]
_INFINITY = Node("symbol", (), "\\infty")
_MINUS_INFINITY = Node("negative", (_INFINITY,))


def intervals(node: Node) -> list[Interval] | None:
    """The intervals of a set of numbers. These sets have some:

    - a pair in brackets, `(1,2)` or `[0,1)`, of any values in any order; `x \\in` may stand before any of these sets;
    - the real numbers, and the real numbers without a set of points: one point, or several with rational values;
    - an inequality in which one side is a variable and the others have none, such as `x < 1`, `0 < x < 1`, `x \\ne 3`
      or `3 \\ne x`; and two that bound the same variable from both sides, `x > 1, x < 3`;
    - a union of these by `\\cup` or "or"; the inequalities and `x \\in` that "or" joins have the same variable.

    Returns:
      (left bracket, left end, right end, right bracket) of each interval, in the order of the node; points that are
      left out are sorted. Ends at infinity are nodes too. The intervals of a union are not merged. None if the node is
      no such set, or if the two inequalities have no number in common.
    """
    if node.kind == "relation":
        return _from_inequality(node)
    if node.kind == "group" and len(node.args) == 2:
        return [(node.name[0], node.args[0], node.args[1], node.name[1])]
    if node == Node("symbol", (), "\\mathbb{R}"):
        return [("(", _MINUS_INFINITY, _INFINITY, ")")]
    if node.kind == "difference" and node.args[0] == Node("symbol", (), "\\mathbb{R}") and node.args[1].kind == "set":
        return _without(list(node.args[1].args))
    relations = sum(arg.kind == "relation" for arg in node.args)
    if node.kind == "list" and node.name == "," and len(node.args) == relations == 2 and variable(node):
        return _between(*node.args)
    if node.kind == "union" or (node.kind == "list" and node.name == "or"):
        parts = [intervals(arg) for arg in node.args]
        if any(p is None for p in parts) or (relations and not variable(node)):
            return None
        return [i for p in parts for i in p or []]
    return None


def _between(a: Node, b: Node) -> list[Interval] | None:
    """The interval of `x>1` and `x<3`; None if no x fulfils both, one is enough, or one of them has two intervals."""
    lows, highs = intervals(a) or [], intervals(b) or []
    if len(lows) != 1 or len(highs) != 1:
        return None
    low, high = lows[0], highs[0]
    if low[1] == _MINUS_INFINITY:
        low, high = high, low
    if low[2] != _INFINITY or high[1] != _MINUS_INFINITY or not proof.less(low[1], high[2]):
        return None
    return [(low[0], low[1], high[2], high[3])]


def variable(node: Node) -> str:
    """The variable of a relation, or of the relations in a list if all have the same; "" if there is none, or several.

    Only a variable that is a whole side counts: `x < 1` has one, and `2x < 1` has none. Every symbol outside
    `CONSTANTS` is one, so `x \\in \\mathbb{R}` has two. Other kinds of nodes give "".
    """
    if node.kind == "list":
        names = [variable(a) for a in node.args if a.kind == "relation"]
        return names[0] if len(set(names)) == 1 else ""
    names = [a.name for a in node.args if a.kind == "symbol" and a.name not in CONSTANTS]
    return names[0] if node.kind == "relation" and len(names) == 1 else ""


def _from_inequality(node: Node) -> list[Interval] | None:
    signs, sides = node.name.split(), list(node.args)
    if signs == ["in"] and sides[0].kind == "symbol":
        return intervals(sides[1])
    if not variable(node) or any(not is_fixed(s) for s in sides if s.kind != "symbol" or s.name in CONSTANTS):
        return None
    if signs == ["!="]:
        return _without([s for s in sides if s.kind != "symbol" or s.name in CONSTANTS])
    if all(s in (">", ">=") for s in signs):
        signs = [{">": "<", ">=": "<="}[s] for s in reversed(signs)]
        sides.reverse()
    if not all(s in ("<", "<=") for s in signs):
        return None
    at = next(i for i, s in enumerate(sides) if s.kind == "symbol" and s.name not in CONSTANTS)
    if len(sides) == 2:
        if at == 0:
            return [("(", _MINUS_INFINITY, sides[1], ")" if signs[0] == "<" else "]")]
        return [("(" if signs[0] == "<" else "[", sides[0], _INFINITY, ")")]
    if len(sides) == 3 and at == 1:
        return [("(" if signs[0] == "<" else "[", sides[0], sides[2], ")" if signs[1] == "<" else "]")]
    return None


def _without(points: list[Node]) -> list[Interval] | None:
    """The real numbers without some points, given as rationals."""
    values = [exact(p) for p in points]
    if any(v is None for v in values):
        if len(points) != 1:
            return None
    else:
        points = sorted(points, key=lambda p: exact(p) or Fraction(0))
    ends = [_MINUS_INFINITY, *points, _INFINITY]
    return [("(", a, b, ")") for a, b in zip(ends, ends[1:], strict=False)]
