"""Rewards for short answers: exact match and F1 of SQuAD (arXiv 1606.05250), best over the answers; letter choice.

Deviation from SQuAD: articles stay where nothing else is left. The multiple-choice answer "A"
would otherwise be the empty text, and equal to an empty reply.
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
_LOOK_AHEAD = 500  # characters: long enough for a choice's text, short enough that no reply is slow to judge
_STATEMENT = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)\s*:?|\b(?:choose|pick|select)\b", re.IGNORECASE)
_BEFORE_LETTER = r"\s*(?:(?:[Tt]he|[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\b\s*:?\s*)*\(?"
_AFTER_LETTER = r"(?![\w’'-])\)?"
_ONLY = re.compile(rf"{_BEFORE_LETTER}([A-Za-z]){_AFTER_LETTER}[.:,;!]?\s*")
# Nothing more of the same sentence may follow, unless it gives a reason: "the answer is A dog" has an article.
_STATED = re.compile(
    rf"{_BEFORE_LETTER}([A-Z]){_AFTER_LETTER}(?=\s*(?:$|[.,:;!)(—–-]|(?:because|since|as|for|which)\b))"
)
_OTHERS = re.compile(r"(?:(?:\bor|\band|,|/|&)\s*\(?|\()([A-Z])(?![\w’'-])|(?<!\w)([A-Z])(?=[).:](?:\s|$))")
_LINE_START = re.compile(r"^[ \t]*(?:[-•][ \t]*)?(?:\(([A-Z])\)|([A-Z])[.):](?=\s|$)|([A-Z])[ \t]*$)", re.MULTILINE)
_IN_LINE = re.compile(r"[,;)]\s*\(?([A-Z])[.):]")  # the rest of a list in one line: "A) cat, B) dog"
_BRACKETED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])[.:]?\*\*")


def normalized(text: str) -> str:
    """`text` in lower case, without punctuation, articles and extra spaces.

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
    """1.0 if the normalised reply is one of the normalised answers in `check["answer"]`."""
    reply = normalized(completion)
    return float(any(reply == normalized(answer) for answer in _answers(check)))


def f1(completion: str, check: Mapping[str, Any]) -> float:
    """Harmonic mean of precision and recall of the reply's words, best over `check["answer"]`."""
    return max(_overlap(normalized(completion), normalized(a)) for a in _answers(check))


def _overlap(reply: str, answer: str) -> float:
    reply_words, answer_words = reply.split(), answer.split()
    if not reply_words or not answer_words:
        return float(reply_words == answer_words)
    common = (Counter(reply_words) & Counter(answer_words)).total()
    return 2 * common / (len(reply_words) + len(answer_words))


def choice(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply chooses the right one of `check["choices"]`.

    `check["answer"]` is its letter ("B"), its index (0 is A) or its own text. Raises ValueError if it is none of them.
    """
    choices = [str(c) for c in check["choices"]]
    return float(chosen(completion, choices) == _right_index(check["answer"], choices))


def chosen(reply: str, choices: Sequence[str]) -> int | None:
    r"""The index of the choice a reply settles on; None if it settles on none, or names several.

    In this order: a reply that is only a letter or only a choice's text, the last box, the last statement ("the answer
    is B"; or a choice's text in place of the letter), the one letter that lines begin with ("B. because ..."), the one
    letter in brackets or bold. A statement is believed over those before it, as a correction. The article in "A dog" is
    no letter, and neither is a letter in a list of them: "A or B" chooses nothing.

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
    """The choice that `text` is, by letter or by words, and nothing else."""
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
