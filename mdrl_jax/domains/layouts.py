"""Turns rows of public data sets into the fields that prompts and checks use: one function for each layout.

`FIELDS` names the functions. A function takes a row and returns a dict of fields, or a list of such dicts: several for
a passage with many questions, none for a row that cannot become a prompt. If a dict has a field `split`, it names the
split to which the source assigns the row: "train", "validation" or "test". Any other non-empty value keeps the row out
of every split. A missing field raises KeyError. A wrong value raises ValueError, or whatever Python raises when it is
used: TypeError, IndexError or AttributeError. All of these count as a bad row.
"""

import ast
import json
import re
import string
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mdrl_jax.rewards import writing

Row = Mapping[str, Any]
Fields = dict[str, Any]


def gsm8k(row: Row) -> Fields:
    """GSM8K: the row's `answer` holds a worked solution, then `####`, then the final answer.

    Returns:
      `question`, `answer` (the final answer as text, without commas) and `solution`, without the calculator's notes
      such as `<<48/2=24>>`.

    Raises:
      ValueError: if there is no `####`, or nothing after the last one.
    """
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("no answer after ####")
    steps = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "solution": steps}


def small_step(row: Row) -> list[Fields]:
    """Word problems of one step with small numbers: the row's `equation` is one operation on numbers up to 20.

    Such rows are kept as they are; any other row, such as one with two operations, gives no problem.

    Raises:
      KeyError, TypeError: if there is no `equation`, or it is no text.
    """
    step = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[-+*/]\s*(\d+(?:\.\d+)?)\s*", row["equation"])
    return [dict(row)] if step and max(map(float, step.groups())) <= 20 else []


def boxed(text: str) -> str:
    r"""Returns the content of the last `\boxed{...}` of a text, in which braces may be nested.

    Raises ValueError if there is none, or if the last one is not closed. A box without braces, such as `\boxed 5`, does
    not count.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    _, mark, rest = text.rpartition(r"\boxed{")
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[:i]
    raise ValueError(r"no whole \boxed{} in the solution" if mark else r"no \boxed{} in the solution")


def math(row: Row) -> Fields:
    r"""MATH, MATH-500, AIME and OpenR1-Math: `problem`, and `answer` or a `solution` with the answer in `\boxed{}`.

    Returns:
      `question`, the row's `problem`; `answer`, as text: that of the row unless it is absent or None, otherwise the
      content of the last box (`boxed`); and `solution` as the row has it, None if it has none.
    """
    answer = row["answer"] if row.get("answer") is not None else boxed(row["solution"])
    return {"question": row["problem"], "answer": str(answer), "solution": row.get("solution")}


def openr1(row: Row) -> list[Fields]:
    """OpenR1-Math. Proofs are left out, because they have no final answer to compare with.

    Returns:
      A list with the fields of `math` (`question`, `answer`, `solution`); [] if `question_type` or `answer` is "proof",
      or `answer` is empty.
    """
    proof = row.get("question_type") == "proof" or str(row["answer"]).strip().lower() in ("", "proof")
    return [] if proof else [math(row)]


def mbpp(row: Row) -> Fields:
    """MBPP, full or sanitized. The data set's own division by `task_id` gives the split.

    Returns:
      `task`: the text of the task. `example`: a copy of the first test, which shows the function's name; `tests` has
      this test too. `tests`: a list, the imports of the sanitized files and then all tests. `setup`: the set-up code,
      "" for none. `code`: the reference solution, with plain line breaks; None if the row has none. `split`: "test" for
      `task_id` 11 to 510, "validation" for 511 to 600 and "train" above; "prompt" for 1 to 10, which keeps these rows
      out of every split.
    """
    tests = row["test_list"]
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
    task, example = row["task_id"], tests[0]
    split = "test" if 11 <= task <= 510 else "validation" if 511 <= task <= 600 else "train" if task > 600 else "prompt"
    return {
        "task": row["text"] if "text" in row else row["prompt"],
        "example": example,
        "tests": [*row.get("test_imports", ()), *tests],
        "setup": "\n".join(setup),
        "code": "\n".join(row["code"].split("\r\n")) if row.get("code") else None,
        "split": split,
    }


def mbpp_last_line(row: Row) -> list[Fields]:
    """Functions of MBPP without their last line, which is a return statement of one line.

    A row is one of MBPP, as `mbpp` reads it, or has the parts already: `task`, `stub` (the function without the line),
    `line`, `indent` (its number of spaces) and `tests`.

    Returns:
      A list with one dict: the fields of `mbpp` except `code`; `stub`; `prefix`, the stub and the indentation of the
      missing line; and `line`, the line without its indentation. [] for a program of MBPP that is not valid Python, or
      whose last line is no such statement at the end of its last function.
    """
    if "stub" in row:
        given = {"text": row["task"], "test_list": row["tests"], "task_id": row["task_id"]}
        whole, stub, line, indent = mbpp(given), row["stub"], row["line"], int(row["indent"])
    else:
        whole = mbpp(row)
        code = (whole["code"] or "").rstrip().replace("\t", "    ")
        head, _, last = code.rpartition("\n")
        if not _ends_with_a_return(code):
            return []
        stub, line = f"{head}\n", last.strip()
        indent = len(last) - len(last.lstrip())
    fields = {key: value for key, value in whole.items() if key != "code"}
    return [fields | {"stub": stub, "prefix": stub + " " * indent, "line": line}]


def _ends_with_a_return(code: str) -> bool:
    """Whether the last line of a program is a whole return statement, the last one of its last function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as of "\d" in a text, from Python 3.12 on
            body = ast.parse(code).body
    except (SyntaxError, ValueError):
        return False
    last = body[-1].body[-1] if body and isinstance(body[-1], ast.FunctionDef) else None
    return isinstance(last, ast.Return) and last.lineno == last.end_lineno == code.count("\n") + 1


