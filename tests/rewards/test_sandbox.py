"""Hostile and broken programs: each must end, by the right limit, without a verdict of "ok".

They run from a small interpreter of their own, since a process that runs jax must not fork.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DRIVER = """
import json, sys
from mdrl_jax.rewards import sandbox
settings, runs = json.load(sys.stdin)
print(json.dumps([sandbox.run(sources, sandbox.Limits(**settings)) for sources in runs]))
"""
FALSE = "assert False"


def outcomes(*runs: list[str], optimize: bool = False, **limits: Any) -> list[str]:
    settings = {"cpu_seconds": 1, "memory_mb": 256} | limits
    done = subprocess.run(
        [sys.executable, *(["-O"] if optimize else []), "-c", DRIVER],
        input=json.dumps([settings, runs]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_right_and_wrong_programs() -> None:
    double = "def f(x):\n    return 2 * x"
    assert (
        outcomes(
            [double, "assert f(4) == 8", "assert f(0) == 0"],
            [double, "assert f(4) == 8", "assert f(0) == 1"],
            ["def f(:"],
            ["\0"],
            ["raise KeyboardInterrupt"],
            ["y = undefined"],
            ["input()"],
        )
        == ["ok"] + ["failed"] * 6
    )


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('ok'); print(True)",
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'ok')\n except OSError: pass",
        "import os; os.closerange(0, 64)",
        "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
        "import os, atexit; atexit.register(print, 'ok'); os.write = os._exit = print",
        "AssertionError = AssertionError and type('E', (), {})",
        "import sys; sys.settrace(lambda *a: sys.exit(0))",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os; os.fork() and os._exit(0)",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
    ],
)
def test_no_cheat_scores(source: str) -> None:
    assert outcomes([source, FALSE]) == ["failed"]


def test_limits_end_a_program() -> None:
    assert outcomes(
        ["while True: pass"],
        ["import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"],
        ["x = [0] * 10**10"],
        ["x = []\nwhile True: x.append(bytes(10**7))"],
        ["print('x' * 10**10)"],
        ["import ctypes; ctypes.string_at(0)"],
        ["open('file', 'w').write('x' * 10**7)"],
    ) == ["timeout", "timeout", "memory", "memory", "memory", "crashed", "failed"]


def test_printing_without_end_costs_only_cpu_time() -> None:
    assert outcomes(["while True: print('x' * 10**6)"]) == ["timeout"]


def test_sleeping_ends_at_the_deadline_and_not_before() -> None:
    begun = time.monotonic()
    assert outcomes(["import time; time.sleep(30)"], ["import time; time.sleep(0.7)"], deadline_seconds=1.0) == [
        "deadline",
        "ok",
    ]
    assert 1.5 < time.monotonic() - begun < 20


def test_asserts_count_under_python_optimize() -> None:
    assert outcomes([FALSE], optimize=True) == ["failed"]


def test_a_child_process_left_behind_is_killed(tmp_path: Path) -> None:
    # Forked by native code, which the ban on os.fork does not see; it holds the verdict pipe too.
    mark = tmp_path / "alive"
    source = (
        "import ctypes, os, time\n"
        "if ctypes.CDLL(None).fork() == 0:\n"
        f"    time.sleep(2); open({str(mark)!r}, 'w'); os._exit(0)\n"
    )
    begun = time.monotonic()
    assert outcomes([source], [source + "os._exit(0)"]) == ["ok", "failed"]
    assert time.monotonic() - begun < 1.8
    time.sleep(2.2)
    assert not mark.exists()


def test_each_run_has_a_fresh_folder_and_namespace_and_no_environment() -> None:
    assert outcomes(
        ["import os, math\nopen('left', 'w').write('x')\nleft = 1\nmath.pi = 3"],
        ["import os\nassert not os.listdir('.') and not os.getenv('PATH')"],
        ["import math; assert math.pi > 3.1"],
        ["left"],
        ["assert __name__ == '__main__'", "import __main__; assert __main__.__dict__ is globals()"],
    ) == ["ok", "ok", "ok", "failed", "ok"]


def test_random_numbers_are_the_same_in_every_run() -> None:
    source = ["import random; assert random.random() == random.Random(0).random()"]
    assert outcomes(source, source) == ["ok", "ok"]


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_verdict() -> None:
    code = (
        "from mdrl_jax.rewards import sandbox\n"
        "def broken(*a): raise OSError('no limits here')\n"
        "sandbox._limit = broken\n"
        "try: sandbox.run(['pass'])\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no limits here" in done.stdout
