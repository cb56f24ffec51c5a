"""Real data from local files: MBPP → GSM8K → XQuAD → IFEval, a few steps each, on any Hugging Face model.

  python -m mdrl_jax.main --config=configs/real_local.py:DATA --config.model.path=DIR --workdir=runs/real_local
  python -m mdrl_jax.main export --workdir=runs/real_local --stage=cw --out=runs/real_local_model

DATA is a folder (`data` if it is left out) with the files of the four data sets as their authors publish them:
`math/gsm8k_train*.jsonl`, `math/gsm8k_test.jsonl`, `code/mbpp.jsonl`, `qa/xquad_en.json`, `writing/ifeval.jsonl`.
DIR is a folder in Hugging Face layout, of one of the families in mdrl_jax/model/families.py.

The run shows that everything works, in minutes on two CPU cores with a model of a million parameters. With 2 steps a
stage and 16 test prompts its figures are not results, and most rewards of an untuned base model are 0;
configs/README.md says which fields to raise.
"""

from mdrl_jax import config


def get_config(data: str = "data") -> config.Config:
    """The configuration; `data` is the folder of the files."""
    c = config.default()
    c.stages = ("code", "math", "qa", "cw")
    c.domains.math.preset = "gsm8k"
    c.domains.math.files = (f"{data}/math/gsm8k_train*.jsonl",)
    c.domains.math.test_files = (f"{data}/math/gsm8k_test.jsonl",)
    c.domains.code.preset = "mbpp"
    c.domains.code.files = (f"{data}/code/mbpp.jsonl",)
    c.domains.qa.preset = "squad"
    c.domains.qa.files = (f"{data}/qa/xquad_en.json",)
    c.domains.cw.preset = "ifeval"
    c.domains.cw.files = (f"{data}/writing/ifeval.jsonl",)
    c.domains.n_train = 256
    c.domains.n_validation = 16
    c.domains.n_test = 16
    c.rollout.prompt_buckets = (256, 384)
    c.rollout.completion_buckets = (64, 128)
    c.train.steps = 2
    c.train.prompts_per_step = 8
    c.train.group_size = 4
    c.train.grad_accum_steps = 4
    c.train.learning_rate = 1e-6
    c.train.checkpoint_every = 1
    c.evaluate.samples = 1
    c.evaluate.batch = 16
    c.recover.prompts = 16
    c.model.remat = "dots"
    return c