def humaneval(row: Row) -> Fields:
    """HumanEval: a signature with a docstring to complete, and a function `check` that tests the result.

    Returns:
      `stub`: the text to complete (`prompt` of the row). `tests`: a list of two texts, the source of `check` (`test`)
      and its call with the wanted function (`entry_point`). `solution`: the rest of the program
      (`canonical_solution`); None if the row has none.
    """
    tests = [row["test"], f"check({row['entry_point']})"]
    return {"stub": row["prompt"], "tests": tests, "solution": row.get("canonical_solution")}


def klear_code(row: Row) -> Fields:
    """KlearReasoner-CodeSub: a chat message, and tests or cases of standard input and output as JSON.

    Returns:
      `task`, the text of the last message, and one of two fields: `tests`, a list with the text of the functional test,
      if the row has one; otherwise `cases` (see the function `cases`).
    """
    truth = json.loads(row["reward_model"]["ground_truth"])
    functional = truth.get("functional") if isinstance(truth, dict) else None
    checked = {"tests": [functional]} if functional else {"cases": cases(truth)}
    return {"task": row["prompt"][-1]["content"], **checked}


def contest(row: Row) -> list[Fields]:
    """Problems judged by standard input and output: APPS, TACO, LiveCodeBench and Codeforces.

    The task is the first of `question`, `question_content`, `description` and `problem` that is not empty in the row.
    The cases are all those of `input_output`, `public_test_cases`, `private_test_cases`, `official_tests` and
    `test_cases` together, in this order; each of these fields is a JSON text or a value that `cases` reads, and may be
    absent or empty.

    Returns:
      A list with one dict: `task` and `cases`; [] for a problem that is judged by calling a function, i.e. if one of
      these fields has a `fn_name` or a case of `testtype` "functional".

    Raises:
      ValueError: if the row has no task or no cases, or a field with cases is not valid JSON; or as in `cases`.
      KeyError or TypeError: as in `cases`.
    """
    names = ("question", "question_content", "description", "problem")
    task = next((row[key] for key in names if row.get(key)), None)
    if task is None:
        raise ValueError(f"no task in any of {', '.join(names)}")
    found: list[dict[str, str]] = []
    for key in ("input_output", "public_test_cases", "private_test_cases", "official_tests", "test_cases"):
        value = row.get(key)
        if not value:
            continue
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, Mapping) and value.get("fn_name"):
            return []
        if isinstance(value, list) and any(isinstance(v, Mapping) and v.get("testtype") == "functional" for v in value):
            return []
        found += cases(value)
    if not found:
        raise ValueError("no cases of standard input and output")
    return [{"task": task, "cases": found}]


