"""Which action to take at θ_T: forecasts of all domains' scores after each, ranked, without trying any of them.

| action | direction v of its forecast at θ_T | size |
|---|---|---|
| nothing | none | 0 |
| refresh of i for n steps | the first step of the stage's optimizer, from a fresh state, on completions of i at θ_T, \
times the learning rate summed over n steps | that sum |
| rollback of A from B by (rule, q, β) | −β m ⊙ δ_B | ‖v‖ / ‖δ_B‖ |

A forecast is first order in log-odds with errors told by the run's own past (`forecast`): each stage on the way to θ_T
is a refresh of its domain whose outcome is known, and taking its edit back from its end a rollback whose outcome is
known. The `recover.n_reweighted` most promising are then looked at where they end, by importance weights of the same
completions (`weights`), domain by domain where these say enough. A rollback's end is known, and its error that of the
weights alone; a refresh is rehearsed on the completions that its first step is made from, and its error is also that of
its like in the past. Nothing is sampled after a candidate, and its outcome is never used. On two tuning seeds of the
quickstart weights brought the mean error of 88 forecasts from 0.67 and 0.78 points to 0.44 and 0.72; weights along the
line of a refresh's first step, instead of a rehearsal, put Math 18 points too low on one of them (22 of 40 gained).

Actions are ranked by the expected mean over domains; one is allowed if no other domain (than the one refreshed, or
kept) is expected to lose more than `recover.limit` points. The limit is held against the expected loss [chosen]; `risk`
is the chance, by the forecast, that some other domain loses more. A score is limited by 1 alone, not by the domain's
peak [chosen]: the gradient that is left at θ_T says whether there is more.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import tree
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.config import RecoverSection
from mdrl_jax.errors import UserError
from mdrl_jax.progress import Track
from mdrl_jax.recovery.planning.decision import Action, Outlook, decide, promising
from mdrl_jax.recovery.planning.forecast import Known, Shift, log_odds
from mdrl_jax.recovery.planning.importance import Reweighted, reweighted
from mdrl_jax.recovery.planning.lookahead import (
    Direction,
    Found,
    OffPolicyLookahead,
    at_hand,
    length,
    measure,
    path_length,
    rounds,
    unseen,
)
from mdrl_jax.recovery.rollback import evidence
from mdrl_jax.recovery.rollback.evidence import NOW, Ends, kept_sample
from mdrl_jax.recovery.rollback.rules import masked
from mdrl_jax.recovery.rollback.selection import largest, support
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, peak, way

BUDGET = 0.2  # of a stage's steps: the longest refresh considered (definitions §13, C6)
RULE = "removing"  # of rollbacks considered: the one that reads the kept domain's gradient at θ_T [chosen]
Rewards = Mapping[str, np.ndarray]


def trail(stages: Sequence[Stage], last: str) -> list[Stage]:
    """The stages on the way to the end of `last` that trained one domain alone, first ones first."""
    return [s for s in way(last, stages) if s.kind == "grpo" and len(s.domains) == 1]


def candidates(settings: RecoverSection, past: Sequence[Stage]) -> list[Action]:
    """Nothing; refreshes of up to `BUDGET` of a stage's steps; rollbacks by `RULE` from every later donor."""
    found = [Action()]
    last = {s.domains[0]: s for s in past}
    for domain, own in last.items():
        longest = max(1, int(BUDGET * own.train.steps))
        found += [Action("refresh", domain, n) for n in range(1, longest + 1)]
    for domain, donor in ((a, b) for a in last for b in last if past.index(last[a]) < past.index(last[b])):
        found += [
            Action("rollback", domain, 0, donor, RULE, q, beta)
            for q in settings.fractions
            for beta in settings.strengths
        ]
    return found


def plan(
    runtime: Runtime,
    probe: Probe,
    folder: Path,
    stages: Sequence[Stage],
    last: str,
    params: Callable[[str], Any],
    current: Rewards,
    track: Track,
    actions: Sequence[Action] | None = None,
) -> dict[str, Any]:
    """The record of a plan at the end of stage `last` (`decision.decide`).

    Args:
      folder: of the run, for samples that are kept.
      stages: all stages before the plan.
      params: stage name -> parameters at its end; "base" too.
      current: validation rewards at θ_T of every scored domain.
      actions: `candidates`, unless given.

    Raises:
      UserError: where no stage on the way trained a domain alone, or prompts are too few (`slopes.unseen`).
    """
    past = trail(stages, last)
    if not past:
        raise UserError(f"plan: no stage on the way to {last} trained a domain alone, so nothing can be won back")
    actions = candidates(runtime.config.recover, past) if actions is None else actions
    work = Work(runtime, probe, folder, past, last, params)
    settings = runtime.config.recover
    outlooks, known, now = work.look(actions, track)
    record = decide(last, current, outlooks, known, settings.limit)
    if chosen := promising(record, settings.n_reweighted):
        said = work.weigh(chosen, now, track)
        outlooks = [dataclasses.replace(o, reweighted=said.get(o.action, {})) for o in outlooks]
        record = decide(last, current, outlooks, known, settings.limit)
    return record | {"left_out": work.left_out}


