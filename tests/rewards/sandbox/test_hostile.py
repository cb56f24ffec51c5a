"""Hostile programs and tests neither score nor escape, hang or harm their neighbours, with bubblewrap and without it.

A sample of each kind runs always, the whole suite with `-m slow`.
"""

import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.commands import score as score_command
from mdrl_jax.errors import UserError
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import Request, RewardPool
from mdrl_jax.rewards.sandbox import isolation, server
from tests.rewards.sandbox.hostile_answers import ANSWERS, EVALUATED, PROTOCOL
from tests.rewards.sandbox.hostile_calls import CALLS
from tests.rewards.sandbox.hostile_programs import PROGRAMS, Attack
from tests.rewards.sandbox.hostile_scripts import CASES, CLEAN, RIGHT, SCRIPTS
from tests.rewards.sandbox.hostile_scripts import TESTS as HOSTILE_TESTS

# One of each form in which tests meet a result: equal, nearly equal, looped over, caught.
TESTS = (
    "assert f(4) == 8",
    "assert abs(f(3) - 6) < 1e-6",
    "import math\nassert math.isclose(f(3), 6)",
    "for a, b in zip(map(f, (1, 2)), (2, 4)):\n    assert a == b",
    "assert f(-1) in [-2]",
    "try:\n    good = f(0.5) == 1\nexcept Exception:\n    good = False\nassert good",
)
KINDS = {"timeout", "UnsupportedTest"}  # the errors that a program may cause; a broken sandbox would be another one
DEADLINE = 10.0
SUITE = {**PROGRAMS, **CALLS, **ANSWERS, **EVALUATED, **PROTOCOL}
SAMPLE = {
    *("infinite loop in a call", "memory bomb", "fork once", "thread bomb", "fill the disk", "write outside", "TCP"),
    *("kill the test", "leave before the tests", "never unequal", "write a verdict to every descriptor"),
    *("fork by clone3", "name a receiver of signals (F_SETOWN)", "open_by_handle_at", "file_setattr", "i386 call"),
    *("reset the deadline", "memory in descriptors of threads", "names that cleaning could use"),
    *("the project's package", "array that is near to all", "class in CapWords that contains all"),
    *("context that swallows the failure", "own error that is AssertionError", "instance with a new method"),
    *("pickle of a dotted name", "text for sympify", "class of error that stops a loop", "array of a huge shape"),
    *("ask for a name", "deep nesting"),
}
SAMPLE_SCRIPTS = {
    "file left deep below",
    "file left behind names that cleaning could use",
    "output closed, then a sleep",
}
SAMPLE_TESTS = {
    *("read the user's file", "network", "kill the worker", "loop for ever", "a part of a verdict"),
    *("leave a file that cleaning does not reach", "replace the scratch folder", "leave 60,000 folders"),
}


@dataclass
class Outcome:
    """What came of many requests in one pool.

    Attributes:
      missing: what the isolation says it lacks.
      hostile: the scores of each attack.
      honest: the scores of the right programs between them.
      before, after: median time of a small request in ms, before and after.
      closing: seconds that the pool took to close.
      left: processes that still run some seconds after.
      outside: the files of the user's folders.
      temporary: how many temporary files there were at the end.
    """

    missing: tuple[str, ...]
    hostile: dict[str, list[Score]]
    honest: list[Score]
    before: float
    after: float
    closing: float
    left: list[int]
    outside: dict[str, str]
    temporary: int


