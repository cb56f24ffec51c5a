"""Code → Math → QA → Creative Writing → a refresh of Math, on the embedded base model."""

from ml_collections import ConfigDict

from mdrl_jax import config


def get_config() -> ConfigDict:
    """The configuration."""
    c = config.default()
    c.stages = ("code", "math", "qa", "cw", "refresh-math")
    c.stage_overrides = {"refresh-math": {"steps": 4}}
    c.rollout.prompt_buckets = (12,)
    c.rollout.completion_buckets = (8, 16)
    c.train.steps = 22
    c.train.prompts = 16
    c.train.group = 16
    c.train.learning_rate = 4e-4
    c.train.kl_every = 10
    c.train.grpo.clip_low = 0.2
    c.train.grpo.clip_high = 0.25
    c.train.optimizer.b2 = 0.95
    c.train.optimizer.eps = 2e-4
    return c
