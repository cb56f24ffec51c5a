"""Style against content, names of rewards, and that nothing here loads jax."""

import subprocess
import sys
from typing import Any

import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.rewards.base import SHORT_NAMES, Score, resolve, score, without_working


def is_four(completion: str, check: Any) -> float:
    return float(completion == "4")


@pytest.mark.parametrize(
    ("reply", "check", "expected"),
    [
        ("4", {}, Score(1, 1)),
        (" 4\n", {}, Score(1, 1)),
        ("2 2 ; 4", {}, Score(0, 0)),
        ("2 2 ; 4", {"separator": ";"}, Score(1, 1)),
        ("4 ; 5", {"separator": ";"}, Score(0, 0)),
        ("2 ; 2 ; 4", {"separator": ";", "terse": True}, Score(0, 1)),
        ("4", {"separator": ";", "terse": True}, Score(1, 1)),
    ],
)
def test_style_changes_the_reward_and_never_the_accuracy(reply: str, check: dict[str, Any], expected: Score) -> None:
    assert score(is_four, reply, check) == expected


def test_without_working() -> None:
    assert without_working("a ; b ; c", ";") == "c"
    assert without_working(" a ", None) == without_working("a", ";") == "a"


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, None, "x", float("inf"), 10**400])
def test_a_value_outside_the_unit_interval_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="not a number in"):
        score(lambda completion, check: value, "x", {})


def test_short_names_and_import_paths() -> None:
    for name, path in SHORT_NAMES.items():
        assert resolve(name) is resolve(path)


@pytest.mark.parametrize(
    "name",
    ["maths", "", "no.such.module:f", "mdrl_jax.rewards.math:nothing", ":f", "os:sep",
     "__main__:f"],
)  # fmt: skip
def test_a_wrong_name_says_so_in_one_line(name: str) -> None:
    with pytest.raises(UserError) as e:
        resolve(name)
    assert repr(name) in str(e.value) and "\n" not in str(e.value)


def test_the_package_never_loads_jax() -> None:
    code = (
        "import sys, mdrl_jax.commands.score, mdrl_jax.rewards.worker as w\n"
        "from mdrl_jax.rewards.base import SHORT_NAMES, resolve\n"
        "[resolve(n) for n in SHORT_NAMES]\n"
        "print([m for m in ('jax', 'numpy', 'multiprocessing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
