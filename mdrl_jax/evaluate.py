"""Scores parameters on held-out prompts of every domain (definitions §2).

All parameters are scored on the same prompts with the same sampling keys, so differences are paired by prompt.
`evaluate` makes the scores that a run reports; `validation_rewards` makes those by which it decides.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mdrl_jax.config import EvaluateSection
from mdrl_jax.domains.base import wanted
from mdrl_jax.domains.prompts import PromptSet
from mdrl_jax.parallel import preemption
from mdrl_jax.progress import Track
from mdrl_jax.rl.rollouts import ScoredRollouts
from mdrl_jax.runtime import Runtime

STAGE_OF_KEYS = "evaluate"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of one set of parameters.

    Attributes:
      rewards: by domain, [P, k] for P prompts and k completions each, float32, in [0, 1].
      accuracy: as `rewards`, but without the parts of the reward that judge style.
      samples: a few completions for people to read, each a dictionary with "domain", "prompt", "wanted" (what the
        reward asks for), "completion" (texts), "reward" and "accuracy".
      groups: the number of each prompt's group [P] (`PromptSet.groups`), of the domains that have groups.
      right_from: by domain, the smallest reward of an answer that counts as right (`Domain.right_from`).
      texts: by domain, the texts of the k completions of each prompt, in the form of `rewards`.
    """

    rewards: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    samples: list[dict[str, Any]]
    groups: dict[str, np.ndarray]
    right_from: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """{"rewards": ..., "accuracy": ...} as JSON-able values: by domain, a list of k numbers for each prompt.

        The float32 values are kept exactly. "right_from" has a number for each domain. If a domain has groups, "groups"
        has by domain an integer for each prompt. The texts are left out.
        """
        record = {
            "rewards": {d: x.tolist() for d, x in self.rewards.items()},
            "accuracy": {d: x.tolist() for d, x in self.accuracy.items()},
            "right_from": dict(self.right_from),
        }
        return record | ({"groups": {d: x.tolist() for d, x in self.groups.items()}} if self.groups else {})


def evaluate(runtime: Runtime, params: Any, label: str, track: Track) -> Evaluation:
    """Scores parameters on all prompts of `evaluate.split`, with `evaluate.samples` completions of each.

    The last batch of a domain is filled up with its first prompts. Their scores are dropped, but their tokens count in
    `runtime.rollouts.spent` like all others.

    Args:
      runtime: model, prompts and rewards of the run.
      params: the parameters to score.
      label: name of this work in the progress bar.
      track: shows the progress over batches of `evaluate.batch` prompts.

    Returns:
      Rewards and accuracy of every prompt of the scored domains, in the order of the prompts, and as samples all
      completions of the first `evaluate.shown` prompts of each domain.

    Raises:
      UserError: if more than `rewards.max_error_share` of a batch's rewards fail, or as in `Rollouts.sample`.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      Stopped: after a SIGTERM, if `track` is that of a `Screen`; nothing is saved.
    """
    config = runtime.config.evaluate
    total = sum(_parts(len(runtime.prompts[domain, config.split]), config) for domain in runtime.config.scored_domains)
    rewards, accuracy, texts, samples, done = {}, {}, {}, [], 0
    with track(label, total) as show:
        for domain in runtime.config.scored_domains:
            prompts = runtime.prompts[domain, config.split]
            told = lambda part, domain=domain, done=done: show(done + part, domain)  # noqa: E731
            scored = _scored(runtime, params, prompts, len(prompts), config, told)
            done += _parts(len(prompts), config)
            rewards[domain], accuracy[domain] = (x[: len(prompts)] for x in (scored.rewards_PG, scored.accuracy_PG))
            text = functools.partial(runtime.rollouts.text, scored.completions)
            texts[domain] = [[text(i, k) for k in range(config.samples)] for i in range(len(prompts))]
            for i in range(min(config.shown, len(prompts))):
                for k in range(config.samples):
                    samples.append(
                        {
                            "domain": domain,
                            "prompt": prompts.problems[i].prompt,
                            "wanted": wanted(prompts.problems[i].check),
                            "completion": texts[domain][i][k],
                            "reward": float(rewards[domain][i, k]),
                            "accuracy": float(accuracy[domain][i, k]),
                        }
                    )
    right_from = {d: runtime.domains[d].right_from for d in rewards}
    return Evaluation(rewards, accuracy, samples, groups_of(runtime, config.split), right_from, texts)


def text_rows(runtime: Runtime, result: Evaluation) -> Iterator[dict[str, Any]]:
    """The rows of a file of all completions: "domain", "prompt" (its number), "text" (the prompt's) and "completions".

    Args:
      runtime: of the run, whose `evaluate.split` was scored.
      result: what `evaluate` returned.
    """
    for domain, texts in result.texts.items():
        problems = runtime.prompts[domain, runtime.config.evaluate.split].problems
        for i, completions in enumerate(texts):
            yield {"domain": domain, "prompt": i, "text": problems[i].prompt, "completions": completions}


