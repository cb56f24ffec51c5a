r"""Reward for problems with one right final answer: numbers, formulas, sets, words.

`formulas/` finds the final answer of a reply, and reads it and the right answer into typed values. This module compares
the two. Where it is in doubt, it gives 0: a reward that pays for wrong answers trains a model to give them.

Numbers
- are compared exactly, as rationals. No tolerance is allowed: 0.3333 is not 1/3, and 3.14 is not pi.
- may be written as an integer, a decimal (also a repeating one, `0.\overline{3}`), a percentage, scientific notation
  (`1.2 \times 10^5`, `1.2e5`), a mixed number (`1\frac{1}{2}`, `1 1/2`) or, if it is no integer, a fraction of two
  integers, reduced or not. "3 million" is 3000000. The words zero to twenty are numbers. `12{,}5` and `1.234.567,8`
  have decimal commas; "12,5" is a list.
- Nothing else is a number: `17 \cdot 23` for 391, `\frac{782}{2}` for 391, `\sqrt{144}` for 12, `10^5` for 100000 and
  `5!` for 120 leave an operation to do, and earn 0. They count only where the right answer is written with the same
  operation. A power of ten alone is no scientific notation.
- A calculation or label before the answer is fine if every part of it is true: `x = 5`, `5 + 7 = 12`. `3 = 4` earns 0.
- `50\%` equals 50 as well as 0.5. A number below 1 equals a percentage only by value: 0.5 is not 0.5%.

Units
- A unit or remark after a number is ignored if the right answer has none: "18 dollars", `5\text{ cm}`, `74^\circ`. If
  the right answer has a unit, the reply has the same one or none.
- Letters of mathematics (`2x`, `3i`), number words and words that leave the number open ("5 or more", "5 to 7") are no
  units.

Formulas
- must be equal as mathematics, which sympy proves. `m` and `M` are different.
- may leave undone only what the right answer leaves undone too (`values.py`). Irrational numbers are simplified:
  `\sqrt{50}` is not `5\sqrt{2}`; `\frac{1}{\sqrt{2}}` is fine for `\frac{\sqrt{2}}{2}`, and `2^{3/2}` for
  `2\sqrt{2}`. A polynomial is multiplied out if the right answer is, and factored as far as the right answer is.
  Integrals, derivatives, sums, limits, determinants and the like are never evaluated; they equal only the same text.
- An equation equals its multiples by constants. If the right answer is solved for a variable, so must be the reply;
  `2x+1` may stand for `y=2x+1`. Different variables before the sign are different answers.

Several values
- Lists `1, 2`, "1 or 2", `\pm 1` and sets in braces are compared without order; repeats count in lists.
- Pairs, intervals and matrices are compared in order, brackets included. `(1,2)` is not `1,2`, and not `[1,2]`.
  `0 \le x < 1` is `[0,1)`, and `x=1, y=2` is `(1,2)` if the variables follow each other in the alphabet. A ratio
  `3:4` equals `\frac{3}{4}`; a time such as `3:30` equals only itself.
- A number with a base, `1011_2`, equals only the same digits in the same base.

Texts
- Everything else is compared as text. Words are compared without case; letters of formulas keep theirs.
- Letters side by side are a word or a product of variables by the rules of `is_word` in `formulas/words.py`: "First" is
  "first", and `bca` is `abc`. In a reply, three or more of the variables of the right answer are a product, unless all
  are capitals: `xab` is `abx`.
- A letter to choose counts with or without the text of the choice: `\text{(B) } 5` is `B`, but not 5.

Numbers never wait for sympy, which is imported at its first use. Formulas of over 1000 characters are texts. The limits
of the reward worker end a comparison that takes too long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.rewards.formulas import proof
from mdrl_jax.rewards.formulas.intervals import Interval, intervals, variable
from mdrl_jax.rewards.formulas.nodes import Node, any_node, children, is_fixed
from mdrl_jax.rewards.formulas.parser import parse
from mdrl_jax.rewards.formulas.reply import after_thinking, extract
from mdrl_jax.rewards.formulas.tokens import plain
from mdrl_jax.rewards.formulas.values import exact, factors, work


def final_answer(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the final answer of the reply equals `check["answer"]`, or one of its items if it is a list; else 0.0.

    The answers are compared by the rules in the module's docstring. A right answer may be a text or a number, which is
    read as Python prints it. A whole reply that is about as short as the right answer and equals it as a text counts
    too. An empty list gives 0.0, and so does a right answer without words and signs, such as "".

    Raises:
      KeyError: if the check has no "answer".
    """
    answers = check["answer"]
    wanted = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
    return float(any(_right(completion, w) for w in wanted))