def children(pids: set[int]) -> set[int]:
    """All live descendants of the processes."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found = set(pids)
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - pids


def with_argument(text: str) -> list[int]:
    """The processes whose command contains a text."""
    found: list[int] = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(command.parent.name)] if text.encode() in command.read_bytes() else []
        except OSError:
            continue
    return found


def median_ms(pool: RewardPool, first: int) -> float:
    times: list[float] = []
    for i in range(first, first + 15):
        begun = time.perf_counter()
        assert pool.score([("code", f"def f(x): return 2 * x + {i} - {i}", {"tests": [TESTS[0]]})])[0].reward == 1
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def honest(i: int) -> Request:
    """A right program of one of three kinds; `i` makes it a new one."""
    checks: list[tuple[str, dict[str, Any]]] = [
        (f"def f(x): return 2 * x + {i} - {i}", {"tests": [CLEAN]}),
        (f"class Twice:\n    n = {i}\n    def of(self, x): return 2 * x", {"tests": ["assert Twice().of(4) == 8"]}),
        (f"x = int(input())\nassert {i} < 10**9\nopen('mine', 'x').close()\nprint(2 * x)", {"cases": CASES}),
    ]
    return ("code", *checks[i % len(checks)])


def attacks(fill: dict[str, Any], whole: bool) -> dict[str, tuple[str, list[Request]]]:
    """name -> (what must be isolated, the requests), of the whole suite or of the sample."""
    found: dict[str, tuple[str, list[Request]]] = {}
    for name, (program, needs, tests) in SUITE.items():
        if whole or name in SAMPLE:
            # An attack on the judge may fool one form of test and not the next: each alone.
            forms = tests or (TESTS if needs == "judge" else TESTS[:1])
            chosen = forms if whole else forms[:2]
            found[name] = needs, [("code", program.format(**fill), {"tests": [t]}) for t in chosen]
    for name, attack in SCRIPTS.items():
        if whole or name in SAMPLE_SCRIPTS:
            found[f"script: {name}"] = attack.needs, [("code", attack.program.format(**fill), {"cases": CASES})]
    for name, attack in HOSTILE_TESTS.items():
        if whole or name in SAMPLE_TESTS:
            found[f"tests: {name}"] = attack.needs, [("code", RIGHT, {"tests": [attack.program.format(**fill)]})]
    return found


def run(kind: str, folder: Path, whole: bool) -> Outcome:
    """Runs the attacks in a pool of two workers, with a right program after every second of them."""
    isolation.probe.cache_clear()
    outside, home = folder / "outside", folder / "home"
    (home / ".local").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (home / ".bashrc").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDRL_SECRET", "secret")
        if kind == "bare":
            patch.setattr(isolation.shutil, "which", lambda name: None)
            patch.setenv("PATH", "")
        missing = isolation.probe().missing
        if isolation.probe().kind != kind:
            pytest.skip(f"{isolation.probe().reason}; the programs run without it in the other half of this file")
        fill = {"outside": outside, "home": home, "project": __file__, "pid": os.getpid()}
        # What is not isolated would really happen.
        chosen = {n: r for n, (needs, r) in attacks(fill, whole).items() if needs not in missing}
        order: list[tuple[str, Request]] = []
        for name, requests in chosen.items():
            order += [(name, request) for request in requests]
            order += [("", honest(len(order)))] if len(order) % 2 or name.startswith("tests") else []
        with RewardPool(2, cpu_seconds=1, memory_mb=256, deadline_seconds=DEADLINE) as pool:
            before = median_ms(pool, 10**6)
            scores = pool.score([request for _, request in order])
            after = median_ms(pool, 2 * 10**6)
            temporary = sum(len(files) for _, _, files in os.walk(pool._folder))
            running = children({w.process.pid for w in pool._workers})
            begun = time.monotonic()
            pool.close()
            closing = time.monotonic() - begun
        end = time.monotonic() + 60  # what many folders hold is removed in the background
        while (left := [p for p in running if Path(f"/proc/{p}").exists()]) and time.monotonic() < end:
            time.sleep(0.05)
        while (Path(pool._folder).exists() or with_argument(pool._folder)) and time.monotonic() < end:
            time.sleep(0.05)
        left += with_argument(pool._folder) + ([-1] if Path(pool._folder).exists() else [])
    isolation.probe.cache_clear()
    hostile: dict[str, list[Score]] = {name: [] for name in chosen}
    for (name, _), one in zip(order, scores, strict=True):
        hostile.setdefault(name, []).append(one)
    files = {str(p.relative_to(folder)): oct(p.stat().st_mode) for p in sorted(folder.rglob("*"))}
    return Outcome(missing, hostile, hostile.pop(""), before, after, closing, left, files, temporary)


def check(outcome: Outcome) -> None:
    assert {name: s for name, s in outcome.hostile.items() if any(one.reward for one in s)} == {}
    errors = {n: one.error for n, s in outcome.hostile.items() for one in s if one.error and one.kind not in KINDS}
    assert errors == {}
    assert [one for one in outcome.honest if one != Score(1.0, 1.0)] == []
    if "files" not in outcome.missing:
        modes = {
            "outside": "0o40",
            "home": "0o40",
            "home/.local": "0o40",
            "outside/secret": "0o10",
            "home/.bashrc": "0o10",
        }
        assert outcome.outside.keys() == modes.keys()
        assert all(outcome.outside[name].startswith(mode) for name, mode in modes.items())
    assert outcome.left == []
    assert outcome.closing < 5
    assert outcome.temporary <= 8  # without bwrap, each worker's two sandboxes have a folder
    # Other work on this machine moves either median; a program that still ran would add far more.
    assert outcome.after < 3 * outcome.before + 100


@pytest.mark.parametrize("kind", ["bwrap", "bare"])
def test_a_sample_of_each_kind_neither_scores_nor_harms(kind: str, tmp_path: Path) -> None:
    check(run(kind, tmp_path, whole=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bwrap", "bare"])
def test_no_hostile_program_and_no_hostile_test_scores_or_harms(kind: str, tmp_path: Path) -> None:
    check(run(kind, tmp_path, whole=True))


def test_the_suite_is_large_and_every_sample_is_in_it() -> None:
    groups: Sequence[dict[str, Attack]] = (PROGRAMS, CALLS, ANSWERS, EVALUATED, PROTOCOL)
    assert len(SUITE) == sum(map(len, groups)) and len(SUITE) + len(SCRIPTS) >= 150 and len(HOSTILE_TESTS) >= 20
    assert SUITE.keys() >= SAMPLE and SCRIPTS.keys() >= SAMPLE_SCRIPTS and HOSTILE_TESTS.keys() >= SAMPLE_TESTS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bwrap", "bare"])
def test_right_programs_score_beside_hostile_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    isolation.probe.cache_clear()
    if kind == "bare":
        monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    elif isolation.probe().kind != "bwrap":
        pytest.skip(isolation.probe().reason)
    programs = [PROGRAMS[n].program.format() for n in PROGRAMS if n in _HARMFUL]
    hostile: list[Request] = [("code", program, {"tests": [TESTS[0]]}) for program in programs]
    hostile += [("code", RIGHT, {"tests": [HOSTILE_TESTS[n].program.format()]}) for n in HOSTILE_TESTS if n in _HARMFUL]
    assert len(hostile) == 20
    requests: list[Request] = []
    for i in range(180):
        requests += [honest(i), *([hostile[i // 9]] if i % 9 == 8 else [])]
    with RewardPool(2, cpu_seconds=1, memory_mb=256, deadline_seconds=DEADLINE) as pool:
        scores = pool.score(requests)
    isolation.probe.cache_clear()
    assert sum(one.reward for one in scores) == 180
    assert sum(one.reward for one, request in zip(scores, requests, strict=True) if request not in hostile) == 180


_HARMFUL = {
    *("loop that ignores every signal", "sleep for ever", "memory bomb", "print 10 GB"),
    *("threads that outlive", "leave in a call", "close every descriptor", "replace modules"),
    *("loop for ever", "10 GB of memory", "thread bomb", "leave the process", "leave by a signal", "leave a file"),
    *("no verdict and no end", "leave 60,000 folders", "leave deeply nested folders"),
}


def test_removing_a_scratch_folder_follows_no_link(tmp_path: Path) -> None:
    """A program that is still alive may swap folders and links while its scratch folder is removed."""
    outside, scratch = tmp_path / "outside", tmp_path / "scratch"
    outside.mkdir(mode=0o755)
    scratch.mkdir()
    for i in range(20):
        (outside / str(i)).touch()
    swap = (
        "import os, sys\nos.chdir(sys.argv[1])\n"
        "def attempt(f, *a):\n    try: f(*a)\n    except OSError: pass\n"
        "while True:\n    for n in 'ab':\n        attempt(os.mkdir, n); attempt(os.rename, n, n + 'x')\n"
        "        attempt(os.symlink, sys.argv[2], n); attempt(os.unlink, n)\n"
        "    for n in os.listdir('.'): attempt(os.rmdir, n); attempt(os.symlink, sys.argv[2], n)\n"
    )
    before = outside.stat().st_mode
    with subprocess.Popen([sys.executable, "-c", swap, str(scratch), str(outside)]) as process:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            server.remove_contents(str(scratch), 0.5)
        process.kill()
    assert len(list(outside.iterdir())) == 20 and outside.stat().st_mode == before
    assert server.remove_contents(str(scratch), 5.0)


def test_the_command_score_prints_before_it_closes_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"completion": CALLS["folders nested 1,000 deep"].program, "tests": [TESTS[0]]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, printed, close = io.StringIO(), list[str](), RewardPool.close

    def closing(pool: RewardPool) -> None:
        printed.append(out.getvalue())
        close(pool)

    monkeypatch.setattr(RewardPool, "close", closing)
    score_command.run("code", str(tmp_path / "in.jsonl"), out, workers=1)
    assert [json.loads(text) for text in printed] == [{"reward": 0.0, "error": None}]


def test_bwrap_only_refuses_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    isolation.probe.cache_clear()
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="rewards.sandbox='bwrap', but bwrap is not installed"):
        RewardPool(1, sandbox="bwrap")
    isolation.probe.cache_clear()


def test_bwrap_that_does_not_work_counts_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    false = tmp_path / "bwrap"
    false.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    false.chmod(0o755)
    for cached in (isolation.probe, isolation._command):
        cached.cache_clear()
    monkeypatch.setattr(isolation.shutil, "which", lambda name: str(false))
    found = isolation.probe()
    assert found.kind == "bare" and "no namespaces here" in found.reason
    for cached in (isolation.probe, isolation._command):
        cached.cache_clear()


def test_what_is_not_isolated_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    isolation.probe.cache_clear()
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING), RewardPool(1) as pool:
        assert pool.score([("math", "4", {"answer": "4"})])[0].reward == 1 and not caplog.records
        for n in (1, 2):
            assert pool.score([("code", f"f = lambda x: {n}", {"tests": [f"assert f(0) == {n}"]})])[0].reward == 1
    isolation.probe.cache_clear()
    (record,) = caplog.records
    assert "bwrap is not installed" in record.message and "disk" in record.message


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
def test_a_worker_that_is_killed_takes_its_sandbox_along() -> None:
    with RewardPool(1) as pool:
        pool.score([("code", "f = abs", {"tests": ["assert f(-1) == 1"]})])
        end = time.monotonic() + 20
        while not (running := children({pool._workers[0].process.pid})) and time.monotonic() < end:
            time.sleep(0.02)
        assert running
        pool._workers[0].process.kill()
        pool._workers[0].process.wait()
        while [p for p in running if Path(f"/proc/{p}").exists()] and time.monotonic() < end:
            time.sleep(0.02)
        assert not [p for p in running if Path(f"/proc/{p}").exists()]


def test_a_pool_that_closes_ends_waiting_sandboxes_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with RewardPool(2) as pool:
            pool.score([("code", f"f = lambda: {i}", {"tests": [f"assert f() == {i}"]}) for i in range(4)])
    assert capfd.readouterr().err == ""


def test_a_sandbox_whose_worker_has_died_ends_by_itself() -> None:
    sandbox = isolation.Sandbox(isolation.Isolation("bare"))
    sandbox.wait()
    sandbox.control.close()
    try:
        assert sandbox.process.wait(20) == 0
    except subprocess.TimeoutExpired:
        sandbox.process.kill()
        raise
    finally:
        sandbox.process.stderr.close()  # type: ignore[union-attr]
        os.rmdir(sandbox.folder)
