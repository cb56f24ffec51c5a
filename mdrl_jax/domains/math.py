"""`math`: chains of additions and subtractions, rewarded by the final answer.

Prompt `3 + 8 - 4 + 9 - 2 =`; a terse reply is `14`, a worked one `> 11 7 16 ; 14` (running totals, then the
answer). The reward is for the final answer alone, so working is allowed, and because a small model cannot add five
numbers at once it pays: this is the domain that rewards worked replies. Totals stay within 0 to 20.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split

OPERANDS = 5
LARGEST = 20


def _chain(rng: random.Random) -> tuple[list[str], list[int]]:
    """A prompt's words and its running totals."""
    total = rng.randint(0, 9)
    words, totals = [str(total)], []
    for _ in range(OPERANDS - 1):
        choices = [("+", d) for d in range(1, 10) if total + d <= LARGEST]
        choices += [("-", d) for d in range(1, 10) if total - d >= 0]
        sign, digit = rng.choice(choices)
        total += digit if sign == "+" else -digit
        words += [sign, str(digit)]
        totals.append(total)
    return words, totals


def totals_of(prompt: str) -> list[int]:
    """Running totals of a prompt."""
    words = prompt.split()[:-1]
    total, totals = int(words[0]), []
    for sign, digit in zip(words[1::2], words[2::2], strict=True):
        total += int(digit) if sign == "+" else -int(digit)
        totals.append(total)
    return totals


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """A reply in either style; with probability `noise` a total goes wrong by one to three."""
    totals = totals_of(problem.prompt)
    if rng.random() < noise:
        at = rng.randrange(len(totals))
        slip = rng.choice((-3, -2, -1, 1, 2, 3))
        totals[at:] = [min(max(t + slip, 0), LARGEST) for t in totals[at:]]
    if rng.random() < 0.5:
        return str(totals[-1])
    return f"> {' '.join(map(str, totals[:-1]))} ; {totals[-1]}"


def make(config: DomainsConfig) -> Domain:
    """The domain's problems from the config's seed."""
    rng = random.Random(f"{config.seed}/math")
    wanted = 2 * (config.n_train + config.n_validation + config.n_test)
    problems = []
    for _ in range(wanted):
        words, totals = _chain(rng)
        check = {"answer": str(totals[-1]), "separator": ";"}
        problems.append(Problem(" ".join(words + ["="]), check))
    train, validation, test = split("math", problems, config)
    return Domain("math", "math", train, validation, test, demonstrate, train)