def _right(completion: str, wanted: str) -> bool:
    text = plain(wanted)
    if not text:
        return False
    gold = parse(wanted)
    whole = after_thinking(completion).strip()
    if len(whole) <= 2 * len(wanted) + 20 and plain(whole) == text:
        return True
    # Beside an unmarked number, a unit is not looked for; where one is wanted, the whole reply is compared.
    number = exact(_bare(gold)) is not None and not (gold.kind == "unit" and gold.name not in ("degree", "dollar"))
    found = extract(completion, number)
    if any(plain(f) == text for f in found if len(f) <= 4 * len(wanted) + 100):
        return True
    if not found:
        return False
    answer = parse(found[0])
    if equal(answer, gold):
        return True
    letters = frozenset(n.name for n in children(gold) if n.kind == "symbol" and len(n.name) == 1)
    again = parse(found[0], letters)  # "xab" is no word beside "abx"
    return again != answer and equal(again, gold)


def equal(answer: Node, wanted: Node) -> bool:
    """Whether the answer of a reply equals the right one, by the rules in the module's docstring.

    The order of the two matters: the right answer decides which operations and units the reply may have. An empty text
    equals nothing.

    Args:
      answer: what `parser.parse` read in the reply.
      wanted: what it read in the right answer.
    """
    answer, wanted = _as_word(answer, wanted), _as_word(wanted, answer)
    answer, wanted = _as_pair(answer, wanted), _as_pair(wanted, answer)
    if "text" in (answer.kind, wanted.kind):
        return answer.kind == wanted.kind and answer.name == wanted.name != ""
    if answer.kind == "list" and answer.name == "or" and wanted.kind not in ("list", "set", "plusminus", "relation"):
        if all(equal(a, wanted) for a in answer.args):  # "1/2 or 0.5"
            return True
    if (gaps := intervals(wanted)) is not None and (found := intervals(answer)) is not None:
        names = {name for name in (variable(answer), variable(wanted)) if name}
        return len(names) < 2 and _same_intervals(found, gaps)
    label, value = _settled(answer)
    gold_label, gold = _settled(wanted)
    if gold is None or (gold_label is not None and not _is_name(gold_label)):
        return _same_relation(answer, wanted)  # an equation such as x + y = 2
    if value is None or not _labels_agree(label, gold_label):
        return False
    many, gold_many = _members(value), _members(gold)
    if gold_many is not None or many is not None:
        return _same_members(many or [value], gold_many or [gold], value.kind == gold.kind == "set")
    return _same_value(value, gold)


def _as_word(node: Node, other: Node) -> Node:
    """Letters as a text, if the other answer is a text: the choice `\\text{(B)}`. Of "(B) 5" the letter, beside "B"."""
    if node.kind == "choice":
        letter = node.name.partition(" ")[0]
        return Node("text", name=letter if other.kind in ("text", "symbol") else node.name)
    if node.kind == "symbol" and other.kind in ("text", "choice"):
        return Node("text", name=node.name)
    letters = [arg.name for arg in node.args if arg.kind == "symbol"]
    if node.kind == "product" and other.kind == "text" and len(letters) == len(node.args):
        return Node("text", name=name.casefold()) if (name := "".join(letters)).isupper() else node
    return node


def _as_pair(node: Node, other: Node) -> Node:
    """`x=3, y=4` as the point (3,4), if the other answer is one. The variables follow each other in the alphabet."""
    names = [n.args[0].name for n in node.args if n.kind == "relation" and n.name == "=" and n.args[0].kind == "symbol"]
    if (
        node.kind != "list"
        or node.name == "or"
        or other.kind != "group"
        or other.name != "()"
        or len(names) != len(node.args)
    ):
        return node
    following = all(len(a) == len(b) == 1 and ord(a) + 1 == ord(b) for a, b in zip(names, names[1:], strict=False))
    return Node("group", tuple(n.args[1] for n in node.args), "()") if following else node


def _bare(node: Node) -> Node:
    """The value without label and unit."""
    value = _settled(node)[1] or node
    return value.args[0] if value.kind == "unit" else value


# Relations: labels before an answer, equations, inequalities.


def _is_label(node: Node) -> bool:
    """Whether a formula may stand before an answer as its name.

    It has no numbers but exponents and subscripts; `x^2 - 9 = 0` is a question and no answer.
    """
    if node.kind in ("text", "call", "symbol"):
        return True
    if node.kind == "power":
        inverse = node.args[0].name.isupper() and exact(node.args[1]) == -1
        return _is_label(node.args[0]) and (inverse or (exact(node.args[1]) or 0) > 1)
    if node.kind in ("number", "negative") or node.name == "!":
        return False
    terms = [a.args[0] if node.kind == "sum" and a.kind == "negative" else a for a in node.args]
    return len(terms) > 0 and all(_is_label(t) for t in terms)


