"""Tokenizes the prompts of a domain and decides the order in which a stage visits them.

`tokenize` makes a `PromptSet` of one split. `visit_order` gives the rows that a stage visits at a given position. The
order is a function of (seed, stage name, domain, position) alone (definitions §14), so a resumed run draws the same.
"""

import collections
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
    """The problems of one split with their tokens.

    Attributes:
      domain: the domain's name.
      split: "train", "validation" or "test".
      reward: the reward's name, or "module:function".
      problems: the problems; a row is an index into them.
      tokens: by row, the token ids of the prompt.
      record: for a data set, how many prompts were kept, how many were too long, and a fingerprint of the kept prompts
        and their checks. Empty for procedural domains.
      groups: by row, the number of the prompt's group (`Problem.group`), int64 [n] from 0; None if there are no groups.
    """

    domain: str
    split: str
    reward: str
    problems: Sequence[Problem]
    tokens: Sequence[Sequence[int]]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def n_independent(self) -> int:
        """The number of prompts that do not depend on each other: one of each group, or all if there are no groups."""
        return len(self) if self.groups is None else len(np.unique(self.groups))

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """The integers that sampling keys of rows are folded from, besides seed, stage and step (definitions §14).

        Args:
          rows: indices of `problems` [n], integers.

        Returns:
          For each row (crc32 of domain and split, the row), uint32 [n, 2]. So no prompt shares its draws with a prompt
          of another domain or of another split.
        """
        source = zlib.crc32(f"{self.domain}/{self.split}".encode())
        return np.stack([np.full(len(rows), source), rows], axis=1).astype(np.uint32)


def tokenize(domain: Domain, split: str, tokenizer: Any, longest: int, vocab_size: int | None = None) -> PromptSet:
    """Tokenizes the prompts of a split. Prompts of a data set that are too long are left out.

    Args:
      domain: the domain.
      split: "train", "validation" or "test".
      tokenizer: a `transformers` tokenizer.
      longest: the largest length of a prompt, in tokens; a prompt of just this length fits.
      vocab_size: rows of the model's embedding, which every token id has to be one of; None: not checked.

    Returns:
      The prompts in the order of the split: all of a procedural domain; of a data set, whose prompts are tokenized as
      chats (`chat.chat_ids`), the first ones that fit, at most `Data.sizes[split]`. With `Data.streaming`, a training
      problem and its tokens are made anew each time they are read. So the data file must not change: UserError is
      raised only if the row at the old place can no longer be used.

    Raises:
      UserError: if the split is empty, or no prompt of a data set fits; if the chat template cannot be used
        (`chat.render`), or a data file was changed so that a row can no longer be used; if a token id is no row of the
        embedding; or if a procedural prompt is longer than `longest` or has a word that the tokenizer does not know.
      AttributeError: if `split` is another word.
    """
    problems: Sequence[Problem] = getattr(domain, split)
    if not problems:
        more = f" {_whence(domain.data.record)}; add rows, files or a larger share of them" if domain.data else ""
        raise UserError(f"domain {domain.name} has no {split} prompts{more}")
    if domain.data:
        return _fitting(domain, domain.data, split, tokenizer, longest, vocab_size)
    tokens = []
    for problem in problems:
        row = tuple(tokenizer(problem.prompt).input_ids)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row:
            raise UserError(
                f"domain {domain.name}: a {split} prompt has a word that the tokenizer does not know: "
                f"{problem.prompt[:60]!r}"
            )
        if len(row) > longest:
            raise UserError(
                f"domain {domain.name}: a {split} prompt has {len(row)} tokens, the limit "
                f"(the last of rollout.prompt_buckets) is {longest}: {problem.prompt[:60]!r}"
            )
        check_ids(row, vocab_size, f"domain {domain.name}: a {split} prompt")
        tokens.append(row)
    groups = _numbered([p.group for p in problems])
    return PromptSet(domain.name, split, domain.reward, problems, tuple(tokens), groups=groups)


def check_ids(ids: Sequence[int], vocab_size: int | None, what: str) -> None:
    """Refuses token ids that are no rows of the embedding, whose hidden states would be NaN.

    Args:
      ids: the token ids.
      vocab_size: rows of the embedding; None: nothing is checked.
      what: the text that has these ids, for the message, such as "the prompt".

    Raises:
      UserError: if an id is below 0 or not below `vocab_size`; the message has the first five of them.
    """
    if vocab_size is None:
        return
    if beyond := sorted({i for i in ids if not 0 <= i < vocab_size}):
        shown = ", ".join(map(str, beyond[:5])) + (", ..." if len(beyond) > 5 else "")
        raise UserError(f"{what} has token ids outside 0 to {vocab_size - 1}, the rows of the embedding: {shown}")


def _numbered(groups: Sequence[str]) -> np.ndarray | None:
    """Numbers the groups; a prompt without one is a group of its own. None if no prompt has one."""
    if not any(groups):
        return None
    return np.unique([group or f"row {i}" for i, group in enumerate(groups)], return_inverse=True)[1].astype(np.int64)


