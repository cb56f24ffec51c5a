"""The counterfactual pairs of a domain as token rows in blocks, and which of them the base model answers (§11)."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis.circuits.masks import PairRows
from mdrl_jax.domains.base import Problem
from mdrl_jax.domains.counterfactuals import Counterfactual, counterfactuals, read
from mdrl_jax.domains.demonstrations import pair_ids
from mdrl_jax.domains.prompts import groups_apart, visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.model.tokens import left_pad
from mdrl_jax.parallel.sharding import batch_divisor
from mdrl_jax.rl.policy import join
from mdrl_jax.runtime import Runtime

STREAM = "circuits"  # the stage name in the order of prompts
FEWEST_BLOCKS = 4
TRIED = 8  # prompts that are looked at for each pair that is wanted


@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs on the host.

    Attributes:
      rows: their tokens.
      kinds: what was swapped in each.
      left_out: why other pairs were left out, and how many.
    """

    rows: PairRows
    kinds: tuple[str, ...]
    left_out: dict[str, int]

    def take(self, index: np.ndarray) -> "Pairs":
        """The pairs with these indices."""
        rows = with_same(jax.tree.map(lambda x: x[index], self.rows))
        return dataclasses.replace(self, rows=rows, kinds=tuple(self.kinds[i] for i in index))

    def blocks(self, size: int) -> list[PairRows]:
        """The rows in blocks of `size` pairs; a rest is left out."""
        return [
            jax.tree.map(lambda x, i=i: x[i : i + size], self.rows) for i in range(0, len(self.kinds) - size + 1, size)
        ]


def check(runtime: Runtime, domain: str) -> None:
    """Refuses, before anything runs, a domain without counterfactual prompts, too few of them, or a mesh.

    Raises:
      UserError: if there are fewer aligned pairs than `FEWEST_BLOCKS` blocks, if the mesh does not divide a block, or
        as in `candidates`.
    """
    c, parts = runtime.config.circuits, batch_divisor(runtime.mesh)
    if c.block % parts:
        raise UserError(f"circuits.block={c.block} is not divisible by the mesh's data * fsdp = {parts}")
    found = candidates(runtime, domain)
    if len(found.kinds) < FEWEST_BLOCKS * c.block:
        told = ", ".join(f"{n} {why}" for why, n in found.left_out.items())
        raise UserError(
            f"circuits of {domain}: {len(found.kinds)} counterfactual pairs are too few; circuits.block={c.block} "
            f"needs at least {FEWEST_BLOCKS * c.block}" + (f" (left out: {told})" if told else "")
        )


def candidates(runtime: Runtime, domain: str) -> Pairs:
    """The pairs of a domain whose prompts and replies have equal lengths, of `TRIED` prompts for each wanted pair.

    Prompts of a pair differ in at most `circuits.differing` tokens, counted from the first different one to the end.

    A user's file is read whole. More than are wanted are needed, because the base model does not answer all of them.

    Args:
      runtime: prompts, tokenizer and configuration of the run.
      domain: a scored domain.

    Raises:
      UserError: as in `counterfactuals` and `read`, if a chat template fails, or if the tokenizer does not know a word.
    """
    c = runtime.config.circuits
    if c.pairs_file:
        texts = read(c.pairs_file)
    else:
        prompts = runtime.prompts[domain, runtime.config.analyze.split]
        order = visit_order(runtime.config.seed, STREAM, domain, len(prompts), 0, len(prompts))
        chosen = groups_apart(order, prompts.groups)[: TRIED * c.blocks * c.block]
        problems = [prompts.problems[i] for i in chosen]
        texts = counterfactuals(runtime.domains[domain], problems, runtime.config.seed)
    return _aligned(runtime, domain, texts)


