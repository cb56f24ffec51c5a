r"""Reads an answer, in LaTeX or plain text, into a tree of typed values.

`parse` gives a `Node`. Its kinds are:

| kind | what it is | examples |
|---|---|---|
| number | an exact rational, written as a number | `3`, `1,000.5`, `\frac{6}{4}`, `1\frac{1}{2}`, `1.2e5`, `50\%` |
| symbol | a variable or constant; case matters | `x`, `\pi`, `x_1` |
| sum, product, quotient, power, root, negative, plusminus, function, call | a formula | `2\sqrt{2}`, `n(n+1)/2` |
| unit | a closed value with a unit or remark after it | `5\text{ cm}`, `12 apples`, `74^\circ` |
| based | digits in a base | `1011_2` |
| ratio | whole numbers joined by colons; also a time | `3:4`, `3:30` |
| list | values joined by commas, "and" or "or" | `1, 2`, `x=1 \text{ or } x=2` |
| group | values in brackets, in order | `(1,2)`, `[0,1)` |
| set | values in braces | `\{1,2\}` |
| union, difference | of sets | `(0,1)\cup(2,3)` |
| matrix | rows of values | `\begin{pmatrix}1\\2\end{pmatrix}` |
| relation | values joined by `=`, `<`, `\in`, `\approx` and the like | `x=5`, `0<x<1` |
| text | everything else, as its words and signs | `\text{Yes}`, `n\text{ is odd}`, `\int_0^1 x\,dx` |

What has no reading among these is text, and text equals only the same text. No formula is evaluated here.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 1000  # of an answer that is read as a formula
_MAX_DEPTH = 40
_MAX_EXPONENT = 1000  # of ten, in scientific notation
MAX_DIGITS = 1000  # of a number; longer ones are text, so that a reply cannot cause slow integer arithmetic


@dataclass(frozen=True)
class Node:
    """A value that was read.

    Attributes:
      kind: one of the kinds in the module's table.
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


@dataclass(frozen=True)
class Token:
    """A word, number, letter, command or sign. `spaced` says whether a space precedes it."""

    kind: str
    text: str
    spaced: bool = False


class _Unread(Exception):
    """The tokens are no formula that this parser reads."""


