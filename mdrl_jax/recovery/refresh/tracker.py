"""What a refresh did, step by step: scores, when to stop, which step to keep, θ_t − θ* (definitions §8).

A refresh is plain training of domain i from θ_T; the loop trains and hands each step's parameters to a `Tracker`:

    tracker = Tracker(runtime, stage, file, peak_params, bases)
    tracker.look(0, start_params)
    for done, state in ...:
        if tracker.look(done, state.params):
            break
    tracker.best, tracker.record["chosen"]

Chosen where the definitions leave it open:
  * another domain's drop exceeds its limit when the lower bound of its paired interval does: the same sureness that
    the return to the peak is asked for, as with some hundred prompts an estimate passes 2 points by chance;
  * step 0, which is doing nothing, is a candidate; among steps of equal average the earliest is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.evaluate import validation_rewards
from mdrl_jax.parallel import tree_programs
from mdrl_jax.recovery.refresh.contraction import Basis, contraction, lengths
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stats import estimate
from mdrl_jax.stats.estimate import Record, missing


def chosen(record: Mapping[str, Any]) -> int:
    """The step with the best validation average over all scored domains; the earliest of equals."""
    return max(record["steps"], key=lambda row: (row["average"]["estimate"], -row["step"]))["step"]


def stop(record: Mapping[str, Any]) -> str:
    """Why the refresh ends at the last step looked at; "" where it goes on."""
    settings, row = record["settings"], record["steps"][-1]
    if row["step"] == 0:
        return ""
    low = _low(row["to_peak"])
    if low > -settings["margin"]:
        return f"{record['domain']} is within {settings['margin']:g} points of its peak: {low:+.2f} at least"
    for domain, drop in row["drops"].items():
        if _low(drop) > settings["limit"]:
            return f"{domain} lost {_low(drop):.2f} points at least, over the limit of {settings['limit']:g}"
    return "the budget ended" if row["step"] >= settings["steps"] else ""


class Tracker:
    """The record of one refresh, written to `file` after every look.

    A refresh that was killed is trained again from its start, as it is short; steps in the record are not scored
    again. `best` are the parameters of the chosen step, a copy.

    Args:
      peak_params: reads θ*_i, which lie on the devices at a look alone; None where no stage on the way trained the
        domain alone.
      bases: conflict subspaces of domain i; none where there was no analysis.

    Raises:
      UserError: where the file holds a refresh with other settings.
    """

    def __init__(
        self,
        runtime: Runtime,
        stage: Stage,
        file: Path,
        peak_params: Callable[[], Any] | None = None,
        bases: Sequence[Basis] = (),
    ):
        self.runtime, self.file, self.bases, self.peak = runtime, file, tuple(bases), peak_params
        self.domain, self.learning_rate = stage.domains[0], stage.train.learning_rate
        self.best: Any = None
        settings = _settings(runtime, stage, self.bases)
        self.record: Record = {"stage": stage.name, "domain": self.domain, "settings": settings, "steps": []}
        if file.exists():
            before = records.read_json(file)
            if before["settings"] != settings:
                name = next(k for k in settings if before["settings"].get(k) != settings[k])
                raise UserError(f"{file} holds a refresh with another {name}; remove it or undo the change")
            self.record = before
        elif peak_params is not None:
            self.record["peak"] = validation_rewards(runtime, peak_params(), [self.domain])[self.domain].tolist()

    def look(self, step: int, params: Any) -> str:
        """Scores, measures and records a step, and says why the refresh ends with it; "" where it goes on.

        Step 0 comes first; of the others each `recover.every`th and the last are looked at.
        """
        settings = self.record["settings"]
        if step % settings["every"] and step != settings["steps"]:
            return ""
        rows = self.record["steps"]
        if step not in [row["step"] for row in rows]:
            rows.append(self._measure(step, params))
            self.record["chosen"], self.record["stopped"] = chosen(self.record), stop(self.record)
            self.record["contraction"] = [] if self.peak is None else contraction(rows, self.bases, self.learning_rate)
            records.write_json(self.file, self.record)
        if step == self.record["chosen"]:
            self.best = jax.tree.map(jnp.copy, params)
        return self.record["stopped"] if step == rows[-1]["step"] else ""

    def _measure(self, step: int, params: Any) -> Record:
        rewards = validation_rewards(self.runtime, params)
        start = self.record["steps"][0]["rewards"] if self.record["steps"] else rewards
        row = scores(step, self.domain, rewards, start, self.record.get("peak"))
        if self.peak is not None:
            error = tree_programs.difference(params, self.peak())
            row["distance"] = float(tree_programs.norm(error))
            row["subspaces"] = lengths(self.bases, error, self.runtime.config.seed)
        return row


def scores(
    step: int, domain: str, rewards: Mapping[str, np.ndarray], start: Mapping[str, Any], peak: Any = None
) -> Record:
    """The validation scores of a step, in points: mean, average, and paired differences to the start and the peak.

    "to_peak" is S_t − S_peak of the refreshed domain, "fraction" what came back of its loss (Fieller), "drops"
    S_start − S_t of each other domain: positive is harm.

    Args:
      rewards, start: by prompt [P, k] of each scored domain, now and at θ_T.
      peak: of the refreshed domain at θ*_i.
    """
    score = {name: estimate.clustered(x).in_points() for name, x in rewards.items()}
    differences = {d: estimate.paired_difference(start[d], rewards[d]).in_points() for d in rewards}
    row: Record = {
        "step": step,
        "rewards": {d: np.asarray(x).tolist() for d, x in rewards.items()},
        "scores": {d: e.record() for d, e in score.items()},
        "average": estimate.independent_mean(list(score.values())).record(),
        "drops": {d: e.record() for d, e in differences.items() if d != domain},
    }
    if peak is None:
        reason = f"no stage on the way trained {domain} alone"
        return row | {"to_peak": missing(reason, "points"), "fraction": missing(reason)}
    row["to_peak"] = estimate.paired_difference(rewards[domain], peak).in_points().record()
    now_P, start_P, peak_P = (np.asarray(x, float).mean(axis=1) for x in (rewards[domain], start[domain], peak))
    loss = estimate.paired_difference(peak_P, start_P)
    fraction = estimate.ratio_of_means(now_P - start_P, peak_P - start_P) if loss.low > 0 else None
    row["fraction"] = fraction.record() if fraction else missing("undefined: the interval of the loss includes 0")
    return row


def _settings(runtime: Runtime, stage: Stage, bases: Sequence[Basis]) -> Record:
    """What the record depends on besides the parameters."""
    section = runtime.config.recover
    return {
        "prompts": section.prompts,
        "samples": section.samples,
        "every": section.every,
        "margin": section.margin,
        "limit": section.limit,
        "seed": runtime.config.seed,
        "steps": stage.train.steps,
        "subspaces": [b.head() for b in bases],
    }


def _low(figure: Mapping[str, Any]) -> float:
    """The lower end of a figure's interval; −∞ where it has none."""
    return -math.inf if figure["ci95"] is None else figure["ci95"][0]