def cases(value: Any) -> list[dict[str, str]]:
    """Reads cases of standard input and output in any of the forms of public data sets.

    Args:
      value: {"inputs": list, "outputs": list}, or a list of {"input", "output"} or {"stdin", "stdout"}. Each text may
        also be a list of lines.

    Returns:
      [{"stdin": text, "stdout": text}, ...], in the same order; [] without cases. The lines of a list are joined by
      line breaks.

    Raises:
      KeyError: if an input or an output is missing.
      ValueError: if "inputs" and "outputs" are no lists or of different lengths, or if an input or an output is neither
        a text nor a list of texts.
      TypeError: if `value` is neither a mapping nor a list of mappings.
    """
    if isinstance(value, Mapping):
        inputs, outputs = value["inputs"], value["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise ValueError("inputs and outputs are no lists")
        pairs = list(zip(inputs, outputs, strict=True))
    else:
        pairs = [(v["stdin"], v["stdout"]) if "stdin" in v else (v["input"], v["output"]) for v in value]
    return [{"stdin": _lines(given), "stdout": _lines(wanted)} for given, wanted in pairs]


def _lines(text: Any) -> str:
    if isinstance(text, list):
        return "\n".join(map(_lines, text))
    if not isinstance(text, str):
        raise ValueError(f"{str(text)[:40]!r} is no text of a standard input or output")
    return text


def squad(row: Row) -> list[Fields]:
    """SQuAD and XQuAD: a row is an article of the original file, or one question of the hub's flat files.

    Returns:
      One dict for each question: `context`, `question`, and `answers`, the list of different accepted texts. In an
      article, a question without answers is left out. In a flat row it has an empty list, which counts as a bad row.
    """
    if "paragraphs" not in row:
        return [_question(row["context"], row["question"], row["answers"]["text"])]
    return [
        _question(passage["context"], asked["question"], [answer["text"] for answer in asked["answers"]])
        for passage in row["paragraphs"]
        for asked in passage["qas"]
        if asked["answers"]
    ]


def _question(context: str, question: str, answers: Iterable[str]) -> Fields:
    return {"context": context, "question": question, "answers": list(dict.fromkeys(answers))}


def choices(row: Row) -> list[Fields]:
    """Multiple choice: MMLU (csv files or hub), MMLU-Pro, SuperGPQA, ARC and SciKnowEval.

    The options are always lettered from A. Other labels of the row, such as ARC's "1" to "4", only say which option is
    right.

    Returns:
      A list with one dict: `question`; `options`, the options as lines "A. ..."; `letter`, the right letter; `choices`,
      the list of the options' texts, without white space at their ends; and `subfield` and `difficulty` of SuperGPQA,
      if the row has them. [] for a question of SciKnowEval without choices.

    Raises:
      ValueError: if there are not 2 to 26 options, if the answer is none of them, or if the row's labels are repeated
        or are not as many as the options.
      IndexError: if the answer is given by an index above 25.
    """
    letters = list(string.ascii_uppercase)
    labels, answer = letters, None
    if "A" in row:  # columns of MMLU's csv files
        options, answer = [row[letter] for letter in "ABCD"], row["answer"]
    elif "options" in row:
        options, answer = row["options"], row.get("answer_letter") or row["answer"]
    elif isinstance(row["choices"], Mapping):
        options, labels = row["choices"]["text"], [str(label) for label in row["choices"]["label"]]
        answer = str(row.get("answerKey"))
        if not options:
            return []
        if len(labels) != len(options) or len(set(labels)) != len(labels):
            raise ValueError(f"labels {labels} do not name {len(options)} options")
    else:
        options, answer = row["choices"], letters[row["answer"]]
    labels = labels[: len(options)]
    if not 2 <= len(options) <= len(letters) or answer not in labels:
        raise ValueError(f"answer {answer!r} is none of the {len(options)} options")
    texts = [str(option).strip() for option in options]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False))
    letter = letters[labels.index(answer)]
    kept = {name: row[name] for name in ("subfield", "difficulty") if name in row}
    return [{"question": row["question"].strip(), "options": listed, "letter": letter, "choices": texts, **kept}]


def ifeval(row: Row) -> Fields:
    """IFEval: a list of instruction ids and a list of their arguments, which the file format pads (`writing.unpadded`).

    Returns:
      `prompt`, and `constraints`: one `{"kind": id, **arguments}` for each instruction, without the padding.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: as in `writing.listed`.
    """
    check = {key: row[key] for key in ("instruction_id_list", "kwargs")}
    return {"prompt": row["prompt"], "constraints": writing.listed(check)}


FIELDS: dict[str, Callable[[Any], Fields | list[Fields]]] = {
    "gsm8k": gsm8k,
    "small_step": small_step,
    "math": math,
    "openr1": openr1,
    "mbpp": mbpp,
    "mbpp_last_line": mbpp_last_line,
    "humaneval": humaneval,
    "klear_code": klear_code,
    "contest": contest,
    "squad": squad,
    "choices": choices,
    "ifeval": ifeval,
}
