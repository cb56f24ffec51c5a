"""Presets on the real files: how many rows, what exactly is asked, and that gold answers earn 1 by their rewards."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.domains import datasets, layouts
from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, SourceConfig
from mdrl_jax.domains.presets import PRESETS, completed
from mdrl_jax.errors import UserError
from mdrl_jax.rewards.base import resolve, score
from mdrl_jax.rewards.pool import RewardPool

ALL = DomainsConfig(n_train=10**6, n_validation=10**6, n_test=10**6)
FILES = {
    "gsm8k": ("math/gsm8k_train*.jsonl",),
    "mbpp": ("code/mbpp.jsonl",),
    "mbpp_last_line": ("code/mbpp.jsonl",),
    "squad": ("qa/xquad_en.json",),
    "nq_open": ("qa/nq_open_dev.jsonl",),
    "mmlu": ("qa/mmlu/*_test.csv",),
    "ifeval": ("writing/ifeval.jsonl",),
    "longbench_write": ("writing/longbench_write_en.jsonl",),
}


@pytest.fixture(scope="module")
def made(shared: Path) -> dict[str, Domain]:
    """Every preset that has a real file."""
    domains = {}
    for name, found in FILES.items():
        source = SourceConfig(preset=name, files=tuple(f"{shared}/data/{f}" for f in found), max_bad_rows=0)
        if name == "gsm8k":
            source = dataclasses.replace(source, test_files=(f"{shared}/data/math/gsm8k_test.jsonl",))
        domains[name] = datasets.make(name, source, ALL)
    return domains


def problems(domain: Domain) -> list[Problem]:
    """Those of all splits."""
    return [p for split in datasets.SPLITS for p in getattr(domain, split)]


def asked(domain: Domain, start: str) -> Problem:
    """The one problem whose prompt begins so."""
    (problem,) = [p for p in problems(domain) if p.prompt.startswith(start)]
    return problem


# Rows of the file, prompts of it, those that are in no split, those that repeat another.
COUNTS = {
    "gsm8k": (2319, 2319, 0, 0),
    "mbpp": (974, 974, 10, 1),
    "mbpp_last_line": (974, 841, 10, 0),
    "squad": (48, 1190, 0, 3),
    "nq_open": (3610, 3610, 0, 0),
    "mmlu": (732, 732, 0, 0),
    "ifeval": (541, 541, 0, 0),
    "longbench_write": (60, 60, 0, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_accounted_for(made: dict[str, Domain], name: str):
    domain = made[name]
    assert domain.data
    record = domain.data.record
    rows, prompts, elsewhere, repeated = COUNTS[name]
    counts = record["rows"], record["prompts"], record["elsewhere"], record["repeated"], record["bad_rows"]
    assert counts == (rows, prompts, elsewhere, repeated, 0)
    found = problems(domain)
    assert len(found) == len({p.prompt for p in found}) == prompts - elsewhere - repeated


def test_the_sources_own_splits_are_kept(made: dict[str, Domain], shared: Path):
    sizes = {name: tuple(len(getattr(made[name], split)) for split in datasets.SPLITS) for name in ("gsm8k", "mbpp")}
    assert sizes["gsm8k"][2] == 1319 and sum(sizes["gsm8k"][:2]) == 1000
    assert sizes["mbpp"] == (374, 90, 499)  # of 500 test tasks two are the same
    tasks = [json.loads(line) for line in (shared / "data/code/mbpp.jsonl").read_text().splitlines()]
    of_training = {task["text"] for task in tasks if task["task_id"] > 600}
    assert {p.prompt.partition("\n\nWrite it in Python")[0] for p in made["mbpp"].train} == of_training


def test_small_steps_are_one_operation_on_small_numbers():
    kept = ["3 + 4", " 20 / 2.5 ", "20*20", "0 - 1"]
    left_out = ["21 - 1", "3 + 4 + 5", "( 3 + 4 )", "7", "", "x + 1", "-3 + 4", "20.5 * 2"]
    rows = [{"equation": text, "answer": "1"} for text in kept + left_out]
    assert [row for row in rows if layouts.small_step(row)] == rows[: len(kept)]
    assert layouts.small_step(rows[0]) == [rows[0]]
    with pytest.raises(KeyError):
        layouts.small_step({"answer": "1"})


def test_the_last_line_of_a_program_is_taken_away(made: dict[str, Domain], shared: Path):
    """The parts that the layout makes of MBPP's rows are those of a file that has them already."""
    rows = [json.loads(line) for line in (shared / "data/code/mbpp.jsonl").read_text().splitlines()]
    ready = [json.loads(line) for line in (shared / "data/code/mbpp_last_line.jsonl").read_text().splitlines()]
    parts = {row["task_id"]: layouts.mbpp_last_line(row) for row in rows}
    for row in ready:
        (found,), (wanted,) = parts[row["task_id"]], layouts.mbpp_last_line(row)
        assert {**found, "setup": ""} == wanted and wanted["prefix"] + wanted["line"] == (
            row["stub"] + " " * row["indent"] + row["line"]
        )
    row = next(row for row in ready if row["task_id"] > 600)
    told = "Reply with the missing last line of this function, and nothing else."
    problem = asked(made["mbpp_last_line"], f"{row['task']}\n\n```python\n{row['stub']}```\n\n{told}")
    assert problem.prompt.endswith(told) and problem.reply == row["line"]
    assert problem.check == {"tests": row["tests"], "setup": "", "prefix": row["stub"] + " " * row["indent"]}


