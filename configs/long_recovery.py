"""Recoveries of Math that may take as long as a stage, and where distillations from wrong teachers end.

  for s in 0 1 2; do
    python -m mdrl_jax.main --config=configs/long_recovery.py --config.seed=$s --workdir=runs/long-$s
  done
  python -m mdrl_jax.main seeds --workdir=runs/long-0 --workdir=runs/long-1 --workdir=runs/long-2

The methods and the sequence are those of `configs/compare.py`, whose recoveries have 4 steps of 256 completions; here
each may take 24, and a stage takes 22. Each keeps its best step on validation prompts, and `recovery/*.json` has the
validation scores of every step. The wrong teachers are QA's peak (`@qa`), the base model (`@base`) and `solo-qa`,
which was trained on QA alone (`@solo`) and scores below the student on Math.

A seed takes less than 9 minutes on two cores. Over seeds 0, 1 and 2 `refresh-math`, half of whose prompts are QA's,
wins back 1.05 [1.03, 1.08] of Math's loss at a collateral of 0.0 [−0.2, 0.2] points; with Math's prompts alone a long
recovery costs QA. A wrong teacher wins Math back for some steps and ends at its own score.
mdrl_jax/recovery/README.md has all figures.
"""

from pathlib import Path

from mdrl_jax import config

TEACHERS = {"": "", "@qa": "qa", "@base": "base", "@solo": "solo-qa"}  # label -> teacher; "" is Math's own peak


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    for domain in ("code", "math", "cw"):
        getattr(c.domains, domain).n_test = 1000
    mixed = c.stage_overrides["refresh-math"].to_dict()
    longer = {
        "refresh-math": mixed,  # half of the prompts are QA's
        "refresh-math@plain": {"start": "cw"},
        "alternate-math-qa": {},
        **{f"distill-math{label}": {"distill": {"teacher": name}} for label, name in TEACHERS.items()},
        "distill-all": {},
    }
    c.stages = ("code", "math", "qa", "cw", "solo-qa", *longer)
    c.stage_overrides = {name: {**settings, "steps": 24} for name, settings in longer.items()}
    return c
