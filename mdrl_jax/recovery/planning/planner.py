"""Plans the recovery at θ_T: forecasts every domain's score after every candidate action, without trying any of them.

The candidates, and the direction v (a change of the parameters) that the forecast of each is made from:

| action | direction v of its forecast at θ_T | size |
|---|---|---|
| nothing | none | 0 |
| refresh of i for n steps | the first step of the stage's optimizer, from a fresh state, on completions of i at θ_T, \
times the learning rate summed over n steps | that sum |
| rollback of A from B by (rule, q, β) | −β m ⊙ δ_B | ‖v‖ / ‖δ_B‖ |

Forecasts are made in two rounds.

1. All candidates: to first order in log-odds (`lookahead.py`), with errors estimated from the run's own past
   (`forecast.py`). Each stage on the way to θ_T counts as a refresh of its domain with a known outcome. Taking the
   whole edit of a stage back at its end counts as a rollback with a known outcome.
2. The `recover.n_reweighted` most promising candidates: by importance weights at the parameters where the candidate
   ends, on the same completions (`importance.py`). Domains with too few effective completions keep the first order. The
   end of a rollback is known, so its error is only that of the weights. The end of a refresh is rehearsed on the
   completions that its first step is made from, so the errors of past refreshes are added.

Nothing is sampled after a candidate, and its outcome is never used. On two tuning seeds of the quickstart, the second
round reduced the mean error of 88 forecasts from 0.67 and 0.78 points to 0.44 and 0.72. The rehearsal is needed: with
weights on the straight line along a refresh's first step, one forecast of Math was 18 points too low on one of these
seeds (it forecast 22 of the 40 points that Math gained).

Actions are ranked by the expected mean over domains. An action is allowed if no domain but its own is expected to lose
more than `recover.limit` points; a refresh or rollback's own domain is the one to win back. The limit applies to the
expected loss [chosen]; `risk` is the forecast chance that another domain loses more. A forecast score may exceed the
domain's peak and is limited only by 1 [chosen], because the gradient at θ_T shows whether there is more to gain.
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
from mdrl_jax.claims.published import BRIEF
from mdrl_jax.config import RecoverSection
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.tree_programs import norm
from mdrl_jax.progress import Track
from mdrl_jax.recovery.planning.decision import Action, Outlook, decide, promising
from mdrl_jax.recovery.planning.forecast import Known, Shift, log_odds
from mdrl_jax.recovery.planning.importance import Reweighted, reweighted
from mdrl_jax.recovery.planning.lookahead import (
    Direction,
    Found,
    OffPolicyLookahead,
    at_hand,
    measure,
    path_length,
    rounds,
    unseen,
)
from mdrl_jax.recovery.rollback import evidence
from mdrl_jax.recovery.rollback.evidence import NOW, Ends, kept_sample
from mdrl_jax.recovery.rollback.rules import masked
from mdrl_jax.recovery.rollback.selection import largest, support
from mdrl_jax.recovery.spent import spend
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, is_own, peak, way

BUDGET = BRIEF  # the longest refresh considered, as a share of the stage's steps (definitions §13, C6)
RULE = "removing"  # the rule of all rollbacks considered, because it uses the lost domain's gradient at θ_T [chosen]
Rewards = Mapping[str, np.ndarray]


def trail(stages: Sequence[Stage], last: str) -> list[Stage]:
    """The own stages (`is_own`) of all domains on the way to the end of stage `last`, earliest first.

    Recoveries do not count: they keep their best step, so their effect is not that of their length. The result is empty
    for "base" or a name that is not in `stages`.
    """
    return [s for s in way(last, stages) if is_own(s.name, s.domains[0])]


def candidates(settings: RecoverSection, past: Sequence[Stage]) -> list[Action]:
    """All candidates: no action, refreshes of up to `BUDGET` of a stage's steps, and rollbacks by `RULE`.

    - A refresh of each domain for 1, 2, … steps, up to the share `BUDGET` of the steps of its last stage, rounded down,
      but at least for one step.
    - A rollback for each pair of a domain and a donor whose last stage comes after that of the domain, with each of
      `recover.fractions` and each of `recover.strengths`.

    Args:
      settings: section `recover` of the config; "fractions" and "strengths" are read.
      past: the stages of `trail`; may be empty.

    Returns:
      The actions: `nothing`, then the refreshes, then the rollbacks.
    """
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


def make_plan(
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
    """Plans the recovery at the end of stage `last`.

    Samples that are not in the work folder yet are written to `recovery/samples/` (`evidence.kept_sample`).

    Args:
      runtime: of the run.
      probe: computes gradients and log-probs.
      folder: work folder of the run, for stored samples.
      stages: all stages before the plan.
      last: name of the stage whose end is θ_T.
      params: name of a stage, or "base" -> parameters at its end.
      current: rewards [P, k] of every scored domain at θ_T, on validation prompts.
      track: reports progress.
      actions: the actions to forecast, at least one of which can be, as `nothing` always can; None for `candidates`.

    Returns:
      The record of `decision.decide`, and "left_out": name of an action -> why it could not be forecast.

    Raises:
      UserError: if no stage on the way trained a domain alone, or none did so for a domain or donor of an action; or if
        there are too few prompts (`lookahead.unseen`).
      UserError, RuntimeError: if sampling fails (`samples.draw`).
      ValueError: if `recover.forecast_prompts` is no positive multiple of `analyze.batch`, which `config.parse` refuses
        in a run with stage `plan`.
      KeyError: if `current` has a domain that is not scored, or a rollback of `actions` has an unknown rule.
      Stopped: after a SIGTERM, if `track` is that of a `Screen`.
      The errors of `evidence.kept_sample` for stored completions, and of `params`.
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
    """Makes the samples and directions that a plan needs at θ_T and at every point of the past, one point at a time.

    A point is the base or the end of a stage, and has the stage's name.

    Args:
      runtime: of the run.
      probe: computes gradients and log-probs.
      folder: work folder of the run, for stored samples.
      past: the stages of `trail`.
      last: name of the stage whose end is θ_T.
      params: name of a stage, or "base" -> parameters at its end.

    Attributes:
      left_out: name of an action that `look` could not measure -> the reason.
    """

    def __init__(
        self, runtime: Runtime, probe: Probe, folder: Path, past: Sequence[Stage], last: str,
        params: Callable[[str], Any],
    ):  # fmt: skip
        self.runtime, self.probe, self.folder = runtime, probe, folder
        self.past, self.last = tuple(past), last
        self.rehearsal = OffPolicyLookahead(probe)
        self.domains = runtime.config.scored_domains
        self.left_out: dict[str, str] = {}
        # Three sets of parameters: the present point, and the two ends of the edit that is being made. Actions with the
        # same edit follow each other, and so do those with the same rule, so one entry is enough for each of these.
        self.params = functools.lru_cache(maxsize=3)(params)
        self.back = functools.lru_cache(maxsize=1)(self._back)
        self.scores = functools.lru_cache(maxsize=1)(self._scores)

    def sample(self, point: str, domain: str) -> Sample:
        """Completions of a domain at a point, from the work folder if they are there (`evidence.kept_sample`).

        Args:
          point: name of a stage, or "base".
          domain: the domain.

        Returns:
          The completions with their rewards, padded as by `lookahead.at_hand`.

        Raises:
          UserError, and the errors of `samples.load`: as in `evidence.kept_sample`.
        """
        return at_hand(self.runtime, kept_sample(self.runtime, self.folder, point, domain, self.params))

    def rolled_back(self, action: Action) -> Any:
        """The parameters after a rollback at θ_T; None if the evidence for its rule cannot be measured.

        Args:
          action: an action of kind "rollback".

        Raises:
          UserError: if no stage on the way trained the action's domain, or its donor, alone; or if completions of the
            domain must be sampled and that fails.
          KeyError: if no rule has the name of the action's rule.
        """
        back = self._taken(_key(action), [])
        params = self.params(self.last)
        return None if back is None else self.probe.along(params, back, np.float32(action.strength))

    def look(self, actions: Sequence[Action], track: Track) -> tuple[list[Outlook], list[Known], Mapping[str, Sample]]:
        """Measures all actions and the run's own past to first order.

        Args:
          actions: the actions. Those that cannot be measured are noted in `left_out`.
          track: reports progress.

        Returns:
          (outlooks, known, now): the measurements of each action that is not left out, in the order of `actions`; the
          past changes with their outcomes; and the completions of each domain at θ_T that the measurements are made on.

        Raises:
          UserError, KeyError, ValueError, Stopped: as in `make_plan`.
        """
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
        """Reweights completions to the parameters where each action ends.

        Args:
          actions: refreshes and rollbacks that `look` could measure.
          now: completions of each domain, sampled at θ_T.
          track: reports progress.

        Returns:
          The importance-weighted shift of each domain, by action.

        Raises:
          UserError: if completions for a rehearsal or a rollback must be sampled and that fails.
          Stopped: after a SIGTERM, if `track` is that of a `Screen`.
        """
        params, said = self.params(self.last), {}
        rows = [r for sample in now.values() for r in self.probe.rows(sample)]
        spend(self.runtime, "forward", rows * (1 + len(actions)))
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
        """Each action with the parameters where it ends: exact for a rollback, rehearsed for a refresh."""
        # Sorted so that actions with the same edit, the same scores and the same set follow each other (caches).
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
        """Completions of every domain at every point, on prompts that no direction is made from."""
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
        """The direction of each group of actions that share one, by `_key`."""
        found: dict[Action, Direction] = {}
        for key in dict.fromkeys(_key(a) for a in actions if a.domain):
            if key.kind == "refresh":
                found[key] = functools.partial(self._step, self.last, key.domain, self._own(key.domain))
            else:
                same = [a.name for a in actions if a.domain and _key(a) == key]
                found[key] = functools.partial(self._taken, key, same)
        return found

    def _step(self, point: str, domain: str, stage: Stage) -> Any:
        """The first step of a stage's optimizer at a point, with learning rate 1."""
        return self.rehearsal.first(self.params(point), self.sample(point, domain), stage.train)

    def _back(self, stage: Stage) -> Any:
        """−δ of a stage, the change that takes its whole edit back."""
        return self.probe.difference(self.params(stage.start), self.params(stage.name))

    def _own(self, domain: str) -> Stage:
        stage = peak(domain, self.last, self.past)
        if stage is None:
            raise UserError(f"plan: no stage on the way to {self.last} trained {domain!r} alone")
        return stage

    def _taken(self, key: Action, names: Sequence[str]) -> Any:
        """The direction −m ⊙ δ_B of a rollback with strength 1.

        If the evidence for its rule cannot be measured, the result is None, and the reason is noted in `left_out` for
        the actions `names`.
        """
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
            whole = float(norm(self.back(self._own(action.donor))))
            size = scale * there.norm / whole if whole > 0 else 0.0  # nothing to take back from an edit of zeros
        mover = action.domain if action.kind == "refresh" else action.donor
        return Outlook(action, {d: s.scaled(scale) for d, s in there.shifts.items()}, size, mover)


def _key(action: Action) -> Action:
    """The action that stands for all those with the same direction: a refresh of one step, a rollback of strength 1."""
    if action.kind == "refresh":
        return dataclasses.replace(action, steps=1)
    return dataclasses.replace(action, strength=1.0)
