"""The code reward: which text is the program, and the reference solutions of MBPP."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.code import program
from mdrl_jax.rewards.pool import RewardPool


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nor\n```Python\nx = 2\n```\nDone.", "x = 2\n"),
        ("```python\nx = 1\n```\n```\noutput\n```", "x = 1\n"),
        ("```py\r\nx = 1\r\n```", "x = 1\r\n"),
        ('```python\ns = """```"""\n```', 's = """```"""\n'),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_program(reply: str, expected: str) -> None:
    assert program(reply) == expected


def scores(requests: list[tuple[str, dict[str, Any]]]) -> list[Score]:
    with RewardPool(2, cpu_seconds=2) as pool:
        return pool.score([("code", reply, check) for reply, check in requests])


def test_all_or_nothing() -> None:
    double = "def f(x): return 2 * x"
    right, wrong = "assert f(4) == 8", "assert f(4) == 9"
    results = scores(
        [
            (double, {"tests": [right]}),
            (f"So:\n```python\n{double}\n```", {"tests": [right, right]}),
            (double, {"tests": [right, wrong]}),
            (double, {"tests": ["assert f(y) == 6"]}),
            (double, {"tests": ["assert f(y) == 6"], "setup": "y = f(1) + 1"}),
            ("while True: pass", {"tests": [right]}),
        ]
    )
    assert [s.reward for s in results] == [1, 1, 0, 0, 1, 0]
    assert all(s.error is None for s in results)


def test_tests_that_prove_nothing_are_errors() -> None:
    results = scores([("x = 1", {"tests": []}), ("x = 1", {"tests": ["assert ("]})])
    assert [s.reward for s in results] == [0, 0]
    assert all(s.error and s.error.startswith("ValueError") for s in results)


def test_mbpp_references_pass_and_empty_programs_fail(shared: Path) -> None:
    # Every twelfth, and those whose set-up comes after, that shadow a builtin or use a module in a test.
    text = (shared / "data/code/mbpp.jsonl").read_text()
    rows = [json.loads(line) for line in text.split("\n") if line]
    rows = [r for r in rows if r["task_id"] % 12 == 0 or r["task_id"] in (126, 367, 596, 601, 927)]
    assert len(rows) == 86
    checks = [{"tests": r["test_list"], "setup": r["test_setup_code"]} for r in rows]
    references = [(r["code"], check) for r, check in zip(rows, checks, strict=True)]
    assert {r["task_id"]: s.reward for r, s in zip(rows, scores(references), strict=True) if s.reward != 1} == {}
    assert [s.reward for s in scores([("", check) for check in checks])] == [0.0] * len(rows)
