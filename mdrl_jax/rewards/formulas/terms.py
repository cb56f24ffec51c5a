"""Reads formulas, from sums down to numbers, functions and brackets."""

from fractions import Fraction

from mdrl_jax.rewards.formulas.nodes import Node, Unread, integer, is_closed, literal, mixed, negated, quotient, times
from mdrl_jax.rewards.formulas.numbers import Numbers
from mdrl_jax.rewards.formulas.tokens import Token
from mdrl_jax.rewards.formulas.words import CURRENCIES, FUNCTIONS, MULTIPLES, NUMBER_WORDS, OPERATORS, RELATIONS

_MAX_DEPTH = 40


class Terms(Numbers):
    """Reads tokens by recursive descent; each method reads one level of the grammar.

    A method starts at the next token, passes what it reads, and returns it as a node. It raises Unread if the tokens
    are no formula, or are nested too deep. What follows the part that it reads is left for the caller.
    """

    def several(self, at_top: bool) -> Node:
        """Values joined by commas, "and" or "or". A subclass has to define it.

        Args:
          at_top: whether the values stand in no brackets, so that units may follow them.
        """
        raise NotImplementedError

    def item(self, at_top: bool) -> Node:
        """One value, or values joined by relations. A subclass has to define it; `at_top` is that of `several`."""
        raise NotImplementedError

    def sum(self) -> Node:
        """Products with plus, minus or plus-minus before and between them; a single one is returned as it is."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unread
        terms = [self._signed()]
        while self.at("+", "-", "pm", "mp"):
            terms.append(self._signed())
        self.depth -= 1
        if len(terms) == 1:
            return terms[0]
        return Node("sum", tuple(terms))

    def _signed(self) -> Node:
        if self.take("+"):
            return self.product()
        if self.take("-"):
            return negated(self.product())
        if self.take("pm"):
            return Node("plusminus", (self.product(),), "+")
        if self.take("mp"):
            return Node("plusminus", (self.product(),), "-")
        return self.product()

    def product(self) -> Node:
        """Factors with or without signs of multiplication and division between them; also a currency or a ratio."""
        if self.kind() == "op" and self.at(*CURRENCIES):
            unit = CURRENCIES[self.next().text]
            minus = self.take("-")
            node = self.factor()
            return Node("unit", (negated(node) if minus else node,), unit)
        node = self.factor()
        if self.at(":") and node.name == "integer":
            return self._ratio(node)
        while True:
            if self.take("times"):
                sign = self.take("-")
                other = self.factor()
                node = times(node, negated(other) if sign else other)
            elif self.take("/"):
                node = quotient(node, self.factor())
            elif self.take("div"):  # a division to do, and no fraction
                node = Node("quotient", (node, self.factor()))
            elif self._starts_factor():
                node = times(node, self.factor())
            else:
                return node

    def _starts_factor(self) -> bool:
        kind = self.kind()
        if kind == "sym" or kind == "begin":
            return True
        if kind == "op":
            return self.at("(", "{") and not (self.at("(") and self.kind(1) == "word")
        if kind != "cmd":
            return False
        name = self.found[self.i].text
        if name == "vert":
            return not self.absolute
        stops = {"cup", "cap", "backslash", "pm", "mp", "rangle", "rfloor", "rceil", "}", "cr", "circ"}
        return name not in stops and name not in RELATIONS and name not in OPERATORS

    def factor(self) -> Node:
        """A base with what is attached to it: factorials, exponents, degrees, percent, "million", subscripts."""
        node = self.base()
        while True:
            if self.take("!"):
                node = Node("function", (node,), "!")
            elif self.at("^"):
                self.i += 1
                braces = self.at("{") and self.at("circ", ahead=1)
                if braces or self.at("circ"):
                    self.i += 2 if braces else 1
                    if braces:
                        self.need("}")
                    node = Node("unit", (node,), "degree")
                else:
                    node = Node("power", (node, self.exponent()))
            elif self.take("%"):
                if node.kind != "number" or node.name not in ("integer", "decimal", "fraction", "mixed"):
                    raise Unread
                node = Node("number", (), "percent", node.value / 100)
            elif self.take("circ"):
                node = Node("unit", (node,), "degree")
            elif node.kind == "unit" and node.name == "degree" and self.kind() in ("sym", "word"):
                if self.found[self.i].text not in ("C", "F", "K"):
                    return node
                node = Node("unit", node.args, f"degree {self.next().text.lower()}")
            elif node.kind == "number" and self._percent_words():
                self.i += self._percent_words()
                node = Node("number", (), "percent", node.value / 100)
            elif node.kind == "number" and self.kind() == "word" and self.found[self.i].text.lower() in MULTIPLES:
                node = Node("number", (), "decimal", node.value * MULTIPLES[self.next().text.lower()])
            elif self.take("_"):
                node = self._subscript(node)
            elif node.kind == "symbol" and self.take("'"):
                node = Node("symbol", (), node.name + "'")
            else:
                return node

    def exponent(self) -> Node:
        """What follows `^`: a base, which may have a sign."""
        if self.take("-"):
            return negated(self.base())
        if self.take("+"):
            return self.base()
        return self.base()

    def base(self) -> Node:
        """A number, symbol, function, bracket, matrix or set, or a command with its arguments."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unread
        node = self._base()
        self.depth -= 1
        return node

    def _base(self) -> Node:
        token = self.next()
        if token.kind == "num":
            return self._after_number(literal(token.text))
        if token.kind == "word" and token.text.lower() in NUMBER_WORDS and self.kind() in ("end", "word"):
            return integer(NUMBER_WORDS.index(token.text.lower()))
        if token.kind == "sym":
            if token.text in ("f", "g") and [t.text for t in self.found[self.i : self.i + 6]] == [*"^{-1}("]:
                self.i += 5
                return Node("call", self._bracket("(").args, f"{token.text}^-1")
            if token.text in ("f", "g") and (self.at("(") or (self.at("'") and self.at("(", ahead=1))):
                name = token.text + ("'" if self.take("'") else "")
                return Node("call", self._bracket("(").args, name)
            if self._names_a_function(token.text):
                return Node("call", self._bracket("(").args, token.text)
            return Node("symbol", (), token.text)
        if token.text in ("(", "[", "langle"):
            self.i -= 1
            group = self._bracket(token.text)
            inner = group.args[0]
            round_ = group.name == "()" and token.text == "("
            unwrapped = len(group.args) == 1 and (round_ or inner.kind == "matrix")
            return inner if unwrapped else group
        if token.kind == "op" and token.text == "{":
            node = self.sum()
            self.need("}")
            return self._after_number(node) if node.kind == "number" and node.name == "integer" else node
        if token.kind == "op" and token.text == "|" or (token.kind == "cmd" and token.text in ("vert", "|")):
            return self._absolute(token.text)
        if token.kind == "begin":
            return self._matrix(token.text)
        if token.kind != "cmd":
            raise Unread
        return self._command(token.text)

    def _names_a_function(self, letter: str) -> bool:
        """Whether a letter before brackets is a function, as in "P(x) = x + 1", and no factor."""
        if not self.at("(") or letter not in "hpqrstuvwABCDEFGHIJKLMNOPQRSTUVWXYZ":
            return False
        end = self.i + 1
        while end < len(self.found) and (self.found[end].kind in ("sym", "num") or self.found[end].text == ","):
            end += 1
        return end > self.i + 1 and [t.text for t in self.found[end : end + 2]] == [")", "="]

    def _after_number(self, node: Node) -> Node:
        """A mixed number or scientific notation, if the tokens after a number make it one."""
        if node.name in ("integer", "decimal") and (power := self._ten_to()) is not None:
            form = "scientific" if 1 <= abs(node.value) < 10 else "scaled"
            return Node("number", (), form, node.value * Fraction(10) ** power)
        if node.name != "integer":
            return node
        if self.at("frac"):
            start = self.i
            self.i += 1
            part = self._frac()
            if part.kind == "number":
                return mixed(node, part)
            self.i = start
            if is_closed(part):
                raise Unread
            return node
        if self.kind() == "num" and self.at("/", ahead=1) and self.kind(2) == "num":
            top, _, bottom = self.next(), self.next(), self.next()
            return mixed(node, quotient(literal(top.text), literal(bottom.text)))
        return node

    def _bracket(self, left: str) -> Node:
        self.next()
        items = self.several(at_top=False)
        right = self.next()
        close = {")": ")", "]": "]", "rangle": ")"}.get(right.text)
        if close is None or right.kind == "word":
            raise Unread
        args = items.args if items.kind == "list" and items.name == "," else (items,)
        return Node("group", args, ("(" if left == "langle" else left) + close)

    def _absolute(self, bar: str) -> Node:
        self.absolute += 1
        node = self.sum()
        if not self.take(bar) and not self.take("|", "vert"):
            raise Unread
        self.absolute -= 1
        return Node("function", (node,), "abs")

    def _matrix(self, name: str) -> Node:
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "Bmatrix", "smallmatrix"):
            raise Unread
        if name == "array":  # the format of the columns: {cc}
            self.need("{")
            while not self.take("}"):
                self.next()
        rows: list[Node] = []
        cells: list[Node] = []
        while True:
            cells.append(self.item(at_top=False))
            if self.take("&"):
                continue
            rows.append(Node("row", tuple(cells)))
            cells = []
            if not self.take("cr") or self.kind() == "close":
                break
        if self.next() != Token("close", name) or len({len(r.args) for r in rows}) != 1:
            raise Unread
        return Node("matrix", tuple(rows))

    def _command(self, name: str) -> Node:
        if name == "frac":
            return self._frac()
        if name == "sqrt":
            degree = integer(2)
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return Node("root", (self._argument(), degree))
        if name == "binom":
            return Node("function", (self._argument(), self._argument()), "binom")
        if name == "{":
            return self._set()
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("rfloor" if name == "lfloor" else "rceil")
            return Node("function", (node,), "floor" if name == "lfloor" else "ceiling")
        if name in FUNCTIONS:
            return self._function(name)
        if name in ("angle", "triangle", "measuredangle"):
            letters: list[str] = []
            while self.kind() == "sym":
                letters.append(self.next().text)
            return Node("symbol", (), f"\\{name} {''.join(letters)}")
        if name in OPERATORS or name in RELATIONS or not name.isalpha():
            raise Unread
        if name in ("times", "div", "pm", "mp", "circ", "cup", "cap", "backslash", "rfloor", "rceil", "choose", "over"):
            raise Unread
        return Node("symbol", (), f"\\{name}")

    def _set(self) -> Node:
        if self.take("}"):
            return Node("symbol", (), "\\emptyset")
        items = self.several(at_top=False)
        self.need("}")
        args = items.args if items.kind == "list" else (items,)
        if any(a.kind == "relation" for a in args):
            raise Unread
        return Node("set", args)

    def _function(self, name: str) -> Node:
        below = power = None
        if self.take("_"):
            below = self._argument()
        if self.take("^"):
            power = self.exponent()
        if below is not None and name != "log":
            raise Unread
        node = self.factor() if self.at("(", "{", "[") else self._bare_argument()
        args = (node,) if below is None else (node, below)
        if power == negated(integer(1)):  # the inverse function, which is no power
            if name not in ("sin", "cos", "tan", "cot", "sec", "csc"):
                raise Unread
            return Node("function", args, f"arc{name}")
        node = Node("power", (Node("symbol", (), "e"), node)) if name == "exp" else Node("function", args, name)
        return node if power is None else Node("power", (node, power))

    def _bare_argument(self) -> Node:
        node = self.factor()
        while self._starts_factor() and not self.at("("):
            if self.kind() == "cmd" and self.found[self.i].text in FUNCTIONS:
                break
            node = times(node, self.factor())
        return node

    def _argument(self) -> Node:
        r"""One argument of a command: in braces, or the next digit or letter, as in `\frac12`."""
        if self.take("{"):
            node = self.sum()
            self.need("}")
            return node
        if self.kind() == "num":
            token = self.found[self.i]
            if len(token.text) > 1 and token.text.isdigit():
                self.found[self.i] = Token("num", token.text[1:])
                return integer(int(token.text[0]))
            self.i += 1
            return literal(token.text)
        if self.at("("):
            return self.base()
        if self.kind() == "sym" or (self.kind() == "cmd" and self.found[self.i].text in ("pi", "sqrt", "theta")):
            return self.base()
        raise Unread

    def _frac(self) -> Node:
        return quotient(self._argument(), self._argument())
