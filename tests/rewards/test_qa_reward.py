"""Exact match and F1 against values worked out by hand from SQuAD's definition."""

import pytest

from mdrl_jax.rewards.qa import exact_match, f1, normalized


@pytest.mark.parametrize(
    ("reply", "answer", "match"),
    [
        ("The  Denver Broncos!", "denver broncos", 1.0),
        ("denver", "Denver Broncos", 0.0),
        ("A", "A", 1.0),
        ("B", "A", 0.0),
        ("", "A", 0.0),
        ("the", "A", 0.0),
        ("theatre", "atre", 0.0),
        ("7", ["6", "7"], 1.0),
        ("5", ["6", "7"], 0.0),
    ],
)
def test_exact_match(reply: str, answer: str | list[str], match: float) -> None:
    assert exact_match(reply, {"answer": answer}) == match


@pytest.mark.parametrize(
    ("reply", "answer", "value"),
    [
        ("the cat sat", "a cat sat down", 0.8),  # precision 2/2, recall 2/3
        ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("dog", ["cat", "big dog"], 2 / 3),
    ],
)
def test_f1(reply: str, answer: str | list[str], value: float) -> None:
    assert f1(reply, {"answer": answer}) == pytest.approx(value)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("The A. of, an “X”", "  a the ", "I.B.M. (the firm)"):
        assert normalized(normalized(text)) == normalized(text)


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty list"):
        exact_match("x", {"answer": []})