def test_prompts_are_exactly_these(made: dict[str, Domain]):
    gsm8k = asked(made["gsm8k"], "Natalia sold clips")
    assert gsm8k.prompt == (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May?\n\n"
        "Reason step by step, and put the final answer within \\boxed{}."
    )
    assert gsm8k.check == {"answer": "72"}
    mbpp = asked(made["mbpp"], "Write a function to check if a binary tree is balanced or not.")
    assert mbpp.prompt == (
        "Write a function to check if a binary tree is balanced or not.\n\n"
        "Write it in Python, in one ```python block. It has to pass tests such as this one:\n"
        "assert is_tree_balanced(root) == False"
    )
    assert mbpp.check["setup"].startswith("root = Node(1)") and len(mbpp.check["tests"]) == 3
    nq = asked(
        made["nq_open"], "Answer in as few words as possible, and with nothing else: when was the last time anyone"
    )
    assert nq.prompt.endswith("nothing else: when was the last time anyone was on the moon")
    assert nq.check == {"answer": ["14 December 1972 UTC", "December 1972"]}
    mmlu = asked(made["mmlu"], "What can murtis")
    assert mmlu.prompt == (
        "What can murtis be translated as?\n\nA. Offerings\nB. Prayers\nC. Apparitions\nD. Idols\n\n"
        "Reply with the letter of the right option, and nothing else."
    )
    assert mmlu.check == {"answer": "D", "choices": ["Offerings", "Prayers", "Apparitions", "Idols"]}
    (panthers,) = [p for p in problems(made["squad"]) if "points did the Panthers defense surrender" in p.prompt]
    assert panthers.prompt.startswith("The Panthers defense gave up just 308 points")
    assert panthers.prompt.endswith(
        "\n\nAnswer in as few words of the text as possible, and with nothing else: "
        "How many points did the Panthers defense surrender?"
    )
    assert panthers.check == {"answer": ["308"]}
    summary = asked(made["ifeval"], "Write a 300+ word summary")
    assert summary.check["constraints"] == [
        {"kind": "punctuation:no_comma"},
        {"kind": "detectable_format:number_highlighted_sections", "num_highlights": 3},
        {"kind": "length_constraints:number_words", "relation": "at least", "num_words": 300},
    ]
    cactus = asked(made["longbench_write"], "Write an outline for a short 100-word blog post")
    assert cactus.check == {"length": 100}