def _is_name(node: Node) -> bool:
    """Whether a label is a name: a symbol, the value of a function, words, or a point `(x,y)`."""
    return node.kind in ("symbol", "call", "text") or (
        node.kind == "group" and all(n.kind == "symbol" for n in node.args)
    )


def _is_derivative(node: Node) -> bool:
    """Whether a formula is `\\frac{dy}{dx}`."""
    d = Node("symbol", (), "d")
    return node.kind == "quotient" and all(n.kind == "product" and n.args[0] == d for n in node.args)


def _settled(node: Node) -> tuple[Node | None, Node | None]:
    """Splits `x = 5` into label and value.

    Returns:
      (label, value). The label is None if there is none. The value is None if the relation is an equation or inequality
      that names no value, or if it is false, such as 3 = 4.
    """
    if node.kind != "relation":
        return None, node
    signs = node.name.split()
    sides = list(node.args)
    if signs == ["in"]:
        is_set = sides[1].kind in ("group", "set", "union", "difference", "intersection", "symbol")
        return (sides[0], sides[1]) if _is_label(sides[0]) and is_set else (None, None)
    if set(signs) - {"=", "~"}:
        return None, None
    if "~" in signs:  # what is exact counts, not its approximation
        cut = signs.index("~") + 1
        head = sides[:cut]
        sides = head if any(is_fixed(s) for s in head) else [*head, *sides[cut : cut + 1]]
    fixed = [s for s in sides if is_fixed(s)]
    names = [s for s in sides if not is_fixed(s)]
    if fixed:
        true = all(_same_number(s, fixed[-1]) for s in fixed[:-1])
        return (names[0] if names else None, fixed[-1]) if true and all(_is_label(n) for n in names) else (None, None)
    first, last = sides[0], sides[-1]
    if last.kind == "symbol" and first.kind not in ("symbol", "call"):
        first, last = last, first
    alone = (first.kind in ("symbol", "call", "text") or _is_derivative(first)) and len(sides) == 2
    if alone and not any_node(last, lambda n: n.kind == "text" or (n.name == first.name and n.kind == first.kind)):
        return first, last
    return None, None


def _labels_agree(a: Node | None, b: Node | None) -> bool:
    """Whether two labels may name the same thing: two different variables do not."""
    if a is not None and b is not None and a.kind == b.kind and a.kind in ("group", "call"):
        return a == b if a.kind == "group" else a.name == b.name
    if a is None or b is None or a.kind != "symbol" or b.kind != "symbol":
        return True
    return a.name.partition("_")[0] == b.name.partition("_")[0]


def _same_number(a: Node, b: Node) -> bool:
    """Whether two values are equal, in whatever form."""
    if a.kind == "unit" or b.kind == "unit":
        a, b = (n.args[0] if n.kind == "unit" else n for n in (a, b))
    x, y = exact(a), exact(b)
    if x is not None and y is not None:
        return x == y
    if a.kind == b.kind and a.kind in ("group", "set", "matrix", "row", "list", "plusminus") and a.name == b.name:
        return len(a.args) == len(b.args) and all(_same_number(*pair) for pair in zip(a.args, b.args, strict=True))
    return proof.same(a, b)


def _same_relation(a: Node, b: Node) -> bool:
    signs = a.name.split()
    if a.kind != "relation" or b.kind != "relation" or len(signs) != 1:
        return False
    if signs == b.name.split() == ["="]:
        if not all(_allowed(s, b) for s in a.args) or ("product of sums" in work(b)) > ("product of sums" in work(a)):
            return False
        return proof.same_equation((a.args[0], a.args[1]), (b.args[0], b.args[1]))
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    if a.name != b.name:
        a = Node("relation", a.args[::-1], turned.get(a.name, ""))
    orders = (a.args, a.args[::-1]) if a.name == "!=" else (a.args,)
    return a.name == b.name and any(all(_same_value(*pair) for pair in zip(o, b.args, strict=True)) for o in orders)


