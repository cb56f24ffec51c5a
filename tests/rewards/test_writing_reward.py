"""Each constraint on a text that satisfies it and on one that just does not."""

from typing import Any

import pytest

from mdrl_jax.rewards.writing import KINDS, constraints

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("include", {"word": "Cat"}, "a cat, here", "a category here"),
    ("word_count", {"count": 3}, "don't stop, now", "do not stop now"),
    ("starts_with", {"word": "red"}, "Red cats", "reddish cats"),
    ("ends_with", {"word": "end"}, "the END.", "the end came"),
    ("plain", {}, "only letters and\nspaces", "only letters, and spaces"),
    ("plain", {}, "été", "route 66"),
    ("no_repeats", {}, "red cat sat", "Red cat red"),
    ("order", {"words": ["a", "b", "b"]}, "x a y b z B", "b a b"),
]


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES)
def test_kind(kind: str, parameters: dict[str, Any], good: str, bad: str) -> None:
    check = {"constraints": [{"kind": kind, **parameters}]}
    assert constraints(good, check) == 1.0
    assert constraints(bad, check) == 0.0
    assert constraints("", check) == 0.0


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, *_ in CASES} == set(KINDS)


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
