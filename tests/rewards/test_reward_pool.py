"""Laws of the pool: order, one call for identical requests, isolation, parallelism, no orphans."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rewards.worker import END

REWARDS = """
import os, sys, time

def sleep(completion, check):
    time.sleep(check["seconds"])
    return 1.0

def number(completion, check):
    print("noise on standard output", flush=True)
    os.write(1, b"more noise")
    return float(completion)

def read(completion, check):
    return float(sys.stdin.read() == "")

def log(completion, check):
    with open(check["file"], "a") as f:
        f.write(completion)
    return 1.0

def log_and_fail(completion, check):
    log(completion, check)
    raise OSError("not this time")

def fail(completion, check):
    raise ValueError("two\\nlines")

def leave(completion, check):
    sys.exit(0)

def die(completion, check):
    os._exit(3)

def spin(completion, check):
    while True:
        pass

def stubborn(completion, check):
    while True:
        try:
            time.sleep(100)
        except BaseException:
            pass

def order(completion, check):
    return float(str({"a", "b", "c", "d", "e"}) == check["order"])

def order_is(completion, check):
    raise ValueError(str({"a", "b", "c", "d", "e"}))
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """The full name of a reward function in a module that only sys.path leads to."""
    (tmp_path / "some_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return "some_rewards:{}".format


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a killed process stays as a zombie where nobody waits for orphans
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False if os.path.isdir("/proc/self") else True


def test_scores_come_in_order_of_requests_whatever_finishes_first(name) -> None:
    values = [i / 40 for i in range(40)]
    requests = [(name("number"), str(v), {}) for v in values]
    requests[0] = (name("sleep"), "", {"seconds": 0.3})
    with RewardPool(3) as pool:
        results = pool.score(requests)
        assert [s.reward for s in results] == [1.0, *values[1:]]
        assert [s.reward for s in pool.score(requests[:0:-1])] == values[:0:-1]
        assert not pool.errors and pool.score([]) == []


def test_identical_requests_are_computed_once(name, tmp_path: Path) -> None:
    file = tmp_path / "log"
    first = (name("log"), "a", {"file": str(file), "n": 1})
    same = (name("log"), "a", {"n": 1, "file": str(file)})
    other = (name("log"), "b", {"file": str(file), "n": 1})
    with RewardPool(2) as pool:
        assert [s.reward for s in pool.score([first, same, other, first])] == [1.0] * 4
        assert [s.reward for s in pool.score([other, first])] == [1.0] * 2
    assert sorted(file.read_text()) == ["a", "b"]


def test_what_failed_is_tried_again(name, tmp_path: Path) -> None:
    request = (name("log_and_fail"), "a", {"file": str(tmp_path / "log")})
    with RewardPool(1) as pool:
        assert all(pool.score([request])[0].error for _ in range(2))
        assert pool.errors["OSError"] == 2
    assert (tmp_path / "log").read_text() == "aa"


def test_one_bad_request_leaves_the_others_alone(name) -> None:
    bad = ["fail", "leave", "die", "spin", "missing"]
    good = [(name("number"), str(i / 8), {}) for i in range(8)]
    with RewardPool(2, cpu_seconds=1) as pool:
        results = pool.score([(name(b), "", {}) for b in bad] + good)
        errors = [s.error or "" for s in results[: len(bad)]]
        assert errors[0] == "ValueError: two lines"
        assert errors[1] == "SystemExit: 0"
        assert errors[2] == "worker died: exit status 3"
        assert errors[3] == "timeout: CPU time used up"
        assert errors[4].startswith("UserError: reward 'some_rewards:missing'")
        assert all(s.reward == s.accuracy == 0 for s in results[: len(bad)])
        assert [s.reward for s in results[len(bad) :]] == [i / 8 for i in range(8)]
        assert pool.errors == {
            "ValueError": 1, "SystemExit": 1, "worker died": 1, "timeout": 1, "UserError": 1
        }  # fmt: skip
        assert [s.reward for s in pool.score(good)] == [i / 8 for i in range(8)]


def test_a_hang_ends_at_the_deadline(name) -> None:
    begun = time.monotonic()
    with RewardPool(2, deadline_seconds=1) as pool:
        hang = [(name("sleep"), "", {"seconds": 100}), (name("stubborn"), "", {})]
        results = pool.score([*hang, (name("number"), "0.5", {})])
        assert [s.error and s.error.partition(":")[0] for s in results] == ["timeout"] * 2 + [None]
        assert results[2].reward == 0.5
    assert time.monotonic() - begun < 15


def test_sleeping_and_looping_programs_are_wrong_and_a_slow_one_is_an_error() -> None:
    with RewardPool(3, cpu_seconds=1, deadline_seconds=6) as pool:
        tests = {"tests": ["pass"]}
        slow = "import time\nwhile True:\n    time.sleep(0.4)\n    sum(range(10**5))"
        programs = ["import time; time.sleep(100)", "while True: pass", slow]
        slept, looped, slowed = pool.score([("code", program, tests) for program in programs])
        assert [s.reward for s in (slept, looped, slowed)] == [0, 0, 0]
        assert slept.error is None and looped.error is None
        assert slowed.error and slowed.error.startswith("timeout:")


def test_workers_run_at_the_same_time(name) -> None:
    requests = [(name("sleep"), str(i), {"seconds": 0.3}) for i in range(12)]
    with RewardPool(4) as pool:
        pool.score([(name("number"), str(i / 40), {}) for i in range(40)])  # all have started
        begun = time.monotonic()
        assert all(s.reward == 1 for s in pool.score(requests))
        assert time.monotonic() - begun < 2.0  # one after the other: 3.6 s; four at a time: 0.9 s


def test_input_is_empty_for_a_reward_function(name) -> None:
    with RewardPool(1, deadline_seconds=5) as pool:
        assert pool.score([(name("read"), "", {})])[0].reward == 1.0


def test_a_worker_killed_between_calls_is_replaced(name) -> None:
    with RewardPool(2) as pool:
        request = [(name("number"), "0.5", {})]
        pool.score(request)
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        assert pool.score(request)[0].reward == 0.5 and not pool.errors


def test_sets_have_one_order_in_every_worker(name) -> None:
    with RewardPool(1) as one, RewardPool(1) as other:
        order = one.score([(name("order_is"), "", {})])[0].error
        assert order
        check = {"order": order.partition(": ")[2]}
        assert other.score([(name("order"), "", check)])[0].reward == 1.0


def test_it_works_off_the_main_thread(name) -> None:
    results = []
    with RewardPool(1, cpu_seconds=1) as pool:
        requests = [(name("spin"), "", {}), (name("number"), "1", {})]
        thread = threading.Thread(target=lambda: results.extend(pool.score(requests)))
        thread.start()
        thread.join(30)
    assert [s.reward for s in results] == [0, 1] and results[0].error


def children(pid: int) -> list[int]:
    """Live direct children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(stat.parent.name))
    return found


def test_a_worker_that_is_ended_ends_its_program() -> None:
    results = []
    with RewardPool(1, cpu_seconds=2) as pool:
        requests = [("code", "import time; time.sleep(50)", {"tests": ["pass"]})]
        thread = threading.Thread(target=lambda: results.extend(pool.score(requests)))
        thread.start()
        worker = pool._workers[0].process
        while len(running := children(worker.pid)) < 2:  # the sandbox, and the process that holds the tests
            time.sleep(0.01)
        worker.send_signal(END)
        thread.join(30)
    assert results[0].error == "worker died: exit status 0"
    assert not any(alive(pid) for pid in running)


def test_close_ends_the_workers() -> None:
    with RewardPool(2) as pool:
        pids = [worker.process.pid for worker in pool._workers]
        folder = Path(pool._folder)
        assert all(alive(pid) for pid in pids) and folder.exists()
    assert not any(alive(pid) for pid in pids) and not folder.exists()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])


@pytest.mark.parametrize("as_main", ["-c", "file"])
def test_workers_end_when_their_parent_is_killed(as_main: str, tmp_path: Path) -> None:
    code = (
        "from mdrl_jax.rewards.pool import RewardPool\n"
        "import time\n"
        "pool = RewardPool(2)\n"
        "assert pool.score([('math', '4', {'answer': '4'})])[0].reward == 1\n"
        "print(pool._folder, *(w.process.pid for w in pool._workers), flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(code)
    args = ["-c", code] if as_main == "-c" else [str(tmp_path / "main.py")]
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": root},
        cwd=tmp_path,
    )
    assert parent.stdout is not None
    folder, *numbers = parent.stdout.readline().decode().split()
    pids = [int(number) for number in numbers]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2 and Path(folder).name.startswith("mdrl-rewards-")
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids) and not Path(folder).exists()


def test_a_worker_that_cannot_start_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="do not start"):
        with RewardPool(1) as pool:
            pool.score([("math", "4", {"answer": "4"})])
