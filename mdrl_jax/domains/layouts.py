"""Rows of public data sets as the fields that prompts and checks use: one function a layout, named in `FIELDS`.

A function gets a row and gives its fields, or a list of them: several for a passage with many questions, none for a
row that cannot be asked. A field `split` says which split the source puts the row in ("train", "validation", "test",
anything else: none). What is missing raises KeyError, what is wrong ValueError; both make a bad row.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
Fields = dict[str, Any]


def gsm8k(row: Row) -> Fields:
    """GSM8K: a worked solution whose answer follows `####`."""
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("no answer after ####")
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}


def boxed(text: str) -> str:
    r"""What the last `\boxed{...}` of a text holds.

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
    r"""MATH, MATH-500, AIME and OpenR1-Math: `problem` with an `answer`, or with a solution that ends in `\boxed{}`."""
    answer = row["answer"] if row.get("answer") is not None else boxed(row["solution"])
    return {"question": row["problem"], "answer": str(answer)}


def openr1(row: Row) -> list[Fields]:
    """OpenR1-Math without its proofs, which have no answer to compare with."""
    proof = row.get("question_type") == "proof" or str(row["answer"]).strip().lower() in ("", "proof")
    return [] if proof else [math(row)]


def mbpp(row: Row) -> Fields:
    """MBPP, full or sanitized: the first of its tests is shown, because it has the function's name."""
    tests = row["test_list"]
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
    task, example = row["task_id"], tests[0]
    split = "test" if 11 <= task <= 510 else "validation" if 511 <= task <= 600 else "train" if task > 600 else "prompt"
    return {
        "task": row["text"] if "text" in row else row["prompt"],
        "example": example,
        "tests": [*row.get("test_imports", ()), *tests],
        "setup": "\n".join(setup),
        "split": split,
    }


def humaneval(row: Row) -> Fields:
    """HumanEval: a signature and docstring to be completed, and a `check` function."""
    return {"stub": row["prompt"], "tests": [row["test"], f"check({row['entry_point']})"]}


def klear_code(row: Row) -> list[Fields]:
    """KlearReasoner-CodeSub: a chat message, and tests as JSON. Rows judged by standard input are left out."""
    truth = json.loads(row["reward_model"]["ground_truth"])
    functional = truth.get("functional") if isinstance(truth, dict) else None
    return [{"task": row["prompt"][-1]["content"], "tests": [functional]}] if functional else []


def squad(row: Row) -> list[Fields]:
    """SQuAD, XQuAD: an article of the original file, or a question of the hub's flat rows."""
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
    """Multiple choice as options "A. ..." and a letter: MMLU (csv columns or hub), MMLU-Pro, SuperGPQA, SciKnowEval.

    Questions of SciKnowEval that have no choices are left out.
    """
    letters, answer = string.ascii_uppercase, None
    if "A" in row:  # columns of MMLU's csv files
        options, answer = [row[letter] for letter in "ABCD"], row["answer"]
    elif "options" in row:
        options, answer = row["options"], row.get("answer_letter") or row["answer"]
    elif isinstance(row["choices"], Mapping):
        options, letters = row["choices"]["text"], row["choices"]["label"]
        answer = row.get("answerKey")
        if not options:
            return []
    else:
        options, answer = row["choices"], letters[row["answer"]]
    if len(options) < 2 or answer not in list(letters)[: len(options)]:
        raise ValueError(f"answer {answer!r} is none of the {len(options)} options")
    texts = [str(option).strip() for option in options]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False))
    return [{"question": row["question"].strip(), "options": listed, "letter": answer, "choices": texts}]


def ifeval(row: Row) -> Fields:
    """IFEval: instruction kinds beside their arguments; arguments that are None were filled in by the file format."""
    kinds, arguments = row["instruction_id_list"], row["kwargs"]
    if len(kinds) != len(arguments):
        raise ValueError(f"{len(kinds)} instructions with {len(arguments)} kwargs")
    constraints = [
        {"kind": kind, **{key: value for key, value in (given or {}).items() if value is not None}}
        for kind, given in zip(kinds, arguments, strict=True)
    ]
    return {"prompt": row["prompt"], "constraints": constraints}


FIELDS: dict[str, Callable[[Any], Fields | list[Fields]]] = {
    "gsm8k": gsm8k,
    "math": math,
    "openr1": openr1,
    "mbpp": mbpp,
    "humaneval": humaneval,
    "klear_code": klear_code,
    "squad": squad,
    "choices": choices,
    "ifeval": ifeval,
}
