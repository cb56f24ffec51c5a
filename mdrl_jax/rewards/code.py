"""Reward for programs: 1.0 if every hidden test passes, else 0.0; the program runs in a sandbox.

The tests run outside it (tester.py says what they can and cannot do), so that a program sees neither them
nor the answers they want. A program that fails, loops, runs out of memory or leaves early scores 0.0. Only
two things are errors, so that neither passes for a wrong program: tests that are not Python (ValueError),
and a program stopped by the wall clock before it had used its CPU time (TimeoutError; it slept, or the
machine is badly overloaded).
"""

import re
from collections.abc import Mapping
from typing import Any

from mdrl_jax.rewards.sandbox import run

_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)(?:^[ \t]*```[ \t]*\r?$|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


def program(completion: str) -> str:
    """The last ```python block of the reply, the whole reply if it has none."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def passes_tests(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 iff the program and then each of `check["tests"]` run without an exception.

    In order: program, `check["setup"]` if there is one, tests (MBPP's set-up code builds test data out
    of the program's classes, so it comes after the program). Set-up and tests share one namespace.
    It forks, so call it from a reward worker (pool.py), not from a process that runs jax.

    Raises ValueError if there are no tests or one is not Python, TimeoutError at the deadline.
    """
    tests = list(check["tests"])
    if not tests:
        raise ValueError("check['tests'] is empty: every program would pass")
    if check.get("setup"):
        tests.insert(0, check["setup"])
    for test in tests:
        try:
            compile(test, "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as e:
            raise ValueError(f"this test is not Python ({e}): {test!r}") from e
    outcome = run.run(program(completion), tests)
    if outcome == "deadline":
        raise TimeoutError("the wall-clock deadline came before the program's CPU time was used")
    return float(outcome == "ok")
