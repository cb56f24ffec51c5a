"""A short sequence on any Hugging Face model: Math → QA → a refresh of Math, on the procedural domains.

  python -m mdrl_jax.main --config=configs/own_model.py --config.model.path=DIR --workdir=runs/own_model

DIR is a folder in Hugging Face layout (of a family that the README lists), or a name on the hub, which is downloaded.
Qwen2.5-0.5B-Instruct needs a TPU v5e-1 or a GPU of 16 GB; on a CPU it runs, slowly. The run shows that a model trains,
is scored, analysed and won back. With 8 steps a stage and 64 test prompts its figures are not results. Prompts are
short plain text, without a chat template.
"""

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.default()
    c.stages = ("math", "qa", "analyze", "refresh-math")
    c.scored_domains = ("math", "qa")
    c.stage_overrides = {"refresh-math": {"steps": 2}}
    c.domains.n_train = 512
    c.domains.n_test = 64
    c.rollout.prompt_buckets = (48,)
    c.rollout.completion_buckets = (32, 64)
    c.train.steps = 8
    c.train.prompts_per_step = 8
    c.train.group_size = 8
    c.train.grad_accum_steps = 4
    c.train.learning_rate = 2e-6
    c.model.remat = "dots"
    c.analyze.prompts = 16
    c.analyze.group_size = 4
    c.analyze.batch = 2
    c.analyze.path_prompts = 8
    c.analyze.permutations = 0  # the null of the largest eigenvalue takes 40 more searches
    return c
