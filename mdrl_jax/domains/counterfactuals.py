"""Counterfactual prompts: a prompt and a source prompt that differs in one thing, so that the right reply differs.

A circuit is sought with such pairs (definitions §11): which attention heads have to see the source prompt for the model
to give the source's reply? A procedural domain has its own swaps (`SWAPS`), a multiple-choice question swaps two
options, and `read` reads the pairs of a user's file.

| kind | qa | math | code | cw | multiple choice |
|---|---|---|---|---|---|
| `entity` | the name | the first number | the first constant | the noun | |
| `task` | the attribute | the last sign | the second operation | the verb | |
| `answer` | | the last number | the second constant | the adjective | places of the right and a wrong option |
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdrl_jax import records
from mdrl_jax.domains import code, math
from mdrl_jax.domains.base import Domain, Problem
from mdrl_jax.domains.vocabulary import ADJECTIVES, ATTRIBUTES, NAMES, NUMBERS, OPERATIONS, RHYMES, VERBS
from mdrl_jax.errors import UserError

FIELDS = ("base", "source", "base_reply", "source_reply")


@dataclasses.dataclass(frozen=True)
class Counterfactual:
    """A pair of prompts with their right replies.

    Attributes:
      base: the prompt.
      source: the prompt that differs from it in one thing.
      base_reply, source_reply: the right replies, which differ.
      kind: what was swapped.
    """

    base: str
    source: str
    base_reply: str
    source_reply: str
    kind: str


def _other(rng: random.Random, word: str, words: Sequence[str]) -> str:
    return rng.choice([w for w in words if w != word])


def _code(problem: Problem, rng: random.Random, facts: Mapping[str, str]) -> Mapping[str, str]:
    op1, a, op2, b, end = problem.prompt.split()
    return {
        "entity": f"{op1} {_other(rng, a, NUMBERS[1:])} {op2} {b} {end}",
        "task": f"{op1} {a} {_other(rng, op2, OPERATIONS)} {b} {end}",
        "answer": f"{op1} {a} {op2} {_other(rng, b, NUMBERS[1:])} {end}",
    }


def _math(problem: Problem, rng: random.Random, facts: Mapping[str, str]) -> Mapping[str, str]:
    words = problem.prompt.split()

    def put(at: int, word: str) -> str:
        return " ".join([*words[:at], word, *words[at + 1 :]])

    def digit(at: int, least: int) -> str:
        return put(at, rng.choice([str(n) for n in range(least, math.MODULUS) if str(n) != words[at]]))

    return {
        "entity": digit(0, 0),
        "task": put(-3, "-" if words[-3] == "+" else "+"),
        "answer": digit(len(words) - 2, 1),
    }


def _qa(problem: Problem, rng: random.Random, facts: Mapping[str, str]) -> Mapping[str, str]:
    name, attribute, end = problem.prompt.split()
    people = [f"{other} {attribute} {end}" for other in NAMES if other != name]
    asked = [f"{name} {other} {end}" for other in ATTRIBUTES if other != attribute]
    differs = lambda prompts: [p for p in prompts if facts.get(p, facts[problem.prompt]) != facts[problem.prompt]]  # noqa: E731
    found = {"entity": differs(people), "task": differs(asked)}
    return {kind: rng.choice(prompts) for kind, prompts in found.items() if prompts}


def _cw(problem: Problem, rng: random.Random, facts: Mapping[str, str]) -> Mapping[str, str]:
    noun, adjective, verb, end = problem.prompt.split()
    return {
        "entity": f"{_other(rng, noun, tuple(RHYMES))} {adjective} {verb} {end}",
        "task": f"{noun} {adjective} {_other(rng, verb, VERBS)} {end}",
        "answer": f"{noun} {_other(rng, adjective, ADJECTIVES)} {verb} {end}",
    }


def _reply_math(prompt: str, facts: Mapping[str, str]) -> str:
    """The worked reply: a small model is seldom right without working."""
    totals = math.totals_of(prompt)
    return f"> {' '.join(map(str, totals[:-1]))} ; {totals[-1]}"


def _reply_cw(prompt: str, facts: Mapping[str, str]) -> str:
    noun, adjective, verb, _ = prompt.split()
    return f"the {adjective} {noun} {verb} on {RHYMES[noun]}"


Swap = Callable[[Problem, random.Random, Mapping[str, str]], Mapping[str, str]]
Reply = Callable[[str, Mapping[str, str]], str]
# Each procedural domain has two functions. The first maps (problem, rng, {prompt: answer} of the domain) to
# {kind: source prompt}; the second maps (prompt, the same answers) to the right reply.
SWAPS: dict[str, tuple[Swap, Reply]] = {
    "code": (_code, lambda prompt, facts: code.program(prompt)),
    "math": (_math, _reply_math),
    "qa": (_qa, lambda prompt, facts: facts[prompt]),
    "cw": (_cw, _reply_cw),
}


def swapped_options(problem: Problem, rng: random.Random) -> Counterfactual | None:
    """A multiple-choice question and itself with the right and a wrong option in each other's place.

    Args:
      problem: its check has the letter "answer" and "choices", the texts of the options from A on, as the layout
        `choices` makes them. Its prompt has the options as lines "A. ...".
      rng: chooses the wrong option.

    Returns:
      The pair, whose replies are the letters; None if the check or the prompt has another form.
    """
    letter, choices = problem.check.get("answer"), problem.check.get("choices")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not isinstance(letter, str) or len(letter) != 1:
        return None
    right = ord(letter) - ord("A")
    others = [i for i in range(len(choices)) if i != right]
    if not 0 <= right < len(choices) or not others:
        return None
    wrong = rng.choice(others)
    lines = [f"{chr(ord('A') + i)}. {choices[i]}" for i in (right, wrong)]
    if any(problem.prompt.count(line) != 1 for line in lines):
        return None
    swapped = [f"{chr(ord('A') + i)}. {choices[j]}" for i, j in ((right, wrong), (wrong, right))]
    source = problem.prompt.replace(lines[0], "\0").replace(lines[1], swapped[1]).replace("\0", swapped[0])
    return Counterfactual(problem.prompt, source, letter, chr(ord("A") + wrong), "answer")


def counterfactuals(domain: Domain, problems: Sequence[Problem], seed: int) -> list[Counterfactual]:
    """One pair for each problem, with the kinds of its swaps in turn.

    Args:
      domain: the domain. All its prompts are read, because a closed-book answer is not in the prompt.
      problems: the base prompts.
      seed: of the draws.

    Returns:
      The pairs, in the order of the problems. Problems without a counterfactual are left out.

    Raises:
      UserError: if the domain is neither procedural nor multiple choice.
    """
    found: list[Counterfactual] = []
    known = [] if domain.data else [*domain.train, *domain.validation, *domain.test, *domain.pretraining]
    facts = {p.prompt: str(p.check.get("answer", "")) for p in known}
    procedural = domain.name in SWAPS and not domain.data
    for i, problem in enumerate(problems):
        rng = random.Random(f"{seed}/{domain.name}/{problem.prompt}")
        if not procedural:
            pair = swapped_options(problem, rng)
            found += [pair] if pair else []
            continue
        swap, reply = SWAPS[domain.name]
        sources = swap(problem, rng, facts)
        kinds = [k for k, source in sources.items() if reply(source, facts) != reply(problem.prompt, facts)]
        if kinds:
            kind = kinds[i % len(kinds)]
            replies = (reply(problem.prompt, facts), reply(sources[kind], facts))
            found.append(Counterfactual(problem.prompt, sources[kind], *replies, kind))
    if problems and not found:
        raise UserError(
            f"domain {domain.name} has no counterfactual prompts: it is neither procedural nor a multiple-choice data "
            f"set; give them in a file with circuits.pairs_file, a JSON object a line with {', '.join(FIELDS)}"
        )
    return found


def read(path: str) -> list[Counterfactual]:
    """Reads a user's pairs.

    Args:
      path: a file with a JSON object a line: the texts `FIELDS`, and "kind" if wanted. Prompts and replies are rendered
        as those of the domain, with its chat template.

    Raises:
      UserError: if the file is missing, a line is no JSON object, a field is missing or no text, or two replies are
        equal; it names the line.
    """
    if not Path(path).is_file():
        raise UserError(f"circuits.pairs_file={path} is not a file; it must have a JSON object a line")
    found = []
    for number, row in enumerate(records.read_jsonl(path), 1):
        if not isinstance(row, Mapping):
            raise UserError(f"{path}, line {number}: {row!r} is no JSON object; it must have {', '.join(FIELDS)}")
        wrong = [f for f in FIELDS if not isinstance(row.get(f), str) or not row[f]]
        if wrong:
            raise UserError(f"{path}, line {number}: {', '.join(wrong)} is missing or no text")
        if row["base_reply"] == row["source_reply"]:
            raise UserError(f"{path}, line {number}: base_reply and source_reply are equal; they must differ")
        texts: dict[str, Any] = {f: row[f] for f in FIELDS}
        found.append(Counterfactual(**texts, kind=str(row.get("kind", "own"))))
    if not found:
        raise UserError(f"{path} has no pairs; it must have a JSON object a line with {', '.join(FIELDS)}")
    return found
