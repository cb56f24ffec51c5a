"""The completions of a GRPO step, sampled in rounds until enough groups of them can teach (definitions §15).

A group whose rewards do not differ has no gradient. With `train.max_rounds` above 1, a step that lacks such groups
draws more prompts (dynamic sampling: DAPO, arXiv 2503.14476): another set of `prompts_per_step` prompts a round, until
it has `prompts_per_step` groups whose rewards differ, or `max_rounds` rounds. The first round is the step of a stage
without dynamic sampling. Prompts and sampling keys of a later round are functions of (seed, stage, round, step), so a
resumed stage draws the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.domains.prompts import visit_order
from mdrl_jax.rl.grpo import group_advantages
from mdrl_jax.rl.rollouts import ScoredRollouts, picked
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage

Rows = Mapping[str, np.ndarray]  # domain -> the rows of its training prompts that a stage may visit


def draw(
    runtime: Runtime, stage: Stage, params: Any, counts: Mapping[str, int], rows: Rows, step: int
) -> tuple[ScoredRollouts, list[ScoredRollouts]]:
    """Samples and scores the completions of a step.

    Args:
      runtime: prompts and rewards of the run.
      stage: the stage; its numbers of prompts, completions and rounds are read.
      params: parameters of the policy.
      counts: domain -> number of prompts of a step (`grpo.shares`).
      rows: domain -> the rows of its training prompts that may be visited. Of a domain that it lacks, all may be.
      step: number of the step, from 0.

    Returns:
      The completions of the step: of each domain the first groups whose rewards differ, in the order in which they were
      drawn, and then, if there are too few, the first of the others. And the completions of every round, the first of
      which is that of a stage without dynamic sampling. With one round both are the same.

    Raises:
      UserError, RuntimeError, ValueError, HostLost, Dropped: as in `Rollouts.sample`.
      KeyError: if a domain of `counts` has no training prompts.
    """
    train, config = stage.train, runtime.config
    rounds: list[ScoredRollouts] = []
    for number in range(train.max_rounds):
        stream = f"{stage.stream}/{number}" if number else stage.stream
        sets = []
        for domain, count in counts.items():
            prompts = runtime.prompts[domain, "train"]
            allowed = rows.get(domain)
            n = len(prompts) if allowed is None else len(allowed)
            n = min(train.n_prompts or n, n)
            before = own_steps(stage, step) if domain in stage.domains else step
            order = visit_order(config.seed, stream, domain, n, before * count, count)
            sets.append((prompts, order if allowed is None else allowed[order]))
        key_path = (config.seed, stream, step)
        rounds.append(
            runtime.rollouts.sample(
                params, sets, key_path, train.group_size, config.rollout.sampling, config.rollout.parts
            )
        )
        # A step that takes one round has nothing to choose from.
        picks, filled = _chosen(rounds, counts) if train.max_rounds > 1 else ([], True)
        if filled:
            break
    if len(rounds) == 1:
        return rounds[0], rounds
    return picked(rounds, picks, config.rollout.prompt_buckets, runtime.rollouts.pad_id), rounds


def own_steps(stage: Stage, step: int) -> int:
    """How many steps before this one had the own domains of this step; all of them, unless a stage takes turns.

    Args:
      stage: a GRPO stage.
      step: number of the step, from 0.
    """
    if stage.prefix != "alternate":
        return step
    turn = stage.train.turn
    return step // (turn * len(stage.domains)) * turn + step % turn


def informative(scored: ScoredRollouts) -> np.ndarray:
    """Whether the rewards of each group differ, bool [P], by the rule of the loss (`group_advantages`).

    Raises:
      ValueError: if the groups have fewer than two completions.
    """
    return np.asarray(jax.device_get(group_advantages(jnp.asarray(scored.rewards_PG), scale="none")[1]))


def _chosen(rounds: Sequence[ScoredRollouts], counts: Mapping[str, int]) -> tuple[list[tuple[int, int]], bool]:
    """The (round, row) of each group of the step, and whether all of them are informative."""
    teaches = [informative(scored) for scored in rounds]
    picks: list[tuple[int, int]] = []
    filled, start = True, 0
    for count in counts.values():
        drawn = [(number, row) for number in range(len(rounds)) for row in range(start, start + count)]
        able = [pick for pick in drawn if teaches[pick[0]][pick[1]]]
        rest = [pick for pick in drawn if not teaches[pick[0]][pick[1]]]
        picks += [*able, *rest][:count]
        filled, start = filled and len(able) >= count, start + count
    return picks, filled
