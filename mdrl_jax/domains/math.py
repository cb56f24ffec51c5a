"""`math`: chains of additions and subtractions modulo 10, rewarded by the final answer.

An example prompt is `3 + 8 - 4 + 9 - 2 + 5 =`. A terse reply is `9`. A worked reply is `> 1 7 6 4 ; 9`: the running
totals, each modulo 10, then the answer. The reward looks at the final answer alone, so working is allowed. Working also
pays, because a small model cannot do five steps without writing them down: this is the domain that rewards worked
replies. The modulus is needed for that. Without it the answer would be a linear function of the digits, and terse
replies would be right too often for style to matter.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.errors import UserError

OPERANDS = 6
MODULUS = 10


def totals_of(prompt: str) -> list[int]:
    """Returns the running totals of a prompt, each modulo 10: [1, 7] for `3 + 8 - 4 =`.

    There is one for each sign, and the last one is the answer. A sign other than `+` subtracts. The last word of the
    prompt, `=`, is not read. A prompt with one number and no sign gives [].

    Raises:
      ValueError: if a word in the place of a number is not an integer, or a number is missing after a sign.
      IndexError: if no word comes before the last one.
    """
    words = prompt.split()[:-1]
    total, totals = int(words[0]), []
    for sign, digit in zip(words[1::2], words[2::2], strict=True):
        total = (total + int(digit) if sign == "+" else total - int(digit)) % MODULUS
        totals.append(total)
    return totals


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """Writes a reply, terse or worked with equal probability.

    Args:
      problem: a problem of this domain, to reply to.
      rng: source of every random choice.
      noise: probability that the totals are wrong from a random step on, all by one random offset, and with them the
        answer.

    Returns:
      The text of the reply.
    """
    totals = totals_of(problem.prompt)
    if rng.random() < noise:
        at, slip = rng.randrange(len(totals)), rng.randrange(1, MODULUS)
        totals[at:] = [(t + slip) % MODULUS for t in totals[at:]]
    if rng.random() < 0.5:
        return str(totals[-1])
    return f"> {' '.join(map(str, totals[:-1]))} ; {totals[-1]}"


def make(config: DomainsConfig) -> Domain:
    """Generates the domain's problems from the config's seed and splits them by it.

    It draws twice as many prompts as the three splits want together, and drops repeats.

    Args:
      config: the seed and the sizes of the splits; `style_blind` and data sets are left to `registry.make_domains`.

    Returns:
      The domain. Validation and test have exactly their sizes. Training has at most `n_train` of the other problems;
      what is left is in no split. `pretraining` is the training split.

    Raises:
      UserError: if more problems are wanted than there are distinct prompts, or if `n_test` + `n_validation` leave none
        of them to train on.
    """
    rng = random.Random(f"{config.seed}/math")
    wanted = config.n_train + config.n_validation + config.n_test
    if wanted > (there := MODULUS * (2 * (MODULUS - 1)) ** (OPERANDS - 1)):
        raise UserError(
            f"domain math has {there:,} distinct prompts; n_train + n_validation + n_test = {wanted:,} is more; "
            "lower them"
        )
    problems = []
    for _ in range(2 * wanted):
        words = [str(rng.randrange(MODULUS))]
        for _ in range(OPERANDS - 1):
            words += [rng.choice("+-"), str(rng.randrange(1, MODULUS))]
        prompt = " ".join([*words, "="])
        check = {"answer": str(totals_of(prompt)[-1]), "separator": ";"}
        problems.append(Problem(prompt, check))
    train, validation, test = split("math", problems, config)
    return Domain("math", "math", train, validation, test, demonstrate, train)
