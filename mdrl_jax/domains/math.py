"""`math`: chains of additions and subtractions modulo 10, rewarded by the final answer.

Prompt `3 + 8 - 4 + 9 - 2 + 5 =`; a terse reply is `9`, a worked one `> 1 7 6 4 ; 9` (running totals, each modulo 10,
then the answer). The reward is for the final answer alone, so working is allowed, and because a small model cannot
carry five steps in its head it pays: this is the domain that rewards worked replies. (Without the modulus the answer is
a linear function of the digits, which a terse reply gets right too often for style to matter.)
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split

OPERANDS = 6
MODULUS = 10


def totals_of(prompt: str) -> list[int]:
    """Running totals of a prompt, modulo 10; the last is the answer."""
    words = prompt.split()[:-1]
    total, totals = int(words[0]), []
    for sign, digit in zip(words[1::2], words[2::2], strict=True):
        total = (total + int(digit) if sign == "+" else total - int(digit)) % MODULUS
        totals.append(total)
    return totals


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """A reply in either style; with probability `noise` the totals go wrong from some step on."""
    totals = totals_of(problem.prompt)
    if rng.random() < noise:
        at, slip = rng.randrange(len(totals)), rng.randrange(1, MODULUS)
        totals[at:] = [(t + slip) % MODULUS for t in totals[at:]]
    if rng.random() < 0.5:
        return str(totals[-1])
    return f"> {' '.join(map(str, totals[:-1]))} ; {totals[-1]}"


def make(config: DomainsConfig) -> Domain:
    """The domain's problems from the config's seed."""
    rng = random.Random(f"{config.seed}/math")
    wanted = 2 * (config.n_train + config.n_validation + config.n_test)
    problems = []
    for _ in range(wanted):
        words = [str(rng.randrange(MODULUS))]
        for _ in range(OPERANDS - 1):
            words += [rng.choice("+-"), str(rng.randrange(1, MODULUS))]
        prompt = " ".join([*words, "="])
        check = {"answer": str(totals_of(prompt)[-1]), "separator": ";"}
        problems.append(Problem(prompt, check))
    train, validation, test = split("math", problems, config)
    return Domain("math", "math", train, validation, test, demonstrate, train)