def _spread(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names of one unit. The first is the one that is compared.
_UNITS = (
    "cm centimeter centimeters centimetre centimetres cms",
    "mm millimeter millimeters millimetre millimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres kms",
    "in inch inches",
    "ft foot feet",
    "yd yard yards yds",
    "mi mile miles",
    "g gram grams",
    "kg kilogram kilograms kgs",
    "mg milligram milligrams",
    "lb pound pounds lbs",
    "oz ounce ounces",
    "L l liter liters litre litres",
    "mL ml milliliter milliliters millilitre millilitres",
    "s sec second seconds secs",
    "min minute minutes mins",
    "h hr hour hours hrs",
    "day days",
    "week weeks",
    "month months",
    "year years yr yrs",
    "dollar dollars usd",
    "cent cents",
    "euro euros eur",
    "yen jpy",
    "degree degrees deg",
    "mph",
    "Hz hertz",
    "unit units",
    "person people persons",
    "man men",
    "woman women",
    "child children",
    "am a.m.",
    "pm p.m.",
    "sq square",
    "cubic cu",
    "J joule joules",
    "W watt watts",
    "N newton newtons",
    "V volt volts",
)
_UNIT_NAME = {name: names.split()[0] for names in _UNITS for name in names.split()}
_UNIT_LETTERS = _spread("m g s h L l J W N V")  # a single letter that may be a unit; the others are mathematics
_SHORT_UNITS = {name for name in _UNIT_NAME if 1 < len(name) < 4 and name != "in"} | {"in"}
_MULTIPLES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_CURRENCIES = {"£": "lb", "€": "euro", "¥": "yen", "$": "dollar"}  # "5 pounds" is £5 and 5 lb
_ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMERALS = _spread(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands "
    "million millions billion billions trillion trillions dozen dozens score half halves third thirds quarter "
    "quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths "
    "hundredth hundredths "
    "thousandth thousandths millionth millionths"
)
# A remark with one of these words changes the number before it, or leaves it open.
_CHANGES = _NUMERALS | _spread(
    "or and nor but not to than least most more less fewer greater larger smaller higher lower over under above below "
    "about between from until up down plus minus times multiplied divided added subtracted squared cubed factorial "
    "power mod modulo percent percentage pi infinity e i k is are was were be if when unless except maybe perhaps "
    "possibly probably either neither both wrong incorrect false twice double triple thrice choose root bigger "
    "exclusive inclusive onwards upwards beyond approximately roughly nearly almost ish else instead versus vs exceeds "
    "base binary raised tens ones divides divisible"
)
_WORDS = _spread(
    "or and to is no not in of at by if as an on we it so am pm up he be do go my us me yes all any odd men day box "
    "dog cat the for are was sum now one two six ten non has had its let get"
)
_FUNCTIONS = _spread(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan ln log exp lg arccot arcsec arccsc"
)
# Functions of several values, and operators: no formula with one of these is read.
_OPERATORS = _spread(
    "int iint iiint oint sum prod lim limsup liminf det gcd lcm max min sup inf arg deg dim ker hom mod pmod bmod "
    "nabla partial bigcup bigcap coprod forall exists implies iff Rightarrow Leftarrow Leftrightarrow rightarrow to "
    "mapsto ldots cdots dots vdots ddots mid nmid perp parallel cong sim equiv land lor lnot neg therefore because"
)
_TEXT_COMMANDS = _spread("text mbox textbf textit textrm textnormal textsf texttt hbox emph textsc")
_FONT_COMMANDS = _spread("mathrm mathbf mathit mathsf operatorname boldsymbol bm mathnormal underline mathop")
_LETTER_COMMANDS = _spread(
    "mathbb mathcal mathfrak overline bar vec hat widehat tilde overrightarrow overleftrightarrow"
)
_SAME_COMMAND = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "varnothing": "emptyset",
    "degree": "circ",
    "lbrace": "{",
    "rbrace": "}",
    "setminus": "backslash",
    "smallsetminus": "backslash",
    "lvert": "vert",
    "rvert": "vert",
    "ast": "times",
    "cdot": "times",
    "colon": ":",
    "lt": "<",
    "gt": ">",
    "simeq": "approx",
    "infin": "infty",
    "infinity": "infty",
    "lbrack": "[",
    "rbrack": "]",
    "arctg": "arctan",
    "tg": "tan",
    "ctg": "cot",
    "choose": "choose",
    "pounds": "£",
    "euro": "€",
    "yen": "¥",
    "phi": "phi",
    "notin": "notin",
}
_GLYPHS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\times ", "⋅": r"\times ",
    "∙": r"\times ",
    "÷": r"\div ", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ",
    "π": r"\pi ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "∫": r"\int ", "∑": r"\sum ", "∏": r"\prod ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∖": r"\backslash ", "〈": r"\langle ", "〉": r"\rangle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "\xa0": " ", "\u2009": " ", "\u202f": " ", "’": "'", "′": "'", "…": r"\ldots ", "％": "%", "＄": "$",
    "¼": r"\frac{1}{4}", "½": r"\frac{1}{2}", "¾": r"\frac{3}{4}", "ℯ": "e",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_SPACING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|large|Large|LARGE|huge|Huge|small|rm|bf|it|limits|nolimits|protect|strut|!)(?![a-zA-Z])\s?"
)
_COLOR = re.compile(r"\\(?:text)?color\{[a-zA-Z]*\}")
_BLANK = re.compile(r"\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|phantom\{[^{}]*\})(?![a-zA-Z])|\\[,;: >]|~")
_LINE_BREAK = re.compile(r"\\\\(?:\s*\[[0-9.]+(?:pt|em|ex|mm)\])?")
_ORDINAL = re.compile(
    r"(?<=[0-9])\s?\^?\s?(?:\{\s?)?(?:\\(?:text|mathrm|textrm)\s?\{\s?)?(st|nd|rd|th)\b(?:\s?\}){0,2}"
)
_INTEGER = r"[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])|[0-9]+"
_NUMBER = re.compile(rf"(?:{_INTEGER})?(?:(?<=[0-9])\.[0-9]+|(?<![0-9])\.[0-9]+)?")
_BARE_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")  # within brackets a comma always separates
_EXPONENT = re.compile(r"[eE]([-+]?[0-9]+)(?![\w.])")
_OVERLINE = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_DOTS = re.compile(r"([0-9]*)\.([0-9]*)\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?")
_LETTERS = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\([a-zA-Z]+)\*?|\\(.)", re.DOTALL)
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "in": "in", "notin": "notin",
}  # fmt: skip


