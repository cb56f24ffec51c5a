r"""Exact values of formulas without variables, and the work that a formula leaves undone.

A reply that repeats the question must not be paid, even where it equals the answer: `17\cdot 23` for 391, or
`\sqrt{50}` for `5\sqrt{2}`. `work` names what a formula leaves to do. A reply may leave undone only what the right
answer leaves undone too.
"""

import math
from collections import Counter
from fractions import Fraction

from mdrl_jax.rewards.formulas.nodes import Node, any_node, integer, is_closed

_MAX_BITS = 4096  # of a number that is computed here
_MAX_FACTORIAL = 300
_COLLECTIONS = ("negative", "list", "set", "group", "row", "matrix", "relation", "plusminus", "union", "difference")


def exact(node: Node) -> Fraction | None:
    """Returns the value of a formula of rational numbers.

    Returns:
      The value, for a percentage that over 100. An odd root of a negative number is the real one, also as a power:
      (−8)^(1/3) is −2. None if there is no value (a division by 0, 0^0, an even root of a negative number, a binomial
      (n over k) without 0 ≤ k ≤ n), it is irrational or too large (operands of over 4096 bits together, factorials and
      binomials of over 300, roots of a degree over 100), or the node has symbols, units, or functions other than roots,
      factorials, binomials, absolute values and rounding, or is no formula, such as a list, a ratio or plus-minus.
    """
    if node.kind == "number":
        return node.value
    parts = [exact(arg) for arg in node.args]
    values = [p for p in parts if p is not None]
    if not parts or len(values) < len(parts):
        return None
    if sum(_bits(v) for v in values) > _MAX_BITS:
        return None
    first, last = values[0], values[-1]
    match node.kind, node.name:
        case "negative", _:
            return -first
        case "sum", _:
            return sum(values, Fraction(0))
        case "product", _:
            return math.prod(values, start=Fraction(1))
        case "quotient", _:
            return first / last if last else None
        case "power", _:
            return _power(first, last)
        case "root", _:
            return _root(first, int(last)) if last.denominator == 1 and 2 <= last <= 100 else None
        case "function", "!":
            fits = first.denominator == 1 and 0 <= first <= _MAX_FACTORIAL
            return Fraction(math.factorial(int(first))) if fits else None
        case "function", "binom":
            fits = first.denominator == last.denominator == 1 and 0 <= last <= first <= _MAX_FACTORIAL
            return Fraction(math.comb(int(first), int(last))) if fits else None
        case "function", "abs":
            return abs(first)
        case "function", "floor":
            return Fraction(math.floor(first))
        case "function", "ceiling":
            return Fraction(math.ceil(first))
        case _:
            return None


def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator > 100 or abs(exponent.numerator) * _bits(base) > _MAX_BITS:
        return None
    if base == 0:
        return Fraction(0) if exponent > 0 else None
    if exponent.denominator == 1:
        return base ** int(exponent)
    root = _root(base, exponent.denominator)
    return None if root is None else root**exponent.numerator


def _root(x: Fraction, degree: int) -> Fraction | None:
    """The rational root of a rational number, None if it has none."""
    if x < 0:
        positive = _root(-x, degree) if degree % 2 else None
        return None if positive is None else -positive
    top, bottom = _integer_root(x.numerator, degree), _integer_root(x.denominator, degree)
    return Fraction(top, bottom) if top**degree == x.numerator and bottom**degree == x.denominator else None


def _integer_root(n: int, degree: int) -> int:
    """The largest integer whose power of this degree is at most n."""
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= n else (low, middle)
    return low


def work(node: Node) -> frozenset[str]:
    """Names the operations that a formula does not carry out; an empty set if it leaves nothing to do.

    A number, a polynomial that is multiplied out, and a closed form such as `\\frac{1+\\sqrt{5}}{2}` leave nothing. The
    numbers `6/3` and `12\\cdot 10^5` do. The parts of lists, sets and brackets count too.

    Returns:
      Some of "sum", "product", "quotient", "power" and "root", each with " of numbers"; "minus before a number or a
      sum", "like terms", "sum of fractions", "sum of logarithms", "like factors", "common factor", "product of sums",
      "power of a product", "power of i", "polar form", "division" (by an expression with variables), "division by a sum
      of numbers", "fraction in a fraction", "unsimplified root", "root in a root", "root of another degree",
      "arithmetic with infinity", "plusminus", "call"; and the names of functions, "log" for every logarithm.
    """
    found: set[str] = set()
    _collect(node, found, within_fraction=False)
    return frozenset(found)


