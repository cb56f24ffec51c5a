"""The sweep of a training-free rollback and the choice of its coordinates (definitions §9).

The sweep, on validation prompts of A and B: each rule has two curves, one within the shared route ℛ and one among all
coordinates. A curve tries sets of growing size, `recover.fractions` of all coordinates, at strength 1. It ends where B
loses more than three times `recover.limit`, or where the rule has no more coordinates. To keep the number of settings
small, other `recover.strengths` are tried only where they can help [chosen]: those below 1 on the three smallest sets
of a curve at which B loses more than the limit, those above 1 on the set with the largest gain within the limit.

The choice: the setting with the largest gain of A among those at which B and each other domain lose at most
`recover.limit` points. The other domains are scored for one candidate after the other until one is within the limit.
The best of many noisy settings looks better than it is, both in gain and in loss, so only the figures on test prompts
are unbiased. Magnitude ignores A, so beside other rules it is swept only as a control, at strength 1, and never chosen
[chosen].
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
from mdrl_jax.recovery.rollback.tradeoff import Outcome, Rewards, mean_in_points, outcome, within
from mdrl_jax.stats.estimate import POINTS

ROUTE, ALL = "route", "all"
BLIND = "magnitude"
OVERSHOOT = 3.0  # a curve ends where B loses more than this multiple of the limit
DEAR = 3  # number of sets over the limit that are tried at lower strengths, the smallest ones of a curve
Score = Callable[[Any, Sequence[str]], Rewards]  # (params, domains) -> rewards [P, k] by domain


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the sweep, and its outcome on the validation prompts.

    Attributes:
      rule: name of the rule.
      place: `ROUTE` or `ALL`, where the coordinates were chosen.
      fraction: size that was asked for, as a share of all coordinates of the model.
      size: number of coordinates in the set; fewer than asked for if the rule has no more.
      strength: β.
      outcome: A's gain and B's loss.
    """

    rule: str
    place: str
    fraction: float
    size: int
    strength: float
    outcome: Outcome

    def record(self) -> dict[str, Any]:
        """The setting as JSON: gain and loss in points with intervals, and both for each prompt in rewards."""
        fields = {k: getattr(self, k) for k in ("rule", "place", "fraction", "size", "strength")}
        by_prompt = {"gains": rounded(self.outcome.gain_P), "losses": rounded(self.outcome.loss_P)}
        return fields | self.outcome.record() | by_prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """The part of a rollback that is the same for all settings.

    Attributes:
      domain: A, the domain to win back.
      donor: B, whose edit is taken back.
      others: further domains that must not lose more than the limit.
      now: θ_T.
      edit: δ_B.
      places: masks of the coordinates that the edit changed, by place; `ROUTE` is left out if its mask is empty.
      scores: the score of every coordinate, a tree, by rule.
      n: number of coordinates of the model.
      gradient: g_A(θ_T), the gradient of A's loss, for controls; None if it is not measurable.
      settings: section `recover` of the config.
      validation: (parameters, domains) -> rewards on the validation prompts.
      held_out: the same on the test prompts; `again` = 1, 2, … gives other completions of them.
      tokens: the number of tokens read and sampled by the run so far.
      track: reports progress.
    """

    domain: str
    donor: str
    others: tuple[str, ...]
    now: Any
    edit: Any
    places: Mapping[str, Any]
    scores: Mapping[str, Any]
    n: int
    gradient: Any
    settings: RecoverSection
    validation: Score
    held_out: Callable[..., Rewards]
    tokens: Callable[[], int]
    track: Track

    def moved(self, mask: Any, strength: float, edit: Any = None) -> Any:
        """θ_T − strength · m ⊙ δ, the parameters with an edit taken back on a mask.

        Args:
          mask: m, a tree of booleans like the parameters.
          strength: β.
          edit: δ, a tree like the parameters; None: δ_B.

        Returns:
          the parameters, a new tree; θ_T is not changed.
        """
        return taken_back(self.now, self.edit if edit is None else edit, mask, np.float32(strength))

    def try_on(self, score: Score, before: Rewards, mask: Any, strength: float, edit: Any = None) -> Outcome:
        """A's gain and B's loss if the edit is taken back on a mask.

        Args:
          score: `validation` or `held_out`.
          before: rewards [P, k] of A and of B, by domain, at θ_T on the same prompts.
          mask: the coordinates, a tree of booleans like the parameters.
          strength: β.
          edit: the edit, a tree like the parameters; None: δ_B.

        Returns:
          Gain and loss of each prompt, in rewards.

        Raises:
          UserError: if too many rewards fail in `score`.
          Stopped: after a SIGTERM, from `score`.
          KeyError: if `before` lacks A or B.
        """
        after = score(self.moved(mask, strength, edit), (self.domain, self.donor))
        return outcome(before, after, self.domain, self.donor)

    def chosen_mask(self, setting: Setting) -> Any:
        """The coordinates of a setting, as a tree of booleans like the parameters.

        Raises:
          KeyError: if the trial has no scores of the setting's rule, or not its place.
        """
        return largest(self.scores[setting.rule], setting.size, self.places[setting.place])


