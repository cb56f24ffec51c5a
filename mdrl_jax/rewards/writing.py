"""Rewards for writing: verifiable constraints as in IFEval (arXiv 2311.07911), and a wanted length.

A constraint is `{"kind": name, **parameters}`. The kind is one of those below, or one of IFEval's 25 under its
published id (`ifeval.py`). The reward is `constraints`, the share of the constraints that the reply satisfies.

IFEval's four accuracies follow from the functions here. The prompt-level accuracies are the means of `all_strict` and
`all_loose` over prompts. The instruction-level accuracies are the means of `constraints` and `constraints_loose` over
prompts, weighted by the number of constraints. The loose functions count a constraint as satisfied if it holds for the
text or for one of its variants: without the first line, without the last line, without both, and each of these four
without asterisks.

A word is a run of letters and digits, with apostrophes and hyphens inside it. The kinds below ignore case. In
`satisfied` and the rewards, a blank text satisfies no constraint, not even one that only forbids something; otherwise
silence would earn a reward.

A parameter that is a word must be a single word by this definition; another text, such as "New York", is never found.
A judge does not check the values of parameters. A wrong one raises TypeError or AttributeError, or the constraint just
fails. `fault` names it beforehand: rows of data sets and lines of `score` are checked so.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdrl_jax.rewards import ifeval

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """Returns the words of `text` in order, in lower case, a repeated one each time; [] if it has none."""
    return _WORD.findall(text.lower())


def include(text: str, *, word: str) -> bool:
    """Whether `word` is one of the words."""
    return word.lower() in words(text)


def word_count(text: str, *, count: int) -> bool:
    """Whether there are exactly `count` words; a text without words has 0."""
    return len(words(text)) == count


def starts_with(text: str, *, word: str) -> bool:
    """Whether the first word is `word`; False if there are no words."""
    return words(text)[:1] == [word.lower()]


def ends_with(text: str, *, word: str) -> bool:
    """Whether the last word is `word`, ignoring case; False if there are no words."""
    return words(text)[-1:] == [word.lower()]


def plain(text: str) -> bool:
    """Whether the text has only letters and white space: no digits and no symbols. A blank text fails."""
    return text.strip() != "" and all(c.isalpha() or c.isspace() for c in text)


def no_repeats(text: str) -> bool:
    """Whether no word is used twice. A text without words fails."""
    found = words(text)
    return found != [] and len(set(found)) == len(found)


def order(text: str, *, words: Sequence[str]) -> bool:
    """Whether all of `words` occur in this order, a repeated one each time; other words may stand between them.

    True for no `words`.
    """
    rest = iter(_WORD.findall(text.lower()))
    return all(word.lower() in rest for word in words)


def repetition(text: str, *, n: int, most: float) -> bool:
    """Whether at most the share `most` of the runs of `n` words are repeats: 1 − distinct runs / runs ≤ most.

    Args:
      text: the reply. A text of fewer than `n` words fails.
      n: words in a run, at least 1. Runs overlap: one begins at each word that has n − 1 words after it.
      most: the largest share of repeats that still passes, in [0, 1]. 0 allows none.

    Raises:
      ValueError: if `n` or `most` is out of its range.
    """
    if n < 1 or not 0 <= most <= 1:
        raise ValueError(f"n is {n} and most is {most}; n must be at least 1, and most from 0 to 1")
    found = words(text)
    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return runs != [] and 1 - len(set(runs)) / len(runs) <= most


def length(text: str, *, length: int) -> float:
    """How close the text comes to `length` words: the length score of LongBench-Write (arXiv 2408.07055), in [0, 1].

    With n words in the text, the score is

        max(0, 1 − (n / length − 1) / 3)  if n > length,
        max(0, 1 − (length / n − 1) / 2)  otherwise.

    It is 1 at the wanted length. It is 0 from four times the wanted length up, and from a third of it down. As
    published, a word is a single Chinese character, or a run of unaccented Latin letters beside which no other letter,
    digit or `_` stands: "don't" has two words, and "café" and "x1" have none.

    Args:
      text: the reply; one without words scores 0.
      length: the wanted number of words.

    Raises:
      ValueError: if `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1 word")
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
    """The share of the constraints that the reply satisfies. The kind `length` contributes its score, from 0 to 1.

    The constraints are `check["constraints"]`, a list. In a row of IFEval's file they are instead
    `check["instruction_id_list"]` with the parameters in `check["kwargs"]`, where null or NaN means that a parameter is
    absent; these keys count only if the check has no "constraints".

    Raises:
      KeyError: if the check has neither "constraints" nor both keys of IFEval.
      ValueError: if there are no constraints, a kind is unknown, the names of the parameters do not fit their kind, or
        a value is one that the kind refuses (not for a blank reply, see `satisfied`).
      TypeError, AttributeError: if the constraints or the value of a parameter have a wrong type. Not every wrong type
        of a value is noticed.
    """
    return _mean([satisfied(completion, constraint) for constraint in listed(check)])


def constraints_loose(completion: str, check: Mapping[str, Any]) -> float:
    """The share of the constraints that the reply satisfies loosely (see the module), in [0, 1].

    The kind `length` contributes the best score among the variants. The layouts of the check are those of
    `constraints`.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: as `constraints`, if the check has no constraints or one is not
        valid.
    """
    return _mean(_loosely(completion, check))


def all_strict(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply satisfies every constraint, else 0.0. The kind `length` counts only with the score 1.

    The layouts of the check are those of `constraints`.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: as `constraints`, if the check has no constraints or one is not
        valid.
    """
    return float(constraints(completion, check) == 1.0)


def all_loose(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the reply satisfies every constraint loosely (see the module), else 0.0. `length` needs the score 1.

    The layouts of the check are those of `constraints`.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: as `constraints`, if the check has no constraints or one is not
        valid.
    """
    return float(constraints_loose(completion, check) == 1.0)


def wanted_length(completion: str, check: Mapping[str, Any]) -> float:
    """The score of `length` for `check["length"]` words, as in a row of LongBench-Write; in [0, 1].

    Raises:
      KeyError: if the check has no "length".
      ValueError: if it is below 1.
      TypeError: if it is no number.
    """
    return length(completion, length=check["length"])


def listed(check: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the constraints of a check, in their order, each as `{"kind": name, **parameters}`.

    The constraints are not checked here; `satisfied` does that.

    Args:
      check: "constraints", or IFEval's "instruction_id_list" and "kwargs", without their padding (`unpadded`). A check
        that has "constraints" may have the others, which then do not count.

    Raises:
      KeyError: if the check has neither "constraints" nor both keys of IFEval.
      ValueError: if the list is empty, or IFEval's two lists differ in length.
      TypeError, AttributeError: if "constraints" or a list of IFEval is no list, or an item of "kwargs" is neither null
        nor a mapping.
    """
    if "constraints" in check:
        found: list[Mapping[str, Any]] = list(check["constraints"])
    else:
        ids, parameters = check["instruction_id_list"], check["kwargs"]
        if len(ids) != len(parameters):
            raise ValueError(f"check has {len(ids)} instruction ids and {len(parameters)} kwargs; give one for each")
        found = [{"kind": kind, **unpadded(p)} for kind, p in zip(ids, parameters, strict=True)]
    if not found:
        raise ValueError("the check's list of constraints is empty; give at least one")
    return found


def unpadded(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of an instruction of IFEval without those that its file only pads with: null, or pandas' NaN."""
    return {k: v for k, v in (parameters or {}).items() if v is not None and v == v}


def fault(constraint: Mapping[str, Any]) -> str:
    """Says why a constraint cannot be judged, or makes no sense; "" if it can and does.

    The kind must be known and the parameters be those of the kind, in the right form: a text is not blank, a list of
    texts not empty, a whole number (also if written 5.0) not negative, any other number finite. Other values that the
    kind refuses, such as an unknown relation, are named too. Not noticed are a language that langdetect does not know
    and several words where a single one is meant.

    Args:
      constraint: `{"kind": name, **parameters}`.
    """
    parameters = dict(constraint)
    kind = parameters.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        return f"the constraint {json.dumps(kind)} is not known; known: {', '.join(KINDS)}"
    signature = inspect.signature(KINDS[kind])
    wanted = {name: p.annotation for name, p in list(signature.parameters.items())[1:]}
    if wanted.keys() != parameters.keys():
        takes, given = (", ".join(names) or "no parameters" for names in (wanted, parameters))
        return f"the constraint {json.dumps(kind)} takes {takes}; given: {given}"
    for name, value in parameters.items():
        fits, form = _FORMS[wanted[name]]
        if not fits(value):
            return f"the constraint {json.dumps(kind)} takes as {name} {form}; given: {repr(value)[:40]}"
    if kind != "language:response_language":  # it would load langdetect, and refuses no value
        try:
            KINDS[kind]("", **parameters)
        except ValueError as e:
            return f"the constraint {json.dumps(kind)} is not valid: {e}"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


# annotation of a parameter -> (the test of its value, the form in words)
_FORMS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_is_text, "a text that is not blank"),
    int: (lambda v: _is_number(v) and v >= 0 and v == int(v), "a whole number of at least 0"),
    float: (_is_number, "a finite number"),
    Sequence[str]: (
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(_is_text, v)),
        "a list of at least one text, none of them blank",
    ),
}


def satisfied(text: str, constraint: Mapping[str, Any]) -> float:
    """How far a text satisfies one constraint: 0 or 1, for `length` in [0, 1]; 0 for a blank text.

    For a blank text, only the kind and the names of the parameters are checked, and not their values.

    Args:
      text: the reply.
      constraint: `{"kind": name, **parameters}`.

    Raises:
      ValueError: if the kind is unknown, the names of the parameters do not fit it, or a value is one that it refuses.
      ValueError, TypeError: if the constraint is no mapping.
      TypeError, AttributeError: if the kind or the value of a parameter has a wrong type. Not every wrong type of a
        value is noticed: a number given as a text may just fail the constraint.
    """
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
