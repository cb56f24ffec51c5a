"""Computes rewards in parallel, in worker processes that may die or hang without harm.

Each worker is a fresh interpreter (`python -m mdrl_jax.rewards.worker`): no jax, no threads, small
enough to fork for every program's tests. It answers one request at a time; this process waits for all of
them at once and uses no signals, so `score` may be called from any thread.
"""

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdrl_jax.rewards.base import SHORT_NAMES, Score
from mdrl_jax.rewards.sandbox import isolation
from mdrl_jax.rewards.sandbox.run import Limits
from mdrl_jax.rewards.worker import END

Request = tuple[str, str, Mapping[str, Any]]

_CODE = {"code", SHORT_NAMES["code"]}
_MOST_KNOWN = 1 << 18  # scores that are remembered, about 50 MB
_START_SECONDS = 60.0  # for the interpreter to start, and for a reward's module to be imported


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    job: int | None = None
    answer: bytes = b""
    loaded: set[str] = field(default_factory=set)


class RewardPool:
    """`n_workers` reward workers, to be used as a context manager.

    cpu_seconds: CPU time of one reward function call, and of one sandboxed program.
    memory_mb: address space of a sandboxed program (reward functions themselves are not limited).
    deadline_seconds: wall-clock backstop, by default 20 times the CPU time and at least 10 s. A
        sandboxed program is killed at it, a worker that does not answer at 1.25 times it.
    sandbox: "best" runs programs in bwrap where it works, else with less isolation, which is said once in
        the log; "bwrap" refuses to.
    errors: how often each kind of error came back, over the life of the pool.

    Raises UserError if `sandbox` is "bwrap" and that does not work here; `score` raises RuntimeError if
    workers cannot start.
    """

    def __init__(
        self,
        n_workers: int,
        cpu_seconds: float = 5.0,
        memory_mb: int = 1024,
        deadline_seconds: float | None = None,
        sandbox: str = "best",
    ) -> None:
        if n_workers < 1:
            raise ValueError(f"n_workers must be at least 1, not {n_workers}")
        if sandbox not in isolation.CHOICES:
            raise ValueError(f"sandbox must be one of {', '.join(isolation.CHOICES)}, not {sandbox!r}")
        if sandbox == "bwrap":
            isolation.choose(sandbox)
        self._sandbox = sandbox
        self._warned = False
        self.errors: Counter[str] = Counter()
        self._known: dict[bytes, Score] = {}
        self._limits = Limits(cpu_seconds, memory_mb, deadline_seconds)
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="mdrl-rewards-")
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            for _ in range(n_workers):
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker and what it runs; the pool cannot be used afterwards."""
        for worker in self._workers:
            worker.process.send_signal(END)
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()
        self._folder.cleanup()

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """The scores of (reward name, completion, check) requests, in their order.

        Identical requests are scored once over the life of the pool, as rewards are pure functions;
        only what failed is tried again. A request whose function raises, or whose worker dies or does
        not answer in time, scores 0 with an error that says so; no other is affected.
        """
        texts = [json.dumps(request, sort_keys=True) for request in requests]
        digests = {text: hashlib.sha256(text.encode()).digest() for text in texts}
        scores = {text: self._known[d] for text, d in digests.items() if d in self._known}
        unique = [text for text in digests if text not in scores]
        names = [json.loads(text)[0] for text in unique]
        if not self._warned and _CODE.intersection(names):
            self._warned = True
            isolation.warn(isolation.choose(self._sandbox))
        with self._lock:
            if not self._workers:
                raise RuntimeError("the reward pool is closed")
            try:
                scores |= zip(unique, self._run(unique, names), strict=True)
            finally:  # after an interrupt, an answer to an abandoned request must not be read
                for worker in [w for w in self._workers if w.job is not None]:
                    self._replace(worker)
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            self._known |= {digests[text]: scores[text] for text in unique if scores[text].error is None}
            results = [scores[text] for text in texts]
            self.errors.update(s.kind for s in results if s.error)
            return results

    def _run(self, texts: Sequence[str], names: Sequence[str]) -> list[Score]:
        results: dict[int, Score] = {}
        waiting = deque(range(len(texts)))
        while len(results) < len(texts):
            for worker in [w for w in self._workers if w.ready and w.job is None]:
                if waiting and self._send(worker, texts[waiting[0]], names[waiting[0]]):
                    worker.job = waiting.popleft()
            active = [w for w in self._workers if w.job is not None or not w.ready]
            wait = max(0.0, min(w.deadline for w in active) - time.monotonic()) if active else 0.0
            for key, _ in self._selector.select(wait):
                self._receive(key.data, results)
            for worker in list(self._workers):
                busy = worker.job is not None or not worker.ready
                if busy and time.monotonic() > worker.deadline:
                    self._lost(worker, "timeout: no answer from the reward function", results)
        return [results[i] for i in range(len(texts))]

    def _send(self, worker: _Worker, text: str, name: str) -> bool:
        """Whether the request reached the worker; one that has died since is replaced."""
        extra = 0.0 if name in worker.loaded else _START_SECONDS
        worker.loaded.add(name)
        worker.deadline = time.monotonic() + 1.5 * self._limits.deadline + extra
        try:
            _write(worker.process, text)
        except BrokenPipeError:
            self._replace(worker)
            return False
        return True

    def _receive(self, worker: _Worker, results: dict[int, Score]) -> None:
        assert worker.process.stdout is not None
        data = os.read(worker.process.stdout.fileno(), 65536)
        if not data:
            code = worker.process.wait()
            limit = {-signal.SIGPROF: "CPU time used up", -signal.SIGALRM: "deadline passed"}
            reason = limit.get(code)
            error = f"timeout: {reason}" if reason else f"worker died: exit status {code}"
            self._lost(worker, error, results)
            return
        worker.answer += data
        if worker.answer.endswith(b"\n"):
            answer, worker.answer = json.loads(worker.answer), b""
            if worker.job is None:
                worker.ready = True
                self._failed_starts = 0
            else:
                results[worker.job] = Score(**answer)
                worker.job = None
                # The next request goes to the one idle longest, whose next sandbox is up by now.
                self._workers.remove(worker)
                self._workers.append(worker)

    def _lost(self, worker: _Worker, error: str, results: dict[int, Score]) -> None:
        """Replaces a worker that died or hangs; its request, if it had one, scores 0."""
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts > len(self._workers) + 2:
                raise RuntimeError(f"reward workers do not start ({error})")
        if worker.job is not None:
            results[worker.job] = Score(0.0, 0.0, error)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        self._end(worker)
        self._start()

    def _start(self) -> None:
        # The worker sees this process's sys.path, wherever this process was started from. A fixed
        # hash seed: the order of a program's sets, so its verdict, must not differ by worker.
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mdrl_jax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
            start_new_session=True,  # a Ctrl-C in the terminal is this process's to handle
        )
        worker = _Worker(process, time.monotonic() + _START_SECONDS)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        settings = {
            "path": [p or os.getcwd() for p in sys.path] + [root],
            "cpu_seconds": self._limits.cpu_seconds,
            "memory_mb": self._limits.memory_mb,
            "deadline_seconds": self._limits.deadline,
            "sandbox": self._sandbox,
            "folder": self._folder.name,
        }
        with contextlib.suppress(BrokenPipeError):  # the end of its output will say so
            _write(process, json.dumps(settings))

    def _end(self, worker: _Worker) -> None:
        """Ends a worker: by its own hand if it still listens, else by force."""
        process = worker.process
        assert process.stdin is not None and process.stdout is not None
        self._selector.unregister(process.stdout)
        self._workers.remove(worker)
        process.send_signal(END)
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()


def _write(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    data = memoryview(f"{text}\n".encode())
    while data:
        data = data[os.write(process.stdin.fileno(), data) :]
