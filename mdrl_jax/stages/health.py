"""Warnings in words where the steps of a GRPO stage show that it learns little: equal rewards, completions cut off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

MANY = 0.5  # share of groups with equal rewards from which on the stage warns
NEAR = 0.9  # mean length, as a share of the longest completion allowed, from which on the stage warns


@dataclasses.dataclass
class Health:
    """What the steps of a stage have shown so far; `step` adds one.

    Attributes:
      stage: name of the stage.
      longest: the longest completion allowed, in tokens.
      rewarded: whether the stage learns from rewards. A distillation does not, so equal rewards are no fault there.
      first: number of steps that were done before this run.
      steps, idle: steps so far, and those in which the rewards of no group differed.
      groups, equal: groups that were trained on, and those whose rewards did not differ.
      reward, length, ended: sums over the steps of their mean reward, mean length in tokens and share that ended.
    """

    stage: str
    longest: int
    rewarded: bool = True
    first: int = 0
    steps: int = 0
    idle: int = 0
    groups: int = 0
    equal: int = 0
    reward: float = 0.0
    length: float = 0.0
    ended: float = 0.0

    def step(self, done: int, metrics: Mapping[str, Any]) -> str:
        """Adds a step; returns a warning at the first step in which the rewards of no group differed, otherwise "".

        Args:
          done: number of the step, from 1.
          metrics: those of `grpo.grpo_steps`.
        """
        groups, equal = int(metrics["trained_groups"]), int(metrics["equal_groups"])
        self.steps, self.groups, self.equal = self.steps + 1, self.groups + groups, self.equal + equal
        self.reward, self.length = self.reward + metrics["reward"], self.length + metrics["length"]
        self.ended += metrics["ended"]
        if equal < groups or not self.rewarded:
            return ""
        self.idle += 1
        if self.idle > 1:
            return ""
        return (
            f"{self.stage}: no reward differed in {equal} of {groups} groups of step {done}, so it learned nothing "
            "from rewards"
        )

    def summary(self) -> list[str]:
        """The warnings at the end of the stage; empty if nothing is wrong."""
        if not self.steps:
            return []
        since = f" since step {self.first}" if self.first else ""
        found = []
        if self.rewarded and self.equal >= MANY * self.groups:
            told = f"{self.stage}: no reward differed in {self.equal} of {self.groups} groups{since}"
            if self.equal == self.groups:
                told += f": the stage learned nothing from rewards; {self._why()}"
            elif self.idle:
                told += f", and in no group of {self.idle} of {self.steps} steps; {_FILL}"
            else:
                told += f"; {_FILL}"
            found.append(told)
        length, cut = self.length / self.steps, 1 - self.ended / self.steps
        if length >= NEAR * self.longest:
            found.append(
                f"{self.stage}: the mean length of completions was {length:.0f} of at most {self.longest} tokens, and "
                f"{cut:.0%} were cut off; raise the last of rollout.completion_buckets"
            )
        return found

    def _why(self) -> str:
        mean = self.reward / self.steps
        if mean == 0:
            return (
                "every reward was 0, so train the model on demonstrations first (stage sft), or choose easier prompts"
            )
        return "every reward was 1, so nothing is left to learn from these prompts" if mean == 1 else _FILL


_FILL = "a larger train.max_rounds, or train.filter, fills steps with groups whose rewards differ"
