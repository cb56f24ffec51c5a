"""A chosen conflict set against its controls, at equal loss of the donor (definitions §9, claim C7).

Controls are tried on validation prompts along curves of growing size (the whole edit: of growing strength), outward
from the chosen size until B loses as much as by the chosen set; random and matched sets of the chosen size also many
times over, for the spread between draws. What is reported is of held-out test prompts: the chosen set, and of each
control the one or two settings that its frontier rests on at that loss, the next smaller one, and larger ones as
needed, so that no prompt serves both to choose a set and to judge it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mdrl_jax.recovery.rollback.controls import matched
from mdrl_jax.recovery.rollback.rules import magnitude
from mdrl_jax.recovery.rollback.selection import complement, largest, random_set, size, support
from mdrl_jax.recovery.rollback.sweep import ROUTE, Setting, Trial
from mdrl_jax.recovery.rollback.tradeoff import Outcome, Rewards, at_equal_loss, carriers, mean_in_points
from mdrl_jax.stats.bootstrap import band
from mdrl_jax.stats.estimate import POINTS, missing, paired_difference, ratio_of_means

GROWTH, HALVINGS, SHRINKS = 4.0, 2, 4  # of a control's size, on validation prompts
MATCHED_SETS = 5


@dataclasses.dataclass(frozen=True)
class Control:
    """A curve of sets: `make(s)` is (mask, strength) of a size, or strength, s in [least, most]."""

    make: Callable[[float], tuple[Any, float]]
    least: float
    most: float
    start: float

    def clipped(self, s: float) -> float:
        """A setting that there is: sizes are whole numbers."""
        return float(np.clip(round(s) if self.least == 1 else s, self.least, self.most))


def controls(trial: Trial, chosen: Setting) -> dict[str, Control]:
    """The curves of definitions §9 in the place and at the strength of the chosen setting."""
    within, everywhere, beta = trial.places[chosen.place], support(trial.edit), chosen.strength
    scores, sizes = trial.scores[chosen.rule], magnitude(trial.edit)
    room, n = size(within), float(chosen.size)

    def matched_to(s: float) -> Any:
        return matched(trial.edit, largest(scores, round(s), within), within, 0)

    made = {
        "random": Control(lambda s: (random_set(0, round(s), within), beta), 1, room, n),
        "matched": Control(lambda s: (matched_to(s), beta), 1, room // 2, n),
        "largest": Control(lambda s: (largest(sizes, round(s), within), beta), 1, room, n),
        "whole": Control(lambda s: (everywhere, s), 1e-3, 1.0, 1 / 16),
    }
    if chosen.place == ROUTE:
        outside = complement(within)
        most = size(largest(scores, trial.n, outside))
        made["out_of_route"] = Control(lambda s: (largest(scores, round(s), outside), beta), 1, most, n)
    return {name: c for name, c in made.items() if c.most >= c.least}


def outward(control: Control, loss_at: Callable[[float], float], target: float) -> Iterator[float]:
    """Settings to try, from the control's start to where B's loss passes `target`, then in between, geometrically."""

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
    """Controls of the chosen setting, on validation prompts, then those that matter on the test prompts.

    Args:
      before: rewards of the validation prompts at θ_T.
      peak: θ*_A.
    """
    within, mask, beta = trial.places[chosen.place], trial.chosen_mask(chosen), chosen.strength
    draws: dict[str, tuple[int, Callable[[int], Any]]] = {
        "random": (trial.settings.random_sets, lambda i: random_set(i, chosen.size, within)),
        "matched": (MATCHED_SETS, lambda i: matched(trial.edit, mask, within, i)),
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
    curves, kept, made = {}, {}, controls(trial, chosen)
    with trial.track("controls", len(made)) as show:
        for name, control in made.items():
            tried: dict[float, Outcome] = {}
            for s in outward(control, lambda s, tried=tried: tried[s].loss, chosen.outcome.loss):
                show(len(kept), f"{name}, {s:g}")
                tried[s] = trial.try_on(trial.validation, before, *control.make(s))
            curves[name] = [{"setting": s} | o.record() for s, o in sorted(tried.items())]
            carrying = np.array(list(tried))[carriers(list(tried.values()), chosen.outcome.loss)].tolist()
            below = max((s for s in tried if s < min(carrying)), default=min(carrying))
            kept[name] = (control, sorted({below, *carrying}), max(tried))
    return {"same_size": same_size, "curves": curves, "test": on_test(trial, mask, beta, peak, kept)}


def on_test(
    trial: Trial, mask: Any, beta: float, peak: Any, kept: dict[str, tuple[Control, list[float], float]]
) -> dict[str, Any]:
    """The chosen set and its controls on the test prompts; `kept`: each control, settings, and the largest tried.

    To the settings chosen on validation prompts come larger ones, until B loses the upper end of the interval of its
    loss by the chosen set, so that no frontier ends before the loss at which it is read, and one before the last.
    """
    with trial.track("test", 3) as show:
        show(0, "before")
        start = trial.held_out(trial.now, (trial.domain, trial.donor))
        show(1, "at the peak")
        top = trial.held_out(peak, (trial.domain,))[trial.domain].mean(axis=1, dtype=np.float64)
        show(2, "after")
        ours = trial.try_on(trial.held_out, start, mask, beta)
    lost_P = top - start[trial.domain].mean(axis=1, dtype=np.float64)
    recovered = ratio_of_means(ours.gain_P, lost_P, "fraction")
    undefined = missing("the interval of A's loss includes 0", "fraction", len(lost_P), 0.0)
    reach = paired_difference(ours.loss_P, np.zeros_like(ours.loss_P)).high
    against = {}
    with trial.track("test of controls", len(kept)) as show:
        for i, (name, (control, settings, largest_tried)) in enumerate(kept.items()):
            say = lambda s, i=i, name=name: show(i, f"{name}, {s:g}")  # noqa: E731
            found = followed(trial, start, control, settings, largest_tried, reach, say)
            estimate, height = at_equal_loss(ours, list(found.values()))
            rows = [{"setting": s} | o.record() for s, o in sorted(found.items())]
            against[name] = estimate.record(0.0) | {"control_gain": height, "settings": rows}
    return {
        "prompts": len(lost_P),
        "lost": mean_in_points(lost_P),
        **ours.record(),
        "recovery": undefined if recovered is None else recovered.record(0.0),
        "at_equal_loss": against,
    }


def followed(
    trial: Trial, start: Rewards, control: Control, settings: list[float], largest_tried: float, reach: float,
    say: Callable[[float], None],
) -> dict[float, Outcome]:  # fmt: skip
    """A control's settings on the test prompts, and what they did: those given, and on to where B loses `reach`."""
    found: dict[float, Outcome] = {}

    def attempt(s: float) -> None:
        say(s)
        found[s] = trial.try_on(trial.held_out, start, *control.make(s))

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
    """Gains and losses of drawn sets: mean, 95 % of them, and the share whose gain, ours among them, is as large."""
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
