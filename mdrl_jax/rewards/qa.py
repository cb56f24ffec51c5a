"""Rewards for short answers: exact match and F1 as in SQuAD (arXiv 1606.05250), and multiple choice.

Exact match and F1 take the best value over the accepted answers.

Deviations from SQuAD, whose normalization makes "-3.5" and "35" equal, and "+" and an empty reply:

- Articles are kept if the text has no other words, as in the multiple-choice answer "A".
- Two numbers are compared as numbers.
- A text of punctuation alone equals only itself, so an empty reply earns 0.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from mdrl_jax.rewards.formulas.boxes import last_boxed

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"([-+−]?)[$€£]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s?%?\.?", re.ASCII)
_LATEX = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mathit)\b|\\[()\[\]]|\\(?=%)|[{}$]")
_MARKUP = re.compile(r"(?<![^\W_])[*_`]+(?=\S)|(?<=\S)[*_`]+(?![\w*`])|[\"“”]")  # "2*3" and "G_1" have no markup
_MINUS = str.maketrans("−–‒", "---")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|(?<![^\W_])\.\d+|[^\W\d_]+|\S")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_COMPOUND = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
# "A" is an article only at the start, and no article ends a text; "vitamin A" and "vitamin" are thus different.
_ARTICLE = re.compile(r"(?:\b(?:[Aa]n|[Tt]he|a)|^A)\s+(?=[^\W\d_]{2})")
_SOFT = frozenset(".,;:!?'’‘`…")

_LOOK_AHEAD = 500  # characters; enough for a statement, and few enough to judge any reply quickly
_NEAR = 40  # characters before and after a letter in which it may be denied
_MOST_STATEMENTS = 50  # at most so many statements from the end of a reply are read, and so many ends of one statement
_WORDS = r"(?:(?:[Tt]he|[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\b(?:\s*:)?\s*)*"
_BEFORE_LETTER = rf"\s*{_WORDS}[(\[]?"
_AFTER_LETTER = r"(?![\w’'-])[)\]]?"
_ONLY = re.compile(rf"{_BEFORE_LETTER}([A-Za-z]){_AFTER_LETTER}[.:,;!]?\s*")
_LABELLED = re.compile(rf"{_BEFORE_LETTER}([A-Za-z])(?:[)\]][.:]?|[.:,]|\s+[-–—]|\s+(?=\())\s*(?=\S)")
_STATEMENT = re.compile(
    r"\b(?:answer|option|choice|letter)\b\s*(?:(?:is|was|must be|should be|would be|will be)\b\s*:?|[:=])"
    r"|\b(?:choose|pick|select|go with|going with)\b"
    r"|\b(?:so|therefore|thus|hence|it is|it must be|that leaves|leaving)\b,?|\bit['’]s\b",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|than|except|eliminates?|excludes?|rejects?|rule out|ruling out|wrong"
    r"|incorrect|false|worst)|n['’]t)\s+(?:be\s+|to\s+)?(?:the\s+)?(?:option|choice|answer|letter)?\s*[(\[*]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]*]*\s*[:,–—-]?\s*(?:(?:is|was|seems|looks|can|could|would|does|must be)\s*)?(?:be\s+|also\s+|clearly\s+)*"
    r"(?:n['’]t|not|wrong|incorrect|false|eliminated|ruled out|out)\b",
    re.IGNORECASE,
)
# The sentence must end after the letter, or go on with a reason; in "the answer is A dog" the A is an article.
_STATED = re.compile(
    rf"{_BEFORE_LETTER}([A-Za-z]){_AFTER_LETTER}"
    r"(?=\s*(?:$|[.,:;!)(\[/&—–-]|(?:because|since|as|for|which|or|and|not|but|rather|instead)\b))"
)
_ALTERNATIVE = re.compile(r"\b(?:or|either)\s+(?:(?:the|my|final|correct|right|best|I)\s+)*$", re.IGNORECASE)
_NONE_STATED = re.compile(r"\s*(?:not|neither|none|either|both|n['’]t)\b", re.IGNORECASE)
_REASON = re.compile(r"\b(?:because|since|as|for|which|not|rather|instead)\b", re.IGNORECASE)
_OTHERS = re.compile(
    r"(?:\bor|\band|,|/|&)\s*(?:option\s*)?[(\[]?([A-Za-z])[)\]]?(?=\s*(?:$|[.,;:!?/&]|(?:or|and|is|are|not)\b))"
    r"|(?:\bor|\band|,|/|&)\s*[(\[]?([B-HJ-Z])(?![\w’'-])|\(([A-Z])\)|(?<!\w)([A-Z])(?=[).:](?:\s|$))"
)
_OF_TEXT = re.compile(r"[.;!](?=\s|$)|,?\s+(?=(?:because|since)\b)|,\s+(?=(?:not|as|which|so)\b)|\n")
# What follows a stated choice and shows that it is one of several: "or B", or a further item of a list.
_HEDGED = re.compile(
    r"[\s.,;:!-]*(?:or|and|and/or|maybe|perhaps|alternatively|possibly)\b|[ .,;]*\n?[ (\[]*[A-Z][).:\]]\s",
    re.IGNORECASE,
)
_CORRECT = re.compile(
    r"(?<!\w)([A-Z])[)\]]?\s+(?:is|must be|seems|looks|would be)\s+"
    r"(?:(?:clearly|the|only|most|indeed)\s+)*(?:correct|right|true|best|(?:\w+\s+)?(?:answer|option|choice))\b"
)
_LIST_BEFORE = re.compile(
    r"(?:\b[A-Z][)\]]?\s*(?:\b(?:or|and|nor)|[,/&])|\b(?:[Ii]f|[Ww]hether))\s*(?:[Oo]ption|[Cc]hoice|[Aa]nswer)?\s*$"
)
_LINE_START = re.compile(
    r"^[ \t]*(?:[-•][ \t]*)?(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])[.):](?=\s|$)|([A-Z])[ \t]*$"
    r"|(?:[Oo]ption|[Cc]hoice|[Aa]nswer)[ \t]+[(\[]?([A-Z])[)\]]?(?=[ \t]*(?:$|[.,:;!]|(?:because|since)\b)))",
    re.MULTILINE,
)
# Further letters within one line: "A) cat, B) dog", "(A) or perhaps (B)", "Option A. Option B."
_IN_LINE = re.compile(r"[,;)]\s*\(?([A-Z])[.):]|\(([A-Z])\)|\b[Oo]ption\s+([A-Z])\b")
_BRACKETED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])[.:]?\*\*")


def normalized(text: str) -> str:
    """Returns `text` in lower case, without punctuation, articles (a, an, the) and extra spaces.

    Punctuation is every ASCII sign that is no letter, digit or space, so "-3.5" becomes "35", and "+" becomes "". A
    text that has only articles keeps them.

    >>> normalized("The  Eiffel-Tower!"), normalized("A")
    ('eiffeltower', 'a')
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split()) or " ".join(text.split())


