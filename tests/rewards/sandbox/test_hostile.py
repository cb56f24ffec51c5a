"""No hostile program scores, escapes, hangs or slows the pool afterwards, with bubblewrap and without it."""

import logging
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.pool import RewardPool
from mdrl_jax.rewards.sandbox import isolation
from tests.rewards.sandbox.hostile_programs import PROGRAMS

# One of each form in which tests meet a result: equal, nearly equal, looped over, caught.
TESTS = [
    "assert f(4) == 8",
    "assert abs(f(3) - 6) < 1e-6",
    "import math\nassert math.isclose(f(3), 6)",
    "for a, b in zip(map(f, (1, 2)), (2, 4)):\n    assert a == b",
    "assert f(-1) in [-2]",
    "try:\n    good = f(0.5) == 1\nexcept Exception:\n    good = False\nassert good",
]
CHECK = {"tests": TESTS}
DEADLINE = 10.0
# Without bwrap the limits are the same; one of each kind is enough.
BARE_SLOW = {
    "infinite loop in a call",
    "loop that ignores every signal",
    "huge exponent",
    "regex catastrophe",
    "answer without end",
}


@dataclass
class Outcome:
    """What came of all programs in one pool. missing: what the isolation says it lacks."""

    missing: tuple[str, ...]
    scores: dict[str, list[Score]]
    before: float
    after: float
    errors: dict[str, int]
    left: list[int]
    outside: list[str]
    temporary: list[str]


def children(pids: set[int]) -> set[int]:
    """All live descendants of the processes."""
    parents = {}
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


def median_ms(pool: RewardPool, first: int) -> float:
    times = []
    for i in range(first, first + 15):
        begun = time.perf_counter()
        assert pool.score([("code", f"def f(x): return 2 * x + {i} - {i}", CHECK)])[0].reward == 1
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


@pytest.fixture(scope="module", params=["bwrap", "bare"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """All programs, run once by a pool of two workers."""
    isolation.probe.cache_clear()
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    names = list(PROGRAMS) if request.param == "bwrap" else [n for n in PROGRAMS if n not in BARE_SLOW]
    fill = {"outside": str(outside), "project": __file__, "pid": os.getpid()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDRL_SECRET", "secret")
        if request.param == "bare":
            patch.setattr(isolation.shutil, "which", lambda name: None)
            patch.setenv("PATH", "")
        found = isolation.probe()
        if found.kind != request.param:
            pytest.skip(f"{found.reason}; the programs run without it in the other half of this file")
        # What is not isolated would really happen.
        names = [n for n in names if PROGRAMS[n][1] not in found.missing]
        # An attack on the judge may fool one form of test and not the next: each alone.
        forms = {n: [[t] for t in TESTS] if PROGRAMS[n][1] == "judge" else [TESTS[:1]] for n in names}
        requests = [("code", PROGRAMS[n][0].format(**fill), {"tests": t}) for n in names for t in forms[n]]
        with RewardPool(2, cpu_seconds=1, memory_mb=256, deadline_seconds=DEADLINE) as pool:
            before = median_ms(pool, 100)
            results = iter(pool.score(requests))
            scores = {n: [next(results) for _ in forms[n]] for n in names}
            after = median_ms(pool, 200)
            temporary = os.listdir(pool._folder.name)
            running = children({w.process.pid for w in pool._workers})
        end = time.monotonic() + 5
        while (left := [p for p in running if Path(f"/proc/{p}").exists()]) and time.monotonic() < end:
            time.sleep(0.05)
    yield Outcome(found.missing, scores, before, after, dict(pool.errors), left, os.listdir(outside), temporary)
    isolation.probe.cache_clear()


def test_there_are_enough() -> None:
    assert len(PROGRAMS) >= 40


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_scores(outcome: Outcome, name: str) -> None:
    if PROGRAMS[name][1] in outcome.missing:
        pytest.skip(f"not isolated here, and said so: {', '.join(outcome.missing)}")
    if name not in outcome.scores:
        pytest.skip("limits are the same without bwrap")
    assert [s.reward for s in outcome.scores[name]] == [0] * len(outcome.scores[name])
    # Only the wall clock is an error; a worker that died or a sandbox that broke would be another kind.
    assert {(s.error or "timeout").partition(":")[0] for s in outcome.scores[name]} == {"timeout"}


def test_nothing_is_left_and_nothing_is_slower(outcome: Outcome) -> None:
    assert set(outcome.errors) <= {"timeout"}
    assert outcome.left == []
    if "files" not in outcome.missing:
        assert outcome.outside == ["secret"]
    assert len(outcome.temporary) <= 2  # without bwrap, the folder of each worker's next program
    # Other work on this machine moves either median; a program that still ran would add far more.
    assert outcome.after < 3 * outcome.before + 100


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
    for cached in (isolation.probe, isolation._bwrap):
        cached.cache_clear()
    monkeypatch.setattr(isolation.shutil, "which", lambda name: str(false))
    found = isolation.probe()
    assert found.kind == "bare" and "no namespaces here" in found.reason
    for cached in (isolation.probe, isolation._bwrap):
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
    guest = isolation.start("bare", "/")
    assert guest.stdin
    guest.stdin.close()
    try:
        assert guest.wait(20) != 0
    except subprocess.TimeoutExpired:
        guest.kill()
        raise
    finally:
        guest.stdout.close()  # type: ignore[union-attr]
        guest.stderr.close()  # type: ignore[union-attr]
