"""The replies that supervised stages train on: which rows of a domain have one, and the tokens of a row.

A procedural domain writes a reply each time one is drawn. A data set's row has the reply that the template
`SourceConfig.reply` makes of it. `stages/sft.py` draws the rows.
"""

import dataclasses
import hashlib
import json
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.domains.base import Domain, Problem
from mdrl_jax.domains.chat import chat_text
from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """The rows of one domain that a supervised stage draws from.

    Attributes:
      domain: the domain; it has `demonstrate`.
      problems: the problems, of which `rows` are indices.
      rows: those that may be drawn, at least one.
      record: of a data set, the numbers of "prompts", of those "without_reply" and of those "too_long", the limit
        "length" in tokens, and a "fingerprint" of the rows that are left. Empty for a procedural domain, which leaves
        out nothing.
    """

    domain: Domain
    problems: Sequence[Problem]
    rows: Sequence[int]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def draw(
        self, rng: random.Random, noise: float, tokenizer: Any, eos_ids: tuple[int, ...]
    ) -> tuple[list[int], list[int]]:
        """Draws a row, every row with the same probability, and its reply.

        Args:
          rng: source of every random choice.
          noise: probability that the reply of a procedural domain is wrong.
          tokenizer: a `transformers` tokenizer.
          eos_ids: as in `pair_ids`.

        Returns:
          The token ids of the prompt, and those of the reply, as in `pair_ids`.

        Raises:
          UserError: if the file of a streamed data set was changed since it was indexed.
        """
        assert self.domain.demonstrate is not None, "`demonstrations` refuses a domain without replies"
        problem = self.problems[rng.choice(self.rows)]
        return pair_ids(tokenizer, self.domain, problem, self.domain.demonstrate(problem, rng, noise), eos_ids)

    def note(self) -> str:
        """One line about the rows that are left out; "" for a procedural domain."""
        if not self.record:
            return ""
        of = self.record["prompts"]
        return (
            f"{self.domain.name}: {len(self.rows)} of {of} training prompts have a demonstration of at most "
            f"{self.record['length']} tokens; left out {self.record['too_long']} too long, "
            f"{self.record['without_reply']} without a reply"
        )


def demonstrations(
    domain: Domain, problems: Sequence[Problem], tokenizer: Any, eos_ids: tuple[int, ...], longest: int
) -> Demonstrations:
    """Selects the rows of a domain that can be trained on. Each row of a data set is read and tokenized once.

    Args:
      domain: the domain.
      problems: its problems to draw from, at least one.
      tokenizer: a `transformers` tokenizer.
      eos_ids: as in `pair_ids`.
      longest: the largest length of prompt and reply together, in tokens; a row of just this length fits. It is not
        read for a procedural domain.

    Returns:
      The rows of a data set that have a reply and fit, or all problems of a procedural domain.

    Raises:
      UserError: if the domain has no replies, no row of a data set has one, or all of them are too long; if the chat
        template fails or does not know `enable_thinking`; or if a data file was changed so that a row can no longer be
        used.
    """
    if domain.demonstrate is None:
        field = f"set domains.{domain.name}.reply to a template of the reply, such as '{{answer}}'"
        raise UserError(
            f"domain {domain.name} has no replies to train on; {field if domain.data else 'give it `demonstrate`'}"
        )
    if domain.data is None:
        return Demonstrations(domain, problems, range(len(problems)))
    kept, too_long, fingerprint = array("q"), 0, hashlib.blake2b(digest_size=8)
    without = 0
    for row, problem in enumerate(problems):
        if not problem.reply:
            without += 1
            continue
        prompt, reply = pair_ids(tokenizer, domain, problem, problem.reply, eos_ids)
        if len(prompt) + len(reply) > longest:
            too_long += 1
            continue
        kept.append(row)
        fingerprint.update(json.dumps([prompt, reply]).encode())
    if without == len(problems):
        raise UserError(f"domains.{domain.name}.reply: none of the {without} training rows has all of its fields")
    if not kept:
        raise UserError(
            f"all of {too_long} demonstrations of {domain.name} are longer than sft.length={longest} tokens; raise it"
        )
    counts = {"prompts": len(problems), "without_reply": without, "too_long": too_long, "length": longest}
    return Demonstrations(domain, problems, kept, counts | {"fingerprint": fingerprint.hexdigest()})


def pair_ids(
    tokenizer: Any, domain: Domain, problem: Problem, reply: str, eos_ids: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Tokenizes a prompt as `prompts.tokenize` does, and the reply as the model would write it after this prompt.

    The reply of a chat is what the chat template writes between the generation prompt and the end of the assistant's
    turn, e.g. also the end of an empty thinking block. If the template does not continue its generation prompt, it is
    the bare reply. Without a template, and in a procedural domain, the reply follows after a space. White space at its
    end is dropped, except from a bare reply.

    Args:
      tokenizer: a `transformers` tokenizer.
      domain: the domain; it says whether prompts are chats.
      problem: the problem; its prompt is read.
      reply: the text of the reply.
      eos_ids: from `model.tokens.eos_ids`, at least one. The last id ends the turn of a chat with a template; the first
        one ends any other reply.

    Returns:
      The token ids of the prompt, and those of the reply with the end token as the last one. They are the tokens of the
      whole text, if these begin with the tokens of the prompt; otherwise both parts are tokenized on their own.

    Raises:
      UserError: as in `chat.chat_text`.
    """
    if data := domain.data:
        start, whole = (
            chat_text(tokenizer, problem.prompt, data.system, data.thinking, r, data.date) for r in (None, reply)
        )
    else:
        start, whole = problem.prompt, f"{problem.prompt} {reply}"
    chat = bool(data and tokenizer.chat_template)
    continues = whole.startswith(start)
    whole = whole.rstrip()
    prompt, ids = tokenizer([start, whole], add_special_tokens=not chat).input_ids
    if continues and ids[: len(prompt)] == prompt:
        ids = ids[len(prompt) :]
    else:
        ids = tokenizer(whole[len(start) :] if continues else reply, add_special_tokens=False).input_ids
    end = eos_ids[-1] if chat else eos_ids[0]
    if chat and end in ids:
        ids = ids[: len(ids) - ids[::-1].index(end)]
    else:
        ids = [*ids, end]
    return list(prompt), ids
