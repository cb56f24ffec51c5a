"""What processes tell each other, and what ends them: two or three small processes without a model."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.distributed import AGAIN, CORRECT, LOST

ROOT = Path(__file__).parents[2]
TIMEOUT = 5.0
HOST = socket.gethostname()
BEGIN = """
import os, sys, time
from pathlib import Path
import jax
from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed as d

jax.config.update("jax_num_cpu_devices", 1)
where, me, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
d.initialize(where, n, me, 5.0)
jax.devices()
"""


def go(tmp_path: Path, body: str, n: int = 3) -> tuple[list[int], list[str], float]:
    """Exit status and text of `n` processes that run `body`, and the seconds it took after all had begun."""
    (tmp_path / "body.py").write_text(BEGIN + "print('begun', time.time(), flush=True)\n" + body)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        where = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, str(tmp_path / "body.py"), where]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    made = [subprocess.Popen([*command, str(i), str(n)], env=environment, cwd=tmp_path, **pipes) for i in range(n)]
    texts = [p.communicate(timeout=120)[0] for p in made]
    begun = max(float(text.split("begun ")[1].split()[0]) for text in texts)
    return [p.returncode for p in made], texts, time.time() - begun


def test_what_is_told_and_what_is_written(tmp_path: Path):
    """`share`, `agree`, `part`, and a file: process 0 writes late, and none reads before."""
    body = """
time.sleep(0.5 * (2 - me))  # process 0 comes last
assert d.share({"me": me}) == [{"me": i} for i in range(3)] and d.agree([me, None]) == [0, None]
assert [len(p) for p in d.share(list(d.part(8)))] == [2, 3, 3] and sum(d.share(list(d.part(8))), []) == list(range(8))
time.sleep(0.5 * me)
seen = Path("file.json").exists()  # before it is written, on every process, however late it comes
records.write_json("file.json", {"by": me})
assert not seen and records.read_json("file.json") == {"by": 0}
d.check_shared(Path("work"))
assert list(Path("work").iterdir()) == []
sys.exit(d.finish(0))
"""
    statuses, texts, _ = go(tmp_path, body)
    assert statuses == [0, 0, 0], texts


def test_a_barrier_names_who_is_absent(tmp_path: Path):
    body = """
if me == 1:
    time.sleep(60)
try:
    d.barrier("the middle")
except d.HostLost as e:
    print("mdrl: error:", e, flush=True)
    d.finish(1, e)
"""
    statuses, texts, seconds = go(tmp_path, body, 2)
    assert statuses == [LOST, LOST] and seconds < 3 * TIMEOUT
    assert f"mdrl: error: process 1 on {HOST} did not reach barrier 'the middle' in 5 s" in texts[0]
    assert f"did not reach barrier 'the middle' in 5 s; {AGAIN}" in texts[1]  # the one that sleeps hears it too


def test_what_ends_one_process_ends_all(tmp_path: Path):
    """A data file that one host alone cannot read."""
    body = """
if me == 2:
    d.finish(2, UserError("no such file: data.jsonl"))
d.barrier("the middle")
"""
    statuses, texts, seconds = go(tmp_path, body)
    assert statuses[2] == 2 and LOST in statuses[:2] and 0 not in statuses and seconds < 3 * TIMEOUT
    assert any(f"process 2 on {HOST} ended: no such file: data.jsonl" in text for text in texts[:2])


def test_an_error_of_the_user_is_not_to_be_tried_again(tmp_path: Path):
    """Process 0 stays for a while, so that the others can read the reason; its own watching thread says nothing."""
    body = """
if me == 0:
    print("mdrl: error: no such file: data.jsonl", flush=True)
    d.finish(2, UserError("no such file: data.jsonl"))
d.barrier("the middle")
"""
    statuses, texts, _ = go(tmp_path, body)
    assert statuses[0] == 2 and 0 not in statuses
    assert texts[0].count("mdrl: error: ") == 1
    told = f"mdrl: error: process 0 on {HOST} ended: no such file: data.jsonl{CORRECT}"
    assert any(told in text for text in texts[1:]) and not any(AGAIN in text for text in texts)


def test_a_number_of_tasks_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch):
    for value in ("4(x2)", "", "-1"):
        monkeypatch.setenv("SLURM_NTASKS", value)
        with pytest.raises(UserError, match="SLURM_NTASKS="):
            distributed.initialize(None, None, None, 5.0)


def test_an_error_without_words_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(distributed.rendezvous, "meet", lambda *_: None)
    with pytest.raises(UserError, match=r"within 5 s \(RuntimeError\)"):
        distributed.initialize("localhost:1", 2, 0, 5.0)


def test_the_end_of_process_0_is_told(tmp_path: Path):
    """JAX ends the others at once then, in its own words; ours come after them."""
    body = """
if me == 0:
    time.sleep(1)
    os.kill(os.getpid(), 9)
time.sleep(60)
"""
    statuses, texts, seconds = go(tmp_path, body, 2)
    assert statuses[0] == -9 and statuses[1] != 0 and seconds < 3 * TIMEOUT
    line = f"mdrl: error: process 1 on {HOST} was ended from outside, or process 0 on {HOST} is gone; {AGAIN}"
    assert line in texts[1].splitlines()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("localhost:1", 2, None), "--process_id is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("localhost", 2, 0), "it is HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id=2 is not valid with --processes=2"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags: tuple, says: str):
    with pytest.raises(UserError, match=says):
        distributed.initialize(*flags, 5.0)


def test_one_process_alone_waits_for_nobody():
    distributed.initialize(None, 1, None, 5.0)
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)
    distributed.barrier("here")
    assert distributed.share(3) == [3] and list(distributed.part(4)) == [0, 1, 2, 3] and distributed.finish(7) == 7


@pytest.mark.parametrize("timeout", [1.0, 10.0, 300.0])
def test_a_lost_host_is_named_before_the_service_ends_all(timeout: float, monkeypatch: pytest.MonkeyPatch):
    """The service may have heard of a process last when half of its time-out had passed before the process was lost."""
    asked: dict[str, int] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **given: asked.update(given))
    monkeypatch.setattr(distributed.rendezvous, "meet", lambda *_: None)
    distributed.initialize("localhost:1", 2, 0, timeout)
    beats = 2.0  # seconds between two signs of life, at most: one may be missed, three are waited for at the end
    slow = 15.0  # a process that is busy
    assert asked["heartbeat_timeout_seconds"] / 2 > timeout + 4 * beats + slow
