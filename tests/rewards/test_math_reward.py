"""The math reward against hand-judged replies and the gold answers of GSM8K."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from mdrl_jax.rewards.math import final_answer, last_boxed, rational

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/math/gsm8k_train_1000.jsonl"

SAME = [
    ("so \\boxed{72}", "72"),
    ("first \\boxed{3}, then \\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{5} and a broken \\boxed{6", "5"),
    ("\\boxed{72} #### 5", "72"),
    ("The answer is 5\n#### 72", "72"),
    ("#### 1,234", "1234"),
    ("#### $18.00", "18"),
    ("#### 18 dollars", "18"),
    ("The answer is 4. No: the answer is: **+7**.", "7"),
    ("The answer is $5$. I hope this helps with 3 others.", "5"),
    ("The answer is $-5.50 today", "-11/2"),
    ("5 + 3 = 8", "8"),
    ("she pays 10-3", "3"),
    ("x=−3", "-3"),
    ("it is 50%.", "50"),
    ("42", "42"),
    (".5", "1/2"),
    ("\\boxed{-\\dfrac{3}{4}}", "-0.75"),
    ("\\boxed{x^2 + 1}", "x^2+1"),
    ("\\boxed{\\text{Yes}}", "yes"),
    ("The answer is Paris.", "paris"),
    ("\\boxed{(1, 2)}", "(1,2)"),
    ("\\boxed{0." + "3" * 50 + "}", "0." + "3" * 50),
]
DIFFERENT = [
    ("\\boxed{72} or 73", "73"),
    ("0.3333", "1/3"),
    ("1000000000000000000000000.1", "1000000000000000000000000"),
    ("The answer is 3 + 4 = 7", "3"),
    ("The answer is 5 or 6", "5"),
    ("\\boxed{5, 6}", "5"),
    ("\\boxed{5}", "5, 6"),
    ("\\boxed{2,3}", "23"),
    ("18 apples", "18 pears"),
    ("", "0"),
    ("", ""),
    ("no number", "7"),
    ("\\boxed{}", "7"),
    ("1/0", "0"),
    ("7" * 100_000, "7"),
]


@pytest.mark.parametrize(("reply", "gold"), SAME)
def test_same(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 1.0


@pytest.mark.parametrize(("reply", "gold"), DIFFERENT)
def test_different(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 0.0


def test_any_of_several_answers() -> None:
    assert final_answer("so 4", {"answer": ["3", "4"]}) == 1.0
    assert final_answer("so 5", {"answer": ["3", "4"]}) == 0.0


def test_every_rational_equals_itself_and_no_other() -> None:
    numbers = [Fraction(a, b) for a in range(-6, 7) for b in range(1, 5)]
    for x in numbers:
        for y in numbers:
            assert (rational(str(x)) == rational(f"+{y}".replace("+-", "-"))) == (x == y)


def test_braces_balance() -> None:
    assert last_boxed("\\boxed{a{b}{c{d}}} e}") == "a{b}{c{d}}"
    assert last_boxed("\\boxed{a") is None


def test_gsm8k_golds_and_changed_golds() -> None:
    if not GSM8K.exists():
        pytest.skip("the GSM8K rows are not beside the repository (../shared/data/math)")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:100]]
    assert len(rows) == 100
    for row in rows:
        reply = row["answer"]
        gold = reply.rpartition("#### ")[2]
        assert final_answer(reply, {"answer": gold}) == 1.0
        changed = str(int(gold.replace(",", "")) + 1)
        assert final_answer(reply, {"answer": changed}) == 0.0
        working = reply.rpartition("####")[0]
        assert final_answer(f"{working}\n\\boxed{{{gold}}}", {"answer": gold}) == 1.0
        assert final_answer(f"{working}\nThe answer is {changed}.", {"answer": gold}) == 0.0
