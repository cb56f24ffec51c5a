"""A stage with a target: it ends at the first look at which it scores as well as another stage (definitions §2).

Two trainings can then be compared at a matched score, for example SFT and RL (definitions §3). The looks score the
validation prompts of the stage's domain with the keys that all scores use, so the differences are paired by prompt.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mdrl_jax.evaluate import validation_groups, validation_rewards
from mdrl_jax.recovery.looks import Looks
from mdrl_jax.recovery.spent import metered
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stats import estimate
from mdrl_jax.stats.estimate import Record


def looks(runtime: Runtime, stage: Stage, file: Path, params_after: Callable[[str], Any]) -> Looks:
    """Starts or continues the looks at a stage with a target.

    Args:
      runtime: of the run.
      stage: the stage; it trains one domain.
      file: where the record is read from, if the file exists, and written to.
      params_after: (name of a stage) -> the parameters at its end. It is called for the target if there is no file.

    Returns:
      The looks. Their record has "stage", "domain", "target", "settings"; the target's "rewards" [P][k] and its "score"
      in points; and in "steps" for each look {"step", "rewards", "score", "difference"}, with the difference to the
      target's score, paired by prompt, null 0. After the first look it has "reached" and "stopped".

    Raises:
      UserError: if the file has other settings or is not valid JSON, or if too many of the target's rewards fail.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      Stopped: after a SIGTERM, while the target is scored.
      The errors of `params_after`.
    """
    domain, own, recover = stage.domains[0], stage.settings, runtime.config.recover
    groups = validation_groups(runtime).get(domain)

    def score(params: Any) -> np.ndarray:
        return validation_rewards(runtime, params, [domain])[domain]

    def measure(step: int, params: Any) -> Record:
        rewards_PK = score(params)
        difference = estimate.paired_difference(rewards_PK, found.record["rewards"], groups).in_points()
        return {
            "step": step,
            "rewards": rewards_PK.tolist(),
            "score": estimate.score(rewards_PK, groups).record(),
            "difference": difference.record(0.0),
        }

    settings = {
        "prompts": recover.prompts,
        "samples": recover.samples,
        "every": own.target_every,
        "steps": own.steps,
        "learning_rate": own.learning_rate,
        "seed": runtime.config.seed,
    }
    head = {"stage": stage.name, "domain": domain, "target": own.target, "settings": settings, "steps": []}
    meter = functools.partial(metered, runtime)
    found = Looks(file, head, measure, judge, "looks", meter)
    if found.new:
        read = meter()
        rewards_PK = score(params_after(own.target))
        found.record["rewards"] = rewards_PK.tolist()
        found.record["score"] = estimate.score(rewards_PK, groups).record()
        found.record["costs"] = read()
        found.write()  # so that a run that is stopped before its first look does not score the target again
    return found


def judge(record: Record) -> None:
    """Adds to a record whether its last look reached the target ("reached"), and why the stage ends ("stopped").

    Args:
      record: of `looks`, with at least one look; it is changed. "reached" becomes True if the mean reward of the last
        look is at least that of the target, otherwise False. "stopped" becomes the result in words if the target is
        reached or the steps of the settings are used up; "" otherwise.
    """
    last, settings = record["steps"][-1], record["settings"]
    record["reached"] = _total(last["rewards"]) >= _total(record["rewards"])
    points = f"{last['score']['estimate']:.1f} of {record['score']['estimate']:.1f} points after {last['step']} steps"
    ended = f"reached: {points}" if record["reached"] else f"not reached: {points}"
    record["stopped"] = ended if record["reached"] or last["step"] >= settings["steps"] else ""


def _total(rewards_PK: ArrayLike) -> float:
    """The sum of the rewards without rounding errors, so that equal means are never told apart."""
    return math.fsum(np.asarray(rewards_PK, float).ravel())
