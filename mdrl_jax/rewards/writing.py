"""Reward for writing under verifiable constraints, in the manner of IFEval (arXiv 2311.07911).

A word is a run of letters and digits, with apostrophes and hyphens inside it; case never counts.
An empty text satisfies no constraint, not even those that forbid something: silence earns nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of `text`, in order, in lower case."""
    return _WORD.findall(text.lower())


def include(text: str, *, word: str) -> bool:
    """`word` is one of the words."""
    return word.lower() in words(text)


def word_count(text: str, *, count: int) -> bool:
    """There are exactly `count` words."""
    return len(words(text)) == count


def starts_with(text: str, *, word: str) -> bool:
    """The first word is `word`."""
    return words(text)[:1] == [word.lower()]


def ends_with(text: str, *, word: str) -> bool:
    """The last word is `word`."""
    return words(text)[-1:] == [word.lower()]


def plain(text: str) -> bool:
    """Only letters and spaces: no digits, no symbols."""
    return text.strip() != "" and all(c.isalpha() or c.isspace() for c in text)


def no_repeats(text: str) -> bool:
    """No word is used twice."""
    found = words(text)
    return found != [] and len(set(found)) == len(found)


def order(text: str, *, words: Sequence[str]) -> bool:
    """All of `words` are there, one after the other, whatever stands between them."""
    rest = iter(_WORD.findall(text.lower()))
    return all(word.lower() in rest for word in words)


KINDS: dict[str, Callable[..., bool]] = {
    "include": include,
    "word_count": word_count,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "plain": plain,
    "no_repeats": no_repeats,
    "order": order,
}


def constraints(completion: str, check: Mapping[str, Any]) -> float:
    """The fraction of `check["constraints"]` that the reply satisfies.

    Each is `{"kind": name in KINDS, **parameters}`. Raises ValueError on an unknown kind, on
    parameters that the kind does not take, and if there are no constraints.
    """
    wanted = check["constraints"]
    if not wanted:
        raise ValueError("check['constraints'] is empty")
    return sum(satisfied(completion, constraint) for constraint in wanted) / len(wanted)


def satisfied(text: str, constraint: Mapping[str, Any]) -> bool:
    """Whether `text` satisfies one constraint; errors as in `constraints`."""
    parameters = dict(constraint)
    kind = parameters.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"unknown constraint kind {kind!r}; known kinds: {', '.join(KINDS)}")
    try:
        return KINDS[kind](text, **parameters)
    except TypeError as e:
        raise ValueError(f"constraint {dict(constraint)!r} does not fit its kind: {e}") from e
