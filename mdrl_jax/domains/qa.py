"""`qa`: closed-book questions about a fixed world of facts, rewarded by exact match of the whole reply.

An example prompt is `tom age =`. A terse reply is `7`. A worked reply is `> tom age 7 ; 7`. As in extractive QA, the
whole reply has to be the answer. This domain therefore rewards terse replies, which is the designed conflict with
`math`. A closed-book fact cannot be inferred, so the pretraining of a base model sees all facts, including those of the
validation and test prompts. RL sees the training prompts only.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.domains.vocabulary import ATTRIBUTES, NAMES


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """Writes a reply, terse or worked with equal probability.

    Args:
      problem: a problem of this domain, to reply to.
      rng: source of every random choice.
      noise: probability that the answer is drawn anew, uniformly from the attribute's values. The draw may hit the
        right value.

    Returns:
      The text of the reply.
    """
    name, attribute, _ = problem.prompt.split()
    value = problem.check["answer"]
    if rng.random() < noise:
        value = rng.choice(ATTRIBUTES[attribute])
    return value if rng.random() < 0.5 else f"> {name} {attribute} {value} ; {value}"


def make(config: DomainsConfig) -> Domain:
    """Draws the facts of the world from the config's seed and splits the 730 questions about them by it.

    Args:
      config: the seed and the sizes of the splits; `style_blind` and data sets are left to `registry.make_domains`.

    Returns:
      The domain. Validation and test have exactly their sizes. Training has at most `n_train` of the other problems;
      what is left is in no split. `pretraining` holds the problems of all three splits (see the module).

    Raises:
      UserError: if `n_test` + `n_validation` leave none of the 730 questions to train on.
    """
    rng = random.Random(f"{config.seed}/qa")
    problems = []
    for name in NAMES:
        for attribute, values in ATTRIBUTES.items():
            check = {"answer": rng.choice(values), "separator": ";", "terse": True}
            problems.append(Problem(f"{name} {attribute} =", check))
    train, validation, test = split("qa", problems, config)
    return Domain("qa", "qa", train, validation, test, demonstrate, train + validation + test)
