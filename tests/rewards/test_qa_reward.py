"""Exact match and F1 by hand and by SQuAD's definition on real answers; letter choice on replies and on MMLU."""

import csv
import io
import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.rewards.qa import choice, chosen, exact_match, f1, normalized


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


@pytest.mark.parametrize(
    ("reply", "answer", "match"),
    [
        ("", "+", 0.0), ("-", "+", 0.0), ("+", "+", 1.0), (" + ", ["-", "+"], 1.0), ("", "", 0.0),
        ("-3.5", "35", 0.0), ("35", "-3.5", 0.0), ("-3.50", "-3.5", 1.0), ("−3.5", -3.5, 1.0), (".5", "0.5", 1.0),
        ("1,000", "1000", 1.0), ("$35", "35", 1.0), ("35 %", "35%", 1.0), ("35.", 35, 1.0), ("the 35", "35", 1.0),
        ("3.5", "35", 0.0), ("1.000", "1000", 0.0),
    ],
)  # fmt: skip
def test_numbers_are_numbers_and_an_empty_reply_is_wrong(reply: str, answer: Any, match: float) -> None:
    assert exact_match(reply, {"answer": answer}) == f1(reply, {"answer": answer}) == match


def test_normalising_twice_changes_nothing() -> None:
    for text in ("The A. of, an “X”", "  a the ", "I.B.M. (the firm)"):
        assert normalized(normalized(text)) == normalized(text)


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty list"):
        exact_match("x", {"answer": []})


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation, step by step: lower case, no punctuation, no articles, white space."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(reply: str, answer: str) -> float:
    ours, theirs = squad_words(reply), squad_words(answer)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def answer_lists(shared: Path) -> list[list[str]]:
    squad = json.loads((shared / "data/qa/xquad_en.json").read_text())["data"]
    questions = [q for article in squad for paragraph in article["paragraphs"] for q in paragraph["qas"]]
    nq = [json.loads(line) for line in (shared / "data/qa/nq_open_dev.jsonl").read_text().splitlines()]
    return [[a["text"] for a in q["answers"]] for q in questions] + [row["answer"] for row in nq]


def test_real_answers_by_squads_definition(shared: Path) -> None:
    lists = answer_lists(shared)
    assert len(lists) == 1190 + 3610
    compared = 0
    for answers, others in zip(lists, lists[1:] + lists[:1], strict=True):
        check = {"answer": answers}
        for reply in (*answers, f"The {answers[0].upper()}!", f"It is {answers[0]}.", others[0]):
            if squad_words(reply) and all(squad_words(a) for a in answers):  # else: the deviation
                assert exact_match(reply, check) == any(squad_words(reply) == squad_words(a) for a in answers)
                assert f1(reply, check) == pytest.approx(max(squad_f1(reply, a) for a in answers))
                compared += 1
        assert exact_match(answers[0], check) == f1(answers[0], check) == 1.0
    assert compared > 20_000


CHOICES = ["red fox", "blue cat", "A dog", "vitamin C"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("Option B", "B"),
        ("blue cat", "B"),
        ("The blue cat.", "B"),
        ("The answer is B", "B"),
        ("Answer: **B. blue cat**", "B"),
        ("Answer:\nB", "B"),
        ("The final answer is: $\\boxed{\\text{C}}$", "C"),
        ("The correct option is D because of x", "D"),
        ("I would choose option C.", "C"),
        ("I think it is (D) since", "D"),
        ("B. blue cat\n\nBecause cats are blue.", "B"),
        ("I first thought A. The answer is A. No, the answer is C.", "C"),
        ("The answer is B.\n\nExplanation: (A) is wrong", "B"),
        ("A", "A"),
        ("A dog", "C"),
        ("The answer is A dog.", "C"),
        ("The answer is vitamin C.", "D"),
        ("", None),
        ("E", None),
        ("The answer is E.", None),
        ("A dog is what I see", None),
        ("the answer is A lot", None),
        ("The answer is I think B", None),
        ("I like vitamin C.", None),
        ("A B C D", None),
        ("A, B, C, D", None),
        ("A\nB\nC\nD", None),
        ("A. red fox\nB. blue cat\nC. A dog\nD. vitamin C", None),
        ("A) red fox, B) blue cat, C) A dog, D) vitamin C", None),
        ("(A) (B) (C) (D)", None),
        ("The answer is A or B.", None),
        ("The answer is (A), (B), (C) or (D).", None),
        ("The answer is A) red fox, B) blue cat", None),
        ("Option B is correct.", "B"),
        ("**B** is the right answer.", "B"),
        ("[B]", "B"),
        ("Answer: [B]", "B"),
        (r"$\text{B}$", "B"),
        (r"\(B\)", "B"),
        (r"\boxed{B. blue cat}", "B"),
        ("the answer is b", "B"),
        ("b) blue cat", "B"),
        ("B - blue cat", "B"),
        ("Option B, because cats are blue.", "B"),
        ("the answer is a.", "A"),
        ("the answer is a dog", "C"),
        ("B is wrong, so A.", "A"),
        ("(B) is wrong. (A).", "A"),
        ("A is wrong and B is correct.", "B"),
        ("The answer is B, not A.", "B"),
        ("The answer is blue cat, not red fox.", "B"),
        ("not B", None),
        ("Not (B).", None),
        ("(B) is wrong.", None),
        ("The answer is not B.", None),
        ("The answer isn't B.", None),
        ("The answer is A. No, the answer is not A.", None),
        ("I would not pick B.", None),
        ("The wrong answer is B.", None),
        ("A or B", None),
        ("(A) or maybe (B)", None),
        ("(A) seems plausible but (B) too", None),
        ("The answer is either A or B", None),
        ("the answer is a, b or c", None),
        ("The answer is A + B", None),
        ("A or B is correct.", None),
        ("A is correct. C is correct.", None),
        ("Neither A nor B is correct.", None),
        ("Either the answer is A or the answer is B.", None),
        ("The answer is blue cat or red fox", None),
        ("The answer is blue cat. Or red fox.", None),
        ("The answer is\nA. red fox\nB. blue cat", None),
        ("Option A. Option B. Option C. Option D.", None),
        (r"\boxed{A, B}", None),
        ("blue cat red fox", None),
    ],
)
def test_the_chosen_letter(reply: str, letter: str | None) -> None:
    assert chosen(reply, CHOICES) == (None if letter is None else "ABCD".index(letter))