def clean(text: str) -> str:
    """Returns `text` with one spelling of each sign: no LaTeX spacing, no dollar signs around formulas.

    A single dollar sign, or one with a backslash, is kept as `\\$`, the currency.
    """
    text = "".join(_GLYPHS.get(c, c) for c in text)
    text = re.sub(r"\.(?:\s?\.)+", r"\\ldots ", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    if not text.isascii():
        text = "".join(_vulgar(c) for c in text)
    text = re.sub(r"(?<=[0-9])\{,\}(?=[0-9]{3})", "", text)
    text = re.sub(r"(?<=[0-9%])\s?x\s?(?=\$?\.?[0-9])", r"\\times ", text)
    text = _LINE_BREAK.sub(r"\\cr ", text)
    text = _ORDINAL.sub(r"\\text{ \1}", text)
    text = _BLANK.sub(" ", _SPACING.sub("", _COLOR.sub("", text)))
    text = text.replace("\\(", " ").replace("\\)", " ").replace("\\[", " ").replace("\\]", " ")
    dollars = [m.start() for m in re.finditer(r"(?<!\\)\$", text)]
    currency = "\\$" if len(dollars) == 1 else " "
    text = re.sub(r"(?<!\\)\$", lambda _: currency, text)
    text = re.sub(r"(?<![0-9a-zA-Z)}\]])\*\*|\*\*(?![0-9a-zA-Z({\\-])", " ", text)  # bold; "2**3" is a power
    return re.sub(r"\s+", " ", text).strip().strip("`_").strip()


def _vulgar(c: str) -> str:
    if unicodedata.category(c) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", c)):
        top, _, bottom = parts.partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    return c


def is_word(run: str) -> bool:
    """Whether a run of letters is a word, and not a product of variables.

    A word has three letters or more, one of them a vowel, or is a common short word. Letters in alphabetical order,
    such as "abc", are variables.
    """
    small = run.lower()
    if small in _WORDS:
        return True
    ascending = all(a < b for a, b in zip(small, small[1:], strict=False))
    return len(run) >= 3 and not ascending and (not run.isascii() or re.search("[aeiouy]", small[:-1]) is not None)


def tokens(text: str) -> list[Token]:
    """Splits a text (after `clean`) into tokens: num, word, sym (a letter), cmd (a command) and op (a sign).

    Raises:
      _Unread: if braces do not balance.
    """
    return _Tokenizer(text).run()


class _Tokenizer:
    def __init__(self, text: str, prose: bool = False, upright: bool = False) -> None:
        self.text = text
        self.prose = prose  # within \text{...}, where single letters are words
        self.upright = upright  # within \mathrm{...}, where several letters are a word
        self.found: list[Token] = []
        self.depth = 0

    def run(self) -> list[Token]:
        i, spaced = 0, False
        while i < len(self.text):
            if self.text[i].isspace():
                i, spaced = i + 1, True
                continue
            before = len(self.found)
            i = self._step(i, spaced)
            spaced = spaced and len(self.found) == before
        return self.found

    def _add(self, kind: str, text: str, spaced: bool) -> None:
        self.found.append(Token(kind, text, spaced))

    def _step(self, i: int, spaced: bool) -> int:
        text, c = self.text, self.text[i]
        if c.isdigit() and c.isascii() or (c == "." and re.match(r"\.(?:[0-9]|\\(?:overline|bar|dot))", text[i:])):
            return self._number(i, spaced)
        if c == "\\":
            return self._command(i, spaced)
        if match := _LETTERS.match(text, i):
            return self._letters(match, spaced)
        if c in "([":
            self.depth += 1
        elif c in ")]":
            self.depth -= 1
        if text.startswith("**", i):
            self._add("op", "^", spaced)
            return i + 2
        factorial = c == "!" and not spaced and i > 0  # "5!=120" is no inequality
        if text.startswith(("<=", ">=", "!="), i) and not factorial:
            self._add("cmd", {"<": "le", ">": "ge", "!": "ne"}[c], spaced)
            return i + 2
        self._add("cmd" if c == "*" else "op", "times" if c == "*" else c, spaced)
        return i + 1

    def _number(self, i: int, spaced: bool) -> int:
        if match := _OVERLINE.match(self.text, i):
            self._add("num", f"{match[1]}.{match[2]}r{match[3] or match[4]}", spaced)
            return match.end()
        if match := _DOTS.match(self.text, i):
            self._add("num", f"{match[1]}.{match[2]}r{match[3]}{match[4] or ''}{match[5] or ''}", spaced)
            return match.end()
        match = (_BARE_NUMBER if self.depth > 0 else _NUMBER).match(self.text, i)
        if match is None or not match[0]:
            raise _Unread
        number, end = re.sub("[, ]", "", match[0]), match.end()
        if exponent := _EXPONENT.match(self.text, end):
            number, end = f"{number}e{int(exponent[1][:6])}", exponent.end()
        self._add("num", number, spaced)
        return end

    def _command(self, i: int, spaced: bool) -> int:
        match = _COMMAND.match(self.text, i)
        if match is None:
            raise _Unread
        name = match[1] or match[2]
        name, end = _SAME_COMMAND.get(name, name), match.end()
        if name in _TEXT_COMMANDS or name in _FONT_COMMANDS or name in ("boxed", "fbox"):
            inner, end = _braced(self.text, end)
            unit = name == "mathrm" and ("/" in inner or (bool(self.found) and inner.strip() in _UNIT_LETTERS))
            sub = _Tokenizer(inner, name in _TEXT_COMMANDS or unit, name in _FONT_COMMANDS)
            found = sub.run()
            if name in _FONT_COMMANDS and len(found) == 1 and found[0].text in _FUNCTIONS | _OPERATORS:
                found = [Token("cmd", found[0].text, spaced)]
            self.found += found
        elif name in _LETTER_COMMANDS:
            inner, end = _braced(self.text, end)
            self._add("sym", f"\\{name}{{{inner.replace(' ', '')}}}", spaced)
        elif name in ("begin", "end"):
            inner, end = _braced(self.text, end)
            self._add("begin" if name == "begin" else "close", inner.strip().rstrip("*"), False)
        else:
            self.depth += (name in ("{", "langle")) - (name in ("}", "rangle"))
            self._add("op" if name in "[]<>:%$£€¥|" else "cmd", name, spaced)
        return end

    def _letters(self, match: re.Match[str], spaced: bool) -> int:
        run, end = match[0], match.end()
        if run in ("pi", "infty", "infinity", "sqrt") or run in _FUNCTIONS or (run in _OPERATORS and not self.prose):
            word = run in _OPERATORS and (run == "to" or run == "because" or run == "therefore" or run == "sum")
            self._add("word" if word else "cmd", _SAME_COMMAND.get(run, run), spaced)
        elif self._is_word(run):
            dotted = re.match(r"\.m\.", self.text[end:]) if run in ("a", "p") else None
            if dotted:
                run, end = run + "m", end + 3
            self._add("word", run, spaced)
        elif run in ("a", "p") and self.text.startswith(".m.", end):
            self._add("word", run + "m", spaced)
            end += 3
        else:
            for k, letter in enumerate(run):
                self._add("sym", letter, spaced and k == 0)
        return end

    def _is_word(self, run: str) -> bool:
        if self.prose or (self.upright and len(run) > 1) or is_word(run):
            return True
        return run in _SHORT_UNITS and len(self.found) > 0 and self.found[-1].text != "="


def _braced(text: str, i: int) -> tuple[str, int]:
    """Returns the content of the braces that start at `i` (or the next character), and where they end."""
    while i < len(text) and text[i] == " ":
        i += 1
    if not text.startswith("{", i):
        return text[i : i + 1], i + 1
    depth = 0
    for j in range(i, len(text)):
        if text[j] in "{}" and text[j - 1 : j] != "\\":
            depth += 1 if text[j] == "{" else -1
            if depth == 0:
                return text[i + 1 : j], j + 1
    raise _Unread


def plain(text: str) -> str:
    """Returns the words and signs of a text in one spelling, for the comparison of texts.

    Words are in lower case, letters of formulas keep their case, spaces and a trailing period do not count.
    """
    text = clean(text)
    try:
        found = tokens(text)
    except _Unread:
        return " ".join(text.split())
    while found and found[-1].kind == "op" and found[-1].text in ".,;":
        found.pop()
    return " ".join(t.text.casefold() if t.kind == "word" and len(t.text) > 1 else t.text for t in found)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Node:
    """Reads an answer. What is no formula becomes a text; "" gives the text ""."""
    if len(text) <= MAX_CHARACTERS:
        try:
            found = tokens(clean(text))
            while found and found[-1].kind == "op" and found[-1].text in ".,;":
                found.pop()
            return _Parser(found).answer()
        except (_Unread, RecursionError):
            pass
    return Node("text", name=_without_brackets(plain(text)))


def _without_brackets(text: str) -> str:
    inner = re.fullmatch(r"\( (\w+) \)", text)
    return inner[1] if inner else text


def integer(n: int) -> Node:
    """The number n as a node."""
    return Node("number", (), "integer", Fraction(n))


def children(node: Node) -> Iterable[Node]:
    """All nodes of a tree, itself first."""
    yield node
    for arg in node.args:
        yield from children(arg)


class _Parser:
    """Reads tokens by recursive descent; each method reads one level of the grammar, from lists down to numbers."""

    def __init__(self, found: list[Token]) -> None:
        self.found = found
        self.i = 0
        self.depth = 0
        self.absolute = 0  # open vertical bars

    # Looking at tokens.

    def at(self, *texts: str, ahead: int = 0) -> bool:
        if self.i + ahead >= len(self.found):
            return False
        token = self.found[self.i + ahead]
        return token.kind in ("op", "cmd") and token.text in texts

    def kind(self, ahead: int = 0) -> str:
        return self.found[self.i + ahead].kind if self.i + ahead < len(self.found) else "end"

    def take(self, *texts: str) -> bool:
        found = self.at(*texts)
        self.i += found
        return found

    def need(self, text: str) -> None:
        if not self.take(text):
            raise _Unread

    def next(self) -> Token:
        if self.i >= len(self.found):
            raise _Unread
        self.i += 1
        return self.found[self.i - 1]

    # From lists down.

    def answer(self) -> Node:
        node = self.several(at_top=True)
        if self.i < len(self.found):
            raise _Unread
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
        while self.kind() in ("op", "cmd") and self.found[self.i].text in _RELATIONS:
            signs.append(_RELATIONS[self.next().text])
            sides.append(self._side(at_top, first=False))
        if not signs:
            return sides[0]
        if signs == ["~"] and sides[0].kind == "nothing":
            return sides[1]
        if any(side.kind == "nothing" for side in sides):
            raise _Unread
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
                raise _Unread
            return node
        except _Unread:
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
        return token.kind == "close" or (token.kind in ("op", "cmd") and token.text in _RELATIONS)

    def _label(self) -> Node:
        """What stands before a sign and is no formula of this grammar: words, or an operator such as an integral."""
        depth, numbers, words = 0, 0, list[Token]()
        while self.i < len(self.found):
            token = self.found[self.i]
            if depth == 0 and token.kind in ("op", "cmd") and token.text in _RELATIONS:
                operator = any(t.kind == "cmd" and t.text in _OPERATORS for t in words)
                if operator or (numbers == 0 and any(t.kind in ("word", "sym") for t in words)):
                    return Node("text", name=" ".join(t.text for t in words))
                break
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if depth < 0 or (token.kind == "word" and token.text.lower() in ("or", "and")):
                break
            numbers += depth == 0 and token.kind == "num"
            words.append(self.next())
        raise _Unread

    def with_unit(self, node: Node) -> Node:
        if self.at("£", "€", "¥", "$"):
            return Node("unit", (node,), _CURRENCIES[self.next().text])
        if self.kind() != "word" and not (self.at("(") and self.kind(1) == "word"):
            return node
        if self.found[self.i].text.lower() in ("or", "and"):
            return node
        if not is_closed(node):
            raise _Unread
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
                if small in _CHANGES and not (small == "times" and self._ends()):
                    raise _Unread
                if len(token.text) == 1 and token.text not in _UNIT_LETTERS and not (words and small in "ac"):
                    raise _Unread  # "5 x"; but "5 dollars a day"
                words.append(_UNIT_NAME.get(token.text) or _UNIT_NAME.get(small, small))
            elif token.text == "^" and words:
                power = self._braced_integer()
                words.append(f"^{power}")
            elif token.kind == "sym" and token.text in _UNIT_LETTERS and words and words[-1] == "per":
                words.append(_UNIT_NAME[token.text])
            elif token.text in ("/", "-", "times") and self.kind() in ("word", "sym"):
                words.append("per" if token.text == "/" else "")
            elif token.text in ("'", ".") or (token.kind == "sym" and token.text in "sa" and words):
                pass  # "the bird's eggs", "5 cents a day"
            elif token.text in "()":
                brackets += 1 if token.text == "(" else -1
                if brackets < 0:
                    raise _Unread
            else:
                raise _Unread
        return _square(" ".join(w for w in words if w))

    def _said_again(self, number: Node) -> bool:
        """Passes a number repeated as a word, "5 (five)"."""
        if self.at("(") and self.kind(1) == "word" and self.at(")", ahead=2):
            word = self.found[self.i + 1].text.lower()
            if word in _ONES and number.value == _ONES.index(word):
                self.i += 3
                return True
        return False

    def _braced_integer(self) -> int:
        braces = self.take("{")
        sign = -1 if self.take("-") else 1
        token = self.next()
        if token.kind != "num" or not token.text.isdigit() or len(token.text) > 5:
            raise _Unread
        if braces:
            self.need("}")
        return sign * int(token.text)

    def union(self) -> Node:
        node = self.sum()
        while self.at("cup", "backslash", "cap"):
            sign = self.next().text
            other = self.sum()
            kind = {"cup": "union", "backslash": "difference", "cap": "intersection"}[sign]
            flat = node.args if node.kind == kind == "union" else (node,)
            node = Node(kind, (*flat, other))
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Unread
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
        if self.kind() == "op" and self.at("£", "€", "¥", "$"):
            unit = _CURRENCIES[self.next().text]
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

    def _ratio(self, first: Node) -> Node:
        parts, texts = [first], [self.found[self.i - 1].text]
        while self.take(":"):
            token = self.next()
            if token.kind != "num":
                raise _Unread
            parts.append(_number(token.text))
            texts.append(token.text)
        # "3:05" is a time and no ratio of 3 to 5: its digits are kept.
        time = len(texts) == 2 and re.fullmatch(r"[0-2]?[0-9]:[0-5][0-9]", ":".join(texts))
        return Node("ratio", tuple(parts), "time" if time else "")

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
        return name not in stops and name not in _RELATIONS and name not in _OPERATORS

    def factor(self) -> Node:
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
                    raise _Unread
                node = Node("number", (), "percent", node.value / 100)
            elif self.take("circ"):
                node = Node("unit", (node,), "degree")
            elif node.kind == "unit" and node.name == "degree" and self.kind() in ("sym", "word"):
                if self.found[self.i].text not in ("C", "F", "K"):
                    return node
                node = Node("unit", node.args, f"degree {self.next().text.lower()}")
            elif node.kind == "number" and self.kind() == "word" and self.found[self.i].text.lower() == "percent":
                self.i += 1
                node = Node("number", (), "percent", node.value / 100)
            elif node.kind == "number" and self.kind() == "word" and self.found[self.i].text.lower() in _MULTIPLES:
                node = Node("number", (), "decimal", node.value * _MULTIPLES[self.next().text.lower()])
            elif self.take("_"):
                node = self._subscript(node)
            elif node.kind == "symbol" and self.take("'"):
                node = Node("symbol", (), node.name + "'")
            else:
                return node

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
            raise _Unread
        base = re.sub(r"[^0-9]", "", below)
        if not base.isdigit() or len(base) > 2 or not 2 <= int(base) <= 36:
            raise _Unread
        return Node("based", (), f"{digits}_{base}")

    def exponent(self) -> Node:
        if self.take("-"):
            return negated(self.base())
        if self.take("+"):
            return self.base()
        return self.base()

    def base(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Unread
        node = self._base()
        self.depth -= 1
        return node

    def _base(self) -> Node:
        token = self.next()
        if token.kind == "num":
            return self._after_number(_number(token.text))
        if token.kind == "sym":
            if token.text in ("f", "g") and (self.at("(") or (self.at("'") and self.at("(", ahead=1))):
                name = token.text + ("'" if self.take("'") else "")
                return Node("call", self._bracket("(").args, name)
            return Node("symbol", (), token.text)
        if token.text in ("(", "[", "langle"):
            self.i -= 1
            group = self._bracket(token.text)
            inner = group.args[0]
            unwrapped = len(group.args) == 1 and (group.name == "()" or inner.kind == "matrix")
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
            raise _Unread
        return self._command(token.text)

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
                return _mixed(node, part)
            self.i = start
            if is_closed(part):
                raise _Unread
            return node
        if self.kind() == "num" and self.at("/", ahead=1) and self.kind(2) == "num":
            top, _, bottom = self.next(), self.next(), self.next()
            return _mixed(node, quotient(_number(top.text), _number(bottom.text)))
        return node

    def _ten_to(self) -> int | None:
        if not (
            self.at("times") and self.kind(1) == "num" and self.found[self.i + 1].text == "10" and self.at("^", ahead=2)
        ):
            return None
        start = self.i
        self.i += 3
        try:
            power = self._braced_integer()
        except _Unread:
            self.i = start
            return None
        if abs(power) > _MAX_EXPONENT:
            raise _Unread
        return power

    def _bracket(self, left: str) -> Node:
        self.next()
        items = self.several(at_top=False)
        right = self.next()
        close = {")": ")", "]": "]", "rangle": ")"}.get(right.text)
        if close is None or right.kind == "word":
            raise _Unread
        args = items.args if items.kind == "list" and items.name == "," else (items,)
        return Node("group", args, ("(" if left == "langle" else left) + close)

    def _absolute(self, bar: str) -> Node:
        self.absolute += 1
        node = self.sum()
        if not self.take(bar) and not self.take("|", "vert"):
            raise _Unread
        self.absolute -= 1
        return Node("function", (node,), "abs")

    def _matrix(self, name: str) -> Node:
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "Bmatrix", "smallmatrix"):
            raise _Unread
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
            raise _Unread
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
        if name in _FUNCTIONS:
            return self._function(name)
        if name in ("angle", "triangle", "measuredangle"):
            letters: list[str] = []
            while self.kind() == "sym":
                letters.append(self.next().text)
            return Node("symbol", (), f"\\{name} {''.join(letters)}")
        if name in _OPERATORS or name in _RELATIONS or not name.isalpha():
            raise _Unread
        if name in ("times", "div", "pm", "mp", "circ", "cup", "cap", "backslash", "rfloor", "rceil", "choose", "over"):
            raise _Unread
        return Node("symbol", (), f"\\{name}")

    def _set(self) -> Node:
        if self.take("}"):
            return Node("symbol", (), "\\emptyset")
        items = self.several(at_top=False)
        self.need("}")
        args = items.args if items.kind == "list" else (items,)
        if any(a.kind == "relation" for a in args):
            raise _Unread
        return Node("set", args)

    def _function(self, name: str) -> Node:
        below = power = None
        if self.take("_"):
            below = self._argument()
        if self.take("^"):
            power = self.exponent()
        if below is not None and name != "log":
            raise _Unread
        node = self.factor() if self.at("(", "{", "[") else self._bare_argument()
        args = (node,) if below is None else (node, below)
        if power == negated(integer(1)):  # the inverse function, which is no power
            if name not in ("sin", "cos", "tan", "cot", "sec", "csc"):
                raise _Unread
            return Node("function", args, f"arc{name}")
        node = Node("function", args, name)
        return node if power is None else Node("power", (node, power))

    def _bare_argument(self) -> Node:
        node = self.factor()
        while self._starts_factor() and not self.at("("):
            if self.kind() == "cmd" and self.found[self.i].text in _FUNCTIONS:
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
            return _number(token.text)
        if self.at("("):
            return self.base()
        if self.kind() == "sym" or (self.kind() == "cmd" and self.found[self.i].text in ("pi", "sqrt", "theta")):
            return self.base()
        raise _Unread

    def _frac(self) -> Node:
        return quotient(self._argument(), self._argument())


def _square(unit: str) -> str:
    """Spells areas and volumes one way: "sq cm" and "cm ^2" are "cm ^2"."""
    words = unit.split()
    if len(words) >= 2 and words[0] in ("sq", "cubic"):
        if words[1] == "unit":
            return " ".join(["unit", "^2" if words[0] == "sq" else "^3", *words[2:]])
        return " ".join([words[1], "^2" if words[0] == "sq" else "^3", *words[2:]])
    return unit


def _number(text: str) -> Node:
    if len(text) > MAX_DIGITS:
        raise _Unread
    if "r" in text:
        whole, _, rest = text.partition(".")
        fixed, _, repeated = rest.partition("r")
        scale = 10 ** len(fixed)
        value = Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), scale)
        return Node("number", (), "decimal", value + Fraction(int(repeated), scale * (10 ** len(repeated) - 1)))
    if "e" in text:
        mantissa, _, power = text.partition("e")
        if abs(int(power)) > _MAX_EXPONENT:
            raise _Unread
        return Node("number", (), "scientific", Fraction(mantissa) * Fraction(10) ** int(power))
    return Node("number", (), "decimal" if "." in text else "integer", Fraction(text))


