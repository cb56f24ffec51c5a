"""Programs that are judged by standard input and output."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.commands import score
from mdrl_jax.domains import layouts
from mdrl_jax.rewards.outputs import same_output
from mdrl_jax.rewards.pool import RewardPool
from tests.rewards.contest import PROBLEMS


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(2, cpu_seconds=2) as made:
        yield made


def check(name: str, **options: Any) -> dict[str, Any]:
    problem = PROBLEMS[name]
    return {"cases": [{"stdin": i, "stdout": o} for i, o in problem.cases], **problem.options, **options}


def test_right_programs_score_1_and_wrong_ones_0(pool: RewardPool) -> None:
    assert len(PROBLEMS) >= 20
    requests = [("code", p.right, check(name)) for name, p in PROBLEMS.items()]
    assert {r[1]: s for r, s in zip(requests, pool.score(requests), strict=True) if s.reward != 1 or s.error} == {}
    requests = [("code", wrong, check(name)) for name, p in PROBLEMS.items() for wrong in p.wrong]
    assert {r[1]: s for r, s in zip(requests, pool.score(requests), strict=True) if s.reward != 0 or s.error} == {}


def test_partial_gives_the_share_of_cases_that_pass(pool: RewardPool) -> None:
    wrong = "print('YES')"
    whole, part = pool.score([("code", wrong, check("yes or no", partial=p)) for p in (False, True)])
    assert (whole.reward, part.reward) == (0, 2 / 3)


def test_programs_that_loop_sleep_fail_or_print_without_end_score_0(pool: RewardPool) -> None:
    programs = ["while True: pass", "import time; time.sleep(99)", "1 / 0", "print(3)\n1 / 0", "x = [0] * 10**10"]
    programs += [
        "while True: print('3' * 10**6)",
        "import os\nos._exit(0)",
        "print(3)\nimport os\nos.abort()",
        "(",
        "input(); input()",
    ]
    scores = pool.score([("code", p, {"cases": [{"stdin": "1 2\n", "stdout": "3\n"}]}) for p in programs])
    assert [(s.reward, s.error) for s in scores] == [(0, None)] * len(programs)


def test_a_case_sees_nothing_of_the_one_before(pool: RewardPool) -> None:
    keep = "import os, math\nn = input()\nprint(os.listdir('.'), hasattr(math, 'left'))\n"
    keep += "open('left', 'w').write(n); math.left = n"
    cases = [{"stdin": str(i), "stdout": "[] False"} for i in range(3)]
    assert pool.score([("code", keep, {"cases": cases})])[0].reward == 1


@pytest.mark.parametrize(
    ("got", "wanted", "options", "same"),
    [
        ("3\n", "3", {}, True),
        ("3 \n\n", "3", {}, True),
        ("  3", "3", {}, True),
        ("1  2", "1 2", {}, True),
        ("1\n2", "1 2", {}, False),
        ("1\n2", "1 2", {"layout": "words"}, True),
        ("1\n\n2", "1\n2", {}, False),
        ("2.50", "2.5", {}, True),
        ("2.5e0", "2.5", {}, True),
        ("1.0000001", "1", {}, False),
        ("1.0000001", "1", {"tolerance": 1e-6}, True),
        ("1.00001", "1", {"tolerance": 1e-6}, False),
        ("1000000.5", "1000000", {"tolerance": 1e-6}, True),  # relative
        ("0.0000005", "0", {"tolerance": 1e-6}, True),  # absolute
        ("-0.0", "0", {}, True),
        ("nan", "1", {"tolerance": 0.5}, False),
        ("inf", "1", {"tolerance": 0.5}, False),
        ("1e9999999", "1", {"tolerance": 0.5}, False),
        ("9" * 5000, "9" * 5000, {}, True),
        ("9" * 5000, "9" * 4999 + "8", {}, False),
        ("yes", "YES", {}, False),
        ("", "", {}, True),
        ("", "0", {}, False),
        ("1 2 3", "1 2", {}, False),
        ("0x10", "16", {}, False),
        ("1_0", "10", {}, False),
        ("१", "1", {}, False),
    ],
)
def test_outputs_are_compared_as_graders_do(got: str, wanted: str, options: dict[str, Any], same: bool) -> None:
    assert same_output(got, wanted, **options) is same


@pytest.mark.parametrize(
    "bad",
    [
        {"cases": []},
        {"cases": {"stdin": "1", "stdout": "1"}},
        {"cases": [{"stdin": "1"}]},
        {"cases": [{"stdin": 1, "stdout": "1"}]},
        {"cases": [{"stdin": "1", "stdout": "1"}], "tolerance": "1e-6"},
        {"cases": [{"stdin": "1", "stdout": "1"}], "tolerance": -1},
        {"cases": [{"stdin": "1", "stdout": "1"}], "layout": "line"},
        {"cases": [{"stdin": "1", "stdout": "1"}], "partial": 1},
    ],
)
def test_a_check_that_is_not_valid_is_an_error(pool: RewardPool, bad: dict[str, Any]) -> None:
    result = pool.score([("code", "print(1)", bad)])[0]
    assert result.reward == 0 and result.kind == "ValueError"


def test_score_takes_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = [{"stdin": "1 2", "stdout": "3"}]
    rows = [
        {"completion": PROBLEMS["sum of two numbers"].right, "cases": case},
        {"completion": "print(4)", "cases": case},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score.run("code", str(file))
    assert [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()] == [1, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
        {"question": "q", "input_output": {"inputs": [["1", ""]], "outputs": [["2", ""]]}},
        {
            "question_content": "q",
            "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        },
        {"description": "q", "official_tests": [{"input": "1\n", "output": "2\n"}]},
    ],
)
def test_public_layouts_give_the_same_cases(row: dict[str, Any]) -> None:
    assert layouts.contest(row) == [{"task": "q", "cases": [{"stdin": "1\n", "stdout": "2\n"}]}]


def test_problems_judged_by_a_function_are_left_out_and_none_is_an_error() -> None:
    functional = {"question": "q", "input_output": {"fn_name": "f", "inputs": [[1]], "outputs": [2]}}
    assert layouts.contest(functional) == []
    with pytest.raises(ValueError, match="no cases"):
        layouts.contest({"question": "q", "input_output": ""})
    with pytest.raises(ValueError):
        layouts.contest({"question": "q", "input_output": {"inputs": ["1"], "outputs": []}})


def test_klear_rows_give_tests_or_cases() -> None:
    prompt = [{"role": "user", "content": "q"}]
    for truth, key, value in (
        ({"functional": "assert f() == 1"}, "tests", ["assert f() == 1"]),
        ({"inputs": ["1"], "outputs": ["2"]}, "cases", [{"stdin": "1", "stdout": "2"}]),
        ([{"input": "1", "output": "2"}], "cases", [{"stdin": "1", "stdout": "2"}]),
    ):
        row = {"prompt": prompt, "reward_model": {"ground_truth": json.dumps(truth)}}
        assert layouts.klear_code(row) == {"task": "q", key: value}
