"""Rewards for short answers: exact match and F1 as in SQuAD (arXiv 1606.05250), and multiple choice.

Exact match and F1 take the best value over the accepted answers.

Deviation from SQuAD: articles are kept if the text has no other words. Otherwise the multiple-choice answer "A" would
become the empty text and equal an empty reply.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.rewards.math import last_boxed

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_MARKUP = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\b|[*_`$\"“”{}]")
_LOOK_AHEAD = 500  # characters; enough for the text of a choice, and few enough to judge any reply quickly
_STATEMENT = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)\s*:?|\b(?:choose|pick|select)\b", re.IGNORECASE)
_BEFORE_LETTER = r"\s*(?:(?:[Tt]he|[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\b\s*:?\s*)*\(?"
_AFTER_LETTER = r"(?![\w’'-])\)?"
_ONLY = re.compile(rf"{_BEFORE_LETTER}([A-Za-z]){_AFTER_LETTER}[.:,;!]?\s*")
# The sentence must end after the letter, or go on with a reason; in "the answer is A dog" the A is an article.
_STATED = re.compile(
    rf"{_BEFORE_LETTER}([A-Z]){_AFTER_LETTER}(?=\s*(?:$|[.,:;!)(—–-]|(?:because|since|as|for|which)\b))"
)
_OTHERS = re.compile(r"(?:(?:\bor|\band|,|/|&)\s*\(?|\()([A-Z])(?![\w’'-])|(?<!\w)([A-Z])(?=[).:](?:\s|$))")
_LINE_START = re.compile(r"^[ \t]*(?:[-•][ \t]*)?(?:\(([A-Z])\)|([A-Z])[.):](?=\s|$)|([A-Z])[ \t]*$)", re.MULTILINE)
_IN_LINE = re.compile(r"[,;)]\s*\(?([A-Z])[.):]")  # further letters of a list within one line: "A) cat, B) dog"
_BRACKETED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])[.:]?\*\*")


def normalized(text: str) -> str:
    """Returns `text` in lower case, without punctuation, articles and extra spaces.

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
    """1.0 if the normalized reply equals one of the normalized answers in `check["answer"]`, else 0.0.

    `check["answer"]` is one answer or a list of accepted ones, each a text or a number.

    Raises:
      KeyError: if the check has no "answer".
      ValueError: if the list of answers is empty.
    """
    reply = normalized(completion)
    return float(any(reply == normalized(answer) for answer in _answers(check)))


def f1(completion: str, check: Mapping[str, Any]) -> float:
    """F1 of the normalized reply's words, best over the answers in `check["answer"]`; in [0, 1].

    F1 is the harmonic mean of precision and recall: 2 × common words / (words of the reply + words of the answer). A
    word that is repeated counts as often as it occurs. `check["answer"]` is one answer or a list of accepted ones, each
    a text or a number.

    Raises:
      KeyError: if the check has no "answer".
      ValueError: if the list of answers is empty.
    """
    return max(_overlap(normalized(completion), normalized(a)) for a in _answers(check))


def _overlap(reply: str, answer: str) -> float:
    reply_words, answer_words = reply.split(), answer.split()
    if not reply_words or not answer_words:
        return float(reply_words == answer_words)
    common = (Counter(reply_words) & Counter(answer_words)).total()
    return 2 * common / (len(reply_words) + len(answer_words))


def choice(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply chooses the right one of `check["choices"]`, else 0.0.

    `check["answer"]` names the right choice by its letter ("B"), its index (0 is A) or its text. A text of one capital
    letter is read as a letter.

    Raises:
      KeyError: if the check has no "answer" or no "choices".
      ValueError: if `check["answer"]` names none of the choices, or is a text that several have.
    """
    choices = [str(c) for c in check["choices"]]
    return float(chosen(completion, choices) == _right_index(check["answer"], choices))


def chosen(reply: str, choices: Sequence[str]) -> int | None:
    r"""Returns the index of the choice that a reply settles on; None if it settles on none or on several.

    The first of these that the reply has decides:

    1. The last box, if it holds only a letter or only the text of a choice.
    2. The whole reply, if it is only a letter or only the text of a choice.
    3. The last statement, such as "the answer is B", with a letter or the text of a choice. It corrects the statements
       before it.
    4. The letter at the start of lines ("B. because ..."), if it is the only one.
    5. The letter in brackets or in bold, if it is the only one.

    The article in "A dog" does not count as a letter. A list of letters such as "A or B" chooses nothing.

    >>> chosen("I would say (B).", ["cat", "dog"]), chosen("A. cat\nB. dog", ["cat", "dog"])
    (1, None)
    """
    for text in (last_boxed(reply), reply):
        if text is not None and (found := _only(text, choices)) is not None:
            return found
    text = _MARKUP.sub("", reply)
    letters: set[str] = set()
    for match in _STATEMENT.finditer(text):
        rest = text[match.end() : match.end() + _LOOK_AHEAD].lstrip().partition("\n")[0]
        if stated := _STATED.match(rest):
            letters = {stated[1]} | _letters(_OTHERS, rest)
        elif (index := _only(re.split(r"[.;]\s", rest)[0], choices)) is not None:
            letters = {chr(ord("A") + index)}
    if not letters and (letters := _letters(_LINE_START, text)):
        letters |= _letters(_IN_LINE, text)
    letters = letters or _letters(_BRACKETED, reply)
    return _index(letters.pop(), choices) if len(letters) == 1 else None


def _letters(pattern: re.Pattern[str], text: str) -> set[str]:
    return {letter for match in pattern.finditer(text) for letter in match.groups() if letter}


def _only(text: str, choices: Sequence[str]) -> int | None:
    """Returns the index of the choice if `text` is only its letter or only its text; else None."""
    text = _MARKUP.sub("", text)
    match = _ONLY.fullmatch(text.strip()) if len(text) <= _LOOK_AHEAD else None
    if match and (index := _index(match[1], choices)) is not None:
        return index
    words = normalized(text)
    same = [i for i, choice in enumerate(choices) if normalized(choice) == words != ""]
    return same[0] if len(same) == 1 else None


def _index(letter: str, choices: Sequence[str]) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if 0 <= index < len(choices) else None


def _right_index(answer: Any, choices: Sequence[str]) -> int:
    if isinstance(answer, str) and re.fullmatch(r"\(?[A-Z]\)?", answer.strip()):
        index = _index(answer.strip("() "), choices)
    elif isinstance(answer, str):
        index = choices.index(answer) if list(choices).count(answer) == 1 else None
    else:
        index = answer if isinstance(answer, int) and 0 <= answer < len(choices) else None
    if index is None:
        raise ValueError(f"check['answer'] is {answer!r}, which is no letter, index or text of {len(choices)} choices")
    return index