def _mixed(whole: Node, part: Node) -> Node:
    if part.kind != "number" or part.name != "fraction" or not 0 < part.value < 1:
        raise _Unread
    return Node("number", (), "mixed", whole.value + part.value)


def negated(node: Node) -> Node:
    """The node with a minus sign before it. A number stays a number; "--3" does not."""
    if node.kind == "number" and node.value > 0:
        return Node("number", (), node.name, -node.value)
    if node.kind == "unit":
        return Node("unit", (negated(node.args[0]),), node.name)
    if node.kind == "plusminus":
        raise _Unread
    return Node("negative", (node,))


def times(a: Node, b: Node) -> Node:
    """The product of two nodes, flat. A unit may be in no factor."""
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise _Unread
    factors = (a.args if a.kind == "product" else (a,)) + (b.args if b.kind == "product" else (b,))
    return Node("product", factors)


def quotient(a: Node, b: Node) -> Node:
    """The quotient of two nodes. A fraction of two integers is a number."""
    if any(n.kind in ("list", "relation", "ratio", "text") for n in (a, b)):
        raise _Unread
    if a.kind == b.kind == "number" and a.name == b.name == "integer" and b.value != 0:
        return Node("number", (), "fraction", a.value / b.value)
    return Node("quotient", (a, b))


def is_closed(node: Node) -> bool:
    """Whether a value has no variables: every symbol in it is a known constant."""
    parts = list(children(node))
    if any(n.kind in ("text", "call", "list", "relation", "matrix", "set", "group", "union") for n in parts):
        return False
    return all(n.name in ("\\pi", "e", "i") for n in parts if n.kind == "symbol")


def any_node(node: Node, test: Callable[[Node], bool]) -> bool:
    """Whether a node of the tree passes the test."""
    return any(test(n) for n in children(node))
