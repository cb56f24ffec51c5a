"""Scores of a set of parameters on the held-out prompts of every domain (definitions §2).

The same prompts and sampling keys at every stage, so that comparisons are paired by prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdrl_jax import preemption
from mdrl_jax.config import EvaluateSection
from mdrl_jax.domains.prompts import PromptSet
from mdrl_jax.progress import Track
from mdrl_jax.rl.rollouts import ScoredRollouts
from mdrl_jax.runtime import Runtime

STAGE_OF_KEYS = "evaluate"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Per-prompt results by domain, [P, k] in [0, 1], and a few samples to read."""

    rewards: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    samples: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """As JSON; float32 values are written exactly."""
        return {
            "rewards": {d: x.tolist() for d, x in self.rewards.items()},
            "accuracy": {d: x.tolist() for d, x in self.accuracy.items()},
        }


def evaluate(runtime: Runtime, params: Any, label: str, track: Track) -> Evaluation:
    """Samples `evaluate.samples` completions of every prompt of `evaluate.split` and judges them; `label` is shown."""
    config = runtime.config.evaluate
    total = sum(_parts(len(runtime.prompts[domain, config.split]), config) for domain in runtime.config.scored_domains)
    rewards, accuracy, samples, done = {}, {}, [], 0
    with track(label, total) as show:
        for domain in runtime.config.scored_domains:
            prompts = runtime.prompts[domain, config.split]
            told = lambda part, domain=domain, done=done: show(done + part, domain)  # noqa: E731
            scored = _scored(runtime, params, prompts, len(prompts), config, told)
            done += _parts(len(prompts), config)
            rewards[domain], accuracy[domain] = (x[: len(prompts)] for x in (scored.rewards_PG, scored.accuracy_PG))
            for i in range(min(config.shown, len(prompts))):
                for k in range(config.samples):
                    samples.append(
                        {
                            "domain": domain,
                            "prompt": prompts.problems[i].prompt,
                            "completion": runtime.rollouts.text(scored.completions, i, k),
                            "reward": float(rewards[domain][i, k]),
                            "accuracy": float(accuracy[domain][i, k]),
                        }
                    )
    return Evaluation(rewards, accuracy, samples)


def validation_rewards(runtime: Runtime, params: Any, domains: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Rewards [P, k] on the first `recover.prompts` validation prompts, `recover.samples` completions each.

    The same prompts and keys for all parameters, so that differences are paired; `domains`: all scored ones.
    What is chosen (a step, a coordinate set, a factor) is chosen by these, and reported by `evaluate`.
    """
    return _rewards(runtime, params, domains, "validation", runtime.config.recover.prompts)


def held_out_rewards(runtime: Runtime, params: Any, domains: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The same on all test prompts: what a set that was chosen by `validation_rewards` is scored by."""
    return _rewards(runtime, params, domains, "test", None)


def _rewards(
    runtime: Runtime, params: Any, domains: Sequence[str] | None, split: str, most: int | None
) -> dict[str, np.ndarray]:
    section = dataclasses.replace(runtime.config.evaluate, samples=runtime.config.recover.samples)
    rewards = {}
    for domain in domains or runtime.config.scored_domains:
        prompts = runtime.prompts[domain, split]
        n = len(prompts) if most is None else min(len(prompts), most)
        check = lambda part, domain=domain: preemption.check(f"scores of {domain} on {split} prompts")  # noqa: E731
        rewards[domain] = _scored(runtime, params, prompts, n, section, check).rewards_PG[:n]
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
) -> ScoredRollouts:
    """The first n prompts and, so that the last batch has a shape that is compiled, as many more as fill it up."""
    parts = _parts(n, config)
    # What fills it up is drawn from the first prompts again where there are no more.
    rows = np.arange(parts * config.batch) % len(prompts)
    key_path = (runtime.config.seed, STAGE_OF_KEYS, 0)
    return runtime.rollouts.sample(params, [(prompts, rows)], key_path, config.samples, config.sampling, parts, show)
