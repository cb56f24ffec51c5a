"""Which training prompts a GRPO stage keeps, by the success rate of its first policy on them (definitions §15).

With `train.filter`, the policy that the stage starts from answers training prompts once, `group_size` times each. The
stage then visits only those whose success rate lies between two bounds. The rates are written to
`filters/NN-stage.json` and read from there when a run is resumed.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdrl_jax.domains.prompts import visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.progress import Track
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage


def measure(runtime: Runtime, stage: Stage, params: Any, track: Track) -> dict[str, Any]:
    """Measures the success rates of the training prompts of a stage's own domains.

    Prompts are sampled in batches of `prompts_per_step`, as in training; the last batch is filled up with the first
    prompts, whose rewards are dropped there.

    Args:
      runtime: prompts, rewards and configuration of the run.
      stage: a stage whose `train.filter` is on.
      params: the parameters that the stage starts from.
      track: shows the progress over batches.

    Returns:
      {"stage", "start", "low", "high", "group_size", "domains"}: for each domain "prompts", the number that was
      measured, and how many of these were "kept", "below" and "above" the bounds; and for each measured prompt its row
      ("rows") and its success rate ("rates"), the mean reward of its completions, from 0 to 1.

    Raises:
      UserError: if no prompt of a domain lies between the bounds, or too many rewards fail.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      Stopped: after a SIGTERM; nothing is saved.
    """
    train, config = stage.train, runtime.config
    section, stream, size = train.filter, f"{stage.stream}/filter", train.prompts_per_step
    orders = {}
    for domain in stage.domains:
        n = len(runtime.prompts[domain, "train"])
        orders[domain] = visit_order(config.seed, stream, domain, n, 0, min(n, section.prompts or n))
    found, done = {}, 0
    with track(f"{stage.name}: success rates", sum(math.ceil(len(o) / size) for o in orders.values())) as show:
        for domain, order in orders.items():
            rates = []
            for first in range(0, len(order), size):
                show(done, domain)
                rows = order[(first + np.arange(size)) % len(order)]
                scored = runtime.rollouts.sample(
                    params, [(runtime.prompts[domain, "train"], rows)], (config.seed, stream, 0), train.group_size,
                    config.rollout.sampling, config.rollout.parts,
                )  # fmt: skip
                rates += scored.rewards_PG.mean(axis=1, dtype=np.float64).tolist()
                done += 1
            found[domain] = _domain(order, np.asarray(rates[: len(order)]), section.low, section.high)
            if not found[domain]["kept"]:
                below, above = found[domain]["below"], found[domain]["above"]
                raise UserError(
                    f"stage {stage.name}: none of {len(order)} training prompts of {domain} has a success rate from "
                    f"{section.low:g} to {section.high:g} ({below} are below, {above} above); widen train.filter, or "
                    "let it measure more prompts"
                )
    head = {"stage": stage.name, "start": stage.start, "low": section.low, "high": section.high}
    return head | {"group_size": train.group_size, "domains": found}


def _domain(rows: np.ndarray, rates: np.ndarray, low: float, high: float) -> dict[str, Any]:
    below, above = int((rates < low).sum()), int((rates > high).sum())
    counts = {"prompts": len(rows), "kept": len(rows) - below - above, "below": below, "above": above}
    return counts | {"rows": rows.tolist(), "rates": rates.tolist()}


def kept(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rows that the stage may visit, by domain, in ascending order [kept], from a record of `measure`.

    Raises:
      KeyError: if the record lacks a field.
    """
    found = {}
    for domain, measured in record["domains"].items():
        rates = np.asarray(measured["rates"])
        inside = (rates >= record["low"]) & (rates <= record["high"])
        found[domain] = np.sort(np.asarray(measured["rows"], np.int64)[inside])
    return found


def note(record: Mapping[str, Any]) -> str:
    """One line on how many prompts were kept; the argument is that of `kept`."""
    domains = "; ".join(
        f"{m['kept']} of {m['prompts']} training prompts of {d} ({m['below']} below, {m['above']} above)"
        for d, m in record["domains"].items()
    )
    return f"{record['stage']}: keeps those with a success rate from {record['low']:g} to {record['high']:g}: {domains}"
