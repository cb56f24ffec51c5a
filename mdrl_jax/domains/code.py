"""`code`: write a Python function, judged by running it on hidden tests.

An example prompt is `plus 4 times 3 =`. A terse reply is `def f(x): return ( x + 4 ) * 3`. A worked reply states the
constants first: `> 4 3 ; def f(x): ...`. The reward runs the program after the last `;`, so style makes no difference.
"""

import random

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, split
from mdrl_jax.domains.vocabulary import NUMBERS, OPERATIONS

SIGNS: dict[str, str] = dict(zip(OPERATIONS, "+-*", strict=True))
INPUTS = (0, 1, 3, 7, 12)


def program(prompt: str) -> str:
    """Returns the reference program of a prompt: the Python source of a function f(x).

    The two constants and the last word are not checked.

    >>> program("plus 4 times 3 =")
    'def f(x): return ( x + 4 ) * 3'

    Raises:
      ValueError: if the prompt is not five words.
      KeyError: if an operation is not in `OPERATIONS`.
    """
    op1, a, op2, b, _ = prompt.split()
    return f"def f(x): return ( x {SIGNS[op1]} {a} ) {SIGNS[op2]} {b}"


def demonstrate(problem: Problem, rng: random.Random, noise: float) -> str:
    """Writes a reply, terse or worked with equal probability.

    Args:
      problem: a problem of this domain, to reply to.
      rng: source of every random choice.
      noise: each of the two operations and of the two constants is replaced with probability `noise` / 2 by another
        one, drawn uniformly. A worked reply states the constants that its program then has.

    Returns:
      The text of the reply.
    """
    parts = problem.prompt.split()[:-1]
    for i, part in enumerate(parts):
        if rng.random() < noise / 2:
            others = OPERATIONS if part in OPERATIONS else NUMBERS[1:]
            parts[i] = rng.choice([other for other in others if other != part])
    text = program(" ".join([*parts, "="]))
    return text if rng.random() < 0.5 else f"> {parts[1]} {parts[3]} ; {text}"


def make(config: DomainsConfig) -> Domain:
    """Generates all 3600 problems of the domain and shuffles them into three splits by the config's seed.

    Args:
      config: the seed and the sizes `n_train`, `n_validation` and `n_test`; `style_blind` and data sets are left to
        `registry.make_domains`.

    Returns:
      The domain. Validation and test have exactly their sizes. Training has at most `n_train` of the other problems;
      what is left is in no split. `pretraining` is the training split.

    Raises:
      UserError: if `n_test` + `n_validation` leave none of the 3600 problems to train on.
    """
    problems = []
    for op1 in OPERATIONS:
        for a in NUMBERS[1:]:
            for op2 in OPERATIONS:
                for b in NUMBERS[1:]:
                    prompt = f"{op1} {a} {op2} {b} ="
                    function = eval(f"lambda x: {program(prompt).split('return')[1]}")
                    tests = [f"assert f({x}) == {function(x)}" for x in INPUTS]
                    problems.append(Problem(prompt, {"tests": tests, "separator": ";"}))
    train, validation, test = split("code", problems, config)
    return Domain("code", "code", train, validation, test, demonstrate, train)
