"""The command `score`: computes the rewards of completions in a JSON-lines file, with the rewards used in training."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mdrl_jax.errors import UserError
from mdrl_jax.progress import printable
from mdrl_jax.rewards import writing
from mdrl_jax.rewards.outputs import case_error
from mdrl_jax.rewards.pool import RewardPool


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)


def _are_constraints(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(c, dict) for c in value)


def _is_answer(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return (
        values != []
        and all(isinstance(v, str | int) or (isinstance(v, float) and math.isfinite(v)) for v in values)
        and not any(isinstance(v, bool) for v in values)
    )


def _are_cases(value: Any) -> bool:
    return isinstance(value, list) and value != [] and not any(map(case_error, value))


# domain -> (the key of a line that the reward checks against, the test of its value's form, that form in words)
_CHECKS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "math": ("answer", _is_answer, "a text, a number or a list of them"),
    "code": ("tests", _is_texts, 'a list of Python sources, and there are no "cases"'),
    "qa": ("answer", _is_answer, "a text, a number or a list of them"),
    "cw": ("constraints", _are_constraints, 'a list of {"kind": name, and its parameters}'),
}

_CASES = "cases", _are_cases, 'a list of {"stdin": text, "stdout": text}'


def run(domain: str, input_path: str, out: TextIO | None = None, workers: int | None = None) -> int:
    """Writes `{"reward", "error"}` for each line of a file, in the same order.

    A line holds a "completion" and the value that it is checked against: "answer" (math, qa), "tests" or "cases" (code)
    or "constraints" (cw). Of "tests" and "cases" in one line only "cases" count. A line of code may also hold the other
    keys of `rewards.code.passes_tests`, such as "prefix". If a qa line has "choices" (a list of texts), the completion
    has to choose the one that "answer" names by its letter, its index or its text.

    "reward" is in [0, 1]. "error" is null if the completion was judged. Otherwise it says why not, and the reward is 0.
    A line that is no JSON object, or lacks one of these values in the right form, gets the reward null and an error
    that names it; so does an empty line before others. An empty file gives no output. White space at the end of the
    file does not count.

    Args:
      domain: "math", "code", "qa" or "cw".
      input_path: the JSON-lines file.
      out: open text file that the results are written to; standard output by default.
      workers: number of worker processes, at least 1; one per core by default, and never more than lines.

    Returns:
      The number of lines that are not valid; the first is also named on standard error.

    Raises:
      UserError: if the domain is not known, the file cannot be read or is not UTF-8 text, `workers` is below 1, or if
        programs have to run and no sandbox works here. Nothing has been written.
      RuntimeError: if the workers do not start.
    """
    if domain not in _CHECKS:
        raise UserError(f"--domain={domain} is not known; give one of {', '.join(_CHECKS)}")
    rows = _read(domain, input_path)
    requests = [(_reward(domain, row[1]), *row) for row in rows if not isinstance(row, str)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_workers = min(workers or cores, max(1, len(requests)))
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    with RewardPool(n_workers) as pool:
        scores = iter(pool.score(requests))
        for row in rows:
            if isinstance(row, str):
                line = {"reward": None, "error": row}
            else:
                score = next(scores)
                line = {"reward": score.reward, "error": score.error}
            print(json.dumps(line), file=out or sys.stdout)
        (out or sys.stdout).flush()
    if bad := [row for row in rows if isinstance(row, str)]:
        told = f"{input_path}: {len(bad)} of {len(rows)} lines have no reward; first: {bad[0]}"
        print(printable(f"mdrl: error: {told}"), file=sys.stderr)
    return len(bad)


def _reward(domain: str, check: dict[str, Any]) -> str:
    return "mdrl_jax.rewards.qa:choice" if domain == "qa" and "choices" in check else domain


def _read(domain: str, path: str) -> list[tuple[str, dict[str, Any]] | str]:
    """(completion, check) of each line of a file, or what is wrong with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"--input={path} cannot be read ({e.strerror}); give a .jsonl file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--input={path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    lines = text.rstrip().split("\n") if text.strip() else []
    found: list[tuple[str, dict[str, Any]] | str] = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(_parse(domain, line, f"line {i}"))
        except UserError as e:
            found.append(str(e))
    return found


def _parse(domain: str, line: str, where: str) -> tuple[str, dict[str, Any]]:
    key, well_formed, form = _CHECKS[domain]
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e})") from e
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; give {{"completion", "{key}"}}')
    if not isinstance(row.get("completion"), str):
        raise UserError(f'{where}: "completion" is missing or not a text')
    if domain == "code" and "cases" in row:
        key, well_formed, form = _CASES
    if not well_formed(row.get(key)):
        raise UserError(f'{where}: "{key}" is missing or not {form} (domain {domain})')
    if fault := next(filter(None, map(writing.fault, row[key] if domain == "cw" else ())), ""):
        raise UserError(f"{where}: {fault}")
    if domain == "qa" and not _is_texts(row.get("choices", ["any"])):
        raise UserError(f'{where}: "choices" must be a list of texts')
    return row["completion"], {k: v for k, v in row.items() if k != "completion"}
