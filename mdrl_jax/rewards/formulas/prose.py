"""Finds the last number of a reply, with the calculation or formula that it stands in."""

import re

from mdrl_jax.rewards.formulas.boxes import DENIED_AFTER, WINDOW, span_at_end

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_ONE = rf"\\?[$£€¥]?(?:{_DIGITS})(?:[eE][-+]?[0-9]+)?[%!°]?"
_SIGN = r"(?:(?<![\w.)%])[-+−–](?=[$.0-9])|(?<![\w.)%])(?<![\w.)%]\s)[-+−]\s)?"  # "5 - 3" has no sign, "is -3" has
# A number and the calculation before it. GSM8K writes "5+3 = <<5+3=8>>8".
_NOTE = r"\$?(?:<<[^<>]*>>)?"
_SIGN_BETWEEN = r"[-+*/×·÷^=−–]|\*\*|\sx(?=\s)|(?<=[0-9])x(?=[0-9])"
_RUN = re.compile(
    rf"{_SIGN}{_ONE}(?:\s?{_NOTE}\s?(?:{_SIGN_BETWEEN})\s?{_NOTE}[-−]?{_ONE}"
    rf"|\s[0-9]+/[0-9]+|[¼½¾]|(?<=[0-9]),[0-9]+)*"
)
_FACTOR_AFTER = re.compile(
    r"\s?\\(?:times|cdot|div|pi|theta|alpha|beta|phi|sqrt|frac|binom|log|ln)\b|\s(?:theta|alpha|beta|gamma)\b"
    r"|\s(?:more than|less than|times)\s(?:[b-zB-HJ-Z]\b|that\b)"
)
_NEXT_WORD = re.compile(r"(\s?)([^\W\d_]+|[\^_²³π√])")
_OPEN_BEFORE = re.compile(  # what stands before a number that is one of several, or no answer by itself
    r"(?:\b(?:maybe|perhaps|possibly|cannot|not|never)|n['’]t|不是|非)\s?"
    r"(?:equal to\s|be\s|is\s|it's\s|it is\s)?(?:[a-zA-Z]\s?=\s?)?$"
    r"|(?:[0-9%]|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)\s*[^\W\d_]{0,12}\s?[,;]?\s?"
    r"(?:\bor\b|\bto\b|\bvs\b)\s(?:else\s|it's\s|it\sis\s)?(?:[a-zA-Z]\s?=\s?)?$"
    r"|[0-9],?\s?(?:and|&)\s$|\bbetween\s+\S+\s+and\s$|\b(?:sqrt|log|ln|sin|cos|tan|exp|abs|f|g)\s?\(?$"
    r"|[√\^_\\]\s?$|[0-9]\s?[–:]$|[0-9]\s[–:]\s$|(?<![<>=-])(?:[<≤≥≠±]=?|(?<!^)(?<!\n)>=?|!=)\s?$"
    r"|\\(?:pm|mp|l[et]q?|g[et]q?|neq?)\s?$|(?:\.\.|…),?\s?$|[0-9],\s[-0-9.]+,\s$|[0-9]或$"
    r"|(?:\\[a-zA-Z]+(?:\[[^\[\]]*\])?(?:\{[^{}]*\})*|[\^_])\{[^{}]*$"  # in an argument of a command
    r"|\\(?:times|cdot|div|over|pi|theta|alpha|beta|phi|log|ln|sin|cos|tan|sqrt|binom)\s?$"
    r"|[({\[](?:[^(){}\[\]=a-z]*,)\s?$|(?<![a-zA-Z])[a-zA-Z]\(?$|[a-zA-Z]\[$",  # in a tuple, or glued to a letter
    re.IGNORECASE,
)
# Words before a number that bound it.
_BOUND_BEFORE = re.compile(
    r"\b(?:at least|at most|(?:less|more|fewer|greater|larger|smaller|higher|lower|bigger) than|equal to or"
    r"|up to|under|over|below|above|beyond|exceeds|exceeding|than or equal to)\s\(?$",
    re.IGNORECASE,
)
# Words before a number that it is an operand of, or that it counts. What follows a sign "=" may still be an answer.
_OPERAND_BEFORE = re.compile(
    r"\b(?:multiples? of|divisible by|mod|modulo|base|twice|double|triple|half of|(?:square|cube|root|"
    r"factorial|sum|product|reciprocal|inverse) of|to the power(?: of)?|raised to|to the|steps?|questions?"
    r"|problems?|parts?|equations?|figures?|cases?|chapters?|sections?|lines?|examples?|exercises?)\s\(?$"
    r"|[a-zA-Z]_$|\\(?:times|cdot|div)\s?$"
    r"|[0-9%]\s?(?:[^\W\d_]{1,12}\s)?(?:out of|of(?: the)?|in|per|vs|mod|plus|minus|times|multiplied by"
    r"|divided by|over|%|percent of|to the power of)\s$"
    r"|[0-9]\s%\s$",
    re.IGNORECASE,
)
# An equation that is not solved, "2x = 10" or "x + 3 = 8".
_UNSOLVED_BEFORE = re.compile(
    r"(?:(?<![0-9.])[0-9]+\s?[xyzn]\s?=|(?<![a-zA-Z])[xyzn]\s?[-+−*/^×]\s?(?:[0-9]+\s?=)?)\s?\$?$"
)
_NEGATIVE_BEFORE = re.compile(r"(?<![0-9])(?:^|\s)(?:minus|negative)\s$", re.IGNORECASE)
_OPERATION_BEFORE = re.compile(r"[\w)%]\s*[-+*/×·÷–−]\s*\$?$|\sx\s\$?$|[0-9a-z]\)$")
_MEASURES = "个元米克升天年月人只本次种度岁"
_NUMERALS = "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred".split()
_MULTIPLES = frozenset("hundred thousand million billion trillion dozen percent 万 亿 千 百".split())
_CHANGE_AFTER = frozenset(
    "half halves thirds quarters fourths fifths sixths tenths hundredths squared cubed factorial or pi mod".split()
)
_GLUED_UNITS = frozenset("cm mm km kg mg ml mb gb kb ft am pm lb lbs oz st nd rd th mph hrs hr min sec".split())


