"""A reward worker: the process `python -m mdrl_jax.rewards.worker`, which the pool (`pool.py`) starts and talks to.

Pool and worker exchange JSON lines over the worker's standard input and output. The first line holds the settings
`{"path", "cpu_seconds", "memory_mb", "deadline_seconds", "sandbox", "packages", "folder"}`: `path` is the new
`sys.path`, and `folder` is for temporary files. The worker answers `{"ready": true}`. Every further line is a request
`[reward name, completion, check]`, and the worker answers `{"reward", "accuracy", "error"}`. The worker ends when its
input ends.

The kernel enforces the limits of a reward function. The profiling timer ends the worker by SIGPROF when the CPU time is
used up, and the real-time timer ends it by SIGALRM after 1.25 times the deadline. Neither signal has a Python
handler, so a function that is stuck in C code is ended too.
"""

import json
import os
import signal
import sys
import tempfile
import warnings
from dataclasses import asdict
from typing import Any

from mdrl_jax.rewards.base import RewardFunction, Score, resolve, score
from mdrl_jax.rewards.sandbox import isolation, run

_ERROR_CHARACTERS = 500


# The pool ends a worker by this signal and not by SIGTERM. Schedulers send SIGTERM to every process of a run, and only
# the run itself may react to it: a reward that is cut off would change the current step. Workers and the processes that
# they start therefore ignore SIGTERM.
END = signal.SIGUSR1


class _Terminated(BaseException):
    """The worker has received END. The exception unwinds the stack, so that the sandbox kills its child processes."""


def _terminate(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second END must not interrupt the cleaning up
    raise _Terminated


def judge(request: list[Any], limits: run.Limits, functions: dict[str, RewardFunction]) -> Score:
    """Judges one request. Whatever the reward function raises becomes the error of the score.

    Args:
      request: (reward name, completion, check).
      limits: of these, the CPU time and 1.25 times the deadline limit the reward function. They do not limit the import
        of its module. A limit that is reached ends this process by a signal, not only the function.
      functions: the reward functions by name that were imported before; a new one is added.

    Returns:
      The score; 0 with an error if the reward cannot be imported or its function raises. The error is one line of at
      most 500 characters: the name of the exception's class, or "timeout" for TimeoutError, then ": " and its text.

    Raises:
      ValueError: if the request has not three parts.
      _Terminated: if the pool ends the worker meanwhile.
    """
    name, completion, check = request
    try:
        if name not in functions:  # before the timers start: the first import of a module may take long
            functions[name] = resolve(name)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        # Later than the deadline of a sandboxed program, and sooner than the deadline of the pool.
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
    """Reads the settings, then answers requests until the input ends.

    It changes this process: SIGTERM is ignored, and END raises `_Terminated`. A reward function finds an empty standard
    input, and what it prints goes to the standard error. The settings give `sys.path` and the folder for temporary
    files. When the input ends, the function ends the sandboxes and removes that folder.

    Raises:
      _Terminated: when the pool sends END.
      BrokenPipeError: if the pool reads no answers any more.
      ValueError, KeyError, TypeError: if the settings or a request are not as the module's docstring says.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(END, _terminate)
    warnings.simplefilter("ignore", SyntaxWarning)  # a model's program often has "\d" in a text
    # Move the pool's pipes away from 0 and 1, so that a reward function that prints or reads does not reach them.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)

    settings = json.loads(requests.readline())
    sys.path[:] = settings.pop("path")
    tempfile.tempdir = os.environ["TMPDIR"] = settings.pop("folder")
    isolated = {"sandbox": settings.pop("sandbox"), "packages": tuple(settings.pop("packages"))}
    limits = run.Limits(**settings)
    run.configure(run.Settings(limits, **isolated))
    functions: dict[str, RewardFunction] = {}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        answer = asdict(judge(json.loads(line), limits, functions))
        print(json.dumps(answer), file=answers, flush=True)
        run.prepare()
    run.close()
    # The input ended without END, so the pool was killed and cannot remove its folder.
    isolation.remove_later(tempfile.tempdir)


if __name__ == "__main__":
    try:
        main()
    except (_Terminated, BrokenPipeError):
        run.close()
        os._exit(0)