def _collect(node: Node, found: set[str], within_fraction: bool) -> None:
    if node.kind == "number":
        if node.name == "scaled":
            found.add("product of numbers")
        if node.name == "fraction" and node.value.denominator == 1:
            found.add("quotient of numbers")
        return
    if node.kind == "function":
        found.add("log" if node.name in ("ln", "lg") else node.name)
    if node.kind not in _COLLECTIONS and any(arg.name == "\\infty" for arg in node.args):
        found.add("arithmetic with infinity")
    if node.kind in ("call", "plusminus"):
        found.add(node.kind)
    if node.kind in ("sum", "product", "quotient", "power", "root") and exact(node) is not None:
        found.add(f"{node.kind} of numbers")
    if node.kind == "negative" and node.args[0].kind in ("number", "negative", "sum"):
        found.add("minus before a number or a sum")
    if node.kind == "sum":
        _collect_sum(node, found)
    if node.kind in ("product", "quotient"):
        _collect_product(node, found, within_fraction)
    if node.kind == "power":
        _collect_power(node, found, within_fraction)
    if node.kind == "root":
        _collect_root(node.args[0], node.args[1], found)
    for arg in node.args:
        _collect(arg, found, within_fraction or node.kind == "quotient" or _has_fraction(node))


def _has_fraction(node: Node) -> bool:
    """Whether a product has a factor that is a fraction; it is then a quotient written another way."""
    return node.kind == "product" and any(
        f.kind == "quotient" or (f.kind == "number" and f.value.denominator > 1) for f in node.args
    )


def _pieces(node: Node) -> tuple[list[Node], list[Node]]:
    """The factors above and below the line of a product or quotient, and signs left out."""
    if node.kind == "negative":
        return _pieces(node.args[0])
    if node.kind == "product":
        parts = [_pieces(arg) for arg in node.args]
        return [n for top, _ in parts for n in top], [n for _, bottom in parts for n in bottom]
    if node.kind == "quotient":
        (top, below_top), (bottom, below_bottom) = _pieces(node.args[0]), _pieces(node.args[1])
        return top + below_bottom, bottom + below_top
    return [node], []


def _base(factor: Node) -> Node:
    return factor.args[0] if factor.kind == "power" else factor


def _collect_sum(node: Node, found: set[str]) -> None:
    if sum(arg.kind == "number" for arg in node.args) > 1:
        found.add("sum of numbers")
    if any(arg.kind == "sum" or (arg.kind == "negative" and arg.args[0].kind == "sum") for arg in node.args):
        found.add("like terms")
    keys = Counter(_unscaled(arg) for arg in node.args)
    if any(n > 1 and key != (frozenset(), frozenset()) for key, n in keys.items()):
        found.add("like terms")
    if sum(any_node(arg, lambda n: n.kind == "function" and n.name in ("log", "ln", "lg")) for arg in node.args) > 1:
        found.add("sum of logarithms")
    if sum(_divides_by_symbols(arg) for arg in node.args) > 1:
        found.add("sum of fractions")


def _unscaled(term: Node) -> tuple[frozenset[tuple[Node, int]], frozenset[tuple[Node, int]]]:
    top, bottom = (Counter(n for n in part if n.kind != "number") for part in _pieces(term))
    return frozenset(top.items()), frozenset(bottom.items())


def _divides_by_symbols(node: Node) -> bool:
    def divides(n: Node) -> bool:
        if n.kind == "quotient":
            return not is_closed(n.args[1])
        return n.kind == "power" and not is_closed(n.args[0]) and (exact(n.args[1]) or 0) < 0

    return any_node(node, divides)


def _collect_product(node: Node, found: set[str], within_fraction: bool) -> None:
    top, bottom = _pieces(node)
    if node.kind == "product":
        scaled = [
            f.kind == "number" or (f.kind == "quotient" and any(n.kind == "number" for p in _pieces(f) for n in p))
            for f in node.args
        ]
        if sum(scaled) > 1:
            found.add("product of numbers")
    if _divides_by_symbols(node):
        found.add("division")
    bases = Counter(_base(n) for n in top if n.kind != "number" or _is_base(n, top))
    below = Counter(_base(n) for n in bottom)
    roots = [n for n in top + bottom if n.kind == "root" and is_closed(n)]
    if any(n > 1 for n in (bases + Counter()).values()) or any(n > 1 for n in below.values()) or len(roots) > 1:
        found.add("like factors")
    if any(b in below for b in bases if b.kind != "number"):
        found.add("common factor")
    _collect_coefficients(top, bottom, found)
    sums = [n for n in top if _base(n).kind == "sum"]
    if node.kind == "product" and sums and not within_fraction and not _has_fraction(node):
        if not is_closed(node) or len(sums) > 1:
            found.add("product of sums")
    if node.kind == "quotient":
        if any_node(node.args[0], _is_fraction) or any_node(node.args[1], _is_fraction):
            found.add("fraction in a fraction")
        if is_closed(node) and any(_base(n).kind == "sum" or _base(n).name == "i" for n in bottom):
            found.add("division by a sum of numbers")