def fingerprints(runtime: Runtime) -> dict[str, str]:
    """By scored domain, a hash of the tokens of all prompts that `evaluate` scores, and of their order."""
    found = {}
    for domain in runtime.config.scored_domains:
        rows = runtime.prompts[domain, runtime.config.evaluate.split].tokens
        found[domain] = hashlib.blake2b(json.dumps([list(r) for r in rows]).encode(), digest_size=8).hexdigest()
    return found


def validation_rewards(runtime: Runtime, params: Any, domains: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Scores parameters for a decision: which step, coordinate set or factor is best, or whether a target is reached.

    The first `recover.prompts` validation prompts of each domain are used, or all if there are fewer. They are sampled
    as `evaluate` samples (`evaluate.sampling`, the same keys). The scores of the choice are reported on other prompts,
    by `evaluate` (with its default split) or by `held_out_rewards`.

    Args:
      runtime: model, prompts and rewards of the run.
      params: the parameters to score.
      domains: names of the domains to score; None or empty: all scored domains.

    Returns:
      Rewards by domain, float32 [P, k] in [0, 1] for P prompts in their order, with k = `recover.samples`.

    Raises:
      UserError: if more than `rewards.max_error_share` of a batch's rewards fail, or as in `Rollouts.sample`.
      KeyError: if there is no domain of a given name.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      Stopped: after a SIGTERM or Ctrl-C; in the middle of a batch it is the subclass `Dropped`, and the devices may
        still be sampling.
      HostLost: if another process does not come within the time-out.
    """
    return _rewards(runtime, params, domains, "validation", runtime.config.recover.prompts)


def groups_of(runtime: Runtime, split: str) -> dict[str, np.ndarray]:
    """The groups of the prompts of a split; intervals take whole groups as the unit.

    Args:
      runtime: of the run.
      split: "train", "validation" or "test".

    Returns:
      For each scored domain whose prompts form groups (`group_by`): the number of each prompt's group, integers [P], in
      the order of the prompts.
    """
    sets = {domain: found for (domain, of), found in runtime.prompts.items() if of == split}
    return {d: s.groups for d, s in sets.items() if s.groups is not None}


def validation_groups(runtime: Runtime) -> dict[str, np.ndarray]:
    """The groups of the prompts of `validation_rewards`, in the form of `groups_of`."""
    return {d: g[: runtime.config.recover.prompts] for d, g in groups_of(runtime, "validation").items()}


def held_out_rewards(
    runtime: Runtime, params: Any, domains: Sequence[str] | None = None, again: int = 0
) -> dict[str, np.ndarray]:
    """Scores parameters on all test prompts, to report on a choice that was made by `validation_rewards`.

    Completions are sampled as there, so calls with different parameters are paired by prompt. With several processes
    every process has to make the call. It adds to `runtime.rollouts.spent`.

    Args:
      runtime: model, prompts and rewards of the run.
      params: the parameters to score.
      domains: names of the domains to score; None or empty: all scored domains.
      again: draws other completions of the same prompts for each number, from 0; 0 are those of `evaluate`.

    Returns:
      Rewards by domain, float32 [P, k] in [0, 1] for all P prompts in their order, with k = `recover.samples`.

    Raises:
      UserError, KeyError, RuntimeError, Stopped, HostLost: as in `validation_rewards`.
    """
    return _rewards(runtime, params, domains, "test", None, again)


def _rewards(
    runtime: Runtime,
    params: Any,
    domains: Sequence[str] | None,
    split: str,
    most: int | None,
    again: int = 0,
) -> dict[str, np.ndarray]:
    section = dataclasses.replace(runtime.config.evaluate, samples=runtime.config.recover.samples)
    rewards = {}
    for domain in domains or runtime.config.scored_domains:
        prompts = runtime.prompts[domain, split]
        n = len(prompts) if most is None else min(len(prompts), most)
        check = lambda part, domain=domain: preemption.check(f"scores of {domain} on {split} prompts")  # noqa: E731
        rewards[domain] = _scored(runtime, params, prompts, n, section, check, again).rewards_PG[:n]
    return rewards


def _parts(n: int, config: EvaluateSection) -> int:
    return -(-n // config.batch)


def _scored(
    runtime: Runtime,
    params: Any,
    prompts: PromptSet,
    n: int,
    config: EvaluateSection,
    show: Callable[[int], None] = lambda part: None,
    again: int = 0,
) -> ScoredRollouts:
    """Samples and scores the first n prompts; more prompts fill the last batch, so that all batches have one shape."""
    parts = _parts(n, config)
    # If there are too few prompts to fill the last batch, the first ones are taken again.
    rows = np.arange(parts * config.batch) % len(prompts)
    key_path = (runtime.config.seed, STAGE_OF_KEYS, again)
    return runtime.rollouts.sample(params, [(prompts, rows)], key_path, config.samples, config.sampling, parts, show)