def _same_intervals(a: list[Interval], b: list[Interval]) -> bool:
    def same(x: Interval, y: Interval) -> bool:
        return x[0] == y[0] and x[3] == y[3] and equal(x[1], y[1]) and equal(x[2], y[2])

    left = list(b)
    for interval in a:
        match = next((i for i, other in enumerate(left) if same(interval, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


# Several values.


def _members(node: Node) -> list[Node] | None:
    """The values of a list, a set or a formula with plus-minus, in any order; None for a single value."""
    if node.kind in ("list", "set"):
        parts = [(_members(value) if (value := _settled(arg)[1]) else None, arg) for arg in node.args]
        return [m for many, arg in parts for m in (many if many is not None else [arg])]
    if any_node(node, lambda n: n.kind == "plusminus") and node.kind not in ("group", "matrix", "relation"):
        return [_chosen(node, "+"), _chosen(node, "-")]
    return None


def _chosen(node: Node, sign: str) -> Node:
    if node.kind == "plusminus":
        inner = _chosen(node.args[0], sign)
        if sign == node.name:
            return inner
        negative = inner.kind == "number" and inner.value > 0
        return Node("number", (), inner.name, -inner.value) if negative else Node("negative", (inner,))
    return Node(node.kind, tuple(_chosen(a, sign) for a in node.args), node.name, node.value)


def _same_members(a: Sequence[Node], b: Sequence[Node], as_sets: bool) -> bool:
    left, items = (_distinct(b), _distinct(a)) if as_sets else (list(b), list(a))
    for item in items:
        match = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _distinct(items: Sequence[Node]) -> list[Node]:
    found: list[Node] = []
    for item in items:
        if not any(_same_number(item, other) for other in found):
            found.append(item)
    return found


# Single values.


def _same_value(a: Node, b: Node) -> bool:
    if a.kind == "unit" or b.kind == "unit":
        if a.kind == b.kind and a.name != b.name:
            return False
        if a.kind != "unit" and not is_fixed(a):
            return False
        a, b = (n.args[0] if n.kind == "unit" else n for n in (a, b))
    if a.kind == b.kind == "number":
        return _same_literal(a, b)
    if "ratio" in (a.kind, b.kind):
        return _same_ratio(a, b)
    if a.kind in ("group", "matrix", "row", "union", "difference", "intersection"):
        parts = list(zip(a.args, b.args, strict=False))
        return (a.kind, a.name, len(a.args)) == (b.kind, b.name, len(b.args)) and all(equal(*p) for p in parts)
    if a.kind == "based" or b.kind == "based":
        return a.kind == b.kind and a.name.upper() == b.name.upper()
    if b.kind == "number":
        return False  # the reply is no number yet, whatever its value is
    if a.kind == "number" and (value := exact(b)) is not None:
        return a.value == value and a.name != "scaled" and (a.name != "fraction" or value.denominator > 1)
    return _allowed(a, b) and _same_shape(a, b) and _same_number(a, b) and not _reducible(a, b)


def _same_literal(a: Node, b: Node) -> bool:
    """Whether two numbers are the same, as values or as percentages, and the first is in a form that counts."""
    if a.name == "fraction" and a.value.denominator == 1 and not (b.name == "fraction" and b.value.denominator == 1):
        return False
    if a.name == "scaled" and b.name not in ("scaled", "scientific"):
        return False
    if a.value == b.value:
        return True
    if a.name == "percent" and b.name != "percent":
        return 100 * a.value == b.value and abs(b.value) >= 1
    return b.name == "percent" and a.name != "percent" and a.value == 100 * b.value


def _same_ratio(a: Node, b: Node) -> bool:
    if a.kind == b.kind:
        return a.name == b.name and [n.value for n in a.args] == [n.value for n in b.args]
    ratio, other = (a, b) if a.kind == "ratio" else (b, a)
    parts = [n.value for n in ratio.args]
    if ratio.name == "time" or len(parts) != 2 or not parts[1] or other.kind != "number" or other.name != "fraction":
        return False
    return parts[0] / parts[1] == other.value and other.value.denominator > 1


def _allowed(a: Node, b: Node) -> bool:
    """Whether a reply leaves undone no more than the right answer does."""
    return work(a) <= work(b)


def _same_shape(a: Node, b: Node) -> bool:
    """Whether a reply is factored, or split into fractions, as far as the right answer is."""
    done, wanted = work(a), work(b)
    if ("sum of fractions" in wanted) != ("sum of fractions" in done):
        return False
    if "product of sums" not in wanted or b.kind == "sum" or not _is_polynomial(b):
        return True
    (count, scaled), (gold_count, gold_scaled) = factors(a), factors(b)
    return "product of sums" in done and count >= gold_count and scaled >= gold_scaled


def _is_polynomial(node: Node) -> bool:
    """Whether a formula with variables is built by sums, products and whole powers alone."""
    kinds = {n.kind for n in children(node)}
    return kinds <= {"sum", "product", "power", "negative", "number", "symbol"} and not is_fixed(node)


def _reducible(a: Node, b: Node) -> bool:
    return "division" in work(a) and proof.reduces(a) and not proof.reduces(b)
