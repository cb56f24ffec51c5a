"""Figures of records as columns and as words."""

import pytest

from mdrl_jax.report.intervals import columns, estimate_columns, estimate_tips, null_columns, number, span, tips, words
from mdrl_jax.stats.estimate import missing


def test_columns_are_scaled_and_absent_ends_stay_absent():
    found = columns("gain", {"estimate": 0.25, "ci95": [-0.5, 1.0]}, 100.0)
    assert found == {"gain": 25.0, "gain_low": -50.0, "gain_high": 100.0}
    assert columns("x", {"estimate": None, "ci95": None}) == {"x": None, "x_low": None, "x_high": None}
    assert columns("x", {"estimate": 2.0, "ci95": None}, 3.0) == {"x": 6.0, "x_low": None, "x_high": None}


def test_columns_of_one_figure_a_row_say_why_there_is_none():
    measured = {"estimate": 0.25, "ci95": [-0.5, 1.0], "null": 0.5, "n": 9, "unit": ""}
    assert estimate_columns(measured, 100.0) == {"estimate": 25.0, "low": -50.0, "high": 100.0, "n": 9, "reason": ""}
    empty = {"estimate": None, "low": None, "high": None, "n": 0, "reason": "a norm is 0"}
    assert estimate_columns(missing("a norm is 0"), 100.0) == empty
    assert null_columns(measured, 2.0) == {"null": 1.0, "null_low": None, "null_high": None}
    drawn = measured | {"null": {"mean": 0.5, "low": 0.25, "high": 1.0}}
    assert null_columns(drawn, 2.0) == {"null": 1.0, "null_low": 0.5, "null_high": 2.0}
    assert null_columns(missing("a norm is 0")) == {"null": None, "null_low": None, "null_high": None}
    fields = [t.to_dict()["field"] for t in estimate_tips(["pair"], "cosine", null=True)]
    assert fields == ["pair", *list(estimate_columns(measured))[:3], *null_columns(measured), "n", "reason"]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-0.001, ".2f", "0.00"), (-1.5, ".1f", "−1.5"), (0.949, ".0%", "95%"), (-0.001, ".0%", "0%"),
        (10.0, ".0f", "10"), (-1234.0, "+,.0f", "−1,234"),
    ],
)  # fmt: skip
def test_numbers_have_a_minus_sign_only_where_something_is_left_of_them(value: float, form: str, text: str):
    assert number(value, form) == text


def test_words_have_the_interval_or_the_reason():
    assert words({"estimate": 0.5, "ci95": [-0.25, 1.0]}) == "0.50 [−0.25, 1.00]"
    assert words({"estimate": 0.5, "ci95": None}, ".1f") == "0.5"
    assert words({"estimate": 0.5, "ci95": [-0.25, 1.0]}, ".0f", 100.0) == "50 [−25, 100]"
    assert words({"estimate": None, "ci95": None, "reason": "a norm is 0"}) == "a norm is 0"
    assert words({"estimate": None, "ci95": None}) == "not measured"


def test_the_span_holds_values_intervals_and_what_else_it_should():
    rows = [{"x": 1.0, "x_low": -1.0, "x_high": 3.0, "y": 99.0}, {"x": None, "x_low": None, "x_high": None}, {"x": 2.0}]
    assert span(rows, ["x"], margin=0.0) == (-1.0, 3.0)
    assert span(rows, ["x"], (0.0, 7.0), margin=0.25) == (-3.0, 9.0)
    assert span([], ["x"]) == (-0.05, 0.05)


def test_tooltips_are_of_the_columns():
    assert [t.to_dict()["field"] for t in tips("gain", "gain, points")] == ["gain", "gain_low", "gain_high"]
