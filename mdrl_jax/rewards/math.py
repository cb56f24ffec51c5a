r"""Reward for problems with one right final answer.

The final answer of a reply is the first of these that it has: the content of its last `\boxed{...}`; the rest of the
line after its last `####` (GSM8K, arXiv 2110.14168); the rest of the line after its last "answer is". Otherwise, if a
number is wanted, it is the last number of the reply. If no number is wanted, it is the last formula, or the whole reply
if there is none.

Two numbers are compared exactly, as rationals: 0.5 equals 1/2 and 1,000 equals 1000, but 0.3333 does not equal 1/3.
Dollar and percent signs, a leading plus, a trailing period and a unit or remark after the number of a reply are
ignored. Other answers are first compared as text, ignoring spaces, case and LaTeX spacing. If the texts differ,
math-verify decides whether the two formulas mean the same (fractions, roots, sets, intervals, equations, matrices,
units). It is asked only where the answer is marked as mathematics by a box, a formula or a LaTeX command, so an
unmarked "3 + 4" does not equal 7. It is not asked where the right answer is prose, because it reads words as products
of letters and takes Paris and Pairs for the same.

math-verify is imported at its first use, so checks of numbers never wait for the import. Its own time limits are
switched off, because they use signals and fail outside the main thread. The limits of the reward worker end a formula
that takes too long to evaluate, such as a tower of powers.
"""

import functools
import logging
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

# A comma between thousands must be followed by three digits; otherwise the pair "2,3" would be the number 23.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SIGNED = rf"[-+]?\s?\$?\s?[-+]?(?:{_DIGITS})"
_NUMBER = re.compile(rf"({_SIGNED})(?:\s?/\s?\$?({_DIGITS}))?")
_IN_TEXT = re.compile(rf"(?:(?<![\w.)])[-+])?\$?(?:(?<!\w)-)?(?:{_DIGITS})(?:/(?:{_DIGITS}))?")
# Text that may follow a number: the next sentence, or a unit or remark without digits. "5 or 6" is thus no number.
_REMARK = re.compile(r"[$%*]*(?:[.!?]?$|[.!?]\s.*|[,;]?\s+(?:[^\W\d_]|\()[^0-9]*)", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}")
_ANSWER_IS = re.compile(r"answer\s+is\b\s*:?", re.IGNORECASE)
_LATEX_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|[!,;: ])")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LATEX_COMMAND = re.compile(r"\\(?:begin|end|operatorname)\s*\{[a-zA-Z*]*\}|\\[a-zA-Z]+")
_FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|inf(?:ty)?", re.IGNORECASE)
_SPANS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_MAX_DIGITS = 1000  # longer numbers are compared as text, so that a reply cannot cause slow integer arithmetic
_MAX_FORMULA = 1000  # characters; the parsing time grows faster than the length


