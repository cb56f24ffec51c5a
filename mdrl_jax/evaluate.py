"""Scores of a set of parameters on the held-out prompts of every domain (definitions §2).

The same prompts and sampling keys at every stage, so that comparisons are paired by prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mdrl_jax.config import EvaluateSection
from mdrl_jax.domains.prompts import PromptSet
from mdrl_jax.progress import Track
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
    batches = [
        (domain, at)
        for domain in runtime.config.scored_domains
        for at in range(0, len(runtime.prompts[domain, config.split]), config.batch)
    ]
    judged: dict[str, list[Any]] = {domain: [] for domain in runtime.config.scored_domains}
    with track(label, len(batches)) as show:
        for done, (domain, at) in enumerate(batches):
            show(done, domain)
            judged[domain].append(_batch(runtime, params, runtime.prompts[domain, config.split], at, config))
    rewards, accuracy, samples = {}, {}, []
    for domain, parts in judged.items():
        prompts = runtime.prompts[domain, config.split]
        rewards[domain] = np.concatenate([part[0] for part in parts])
        accuracy[domain] = np.concatenate([part[1] for part in parts])
        for i, texts in enumerate(parts[0][2][: config.shown]):
            for k, text in enumerate(texts):
                samples.append(
                    {
                        "domain": domain,
                        "prompt": prompts.problems[i].prompt,
                        "completion": text,
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
    """The same on all test prompts: what a set that was chosen by `validation_rewards` is judged by."""
    return _rewards(runtime, params, domains, "test", None)


def _rewards(
    runtime: Runtime, params: Any, domains: Sequence[str] | None, split: str, most: int | None
) -> dict[str, np.ndarray]:
    section = dataclasses.replace(runtime.config.evaluate, samples=runtime.config.recover.samples)
    rewards = {}
    for domain in domains or runtime.config.scored_domains:
        prompts = runtime.prompts[domain, split]
        ends = range(0, len(prompts) if most is None else min(len(prompts), most), section.batch)
        rewards[domain] = np.concatenate([_batch(runtime, params, prompts, at, section)[0] for at in ends])[:most]
    return rewards


def _batch(
    runtime: Runtime, params: Any, prompts: PromptSet, at: int, config: EvaluateSection
) -> tuple[Any, Any, list[list[str]]]:
    rows = np.arange(at, min(at + config.batch, len(prompts)))
    # The last batch is filled up with the first prompts again, so that its shape compiles nothing new.
    filled = np.resize(np.concatenate([rows, np.arange(config.batch - len(rows)) % len(prompts)]), config.batch)
    judged = runtime.sample(
        params,
        [(prompts, filled)],
        (runtime.config.seed, STAGE_OF_KEYS, 0),
        config.samples,
        config.sampling,
    )
    n = len(rows)
    return judged.rewards_PG[:n], judged.accuracy_PG[:n], judged.texts[:n]
