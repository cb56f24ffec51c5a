r"""Reward for problems with one right final answer.

The final answer of a reply is its last `\boxed{...}`, else what follows its last `####` (GSM8K,
arXiv 2110.14168), else what follows its last "answer is", else its last number.

Numbers are compared exactly, as rationals: 0.5 is 1/2 and 1,000 is 1000, but 0.3333 is not 1/3.
Dollar and percent signs, a leading + and a trailing period do not count, nor does a unit written
after the number. What is not a number is compared as text, without spaces, case and LaTeX spacing.
`equal` is the one place that decides whether two answers are the same.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

# A thousands comma must be followed by three digits, so that the pair "2,3" is not the number 23.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SIGNED = rf"[-+]?\s?\$?\s?[-+]?(?:{_DIGITS})"
_NUMBER = re.compile(rf"({_SIGNED})(?:\s?/\s?\$?({_DIGITS}))?")
_IN_TEXT = re.compile(rf"(?:(?<![\w.)])[-+])?\$?(?:(?<!\w)-)?(?:{_DIGITS})(?:/(?:{_DIGITS}))?")
# After a number: the next sentence, or a unit or remark without digits ("5 or 6" is no number).
_REMARK = re.compile(r"[$%*]*(?:[.!?]?$|[.!?]\s.*|[,;]?\s+(?:[^\W\d_]|\()[^0-9]*)", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}")
_ANSWER_IS = re.compile(r"answer\s+is\b\s*:?", re.IGNORECASE)
_LATEX_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|[!,;: ])")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_MAX_DIGITS = 1000  # longer ones are compared as text: a reply must not buy big-integer work


def final_answer(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the final answer of `completion` equals `check["answer"]` (one, or one of several)."""
    answers = check["answer"]
    wanted = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
    return float(any(equal(extract(completion, is_number(w)), w) for w in wanted))


def extract(completion: str, number: bool) -> str:
    """The final answer of a reply, "" if it has none.

    An unmarked reply is its last number if a number is wanted, else it is all answer.
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
        return completion
    return (_IN_TEXT.findall(completion.replace("−", "-")) or [""])[-1]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; None if there is none."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), end):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + len("\\boxed{") : i]
        end = start
    return None


def equal(answer: str, wanted: str) -> bool:
    """Whether two answers are the same: exactly as numbers if `wanted` is one, else as text."""
    if is_number(wanted):
        return rational(answer) == rational(wanted)
    text = normalized(wanted)
    return text != "" and normalized(answer) == text


def is_number(wanted: str) -> bool:
    """Whether a right answer is a number and nothing else: "3 apples and a pear" is text."""
    return re.search(r"\w\s+[^\W\d]", wanted) is None and rational(wanted) is not None


def rational(text: str) -> Fraction | None:
    """The number that `text` is, a unit or remark after it left out; None if it is not one."""
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
    """`text` without spaces, case, LaTeX spacing and text commands, and a trailing period."""
    text = _LATEX_SPACING.sub("", _LATEX_TEXT.sub(r"\1", _unwrapped(text)))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return re.sub(r"\s+", "", text).removesuffix(".").casefold()


def _unwrapped(text: str) -> str:
    """`text` without the marks that writers put around it: $...$, **...**, LaTeX brackets."""
    text = text.replace("−", "-").replace("\\$", "$").replace("\\%", "%").strip()
    for _ in range(3):
        text = text.strip("*_` \t\r\n").removesuffix(".")
        for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
    return text.strip()