def sweep(trial: Trial, before: Rewards) -> list[Setting]:
    """Tries all settings of the module docstring on the validation prompts.

    Args:
      trial: the fixed part of the rollback.
      before: rewards [P, k] of A and of B, by domain, at θ_T on the validation prompts.

    Returns:
      The settings with their outcomes, in the order in which they were tried.

    Raises:
      UserError: if too many rewards fail in `trial.validation`.
      Stopped: after a SIGTERM, from `trial.validation` or from `trial.track`; nothing is saved.
      KeyError: if `before` lacks A or B.
    """
    found: list[Setting] = []
    curves, most = list(itertools.product(trial.scores, trial.places)), longest(trial.settings)
    with trial.track("sweep", most * len(curves)) as show:
        for i, (rule, place) in enumerate(curves):
            found += _curve(trial, before, rule, place, lambda done, text, i=i: show(most * i + done, text))
    return found


def longest(settings: RecoverSection) -> int:
    """The largest possible number of settings that a curve tries, those at strengths other than 1 included.

    Args:
      settings: section `recover` of the config; "fractions" and "strengths" are read.
    """
    return len(settings.fractions) + sum(DEAR if s < 1 else s > 1 for s in settings.strengths)


def _curve(trial: Trial, before: Rewards, rule: str, place: str, show: Show) -> list[Setting]:
    """Tries the settings of one rule in one place."""
    found: list[Setting] = []
    limit = trial.settings.limit / POINTS

    def attempt(fraction: float, mask: Any, n: int, strength: float) -> Setting:
        show(len(found), f"{rule}, {place}, {n} coordinates, strength {strength:g}")
        effect = trial.try_on(trial.validation, before, mask, strength)
        found.append(Setting(rule, place, fraction, n, strength, effect))
        return found[-1]

    curve: list[Setting] = []
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
    best = max((s for s in curve if s.outcome.affordable(limit)), key=lambda s: s.outcome.gain, default=None)
    dear = [s for s in curve if not s.outcome.affordable(limit)][:DEAR]
    for strength in trial.settings.strengths:
        again = dear if strength < 1 else [best] if strength > 1 and best else []
        for s in again:
            attempt(s.fraction, trial.chosen_mask(s), s.size, strength)
    return found


def choose(trial: Trial, found: Sequence[Setting]) -> tuple[Setting | None, dict[str, Any]]:
    """Chooses a setting as the module docstring says; of settings with equal gain, the one with fewer coordinates.

    Candidates gain something and cost B at most the limit. In the order of their gains they are scored on the
    validation prompts of the other domains, as θ_T is before, and the first that costs each of these at most the limit
    is chosen. Nothing is scored if there are no other domains or no candidates.

    Args:
      trial: the fixed part of the rollback.
      found: the settings that `sweep` tried.

    Returns:
      (setting, losses): the chosen setting, or None if no setting within the limits gains anything; and what each of
      the other domains loses at it on its validation prompts, by domain. A loss is a record (`Estimate.record`) in
      points, with its interval over prompts; a positive one is harm. The losses are empty if there is no setting or no
      other domain.

    Raises:
      UserError: if too many rewards fail in `trial.validation`.
      Stopped: after a SIGTERM, from `trial.validation` or from `trial.track`; nothing is saved.
    """
    limit = trial.settings.limit / POINTS
    sighted = [s for s in found if s.rule != BLIND] or list(found)
    affordable = [s for s in sighted if s.outcome.affordable(limit) and s.outcome.gain > 0]
    affordable = sorted(affordable, key=lambda s: (-s.outcome.gain, s.size))
    if not affordable or not trial.others:
        return (affordable[0] if affordable else None), {}
    reference = trial.validation(trial.now, trial.others)
    with trial.track("choice", len(affordable)) as show:
        for done, setting in enumerate(affordable):
            show(done, f"losses of {', '.join(trial.others)}")
            after = trial.validation(trial.moved(trial.chosen_mask(setting), setting.strength), trial.others)
            lost = {d: (reference[d] - after[d]).mean(axis=1, dtype=np.float64) for d in trial.others}
            if all(within(x, limit) for x in lost.values()):
                return setting, {d: mean_in_points(x) for d, x in lost.items()}
    return None, {}


def rounded(values_P: np.ndarray) -> list[float]:
    """One value for each prompt, an array [P], rounded to four decimals, as a list of P floats for records."""
    return np.round(values_P, 4).tolist()
