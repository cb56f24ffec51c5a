"""The sandbox's outcomes, limits and freshness; hostile programs are test_hostile.py's.

They run from a small interpreter of their own, since a process that runs jax must not fork.
"""

import json
import struct
import subprocess
import sys
import time
from typing import Any

import pytest

from mdrl_jax.rewards.sandbox import lockdown

DRIVER = """
import json, sys
from mdrl_jax.rewards.sandbox import run as sandbox
settings, runs = json.load(sys.stdin)
settings = sandbox.Settings(sandbox.Limits(**settings))
print(json.dumps([sandbox.run(program, tests, settings=settings) for program, *tests in runs]))
sandbox.close()
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
        timeout=120,
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
            [double, "exit(0)", FALSE],
        )
        == ["ok"] + ["failed"] * 7
    )


def test_limits_end_a_program() -> None:
    assert outcomes(
        ["while True: pass"],
        ["import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"],
        ["x = [0] * 10**10"],
        ["x = []\nwhile True: x.append(bytes(10**7))"],
        ["print('x' * 10**10)"],
        ["import ctypes; ctypes.string_at(0)"],
        ["open('file', 'w').write('x' * 10**7)"],
        ["pass", "while True: pass"],
    ) == ["timeout", "timeout", "memory", "memory", "memory", "crashed", "failed", "timeout"]


def test_a_program_that_uses_no_cpu_time_ends_early_and_one_that_does_at_the_deadline() -> None:
    begun = time.monotonic()
    sleep = ["import time; time.sleep(90)"], ["import time; time.sleep(0.7)"]
    assert outcomes(*sleep, deadline_seconds=60.0) == ["idle", "ok"]
    assert 3.7 < time.monotonic() - begun < 30
    busy = "import time\nwhile True:\n    time.sleep(0.3)\n    sum(range(10**5))"
    assert outcomes([busy], deadline_seconds=6.0, cpu_seconds=30, idle_seconds=5.0) == ["deadline"]


def test_asserts_count_under_python_optimize() -> None:
    assert outcomes(["pass", FALSE], ["assert False"], optimize=True) == ["failed", "failed"]


def test_each_run_has_a_fresh_folder_and_namespace_and_no_environment() -> None:
    assert outcomes(
        ["import os, math\nopen('left', 'w').write('x')\nleft = 1\nmath.pi = 3"],
        ["import os\nassert not os.listdir('.') and not os.getenv('PATH')"],
        ["import math; assert math.pi > 3.1"],
        ["left"],
        ["assert __name__ == '__main__'\nimport __main__; assert __main__.__dict__ is globals()"],
    ) == ["ok", "ok", "ok", "failed", "ok"]


def test_random_numbers_and_the_order_of_sets_are_the_same_in_every_run() -> None:
    draws = [[f"import random; assert random.random() < 0.5  # {i}"] for i in range(8)]
    first = outcomes(*draws)
    assert outcomes(*draws[::-1])[::-1] == first and set(first) == {"ok", "failed"}
    order = ["def f(): return ''.join({'a', 'b', 'c', 'd', 'e', 'g'})"]
    code = (
        "import os, sys; os.environ['PYTHONHASHSEED'] = '0'; "
        "import subprocess; print(subprocess.run([sys.executable, '-c', "
        "\"print(''.join({'a', 'b', 'c', 'd', 'e', 'g'}))\"], capture_output=True, text=True).stdout, end='')"
    )
    wanted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert len(wanted) == 6
    assert outcomes([*order, f"assert f() == {wanted!r}"]) == ["ok"]


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_verdict() -> None:
    code = (
        "from mdrl_jax.rewards.sandbox import isolation, run as sandbox\n"
        "isolation.choose('best')\n"
        "isolation._command.cache_clear()\n"
        "isolation._START = 'raise OSError(\"no limits here\")#{root}'\n"
        "try: sandbox.run('pass', ['pass'])\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did not start" in done.stdout and "no limits here" in done.stdout


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_valid_program(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockdown.platform, "machine", lambda: machine)
    program = lockdown.seccomp_filter()
    n = len(program) // 8
    assert len(program) % 8 == 0 and n < 4096  # the kernel's limit
    rows = list(struct.iter_unpack("=HBBI", program))
    jumps = [i + 1 + max(true, false) for i, (code, true, false, _) in enumerate(rows) if code & 0b111 == 5]
    assert jumps and max(jumps) < n and rows[-1][0] == 6  # every path ends in a return