def _is_base(number: Node, factors: list[Node]) -> bool:
    return any(f.kind == "power" and f.args[0] == number for f in factors)


def _is_fraction(node: Node) -> bool:
    return node.kind == "quotient" or (node.kind == "number" and node.name in ("fraction", "mixed"))


def _collect_coefficients(top: list[Node], bottom: list[Node], found: set[str]) -> None:
    above = math.prod((n.value for n in top if n.kind == "number"), start=Fraction(1))
    numbers_below = [n.value for n in bottom if n.kind == "number"]
    below = math.prod(numbers_below, start=Fraction(1))
    if numbers_below and (above / below if below else Fraction(1)).denominator == 1:
        found.add("common factor")
    sums = [n for n in top if n.kind == "sum"]
    if numbers_below and len(sums) == 1:
        content = [_coefficient(term) for term in sums[0].args]
        if below and all((c * above / below).denominator == 1 for c in content):
            found.add("common factor")
    for n in bottom:
        if n.kind == "root" and n.args[0].kind == "number" and above.denominator == 1:
            if math.gcd(above.numerator, n.args[0].value.numerator) > 1:
                found.add("common factor")


def _coefficient(term: Node) -> Fraction:
    if term.kind == "number":
        return term.value
    top, bottom = _pieces(term)
    below = math.prod((n.value for n in bottom if n.kind == "number"), start=Fraction(1))
    return math.prod((n.value for n in top if n.kind == "number"), start=Fraction(1)) / (below or 1)


def _collect_power(node: Node, found: set[str], within_fraction: bool) -> None:
    base, exponent = node.args
    power = exact(exponent)
    if power is not None and power in (0, 1):
        found.add("power of numbers")
    if not is_closed(base) and (power or 0) < 0:
        found.add("division")
    if any_node(exponent, lambda n: n.kind == "symbol" and n.name == "i"):
        found.add("polar form")
    whole = power is not None and power.denominator == 1
    if whole and base.kind == "sum" and (not within_fraction or is_closed(base)):
        found.add("product of sums")
    if whole and base.kind in ("product", "quotient", "power", "root", "negative"):
        found.add("power of a product")
    if base.kind == "symbol" and base.name == "i" and whole:
        found.add("power of i")
    if power is not None and not whole:
        _collect_root(base, integer(power.denominator), found)


def _collect_root(radicand: Node, degree: Node, found: set[str]) -> None:
    order = exact(degree)
    if any_node(radicand, lambda n: n.kind == "root"):
        found.add("root in a root")
    if order is None or order.denominator != 1 or not 2 <= order <= 100:
        found.add("root of another degree")
        return
    n = int(order)
    if radicand.kind == "number" and (radicand.value.denominator != 1 or _has_power(radicand.value.numerator, n)):
        found.add("unsimplified root")
    if radicand.kind == "number" and any(n % k == 0 and _root(radicand.value, k) is not None for k in range(2, n + 1)):
        found.add("unsimplified root")
    if radicand.kind == "quotient" and is_closed(radicand):
        found.add("unsimplified root")
    for factor in _pieces(radicand)[0] if radicand.kind in ("product", "power", "quotient") else []:
        if factor.kind == "number" and _has_power(factor.value.numerator, n):
            found.add("unsimplified root")
        if factor.kind == "power" and (exact(factor.args[1]) or 0) >= n:
            found.add("unsimplified root")


def _has_power(number: int, degree: int) -> bool:
    """Whether a number has a factor k**degree with 1 < k <= 10,000, or is negative."""
    if number < 0:
        return True
    top = min(_integer_root(number, degree), 10_000)
    return any(number % k**degree == 0 for k in range(2, top + 1))


def factors(node: Node) -> tuple[int, bool]:
    """How far a product is factored.

    Returns:
      (count, scaled). `count` is the number of factors with variables, each as often as its exponent says, rounded
      down; one whose exponent is no number of at least 1 counts once. `scaled` says whether a factor is a number other
      than 1 and −1; √2 and 2^3 are not numbers here. Factors below the line of a fraction do not count for either. A
      formula that is no product or quotient is its own only factor: x + 1 gives (1, False), and 5 gives (0, True).
    """
    count, scaled = 0, False
    for n in _pieces(node)[0]:
        if n.kind == "number":
            scaled = scaled or abs(n.value) != 1
        elif not is_closed(n):
            power = exact(n.args[1]) if n.kind == "power" else Fraction(1)
            count += int(power) if power is not None and power >= 1 else 1
    return count, scaled