def _answers(check: Mapping[str, Any]) -> list[str]:
    answer = check["answer"]
    answers = [str(a) for a in (answer if isinstance(answer, list) else [answer])]
    if not answers:
        raise ValueError("check['answer'] is an empty list: no reply could be right")
    return answers


def exact_match(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply equals one of the answers in `check["answer"]`, else 0.0.

    Numbers are equal if their values are ("1,000" and "1000.0"; not "-3.5" and "35"); the signs $, € and £ before them,
    and a percent sign and a period after them, do not count. Other texts are equal if they are when normalized
    (`normalized`), and those without words if they are the same; a blank reply earns 0. `check["answer"]` is one answer
    or a list of accepted ones, each a text or a number.

    Raises:
      KeyError: if the check has no "answer".
      ValueError: if the list of answers is empty.
    """
    return float(any(_equal(completion, answer) for answer in _answers(check)))


def f1(completion: str, check: Mapping[str, Any]) -> float:
    """F1 of the normalized reply's words, best over the answers in `check["answer"]`; in [0, 1].

    F1 is the harmonic mean of precision and recall: 2 × common words / (words of the reply + words of the answer). A
    word that is repeated counts as often as it occurs. Of two numbers, or if the reply or an answer has no words, F1 is
    the exact match. `check["answer"]` is one answer or a list of accepted ones, each a text or a number.

    Raises:
      KeyError: if the check has no "answer".
      ValueError: if the list of answers is empty.
    """
    return max(_overlap(completion, a) for a in _answers(check))


def _equal(reply: str, answer: str) -> bool:
    numbers = _number(reply), _number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    words = normalized(reply)
    return words == normalized(answer) if words else reply.strip() == answer.strip() != ""


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number alone, perhaps with a currency or percent sign, which do not count."""
    found = _NUMBER.fullmatch(text.strip())
    return Fraction(found[2].replace(",", "")) * (-1 if found[1] in ("-", "−") else 1) if found else None


def _overlap(reply: str, answer: str) -> float:
    reply_words, answer_words = normalized(reply).split(), normalized(answer).split()
    if not reply_words or not answer_words or (_number(reply) is not None and _number(answer) is not None):
        return float(_equal(reply, answer))
    common = (Counter(reply_words) & Counter(answer_words)).total()
    return 2 * common / (len(reply_words) + len(answer_words))


def choice(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply chooses the right one of `check["choices"]`, else 0.0.

    `chosen` says what a reply chooses; a reply that chooses nothing earns 0.0. `check["choices"]` is a list of texts or
    numbers. `check["answer"]` names the right choice by its capital letter ("B" or "(B)"), its index (0 is A) or its
    exact text. A text of one capital letter is always read as a letter, and an integer always as an index. A reply with
    a text that several choices have is right if one of them is.

    Raises:
      KeyError: if the check has no "answer" or no "choices".
      ValueError: if "choices" is no list, or if "answer" names none of the choices or is a text that several have.
    """
    if not isinstance(check["choices"], list | tuple):
        raise ValueError(f"check['choices'] is of type {type(check['choices']).__name__}; give a list of texts")
    choices = [str(c) for c in check["choices"]]
    return float(_right_index(check["answer"], choices) in _settled(completion, choices))


def chosen(reply: str, choices: Sequence[str]) -> int | None:
    r"""Returns the index of the choice, from 0, that a reply settles on; None if it settles on none or on several.

    The letters of the choices are A, B, C and so on, in order. The first of these that the reply has decides:

    1. The last box, if it holds only a letter, only the text of a choice, or both.
    2. The whole reply, if it is only a letter, only the text of a choice, or both.
    3. The last statement, such as "the answer is B" or "so B", with a letter or the text of a choice. It corrects the
       statements before it. "The answer is A or B" states nothing.
    4. The letter that the reply calls correct ("option B is correct"), if it is the only one.
    5. The letter at the start of lines ("B. because ..."), if it is the only one.
    6. The letter in round brackets or in bold, if it is the only one.

    In 1 to 3, small letters count too; in 4 to 6, only capital ones. Where 4, 5 or 6 finds several letters, the reply
    settles on none, and what comes after in this list is not looked for. A letter that the reply denies ("not B", "(B)
    is wrong") does not count in 4, 5 and 6. The article in "A dog" does not count as a letter. A capital letter that is
    also the text of a choice is read as a letter.

    A text is compared with the choices exactly; if none is equal, without markup; then also without case, articles and
    the punctuation of sentences. Signs, decimal points, operators and brackets always count.

    >>> chosen("I would say (B).", ["cat", "dog"]), chosen("A. cat\nB. dog", ["cat", "dog"]), chosen("-4", ["4", "-4"])
    (1, None, 1)
    """
    found = _settled(reply, choices)
    return next(iter(found)) if len(found) == 1 else None


def _settled(reply: str, choices: Sequence[str]) -> frozenset[int]:
    """Returns the index of the choice that a reply settles on; several only if their texts are equal."""
    forms = [_forms(choice) for choice in choices]
    for text in (last_boxed(reply), reply):
        if text is not None and (found := _only(text, forms)):
            return found
    text = _without_markup(reply)
    if (stated := _statement(text, forms)) is not None:
        return stated
    if any(_LIST_BEFORE.search(text, max(0, m.start() - _NEAR), m.start()) for m in _CORRECT.finditer(text)):
        return frozenset()  # "A or B is correct" settles on nothing
    if not (letters := _letters(_CORRECT, text)) and (letters := _letters(_LINE_START, text)):
        for match in _LINE_START.finditer(text):
            end = text.find("\n", match.end())
            letters |= _letters(_IN_LINE, text[match.start() : end if end >= 0 else len(text)])
    letters = letters or _letters(_BRACKETED, reply)
    return _indices(letters, forms)


def _letters(pattern: re.Pattern[str], text: str) -> set[str]:
    """Returns the letters that a pattern finds in a text, without those that the text denies."""
    found: set[str] = set()
    for match in pattern.finditer(text):
        before = text[max(0, match.start() - _NEAR) : match.start()]
        denied = _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text[match.end() : match.end() + _NEAR])
        if not denied:
            found |= {letter for letter in match.groups() if letter}
    return found


_Forms = tuple[str, str, str]


def _forms(text: str) -> _Forms:
    """Returns a text in the three forms in which texts are compared, from the most to the least exact."""
    marked = _without_markup(text).translate(_MINUS).strip().rstrip(".!").strip()
    marked = re.sub(r"^['‘](.*)['’]$", r"\1", marked, flags=re.DOTALL)
    words = _ARTICLE.sub("", _COMPOUND.sub("", marked)).casefold()
    tokens = [t.replace(",", "") if _THOUSANDS.fullmatch(t) else t for t in _TOKEN.findall(words) if t not in _SOFT]
    return " ".join(text.split()), " ".join(marked.split()), " ".join(tokens)


def _without_markup(text: str) -> str:
    return _MARKUP.sub("", _LATEX.sub("", text))


def _same(text: str, forms: Sequence[_Forms]) -> frozenset[int]:
    """Returns the choices whose text this is; several only if their texts are equal, none if it is ambiguous."""
    for form, level in zip(_forms(text), range(3), strict=True):
        found = [i for i, choice in enumerate(forms) if form and choice[level] == form]
        if found:
            return frozenset(found) if len({forms[i][0] for i in found}) == 1 else frozenset()
    return frozenset()


def _only(text: str, forms: Sequence[_Forms]) -> frozenset[int]:
    """Returns the choice if a text is only its letter, only its text, or both; else nothing."""
    if len(text) > _reach(forms):
        return frozenset()
    plain = _without_markup(text).strip()
    letter = _ONLY.fullmatch(plain)
    if letter and letter[1].isupper() and (found := _indices({letter[1]}, forms)):
        return found
    if found := _same(text, forms):
        return found
    if letter:
        return _indices({letter[1]}, forms)
    return _labelled(plain, forms)


def _labelled(text: str, forms: Sequence[_Forms]) -> frozenset[int]:
    """Returns the choice if a text is its letter and then its text, as in "B. blue cat"; else nothing."""
    if not (match := _LABELLED.match(text)):
        return frozenset()
    inner = text[match.end() :].strip()
    inner = inner[1:-1] if inner.startswith("(") and inner.rstrip(".").endswith(")") else inner
    return _indices({match[1]}, forms) & (_same(text[match.end() :], forms) or _same(inner, forms))


def _statement(text: str, forms: Sequence[_Forms]) -> frozenset[int] | None:
    """Returns what the last statement of a reply settles on, () if on nothing; None if the reply states nothing."""
    reach = _reach(forms)
    for match in list(_STATEMENT.finditer(text))[: -_MOST_STATEMENTS - 1 : -1]:
        if _DENIED_BEFORE.search(text, max(0, match.start() - _NEAR), match.start()):
            continue
        rest = text[match.end() : match.end() + reach].lstrip()
        if _ALTERNATIVE.search(text, max(0, match.start() - _NEAR), match.start()):
            return frozenset()
        if (found := _stated_text(rest, forms)) is not None:
            return found
        line = rest.partition("\n")[0]
        if stated := _STATED.match(line):
            if _DENIED_AFTER.match(line, stated.end(1)):
                continue
            end = _REASON.search(line, stated.end())
            clause = line[stated.end(1) : end.start() if end else len(line)]
            others = {g.upper() for m in _OTHERS.finditer(clause) for g in m.groups() if g}
            return _indices({stated[1].upper()} | others, forms)
        if _NONE_STATED.match(line):
            return frozenset()
    return None


def _stated_text(rest: str, forms: Sequence[_Forms]) -> frozenset[int] | None:
    """Returns the choice whose letter, text or both a statement begins with; the longest such beginning counts.

    None if it begins with none; () if another choice follows, as in "blue cat. Or red fox".
    """
    ends = [m.start() for m in _OF_TEXT.finditer(rest)][:_MOST_STATEMENTS]
    for end in [len(rest), *reversed(ends)]:
        if found := _only(rest[:end], forms):
            return frozenset() if _HEDGED.match(rest, end) else found
    return None


def _reach(forms: Sequence[_Forms]) -> int:
    return max(_LOOK_AHEAD, 2 * max((len(choice[0]) for choice in forms), default=0))


def _indices(letters: set[str], forms: Sequence[_Forms]) -> frozenset[int]:
    """Returns the index of the only letter; nothing if there are several, or if no choice has it."""
    index = _index(next(iter(letters)), forms) if len(letters) == 1 else None
    return frozenset() if index is None else frozenset({index})


def _index(letter: str, choices: Sequence[Any]) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if 0 <= index < len(choices) else None


def _right_index(answer: Any, choices: Sequence[str]) -> int:
    index = None
    if isinstance(answer, str) and re.fullmatch(r"\(?[A-Z]\)?", answer.strip()):
        index = _index(answer.strip("() "), choices)
    elif isinstance(answer, str):
        index = choices.index(answer) if list(choices).count(answer) == 1 else None
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        index = answer
    if index is None:
        raise ValueError(f"check['answer'] is {answer!r}, which is no letter, index or text of {len(choices)} choices")
    return index
