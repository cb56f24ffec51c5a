"""The paper's experiment (arXiv 2606.02398): Qwen3-4B-Thinking-2507 on Code → Math → QA → Writing, then Re-Math.

  export MDRL_JUDGE_URL=https://HOST/v1 MDRL_JUDGE_MODEL=NAME MDRL_JUDGE_CACHE=judge_cache
  python -m mdrl_jax.main --config=configs/paper_qwen3_4b.py --config.model.path=DIR --workdir=runs/paper_qwen3_4b

DIR is the model's folder, for instance from `hf download Qwen/Qwen3-4B-Thinking-2507 --local-dir DIR`. Meant for 16
devices of 16 GB or more, such as a TPU v5e 4x4 slice; it has not been run. What its programs take of each device,
without one, and a first try:

  python -m mdrl_jax.main fit --config=configs/paper_qwen3_4b.py --topology=v5e:4x4
  python -m mdrl_jax.main --config=configs/paper_qwen3_4b.py --config.model.path=DIR --config.train.steps=2 \
    --config.domains.n_test=16

Sizes that memory decides, all for 16 GB: `mesh.tensor` halves what the keys and values of a completion take (more than
two parts are not possible with Qwen2.5-3B, which has two heads of them); `rollout.cache_gib` holds one prompt with its
8 completions of 8,192 tokens; a micro-batch has one sequence for each row of devices, in training
(`train.grad_accum_steps`) and in the analysis (`analyze.batch` x `analyze.group_size`); `analyze.held` gradients are
kept at a time. With more memory raise `analyze.held` first: with 3, each gradient is computed many times. The refresh
comes before the analysis, whose subspaces would take memory that it trains in.

What was published, and what is chosen here because nothing was:

  published: the model; the data sets below; 5,120 training prompts a domain; prompts up to 2,048 tokens; validation on
    AIME25 for Math and on 50 held-out prompts for each other domain; tests on SuperGPQA (2,141) and MMLU-Pro (1,203)
  chosen: one pass over the training prompts, 80 steps of 64; 16 of them for the refresh
  chosen, the nearest public settings: learning rate 1e-6, 8 samples a prompt, 64 prompts a step, clip 0.2 on both
    sides, KL coefficient 1e-3 (k3), temperature 0.7, weight decay 0.01
  chosen: completions up to 8,192 tokens; rewards see what follows the model's </think>
  chosen: rows are drawn by a hash of the prompt, so subfields and difficulties of SuperGPQA come in their own shares;
    the paper stratifies by them
  chosen: Math is tested on MATH-500, Code and Writing on rows of their own that training never sees
  chosen: of KlearReasoner-CodeSub only tasks with function tests are taken: those judged by standard input are left
    out, and fewer than 5,120 may remain
  chosen: a writing reply is compared with the reference by a judge. The columns of crownelius/Creative-Writing are not
    known here: `prompt` and `reference` are expected; where they have other names, set `domains.cw.prompt` and
    `domains.cw.check`, and for another edition `domains.cw.files`

The other QA test, of the last stage's model as it was exported:

  python -m mdrl_jax.main evaluate --model=EXPORT --config=configs/paper_qwen3_4b.py \
    --config.domains.qa.preset=mmlu_pro --config.domains.qa.n_test=1203 --config.domains.qa.test_share=0.15
"""

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.default()
    c.stages = ("code", "math", "qa", "cw", "refresh-math", "analyze", "rollback-math-qa")
    c.stage_overrides = {"refresh-math": {"steps": 16}}
    c.model.path = "Qwen3-4B-Thinking-2507"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.logprob_chunk = 512
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 2
    c.domains.separator = "</think>"
    c.domains.n_train = 5120
    c.domains.n_validation = 50
    c.domains.n_test = 500
    c.domains.code.preset = "klear_code"
    c.domains.math.preset = "openr1_math"
    c.domains.math.files = ("hub:open-r1/OpenR1-Math-220k:default:train",)
    c.domains.math.validation_files = ("hub:math-ai/aime25:test",)
    c.domains.math.test_files = ("hub:HuggingFaceH4/MATH-500:test",)
    c.domains.qa.preset = "supergpqa"
    c.domains.qa.n_test = 2141
    c.domains.cw.preset = "references"
    c.domains.cw.files = ("hub:crownelius/Creative-Writing:train",)
    c.rollout.prompt_buckets = (512, 1024, 2048)
    c.rollout.completion_buckets = (1024, 2048, 4096, 8192)
    c.rollout.sampling.temperature = 0.7
    c.rollout.cache_gib = 4.7
    c.evaluate.sampling.temperature = 0.7
    c.evaluate.samples = 1
    c.evaluate.batch = 64
    c.train.steps = 80
    c.train.prompts_per_step = 64
    c.train.group_size = 8
    c.train.grad_accum_steps = 64
    c.train.learning_rate = 1e-6
    c.train.checkpoint_every = 5
    c.train.grpo.clip_low = 0.2
    c.train.grpo.clip_high = 0.2
    c.train.grpo.kl_coef = 1e-3
    c.train.grpo.kl = "k3"
    c.train.optimizer.weight_decay = 0.01
    c.analyze.dtype = "bfloat16"
    c.analyze.prompts = 32
    c.analyze.group_size = 4
    c.analyze.batch = 2
    c.analyze.path_prompts = 8
    c.analyze.held = 3
    c.recover.prompts = 50
    c.rewards.workers = 8
    c.rewards.cpu_seconds = 10.0
    return c