def final_answer(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the final answer of the reply equals `check["answer"]`, or one of its items if it is a list; else 0.0.

    An answer may be a text or a number. An empty list gives 0.0.

    Raises:
      KeyError: if the check has no "answer".
    """
    answers = check["answer"]
    wanted = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
    return float(any(_right(completion, w) for w in wanted))


def _right(completion: str, wanted: str) -> bool:
    number = is_number(wanted)
    answer = extract(completion, number)
    if equal(answer, wanted):
        return True
    if number and rational(answer) is not None:  # both are numbers, and the exact comparison has decided
        return False
    marked = "\\" in answer or last_boxed(completion) is not None or (not number and last_span(completion) is not None)
    return marked and not is_words(wanted) and same_mathematics(answer, wanted)


def extract(completion: str, number: bool) -> str:
    """Returns the final answer of a reply, by the rules in the module's docstring.

    Args:
      completion: the reply.
      number: whether the right answer is a number.

    Returns:
      The answer, as the reply writes it. "" if a number is wanted and the reply has none.
    """
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed
    answer_is = [match.end() for match in _ANSWER_IS.finditer(completion)]
    hashes = completion.rfind("####")
    for start in ([hashes + 4] if hashes >= 0 else []) + answer_is[-1:]:
        line = completion[start:].strip().partition("\n")[0]
        if line:
            return line
    if not number:
        span = last_span(completion)
        return completion if span is None else span
    return (_IN_TEXT.findall(completion.replace("−", "-")) or [""])[-1]


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` whose braces balance; None if there is none."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), end):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + len("\\boxed{") : i]
        end = start
    return None


def last_span(text: str) -> str | None:
    """Returns the content of the formula (`$...$` or LaTeX brackets) that ends last; None if there is none."""
    best: tuple[int, int] | None = None
    for left, right in _SPANS:
        end = text.rfind(right)
        start = text.rfind(left, 0, max(end, 0))
        if start >= 0 and text[start + len(left) : end].strip() and (best is None or end > best[1]):
            best = start + len(left), end
    return None if best is None else text[slice(*best)]


def equal(answer: str, wanted: str) -> bool:
    """Whether two answers are the same: compared as exact numbers if `wanted` is a number, else as normalized text.

    Args:
      answer: the final answer of a reply (`extract`).
      wanted: the right answer. A blank one equals nothing.
    """
    if is_number(wanted):
        return rational(answer) == rational(wanted)
    text = normalized(wanted)
    return text != "" and normalized(answer) == text


def is_number(wanted: str) -> bool:
    """Whether a right answer is a number that no word follows. "3 apples and a pear" is text."""
    return re.search(r"\w\s+[^\W\d]", wanted) is None and rational(wanted) is not None


def is_words(wanted: str) -> bool:
    """Whether a right answer is prose: it has a word of three or more letters that is no function or LaTeX command."""
    text = _LATEX_COMMAND.sub(" ", _LATEX_TEXT.sub(" ", wanted))
    return any(not _FUNCTIONS.fullmatch(word) for word in re.findall(r"[^\W\d_]{3,}", text))


def same_mathematics(answer: str, wanted: str) -> bool:
    """Whether math-verify takes two formulas for the same. False if one cannot be parsed or has over 1000 characters.

    Args:
      answer: the final answer of a reply, in LaTeX, with or without dollar signs around it.
      wanted: the right answer, likewise.
    """
    if max(len(answer), len(wanted)) > _MAX_FORMULA:
        return False
    parse, verify = _math_verify()
    gold = parse(wanted)
    return bool(gold) and verify(gold, parse(answer))


@functools.cache
def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
    import math_verify

    # Otherwise every worker logs a warning that the time limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [math_verify.LatexExtractionConfig()]

    def parse(text: str) -> list[Any]:
        formula = " ".join(_unwrapped(text).replace("$", "").replace("%", "\\%").split())
        return math_verify.parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=0)

    def verify(gold: list[Any], answer: list[Any]) -> bool:
        return math_verify.verify(gold, answer, timeout_seconds=0)

    return parse, verify


def rational(text: str) -> Fraction | None:
    r"""Reads a text as an exact number, ignoring a unit or remark after it.

    Numbers are texts such as "3", "1,000.5 cm", "1/2" or "\frac{1}{2}".

    Returns:
      The number; None if the text is no number, divides by 0, or has over 1000 digits.
    """
    text = _FRACTION.sub(r"\1/\2", _unwrapped(text))
    match = _NUMBER.match(text)
    if match is None or not _REMARK.fullmatch(text, match.end()):
        return None
    top, bottom = (re.sub(r"[\s$,]", "", part or "1") for part in match.groups())
    if len(top) + len(bottom) > _MAX_DIGITS:
        return None
    try:
        return Fraction(top) / Fraction(bottom)
    except (ValueError, ZeroDivisionError):
        return None


def normalized(text: str) -> str:
    """Returns `text` case-folded, without spaces, LaTeX spacing, LaTeX text commands and a trailing period.

    Marks around the whole text (dollar signs, LaTeX brackets, asterisks) go too.
    """
    text = _LATEX_SPACING.sub("", _LATEX_TEXT.sub(r"\1", _unwrapped(text)))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return re.sub(r"\s+", "", text).removesuffix(".").casefold()


def _unwrapped(text: str) -> str:
    """Returns `text` without the marks that writers put around it: $...$, **...**, LaTeX brackets."""
    text = text.replace("−", "-").replace("\\$", "$").replace("\\%", "%").strip()
    for _ in range(3):
        text = text.strip("*_` \t\r\n").removesuffix(".")
        for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
    return text.strip()
