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


FENCES = [
    ("1. First:\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done", "def f(x):\n    return x\n"),
    ("- a\n\t```py\n\tx = 1\n\t```", "x = 1\n"),
    ("> text\n  ~~~python\n  x = 1\n  ~~~", "x = 1\n"),
    ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
    ("```\nx = 1\n```", "x = 1\n"),
    ("```text\nhi\n```\n```\nx = 1\n```", "x = 1\n"),
    ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
    ("   ```python\n   if x:\n\n       y = 1\n   ```", "if x:\n\n    y = 1\n"),
    ("```python title=a.py\nx = 1\n```", "x = 1\n"),
]


@pytest.mark.parametrize(("reply", "expected"), FENCES)
def test_fences_of_every_kind(reply: str, expected: str) -> None:
    assert program(reply) == expected


STUB = 'import math\n\ndef area(r):\n    """Area of a circle.\n\n    >>> area(0)\n    0.0\n    """\n'
AREA = "    return math.pi * r ** 2\n"
LAST = "def f(x):\n  y = 2 * x\n"


@pytest.mark.parametrize(
    ("prefix", "reply", "right"),
    [
        (STUB, AREA, True),
        (STUB, "    return math.pi * r\n", False),
        (STUB, AREA + "\n\ndef other():\n    return 1\n", True),
        (STUB, STUB + AREA, True),
        (STUB, f"```python\n{STUB}{AREA}```", True),
        (STUB, f"```python\nimport math\ndef area(r):\n{AREA}```", True),
        (STUB, f"Here it is:\n```python\ndef area(r):\n{AREA}```", True),  # the import stays
        (STUB, f"```python\n{AREA}```", True),
        (STUB, "return math.pi * r ** 2", False),  # the indentation is the reply's
        (STUB, "", False),
        (LAST, "  return y", True),
        (LAST, "return y", False),
        (LAST, "    return y", False),
        (LAST + "  ", "return y", True),
        (LAST + "  ", "  return y", True),
        (LAST + "  ", "return y + 1", False),
        (LAST + "  ", "def f(x):\n    return 2 * x", True),
        (LAST, f"{LAST}  return y", True),
        (LAST, "  return None", False),
    ],
)
def test_a_reply_that_goes_on_with_a_given_beginning(prefix: str, reply: str, right: bool) -> None:
    tests = ["assert abs(area(2) - 12.566) < 1e-2"] if prefix == STUB else ["assert f(4) == 8"]
    assert scores([(reply, {"tests": tests, "prefix": prefix})])[0].reward == right


def last_line_rows(shared: Path) -> list[dict[str, Any]]:
    text = (shared / "data/code/mbpp_last_line.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


def last_line(rows: list[dict[str, Any]]) -> None:
    """Every missing line scores 1 and `return None` 0, with the indentation in the prompt or in the reply."""
    for given in (True, False):
        checks = [{"tests": r["tests"], "prefix": r["stub"] + " " * r["indent"] * given} for r in rows]
        for line, reward in (("", 1.0), ("return None", 0.0)):
            replies = [" " * r["indent"] * (not given) + (line or r["line"]) for r in rows]
            found = scores(list(zip(replies, checks, strict=True)))
            assert {r["task_id"]: s for r, s in zip(rows, found, strict=True) if s.reward != reward} == {}


def test_missing_last_lines(shared: Path) -> None:
    last_line(last_line_rows(shared)[::40])


@pytest.mark.slow
def test_all_missing_last_lines(shared: Path) -> None:
    last_line(last_line_rows(shared))


@pytest.mark.slow
def test_all_mbpp_references_pass_and_empty_programs_fail(shared: Path) -> None:
    text = (shared / "data/code/mbpp.jsonl").read_text()
    rows = [json.loads(line) for line in text.split("\n") if line]
    assert len(rows) == 974
    checks = [{"tests": r["test_list"], "setup": r["test_setup_code"]} for r in rows]
    for replies, reward in (([r["code"] for r in rows], 1.0), ([""] * len(rows), 0.0)):
        found = scores(list(zip(replies, checks, strict=True)))
        assert {r["task_id"]: s for r, s in zip(rows, found, strict=True) if s.reward != reward} == {}


def test_programs_import_the_listed_packages_and_no_others() -> None:
    right = {"tests": ["assert f() == 1"]}
    body = "\ndef f(): return 1"
    assert [
        s.reward for s in scores([(f"import {name}{body}", right) for name in ("numpy", "scipy.linalg", "sympy")])
    ] == [1] * 3
    others = ("jax", "transformers", "pytest", "mdrl_jax", "mdrl_jax.rewards.code", "tests")
    assert [s.reward for s in scores([(f"import {name}{body}", right) for name in others])] == [0] * len(others)
    with RewardPool(1, packages=()) as pool:
        assert (
            pool.score([("code", f"import numpy{body}", right), ("code", f"import math{body}", right)])[0].reward == 0
        )
