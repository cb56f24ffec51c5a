"""A chosen conflict set against its controls, at equal loss of the donor (definitions §9, claim C7).

A set of coordinates wins back more of A if it is larger, but it also costs B more. Sets are therefore compared at equal
loss of B (`tradeoff.py`).

1. On validation prompts each control is tried along a curve of settings. A setting is the size of the set, or the
   strength for the control `whole`. The curve starts at the chosen size (`whole`: at strength 1/16) and goes outward,
   to larger or to smaller settings, until it has passed the loss of B that the chosen set causes (`outward`).
2. On validation prompts, many random and matched sets of the chosen size are tried. They show the spread between draws.
3. On test prompts the chosen set is compared with a few settings of each control: the one or two settings that the
   control's frontier rests on at that loss, the next smaller one, and larger ones as needed (`followed`). Where the
   interval of a difference is too wide, more completions are sampled (`on_test`).

All reported comparisons are from step 3, so no prompt serves both to choose a set and to judge it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mdrl_jax.parallel import tree_programs
from mdrl_jax.recovery.rollback.controls import matched, permuted
from mdrl_jax.recovery.rollback.rules import magnitude, masked, signs
from mdrl_jax.recovery.rollback.selection import complement, largest, random_set, size, support
from mdrl_jax.recovery.rollback.sweep import ROUTE, Setting, Trial
from mdrl_jax.recovery.rollback.tradeoff import Outcome, Rewards, at_equal_loss, carriers, mean_in_points
from mdrl_jax.stats.bootstrap import band
from mdrl_jax.stats.estimate import LEVEL, POINTS, Estimate, clustered, missing, ratio_of_means

# The search along a control's curve: factor between settings, steps of bisection at the end, most steps downwards.
GROWTH, HALVINGS, SHRINKS = 4.0, 2, 4
MATCHED_SETS = 5
LOOKS = 4  # at the comparison on test prompts, with 1, 2, 4 and 8 times `recover.samples` completions of each prompt


@dataclasses.dataclass(frozen=True)
class Control:
    """A control as a curve of settings s, each of them a number of coordinates, or a strength for the control `whole`.

    Attributes:
      make: (s, number of the draw from 0) -> (mask, strength) of the rollback with this setting, and the edit if it is
        not that of the trial.
      least: the smallest setting, 1 for sizes.
      most: the largest setting.
      start: the setting where the search begins.
      random: whether another draw gives another set or edit.
    """

    make: Callable[[float, int], tuple[Any, float] | tuple[Any, float, Any]]
    least: float
    most: float
    start: float
    random: bool = False

    def clipped(self, s: float) -> float:
        """The nearest setting that exists: within [least, most], and a whole number if it is a size."""
        return float(np.clip(round(s) if self.least == 1 else s, self.least, self.most))


def controls(trial: Trial, chosen: Setting) -> dict[str, Control]:
    """The controls of definitions §9 for the chosen setting, each as a curve.

    A setting is a number of coordinates. The sets lie in the place of the chosen setting and have its strength, with
    three exceptions: "out_of_route" lies outside the shared route, "sign_step" in the whole model, and "whole" is all
    of B's edit, with the strength as its setting, from 0.001 to 1. A control is left out if it has no setting, for
    example `out_of_route` if no score outside the route is positive. All processes must call this.

    Args:
      trial: the fixed part of the rollback.
      chosen: the setting that the sweep chose.

    Returns:
      The curve of each control, by name:

      - "random", random coordinates; "largest", the largest |δ_B|; and "whole".
      - "matched", partners of nearly equal |δ_B| for the rule's set of that size, up to half of the place. Beyond the
        number of the rule's positive scores the set grows no further.
      - "out_of_route", the same rule outside the route, if the chosen set lies in the shared route.
      - "matched_in_tensor", as "matched", but the partners lie in the same tensor and layer.
      - If A's gradient is known (`Trial.gradient`), "permuted" (`controls.permuted` on the rule's set of that size) and
        "sign_step", the coordinates with the largest |gradient| of A, each moved against its gradient by the root mean
        square of the chosen set's edit.

    Raises:
      KeyError: if the trial has no scores of the setting's rule, or not its place.
    """
    within, everywhere, beta = trial.places[chosen.place], support(trial.edit), chosen.strength
    scores, sizes = trial.scores[chosen.rule], magnitude(trial.edit)
    room, n = size(within), float(chosen.size)

    def matched_to(s: float, draw: int, same_tensor: bool) -> tuple[Any, float]:
        return matched(trial.edit, largest(scores, round(s), within), within, draw, same_tensor), beta

    def permuted_of(s: float, draw: int) -> tuple[Any, float, Any]:
        mask = largest(scores, round(s), within)
        return mask, beta, permuted(trial.edit, mask, trial.gradient, draw)

    made = {
        "random": Control(lambda s, draw: (random_set(draw, round(s), within), beta), 1, room, n, random=True),
        "matched": Control(lambda s, draw: matched_to(s, draw, False), 1, room // 2, n, random=True),
        "largest": Control(lambda s, _: (largest(sizes, round(s), within), beta), 1, room, n),
        "whole": Control(lambda s, _: (everywhere, s), 1e-3, 1.0, 1 / 16),
    }
    if chosen.place == ROUTE:
        outside = complement(within)
        most = size(largest(scores, trial.n, outside))
        made["out_of_route"] = Control(lambda s, _: (largest(scores, round(s), outside), beta), 1, most, n)
    made["matched_in_tensor"] = Control(lambda s, draw: matched_to(s, draw, True), 1, room // 2, n, random=True)
    if trial.gradient is not None:
        mask, steep = trial.chosen_mask(chosen), magnitude(trial.gradient)
        length = np.float32(tree_programs.norm(masked(trial.edit, mask)) / np.sqrt(n))
        step, most = signs(trial.gradient, length), size(support(trial.gradient))
        made["permuted"] = Control(permuted_of, 1, size(largest(scores, trial.n, within)), n, random=True)
        made["sign_step"] = Control(lambda s, _: (largest(steep, round(s)), beta, step), 1, most, n)
    return {name: c for name, c in made.items() if c.most >= c.least}


def outward(control: Control, loss_at: Callable[[float], float], target: float) -> Iterator[float]:
    """The settings of a control to try, in order, around the one at which B loses `target`.

    From the start the setting grows by the factor `GROWTH` while B's loss is at most `target`. If the loss is above it
    at the start, the setting shrinks by this factor instead, at most `SHRINKS` times, until the loss is not. Both end
    at the smallest and the largest setting of the control. Once settings on both sides of the target are known,
    bisection on a logarithmic scale adds up to `HALVINGS` settings between them.

    Args:
      control: the curve.
      loss_at: setting -> B's loss; only called with a setting that was yielded before.
      target: a loss of B, in the unit of `loss_at`. A setting at which B loses exactly this counts as below it.

    Yields:
      The settings, all different, at least one.
    """

    clipped = control.clipped
    s = clipped(control.start)
    yield s
    grows = loss_at(s) <= target
    low, high = (s, None) if grows else (None, s)
    for _ in range(64 if grows else SHRINKS):
        if clipped(s * GROWTH if grows else s / GROWTH) == s:
            break
        s = clipped(s * GROWTH if grows else s / GROWTH)
        yield s
        if loss_at(s) <= target:
            low = s
        else:
            high = s
        if low is not None and high is not None:
            break
    for _ in range(HALVINGS if low is not None and high is not None else 0):
        assert low is not None and high is not None
        s = clipped((low * high) ** 0.5)
        if s in (low, high):
            break
        yield s
        low, high = (s, high) if loss_at(s) <= target else (low, s)


def compare(trial: Trial, before: Rewards, chosen: Setting, peak: Any) -> dict[str, Any]:
    """Compares the chosen setting with its controls: first on validation prompts, then on test prompts.

    Args:
      trial: the fixed part of the rollback.
      before: rewards [P, k] of A and of B, by domain, at θ_T on the validation prompts.
      chosen: the setting that the sweep chose.
      peak: θ*_A, a tree of parameters.

    Returns:
      A record: "same_size", the `spread` of random and of matched sets of the chosen size; "curves", the settings of
      each control that were tried on validation prompts, with their outcomes; "test", the result of `on_test`. There
      are no matched sets, and a "reason" in their place, if the chosen set has more than half of the coordinates of its
      place: then not every coordinate has another one to match it.

    Raises:
      UserError, Stopped, KeyError: as in `sweep.sweep`; or KeyError as in `controls`.
    """
    within, mask, beta = trial.places[chosen.place], trial.chosen_mask(chosen), chosen.strength
    matchable = 2 * chosen.size <= size(within)
    draws: dict[str, tuple[int, Callable[[int], Any]]] = {
        "random": (trial.settings.random_sets, lambda i: random_set(i, chosen.size, within)),
        "matched": (MATCHED_SETS if matchable else 0, lambda i: matched(trial.edit, mask, within, i)),
    }
    same_size, done = {}, 0
    with trial.track("random sets", sum(n for n, _ in draws.values())) as show:
        for name, (n, make) in draws.items():
            drawn = []
            for i in range(1, n + 1):
                show(done, f"{name} set {i} of {n}")
                drawn.append(trial.try_on(trial.validation, before, make(i), beta))
                done += 1
            same_size[name] = spread(drawn, chosen.outcome)
    if not matchable:
        same_size["matched"]["reason"] = "the chosen set has more than half of the coordinates of its place"
    curves, kept, made = {}, {}, controls(trial, chosen)
    with trial.track("controls", len(made)) as show:
        for name, control in made.items():
            tried: dict[float, Outcome] = {}
            for s in outward(control, lambda s, tried=tried: tried[s].loss, chosen.outcome.loss):
                show(len(kept), f"{name}, {s:g}")
                tried[s] = trial.try_on(trial.validation, before, *control.make(s, 0))
            curves[name] = [{"setting": s} | o.record() for s, o in sorted(tried.items())]
            carrying = np.array(list(tried))[carriers(list(tried.values()), chosen.outcome.loss)].tolist()
            below = max((s for s in tried if s < min(carrying)), default=min(carrying))
            kept[name] = (control, sorted({below, *carrying}), max(tried))
    return {"same_size": same_size, "curves": curves, "test": on_test(trial, mask, beta, peak, kept)}


@dataclasses.dataclass
class _Contest:
    """A control on the test prompts: its settings, what each did in each draw, and the comparison so far.

    Attributes:
      control: the curve.
      settings: the settings of the control.
      drawn: for each draw of the control, the outcomes of `settings`.
      estimate: the chosen set minus the control at equal loss, in points, by the last `record`.
    """

    control: Control
    settings: list[float]
    drawn: list[list[Outcome]]
    estimate: Estimate | None = None

    def tries(self) -> int:
        """How many sets of parameters are scored to sample once more."""
        return sum(map(len, self.drawn))

    def record(self, ours: Outcome, completions: int) -> dict[str, Any]:
        """Compares the control with the chosen set; the figure in `on_test`, with `completions` of each prompt."""
        self.estimate, height = at_equal_loss(ours, self.drawn)
        rows = sorted(zip(self.settings, self.drawn[0], strict=True), key=lambda row: row[0])
        return self.estimate.record(0.0) | {
            "control_gain": height,
            "draws": len(self.drawn),
            "completions": completions,
            "settings": [{"setting": s} | o.record() for s, o in rows],
        }

    def settled(self, ours: Outcome, half_width: float) -> bool:
        """Whether more completions would decide nothing: the interval is narrow enough, or is wholly on one side of 0.

        The second is asked at the level 1 − 0.05/`LOOKS`, because it is asked after each of several looks (Bonferroni).

        Args:
          ours: outcome of the chosen set, that of the last `record`.
          half_width: the half-width that is narrow enough, in points.
        """
        assert self.estimate is not None
        if self.estimate.high - self.estimate.low <= 2 * half_width:
            return True
        strict, _ = at_equal_loss(ours, self.drawn, 1 - (1 - LEVEL) / LOOKS)
        return strict.low > 0 or strict.high < 0


def on_test(
    trial: Trial, mask: Any, beta: float, peak: Any, kept: dict[str, tuple[Control, list[float], float]]
) -> dict[str, Any]:
    """Compares the chosen set with its controls on the test prompts.

    The loss of B by the chosen set is uncertain. So that no frontier ends before the loss at which it is read, each
    control is followed to larger settings until B loses the upper end of the interval of that loss (`followed`).

    The luck of a random control is part of the comparison: the settings of its first draw are tried with
    `recover.control_draws` draws.

    All test prompts are in use from the start, so an interval can only be narrowed by more completions of each. The
    chosen set and the controls that are not `settled` are sampled again, each time with as many completions as they
    have, until all are, or `recover.control_tokens` do not suffice for the next time, or there were `LOOKS` looks.

    Args:
      trial: the fixed part of the rollback.
      mask: the chosen set, a tree of booleans like the parameters.
      beta: its strength β.
      peak: θ*_A, a tree of parameters.
      kept: for each control by name (the control, the settings to try, the largest setting tried on validation
        prompts).

    Returns:
      A record: "prompts", their number; "lost", S_peak − S_before of A; "gain" of A and "loss" of B by the chosen set;
      "recovery", gain / lost with Fieller's interval; and "at_equal_loss", for each control A's gain by the chosen set
      minus the control's frontier at the set's loss of B, with the frontier itself ("control_gain"), the number of
      "draws" (1 for a control that is not random), the number of "completions" of each prompt, and the "settings" of
      the first draw with their gains and losses. The recovery is a fraction, missing where the interval of "lost"
      includes 0; gains, losses and differences are in points. "lost", "gain", "loss" and "recovery" are of the first
      `recover.samples` completions. "unsettled" lists the controls that are not settled in the end, if
      `recover.control_tokens` is above 0.

    Raises:
      UserError, Stopped: as in `sweep.sweep`.
    """
    both, first_token = (trial.domain, trial.donor), trial.tokens()
    with trial.track("test", 3) as show:
        show(0, "before")
        start = trial.held_out(trial.now, both)
        show(1, "at the peak")
        top = trial.held_out(peak, (trial.domain,))[trial.domain].mean(axis=1, dtype=np.float64)
        show(2, "after")
        ours = trial.try_on(trial.held_out, start, mask, beta)
    lost_P = top - start[trial.domain].mean(axis=1, dtype=np.float64)
    recovered = ratio_of_means(ours.gain_P, lost_P, "fraction")
    undefined = missing("the interval of A's loss includes 0", "fraction", len(lost_P), 0.0)
    reach = clustered(ours.loss_P).high  # the bootstrap of `at_equal_loss` draws from these losses and no others
    contests: dict[str, _Contest] = {}
    with trial.track("test of controls", len(kept)) as show:
        for i, (name, (control, settings, largest_tried)) in enumerate(kept.items()):
            say = lambda s, i=i, name=name: show(i, f"{name}, {s:g}")  # noqa: E731
            found = followed(trial, start, control, settings, largest_tried, reach, say)
            drawn = [list(found.values())]
            for draw in range(1, trial.settings.control_draws if control.random else 1):
                show(i, f"{name}, draw {draw + 1} of {trial.settings.control_draws}")
                drawn.append([trial.try_on(trial.held_out, start, *control.make(s, draw)) for s in found])
            contests[name] = _Contest(control, list(found), drawn)
    scored = 2.5 + sum(c.tries() for c in contests.values())  # the peak is half, because it is scored on A alone
    against, unsettled = _narrowed(trial, mask, beta, ours, contests, (trial.tokens() - first_token) / scored)
    return {
        "prompts": len(lost_P),
        "lost": mean_in_points(lost_P),
        **ours.record(),
        "recovery": undefined if recovered is None else recovered.record(0.0),
        "at_equal_loss": against,
        **({"unsettled": unsettled} if trial.settings.control_tokens else {}),
    }


def _narrowed(
    trial: Trial, mask: Any, beta: float, ours: Outcome, contests: dict[str, _Contest], each: float
) -> tuple[dict[str, Any], list[str]]:
    """Samples on where a comparison is not settled.

    Args:
      trial: the fixed part of the rollback.
      mask, beta: the chosen set and its strength.
      ours: its outcome with the first completions.
      contests: the controls with the first completions; they are changed.
      each: tokens that scoring one set of parameters once takes.

    Returns:
      The figures of the controls by name, in the order of `contests`, and the names of those that are not settled.

    Raises:
      UserError, Stopped: as in `sweep.sweep`.
    """
    settings, domains, first_token = trial.settings, (trial.domain, trial.donor), trial.tokens()
    width = settings.control_half_width
    figures = {name: c.record(ours, settings.samples) for name, c in contests.items()}
    if not settings.control_tokens:
        return figures, []
    times = 1  # how often `recover.samples` completions of each prompt were drawn
    while True:
        contests = {n: c for n, c in contests.items() if not c.settled(ours, width)}
        cost = times * each * (2 + sum(c.tries() for c in contests.values()))
        spent = trial.tokens() - first_token
        if not contests or times == 2 ** (LOOKS - 1) or spent + cost > settings.control_tokens:
            return figures, list(contests)
        with trial.track("more completions", times) as show:
            for again in range(times, 2 * times):
                show(again - times, f"{', '.join(contests)}; {again + 1} × {settings.samples} of each prompt")
                score, share = functools.partial(trial.held_out, again=again), 1 / (again + 1)
                start = score(trial.now, domains)
                ours = ours.joined(trial.try_on(score, start, mask, beta), share)
                for contest in contests.values():
                    for draw, outcomes in enumerate(contest.drawn):
                        for i, s in enumerate(contest.settings):
                            more = trial.try_on(score, start, *contest.control.make(s, draw))
                            outcomes[i] = outcomes[i].joined(more, share)
        times *= 2
        figures |= {name: c.record(ours, times * settings.samples) for name, c in contests.items()}


def followed(
    trial: Trial, start: Rewards, control: Control, settings: list[float], largest_tried: float, reach: float,
    say: Callable[[float], None],
) -> dict[float, Outcome]:  # fmt: skip
    """Tries settings of a control on the test prompts: those given, larger ones, and one in between.

    If B loses less than `reach` at all of those given, larger settings are tried, growing by the factor `GROWTH`, until
    it loses as much or the control ends. One more setting is then tried between the last two, because the frontier is a
    straight line between neighbouring settings and too low if they are far apart. Random controls use their first draw.

    Args:
      trial: the fixed part of the rollback.
      start: rewards [P, k] by domain at θ_T on the test prompts.
      control: the curve.
      settings: the settings that the validation prompts point to, at least one.
      largest_tried: the largest setting tried on validation prompts; the first larger setting is at least this.
      reach: a loss of B, in rewards.
      say: is told each setting before it is tried.

    Returns:
      Setting -> its outcome, in the order in which they were tried.

    Raises:
      UserError: if too many rewards of the test prompts fail.
      Stopped: after a SIGTERM, from `trial.held_out` or from `say`.
    """
    found: dict[float, Outcome] = {}

    def attempt(s: float) -> None:
        say(s)
        found[s] = trial.try_on(trial.held_out, start, *control.make(s, 0))

    for s in settings:
        attempt(s)
    below = s = max(settings)
    while max(o.loss for o in found.values()) < reach and s < control.most:
        below, s = s, min(max(s * GROWTH, largest_tried), control.most)
        attempt(s)
    between = control.clipped((below * s) ** 0.5)
    if between not in found:
        attempt(between)
    return found


def spread(drawn: Sequence[Outcome], ours: Outcome) -> dict[str, Any]:
    """How the gains and losses of several drawn sets are spread, in points.

    Args:
      drawn: outcomes of the drawn sets.
      ours: outcome of the chosen set.

    Returns:
      "n", the number of drawn sets; "gain" and "loss", each with the "mean" of the sets and "percentiles", [low, high]
      of their central 95 %; "p", which is (1 + number of sets that gain at least as much as the chosen set) / (1 + n).
      Only "n" if there are no sets.
    """
    gains = POINTS * np.array([o.gain for o in drawn])
    losses = POINTS * np.array([o.loss for o in drawn])
    if not len(drawn):
        return {"n": 0}
    return {
        "n": len(drawn),
        "gain": {"mean": float(gains.mean()), "percentiles": band(gains)},
        "loss": {"mean": float(losses.mean()), "percentiles": band(losses)},
        "p": (1 + int((gains >= POINTS * ours.gain).sum())) / (1 + len(drawn)),
    }
