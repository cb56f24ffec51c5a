"""The benchmark `bench step`: GRPO steps a second, sampling, rewards and update included, beside TRL and Tunix.

A step samples all completions at their full length, because no token ends them. The reward is the share of vowels
among the characters of a completion, so that the rewards of a group differ. Each side makes one update a step in one
batch, with AdamW and without a KL penalty.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import config
from mdrl_jax.bench.measure import Task
from mdrl_jax.bench.peers import installed
from mdrl_jax.bench.speed import Entry, Stepped
from mdrl_jax.bench.work import Work
from mdrl_jax.model import huggingface
from mdrl_jax.rl.trainer import Transforms, init_state
from mdrl_jax.runtime import build, make_pool
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages import grpo

OURS = "GRPO step"
LEAST = {"TRL": 2.5, "Tunix": 2.3}  # aims, in multiples of the other library's completions a second
STEPS = 10_000  # more than any benchmark makes
RATE = 1e-6  # learning rate


def vowels(completion: str, check: Mapping[str, Any] | None = None) -> float:
    """The share of vowels among the characters of a completion, in [0, 1]; 0 for an empty one."""
    return sum(c in "aeiou" for c in completion) / max(len(completion), 1)


def texts(work: Work) -> list[str]:
    """Short prompts, 50 times as many as a step takes."""
    return [f"Tale {i}" for i in range(50 * work.prompts)]


@contextlib.contextmanager
def ours(work: Work) -> Iterator[tuple[dict[str, Task], list[Entry]]]:
    """The GRPO stage of a run: its prompts, reward workers, sampler and training step, without records.

    Args:
      work: the batch.

    Yields:
      the task by name, and its line. The reward workers end with the context.

    Raises:
      UserError: if the folder is not that of a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(work)))
        c = config.default()
        c.stages = ("math",)
        c.scored_domains = ("math",)
        c.model.path = str(work.model)
        c.domains.math.files = (str(rows),)
        c.domains.math.prompt = "{text}"
        c.domains.math.reward = f"{__name__}:{vowels.__name__}"
        c.rollout.prompt_buckets = (work.prompt,)
        c.rollout.completion_buckets = (work.length,)
        c.evaluate.batch = work.prompts  # nothing is scored, but it has to be divisible by the devices
        c.train.steps = STEPS
        c.train.prompts_per_step = work.prompts
        c.train.group_size = work.group
        c.train.learning_rate = RATE
        made = config.parse(c)
        with make_pool(made.rewards) as pool:
            runtime = build(made, pool)
            runtime = dataclasses.replace(runtime, rollouts=dataclasses.replace(runtime.rollouts, eos_ids=()))
            (stage,) = resolve_stages(made, ("math",))
            programs = grpo.make_programs(runtime, stage, Transforms())
            params = huggingface.load(work.model, runtime.model, runtime.mesh)
            state = init_state(programs.optimizer, params, programs.shardings)
            steps = grpo.grpo_steps(runtime, stage, programs, state, None, 0, lambda step, params: {})
            yield (
                {OURS: Task(lambda: jax.block_until_ready(next(steps)[1].params))},
                [Entry(OURS, work.rows, "completions")],
            )


def trl(work: Work, folder: str) -> tuple[dict[str, Task], list[Entry]]:
    """TRL's GRPOTrainer on the CPU, in float32, without gradient checkpointing, a step at a time.

    Args:
      work: the batch.
      folder: an empty folder for what the trainer writes.

    Returns:
      the task by name, and its line. If TRL is not installed: no task, and a line that says so.
    """
    if not installed("trl", "torch"):
        return {}, [Entry("TRL", reason="trl is not installed")]
    library, transformers = importlib.import_module("trl"), importlib.import_module("transformers")
    datasets = importlib.import_module("datasets")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def run(stepped: Stepped) -> None:
        class Wait(transformers.TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                stepped.wait()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                stepped.done()

        args = library.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=STEPS, beta=0.0,
            learning_rate=RATE, temperature=1.0, per_device_train_batch_size=work.rows, num_generations=work.group,
            max_completion_length=work.length, generation_kwargs={"min_new_tokens": work.length},
        )  # fmt: skip
        library.GRPOTrainer(
            model=str(work.model),
            reward_funcs=lambda completions, **_: [vowels(text) for text in completions],
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts(work)}),
            processing_class=tokenizer,
            callbacks=[Wait()],
        ).train()

    entry = Entry("TRL", work.rows, "completions", faster=OURS, least=LEAST["TRL"], packages=("trl", "torch"))
    return {"TRL": Task(Stepped(run))}, [entry]


