"""Chemistry on SmolLM2-135M-Instruct by GRPO and by SFT to one score, after a warm-up on letters.

  python -m mdrl_jax.main --config=configs/circuits_smollm2_135m.py:DATA --workdir=runs/circuits_smollm2_135m

DATA is a folder (`data` if it is left out) with `qa/sciknoweval/chemistry.jsonl`, the rows of SciKnowEval whose domain
is Chemistry. The instruct model answers both prompts of hardly any counterfactual pair, so that it has no circuit to
compare. `sft` therefore trains it on letters first; GRPO and `sft-qa` both start from its end, and `sft-qa` ends where
it scores as well as GRPO did. On two CPU cores the three trainings took 39, 5 and 19 minutes, and
`circuits-qa` about two hours. configs/README.md has the scores, the circuits and the verdict on C8.
"""

from mdrl_jax import config


def get_config(data: str = "data") -> config.Config:
    """The configuration; `data` is the folder of the file."""
    c = config.default()
    c.stages = ("sft", "qa", "sft-qa", "circuits-qa")
    c.scored_domains = ("qa",)
    c.stage_overrides = {"sft-qa": {"start": "sft", "target": "qa", "target_every": 5, "learning_rate": 6e-5}}
    c.model.path = "hub:HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.remat = "dots"
    c.model.logprob_chunk = 64
    c.domains.qa.preset = "sciknoweval"
    c.domains.qa.files = (f"{data}/qa/sciknoweval/chemistry.jsonl",)
    c.domains.n_train, c.domains.n_test, c.domains.n_validation = 2200, 256, 128
    c.rollout.prompt_buckets = (96, 112, 128, 160)
    c.rollout.completion_buckets = (8,)
    c.rollout.sampling.temperature = 0.7
    c.evaluate.sampling.temperature = 0.7
    c.evaluate.samples, c.evaluate.batch = 4, 32
    c.sft.steps = 120
    c.sft.batch_size, c.sft.grad_accum_steps = 16, 2
    c.sft.length = 168
    c.sft.learning_rate, c.sft.warmup_steps = 1e-4, 10
    c.sft.checkpoint_every = 30
    c.train.steps = 16
    c.train.prompts_per_step, c.train.group_size, c.train.max_rounds = 8, 8, 3
    c.train.grad_accum_steps = 8
    c.train.learning_rate = 3e-5
    c.train.checkpoint_every = 4
    c.recover.prompts = 128
    c.analyze.split = "test"
    c.circuits.blocks, c.circuits.block = 4, 6
    c.circuits.differing = 72
    c.circuits.penalties = (0.005,)
    c.circuits.steps, c.circuits.learning_rate = 30, 0.3
    c.circuits.tried = 32
    c.circuits.single_blocks = 1
    return c
