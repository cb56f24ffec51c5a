"""A real instruct model on real data: SmolLM2-135M-Instruct, supervised, then Code → Math → QA → CW by GRPO.

  python -m mdrl_jax.main --config=configs/smollm2_135m.py:DATA --workdir=runs/smollm2_135m

Nobody designed a conflict here. DATA is a folder (`data` if it is left out) with these files:

- `code/mbpp.jsonl`: MBPP. Code is the missing last line of its functions, judged by their real tests.
- `math/word_problems.jsonl`: word problems with "question", "equation" and "answer", such as those of MAWPS and ASDiv.
  Those of one operation on numbers up to 20 are used.
- `qa/xquad_en.json`: XQuAD or SQuAD, judged by F1.
- `writing/ifeval.jsonl`: IFEval. CW is the share of its constraints that a reply meets.

The model comes from the hub. `--config.model.path=DIR` takes it from a folder. `sft` trains Code, Math and QA on
demonstrations, because the instruct model has next to no reward in Code and Math that GRPO could learn from; IFEval has
no demonstrations. GRPO starts from its end, θ_0, and fills its steps with groups whose rewards differ. Prompts have at
most 256 tokens and completions at most 64. Two CPU cores and 6 GB suffice without the analysis; a stage takes 10 to 30
minutes, and its scores 8 to 15. With seed 0, Code rose by 5.8 [2.5, 9.0], Math by 13.3 [8.4, 18.2], QA by 2.2 [−0.9,
5.4] and CW by 14.7 [11.1, 18.4] points by their own stages. CW's stage cost Math 4.5 [1.6, 7.3] points, in further
trainings 1.8 [−1.0, 4.5] and 7.2 [3.7, 10.7]. A refresh of three steps added 6.6 [2.8, 10.5]; after the third training
three steps of Math added 8.7 [4.3, 13.1], and 0.6 [−3.7, 4.9] before CW. 40 steps of QA lift it by 9.4 [5.1, 13.6]. A
rollback of CW's edit added 1.7 [−0.7, 4.0]. configs/README.md has all figures.
"""

from mdrl_jax import config


def get_config(data: str = "data") -> config.Config:
    """The configuration; `data` is the folder of the files."""
    c = config.default()
    c.stages = ("sft", "code", "math", "qa", "cw", "refresh-math", "rollback-math-cw")
    longer = {"steps": 16, "learning_rate": 4e-5}
    c.stage_overrides = {name: longer for name in ("code", "math", "qa", "cw")}
    # In a first run with 8 prompts a step at 4e-5, Math drifted to addition, whatever was asked.
    steady = {"learning_rate": 3e-5, "prompts_per_step": 16, "grad_accum_steps": 16}
    c.stage_overrides["math"] = {**longer, **steady}
    c.stage_overrides["refresh-math"] = {**steady, "steps": 6}
    c.model.path = "hub:HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.remat = "dots"
    c.model.logprob_chunk = 64

    c.domains.code.preset = "mbpp_last_line"
    c.domains.code.files = (f"{data}/code/mbpp.jsonl",)
    c.domains.math.files = (f"{data}/math/word_problems.jsonl",)
    c.domains.math.fields = "small_step"
    c.domains.math.validation_share, c.domains.math.test_share = 0.1, 0.4
    c.domains.math.prompt = "{question}"
    c.domains.math.check = {"answer": "answer"}
    c.domains.math.reply = "{equation} = {answer}. The answer is {answer}."
    c.domains.math.reward = "math"
    c.domains.qa.preset = "squad"
    c.domains.qa.files = (f"{data}/qa/xquad_en.json",)
    c.domains.qa.validation_share, c.domains.qa.test_share = 0.15, 0.35
    c.domains.cw.preset = "ifeval"
    c.domains.cw.files = (f"{data}/writing/ifeval.jsonl",)
    c.domains.cw.test_share = 0.5
    c.domains.n_test = 256
    c.domains.n_validation = 64

    c.rollout.prompt_buckets = (64, 96, 128, 192, 256)
    c.rollout.completion_buckets = (32, 64)
    c.rollout.sampling.temperature = 0.7
    c.evaluate.sampling.temperature = 0.7
    c.evaluate.batch = 32
    c.recover.prompts = 64

    c.sft.steps = 40
    c.sft.batch_size, c.sft.grad_accum_steps = 12, 3
    c.sft.length = 320
    c.sft.learning_rate, c.sft.warmup_steps = 4e-5, 4
    c.sft.checkpoint_every = 20
    c.train.steps = 12
    c.train.prompts_per_step, c.train.group_size, c.train.max_rounds = 8, 8, 3
    c.train.grad_accum_steps = 8
    c.train.learning_rate = 3e-5
    c.train.checkpoint_every = 4
    # Sizes for 24 GB: 24 gradients are held, one for each block of four prompts of the four domains.
    c.analyze.prompts, c.analyze.group_size, c.analyze.batch, c.analyze.path_prompts = 24, 4, 4, 8
    c.analyze.held = 24
    c.analyze.vectors, c.analyze.lanczos_block, c.analyze.lanczos_steps, c.analyze.permutations = 4, 2, 6, 0
    return c