@pytest.mark.parametrize(
    ("choices", "reply", "index"),
    [
        (["4", "-4", "8", "-8"], "-4", 1),
        (["4", "-4", "8", "-8"], "−4", 1),
        (["4", "-4", "8", "-8"], "The answer is -4.", 1),
        (["4", "-4", "8", "-8"], r"\boxed{-4}", 1),
        (["4", "-4", "8", "-8"], "4", 0),
        (["4", "-4", "8", "-8"], "±4", None),
        (["4", "-4", "8", "-8"], "4 or -4", None),
        (["4", "8"], "-4", None),
        (["42 ns", "420 ns"], "4.2 ns", None),
        (["42 ns", "4.2 ns"], "the answer is 4.2 ns", 1),
        (["1,000", "10"], "1000", 0),
        (["23", "6"], "2*3", None),
        (["5", "0.05"], "5%", None),
        (["f", "f'"], "f'", 1),
        (["x > 2", "x < 2"], "x < 2", 1),
        (["(a, b)", "[a, b]", "(a, b]"], "The answer is [a, b].", 1),
        (["BB Bb", "Bb Bb", "bb bb"], "The answer is Bb Bb.", 1),
        (["BB Bb", "Bb bB"], "bb bb", None),
        (["yes", "yes!"], "yes!", 1),
        (["true, false", "true; false"], "The answer is true; false.", 1),
        (["cat", "cat dog"], "The answer is cat.", 0),
        (["cat", "cat dog"], "The answer is cat dog.", 1),
        (["vitamin A", "iron"], "vitamin", None),
        (["I only", "I, II and III"], "The answer is I, II, and III.", 1),
        (["2d", "3d", "d", "4d"], "d", 2),
        (["B", "A"], "B", 1),
        (["1", "2"], "2", 1),
        (["E. coli lives there. It is harmless.", "yes"], "The answer is A. E. coli lives there. It is harmless.", 0),
    ],
)
def test_a_text_is_told_from_texts_that_look_like_it(choices: list[str], reply: str, index: int | None) -> None:
    assert chosen(reply, choices) == index


def test_equal_texts_are_equally_right() -> None:
    for answer, reward in (("A", 1.0), ("B", 1.0), ("C", 0.0)):
        assert choice("0.16 N", {"answer": answer, "choices": ["0.16 N", "0.16 N", "0.32 N"]}) == reward


def test_choices_must_be_a_list() -> None:
    with pytest.raises(ValueError, match="list of texts"):
        choice("B", {"answer": "B", "choices": "AB"})


def test_an_answer_is_a_letter_an_index_or_a_text() -> None:
    for answer in ("B", "(B)", 1, "blue cat"):
        assert choice("B", {"answer": answer, "choices": CHOICES}) == 1.0
        assert choice("A", {"answer": answer, "choices": CHOICES}) == 0.0
    wrong: list[Any] = ["E", 4, -1, "green hat", None, True]
    for answer in wrong:
        with pytest.raises(ValueError, match="no letter, index or text"):
            choice("B", {"answer": answer, "choices": CHOICES})


def test_mmlu(shared: Path) -> None:
    files = sorted((shared / "data/qa/mmlu").glob("*_test.csv"))
    rows = [row for file in files for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline=""))]
    assert len(rows) == 732
    replies = (
        "{0}", "({0})", "[{0}]", "**{0}**", "The answer is {0}.", "Option {0} is correct.", "{0}. {1}", "{1}",
        "The answer is {1}.", "The answer is {0}. {1}", r"\boxed{{\text{{{0}}}}}", r"\boxed{{{1}}}",
    )  # fmt: skip
    earned = dict.fromkeys(replies, 0.0)
    for _, *choices, letter in rows:
        check = {"answer": letter, "choices": choices}
        for other, text in zip("ABCD", choices, strict=True):
            for reply in replies:
                reward = choice(reply.format(other, text), check)
                earned[reply] += reward
                assert reward == (other == letter), reply.format(other, text)
        listing = "\n".join(f"{other}. {text}" for other, text in zip("ABCD", choices, strict=True))
        assert choice(listing, check) == 0.0
    assert set(earned.values()) == {732.0}


SLOW = ["answer is " * 20_000, "the " * 50_000, " " * 200_000 + "x", "(A" * 50_000, "answer is " + "the " * 50_000,
        "A\n" * 25_000, "(B) " * 25_000, "*" * 200_000, "a" + "*" * 100_000 + "b", "B" + " " * 200_000]  # fmt: skip


@pytest.mark.parametrize("reply", SLOW, ids=range(len(SLOW)))
def test_no_reply_is_slow_to_judge(reply: str) -> None:
    import time

    start = time.thread_time()
    chosen(reply, CHOICES)
    assert time.thread_time() - start < 2
