"""Pre-trains the embedded base model from nothing.

  python -m mdrl_jax.main --config=configs/pretrain_tiny.py --workdir=runs/pretrain_tiny
  python -m mdrl_jax.main export --workdir=runs/pretrain_tiny --stage=pretrain --out=OUT

`mdrl_jax/assets/tiny` is that export: a word-level Llama of width 128 with 4 layers of 8 heads and 0.9M parameters. It
is trained on demonstrations of the four procedural domains, half of them terse and half worked in every domain. In the
last 40 % of the steps replies are wrong with the probability `sft.noise`. Abilities stay latent but uncertain, which
gives RL something to sharpen; configs/README.md says what a clean pre-training does instead.
"""

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.default()
    c.stages = ("pretrain",)
    c.model.weights = "random"
    c.rollout.prompt_buckets = (12,)
    c.rollout.completion_buckets = (16,)
    c.sft.steps = 2400
    c.sft.batch_size = 64
    c.sft.length = 22
    c.sft.learning_rate = 2e-3
    c.sft.noise = 0.2
    c.sft.noise_from = 0.6
    return c
