"""Reads an answer: lists, relations, sets, units and texts. The formulas in them are read by `terms.py`."""

import functools
import re

from mdrl_jax.rewards.formulas.nodes import Node, Unread, any_node, is_closed
from mdrl_jax.rewards.formulas.spelling import clean
from mdrl_jax.rewards.formulas.terms import Terms
from mdrl_jax.rewards.formulas.tokens import Token, drop_last_signs, plain, tokens
from mdrl_jax.rewards.formulas.words import (
    CHANGES,
    CHINESE_UNITS,
    CURRENCIES,
    NUMBER_WORDS,
    OPERATORS,
    RELATIONS,
    UNIT_LETTERS,
    UNIT_NAME,
)

MAX_CHARACTERS = 1000  # of an answer that is read as a formula
_OPERATIONS = ("sum", "quotient", "power", "root", "function")  # that a formula has, and several words do not
_REALS = Node("symbol", (), "\\mathbb{R}")
_NO_SOLUTION = Node("symbol", (), "\\emptyset")
_MEANINGS: dict[str, Node] = {
    **dict.fromkeys(("all real numbers", "all reals", "the real numbers", "the set of all real numbers"), _REALS),
    **dict.fromkeys(("no solution", "no solutions", "there is no solution", "there are no solutions"), _NO_SOLUTION),
    **dict.fromkeys(("does not exist", "the limit does not exist", "dne"), Node("text", name="dne")),
}


@functools.lru_cache(maxsize=256)
def parse(text: str, variables: frozenset[str] = frozenset()) -> Node:
    """Reads an answer, in LaTeX or plain text. What is no formula becomes a text; "" gives the text "".

    An answer of over `MAX_CHARACTERS` is read as a text. The name of a text is `tokens.plain` of the answer, without
    brackets around a single word. Some phrases have a meaning: "no solution" is the empty set, "all real numbers" is
    `\\mathbb{R}`, and "does not exist" is the text "dne". The last 256 answers are remembered.

    Where an answer with English words in alphabetical order is no formula, those words are read as products of
    variables, and a formula that has one of `_OPERATIONS` then counts: "ace + bdf" is one, "low cost" stays a text.

    Args:
      text: the answer.
      variables: letters that are variables, in the sense of `tokens.tokens`.
    """
    if len(text) <= MAX_CHARACTERS:
        try:
            return _read(tokens(clean(text), variables))
        except (Unread, RecursionError):
            pass
        try:
            node = _read(tokens(clean(text), variables, formula=True))
            if any_node(node, lambda n: n.kind in _OPERATIONS):
                return node
        except (Unread, RecursionError):
            pass
    words = _without_brackets(plain(text))
    return _MEANINGS.get(words) or Node("text", name=words)


def _read(found: list[Token]) -> Node:
    drop_last_signs(found)
    choice = _choice(found)
    return _Parser(found).answer() if choice is None else choice


def _choice(found: list[Token]) -> Node | None:
    """A letter to choose with the text of the choice, "(B) 5"; None if it is none, or if other letters follow."""
    bracket = len(found) > 3 and found[0].text == "("
    letter, sign, *rest = found[1:] if bracket else [*found, *[Token("op", "")] * 2]
    rest = [t for t in rest if t.text]
    marks = (")",) if bracket else (")", ".", ":")
    if len(letter.text) != 1 or letter.text not in "ABCDEFGHIJ" or sign.text not in marks or not rest:
        return None
    if rest[0].text.lower() in ("or", "and", "is", "not", "false", "wrong") or not (
        rest[0].spaced or rest[0].kind in ("num", "word")
    ):
        return None
    if rest[0].text in "+*/^_!=<>,;|&" or rest[0].text in RELATIONS or rest[0].text in ("times", "div", "cup", "cap"):
        return None
    for token, after in zip(rest, [*rest[1:], Token("op", "")], strict=True):
        if len(token.text) == 1 and token.text in "ABCDEFGHIJ" and after.text in (")", ".", ":", ""):
            return None
    return Node("choice", name=f"{letter.text} {' '.join(t.text.casefold() for t in rest)}")


def _without_brackets(text: str) -> str:
    inner = re.fullmatch(r"\( (\w+) \)", text)
    return inner[1] if inner else text


