"""Rewards for writing under verifiable constraints, in the manner of IFEval (arXiv 2311.07911), and of a wanted length.

A constraint is `{"kind": name, **parameters}`: one of the kinds below, or one of IFEval's 25 under its published id
(rewards/ifeval.py). `constraints` is the reward; IFEval's four accuracies are means over prompts of `all_strict` and
`all_loose` (prompt level), and of `constraints` and `constraints_loose` weighted by their constraints (instruction
level). Loosely, a constraint holds if it holds for the text without its asterisks, its first or its last line.

A word is a run of letters and digits, with apostrophes and hyphens inside it; case never counts.
An empty text satisfies no constraint, not even those that forbid something: silence earns nothing.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdrl_jax.rewards import ifeval

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


def repetition(text: str, *, n: int, most: float) -> bool:
    """At most the share `most` of the runs of `n` words have been there before; a text shorter than `n` words fails."""
    found = words(text)
    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return runs != [] and 1 - len(set(runs)) / len(runs) <= most


def length(text: str, *, length: int) -> float:
    """How close the text comes to `length` words, from 0 to 1: the length score of LongBench-Write (arXiv 2408.07055).

    1 at the wanted length, falling linearly in the ratio to 0 at four times it, and at a third of it. As published, a
    word is a run of unaccented Latin letters, and a Chinese character is one too.
    """
    if length < 1:
        raise ValueError(f"length is {length}, and must be at least 1 word")
    count = len(re.findall(r"[\u4e00-\u9fff]|\b[a-zA-Z]+\b", text))
    if count == 0:
        return 0.0
    return max(0.0, 1 - (count / length - 1) / 3 if count > length else 1 - (length / count - 1) / 2)


KINDS: dict[str, Callable[..., float]] = {
    "include": include,
    "word_count": word_count,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "plain": plain,
    "no_repeats": no_repeats,
    "order": order,
    "repetition": repetition,
    "length": length,
    **ifeval.KINDS,
}


def constraints(completion: str, check: Mapping[str, Any]) -> float:
    """The share of the constraints that the reply satisfies (`length` counts by its score).

    They are `check["constraints"]`, or, in a row of IFEval's file, `instruction_id_list` beside `kwargs`, where null
    means absent. Raises ValueError on an unknown kind, on parameters that the kind does not take, and if there are no
    constraints.
    """
    return _mean([satisfied(completion, constraint) for constraint in listed(check)])


def constraints_loose(completion: str, check: Mapping[str, Any]) -> float:
    """The share of the constraints that the reply satisfies loosely."""
    return _mean(_loosely(completion, check))


def all_strict(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply satisfies every constraint."""
    return float(constraints(completion, check) == 1.0)


def all_loose(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply satisfies every constraint loosely."""
    return float(constraints_loose(completion, check) == 1.0)


def wanted_length(completion: str, check: Mapping[str, Any]) -> float:
    """The length score for `check["length"]` words: a row of LongBench-Write, or any prompt with a length."""
    return length(completion, length=check["length"])


def listed(check: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The constraints of a check, in either layout; errors as in `constraints`."""
    if "constraints" in check:
        found: list[Mapping[str, Any]] = list(check["constraints"])
    else:
        ids, parameters = check["instruction_id_list"], check["kwargs"]
        if len(ids) != len(parameters):
            raise ValueError(f"check has {len(ids)} instruction ids and {len(parameters)} kwargs; give one for each")
        given = [{k: v for k, v in (p or {}).items() if v is not None} for p in parameters]
        found = [{"kind": kind, **p} for kind, p in zip(ids, given, strict=True)]
    if not found:
        raise ValueError("check['constraints'] is empty")
    return found


def satisfied(text: str, constraint: Mapping[str, Any]) -> float:
    """How far `text` satisfies one constraint, 0 or 1 for most kinds; errors as in `constraints`."""
    parameters = dict(constraint)
    kind = parameters.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"unknown constraint kind {kind!r}; known kinds: {', '.join(KINDS)}")
    try:
        inspect.signature(KINDS[kind]).bind(text, **parameters)
    except TypeError as e:
        raise ValueError(f"constraint {dict(constraint)!r} does not fit its kind: {e}") from e
    return float(KINDS[kind](text, **parameters)) if text.strip() else 0.0


def _loosely(text: str, check: Mapping[str, Any]) -> list[float]:
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [*cut, *(part.replace("*", "") for part in cut)]
    return [max(satisfied(variant, constraint) for variant in variants) for constraint in listed(check)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
