"""Code → Math → QA → Creative Writing, why Math was lost, and a refresh and a rollback that win it back.

  python -m mdrl_jax.main --config=configs/quickstart.py --config.seed=0 --workdir=runs/quickstart-0

It takes 293 s on two idle CPU cores without an accelerator. The model of 0.9M parameters is part of the package.

The conflict is designed. Math pays for the final answer alone, and the base model gets it right far more often by
working (84 %) than tersely (10 %). QA pays only for a reply that is nothing but the answer, Creative Writing pays a
fifth less for a reply with working in it, and Code pays the same for either style. In every domain the base model
replies in either style, half and half. Loss, optimizer and settings are the same in every stage. It is therefore no
finding that later domains harm Math. The findings are how much is lost, where in the model, and how cheaply it comes
back.

Scores in points, mean over seeds 0, 1 and 2 ± the half-width of the 95 % interval:

  after stage           code          math            qa            cw
  math            96.3 ± 1.3    94.5 ± 3.0    22.9 ± 2.8    68.8 ± 0.7
  cw              94.9 ± 1.0   43.2 ± 13.2    75.6 ± 5.2    98.7 ± 0.3
  refresh-math    96.7 ± 1.0    89.3 ± 2.3    74.0 ± 6.2    98.6 ± 0.4
  rollback        96.4 ± 1.3   78.5 ± 25.8    72.8 ± 7.6    98.7 ± 0.3

configs/README.md has all stages, every figure with its interval, and the limits; mdrl_jax/analysis/README.md has the
results of the analysis. The last digits depend on the processor and the number of cores.
"""

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.default()
    c.stages = ("code", "math", "qa", "cw", "analyze", "refresh-math", "rollback-math-qa")
    # Half of each step's prompts are QA's: a refresh of Math alone costs QA two to three points.
    mixed = {"prevent": {"replay": 0.5, "domains": ("qa",)}}
    c.stage_overrides = {
        "refresh-math": {"steps": 4, "prompts_per_step": 32, "group_size": 8, "learning_rate": 8e-4, **mixed}
    }
    c.rollout.prompt_buckets = (12,)
    c.rollout.completion_buckets = (8, 16)
    c.train.steps = 22
    c.train.prompts_per_step = 16
    c.train.group_size = 16
    c.train.learning_rate = 4e-4
    c.train.kl_every = 10
    c.train.grpo.clip_low = 0.2
    c.train.grpo.clip_high = 0.25
    c.train.optimizer.b2 = 0.95
    c.train.optimizer.eps = 2e-4
    c.model.remat = "dots"  # on a CPU it takes longer to store and load what a layer made than to make it again
    c.analyze.prompts = 48
    c.analyze.group_size = 4
    c.analyze.batch = 4
    c.analyze.path_prompts = 16
    c.analyze.permutations = 0  # the null of the largest eigenvalue takes 40 more searches: see configs/claims.py
    return c
