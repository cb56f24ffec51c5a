"""Splits an answer into words, numbers, letters, commands and signs."""

import re
from dataclasses import dataclass

from mdrl_jax.rewards.formulas.nodes import Unread
from mdrl_jax.rewards.formulas.spelling import clean
from mdrl_jax.rewards.formulas.words import (
    COMMON_WORDS,
    FONT_COMMANDS,
    FUNCTIONS,
    LETTER_COMMANDS,
    OPERATORS,
    SAME_COMMAND,
    SHORT_UNITS,
    TEXT_COMMANDS,
    UNIT_LETTERS,
    UNIT_NAME,
    in_order,
    is_word,
)

_INTEGER = r"[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])|[0-9]+"
_NUMBER = re.compile(rf"(?:{_INTEGER})?(?:(?<=[0-9])\.[0-9]+|(?<![0-9])\.[0-9]+)?")
_BARE_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")  # within brackets a comma always separates
_EXPONENT = re.compile(r"[eE](?:\+|(-)?)([0-9]+)(?![\w.])")
_OVERLINE = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_DOTS = re.compile(r"([0-9]*)\.([0-9]*)\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?")
_LETTERS = re.compile(r"[^\W\d_]+")
_NESTED = 50  # text commands within each other that are read, e.g. \text{\text{...}}
_COMMAND = re.compile(r"\\([a-zA-Z]+)\*?|\\(.)", re.DOTALL)


@dataclass(frozen=True)
class Token:
    """A word, number, letter, command or sign. `spaced` says whether a space precedes it."""

    kind: str
    text: str
    spaced: bool = False


def tokens(text: str, variables: frozenset[str] = frozenset(), formula: bool = False) -> list[Token]:
    """Splits a text (after `clean`) into tokens, in order; [] for a blank text. Their kinds are:

    - num: a number without separators of thousands, "1000" for "1,000"; within brackets, a comma always separates. The
      text is such as "1.2e5", or "0.1r6" for 0.1666...; `nodes.literal` reads it. The exponent has all of its digits,
      without a plus sign and leading zeros.
    - word: letters that are a word (`words.is_word`) or a unit, or that stand in a command such as `\\text{...}`.
      Letters right after a digit or a closing brace are none, unless they are a unit or a common short word, if there
      are three of them, as in "3xab", or four in alphabetical order.
    - sym: any other letter, alone, or a command such as `\\vec{a}` with its letters.
    - cmd: a command without its backslash, under one name: `\\dfrac` is "frac". Names of functions without a backslash,
      and `*`, `<=`, `>=` and `!=`, are commands too.
    - op: any other sign, one character; `**` is "^".
    - begin and close: the name of an environment such as pmatrix.

    Commands such as `\\text{...}`, `\\mathrm{...}` and `\\boxed{...}` leave only the tokens of their content.

    Args:
      text: the text, after `clean`.
      variables: letters that are variables. Three or more letters of them alone are no word, except in a command such
        as `\\text{...}`, if they are a common short word, or if all are capitals.
      formula: whether three or more letters in alphabetical order are no word, even if they are one in English: the
        "ace" of "ace + bdf". Common short words stay words.

    Raises:
      Unread: if the braces after such a command do not balance, a backslash ends the text, a dot before an overline or
        a dotted digit begins no number, or more than 50 such commands stand within each other.
    """
    return _Tokenizer(text, variables, formula).run()


def plain(text: str) -> str:
    """Returns the words and signs of a text in one spelling, for the comparison of texts.

    These are the texts of its tokens (`tokens`), so `\\pi` is "pi" and "1,000" is "1000". Words of two letters or more
    are in lower case, and single letters keep their case; single spaces stand between all of them. Spaces of the text,
    and periods, commas, semicolons and LaTeX line breaks at its end do not count. A text that has nothing else gives
    "". In a text that begins with a brace, such as `{x : x > 3}`, colons and `\\mid` become "|". A text that `tokens`
    cannot split is returned as `clean` spells it.
    """
    text = clean(text)
    try:
        found = tokens(text)
    except Unread:
        return " ".join(text.split())
    drop_last_signs(found)
    if found and found[0].text == "{":  # a set such as {x : x > 3}
        found = [Token("op", "|") if t.text in (":", "mid") else t for t in found]
    return " ".join(t.text.casefold() if t.kind == "word" and len(t.text) > 1 else t.text for t in found)


