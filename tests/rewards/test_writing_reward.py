"""Each constraint on a text that satisfies it and on one that just does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.rewards import ifeval, writing
from mdrl_jax.rewards.writing import KINDS, constraints, wanted_length

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("include", {"word": "Cat"}, "a cat, here", "a category here"),
    ("word_count", {"count": 3}, "don't stop, now", "do not stop now"),
    ("starts_with", {"word": "red"}, "Red cats", "reddish cats"),
    ("ends_with", {"word": "end"}, "the END.", "the end came"),
    ("plain", {}, "only letters and\nspaces", "only letters, and spaces"),
    ("plain", {}, "été", "route 66"),
    ("no_repeats", {}, "red cat sat", "Red cat red"),
    ("order", {"words": ["a", "b", "b"]}, "x a y b z B", "b a b"),
    ("repetition", {"n": 2, "most": 0.25}, "a b c a b", "a b a b a"),  # 1 of 4 pairs again, 2 of 4
    ("repetition", {"n": 3, "most": 1.0}, "a a a a", "a a"),
    ("length", {"length": 4}, "one two, three four", "one"),
]


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES)
def test_kind(kind: str, parameters: dict[str, Any], good: str, bad: str) -> None:
    check = {"constraints": [{"kind": kind, **parameters}]}
    assert constraints(good, check) == 1.0
    assert constraints(bad, check) == 0.0
    assert constraints("", check) == 0.0


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, *_ in CASES} == set(KINDS) - set(ifeval.KINDS)  # those have a file of their own


def test_reward_is_the_mean() -> None:
    wanted = [{"kind": "include", "word": w} for w in "abcd"]
    for n in range(5):
        assert constraints(" ".join("abcd"[:n]) or "x", {"constraints": wanted}) == n / 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([{"kind": "rhyme"}], "'rhyme'.*include, word_count"),
        ([{"word": "x"}], "None"),
        ([{"kind": "include"}], "'word'"),
        ([{"kind": "plain", "word": "x"}], "'word'"),
        ([], "empty"),
    ],
)
def test_what_cannot_be_judged_is_an_error(wanted: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraints("text", {"constraints": wanted})


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"kind": "word_count", "count": 5.0}, ""),
        ({"kind": "repetition", "n": 2, "most": 0}, ""),
        ({"kind": "keywords:frequency", "keyword": "a", "frequency": 2, "relation": "at least"}, ""),
        ({"kind": "rhyme"}, '"rhyme" is not known; known: include'),
        ({"word": "x"}, "null is not known"),
        ({"kind": ["plain"]}, "is not known"),
        ({"kind": "word_count"}, "takes count; given: no parameters"),
        ({"kind": "plain", "word": "x"}, "takes no parameters; given: word"),
        *(
            ({"kind": "word_count", "count": value}, "count a whole number of at least 0; given: ")
            for value in (float("nan"), float("inf"), None, "5", True, 2.5, -1, [5])
        ),
        ({"kind": "repetition", "n": 2, "most": float("nan")}, "most a finite number"),
        ({"kind": "include", "word": " "}, "word a text that is not blank"),
        ({"kind": "order", "words": "abc"}, "words a list of at least one text, none of them blank; given: 'abc'"),
        ({"kind": "order", "words": []}, "words a list of at least one text"),
        ({"kind": "keywords:existence", "keywords": ["a", 1]}, "keywords a list of at least one text"),
        ({"kind": "order", "words": ("a", "b")}, ""),
        ({"kind": "word_count", "count": 10**400}, ""),
        ({"kind": "repetition", "n": 0, "most": 0.5}, "n must be at least 1"),
        ({"kind": "repetition", "n": 2, "most": 5.0}, "most from 0 to 1"),
        ({"kind": "length", "length": 0}, "length is 0; it must be at least 1 word"),
        ({"kind": "keywords:frequency", "keyword": "a", "frequency": 2, "relation": "more"}, "relation 'more'"),
        ({"kind": "keywords:letter_frequency", "letter": "ab", "let_frequency": 1, "let_relation": "at least"},
         "letter 'ab' is not valid"),
    ],
)  # fmt: skip
def test_a_constraint_that_cannot_be_judged_is_named_beforehand(constraint: dict[str, Any], message: str) -> None:
    found = writing.fault(constraint)
    assert message in found and (found == "") == (message == "")


def test_every_constraint_of_the_real_file_can_be_judged(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data" / "writing" / "ifeval.jsonl").read_text().splitlines()]
    assert sum(writing.fault(constraint) == "" for row in rows for constraint in writing.listed(row)) == 834
    row = max(rows, key=lambda row: len(row["kwargs"]))
    padded = [{"num_words": float("nan"), "relation": None} | (given or {}) for given in row["kwargs"]]
    assert writing.listed(row | {"kwargs": padded}) == writing.listed(row)


@pytest.mark.parametrize(
    ("words", "score"),
    [(0, 0.0), (20, 0.0), (30, 0.0), (40, 0.375), (60, 0.75), (90, 1), (135, 5 / 6), (180, 2 / 3), (360, 0), (900, 0)],
)  # fmt: skip
def test_length_score_of_a_text_for_90_words(words: int, score: float) -> None:
    """By hand from LongBench-Write: 1 - (y/x - 1)/3 beyond the wanted length, 1 - (x/y - 1)/2 short of it."""
    assert wanted_length("word, " * words, {"length": 90}) == pytest.approx(score)
    assert constraints("word, " * words, {"constraints": [{"kind": "length", "length": 90}]}) == pytest.approx(score)


def test_wanted_lengths_of_the_real_file(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data/writing/longbench_write_en.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    for row in rows:
        assert wanted_length("word " * row["length"], row) == 1.0
        assert 0 < wanted_length("word " * (2 * row["length"]), row) < 1
        assert wanted_length("word " * (4 * row["length"]), row) == 0.0


def test_chinese_characters_are_words() -> None:
    assert wanted_length("我们 go home", {"length": 4}) == 1.0
