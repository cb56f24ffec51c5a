"""Rewards for short answers: exact match and F1 of SQuAD (arXiv 1606.05250), best over the answers.

Deviation from SQuAD: articles stay where nothing else is left. The multiple-choice answer "A"
would otherwise be the empty text, and equal to an empty reply.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


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
