"""Equality of formulas with roots, constants, functions or variables, proved by sympy.

Two formulas are equal only if sympy proves it. Numbers are evaluated first, to reject the different ones quickly; no
tolerance ever makes two formulas equal. sympy is imported at the first use.
"""

import functools
import signal
from fractions import Fraction
from typing import Any

from mdrl_jax.rewards.formulas.nodes import Node, any_node, children
from mdrl_jax.rewards.formulas.values import exact

_MAX_NODES = 200
_MAX_POWER = 64  # larger powers of sums are compared only as they stand
_MAX_EXPONENT = 1000
_MAX_TOWER = 2
_DIGITS = 40


class _NoAlgebra(Exception):
    """The formula has a part that is not converted."""


# What sympy raises where it cannot decide.
_FAILURES = (
    _NoAlgebra,
    ArithmeticError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RecursionError,
)


@functools.cache
def _sympy() -> Any:
    """Imports sympy, without counting its CPU time against the limit of the reward.

    The import takes longer than `rewards.cpu_seconds` where sympy has no compiled bytecode, as uv installs it.
    """
    left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
    try:
        import sympy
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)
    return sympy


def same(a: Node, b: Node) -> bool:
    """Whether two formulas are equal for all complex values of their variables. False if that is not proved.

    Nodes that are the same are equal, of whatever kind. Otherwise these give False without an attempt:

    - kinds that are no formulas, such as lists and units other than degrees, which are π/180;
    - formulas of over 200 nodes, and exponents beyond ±1000 or with more than one power within each other;
    - formulas with different variables, unless each is a sum, product, quotient or power: x − x does not equal 0.

    Formulas with an exponent beyond ±64 are not expanded. Nothing here limits the time that sympy takes.
    """
    if a == b:
        return True
    if _symbols(a) != _symbols(b) and not (_plain_sum(a) and _plain_sum(b)):
        return False
    try:
        x, y = _convert(a), _convert(b)
        return x == y or _zero(x - y, _large(a) or _large(b))
    except _FAILURES:
        return False


def same_equation(a: tuple[Node, Node], b: tuple[Node, Node]) -> bool:
    """Whether two equations (left, right) are the same up to a constant factor, such as 2x = 4y and x - 2y = 0.

    False if that is not proved, if one of them holds for all values, such as x = x, or if one has an exponent beyond
    ±64 or a part that `same` does not attempt. Two equations of numbers that are false, 1 = 2 and 3 = 5, are the same.
    """
    try:
        x, y = (_convert(left) - _convert(right) for left, right in (a, b))
        sp = _sympy()
        if any(_large(n) for n in (*a, *b)) or _is_zero(x) or _is_zero(y):
            return False
        ratio = sp.cancel(sp.together(x / y))
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    except _FAILURES:
        return False


def less(a: Node, b: Node) -> bool:
    """Whether the number `a` is less than `b`. False if one has variables, is not real, or sympy cannot tell."""
    try:
        return bool(_convert(a) < _convert(b))
    except _FAILURES:
        return False


def reduces(node: Node) -> bool:
    """Whether a fraction in the formula has a common factor above and below that holds a variable.

    Fractions are the nodes of the kind quotient. One for which sympy cannot tell, or that has an exponent beyond ±64,
    counts as having none.
    """
    sp = _sympy()
    for n in children(node):
        if n.kind == "quotient" and any_node(n.args[1], lambda m: m.kind == "symbol") and not _large(n):
            try:
                top, bottom = _convert(n.args[0]), _convert(n.args[1])
                if sp.gcd(top, bottom).free_symbols:
                    return True
            except (*_FAILURES, sp.PolynomialError):
                pass
    return False


def _symbols(node: Node) -> set[str]:
    return {n.name for n in children(node) if n.kind in ("symbol", "call")} - {"e", "i", "\\pi"}


def _plain_sum(node: Node) -> bool:
    """Whether variables may cancel in a formula: it is no single symbol."""
    return node.kind in ("sum", "product", "quotient", "power")


def _large(node: Node) -> bool:
    def large(n: Node) -> bool:
        return n.kind == "power" and abs(exact(n.args[1]) or 0) > _MAX_POWER

    return any_node(node, large)


def _convert(node: Node) -> Any:
    if sum(1 for _ in children(node)) > _MAX_NODES or _tower(node) > _MAX_TOWER:
        raise _NoAlgebra
    return _to_sympy(node)


def _tower(node: Node) -> int:
    """How often powers stand in exponents of powers."""
    heights = [_tower(arg) for arg in node.args]
    return max(heights[0], heights[1] + 1) if node.kind == "power" else max(heights, default=0)


def _to_sympy(node: Node) -> Any:
    sp = _sympy()
    if node.kind == "number":
        return _rational(node.value)
    if node.kind == "symbol":
        constants = {"\\pi": sp.pi, "e": sp.E, "i": sp.I, "\\infty": sp.oo}
        return constants[node.name] if node.name in constants else sp.Symbol(node.name)
    if node.kind == "unit" and node.name == "degree":
        return _to_sympy(node.args[0]) * sp.pi / 180
    if node.kind not in ("sum", "product", "quotient", "power", "root", "negative", "function", "call"):
        raise _NoAlgebra
    if node.kind != "call" and (value := exact(node)) is not None:
        return _rational(value)
    args = [_to_sympy(arg) for arg in node.args]
    if node.kind == "sum":
        return sp.Add(*args)
    if node.kind == "product":
        return sp.Mul(*args)
    if node.kind == "negative":
        return -args[0]
    if node.kind == "quotient":
        return args[0] / args[1]
    if node.kind == "power":
        if args[1].is_number and abs(args[1].evalf(5)) > _MAX_EXPONENT:
            raise _NoAlgebra
        return sp.Pow(*args)
    if node.kind == "root":
        return sp.root(args[0], args[1])
    if node.kind == "call":
        return sp.Function(node.name)(*args)
    return _function(node.name, args)


def _rational(value: Fraction) -> Any:
    return _sympy().Rational(value.numerator, value.denominator)


def _function(name: str, args: list[Any]) -> Any:
    sp = _sympy()
    if name == "log":
        return sp.log(args[0]) / sp.log(args[1] if len(args) > 1 else 10)
    if name == "lg":
        return sp.log(args[0]) / sp.log(10)
    renamed = {"!": "factorial", "binom": "binomial", "abs": "Abs", "ln": "log"}
    short = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc"}
    name = renamed.get(name) or short.get(name) or name
    if name in ("factorial", "binomial") and any(a.is_number and abs(a) > 1000 for a in args):
        return sp.Function(name)(*args)
    return getattr(sp, name)(*args)


def _is_zero(x: Any) -> bool:
    return _sympy().expand(x) == 0


def _zero(x: Any, large: bool) -> bool:
    sp = _sympy()
    if x.has(sp.oo, sp.zoo, sp.nan):
        return False
    for top, step in ((3, 7), (11, 5)) if x.free_symbols else ((0, 1),):
        chosen = {s: sp.Rational(top + 2 * k, step) for k, s in enumerate(sorted(x.free_symbols, key=str))}
        value = sp.N(x.subs(chosen), _DIGITS, maxn=400)
        if value.is_number and value.is_finite and abs(value) > sp.Float(10) ** -30:
            return False
    if large:
        return False
    for simpler in (sp.expand, _cancelled, sp.simplify):
        if simpler(x) == 0:
            return True
    return x.equals(0) is True


def _cancelled(x: Any) -> Any:
    sp = _sympy()
    return sp.cancel(sp.together(x))
