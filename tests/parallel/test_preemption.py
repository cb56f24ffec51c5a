"""Tests of SIGTERM: the first one is noticed and ends the work in order, the second one ends the process at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.main import COMMANDS, main
from mdrl_jax.parallel import preemption
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import RewardPool
from tests.kills import assert_gone, descendants

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Runs its block within `preemption.watch`, after this process has noticed a SIGTERM."""
    with preemption.watch():
        assert not preemption.noticed()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not preemption.noticed():
            assert time.monotonic() < deadline
        yield


def test_a_signal_is_noticed_and_the_next_watch_knows_nothing_of_it():
    before = signal.getsignal(signal.SIGTERM)
    with told():
        assert preemption.noticed() and preemption.noticed()
    assert signal.getsignal(signal.SIGTERM) is before
    other = signal.signal(signal.SIGUSR1, lambda *_: None)
    with preemption.watch():
        signal.raise_signal(signal.SIGUSR1)  # its number is written to the same wake-up pipe
        time.sleep(0.2)
        preemption.check("nothing")
    signal.signal(signal.SIGUSR1, other)


def test_outside_the_main_thread_it_is_refused_and_nothing_is_left_open():
    errors = []

    def enter() -> None:
        try:
            with preemption.watch():
                errors.append(None)
        except ValueError as e:
            errors.append(e)

    opened = len(os.listdir("/proc/self/fd")), threading.active_count()
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert isinstance(errors[0], ValueError) and "main thread" in str(errors[0])
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == opened


def test_work_that_shows_how_far_it_is_stops_between_its_pieces_and_the_log_says_where(tmp_path: Path):
    done = []
    with pytest.raises(preemption.Stopped, match="stopped by SIGTERM during scores; what was finished is saved; start"):
        with Screen(tmp_path / "log.txt", "quiet") as screen, screen.steps("scores", 3) as show:
            show(0, "first")
            done.append("first")
            with told():
                show(1, "second")
            done.append("second")
    assert done == ["first"]
    assert (tmp_path / "log.txt").read_text().startswith("stopped by SIGTERM during scores; ")


def test_stopped_is_no_error_that_is_handled_and_the_status_is_the_signals(monkeypatch: pytest.MonkeyPatch):
    def execute(values: object) -> None:
        try:
            raise preemption.Stopped("after step 3 of math", "saved")
        except Exception:
            pytest.fail("Stopped was handled as an error")

    about, define, _ = COMMANDS["score"]
    monkeypatch.setitem(COMMANDS, "score", (about, define, execute))
    assert main(["mdrl", "score"]) == 143


class Never:
    """An array that a device never computes."""

    def is_ready(self) -> bool:
        return False


def test_a_wait_for_a_device_ends_at_once_and_work_that_must_be_whole_is_waited_for():
    with told():
        with pytest.raises(preemption.Dropped, match="stopped by SIGTERM while completions were sampled and judged"):
            preemption.until_ready([Never()])
        with preemption.whole():
            preemption.until_ready([np.float32(0) * jnp.zeros(())])
    preemption.until_ready([jnp.zeros(())])


def test_a_wait_for_rewards_ends_at_once_and_the_pool_is_as_before():
    def give_up() -> None:
        if late:
            raise preemption.Dropped

    late = False
    with RewardPool(1, give_up=give_up) as pool:
        assert pool.score([("code", "", {"tests": ["pass"]})])[0].reward == 1
        late, started = True, time.monotonic()
        with pytest.raises(preemption.Dropped):
            pool.score([("code", "while True: pass", {"tests": ["pass"]})])
        late = False
        assert time.monotonic() - started < 4
        assert pool.score([("code", "a = 1", {"tests": ["assert a == 1"]})])[0].reward == 1


def test_dropped_work_is_named_by_the_step_it_belongs_to(tmp_path: Path):
    with pytest.raises(preemption.Stopped, match="stopped by SIGTERM during scores; what was finished is saved; start"):
        with Screen(tmp_path / "log.txt", "quiet") as screen, screen.steps("scores", 3):
            raise preemption.Dropped


BUSY = """
import hashlib, sys
from mdrl_jax.parallel import preemption
with preemption.watch():
    print("busy", flush=True)
    with preemption.unsaved():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # like a compilation, it runs no Python code until it ends
    print("noticed" if preemption.noticed() else "not noticed", flush=True)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_second_signal_ends_the_process_even_where_no_python_runs(signals: int):
    """After one signal the process finishes the call that it is in."""
    rounds = "30_000_000" if signals == 2 else "3_000_000"
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.replace("30_000_000", rounds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    said = process.communicate(timeout=120)[0]
    assert (process.returncode, said) == ((0, "noticed\n") if signals == 1 else (143, ""))


def test_a_process_that_does_not_stop_in_order_is_ended_with_a_line():
    """Ctrl-C during what runs no Python code, such as a compilation, while nothing is unsaved."""
    script = BUSY.replace("watch()", "watch(0.1)").replace("preemption.unsaved()", 'preemption.during("math")')
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    line = f"stopped by Ctrl-C during math; what was finished is saved; {preemption.AGAIN}\n"
    assert (process.returncode, *said) == (130, "", line)


def test_rewards_are_judged_to_the_end_when_every_process_is_told_to_end():
    """SLURM and systemd send SIGTERM to every process of a job.

    If it ended a reward computation, the reward would be 0, and the training step would be another one.
    """
    slow = "import time; time.sleep(1.5); answer = 42"
    requests = [("code", slow, {"tests": ["assert answer == 42"]})]
    with RewardPool(1) as pool:
        assert pool.score([("code", "", {"tests": ["pass"]})])[0].reward == 1
        found: list[Score] = []
        thread = threading.Thread(target=lambda: found.extend(pool.score(requests)))
        thread.start()
        time.sleep(0.5)
        told = descendants(os.getpid())
        assert thread.is_alive() and len(told) >= 3  # the worker, the process with the tests, the sandbox
        for pid in told:
            os.kill(pid, signal.SIGTERM)
        thread.join()
    assert [(s.reward, s.error) for s in found] == [(1.0, None)]
    assert_gone(told)