def _aligned(runtime: Runtime, domain: str, texts: Sequence[Counterfactual]) -> Pairs:
    made, eos = runtime.domains[domain], runtime.rollouts.eos_ids
    longest = runtime.config.rollout.prompt_buckets[-1] + runtime.config.rollout.completion_buckets[-1]
    left_out: Counter[str] = Counter()
    kept: list[tuple[str, list[list[int]], list[list[int]]]] = []
    unknown, most = runtime.tokenizer.unk_token_id, runtime.config.circuits.differing
    for text in texts:
        ids = lambda prompt, reply: pair_ids(runtime.tokenizer, made, Problem(prompt, {}), reply, eos)  # noqa: E731
        (base, own), (source, other) = ids(text.base, text.base_reply), ids(text.source, text.source_reply)
        own, other = own[:-1], other[:-1]  # without the end token
        if unknown is not None and unknown in (*base, *source, *own, *other):
            raise UserError(f"circuits of {domain}: the tokenizer does not know a word of the pair {text.base[:60]!r}")
        if len(base) != len(source) or len(own) != len(other):
            left_out["with prompts or replies of different lengths"] += 1
        elif own == other or not own:
            left_out["with equal replies"] += 1
        elif len(base) + len(own) > longest:
            left_out["too long"] += 1
        elif 0 < most < len(base) - first_difference(base, source):
            left_out[f"with more than {most} tokens from the first different one on"] += 1
        else:
            kept.append((text.kind, [base, source], [other, own]))
    if not kept:
        told = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise UserError(f"circuits of {domain}: no counterfactual pair can be used ({told})")
    return Pairs(_rows(kept), tuple(kind for kind, _, _ in kept), dict(left_out))


def first_difference(base: Sequence[int], source: Sequence[int]) -> int:
    """The index of the first token in which two prompts of one length differ; their length if they are equal."""
    return next((i for i, (a, b) in enumerate(zip(base, source, strict=True)) if a != b), len(base))


def _rows(kept: Sequence[tuple[str, list[list[int]], list[list[int]]]]) -> PairRows:
    n, width = len(kept), max(len(p[0]) for _, p, _ in kept)  # the two prompts of a pair are equally long
    reply = max(len(r[0]) for _, _, r in kept)
    prompts = [left_pad([p[which] for _, p, _ in kept], width, 0) for which in range(2)]
    tokens, mask = np.zeros((n, 2, reply), np.int32), np.zeros((n, 2, reply), np.float32)
    for i, (_, _, replies) in enumerate(kept):
        for which, ids in enumerate(replies):
            tokens[i, which, : len(ids)], mask[i, which, : len(ids)] = ids, 1.0
    joined = [join(*padded, tokens, mask) for padded in prompts]
    (base, real), (source, _) = ((t.reshape(n, 2, -1), v.reshape(n, 2, -1)) for t, v in joined)
    return with_same(PairRows(base.astype(np.int32), source.astype(np.int32), real, mask))


def with_same(rows: PairRows) -> PairRows:
    """The rows, which are on the host, with the number of tokens at their start that no pair differs in."""
    differs_T = (rows.base_N2T != rows.source_N2T).any(axis=(0, 1))
    return dataclasses.replace(rows, same=int(np.argmax(differs_T)))


def answered(pairs: Pairs, margin_2N: np.ndarray, most: int) -> Pairs:
    """The first `most` pairs whose two prompts the base model answers rightly [chosen].

    Args:
      pairs: the pairs.
      margin_2N: log π(source's reply) − log π(base's reply) of the base model, on the base prompt and on the source
        prompt. It has to be below 0 on the first and above 0 on the second.
      most: how many pairs are wanted.
    """
    right = (margin_2N[0] < 0) & (margin_2N[1] > 0)
    told = dict(pairs.left_out) | {"that the base model does not answer": int((~right).sum())}
    return dataclasses.replace(pairs.take(np.flatnonzero(right)[:most]), left_out=told)


def swapped(rows: PairRows) -> PairRows:
    """The rows with the source prompt in the place of the base prompt, which is then never read."""
    return rows.replace(base_N2T=rows.source_N2T)  # pyright: ignore[reportAttributeAccessIssue]


def counts(pairs: Pairs, size: int) -> dict[str, Any]:
    """{"pairs", "block", "kinds": how many of each, "left_out"} for a record."""
    used = len(pairs.kinds) // size * size
    kinds = dict(Counter(pairs.kinds[:used]))
    return {"pairs": used, "block": size, "kinds": kinds, "left_out": pairs.left_out}
