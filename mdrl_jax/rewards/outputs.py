"""Compares what a program prints with what it should print, as the graders of programming contests do.

White space at the ends of lines and of the text does not count, and neither does the number of spaces between the words
of a line. Two words are equal if they are the same text or the same decimal number ("3.0" and "3"). This is the
comparison of LiveCodeBench (arXiv 2403.07974). Codeforces and APPS also accept numbers within a tolerance, and ignore
where lines end; a check asks for either.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?", re.ASCII)
_MOST_DIGITS = 1000  # longer numbers are compared as text
LAYOUTS = ("lines", "words")


def same_output(got: str, wanted: str, tolerance: float = 0.0, layout: str = "lines") -> bool:
    """Whether a program's output is the wanted one.

    Args:
      got: the output.
      wanted: the wanted output.
      tolerance: the largest error of a number, absolute or relative to the wanted number, as in Codeforces' checkers:
        |got − wanted| ≤ tolerance × max(1, |wanted|). 0 wants equal numbers. It must not be NaN. Numbers of over 1000
        characters are compared as texts, and so are "inf" and "nan".
      layout: "lines" wants the same words in each line, and empty lines between others count; "words" ignores where
        lines end. Any other text means "lines".

    >>> same_output("1 2\\n3.0\\n", "1  2 \\n3"), same_output("1\\n2", "1 2"), same_output("1\\n2", "1 2", 0.0, "words")
    (True, False, True)
    """
    if layout == "words":
        got, wanted = " ".join(got.split()), " ".join(wanted.split())
    lines, wanted_lines = got.strip().split("\n"), wanted.strip().split("\n")
    if len(lines) != len(wanted_lines):
        return False
    return all(_same_line(a.split(), b.split(), tolerance) for a, b in zip(lines, wanted_lines, strict=True))


def _same_line(got: list[str], wanted: list[str], tolerance: float) -> bool:
    return len(got) == len(wanted) and all(_same_word(a, b, tolerance) for a, b in zip(got, wanted, strict=True))


def _same_word(got: str, wanted: str, tolerance: float) -> bool:
    if got == wanted:
        return True
    if max(len(got), len(wanted)) > _MOST_DIGITS or not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(wanted)):
        return False
    a, b = Decimal(got), Decimal(wanted)
    return a == b or abs(a - b) <= Decimal(tolerance) * max(Decimal(1), abs(b))


def case_error(case: Any) -> str:
    """Says what is wrong with a case of a check, which has to be {"stdin": text, "stdout": text}; "" for nothing.

    Further keys of the case do not matter.
    """
    if isinstance(case, Mapping) and all(isinstance(case.get(key), str) for key in ("stdin", "stdout")):
        return ""
    return f'a case must be {{"stdin": text, "stdout": text}}, not {str(case)[:80]!r}'
