r"""The math reward against replies judged by hand (`answers.py`), exact arithmetic, sympy and math-verify."""

import random
import re
from fractions import Fraction

import pytest

from mdrl_jax.rewards.math import final_answer
from tests.rewards.answers import EXAMPLES_RIGHT, EXAMPLES_WRONG, GOLDS, HOSTILE, RIGHT, WRONG, Pairs

WRONGS = [
    (f"{name}: {kind}", pairs)
    for name, table in (("bug reports", EXAMPLES_WRONG), ("hostile", HOSTILE), ("wrong", WRONG))
    for kind, pairs in table.items()
]
RIGHTS = [
    (f"{name}: {kind}", pairs)
    for name, table in (("bug reports", EXAMPLES_RIGHT), ("right", RIGHT))
    for kind, pairs in table.items()
]


@pytest.mark.parametrize("pairs", [pairs for _, pairs in WRONGS], ids=[kind for kind, _ in WRONGS])
def test_a_wrong_reply_earns_nothing(pairs: Pairs) -> None:
    assert [(reply, gold) for reply, gold in pairs if final_answer(reply, {"answer": gold}) != 0.0] == []


@pytest.mark.parametrize("pairs", [pairs for _, pairs in RIGHTS], ids=[kind for kind, _ in RIGHTS])
def test_a_right_reply_earns_all(pairs: Pairs) -> None:
    assert [(reply, gold) for reply, gold in pairs if final_answer(reply, {"answer": gold}) != 1.0] == []


def test_there_are_enough_different_replies() -> None:
    assert sum(map(len, HOSTILE.values())) >= 150 and sum(map(len, RIGHT.values())) >= 150
    assert len(set(GOLDS)) == len(GOLDS) >= 120
    wrong = [pair for table in (EXAMPLES_WRONG, HOSTILE, WRONG) for pairs in table.values() for pair in pairs]
    right = [pair for table in (EXAMPLES_RIGHT, RIGHT) for pairs in table.values() for pair in pairs]
    assert len(set(wrong + right)) == len(wrong) + len(right)


def broken(gold: str) -> str:
    """Another answer: the last digit is one more, or, without digits, the last word or letter has a letter more."""
    if digits := [match.start() for match in re.finditer("[0-9]", gold)]:
        last = digits[-1]
        return gold[:last] + str((int(gold[last]) + 1) % 10) + gold[last + 1 :]
    words = list(re.finditer(r"(?<![\\a-zA-Z])[a-zA-Z]+(?![a-zA-Z{])", gold))
    return gold[: words[-1].end()] + "q" + gold[words[-1].end() :] if words else gold + "+1"


def test_every_answer_equals_itself_and_no_broken_one() -> None:
    for gold in GOLDS:
        for reply in (rf"\boxed{{{gold}}}", f"The answer is ${gold}$.", f"so\n#### {gold}", gold):
            assert final_answer(reply, {"answer": gold}) == 1.0, reply
        other = broken(gold)
        hedges = (rf"\boxed{{{gold}}} or \boxed{{{other}}}", rf"\boxed{{{other} \text{{ or }} {gold}}}")
        for reply in (rf"\boxed{{{other}}}", f"The answer is ${other}$.", *hedges):
            assert final_answer(reply, {"answer": gold}) == 0.0, reply


def test_no_answer_equals_another() -> None:
    """Every seventh of `GOLDS` against all others, which are different except for three pairs."""
    pairs = ((".75", "3/4"), (r"\tfrac{3}{8}", r"\frac 38"), (r"\mathbb{R}\setminus\{3\}", r"x \ne 3"))
    same = {frozenset(pair) for pair in pairs}
    for gold in GOLDS[::7]:
        for other in GOLDS:
            if other != gold and frozenset((gold, other)) not in same:
                assert final_answer(rf"\boxed{{{other}}}", {"answer": gold}) == 0.0, (other, gold)


def test_no_reply_raises() -> None:
    rng = random.Random(2)
    pieces = [
        *r"\frac { } [ ( ) \{ 1 23 0.5 x \sqrt ^ _ ! % $ \text{ \begin{pmatrix} & \\ | \pm \circ \boxed{".split(),
        " ",
    ]
    pieces += [*r"= < , + - \sin \log \binom / * or million \cup \infty : . \end{pmatrix} \overline \angle f".split()]
    for _ in range(3000):
        reply = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        assert final_answer(reply, {"answer": rng.choice(GOLDS)}) in (0.0, 1.0)
        assert final_answer("5", {"answer": reply}) in (0.0, 1.0)