def test_gold_answers_earn_1_and_others_nothing(made: dict[str, Domain]):
    def judge(name: str, problem: Problem, reply: str) -> float:
        return score(resolve(made[name].reward), reply, problem.check).reward

    for problem in made["gsm8k"].test[:25]:
        assert judge("gsm8k", problem, f"So it is \\boxed{{{problem.check['answer']}}}.") == 1.0
        assert judge("gsm8k", problem, "So it is \\boxed{123456}.") == 0.0
    for name in ("squad", "nq_open"):
        for problem in made[name].test[:50]:
            assert all(judge(name, problem, answer) == 1.0 for answer in problem.check["answer"])
            assert judge(name, problem, "xyzzy") == 0.0
    for problem in made["mmlu"].test:
        wrong = "B" if problem.check["answer"] == "A" else "A"
        assert judge("mmlu", problem, problem.check["answer"]) == 1.0
        assert judge("mmlu", problem, wrong) == 0.0
    for problem in made["longbench_write"].train[:10]:
        assert judge("longbench_write", problem, "word " * problem.check["length"]) == 1.0
        assert judge("longbench_write", problem, "word " * 5 * problem.check["length"]) == 0.0
    for problem in made["ifeval"].test:
        assert 0.0 <= judge("ifeval", problem, "A short reply.") <= 1.0  # every kind is known, with its arguments


def test_gsm8ks_own_solutions_and_mbpps_references_earn_1(made: dict[str, Domain], shared: Path):
    solutions = [json.loads(line) for line in (shared / "data/math/gsm8k_test.jsonl").read_text().splitlines()[:10]]
    tasks = [json.loads(line) for line in (shared / "data/code/mbpp.jsonl").read_text().splitlines()]
    requests = []
    for row in solutions:
        requests.append(("math", row["answer"], asked(made["gsm8k"], row["question"]).check))
    for row in (tasks[366], *tasks[600:606]):  # of task 367 the set-up needs the program's class
        check = layouts.mbpp(row)
        requests.append(("code", f"```python\n{row['code']}\n```", {k: check[k] for k in ("tests", "setup")}))
        requests.append(("code", "pass", {k: check[k] for k in ("tests", "setup")}))
    with RewardPool(1) as pool:
        scores = pool.score(requests)
    assert [s.error for s in scores] == [None] * len(scores)
    assert [s.reward for s in scores] == [1.0] * 10 + [1.0, 0.0] * 7


def test_what_presets_demonstrate_earns_1(made: dict[str, Domain]):
    requests = []
    for name, n in (("gsm8k", 60), ("squad", 60), ("nq_open", 60), ("mmlu", 60), ("mbpp", 4), ("mbpp_last_line", 4)):
        requests += [(made[name].reward, p.reply, p.check) for p in made[name].train[:n]]
    with RewardPool(1) as pool:
        assert [s.reward for s in pool.score(requests)] == [1.0] * len(requests)
    replies = {name: [p.reply for p in problems(made[name])] for name in FILES}
    assert all(all(replies[name]) for name in ("gsm8k", "squad", "nq_open", "mmlu", "mbpp", "mbpp_last_line"))
    assert not any(replies["ifeval"]) and not any(replies["longbench_write"])
    assert made["ifeval"].demonstrate is None
    assert asked(made["gsm8k"], "Natalia sold clips").reply == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n\n"
        "The final answer is \\boxed{72}."
    )
    assert not any("\r" in reply or "<<" in reply for reply in replies["mbpp"][:1] + replies["gsm8k"])


