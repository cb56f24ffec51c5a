"""Does RL keep more of the base model's circuit than SFT? Code by GRPO and by SFT to the same score, from one base.

  python -m mdrl_jax.main --config=configs/circuits.py --config.seed=0 --workdir=runs/circuits-0

GRPO trains Code with the quickstart's settings. SFT starts from the same base model, learns from right replies, and
ends at the first look at which it scores as well on validation prompts as GRPO did: the matched score. `sft-code@steps`
takes as many steps as GRPO instead. The stage `circuits-code` then seeks the attention heads that each model needs for
Code, compares them with base's, and judges claim C8 (definitions §11, §13). The scores of all domains after each stage
say what either training cost the other domains.

Code is the one procedural domain in which SFT reaches RL's score: in the others the reward pays for one style of reply,
and half of the demonstrations have the other. A seed takes about eight minutes on two CPU cores; configs/README.md has
the figures of three seeds: neither training needs a head outside base's circuit.
"""

from pathlib import Path

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.stages = ("code", "sft-code", "sft-code@steps", "circuits-code")
    matched = {"start": "base", "target": "code", "target_every": 2, "steps": 100}
    c.stage_overrides = {"sft-code": matched, "sft-code@steps": {"start": "base", "steps": c.train.steps}}
    c.sft.warmup_steps, c.sft.learning_rate, c.sft.length = 5, c.train.learning_rate, 28
    return c