def tunix(work: Work) -> tuple[dict[str, Task], list[Entry]]:
    """Tunix's GRPOLearner on the first JAX device, in float32, a step at a time.

    Its model has the sizes of the folder's, which must be a Llama, and random weights.

    Args:
      work: the batch.

    Returns:
      the task by name, and its line. If Tunix is not installed: no task, and a line that says so.
    """
    if not installed("tunix"):
        return {}, [Entry("Tunix", reason="google-tunix is not installed")]
    sizes = huggingface.read_config(work.model)
    if sizes.family != "llama":
        return {}, [Entry("Tunix", reason=f"the model is no Llama but {sizes.family}")]
    llama, learners, cluster, rollouts, nnx, optax, transformers = map(
        importlib.import_module,
        ("tunix.models.llama3.model", "tunix.rl.grpo.grpo_learner", "tunix.rl.rl_cluster",
         "tunix.rl.rollout.base_rollout", "flax.nnx", "optax", "transformers"),
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), auto, devices=jax.devices()[:1])

    def run(stepped: Stepped) -> None:
        class Learner(learners.GRPOLearner):
            def _run_global_step(self, *args: Any, **kwargs: Any) -> None:
                stepped.wait()
                super()._run_global_step(*args, **kwargs)
                jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
                stepped.done()

        with mesh:
            shape = llama.ModelConfig(
                num_layers=sizes.n_layers, vocab_size=sizes.vocab_size, embed_dim=sizes.d_model,
                hidden_dim=sizes.d_mlp, num_heads=sizes.n_heads, head_dim=sizes.head_dim,
                num_kv_heads=sizes.n_kv_heads, rope_theta=int(sizes.rope_theta), norm_eps=sizes.norm_eps,
                weight_tying=sizes.tied,
            )  # fmt: skip
            actor = llama.Llama3(shape, rngs=nnx.Rngs(0))
            training = cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(RATE), eval_every_n_steps=STEPS, max_steps=STEPS,
                mini_batch_size=work.prompts, train_micro_batch_size=work.prompts,
            )  # fmt: skip
            rollout = rollouts.RolloutConfig(
                max_tokens_to_generate=work.length, max_prompt_length=work.prompt,
                kv_cache_size=work.prompt + work.length + 1, temperature=1.0, top_p=1.0, top_k=None,
                eos_tokens=[sizes.vocab_size - 1],
            )  # fmt: skip
            roles = dict.fromkeys((cluster.Role.ACTOR, cluster.Role.REFERENCE, cluster.Role.ROLLOUT), mesh)
            made = cluster.RLCluster(
                actor=actor, reference=None, tokenizer=tokenizer,
                cluster_config=cluster.ClusterConfig(
                    role_to_mesh=roles, rollout_engine="vanilla", training_config=training, rollout_config=rollout
                ),
            )  # fmt: skip
            learner = Learner(
                rl_cluster=made,
                algo_config=learners.GRPOConfig(num_generations=work.group, beta=0.0),
                reward_fns=lambda prompts, completions, **_: [vowels(text) for text in completions],
            )
            prompts = np.asarray(texts(work))
            batches = np.array_split(prompts, len(prompts) // work.prompts)
            learner.train({"prompts": batch} for batch in itertools.cycle(batches))

    entry = Entry("Tunix", work.rows, "completions", faster=OURS, least=LEAST["Tunix"], packages=("google-tunix",))
    return {"Tunix": Task(Stepped(run))}, [entry]
