"""Reward for programs: 1.0 if every hidden test passes, else 0.0.

The program runs in a sandbox. The tests run outside it (`sandbox/tester.py` says what they can and cannot do), so the
program sees neither the tests nor the answers that they want.

A program that fails, loops, runs out of memory or exits early scores 0.0. Two cases are errors instead, because they do
not show that the program is wrong: an empty list of tests or a test that is not valid Python (ValueError), and a
program that reaches the wall-clock deadline before it has used its CPU time (TimeoutError). Such a program slept, or
the machine is badly overloaded.
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
    """Returns the last ```python block of the reply, or the whole reply if it has none."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def passes_tests(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the program and each of `check["tests"]` run without an exception, else 0.0.

    The program runs first, then `check["setup"]` if there is one, then the tests. The set-up code comes after the
    program because that of MBPP builds test data from the program's classes. Set-up and tests share one namespace.

    The function forks, so call it from a reward worker (`pool.py`) and not from a process that runs JAX.

    Args:
      completion: the reply; `program` finds the program in it.
      check: "tests", a list of Python sources, and perhaps "setup", one Python source.

    Raises:
      KeyError: if the check has no "tests".
      ValueError: if the list of tests is empty, or a test or the set-up is not valid Python.
      TimeoutError: if the wall-clock deadline comes before the program has used its CPU time.
      RuntimeError: if the sandbox could not be set up.
      UserError: if no sandbox works here, or bubblewrap is demanded (`sandbox.run.configure`) and does not work.
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