def last_number(text: str) -> str:
    """The last number of a text with the calculation or formula that it stands in.

    Returns:
      The text of it: a formula in dollar signs or LaTeX brackets as it stands, else the number and its calculation
      ("3+5 = 8") without signs of currencies, and either with the word after it if that multiplies it ("3 million"). A
      unit after the number is left out, and "minus 5" is "-5". Where the calculation has letters ("60 g * 4/5 = 48"),
      only what follows its last "=" is returned. Spaces may stand at the ends. "" if there is no number, or if the
      words beside the last one show that it is no answer by itself: it is one of several ("5 or 6"), is denied, is a
      bound ("at least 5"), is an operand ("half of 5", "5 squared") or part of a formula or of an equation that is not
      solved ("2x = 10"), or counts something in the text ("step 5").
    """
    if formula := _last_formula(text):
        return formula
    end = _digits_end(text)
    runs = list(_RUN.finditer(text, max(0, text.rfind("\n", 0, end) + 1, end - 1000)))
    if not runs:
        return ""
    run = runs[-1]
    before = text[max(0, run.start() - WINDOW) : run.start()]
    bare = before.rstrip("$£€¥\\*(")
    line = before.rpartition("\n")[2]
    if _UNSOLVED_BEFORE.search(line) and ("=" in run[0] or line.rstrip(" $").endswith("=")):
        return ""
    if "=" in run[0] and _OPERAND_BEFORE.search(line):
        return _with_next_word(run[0].rpartition("=")[2].strip(" $"), text[run.end() : run.end() + WINDOW])
    if any(_OPEN_BEFORE.search(b) for b in {before, bare}) or DENIED_AFTER.match(text[run.end() : run.end() + WINDOW]):
        return ""
    line = line.rstrip("$£€¥₹\\*(") if line.endswith(tuple("$£€¥₹\\*(")) else line
    if _BOUND_BEFORE.search(line) or _OPERAND_BEFORE.search(line):
        return ""
    number = re.sub(r"<<[^<>]*>>|\\?[$£€¥]", "", run[0]).removesuffix("!")  # in prose "!" is an exclamation mark
    if _NEGATIVE_BEFORE.search(bare):
        number = f"-{number}"
    elif _OPERATION_BEFORE.search(before.rpartition("\n")[2]):  # "60 g * 4/5 = 48": it starts before the run
        start, sign, number = number.rpartition("=")
        if not sign and before.rstrip("$ ").endswith(tuple("*/×·÷+-−–)x")):
            return ""
        number = number or start
    return _with_next_word(number, text[run.end() : run.end() + WINDOW])


def _last_formula(text: str) -> str:
    """The last formula, if the last number of the text stands in it and it has no words; else ""."""
    span = span_at_end(text)
    if span is None or re.search("[0-9]", text[span[1] :]) or not re.search("[0-9]", text[slice(*span)]):
        return ""
    formula = text[slice(*span)]
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}", formula):
        return ""
    word = _NEXT_WORD.match(text[span[1] : span[1] + WINDOW].lstrip("$\\)]"))
    return f"{formula} {word[2]}" if word and word[2].lower() in _MULTIPLES else formula


def _with_next_word(number: str, after: str) -> str:
    """A number, with the word after it if that multiplies it; "" if the word changes the number in another way."""
    if _FACTOR_AFTER.match(after):
        return ""
    match = _NEXT_WORD.match(after)
    if match is None:
        return number
    word, glued = match[2].lower(), not match[1]
    if word in _MULTIPLES:
        return f"{number} {word}"
    letter = len(word) == 1 and match[2] not in "mgsLaAJWNVhI" + _MEASURES
    variables = (
        glued and len(word) < 3 and word[0] < "\u3040" and word not in _GLUED_UNITS and match[2] not in "mgsLhWNVJ"
    )
    to_another = word == "to" and after[match.end() :].split()[:1] and after[match.end() :].split()[0] in _NUMERALS
    return "" if word in _CHANGE_AFTER or word in "^_²³π√" or letter or variables or to_another else number


def _digits_end(text: str) -> int:
    """Where the last digit of a text stands."""
    return next((i for i in range(len(text) - 1, -1, -1) if text[i] in "0123456789"), 0)
