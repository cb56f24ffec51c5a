"""The placebo: the quickstart's Code → Math, then QA and Creative Writing at learning rate 0: nothing may be lost.

python -m mdrl_jax.main --config=configs/placebo.py --config.seed=0 --workdir=runs/placebo-0

Measured on seeds 0, 1 and 2: after placebo-qa and placebo-cw every reward of every prompt is the one after math, so the
loss is exactly 0.
"""

from pathlib import Path

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.stages = ("code", "math", "placebo-qa", "placebo-cw")
    c.stage_overrides = {}
    return c