# Rows as their hubs have them, and the replies made of them.
REPLIES = [
    (
        "math",
        {"problem": "P", "solution": r"It is $\boxed{2}$."},
        "It is $\\boxed{2}$.\n\nThe final answer is \\boxed{2}.",
    ),
    ("math", {"problem": "P", "answer": "2"}, ""),
    ("openr1_math", {"problem": "P", "answer": "2", "solution": "So."}, "So.\n\nThe final answer is \\boxed{2}."),
    ("mbpp", {"text": "T", "test_list": ["a"], "task_id": 700, "code": "a\r\nb"}, "```python\na\nb\n```"),
    ("mbpp", {"text": "T", "test_list": ["a"], "task_id": 700}, ""),
    (
        "mbpp_last_line",
        {"text": "T", "test_list": ["a"], "task_id": 700, "code": "def f(x):\r\n\ty = 1\r\n\treturn x + y  "},
        "return x + y",
    ),
    (
        "humaneval",
        {"prompt": "def f():\n", "test": "t", "entry_point": "f", "canonical_solution": "    return 1"},
        "```python\ndef f():\n    return 1\n```",
    ),
    ("humaneval", {"prompt": "def f():\n", "test": "t", "entry_point": "f"}, ""),
    ("squad", {"context": "C", "question": "Q", "answers": {"text": ["a", "b"]}}, "a"),
    ("nq_open", {"question": "Q", "answer": ["a", "b"]}, "a"),
    ("mmlu", {"question": "Q", "choices": ["w", "x"], "answer": 1}, "B"),
    ("references", {"prompt": "P", "reference": "R"}, "R"),
]


@pytest.mark.parametrize("name, row, reply", REPLIES, ids=[f"{i}-{r[0]}" for i, r in enumerate(REPLIES)])
def test_a_row_has_a_reply_where_it_has_a_solution(name: str, row: dict[str, Any], reply: str):
    source = completed(SourceConfig(preset=name, files=("x",)), "domains.qa")
    ((problem, _),) = datasets.Reader(source, "domains.qa", "").problems(row)
    assert problem.reply == reply


