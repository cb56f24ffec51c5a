"""Scores a refresh step by step, stops it, and decides which step it keeps (definitions §8).

A refresh of domain i is plain GRPO training of i from θ_T, the end of the sequence; a distillation (definitions §10) is
followed in the same way. The training loop (`stages/train.py`) hands the parameters of each step to a `Tracker`, which
scores them on validation prompts, measures the displacement θ_t − θ*_i, and says when to stop:

    tracker = Tracker(runtime, stage, file, peaks, bases)
    tracker.look(0, start_params)
    for done, state in ...:
        if tracker.look(done, state.params):
            break
    tracker.best, tracker.record["chosen"]
    for repeat in tracker.repeats(stage):
        tracker.follow(repeat, parameters at its end)

A single walk from θ_T says nothing of another one. So with `recover.streams` above 1 the refresh is repeated with other
sampling keys and once on each other domain, for as many steps, to see how much the displacement contracts. Repeats are
neither scored nor kept.

The choices of the rule [chosen]:
  * Another domain's drop is over its limit if the lower end of its paired interval is. The return to the peak must be
    as certain. With about a hundred prompts, an estimate alone passes a limit of 2 points by chance.
  * Step 0, which is no training, is a candidate. Among steps with equal averages the earliest is kept.
  * A stage of several domains stops once each of them is near its peak. Its record and its displacement are of
    the domain that has lost most on the validation prompts at step 0, the first of equal ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.config import is_supervised
from mdrl_jax.evaluate import validation_groups, validation_rewards
from mdrl_jax.parallel import tree_programs
from mdrl_jax.recovery.looks import Looks
from mdrl_jax.recovery.refresh.contraction import Basis, contraction, lengths
from mdrl_jax.recovery.spent import metered
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stats import estimate
from mdrl_jax.stats.estimate import Record, missing


def chosen(record: Mapping[str, Any]) -> int:
    """The number of the step with the best validation average over all scored domains, the earliest of equal ones.

    Args:
      record: a record of `Tracker` with at least one scored step.
    """
    return max(record["steps"], key=lambda row: (row["average"]["estimate"], -row["step"]))["step"]


def stop(record: Mapping[str, Any]) -> str:
    """Why the refresh stops at the last scored step of its record, in words; "" if it goes on.

    The first of these conditions that holds is the reason:

    - the refreshed domain is near its peak: the lower end of the interval of "to_peak" is above −"margin"; of several
      domains each is ("to_peaks");
    - another domain lost too much: the lower end of the interval of its drop is above "limit";
    - the step is the last one, "steps" of the settings.

    Step 0 never stops a refresh. A figure without an interval meets neither of the first two conditions.

    Args:
      record: a record of `Tracker` with at least one scored step. "margin" and "limit" of its settings, "to_peak" and
        "drops" are in points.
    """
    settings, row = record["settings"], record["steps"][-1]
    if row["step"] == 0:
        return ""
    low = min(map(_low, row.get("to_peaks", {"": row["to_peak"]}).values()))
    if low > -settings["margin"] and "to_peaks" in row:
        return f"all domains are within {settings['margin']:g} points of their peaks: {low:+.2f} at least"
    if low > -settings["margin"]:
        return f"{record['domain']} is within {settings['margin']:g} points of its peak: {low:+.2f} at least"
    for domain, drop in row["drops"].items():
        if _low(drop) > settings["limit"]:
            return f"{domain} lost {_low(drop):.2f} points at least, over the limit of {settings['limit']:g}"
    return "the budget ended" if row["step"] >= settings["steps"] else ""


class Tracker:
    """The record of one refresh, which is written to a file after every scored step.

    A refresh that was killed is trained again from its start, because it is short. Steps that are in the record already
    are not scored again.

    Attributes:
      best: a copy of the parameters of the step record["chosen"]; None until `look` was called with that step.
      last: a copy of the parameters of the last scored step; the next part of the path is measured from there.

    Args:
      runtime: of the run.
      stage: the refresh, of one domain, or the distillation, of one or several.
      file: where the record is read from, if the file exists, and written to.
      peaks: for each domain i of the stage a function that reads θ*_i. That of the record's domain is called at every
        scored step, so that θ*_i is not kept on the devices in between. A domain that no stage on the way trained alone
        is left out. None: no θ*_i is known.
      bases: conflict subspaces of each domain of the stage; None or empty if there was no analysis.

    Raises:
      UserError: if the file holds a refresh with other settings or is not valid JSON, or if θ*_i is scored and too many
        rewards fail. θ*_i is scored on the validation prompts if the file does not exist.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      Stopped: after a SIGTERM, while θ*_i is scored.
      The errors of the functions in `peaks`.
    """

    def __init__(
        self,
        runtime: Runtime,
        stage: Stage,
        file: Path,
        peaks: Mapping[str, Callable[[], Any]] | None = None,
        bases: Mapping[str, Sequence[Basis]] | None = None,
    ):
        self.runtime, self.domains, self.learning_rate = runtime, stage.domains, stage.train.learning_rate
        self._peaks, self._bases = peaks or {}, bases or {}
        self.best: Any = None
        self.last: Any = None
        settings = _settings(runtime, stage, [b for d in stage.domains for b in self._bases.get(d, ())])
        head: Record = {"stage": stage.name, "domain": stage.domains[0], "settings": settings, "steps": []}
        what = "a distillation" if stage.prefix == "distill" else "a refresh"
        meter = functools.partial(metered, runtime)
        self._looks = Looks(file, head, self._measure, self._judge, what, meter)
        if self._looks.new and self._peaks:
            read_costs = meter()
            scored = {d: validation_rewards(runtime, read(), [d])[d].tolist() for d, read in self._peaks.items()}
            if self.domain in scored:
                self.record["peak"] = scored[self.domain]
            if len(self.domains) > 1:
                self.record["peaks"] = scored
            self.record["costs"] = read_costs()

    @property
    def record(self) -> Record:
        """The record so far, as in the file."""
        return self._looks.record

    @property
    def paid(self) -> Mapping[str, float]:
        """The costs of the scores that an interrupted run left in the record (`recovery.spent.metered`)."""
        return self._looks.paid(None)

    @property
    def domain(self) -> str:
        """The domain of the record: the refreshed one; of several the one that has lost most."""
        return self.record["domain"]

    @property
    def peak(self) -> Callable[[], Any] | None:
        """Reads θ*_i of the record's domain; None if it is not known."""
        return self._peaks.get(self.domain)

    @property
    def bases(self) -> tuple[Basis, ...]:
        """The conflict subspaces of the record's domain; () if there are none."""
        return tuple(self._bases.get(self.domain, ()))

    def look(self, step: int, params: Any) -> str:
        """Scores, measures and records a step, and decides whether the refresh stops with it.

        Call it with step 0, the start of the refresh, and then after every step. Only every `recover.every`th step and
        the last one are scored.

        Args:
          step: number of the step.
          params: θ_t, the parameters after it.

        Returns:
          The reason to stop, in words; "" if the refresh goes on.

        Raises:
          UserError: if too many rewards of the validation prompts fail.
          RuntimeError: if the reward workers do not start, or their pool is closed.
          Stopped: after a SIGTERM, while the step is scored; it is not recorded then.
          The errors of the function of `peaks` that reads θ*_i.
        """
        if not self._looks.due(step):
            return ""
        ended = self._looks.look(step, params)
        self.last = jax.tree.map(jnp.copy, params)
        if step == self.record["chosen"]:
            self.best = jax.tree.map(jnp.copy, params)
        return ended

    def repeats(self, stage: Stage) -> list[Stage]:
        """The repeats of a refresh that has ended: those of `recover.streams` that are not in the record.

        Args:
          stage: the refresh.

        Returns:
          The stage with as many steps as it took: with other sampling keys, until there are `recover.streams` streams,
          and then of each other scored domain that it does not keep. Empty if `recover.streams` is 1, if there is no
          conflict subspace, or if θ*_i is not known. A stage of several domains is repeated on these alone.
        """
        config, steps = self.runtime.config, self.record["steps"][-1]["step"]
        if config.recover.streams == 1 or not self.bases or self.peak is None or not steps:
            return []
        wanted = [(stage.domains, f"{stage.stream}-{i}") for i in range(2, config.recover.streams + 1)]
        if len(stage.domains) == 1:
            others = (d for d in config.scored_domains if d != self.domain and d not in stage.keeps)
            wanted += [((d,), f"{stage.stream}-by-{d}") for d in others]
        known, train = (
            {s["stream"] for s in self.record.get("streams", ())},
            dataclasses.replace(stage.train, steps=steps),
        )
        return [
            dataclasses.replace(stage, domains=domains, stream=stream, train=train)
            for domains, stream in wanted
            if stream not in known
        ]

    def follow(self, repeat: Stage, params: Any) -> None:
        """Measures the displacement at the end of a repeat, and adds it to the record and to its contraction.

        Args:
          repeat: one of `repeats`.
          params: the parameters after its last step.

        Raises:
          The errors of the function of `peaks` that reads θ*_i.
        """
        domain = self.domain if self.domain in repeat.domains else repeat.domains[0]
        head = {"domain": domain, "stream": repeat.stream, "step": repeat.train.steps}
        self.record.setdefault("streams", []).append(head | self._displacement(params))
        self.record["contraction"] = self._contraction()
        self._looks.write()

    def add(self, name: str, figure: Any) -> None:
        """Adds a field to the record of a refresh that has ended, and writes it."""
        self.record[name] = figure
        self._looks.write()

    def _judge(self, record: Record) -> None:
        record["chosen"], record["stopped"] = chosen(record), stop(record)
        record["contraction"] = self._contraction()

    def _contraction(self) -> list[Record]:
        """The contraction by all steps and repeats so far; [] if θ*_i is not known."""
        if self.peak is None:
            return []
        rows, streams, others = self.record["steps"], [], {}
        for ends in self.record.get("streams", ()):
            path = [rows[0], ends]
            if ends["domain"] == self.domain:
                streams.append(path)
            else:
                others[ends["domain"]] = path
        return contraction(rows, self.bases, self.learning_rate, streams, others)

    def _displacement(self, params: Any) -> Record:
        """‖e‖ ("distance") and its parts ("subspaces") at some parameters; empty if θ*_i is not known."""
        if self.peak is None:
            return {}
        error = tree_programs.difference(params, self.peak())
        subspaces = lengths(self.bases, error, self.runtime.config.seed)
        return {"distance": float(tree_programs.norm(error)), "subspaces": subspaces}

    def _measure(self, step: int, params: Any) -> Record:
        rewards, groups = validation_rewards(self.runtime, params), validation_groups(self.runtime)
        peaks = self.record.get("peaks", {})
        if peaks and not self.record["steps"]:
            lost = {d: float(np.mean(peak)) - float(np.mean(rewards[d])) for d, peak in peaks.items()}
            self.record["domain"] = max(lost, key=lambda d: lost[d])
            self.record["peak"] = peaks[self.domain]
        start = self.record["steps"][0]["rewards"] if self.record["steps"] else rewards
        row = scores(step, self.domain, rewards, start, self.record.get("peak"), groups)
        if peaks:
            each = {d: estimate.paired_difference(rewards[d], peak, groups.get(d)) for d, peak in peaks.items()}
            row["to_peaks"] = {d: e.in_points().record() for d, e in each.items()}
        row["path"] = 0.0
        if self.last is not None:
            moved = float(tree_programs.norm(tree_programs.difference(params, self.last)))
            row["path"] = self.record["steps"][-1]["path"] + moved
        return row | self._displacement(params)


