"""Reads the parts of a list of tokens that are numbers."""

import re

from mdrl_jax.rewards.formulas.nodes import MAX_EXPONENT, Node, Unread, literal
from mdrl_jax.rewards.formulas.tokens import Token


class Numbers:
    """A list of tokens and the place that is read next; reads exponents, ratios, subscripts and percentages."""

    def __init__(self, found: list[Token]) -> None:
        self.found = found
        self.i = 0
        self.depth = 0
        self.absolute = 0  # open vertical bars

    def at(self, *texts: str, ahead: int = 0) -> bool:
        """Whether the next token, or the one `ahead` places after it, is a command or sign with one of the texts."""
        if self.i + ahead >= len(self.found):
            return False
        token = self.found[self.i + ahead]
        return token.kind in ("op", "cmd") and token.text in texts

    def kind(self, ahead: int = 0) -> str:
        """The kind of the next token, or of the one `ahead` places after it; "end" behind the last one."""
        return self.found[self.i + ahead].kind if self.i + ahead < len(self.found) else "end"

    def take(self, *texts: str) -> bool:
        """Passes the next token if it is a command or sign with one of the texts. Returns whether it is."""
        found = self.at(*texts)
        self.i += found
        return found

    def need(self, text: str) -> None:
        """Passes the next token, a command or sign with this text. Raises Unread if it is another, or there is none."""
        if not self.take(text):
            raise Unread

    def next(self) -> Token:
        """Passes the next token, of any kind, and returns it. Raises Unread if there is none."""
        if self.i >= len(self.found):
            raise Unread
        self.i += 1
        return self.found[self.i - 1]

    def _braced_integer(self) -> int:
        braces = self.take("{")
        sign = -1 if self.take("-") else 1
        token = self.next()
        if token.kind != "num" or not token.text.isdigit() or len(token.text) > 5:
            raise Unread
        if braces:
            self.need("}")
        return sign * int(token.text)

    def _ten_to(self) -> int | None:
        if not (
            self.at("times") and self.kind(1) == "num" and self.found[self.i + 1].text == "10" and self.at("^", ahead=2)
        ):
            return None
        start = self.i
        self.i += 3
        try:
            power = self._braced_integer()
        except Unread:
            self.i = start
            return None
        if abs(power) > MAX_EXPONENT:
            raise Unread
        return power

    def _percent_words(self) -> int:
        """How many of the next words say "percent"."""
        words = [t.text.lower() for t in self.found[self.i : self.i + 2] if t.kind == "word"]
        return 1 if words[:1] == ["percent"] else 2 if words == ["per", "cent"] else 0

    def _ratio(self, first: Node) -> Node:
        parts, texts = [first], [self.found[self.i - 1].text]
        while self.take(":"):
            token = self.next()
            if token.kind != "num":
                raise Unread
            parts.append(literal(token.text))
            texts.append(token.text)
        # "3:05" is a time and no ratio of 3 to 5: its digits are kept.
        time = len(texts) == 2 and re.fullmatch(r"[0-2]?[0-9]:[0-5][0-9]", ":".join(texts))
        return Node("ratio", tuple(parts), "time" if time else "")

    def _subscript(self, node: Node) -> Node:
        if self.take("{"):
            inside: list[str] = []
            while not self.take("}"):
                inside.append(self.next().text)
            below = "".join(inside)
        else:
            below = self.next().text
        if node.kind == "symbol":
            return Node("symbol", (), f"{node.name}_{below}")
        if node.kind == "based":
            digits = node.name
        elif node.kind == "number" and node.name == "integer":
            digits = str(node.value)
        else:
            raise Unread
        base = re.sub(r"[^0-9]", "", below)
        if not base.isdigit() or len(base) > 2 or not 2 <= int(base) <= 36:
            raise Unread
        return Node("based", (), f"{digits}_{base}")
