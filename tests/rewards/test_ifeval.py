"""Each of IFEval's 25 kinds on texts that pass and that fail it, and on the 541 real prompts."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.rewards.ifeval import KINDS, n_sentences
from mdrl_jax.rewards.writing import (
    all_loose,
    all_strict,
    constraints,
    constraints_loose,
    satisfied,
)

ENGLISH = "this is a short text about the sea, the wind and the boats that wait in the harbour"
GERMAN = "Das ist ein kurzer Text über das Meer, den Wind und die Boote, die im Hafen warten."
HINDI = "यह समुद्र और हवा के बारे में एक छोटा सा पाठ है।"

# kind, parameters, texts that pass, texts that fail
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["mom", "C++"]},
        ["Mom likes c++.", "a moment of C++"],
        ["mom", "c++", "mum C+"],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War and war", "warward"],
        ["war"],
    ),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war", "peace"], ["war, war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["a.c"]}, ["abc"], ["the A.C unit"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocks roll", "bedrock"], ["a Rock.", "rock"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, ["# a #"], ["#"]),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "less than"}, ["tea"], ["That"]),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH, "1 2 3"]),
    ("language:response_language", {"language": "hi"}, [HINDI], [GERMAN]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["Yes. No!"],
        ["Mr. No it is"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["At 3.5 m."],
        ["So. Well?"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a", "a***b***c", "a\n\nb", "a*** ***b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one, two, three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Send"},
        ["one\n\nsend it", "one\n\n'Send, please"],
        ["send\n\none", "one\n\nsender", "a\n\nsend\n\nb", "send"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] and [b c]"],
        ["[a] b", "[a\n] [b]", "]["],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. more", "p. s. x"], ["Bye. PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s."], ["P.S. more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\ntext\n  * b"],
        ["* a", "* a\n* b\n* c", "** a\n** b"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["My answer is perhaps.", "yes"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** *b*"],
        ["*a* b", "**a**", "* *  *\n*", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2", "SECTION a SECTION b"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', '"text"'],
        ["{a: 1}", "Here: {}", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<Joy>>\nA poem", "A <<b>> c"], ["<Joy>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b"],
        ["a", "a******a", "a******b******c", "a****** ******b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        [" write a poem.\nRoses"],
        ["Sure. Write a poem."],
    ),
    ("startend:end_checker", {"end_phrase": "Peace!"}, ["War and peace!", '"so: Peace!"'], ["Peace! Bye.", "Peace"]),
    ("startend:quotation", {}, ['"Hello."', ' "a" '], ['"Hello.', 'He said "a"', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I SAY so"],
        ["SAY so", "Say So"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["WELL-KEPT it is", "Well"],
        ["VERY GOOD"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH.upper() + " end", GERMAN.upper(), "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.capitalize(), GERMAN.lower(), "123"]),
    ("punctuation:no_comma", {}, ["red and green"], ["red, green"]),
]


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES)
def test_kind(kind: str, parameters: dict[str, Any], good: list[str], bad: list[str]) -> None:
    constraint = {"kind": kind, **parameters}
    assert [satisfied(text, constraint) for text in good] == [1.0] * len(good)
    assert [satisfied(text, constraint) for text in ["", " \n", *bad]] == [0.0] * (2 + len(bad))


def test_all_25_kinds_have_cases() -> None:
    assert len(KINDS) == 25 and {kind for kind, *_ in CASES} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Mr. and Mrs. Doe, i.e. the J. R. Does, came at 3.30 p.m. on foot.", 1),
        ("Well... yes.", 2),
        ('He said "No." Then he left.', 2),
        ("1. First point.\n2. Second point.", 2),
        ("lower case too. it counts. so", 3),
        ("It was I. You know.", 2),
        ("私は学生です。彼は先生です。", 2),
        ("no end", 1),
        ("... !", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert n_sentences(text) == count


def rows(shared: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "data/writing/ifeval.jsonl").read_text().splitlines()]


def test_every_constraint_of_the_real_file_is_understood(shared: Path) -> None:
    seen: dict[str, set[float]] = {kind: set() for kind in KINDS}
    found = rows(shared)
    assert len(found) == 541 and sum(len(row["kwargs"]) for row in found) == 834
    texts = [ENGLISH, "A <<title>>, *one* and *two*.\n\n" + GERMAN * 3]
    for row in found:
        for kind, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            seen[kind] |= {satisfied(text, {"kind": kind, **kwargs}) for text in texts}
        check = {"instruction_id_list": row["instruction_id_list"], "kwargs": row["kwargs"]}
        assert constraints(texts[0], check) <= constraints_loose(texts[0], check)
    assert all(values <= {0.0, 1.0} and values for values in seen.values())


def test_both_layouts_agree_and_null_means_absent(shared: Path) -> None:
    names = {name for row in rows(shared) for kwargs in row["kwargs"] for name in kwargs}
    row = next(row for row in rows(shared) if len(row["kwargs"]) == 3)
    padded = [{name: kwargs.get(name) for name in names} for kwargs in row["kwargs"]]
    listed = [{"kind": k, **p} for k, p in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    for text in (ENGLISH, "*a* *b* *c* " + "word " * 300):
        expected = constraints(text, {"constraints": listed})
        assert constraints(text, {"instruction_id_list": row["instruction_id_list"], "kwargs": padded}) == expected
    with pytest.raises(ValueError, match="one for each"):
        constraints("x", {"instruction_id_list": row["instruction_id_list"], "kwargs": []})


def test_strict_and_loose() -> None:
    check = {"constraints": [{"kind": "punctuation:no_comma"}, {"kind": "startend:quotation"}]}
    accuracies = (constraints, all_strict, constraints_loose, all_loose)
    assert [f('"plain"', check) for f in accuracies] == [1, 1, 1, 1]
    assert [f('Sure, here:\n"plain"', check) for f in accuracies] == [0, 0, 1, 1]  # without its first line
    assert [f('*"plain"*', check) for f in accuracies] == [0.5, 0, 1, 1]  # without asterisks
    assert [f('Sure\n"plain"\nBye, bye', check) for f in accuracies] == [0, 0, 1, 1]  # first and last
    assert [f("a, b", check) for f in accuracies] == [0, 0, 0, 0]


def test_a_wrong_parameter_is_an_error() -> None:
    for wrong in (
        {"kind": "length_constraints:number_words", "num_words": 3, "relation": "at most"},
        {"kind": "length_constraints:number_words", "num_words": 3},
        {"kind": "keywords:letter_frequency", "letter": "ab", "let_frequency": 1, "let_relation": "at least"},
        {"kind": "punctuation:no_comma", "commas": 0},
    ):
        with pytest.raises(ValueError):
            satisfied("some text", wrong)


@pytest.mark.parametrize("text", ["[" * 200_000, "<<" * 100_000, "\n" * 200_000, "*" * 200_000, "a. " * 60_000])
def test_no_kind_is_slow_on_a_long_reply(text: str) -> None:
    import time

    start = time.thread_time()
    for kind, parameters, *_ in CASES:
        satisfied(text + "x", {"kind": kind, **parameters})
    assert time.thread_time() - start < 5
