"""Tokenized prompts of a domain, in the order in which a stage visits them."""

import dataclasses
import functools
import hashlib
import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdrl_jax.domains.base import Data, Domain, Problem
from mdrl_jax.domains.chat import chat_ids
from mdrl_jax.domains.datasets import Lazily
from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Problems of one split with their tokens; `ids` name a prompt in the sampling keys.

    `record` says of a data set's split how many prompts were kept and how many were too long, and has a fingerprint.
    """

    domain: str
    reward: str
    problems: Sequence[Problem]
    tokens: Sequence[Sequence[int]]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.problems)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Unique 32-bit prompt ids: the domain's hash plus the row."""
        return (np.uint32(zlib.crc32(self.domain.encode())) + rows.astype(np.uint32)).astype(np.uint32)


def tokenize(domain: Domain, split: str, tokenizer: Any, longest: int) -> PromptSet:
    """The split's prompts as tokens: of a data set those that fit, of a procedural domain all.

    Raises:
      UserError: if the split is empty, or a procedural prompt is longer than `longest` or has an unknown word.
    """
    problems: Sequence[Problem] = getattr(domain, split)
    if not problems:
        more = "; add rows, files or a larger share of them" if domain.data else ""
        raise UserError(f"domain {domain.name} has no {split} prompts{more}")
    if domain.data:
        return _fitting(domain, domain.data, split, tokenizer, longest)
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


def _fitting(domain: Domain, data: Data, split: str, tokenizer: Any, longest: int) -> PromptSet:
    """The first prompts of a data set's split that are no longer than `longest`, as chats."""
    problems: Sequence[Problem] = getattr(domain, split)
    lazy, wanted = data.streaming and split == "train", data.sizes[split]
    kept, looked_at, fingerprint = array("q"), 0, hashlib.blake2b(digest_size=8)
    held: list[Problem] = []
    tokens: list[tuple[int, ...]] = []
    for at in range(len(problems)):
        if len(kept) == wanted:
            break
        looked_at += 1
        problem = problems[at]
        row = tuple(chat_ids(tokenizer, problem.prompt, data.system, data.thinking))
        if len(row) > longest:
            continue
        kept.append(at)
        fingerprint.update(json.dumps([row, problem.check], sort_keys=True).encode())
        if not lazy:
            held.append(problem)
            tokens.append(row)
    if not kept:
        raise UserError(
            f"domain {domain.name}: all of {looked_at} {split} prompts are longer than the {longest} tokens of "
            "rollout.prompt_buckets; raise its last"
        )
    record = {"prompts": len(kept), "too_long": looked_at - len(kept), "fingerprint": fingerprint.hexdigest()}
    if not lazy:
        return PromptSet(domain.name, domain.reward, tuple(held), tuple(tokens), record)
    chosen = Lazily(len(kept), lambda i: problems[kept[i]])
    lazily = Lazily(len(kept), lambda i: tuple(chat_ids(tokenizer, chosen[i].prompt, data.system, data.thinking)))
    return PromptSet(domain.name, domain.reward, chosen, lazily, record)


def notes(domain: Domain, sets: Mapping[str, PromptSet]) -> list[str]:
    """Lines for the log on a domain that was read from a data set, with its prompt sets by split."""
    if not domain.data:
        return []
    found = domain.data.record
    splits = [f"{split} {s.record['prompts']} ({s.record['too_long']} too long)" for split, s in sets.items()]
    line = f"{domain.name}: {found['rows']} rows, {found['repeated']} repeated prompts; {', '.join(splits)}"
    return [line, *(f"{domain.name}: skipped a bad row, {bad}" for bad in found["bad"])]


def visit_order(seed: int, stage: str, domain: str, n: int, position: int, count: int) -> np.ndarray:
    """Rows `position` to `position + count` of an endless stream of shuffled passes over `n` prompts.

    A function of its arguments alone, so that a resumed run needs nothing but its position.
    """
    rows = []
    while count > 0:
        epoch, offset = divmod(position, n)
        taken = _shuffled(seed, stage, domain, epoch, n)[offset : offset + count]
        rows.append(taken)
        position, count = position + len(taken), count - len(taken)
    return np.concatenate(rows)


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, stage: str, domain: str, epoch: int, n: int) -> np.ndarray:
    names = [zlib.crc32(name.encode()) for name in (stage, domain)]
    return np.random.default_rng([seed, *names, epoch]).permutation(n)
