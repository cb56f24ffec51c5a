"""The second paper's setting (arXiv 2605.28860): Qwen2.5-3B-Instruct on SciKnowEval Chemistry by Dr.GRPO and by SFT.

  python -m mdrl_jax.main --config=configs/circuits_qwen25_3b.py:DATA --workdir=runs/circuits_qwen25_3b
  python -m mdrl_jax.main fit --config=configs/circuits_qwen25_3b.py --topology=v5e:4x4

DATA is a folder (`data` if it is left out) with `chemistry.jsonl`, the rows of SciKnowEval whose domain is Chemistry.
Published are: Dr.GRPO with 64 samples a prompt, two updates a batch, no KL and at most 128 new tokens, sampled at
temperature 0.6 and top-p 0.8; a learning rate of 2e-5 for RL and of 1e-5 to 9e-5 for SFT; at most 20 pairs for the
masks, −log π as their loss, λ = 0.1, and 100 steps of Adam at 0.1. The rest is chosen: steps, prompts of a step, and
that SFT starts from the instruct model as RL does. Every SFT ends where it scores as well as RL does. The config is
meant for 16 devices of 16 GB, such as a TPU v5e 4x4 slice. It has not been run.
"""

from mdrl_jax import config

SFT = {"sft-qa": 3e-5, "sft-qa@low": 1e-5, "sft-qa@high": 9e-5}  # stage -> learning rate


def get_config(data: str = "data") -> config.Config:
    """The configuration; `data` is the folder of the file."""
    c = config.default()
    c.stages = ("qa", *SFT, "circuits-qa")
    c.scored_domains = ("qa",)
    c.stage_overrides = {
        name: {"start": "base", "target": "qa", "target_every": 10, "learning_rate": rate} for name, rate in SFT.items()
    }
    c.model.path = "hub:Qwen/Qwen2.5-3B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.logprob_chunk = 128
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 2
    c.domains.qa.preset = "sciknoweval"
    c.domains.qa.files = (f"{data}/chemistry.jsonl",)
    c.domains.n_test, c.domains.n_validation = 500, 200
    c.rollout.prompt_buckets = (256, 512)
    c.rollout.completion_buckets = (16, 128)
    c.rollout.sampling.temperature, c.rollout.sampling.top_p = 0.6, 0.8
    c.evaluate.sampling.temperature, c.evaluate.sampling.top_p = 0.6, 0.8
    c.evaluate.samples, c.evaluate.batch = 4, 64
    c.train.steps = 100
    c.train.prompts_per_step, c.train.group_size, c.train.grad_accum_steps = 8, 64, 16
    c.train.learning_rate = 2e-5
    c.train.checkpoint_every = 20
    c.train.grpo.scale, c.train.grpo.aggregation = "none", "constant"
    c.train.grpo.updates_per_batch = 2
    c.sft.steps, c.sft.batch_size, c.sft.length, c.sft.warmup_steps = 200, 32, 520, 10
    c.sft.checkpoint_every = 50
    c.analyze.dtype = "bfloat16"
    c.analyze.prompts, c.analyze.group_size, c.analyze.batch, c.analyze.path_prompts = 64, 4, 2, 8
    c.recover.prompts = 200
    c.circuits.block = 16
    c.circuits.loss = "log_prob"
    c.circuits.at_once = 2
    return c