class Work:
    """Samples and directions at every point of the past and at θ_T, one point at a time."""

    def __init__(
        self, runtime: Runtime, probe: Probe, folder: Path, past: Sequence[Stage], last: str,
        params: Callable[[str], Any],
    ):  # fmt: skip
        self.runtime, self.probe, self.folder = runtime, probe, folder
        self.past, self.last = tuple(past), last
        self.rehearsal = OffPolicyLookahead(probe)
        self.domains = runtime.config.scored_domains
        self.left_out: dict[str, str] = {}
        # A point stays while the ends of edits come and go; directions of one edit, and of one rule, follow each other.
        self.params = functools.lru_cache(maxsize=3)(params)
        self.back = functools.lru_cache(maxsize=1)(self._back)
        self.scores = functools.lru_cache(maxsize=1)(self._scores)

    def sample(self, point: str, domain: str) -> Sample:
        """Completions at a point that are kept in the work folder."""
        return at_hand(self.runtime, kept_sample(self.runtime, self.folder, point, domain, self.params))

    def rolled_back(self, action: Action) -> Any:
        """θ_T after a rollback, as it was forecast; None where its rule has no evidence."""
        back = self._taken(_key(action), [])
        params = self.params(self.last)
        return None if back is None else self.probe.along(params, back, np.float32(action.strength))

    def look(self, actions: Sequence[Action], track: Track) -> tuple[list[Outlook], list[Known], Mapping[str, Sample]]:
        """What is known of the actions that can be looked at, and of the past; completions at θ_T it rests on."""
        points = list(dict.fromkeys([s.start for s in self.past] + [s.name for s in self.past] + [self.last]))
        begun = {p: [s for s in self.past if s.start == p] for p in points}
        ended = {p: [s for s in self.past if s.name == p] for p in points}
        tried = {p: self._directions(actions) if p == self.last else {} for p in points}
        seen = self._unseen(points, track)
        eta = {p: {d: log_odds(sample.rewards_PG) for d, sample in by.items()} for p, by in seen.items()}
        directions: dict[str, list[Direction]] = {}
        for p in points:
            steps = [functools.partial(self._step, p, s.domains[0], s) for s in begun[p]]
            backs = [functools.partial(self.back, s) for s in ended[p]]
            directions[p] = [*steps, *backs, *tried[p].values()]
        known: list[Known] = []
        looked: dict[Action, Found] = {}
        held, done = self.runtime.config.analyze.held, 0
        with track("plan: forecasts", sum(rounds(len(x), held) for x in directions.values())) as show:
            for point in points:
                tell = lambda i, text, done=done, p=point: show(done + i, f"{p}: {text}")  # noqa: E731
                found = measure(self.probe, self.params(point), seen[point], directions[point], tell)
                done += rounds(len(directions[point]), held)
                for stage, there in zip(begun[point], found, strict=False):
                    size = path_length(stage.train, stage.train.steps)
                    known += self._known("refresh", stage, there, size, eta[point], eta[stage.name])
                for stage, there in zip(ended[point], found[len(begun[point]) :], strict=False):
                    known += self._known("rollback", stage, there, 1.0, eta[point], eta[stage.start])
                rest = found[len(begun[point]) + len(ended[point]) :]
                looked |= {a: x for a, x in zip(tried[point], rest, strict=True) if x is not None}
        outlooks = [self._outlook(a, looked) for a in actions if not a.domain or _key(a) in looked]
        return outlooks, known, seen[self.last]

    def weigh(
        self, actions: Sequence[Action], now: Mapping[str, Sample], track: Track
    ) -> dict[Action, dict[str, Reweighted]]:
        """What weights of completions `now`, drawn at θ_T, say of each domain where an action ends."""
        params, said = self.params(self.last), {}
        before = {d: self.probe.log_probs(params, sample).sum(axis=-1) for d, sample in now.items()}
        with track("plan: weights", len(actions)) as show:
            for done, (action, there) in enumerate(self._ends(actions)):
                show(done, action.name)
                said[action] = {
                    d: reweighted(self.probe.log_probs(there, sample).sum(axis=-1) - before[d], sample.rewards_PG)
                    for d, sample in now.items()
                }
        return said

    def _ends(self, actions: Sequence[Action]) -> Iterator[tuple[Action, Any]]:
        """Each action with θ_T after it: as it will be after a rollback, as it is rehearsed after a refresh."""
        # Those of one coordinate set beside each other.
        for action in sorted(actions, key=lambda a: (a.donor, a.domain, a.rule, a.fraction, a.strength)):
            if action.kind == "rollback":
                yield action, self.rolled_back(action)
        for domain in dict.fromkeys(a.domain for a in actions if a.kind == "refresh"):
            steps = {a.steps: a for a in actions if a.kind == "refresh" and a.domain == domain}
            sample, train = self.sample(self.last, domain), self._own(domain).train
            for done, params in enumerate(self.rehearsal.walk(self.params(self.last), sample, train, max(steps)), 1):
                if done in steps:
                    yield steps[done], params

    def _unseen(self, points: Sequence[str], track: Track) -> dict[str, dict[str, Sample]]:
        """Completions of every domain at every point, of prompts that no candidate is made from."""
        drawn: dict[str, dict[str, Sample]] = {p: {} for p in points}
        with track("plan: samples", len(points) * len(self.domains)) as show:
            for done, (point, domain) in enumerate(itertools.product(points, self.domains)):
                show(done, f"{domain} at {point}")
                drawn[point][domain] = unseen(self.runtime, self.params(point), domain)
        return drawn

    def _known(
        self, kind: str, stage: Stage, there: Found | None, size: float,
        before: Mapping[str, float], after: Mapping[str, float],
    ) -> list[Known]:  # fmt: skip
        assert there is not None
        own = stage.domains[0]
        return [
            Known(kind, d == own, stage.name, d, size, size * there.shifts[d].value, after[d] - before[d])
            for d in self.domains
        ]

    def _directions(self, actions: Sequence[Action]) -> dict[Action, Direction]:
        found: dict[Action, Direction] = {}
        for key in dict.fromkeys(_key(a) for a in actions if a.domain):
            if key.kind == "refresh":
                found[key] = functools.partial(self._step, self.last, key.domain, self._own(key.domain))
            else:
                same = [a.name for a in actions if a.domain and _key(a) == key]
                found[key] = functools.partial(self._taken, key, same)
        return found

    def _step(self, point: str, domain: str, stage: Stage) -> Any:
        """The first step of a stage's optimizer at a point."""
        return self.rehearsal.first(self.params(point), self.sample(point, domain), stage.train)

    def _back(self, stage: Stage) -> Any:
        """−δ of a stage."""
        return self.probe.difference(self.params(stage.start), self.params(stage.name))

    def _own(self, domain: str) -> Stage:
        stage = peak(domain, self.last, self.past)
        if stage is None:
            raise UserError(f"plan: no stage on the way to {self.last} trained {domain!r} alone")
        return stage

    def _taken(self, key: Action, names: Sequence[str]) -> Any:
        """−m ⊙ δ_B of a rollback; None, with the reason noted, where its rule has no evidence."""
        try:
            scores = self.scores(key.domain, key.donor, key.rule)
        except ValueError as e:
            self.left_out |= dict.fromkeys(names, str(e))
            return None
        back = self.back(self._own(key.donor))
        n = sum(x.size for x in jax.tree.leaves(back))
        return masked(back, largest(scores, max(1, round(key.fraction * n)), support(back)))

    def _scores(self, domain: str, donor: str, rule: str) -> Any:
        own, edit = self._own(domain), tree.scale(-1.0, self._back(self._own(donor)))
        ends = Ends(self.params(self.last), self.params(own.name), edit, tree.scale(-1.0, self._back(own)))
        points = {evidence.PEAK: own.name, NOW: self.last}
        return evidence.scores(self.probe, rule, ends, lambda point: self.sample(points[point], domain))[0]

    def _outlook(self, action: Action, looked: Mapping[Action, Found]) -> Outlook:
        if not action.domain:
            return Outlook(action, {d: Shift(0.0, 0.0) for d in self.domains}, 0.0, "")
        there = looked[_key(action)]
        if action.kind == "refresh":
            scale = size = path_length(self._own(action.domain).train, action.steps)
        else:
            scale = action.strength
            size = scale * there.norm / float(length(self.back(self._own(action.donor))))
        mover = action.domain if action.kind == "refresh" else action.donor
        return Outlook(action, {d: s.scaled(scale) for d, s in there.shifts.items()}, size, mover)


def _key(action: Action) -> Action:
    """The action that shares the direction of this one: of one step, of strength 1."""
    if action.kind == "refresh":
        return dataclasses.replace(action, steps=1)
    return dataclasses.replace(action, strength=1.0)