def drop_last_signs(found: list[Token]) -> None:
    """Removes the periods, commas, semicolons and LaTeX line breaks (cr) that end the list of tokens, in place."""
    while found and ((found[-1].kind == "op" and found[-1].text in ".,;") or found[-1].text == "cr"):
        found.pop()


class _Tokenizer:
    def __init__(
        self,
        text: str,
        variables: frozenset[str],
        formula: bool,
        prose: bool = False,
        upright: bool = False,
        nested: int = 0,
    ) -> None:
        if nested > _NESTED:
            raise Unread
        self.variables = variables
        self.formula = formula
        self.nested = nested
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
            raise Unread
        number, end = re.sub("[, ]", "", match[0]), match.end()
        if exponent := _EXPONENT.match(self.text, end):
            power = exponent[2].lstrip("0")
            sign = exponent[1] if exponent[1] and power else ""
            number, end = f"{number}e{sign}{power or 0}", exponent.end()
        self._add("num", number, spaced)
        return end

    def _command(self, i: int, spaced: bool) -> int:
        match = _COMMAND.match(self.text, i)
        if match is None:
            raise Unread
        name = match[1] or match[2]
        name, end = SAME_COMMAND.get(name, name), match.end()
        if name in TEXT_COMMANDS or name in FONT_COMMANDS or name in ("boxed", "fbox"):
            inner, end = _braced(self.text, end)
            unit = name == "mathrm" and ("/" in inner or (bool(self.found) and inner.strip() in UNIT_LETTERS))
            prose, upright = name in TEXT_COMMANDS or unit, name in FONT_COMMANDS
            sub = _Tokenizer(inner, self.variables, self.formula, prose, upright, self.nested + 1)
            found = sub.run()
            if name in FONT_COMMANDS and len(found) == 1 and found[0].text in FUNCTIONS | OPERATORS:
                found = [Token("cmd", found[0].text, spaced)]
            self.found += found
        elif name in LETTER_COMMANDS:
            inner, end = _braced(self.text, end)
            self._add("sym", f"\\{name}{{{inner.replace(' ', '')}}}", spaced)
        elif name in ("begin", "end"):
            inner, end = _braced(self.text, end)
            self._add("begin" if name == "begin" else "close", inner.strip().rstrip("*"), False)
        else:
            self.depth += (name in ("{", "langle")) - (name in ("}", "rangle"))
            self._add("op" if name in "[]<>:%$£€¥₹|" else "cmd", name, spaced)
        return end

    def _letters(self, match: re.Match[str], spaced: bool) -> int:
        run, end = match[0], match.end()
        if run in ("pi", "infty", "infinity", "sqrt") or run in FUNCTIONS or (run in OPERATORS and not self.prose):
            word = run in OPERATORS and (run == "to" or run == "because" or run == "therefore" or run == "sum")
            self._add("word" if word else "cmd", SAME_COMMAND.get(run, run), spaced)
        elif self._is_word(run, match.start()):
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

    def _is_word(self, run: str, start: int) -> bool:
        if self.prose or (self.upright and len(run) > 1):
            return True
        if len(run) > 2 and run.lower() not in COMMON_WORDS:
            if (self.formula and in_order(run)) or (self.variables.issuperset(run) and not run.isupper()):
                return False
            glued = start > 0 and self.text[start - 1] in "0123456789}" and run.lower() not in UNIT_NAME
            if glued and (len(run) == 3 or (len(run) == 4 and in_order(run))):
                return False
        if is_word(run):
            return True
        return run in SHORT_UNITS and len(self.found) > 0 and self.found[-1].text != "="


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
    raise Unread