# Rows as their hubs have them, and the fields made of them.
OTHERS: list[tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = [
    (
        "math",
        {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{4}{2}}$."},
        [("1+1?\n\nReason", {"answer": r"\frac{4}{2}"})],
    ),
    ("math", {"problem": "1+1?", "answer": "2", "solution": "?"}, [("1+1?\n\nReason", {"answer": "2"})]),
    ("openr1_math", {"problem": "Show it.", "answer": "proof", "question_type": "proof"}, []),
    (
        "openr1_math",
        {"problem": "1+1?", "answer": "2", "question_type": "math-word-problem"},
        [("1+1?\n\nReason", {"answer": "2"})],
    ),
    (
        "humaneval",
        {"prompt": "def f():\n", "test": "def check(g):\n  assert g() == 1", "entry_point": "f", "task_id": "x"},
        [("Complete this", {"tests": ["def check(g):\n  assert g() == 1", "check(f)"], "prefix": "def f():\n"})],
    ),
    *(
        ("mbpp_last_line", {"text": "T", "test_list": ["a"], "task_id": 700, "code": code}, [])
        for code in (
            "def f(x):\n  return (x +\n    1)",
            "def f(x):\n  if x:\n    return 1\n  else:\n    return 2",
            "def f(x):\n  return x\nf(1)",
            "def f(x) return x",
            "",
        )
    ),
    (
        "klear_code",
        {
            "prompt": [{"role": "user", "content": "Do it."}],
            "reward_model": {"ground_truth": '{"functional": "assert f()"}', "style": "rule"},
        },
        [("Do it.", {"tests": ["assert f()"]})],
    ),
    (
        "klear_code",
        {
            "prompt": [{"role": "user", "content": "Do it."}],
            "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": ["2"]}', "style": "rule"},
        },
        [("Do it.", {"cases": [{"stdin": "1", "stdout": "2"}]})],
    ),
    (
        "squad",
        {"context": "C.", "question": "Q?", "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 1]}},
        [("C.\n\nAnswer in", {"answer": ["a", "b"]})],
    ),
    (
        "mmlu",
        {"question": "Q?", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 2},
        [("Q?\n\nA. w\nB. x\nC. y\nD. z\n\n", {"answer": "C", "choices": ["w", "x", "y", "z"]})],
    ),
    (
        "mmlu_pro",
        {"question": "Q?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
        [("Q?\n\nA. a\nB. b", {"answer": "J", "choices": list("abcdefghij")})],
    ),
    (
        "supergpqa",
        {
            "question": "Q?",
            "options": ["x", "y"],
            "answer": "y",
            "answer_letter": "B",
            "subfield": "s",
            "difficulty": "easy",
        },
        [("Q?\n\nA. x\nB. y\n\nReply", {"answer": "B", "choices": ["x", "y"]})],
    ),
    (
        "sciknoweval",
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "answer": ""},
        [("Q?\n\nA. x\nB. y\n\nReply", {"answer": "B", "choices": ["x", "y"]})],
    ),
    (
        "sciknoweval",  # a row of ARC, whose labels are numbers
        {"question": "Q?", "choices": {"text": ["1 m", "2 m", "3 m"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        [("Q?\n\nA. 1 m\nB. 2 m\nC. 3 m\n\nReply", {"answer": "B", "choices": ["1 m", "2 m", "3 m"]})],
    ),
    (
        "sciknoweval",
        {"question": "Q?", "choices": {"text": [], "label": []}, "answerKey": "", "answer": "long"},
        [],
    ),
    (
        "ifeval",  # as an Arrow file fills it up
        {"prompt": "P", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]},
        [("P", {"constraints": [{"kind": "punctuation:no_comma"}]})],
    ),
    (
        "references",
        {"prompt": "P", "reference": "R"},
        [("P", {"prompt": "P", "reference": "R"})],
    ),
]


@pytest.mark.parametrize("name, row, wanted", OTHERS, ids=[f"{i}-{o[0]}" for i, o in enumerate(OTHERS)])
def test_layouts_of_other_files(name: str, row: dict[str, Any], wanted: list[tuple[str, dict[str, Any]]]):
    source = completed(SourceConfig(preset=name, files=("x",)), "domains.qa")
    found = [problem for problem, _ in datasets.Reader(source, "domains.qa", "").problems(row)]
    assert [p.check for p in found] == [check for _, check in wanted]
    for problem, (start, _) in zip(found, wanted, strict=True):
        assert problem.prompt.startswith(start)


WRONG = [
    ("gsm8k", {"question": "Q", "answer": "no mark"}, "no answer after ####"),
    ("math", {"problem": "Q", "solution": r"\boxed{1"}, r"no whole \boxed{}"),
    ("mmlu_pro", {"question": "Q", "options": ["x", "y"], "answer": "C"}, "answer 'C' is none of the 2 options"),
    (
        "sciknoweval",
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "1"]}, "answerKey": "1"},
        "labels ['1', '1'] do not name 2 options",
    ),
    ("ifeval", {"prompt": "P", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "2 instruction ids and 1 kwargs"),
    ("longbench_write", {"prompt": "P", "length": "100"}, "of the wrong type for 'length'"),
    ("mbpp", {"text": "T", "test_list": [], "task_id": 5}, "list index out of range"),
    ("apps", {"question": "Q", "input_output": {"inputs": "abc", "outputs": "abc"}}, "inputs and outputs are no lists"),
]


@pytest.mark.parametrize("name, row, why", WRONG, ids=[w[0] for w in WRONG])
def test_wrong_rows_say_why(name: str, row: dict[str, Any], why: str):
    source = completed(SourceConfig(preset=name, files=("x",)), "domains.qa")
    with pytest.raises(datasets.BadRow) as caught:
        datasets.Reader(source, "domains.qa", "").problems(row)
    assert why in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_a_config_changes_what_it_likes(name: str):
    changed = completed(SourceConfig(preset=name, files=("a.jsonl",), system="Be brief.", n_test=7), "domains.qa")
    preset = PRESETS[name]
    assert (changed.files, changed.validation_files, changed.test_files) == (("a.jsonl",), (), ())
    assert (changed.system, changed.n_test) == ("Be brief.", 7)
    assert (changed.prompt, changed.check, changed.reward) == (preset.prompt, preset.check, preset.reward)
    assert callable(resolve(changed.reward))
    if preset.files:
        assert completed(SourceConfig(preset=name), "domains.qa") == dataclasses.replace(preset, preset=name)
    else:
        with pytest.raises(UserError, match=r"domains\.qa\.files is empty"):
            completed(SourceConfig(preset=name), "domains.qa")
