"""`cw`: a line of verse under verifiable constraints, rewarded by the share of them met.

Prompt `fox red sat =` (noun, adjective, verb); a reply such as `the red fox sat on rocks` has to use adjective and
verb, put adjective before noun before verb, end on the noun's rhyme and hold nothing but words. The reward is the mean
over these five constraints of the whole reply. Working (`> rocks ; the ...`) breaks only the last of them: this domain
prefers terse replies, less strongly than `qa`.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.domains.vocabulary import ADJECTIVES, RHYMES, VERBS


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """A reply in either style; each of the four content words is drawn anew with probability `noise`."""
    noun, adjective, verb, _ = problem.prompt.split()
    rhyme = RHYMES[noun]

    def slip(word: str, others: tuple[str, ...]) -> str:
        return rng.choice(others) if rng.random() < noise else word

    adjective = slip(adjective, ADJECTIVES)
    noun = slip(noun, tuple(RHYMES))
    verb = slip(verb, VERBS)
    rhyme = slip(rhyme, tuple(RHYMES.values()))
    line = f"the {adjective} {noun} {verb} on {rhyme}"
    return line if rng.random() < 0.5 else f"> {rhyme} ; {line}"


def make(config: DomainsConfig) -> Domain:
    """The domain's problems from the config's seed."""
    problems = []
    for noun, rhyme in RHYMES.items():
        for adjective in ADJECTIVES:
            for verb in VERBS:
                constraints = [
                    {"kind": "include", "word": adjective},
                    {"kind": "include", "word": verb},
                    {"kind": "order", "words": [adjective, noun, verb]},
                    {"kind": "ends_with", "word": rhyme},
                    {"kind": "plain"},
                ]
                check = {"constraints": constraints, "separator": ";", "terse": True}
                problems.append(Problem(f"{noun} {adjective} {verb} =", check))
    train, validation, test = split("cw", problems, config)
    return Domain("cw", "cw", train, validation, test, demonstrate, train)