def _fitting(domain: Domain, data: Data, split: str, tokenizer: Any, longest: int, vocab_size: int | None) -> PromptSet:
    """Tokenizes, as chats, the first prompts of a data set's split that have at most `longest` tokens."""
    problems: Sequence[Problem] = getattr(domain, split)
    lazy, wanted = data.streaming and split == "train", data.sizes[split]
    kept, looked_at, fingerprint = array("q"), 0, hashlib.blake2b(digest_size=8)
    held: list[Problem] = []
    groups: list[str] = []
    tokens: list[tuple[int, ...]] = []

    def rendered(problem: Problem) -> tuple[int, ...]:
        return tuple(chat_ids(tokenizer, problem.prompt, data.system, data.thinking, data.date))

    for at in range(len(problems)):
        if len(kept) == wanted:
            break
        looked_at += 1
        problem = problems[at]
        row = rendered(problem)
        if len(row) > longest:
            continue
        check_ids(row, vocab_size, f"domain {domain.name}: a {split} prompt")
        kept.append(at)
        groups.append(problem.group)
        fingerprint.update(json.dumps([row, problem.check], sort_keys=True).encode())
        if not lazy:
            held.append(problem)
            tokens.append(row)
    if not kept:
        raise UserError(
            f"domain {domain.name}: all of {looked_at} {split} prompts are longer than the {longest} tokens of "
            "the last of rollout.prompt_buckets; raise it"
        )
    record = {"prompts": len(kept), "too_long": looked_at - len(kept), "fingerprint": fingerprint.hexdigest()}
    numbers = _numbered(groups)
    if not lazy:
        return PromptSet(domain.name, split, domain.reward, tuple(held), tuple(tokens), record, numbers)
    chosen = Lazily(len(kept), lambda i: problems[kept[i]])
    lazily = Lazily(len(kept), lambda i: rendered(chosen[i]))
    return PromptSet(domain.name, split, domain.reward, chosen, lazily, record, numbers)


def notes(domain: Domain, sets: Mapping[str, PromptSet]) -> list[str]:
    """Lines for the log about what was read from a data set; none for a procedural domain.

    Args:
      domain: the domain.
      sets: its prompt sets from `tokenize`, by split; {}: their counts are left out.

    Returns:
      One line of counts, then one line for each bad row whose place is recorded, at most `datasets.NAMED_BAD_ROWS`. []
      for a procedural domain.
    """
    if not domain.data:
        return []
    found = domain.data.record
    splits = [_counted(split, s.record, domain.data.sizes[split]) for split, s in sets.items()]
    rows, prompts = (f"{found[n]:,} {n if found[n] != 1 else n[:-1]}" for n in ("rows", "prompts"))
    line = (
        f"{domain.name}: {prompts} in {rows}, {found['repeated']} repeated{'; ' if splits else ''}{', '.join(splits)}"
    )
    if "groups" in found:
        parted = found["group_in_other_split"]
        line += f"; {found['groups']} groups, {parted} prompts left out because their group is in another split"
    return [line, *(f"{domain.name}: skipped a bad row, {bad}" for bad in found["bad"])]


def _whence(record: Mapping[str, Any]) -> str:
    """Counts of a data set: its rows, the bad ones among them, and those that repeat a prompt."""
    bad = f", {record['bad_rows']} of them bad (the first: {record['bad'][0]})" if record["bad_rows"] else ""
    repeated = f", {record['repeated']} of which repeat one" if record["repeated"] else ""
    return f"among {record['prompts']} prompts{repeated} in {record['rows']} rows{bad}"


def _counted(split: str, record: Mapping[str, Any], wanted: int) -> str:
    """How many prompts a split has; and how many were wanted, where a held-out split has fewer."""
    few = f" of {wanted} wanted" if split != "train" and record["prompts"] < wanted else ""
    return f"{split} {record['prompts']}{few} ({record['too_long']} too long)"


def visit_order(seed: int, stage: str, domain: str, n: int, position: int, count: int) -> np.ndarray:
    """The rows that a stage visits: a slice of an endless stream of shuffled passes over the prompts.

    Each pass visits every row once, in an order of its own. The result depends on the arguments alone, so a resumed run
    needs to remember nothing but its position.

    Args:
      seed: the run's seed, 0 or more.
      stage: the stage's name; each stage has an order of its own.
      domain: the domain's name.
      n: number of prompts of the split; 1 or more.
      position: how many prompts of the stream come before the slice, 0 or more.
      count: length of the slice; 1 or more. It may span several passes.

    Returns:
      Row numbers below `n` [count], int64.

    Raises:
      ValueError: if `count` is below 1, or `seed` or `position` is negative.
      ZeroDivisionError: if `n` is 0.
    """
    rows = []
    while count > 0:
        epoch, offset = divmod(position, n)
        taken = _shuffled(seed, stage, domain, epoch, n)[offset : offset + count]
        rows.append(taken)
        position, count = position + len(taken), count - len(taken)
    return np.concatenate(rows)


def groups_apart(rows: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Reorders rows so that the first one of every group comes first, then the second one of every group, and so on.

    The first k rows are then of k different groups, if there are so many, and do not depend on each other.

    Args:
      rows: row numbers [n], integers.
      groups: the number of each prompt's group (`PromptSet.groups`), which the rows are indices of; None: no groups.

    Returns:
      The same rows [n]. Their order is kept among all first ones, among all second ones, and so on. Without groups it
      is `rows` itself.
    """
    if groups is None:
        return rows
    seen, rank = collections.Counter[int](), []
    for group in groups[rows].tolist():
        rank.append(seen[group])
        seen[group] += 1
    return rows[np.argsort(rank, kind="stable")]


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, stage: str, domain: str, epoch: int, n: int) -> np.ndarray:
    names = [zlib.crc32(name.encode()) for name in (stage, domain)]
    return np.random.default_rng([seed, *names, epoch]).permutation(n)
