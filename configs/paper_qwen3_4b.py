"""The paper's experiment (arXiv 2606.02398): Qwen3-4B-Thinking-2507 on Code → Math → QA → Writing, then Re-Math.

  python -m mdrl_jax.main evaluate --dry_run --config=configs/paper_qwen3_4b.py --config.model.path=DIR \
    --config.domains.cw.files="('hub:NAME:train',)"
  export MDRL_JUDGE_URL=https://HOST/v1 MDRL_JUDGE_MODEL=NAME MDRL_JUDGE_CACHE=judge_cache
  python -m mdrl_jax.main --config=configs/paper_qwen3_4b.py --config.model.path=DIR \
    --config.domains.cw.files="('hub:NAME:train',)" --workdir=runs/paper_qwen3_4b

The first command looks up every data set, counts its rows and shows a prompt; nothing is trained. The creative writing
of the user crownelius comes as several data sets, and the paper does not say which it used. NAME is one of them, with
the columns `prompt` and `response`; without the flag, the file creative_writing.jsonl with these fields is read. DIR is
the model's folder, for instance from `hf download Qwen/Qwen3-4B-Thinking-2507 --local-dir DIR`. The config is meant for
16 devices of 16 GB or more, such as a TPU v5e 4x4 slice. It has not been run. These commands compute, without a TPU,
how much of each device its programs take, and make a first try:

  python -m mdrl_jax.main fit --config=configs/paper_qwen3_4b.py --topology=v5e:4x4
  python -m mdrl_jax.main --config=configs/paper_qwen3_4b.py --config.model.path=DIR --config.train.steps=2 \
    --config.domains.n_test=16

Memory decides `mesh.tensor`, `rollout.cache_gib`, the micro-batches and `analyze.held`; configs/README.md says how.
The refresh comes before the analysis, whose subspaces would take memory that the refresh trains in. configs/README.md
also lists every setting that was published, and every one that was chosen because nothing was.

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
    c.domains.cw.files = ("creative_writing.jsonl",)  # no name of the hub is known to be right; see above
    c.domains.cw.check = {"prompt": "prompt", "reference": "response"}
    c.domains.cw.reply = "{response}"
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