def forms(x: Fraction) -> list[str]:
    """All ways to write a rational number that count."""
    sign, top, bottom = ("-" if x < 0 else ""), abs(x.numerator), x.denominator
    found: list[str] = []
    if bottom > 1:
        whole, part = divmod(top, bottom)
        found += [
            f"{sign}{top}/{bottom}",
            rf"{sign}\frac{{{3 * top}}}{{{3 * bottom}}}",
            rf"\dfrac{{{sign}{top}}}{{{bottom}}}",
        ]
        found += [rf"{sign}{whole}\tfrac{{{part}}}{{{bottom}}}", f"{sign}{whole} {part}/{bottom}"] if whole else []
    else:
        found += [f"{sign}{top:,}", f"{sign}{top}.00", f"{sign}{top}", rf"{sign}{top:,}".replace(",", r"\,")]
    if not 10**6 % bottom:
        millionths = top * 10**6 // bottom
        found += [f"{sign}{millionths // 10**6}.{millionths % 10**6:06}", rf"{sign}{millionths / 10**4:.4f}\%"]
        if top:
            exponent = len(str(millionths)) - 7
            digits = str(millionths)
            found += [rf"{sign}{digits[0]}.{digits[1:] or 0} \times 10^{{{exponent}}}", f"{sign}{digits}e-6"]
    return found


def test_rational_numbers_are_equal_by_exact_arithmetic() -> None:
    rng = random.Random(0)
    numbers = [Fraction(rng.randint(-3000, 3000), rng.choice((1, 2, 3, 7, 8, 40))) for _ in range(60)]
    numbers += [x + Fraction(1, 10**6) for x in numbers[:10]]
    for x in numbers:
        others = [x, x + 1, -x, 1 / x if x else x + 2, x + Fraction(1, 10**9), rng.choice(numbers)]
        for y in others:
            for form in forms(y):
                percent = form.endswith("%") and abs(x) >= 1 and y * 100 == x
                assert final_answer(rf"\boxed{{{form}}}", {"answer": str(x)}) == float(x == y or percent), (form, x)


def test_polynomials_are_equal_by_algebra() -> None:
    import sympy

    rng = random.Random(1)
    x = sympy.Symbol("x")
    for _ in range(40):
        coefficients = [rng.randint(-9, 9) for _ in range(rng.randint(2, 4))] + [rng.randint(1, 9)]
        polynomial = sympy.Poly(coefficients[::-1], x)
        terms = [sympy.latex(c * x**k) for k, c in enumerate(coefficients) if c]
        rng.shuffle(terms)
        shuffled = "+".join(terms).replace("+-", "-")
        gold = sympy.latex(polynomial.as_expr())
        other = sympy.latex((polynomial + rng.choice((-1, 1)) * sympy.Poly(x ** rng.randint(0, 4), x)).as_expr())
        factored = sympy.latex(sympy.factor(polynomial.as_expr()))
        assert final_answer(rf"\boxed{{{shuffled}}}", {"answer": gold}) == 1.0, (shuffled, gold)
        assert final_answer(rf"\boxed{{{other}}}", {"answer": gold}) == 0.0, (other, gold)
        if "left(" in factored:  # the question may be to multiply out, or to factor
            assert final_answer(rf"\boxed{{{factored}}}", {"answer": gold}) == 0.0, (factored, gold)
            assert final_answer(rf"\boxed{{{gold}}}", {"answer": factored}) == 0.0, (factored, gold)


# Right replies that math-verify does not take for equal.
MISREAD = {
    "√5",
    "2ab",
    r"\emptyset",
    r"1\le x<2",
    r"x<2\text{ or }x>3",
    r"\langle 1,2\rangle",
    "5 = x",
    "9^{9^{9^{9}}}",
}
FORMULAS = (
    "irrational numbers",
    "polynomials and fractions",
    "lists and sets",
    "as the right answer is written",
    "pairs, intervals and matrices",
    "equations and labels",
)


@pytest.mark.parametrize("kind", FORMULAS)
def test_math_verify_judges_right_formulas_alike(kind: str) -> None:
    import math_verify

    config = [math_verify.LatexExtractionConfig()]
    for reply, gold in RIGHT[kind]:
        content = reply.removeprefix(r"\boxed{").removesuffix("}")
        if content not in MISREAD:
            sides = [math_verify.parse(f"${text}$", config, parsing_timeout=0) for text in (gold, content)]
            assert math_verify.verify(sides[0], sides[1], timeout_seconds=0), (content, gold)
