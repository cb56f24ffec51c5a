"""The sweep of a training-free rollback and the choice of its coordinates (definitions §9).

The sweep, on validation prompts of A and B. Each rule, within the shared route ℛ and among all coordinates, is a curve
of sets of growing size, `recover.fractions` of all coordinates, at strength 1; it ends where B loses three times
`recover.limit` or the rule has no more coordinates. Other `recover.strengths` are tried where they can help: below 1 on
the three smallest sets of a curve that B cannot afford whole, above 1 on the best that it can. [chosen, to save points]

The choice: the largest gain of A among points at which B loses `recover.limit` points at most, and so does each other
domain, which is measured of candidates in turn. The best of many noisy points has come out too well, in gain and loss:
the figures to go by are those on test prompts. Magnitude, being blind to A, is swept as the control that it is, and is
chosen only where no other rule is listed [chosen].
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdrl_jax.config import RecoverSection
from mdrl_jax.progress import Show, Track
from mdrl_jax.recovery.rollback.rules import taken_back
from mdrl_jax.recovery.rollback.selection import largest, size
from mdrl_jax.recovery.rollback.tradeoff import POINTS, Outcome, Rewards, outcome, points, within

ROUTE, ALL = "route", "all"
BLIND = "magnitude"
OVERSHOOT = 3.0  # times the limit: a curve ends there
DEAR = 3  # sets of a curve that are tried at lower strengths
Score = Callable[[Any, Sequence[str]], Rewards]  # (params, domains) -> rewards [P, k] by domain


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of the sweep, and what it did to the validation prompts."""

    rule: str
    place: str
    fraction: float
    size: int
    strength: float
    outcome: Outcome

    def record(self) -> dict[str, Any]:
        """As JSON, with the differences of each prompt."""
        fields = {k: getattr(self, k) for k in ("rule", "place", "fraction", "size", "strength")}
        by_prompt = {"gains": rounded(self.outcome.gain_P), "losses": rounded(self.outcome.loss_P)}
        return fields | self.outcome.record() | by_prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """What points are tried on: θ_T, δ_B, the places, the rules' scores, and how parameters are scored.

    Attributes:
      places: masks of the coordinates that the edit changed, by place; ℛ is left out where it is empty.
      scores: trees, by rule.
      others: domains that must not lose more than the limit either.
    """

    domain: str
    donor: str
    others: tuple[str, ...]
    now: Any
    edit: Any
    places: Mapping[str, Any]
    scores: Mapping[str, Any]
    n: int
    settings: RecoverSection
    validation: Score
    held_out: Score
    track: Track

    def moved(self, mask: Any, strength: float) -> Any:
        """θ_T with the edit taken back on a mask."""
        return taken_back(self.now, self.edit, mask, np.float32(strength))

    def try_on(self, score: Score, before: Rewards, mask: Any, strength: float) -> Outcome:
        """What taking the edit back on a mask does."""
        after = score(self.moved(mask, strength), (self.domain, self.donor))
        return outcome(before, after, self.domain, self.donor)

    def chosen_mask(self, point: Point) -> Any:
        """The coordinates of a point."""
        return largest(self.scores[point.rule], point.size, self.places[point.place])


def sweep(trial: Trial, before: Rewards) -> list[Point]:
    """Every point of the scheme above."""
    found: list[Point] = []
    curves, most = list(itertools.product(trial.scores, trial.places)), longest(trial.settings)
    with trial.track("sweep", most * len(curves)) as show:
        for i, (rule, place) in enumerate(curves):
            found += _curve(trial, before, rule, place, lambda done, text, i=i: show(most * i + done, text))
    return found


def longest(settings: RecoverSection) -> int:
    """Points of a curve at most, those at other strengths included."""
    return len(settings.fractions) + sum(DEAR if s < 1 else s > 1 for s in settings.strengths)


def _curve(trial: Trial, before: Rewards, rule: str, place: str, show: Show) -> list[Point]:
    """The points of a rule in a place."""
    found: list[Point] = []
    limit = trial.settings.limit / POINTS

    def attempt(fraction: float, mask: Any, n: int, strength: float) -> Point:
        show(len(found), f"{rule}, {place}, {n} coordinates, strength {strength:g}")
        found.append(Point(rule, place, fraction, n, strength, trial.try_on(trial.validation, before, mask, strength)))
        return found[-1]

    curve: list[Point] = []
    for fraction in sorted(trial.settings.fractions):
        mask = largest(trial.scores[rule], max(1, round(fraction * trial.n)), trial.places[place])
        n = size(mask)
        if n == (curve[-1].size if curve else 0):
            break
        curve.append(attempt(fraction, mask, n, 1.0))
        if curve[-1].outcome.loss > OVERSHOOT * limit:
            break
    if rule == BLIND and len(trial.scores) > 1:
        return found
    best = max((p for p in curve if p.outcome.affordable(limit)), key=lambda p: p.outcome.gain, default=None)
    dear = [p for p in curve if not p.outcome.affordable(limit)][:DEAR]
    for strength in trial.settings.strengths:
        again = dear if strength < 1 else [best] if strength > 1 and best else []
        for p in again:
            attempt(p.fraction, trial.chosen_mask(p), p.size, strength)
    return found


def choose(trial: Trial, found: Sequence[Point]) -> tuple[Point | None, dict[str, Any]]:
    """The chosen point, None where none within the limits gains anything, and the losses of the other domains there."""
    limit = trial.settings.limit / POINTS
    sighted = [p for p in found if p.rule != BLIND] or list(found)
    affordable = [p for p in sighted if p.outcome.affordable(limit) and p.outcome.gain > 0]
    affordable = sorted(affordable, key=lambda p: (-p.outcome.gain, p.size))
    if not affordable or not trial.others:
        return (affordable[0] if affordable else None), {}
    reference = trial.validation(trial.now, trial.others)
    with trial.track("choice", len(affordable)) as show:
        for done, point in enumerate(affordable):
            show(done, f"what {', '.join(trial.others)} would lose")
            after = trial.validation(trial.moved(trial.chosen_mask(point), point.strength), trial.others)
            lost = {d: (reference[d] - after[d]).mean(axis=1, dtype=np.float64) for d in trial.others}
            if all(within(x, limit) for x in lost.values()):
                return point, {d: points(x) for d, x in lost.items()}
    return None, {}


def rounded(values_P: np.ndarray) -> list[float]:
    """For records."""
    return np.round(values_P, 4).tolist()
