"""Run by hand: why a distillation from a teacher that cannot do Math wins Math back for a while (embedded model).

  python -m mdrl_jax.main export --workdir=runs/long-0 --stage=cw --out=models/cw     # and base, solo-qa
  python tests/rl/wrong_teachers.py runs/long-0 models/cw models/base models/solo-qa

The first token of a reply to Math is a choice: `>` begins working, and a digit is a terse answer, mostly a guess. With
s the student's probability of `>`, the KL of this token to a teacher is by the chain rule

  KL(choice) + (1 − s) KL(guess | no working).

The student descends the mean over training prompts of both terms, of the choice alone, and of the guess alone, with the
optimizer of a stage. For each the file prints s on test prompts after each step, and both terms before and after.
mdrl_jax/recovery/README.md has the results.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

STEPS, PROMPTS, RATE, BETAS, EPS = 25, 64, 4e-4, (0.9, 0.95), 2e-4
TERMS = {"both": (1.0, 1.0), "choice": (1.0, 0.0), "guess": (0.0, 1.0)}


def parts(logp_PV: torch.Tensor, teacher_PV: torch.Tensor, working: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both terms of the KL, each a mean over prompts in nats; the second with its factor 1 − s."""
    s, t = (x[:, working].exp().clamp(1e-6, 1 - 1e-6) for x in (logp_PV, teacher_PV))
    choice = s * (s / t).log() + (1 - s) * ((1 - s) / (1 - t)).log()
    whole = (logp_PV.exp() * (logp_PV - teacher_PV)).sum(dim=1)
    return choice.mean(), (whole - choice).mean()


def first_token(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """log π of the first token of the reply [P, V]; prompts of one length are computed together."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    rows = [model(torch.tensor([prompts[i] for i in some])).logits[:, -1] for some in by_length.values()]
    order = np.argsort([i for some in by_length.values() for i in some])
    return torch.log_softmax(torch.cat(rows), dim=-1)[torch.as_tensor(order)]


def walk(student: Any, teacher: Any, train: list[list[int]], test: list[list[int]], working: int, what: str) -> str:
    """Descends the terms `what`; s on the test prompts after each step, and the terms there before and after."""
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, betas=BETAS, eps=EPS)
    rng = np.random.default_rng(0)
    shares, ends = [], []
    with torch.no_grad():
        teacher_PV = first_token(teacher, test)
    for step in range(STEPS + 1):
        with torch.no_grad():
            logp_PV = first_token(student, test)
        shares.append(f"{logp_PV[:, working].exp().mean():.2f}")
        if step in (0, STEPS):
            ends.append(" ".join(f"{x:.3f}" for x in parts(logp_PV, teacher_PV, working)))
        some = [train[i] for i in rng.choice(len(train), PROMPTS, replace=False)]
        with torch.no_grad():
            teacher_some = first_token(teacher, some)
        terms = parts(first_token(student, some), teacher_some, working)
        loss = sum(weight * term for weight, term in zip(TERMS[what], terms, strict=True))
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return f"{what}: s {' '.join(shares)}; KL of choice and guess {ends[0]} -> {ends[1]} nats"


def main(workdir: str, student: str, *teachers: str) -> None:
    """Prints the walks to each teacher."""
    torch.set_num_threads(1)
    tokens = transformers.AutoTokenizer.from_pretrained(student)
    with gzip.open(Path(workdir) / "completions" / "00-base.jsonl.gz", "rt") as file:
        texts = [row["text"] for row in map(json.loads, file) if row["domain"] == "math"]
    ids = [tokens(text)["input_ids"] for text in texts]
    test, train = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    working = tokens(">", add_special_tokens=False)["input_ids"][-1]
    load = transformers.AutoModelForCausalLM.from_pretrained
    for teacher in teachers:
        for what in TERMS:
            print(teacher, walk(load(student), load(teacher), train, test, working, what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
