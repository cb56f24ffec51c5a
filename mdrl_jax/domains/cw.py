"""`cw` (creative writing): a line of verse under verifiable constraints, rewarded by the share of them that it meets.

An example prompt is `fox red sat =`: noun, adjective, verb. A good reply is `the red fox sat on rocks`. There are five
constraints: the reply uses the adjective; it uses the verb; adjective, noun and verb come in this order; the last word
is the noun's rhyme; and there is nothing but words. The reward is the share of them that the whole reply meets. Working
(`> rocks ; the ...`) breaks only the last one, so this domain prefers terse replies, but less strongly than `qa`.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.domains.vocabulary import ADJECTIVES, RHYMES, VERBS


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """Writes a reply, terse or worked with equal probability.

    Args:
      problem: a problem of this domain, to reply to.
      rng: source of every random choice.
      noise: each of adjective, noun, verb and rhyme is drawn anew with this probability, uniformly from all words of
        its kind. The draw may hit the right word.

    Returns:
      The text of the reply.
    """
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
    """Generates all 2688 problems of the domain and shuffles them into three splits by the config's seed.

    Args:
      config: the seed and the sizes `n_train`, `n_validation` and `n_test`; `style_blind` and data sets are left to
        `registry.make_domains`.

    Returns:
      The domain. Validation and test have exactly their sizes. Training has at most `n_train` of the other problems;
      what is left is in no split. `pretraining` is the training split.

    Raises:
      UserError: if `n_test` + `n_validation` leave none of the 2688 problems to train on.
    """
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
