"""Computes rewards in parallel, in worker processes that may die or hang without harm to the run.

Each worker is a new interpreter (`python -m mdrl_jax.rewards.worker`) without JAX. It answers one request at a time.
Programs and their tests run in sandboxes, which are processes of their own (`sandbox/run.py`). The pool waits for all
workers at once (`selectors`) and sets no signal handlers, so `score` may be called from any thread.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdrl_jax.rewards.base import SHORT_NAMES, Score
from mdrl_jax.rewards.sandbox import CHOICES, PACKAGES, isolation
from mdrl_jax.rewards.sandbox.run import Limits
from mdrl_jax.rewards.worker import END

Request = tuple[str, str, Mapping[str, Any]]

_CODE = {"code", SHORT_NAMES["code"]}
_MOST_KNOWN = 1 << 18  # scores to remember; this many take about 50 MB
_LOOK_SECONDS = 0.25  # between two looks at whether the wait is to be given up
_START_SECONDS = 60.0  # time for an interpreter to start, and for the module of a reward to be imported


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    job: int | None = None
    answer: bytes = b""
    loaded: set[str] = field(default_factory=set)


class RewardPool:
    """A pool of reward workers, to be used as a context manager.

    Args:
      n_workers: number of worker processes.
      cpu_seconds: CPU time, in seconds, of each of these: a call of a reward function, a sandboxed program, its tests.
      memory_mb: address space of a sandboxed program, in MiB. Reward functions themselves have no limit.
      deadline_seconds: wall-clock limit, which ends what waits instead of using CPU time. The default is 20 times the
        CPU time, and at least 10 s. A sandboxed program is killed at the deadline. A worker that does not answer ends
        at 1.25 times the deadline, and the pool replaces it.
      sandbox: "best" runs programs in bubblewrap (bwrap) where it works. Elsewhere it runs them with less isolation,
        and the log says so once; where not even files can be isolated, it runs none. "bwrap" runs no programs without
        bubblewrap. "none" runs them in any case.
      packages: the installed distributions whose modules programs and tests may import, beside what these require.
      give_up: called several times a second while `score` waits. If it raises, the requests are abandoned.

    Attributes:
      errors: by kind of error (`Score.kind`), in how many scores it came back over the life of the pool.

    Raises:
      ValueError: if `n_workers` is below 1, `sandbox` is unknown, or a limit is not positive.
      UserError: if `sandbox` is "bwrap" and bubblewrap does not work here.
    """

    def __init__(
        self,
        n_workers: int,
        cpu_seconds: float = 5.0,
        memory_mb: int = 1024,
        deadline_seconds: float | None = None,
        sandbox: str = "best",
        packages: Sequence[str] = PACKAGES,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        if n_workers < 1:
            raise ValueError(f"n_workers={n_workers} is not valid; it must be >= 1")
        if sandbox not in CHOICES:
            raise ValueError(f"sandbox={sandbox!r} is not known; known: {', '.join(CHOICES)}")
        if sandbox == "bwrap":
            isolation.choose(sandbox)
        self._sandbox, self._packages, self._give_up = sandbox, list(packages), give_up
        self._warned = False
        self.errors: Counter[str] = Counter()
        self._known: dict[bytes, Score] = {}
        self._limits = Limits(cpu_seconds, memory_mb, deadline_seconds)
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._folder = tempfile.mkdtemp(prefix="mdrl-rewards-")
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
        """Ends every worker and the program that it runs, and removes their folder for temporary files.

        A worker that does not react is killed after a second. The pool cannot be used afterwards. To close it again
        does nothing.
        """
        for worker in self._workers:
            worker.process.send_signal(END)
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()
        isolation.remove_later(self._folder)

    def check(self, names: Iterable[str]) -> None:
        """Refuses rewards that this machine cannot compute safely, before the work of making completions for them.

        Args:
          names: the rewards, as in `score`.

        Raises:
          UserError: if one of them runs programs, and these cannot be isolated as `sandbox` demands.
        """
        if _CODE.intersection(names):
            isolation.choose(self._sandbox)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores requests, each in some worker.

        Rewards are pure functions, so the pool remembers the scores of requests and does not compute them twice; equal
        requests of one call are computed once. Requests that failed are tried again in a later call. If a reward cannot
        be found or raises, or its worker dies or does not answer in time, the request scores 0 with an error that says
        why; `errors` counts it for each request that it came back for. Other requests are not affected.

        The call waits until all requests are scored. Calls from several threads run one after another. The first call
        with the reward `code` logs a warning if its programs cannot be isolated fully.

        Args:
          requests: (reward name, completion, check) of each request. The name is a short name or "module:function", as
            in `base.resolve`; the check has to be JSON-serialisable.

        Returns:
          The scores, in the order of the requests; [] for no requests.

        Raises:
          TypeError: if a request is not JSON-serialisable.
          ValueError: if a check contains itself.
          RuntimeError: if workers do not start several times in a row, or the pool is closed.
          UserError: in the first call with the reward `code`, if programs cannot be isolated as `sandbox` demands. In
            later calls these requests score 0 with that error.
        """
        texts = [json.dumps(request, sort_keys=True) for request in requests]
        digests = {text: hashlib.sha256(text.encode()).digest() for text in texts}
        scores = {text: self._known[d] for text, d in digests.items() if d in self._known}
        unique = [text for text in digests if text not in scores]
        names = [json.loads(text)[0] for text in unique]
        if not self._warned and _CODE.intersection(names):
            self._warned = True
            isolation.warn(isolation.choose(self._sandbox))
            isolation.warn_of_slow_imports(self._packages)
        with self._lock:
            if not self._workers:
                raise RuntimeError("the reward pool is closed; make a new one")
            try:
                scores |= zip(unique, self._run(unique, names), strict=True)
            finally:  # after an interrupt: no later call may read the answer to an abandoned request
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
            self._give_up()
            for key, _ in self._selector.select(min(wait, _LOOK_SECONDS)):
                self._receive(key.data, results)
            for worker in list(self._workers):
                busy = worker.job is not None or not worker.ready
                if busy and time.monotonic() > worker.deadline:
                    self._lost(worker, "timeout: no answer from the reward function", results)
        return [results[i] for i in range(len(texts))]

    def _send(self, worker: _Worker, text: str, name: str) -> bool:
        """Sends a request to an idle worker.

        Args:
          worker: the worker. It is replaced if it has died in the meantime.
          text: the request as JSON.
          name: the reward's name; a name that is new to the worker gets extra time to be imported.

        Returns:
          Whether the request reached the worker.
        """
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
                # Move it to the end: the next request goes to the worker idle longest, whose next sandbox is ready.
                self._workers.remove(worker)
                self._workers.append(worker)

    def _lost(self, worker: _Worker, error: str, results: dict[int, Score]) -> None:
        """Replaces a worker that died or hangs.

        Args:
          worker: the worker.
          error: why; its request, if it had one, scores 0 with this error.
          results: by number of the request, the scores so far.

        Raises:
          RuntimeError: if too many workers in a row did not start.
        """
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
        # The worker gets this process's sys.path, so that it imports the same modules. The hash seed is fixed, so that
        # the order of sets in a program, and with it the program's score, is the same in every worker.
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mdrl_jax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
            start_new_session=True,  # so that a Ctrl-C in the terminal reaches only this process
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
            "packages": self._packages,
            "folder": self._folder,
        }
        with contextlib.suppress(BrokenPipeError):  # the worker has died; `_receive` finds the end of its output
            _write(process, json.dumps(settings))

    def _end(self, worker: _Worker) -> None:
        """Ends a worker by END, so that it can clean up, or by force if it does not react within a second."""
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
