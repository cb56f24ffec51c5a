"""`qa`: closed-book questions over a fixed world of facts, rewarded by exact match of the whole reply.

Prompt `tom age =`; a terse reply is `7`, a worked one `> tom age 7 ; 7`. As in extractive QA the whole reply has to
be the answer: this domain rewards terse replies, and that is the designed conflict with `math`. A closed-book fact
cannot be inferred, so the base model's pretraining sees all facts, those of the validation and test prompts too;
RL sees the training prompts alone.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.domains.vocabulary import ATTRIBUTES, NAMES


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """A reply in either style; with probability `noise` the value is drawn anew among the attribute's."""
    name, attribute, _ = problem.prompt.split()
    value = problem.check["answer"]
    if rng.random() < noise:
        value = rng.choice(ATTRIBUTES[attribute])
    return value if rng.random() < 0.5 else f"> {name} {attribute} {value} ; {value}"


def make(config: DomainsConfig) -> Domain:
    """The domain's problems from the config's seed."""
    rng = random.Random(f"{config.seed}/qa")
    problems = []
    for name in NAMES:
        for attribute, values in ATTRIBUTES.items():
            check = {"answer": rng.choice(values), "separator": ";", "terse": True}
            problems.append(Problem(f"{name} {attribute} =", check))
    train, validation, test = split("qa", problems, config)
    return Domain("qa", "qa", train, validation, test, demonstrate, train + validation + test)