def variant(stage: Stage, own: Stage | None) -> str:
    """How a refresh differs from a plain one, in words; "" for a plain one (definitions §8).

    A plain refresh trains from the end of a plain stage, without protecting other domains and with the learning rate,
    the loss and the optimizer of the domain's own stage. The numbers of steps, prompts and completions are free. The
    start counts as a plain stage if its name has no "-", is not "base" and is not that of a supervised stage, so
    `joint` is one as well.

    Args:
      stage: the refresh.
      own: the plain stage of its domain; None if there is none, and then learning rate, loss and optimizer are not
        compared.

    Returns:
      All differences, joined by ", ", such as "it starts from refresh-qa, it keeps code".
    """
    train, found = stage.train, []
    if "-" in stage.start or stage.start == "base" or is_supervised(stage.start):
        found.append(f"it starts from {stage.start}")
    if stage.keeps:
        found.append(f"it keeps {', '.join(stage.keeps)}")
    if own is not None:
        if train.learning_rate != own.train.learning_rate:
            found.append(f"its learning rate is {train.learning_rate:g}, not {own.train.learning_rate:g}")
        for name in ("grpo", "optimizer"):
            if getattr(train, name) != getattr(own.train, name):
                found.append(f"its settings of {name} are not those of {own.name}")
    return ", ".join(found)


