"""A reward worker: `python -m mdrl_jax.rewards.worker`, started and spoken to by pool.py.

JSON lines over standard input and output. First the settings `{"path", "cpu_seconds", "memory_mb",
"deadline_seconds", "sandbox", "folder"}` (the last for temporary files), answered by `{"ready": true}`; then
requests `[reward name, completion, check]`, each answered by `{"reward", "accuracy", "error"}`. The
end of input ends the worker.

The kernel enforces the limits of a reward function: the profiling timer ends the worker by SIGPROF
when the CPU time is used up, the real-time timer by SIGALRM after the deadline. Neither needs the
interpreter to take part, so a function stuck in C code is ended too.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from mdrl_jax.rewards.base import RewardFunction, Score, resolve, score
from mdrl_jax.rewards.sandbox import run

_ERROR_CHARACTERS = 500


# By which the pool ends a worker. SIGTERM, which schedulers send to every process of a run, is the run's to answer:
# a worker and what it starts ignore it, as a reward that is cut off would change the step at work.
END = signal.SIGUSR1


class _Terminated(BaseException):
    """END: unwinds the sandbox, so that its child is killed."""


def _terminate(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the tidying up
    raise _Terminated


def judge(request: list[Any], limits: run.Limits, functions: dict[str, RewardFunction]) -> Score:
    """The score of one request; whatever the reward function raises becomes its error."""
    name, completion, check = request
    try:
        if name not in functions:  # untimed: a module may take long to load, once
            functions[name] = resolve(name)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        # Later than the sandbox's own deadline, sooner than the pool's.
        signal.setitimer(signal.ITIMER_REAL, 1.25 * limits.deadline)
        return score(functions[name], completion, check)
    except _Terminated:
        raise
    except TimeoutError as e:
        return Score(0.0, 0.0, _one_line(f"timeout: {e}"))
    except BaseException as e:
        return Score(0.0, 0.0, _one_line(f"{type(e).__name__}: {e}"))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_ERROR_CHARACTERS]


def main() -> None:
    """Answers requests until the input ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(END, _terminate)
    # A reward function that prints or reads must not reach the pool's pipes.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)

    settings = json.loads(requests.readline())
    sys.path[:] = settings.pop("path")
    tempfile.tempdir = os.environ["TMPDIR"] = settings.pop("folder")
    wanted = settings.pop("sandbox")
    limits = run.Limits(**settings)
    run.configure(limits, wanted)
    functions: dict[str, RewardFunction] = {}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        answer = asdict(judge(json.loads(line), limits, functions))
        print(json.dumps(answer), file=answers, flush=True)
        run.prepare()
    run.close()
    # A pool that closes ends its workers by END: this one was killed, and cannot tidy up.
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except (_Terminated, BrokenPipeError):
        run.close()
        os._exit(0)
