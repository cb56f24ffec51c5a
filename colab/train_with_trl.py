"""Trains Math, then QA, with TRL's GRPOTrainer on the CPU: checkpoints that `mdrl analyze` reads.

  python colab/train_with_trl.py BASE STEPS

BASE is a folder in Hugging Face layout, such as mdrl_jax/assets/tiny. Prompts and rewards are those of this package's
procedural domains in configs/own_model.py. The models go to trl/math and trl/qa. TRL and torch have to be installed.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from mdrl_jax import config
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.rewards.base import resolve, score

SETTINGS = Path(__file__).parent.parent / "configs" / "own_model.py"


def train(name: str, start: str, steps: int) -> str:
    """Trains the model in folder `start` on a domain; returns the folder of the trained model."""
    out = f"trl/{name}"
    domain = make_domains((name,), config.parse(config.from_file(SETTINGS)).domains)[name]
    judge = resolve(domain.reward)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def reward(completions: list[str], check: list[str], **columns: object) -> list[float]:
        pairs = zip(completions, check, strict=True)
        return [score(judge, text, json.loads(wanted)).reward for text, wanted in pairs]

    rows = Dataset.from_list([{"prompt": p.prompt, "check": json.dumps(p.check)} for p in domain.train])
    arguments = GRPOConfig(
        output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        max_steps=steps, per_device_train_batch_size=128, num_generations=8, max_completion_length=32, beta=0.0,
        learning_rate=4e-4, lr_scheduler_type="constant", adam_epsilon=1e-3,
    )  # fmt: skip
    trainer = GRPOTrainer(start, reward, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(out)
    return out


if __name__ == "__main__":
    trained = sys.argv[1]
    for domain in ("math", "qa"):
        trained = train(domain, trained, int(sys.argv[2]))
