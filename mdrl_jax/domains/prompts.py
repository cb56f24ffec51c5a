"""Tokenized prompts of a domain, in the order in which a stage visits them."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from mdrl_jax.domains.base import Domain, Problem
from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Problems of one split with their tokens; `ids` name a prompt in the sampling keys."""

    domain: str
    reward: str
    problems: tuple[Problem, ...]
    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.problems)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Unique 32-bit prompt ids: the domain's hash plus the row."""
        return (np.uint32(zlib.crc32(self.domain.encode())) + rows.astype(np.uint32)).astype(np.uint32)


def tokenize(domain: Domain, split: str, tokenizer: Any, longest: int) -> PromptSet:
    """The split's prompts as tokens.

    Raises:
      UserError: if the split is empty, or a prompt is longer than `longest` or has an unknown word.
    """
    problems: tuple[Problem, ...] = getattr(domain, split)
    if not problems:
        raise UserError(f"domain {domain.name} has no {split} prompts")
    tokens = []
    for problem in problems:
        row = tuple(tokenizer(problem.prompt).input_ids)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row:
            raise UserError(
                f"domain {domain.name}: a {split} prompt has a word the tokenizer does not know: "
                f"{problem.prompt[:60]!r}"
            )
        if len(row) > longest:
            raise UserError(
                f"domain {domain.name}: a {split} prompt has {len(row)} tokens, the limit "
                f"(rollout.prompt_buckets) is {longest}: {problem.prompt[:60]!r}"
            )
        tokens.append(row)
    return PromptSet(domain.name, domain.reward, problems, tuple(tokens))


def visit_order(seed: int, stage: str, domain: str, n: int, position: int, count: int) -> np.ndarray:
    """Rows `position` to `position + count` of an endless stream of shuffled passes over `n` prompts.

    A function of its arguments alone, so that a resumed run needs nothing but its position.
    """
    rows = []
    while count > 0:
        epoch, offset = divmod(position, n)
        names = [zlib.crc32(name.encode()) for name in (stage, domain)]
        order = np.random.default_rng([seed, *names, epoch]).permutation(n)
        taken = order[offset : offset + count]
        rows.append(taken)
        position, count = position + len(taken), count - len(taken)
    return np.concatenate(rows)