class _Parser(Terms):
    """Reads tokens from lists down to values with units."""

    def answer(self) -> Node:
        node = self.several(at_top=True)
        if self.i < len(self.found):
            raise Unread
        return node

    def several(self, at_top: bool) -> Node:
        items, joined = [self.item(at_top)], ","
        while True:
            comma = self.take(",") or self.take(";")
            word = self.kind() == "word" and self.found[self.i].text.lower() in ("or", "and")
            if word:
                joined = "or" if self.next().text.lower() == "or" else joined
            if not (comma or word):
                break
            items.append(self.item(at_top))
        return items[0] if len(items) == 1 else Node("list", tuple(items), joined)

    def item(self, at_top: bool) -> Node:
        sides, signs = [self._side(at_top, first=True)], []
        while self.kind() in ("op", "cmd") and self.found[self.i].text in RELATIONS:
            signs.append(RELATIONS[self.next().text])
            sides.append(self._side(at_top, first=False))
        if not signs:
            return sides[0]
        if signs == ["~"] and sides[0].kind == "nothing":
            return sides[1]
        if any(side.kind == "nothing" for side in sides):
            raise Unread
        return Node("relation", tuple(sides), " ".join(signs))

    def _side(self, at_top: bool, first: bool) -> Node:
        if first and self.at("approx"):
            return Node("nothing")
        start = self.i, self.depth, self.absolute
        try:
            node = self.union()
            if at_top:
                node = self.with_unit(node)
            if not self._ends():
                raise Unread
            return node
        except Unread:
            if not first:
                raise
            self.i, self.depth, self.absolute = start
            return self._label()

    def _ends(self) -> bool:
        if self.i >= len(self.found) or self.at(",", ";", ")", "]", "}", "rangle", "|", "vert", "&", "cr"):
            return True
        token = self.found[self.i]
        if token.kind == "word":
            return token.text.lower() in ("or", "and")
        return token.kind == "close" or (token.kind in ("op", "cmd") and token.text in RELATIONS)

    def _label(self) -> Node:
        """What stands before a sign and is no formula of this grammar: words, or an operator such as an integral."""
        depth, numbers, words = 0, 0, list[Token]()
        while self.i < len(self.found):
            token = self.found[self.i]
            if depth == 0 and token.kind in ("op", "cmd") and token.text in RELATIONS:
                operator = any(t.kind == "cmd" and t.text in OPERATORS for t in words)
                if operator or (numbers == 0 and any(t.kind in ("word", "sym") for t in words)):
                    return Node("text", name=" ".join(t.text for t in words))
                break
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if depth < 0 or (token.kind == "word" and token.text.lower() in ("or", "and")):
                break
            numbers += depth == 0 and token.kind == "num"
            words.append(self.next())
        raise Unread

    def with_unit(self, node: Node) -> Node:
        if self.at(*CURRENCIES):
            return Node("unit", (node,), CURRENCIES[self.next().text])
        if self.kind() != "word" and not (self.at("(") and self.kind(1) == "word"):
            return node
        if self.found[self.i].text.lower() in ("or", "and"):
            return node
        if not is_closed(node):
            raise Unread
        inner, before = (node.args[0], node.name) if node.kind == "unit" else (node, "")
        name = self._unit_words(before, inner)
        return Node("unit", (inner,), name) if name else node

    def _unit_words(self, before: str, number: Node) -> str:
        words: list[str] = [before] if before else []
        brackets = 0
        while self.i < len(self.found) and not (brackets == 0 and self._ends()):
            if self._said_again(number):
                continue
            token = self.next()
            if token.kind == "word":
                small = token.text.lower()
                if small >= "\u3040" and small not in CHINESE_UNITS:
                    raise Unread
                if small in CHANGES and not (small == "times" and self._ends()):
                    raise Unread
                if (
                    len(token.text) == 1
                    and token.text not in UNIT_LETTERS | CHINESE_UNITS
                    and not (words and small in "ac")
                ):
                    raise Unread  # "5 x"; but "5 dollars a day"
                words.append(UNIT_NAME.get(token.text) or UNIT_NAME.get(small, small))
            elif token.text == "^" and words:
                power = self._braced_integer()
                words.append(f"^{power}")
            elif token.kind == "sym" and token.text in UNIT_LETTERS and words and words[-1] == "per":
                words.append(UNIT_NAME[token.text])
            elif token.text in ("/", "-", "times") and self.kind() in ("word", "sym"):
                words.append("per" if token.text == "/" else "")
            elif token.text in ("'", ".") or (token.kind == "sym" and token.text in "sa" and words):
                pass  # "the bird's eggs", "5 cents a day"
            elif token.text in "()":
                brackets += 1 if token.text == "(" else -1
                if brackets < 0:
                    raise Unread
            else:
                raise Unread
        return _square(" ".join(w for w in words if w))

    def _said_again(self, number: Node) -> bool:
        """Passes a number repeated as a word, "5 (five)"."""
        if self.at("(") and self.kind(1) == "word" and self.at(")", ahead=2):
            word = self.found[self.i + 1].text.lower()
            if word in NUMBER_WORDS and number.value == NUMBER_WORDS.index(word):
                self.i += 3
                return True
        return False

    def union(self) -> Node:
        node = self.sum()
        while self.at("cup", "backslash", "cap"):
            sign = self.next().text
            other = self.sum()
            kind = {"cup": "union", "backslash": "difference", "cap": "intersection"}[sign]
            flat = node.args if node.kind == kind == "union" else (node,)
            node = Node(kind, (*flat, other))
        return node


def _square(unit: str) -> str:
    """Spells areas and volumes one way: "sq cm" and "cm ^2" are "cm ^2"."""
    words = unit.split()
    if len(words) >= 2 and words[0] in ("sq", "cubic"):
        if words[1] == "unit":
            return " ".join(["unit", "^2" if words[0] == "sq" else "^3", *words[2:]])
        return " ".join([words[1], "^2" if words[0] == "sq" else "^3", *words[2:]])
    return unit
