"""Reward for programs: 1.0 if every hidden test passes, else 0.0; or the share of cases, if the check asks for it.

A check has one of two kinds of tests:

- "tests": Python sources that call the program. They run in a sandbox of their own (`sandbox/tester.py` says what they
  can and cannot do), so the program sees neither the tests nor the answers that they want.
- "cases": inputs and outputs of a program that reads standard input. The program runs once for each input, and the
  outputs are compared here (`outputs.py`).

The program is found in the reply by `program`. A program that fails, loops, sleeps, runs out of memory or exits early
scores 0.0. Some outcomes are errors instead, because they do not show that the program is wrong:

- tests that are missing or not valid (ValueError);
- tests that ask for what plain data cannot decide (UnsupportedTest);
- a program that reaches the wall-clock deadline although it uses CPU time (TimeoutError), because the machine may be
  overloaded.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.rewards.outputs import LAYOUTS, case_error, same_output
from mdrl_jax.rewards.sandbox import run

# A fence of three or more backticks or tildes; the closing one has at least as many (CommonMark).
_FENCED = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^`\n]*\n"
    r"(?P<text>.*?)(?:^[ \t]*(?P=fence)[`~]*[ \t]*\r?$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = {"python", "python3", "py"}


def program(completion: str, prefix: str = "") -> str:
    """Returns the program of a reply.

    Its code is the last block that is fenced as Python (python, python3 or py), else the last fenced block without a
    language, else the whole reply. A block that is never closed goes to the end of the reply. A fence that is indented,
    as in a list, takes as much indentation from its lines.

    Without a prefix, this code is the program. With one, the first of these that fits is:

    1. Code that begins with the whole prefix, white space at its ends aside, is the program alone.
    2. Code that is valid Python and defines the last top-level function or class of the prefix anew replaces it: the
       program is what the prefix has before that definition, then the code.
    3. Otherwise the program is the prefix, then at once the code, without a line break between the two; the code keeps
       its indentation. If only this makes it valid, the indentation that ends the prefix is left out, because the code
       may begin with it again.

    Args:
      completion: the reply.
      prefix: the given beginning of the program; "" for none.

    Returns:
      The program. It need not be valid Python.
    """
    blocks = [match.groupdict() for match in _FENCED.finditer(completion)]
    chosen = [b for b in blocks if b["language"].lower() in _PYTHON] or [b for b in blocks if not b["language"]]
    code = _without_indent(chosen[-1]["text"], chosen[-1]["indent"]) if chosen else completion
    if not prefix:
        return code
    if code.lstrip().startswith(prefix.strip()):
        return code
    begins = _last_definition(prefix)
    if begins is not None and begins[1] in _definitions(code):
        return prefix[: begins[0]] + code
    joined = prefix + code
    bare = prefix.rstrip(" \t")
    # The prefix may end with the indentation of the next line, and the reply may begin with it again.
    if bare != prefix and not _is_valid(joined) and _is_valid(bare + code):
        return bare + code
    return joined


def _without_indent(text: str, indent: str) -> str:
    if not indent:
        return text
    lines = text.split("\n")
    return "\n".join(line[len(indent) :] if line.startswith(indent) else line.lstrip(" \t") for line in lines)


def _is_valid(source: str) -> bool:
    try:
        compile(source, "<program>", "exec", flags=ast.PyCF_ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _last_definition(prefix: str) -> tuple[int, str] | None:
    """(where the last top-level function or class of the prefix begins, with its decorators; its name)."""
    found = list(re.finditer(r"^(?:@[^\n]*\n)*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", prefix, re.MULTILINE))
    return (found[-1].start(), found[-1][1]) if found else None


def _definitions(source: str) -> set[str]:
    """The functions and classes that a program defines at its top level; none if it is not valid Python."""
    if not _is_valid(source):
        return set()
    body = ast.parse(source).body
    return {n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def passes_tests(completion: str, check: Mapping[str, Any]) -> float:
    """1.0 if the program passes every test of the check, else 0.0; with "partial", the share of the cases it passes.

    Of "tests", the program runs first, then `check["setup"]` if there is one, then the tests. The set-up code comes
    after the program because that of MBPP builds test data from the program's classes. Set-up and tests share one
    namespace. Of "cases", the program runs once for each, in order; without "partial" the first that fails is the last.

    The function starts sandboxes, so call it from a reward worker (`pool.py`). `sandbox.run.configure` sets the limits
    and the isolation.

    Args:
      completion: the reply; `program` finds the program in it.
      check: "tests", a list of Python sources, or "cases", a list of {"stdin": text, "stdout": text}. If it has both,
        only "cases" count. Perhaps "prefix", the beginning of the program. With "tests" perhaps "setup", one Python
        source, and "entry_point", the name of the function under test, which is needed only where it is a builtin's.
        With "cases" perhaps "tolerance", the largest absolute or relative error of a number, at least 0 and below 1 (by
        default 0); "layout", "lines" (the default) or "words" (`outputs.same_output`); and "partial", whether the
        reward is the share of the cases that pass (by default false).

    Raises:
      KeyError: if the check has neither "tests" nor "cases".
      ValueError: if the list of tests or cases is empty, or one of them or another value is not valid.
      TypeError: if "tests" is no list.
      UnsupportedTest: if the tests ask for what plain data cannot decide.
      TimeoutError: if the wall-clock deadline comes before the program has used its CPU time.
      RuntimeError: if a sandbox could not be set up.
      UserError: if the demanded isolation does not work here (`sandbox.isolation.choose`).
    """
    source = program(completion, _text(check, "prefix"))
    if check.get("cases") is not None:
        return _share_of_cases(source, check["cases"], check)
    tests = list(check["tests"])
    if not tests:
        raise ValueError("check['tests'] is empty: every program would pass")
    if check.get("setup"):
        tests.insert(0, check["setup"])
    for test in tests:
        try:
            compile(test, "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, TypeError) as e:
            raise ValueError(f"this test is not Python ({e}): {test!r}") from e
    return float(_decided(run.run(source, tests, _text(check, "entry_point"))) == "ok")


def _text(check: Mapping[str, Any], key: str) -> str:
    value = check.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"check[{key!r}] must be a text, not {str(value)[:40]!r}")
    return value


def _share_of_cases(source: str, cases: Sequence[Any], check: Mapping[str, Any]) -> float:
    tolerance, layout, partial = check.get("tolerance", 0.0), check.get("layout", "lines"), check.get("partial", False)
    if not isinstance(cases, list) or not cases:
        raise ValueError("check['cases'] must be a list of at least one case")
    if error := next((error for case in cases if (error := case_error(case))), ""):
        raise ValueError(error)
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 <= tolerance < 1:
        raise ValueError(f"check['tolerance']={tolerance!r} is not valid; it must be at least 0 and below 1")
    if layout not in LAYOUTS or not isinstance(partial, bool):
        raise ValueError(f"check['layout'] must be one of {', '.join(LAYOUTS)}, and check['partial'] true or false")
    passed = 0
    for case, (outcome, output) in zip(cases, run.run_script(source, [c["stdin"] for c in cases]), strict=False):
        right = _decided(outcome) == "ok" and same_output(output, case["stdout"], tolerance, layout)
        passed += right
        if not right and not partial:
            return 0.0
    return passed / len(cases)


def _decided(outcome: run.Outcome) -> run.Outcome:
    if outcome == "deadline":
        raise TimeoutError("the wall-clock deadline came before the program's CPU time was used")
    return outcome