def scores(
    step: int,
    domain: str,
    rewards: Mapping[str, np.ndarray],
    start: Mapping[str, Any],
    peak: Any = None,
    groups: Mapping[str, np.ndarray] | None = None,
) -> Record:
    """One row of the record: the validation scores of a step, and their differences to the start and to the peak.

    Args:
      step: number of the step.
      domain: the domain that is refreshed.
      rewards: rewards [P, k] of each scored domain at θ_t, for P prompts with k completions each.
      start: the same at θ_T, the start of the refresh, on the same prompts.
      peak: rewards [P, k] of the refreshed domain at θ*_i, on the same prompts; None if θ*_i is not known.
      groups: the number of each prompt's group [P], for each domain whose prompts form groups; None: no domain's do.

    Returns:
      "step"; "rewards", as lists; "scores" of each domain; "average", their mean over domains; "drops", S_start − S_t
      of each other domain, positive if it lost; "to_peak", S_t − S_peak of the refreshed domain; and "fraction", the
      share (S_t − S_start) / (S_peak − S_start) of its loss that it has won back, with Fieller's interval. Scores and
      differences are in points. The last two are missing if `peak` is None, and the fraction also unless the interval
      of the loss lies above 0. Intervals are over prompts, or over their groups; with a single one there are
      none.

    Raises:
      KeyError: if `start` lacks a domain, or if `peak` is given and `rewards` lacks the refreshed domain.
      ValueError: if the numbers of prompts of a domain differ, or if a domain has no prompts.
    """
    groups = groups or {}
    score = {name: estimate.score(x, groups.get(name)) for name, x in rewards.items()}
    differences = {d: estimate.paired_difference(start[d], rewards[d], groups.get(d)).in_points() for d in rewards}
    own = groups.get(domain)
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
    row["to_peak"] = estimate.paired_difference(rewards[domain], peak, own).in_points().record()
    now_P, start_P, peak_P = (np.asarray(x, float).mean(axis=1) for x in (rewards[domain], start[domain], peak))
    loss = estimate.paired_difference(peak_P, start_P, own)
    fraction = estimate.ratio_of_means(now_P - start_P, peak_P - start_P, groups=own) if loss.low > 0 else None
    row["fraction"] = fraction.record() if fraction else missing("undefined: the interval of the loss includes 0")
    return row


def _settings(runtime: Runtime, stage: Stage, bases: Sequence[Basis]) -> Record:
    """The settings that the record depends on. A record with other settings must not be continued."""
    section = runtime.config.recover
    distill = {"distill": dataclasses.asdict(stage.train.distill)} if stage.prefix == "distill" else {}
    return distill | {
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
    """The lower end of a figure's interval; −∞ if the figure has no interval."""
    return -math.inf if figure["ci95"] is None else figure["ci95"][0]
