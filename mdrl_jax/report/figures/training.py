"""What each training stage logged at its steps: reward, entropy, length and KL of its completions, or its NLL."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from mdrl_jax.report.figure import CATEGORIES, Figure, Row, data
from mdrl_jax.report.figures.layout import distinct, side_by_side
from mdrl_jax.report.folder import Records
from mdrl_jax.report.intervals import tooltips

# By curve: the name of its figure, its title, and the title of its axis with the unit.
CURVES = {
    "train/reward": ("training-reward", "Reward by step", "reward, points"),
    "train/kl": ("training-kl", "KL to the start of the stage by step", "KL, nats"),
    "train/entropy": ("training-entropy", "Entropy by step", "entropy, nats"),
    "train/length": ("training-length", "Length of completions by step", "length, tokens"),
    "train/nll": ("training-nll", "Supervised stages: loss by step", "−log π, nats"),
}
SCALE = {"train/reward": 100.0}
ACROSS, WIDTH, HEIGHT = 5, 84, 62  # charts in a line; px of each
POINTS = 100  # most points of a curve; with more steps a point is the mean of several


def curves(records: Records) -> list[Figure]:
    """The curves of every training stage, one figure for each kind of curve (`CURVES`).

    Returns:
      The figures `training-reward`, `training-kl`, `training-entropy`, `training-length` and `training-nll`, each if a
      stage logged it. A figure has a small chart for each stage, in the order of the run and with one vertical scale;
      the step is horizontal. Points are means over the completions of a step, or of several steps if there are many.

    Raises:
      Absent: if no stage has logged a curve.
      UserError: if an event file is no regular file.
    """
    found = records.curves(tuple(CURVES))
    figures = []
    for tag, (name, title, axis) in CURVES.items():
        rows, several = [], 1
        for folder, logged in found.items():
            points = logged.get(tag, {})
            several = max(several, -(-len(points) // POINTS))
            rows += _rows(folder.split("-", 1)[1], points, SCALE.get(tag, 1.0))
        if rows:
            figures.append(Figure(name, title, _chart(rows, axis), rows, _caption(tag, several)))
    return figures


def _rows(stage: str, points: Mapping[int, float], scale: float) -> list[Row]:
    """Points of one stage, each the mean of equally many steps."""
    steps, size = list(points), -(-len(points) // POINTS) or 1
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [
        {"stage": stage, "step": group[-1], "value": scale * sum(points[s] for s in group) / len(group)}
        for group in groups
    ]


def _chart(rows: Sequence[Row], axis: str) -> Any:
    order = distinct(rows, "stage")
    tips = [alt.Tooltip("stage:N"), alt.Tooltip("step:Q"), *tooltips({"value": axis}, ".3g")]
    # A stage of one step has a tick at half a step, too, which has no number.
    whole = "datum.value % 1 ? '' : format(datum.value, 'd')"
    axis_of_steps = alt.Axis(tickCount=2, labelExpr=whole, grid=False)
    x = alt.X("step:Q", title=None, axis=axis_of_steps, scale=alt.Scale(zero=True))
    y = alt.Y("value:Q", title=axis, axis=alt.Axis(tickCount=3, titleLimit=HEIGHT + 40), scale=alt.Scale(zero=False))
    base = alt.Chart().encode(x=x, y=y, tooltip=tips)
    layers = alt.layer(
        base.mark_line(strokeWidth=1.5, color=CATEGORIES[0]),
        base.mark_point(filled=True, size=9, opacity=1, color=CATEGORIES[0]),
        data=data(rows),
    ).properties(width=WIDTH, height=HEIGHT)
    made = side_by_side(layers, "stage", order, min(ACROSS, len(order)), spacing={"row": 12, "column": 12})
    return made.resolve_scale(x="independent")


def _caption(tag: str, several: int) -> str:
    what = {
        "train/reward": "Mean reward of the completions that a step sampled from its training prompts",
        "train/kl": "KL of the policy to its reference, in nats a token. The reference is the start of the stage "
        "unless the run names another, and `train.kl_every` says how often the KL is estimated",
        "train/entropy": "Mean of −log π over the tokens of a step's completions, in nats a token",
        "train/length": "Mean number of tokens of a step's completions",
        "train/nll": "Mean negative log-likelihood of the reply tokens of a step, in nats a token",
    }[tag]
    grouped = f" A point is the mean of up to {several} steps." if several > 1 else ""
    return f"{what}. Horizontal: step. Each step has other prompts, so single points scatter; no interval.{grouped}"
