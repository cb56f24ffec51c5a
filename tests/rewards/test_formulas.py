r"""How answers are read: words and products of variables, exponents, boxes, formulas in dollar signs, intervals."""

from itertools import permutations

import pytest

from mdrl_jax.rewards.formulas.boxes import boxes, last_boxed, last_span, span_at_end
from mdrl_jax.rewards.formulas.intervals import intervals
from mdrl_jax.rewards.formulas.parser import parse
from mdrl_jax.rewards.formulas.prose import last_number
from mdrl_jax.rewards.formulas.tokens import plain, tokens
from mdrl_jax.rewards.formulas.words import is_word
from mdrl_jax.rewards.math import final_answer


def right(reply: str, gold: str) -> bool:
    """Whether the reply in a box is paid; a reply is paid in full or not at all."""
    reward = final_answer(rf"\boxed{{{reply}}}", {"answer": gold})
    assert reward in (0.0, 1.0)
    return reward == 1.0


# Words with their letters in alphabetical order, a vowel only at the end, or letters that follow each other ("rust").
ENGLISH = (
    "first empty forty almost below most cost begin begins chin know dirty biopsy ghost glory abort adopt deity aegis "
    "box cow fox boy air art hot low dim act ant lost best city knot envy lowest ago fit guy boxy foxy chintz chimps "
    "dry sky try spy who why she rust ski pro thru spry ok ox"
).split()
NAMES = "Amy Ben Guy Ivy Abel Amos Bert Cory Elmo Knox Egypt Emory Mort Gino Dior".split()


@pytest.mark.parametrize("word", ENGLISH)
def test_case_of_an_english_word_does_not_matter(word: str) -> None:
    forms = [word, word.capitalize(), word.upper(), rf"\text{{{word}}}", rf"\text{{{word.capitalize()}}}"]
    assert [(a, b) for a in forms for b in forms if not right(a, b)] == []
    phrase = f"{word.capitalize()} set"
    assert right(phrase, f"{word} set") and right(phrase, rf"\text{{{word} set}}")
    assert final_answer(f"The answer is {phrase}.", {"answer": f"{word} set"}) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_word(name: str) -> None:
    assert is_word(name) and right(name, rf"\text{{{name}}}") and right(rf"\text{{{name.lower()}}}", name)


@pytest.mark.parametrize("word", ["chips", "films", "bins", "hips", "ants", "chimps", "dirty plates", "flops", "fins"])
def test_words_in_alphabetical_order_are_remarks_after_a_number(word: str) -> None:
    assert right(f"7 {word}", "7") and final_answer(f"The answer is 7 {word}.", {"answer": "7"}) == 1.0


def test_words_of_the_same_letters_differ() -> None:
    words = (("dog", "god"), ("below", "elbow"), ("act", "cat"), ("art", "rat"), ("best", "bets"), ("now", "won"))
    assert [pair for pair in words if right(*pair) or right(*pair[::-1])] == []
    wrong = [(w, "".join(letters)) for w in ("dog", "ant", "dry", "first"[:4]) for letters in permutations(w)]
    assert [(reply, w) for w, reply in wrong if reply != w and right(reply, w)] == []
    numerals = ("xiv", "xvi", "xxi", "xix", "iii", "viii", "xii", "clix", "clxi", "lxi", "lix")
    assert [(a, b) for a in numerals for b in numerals if right(a, b) != (a == b)] == []
    assert right("XIV", "xiv") and not right("XIX", "XXI") and not right("3xvi", "3")
    assert not right("frist", "first") and not right("Second", "first") and right(r"\text{Red}", "red")


@pytest.mark.parametrize("letters", ["ab", "bc", "abc", "xyz", "abcd", "pqr", "mnp", "rst", "bcd", "wxyz", "lmn"])
def test_letters_that_follow_each_other_are_variables_in_any_order(letters: str) -> None:
    products = ["".join(p) for p in permutations(letters)]
    assert [p for p in products[:24] if not right(p, letters)] == []
    assert [p for p in products[:24] if not right(f"2{p}", f"2{letters}")] == []
    assert [p for p in products if p != "cab" and is_word(p)] == []
    others = [letters.upper(), letters.capitalize(), letters[:-1], letters + "q", f"2{letters}", letters + letters[0]]
    assert [o for o in others if right(o, letters)] == []


@pytest.mark.parametrize("letters", ["abc", "xyz", "pqr", "lmn", "wxyz"])  # it reads "dc" and "str" in another way
def test_math_verify_takes_the_same_products_for_equal(letters: str) -> None:
    import math_verify

    config = [math_verify.LatexExtractionConfig()]
    gold = math_verify.parse(f"${letters}$", config, parsing_timeout=0)
    for product in permutations(letters):
        run = "".join(product)
        for reply in (run, f"2{run}", f"{run}^2"):
            found = math_verify.parse(f"${reply}$", config, parsing_timeout=0)
            assert math_verify.verify(gold, found, timeout_seconds=0) == right(reply, letters), reply


def test_other_letters_in_alphabetical_order_are_variables() -> None:
    runs = "aei afh bdi ceg abx aby axy adx abxy abcx abk xyt xyzt kxy Abc Xyz Abx ABD ADE".split()
    assert [run for run in runs if is_word(run)] == []
    assert right("bac", "abc") and right("cab", "abc") and right("zyx", "xyz") and right("2txy", "2xyt")


def test_a_reply_has_the_variables_of_the_right_answer() -> None:
    same = (("xab", "abx"), ("2xab", "2abx"), ("kab", "abk"), ("xay", "axy"), (r"\frac{xab}{2}", r"\frac{abx}{2}"))
    assert [pair for pair in same if not right(*pair)] == []
    assert right("bac+1", "1+abc") and right("ibd+hcd+fab+1", "abf+bdi+cdh+1")
    # The order of capital letters counts: they may be an order, or the names of points.
    assert not right("ABCDE", "BADCE") and not right("BADCE", "ABCDE") and not right("BADCE", "A,B,C,D,E")
    # Letters of words that the right answer happens to have as variables are no factors.
    assert not right("a and d", "and") and not right("2 and x", "2adnx")


def test_a_formula_with_letters_that_are_also_a_word() -> None:
    assert right("bdf+ace", "ace+bdf") and right("ace+bdf", "bdf+ace") and right("t^2ac", "act^2")
    assert right(r"\frac{1}{2}act", r"\frac{act}{2}") and not right("ace+bdh", "ace+bdf")
    assert right("Low-cost", "low-cost")


@pytest.mark.parametrize("reply", ["3abc", "3bac", "3xyt", "3xab", "3act", "3kab", "3abx", "3acb", "3yzx", "2xyzt"])
def test_variables_after_a_number_are_no_remark(reply: str) -> None:
    assert not right(reply, reply[0]) and not right(reply[0], reply)
    assert final_answer(f"The answer is {reply}.", {"answer": reply[0]}) == 0.0


def test_units_right_after_a_number_are_a_remark() -> None:
    for reply in ("3gal", "3ton", "3mol", "3men", "3day", "3USD", "3cups", "3eggs", "3kg"):
        assert right(reply, "3"), reply


def test_beyond_ascii_three_letters_are_a_word_unless_they_are_greek_variables() -> None:
    assert is_word("где") and is_word("été") and is_word("thé") and is_word("мир") and is_word("数")
    assert not is_word("λμν") and not is_word("да") and is_word("λόγος")


# Numbers.

EXPONENTS = [
    ("1e+0000005", "100000", True),
    ("1e+0000005", "1", False),
    ("1e-0000005", "0.00001", True),
    ("1e-0000005", "1", False),
    ("2.5E+000000002", "250", True),
    ("1e00000000000000000000", "1", True),
    ("1e-00000000", "1", True),
    ("3e" + "0" * 500 + "4", "30000", True),
    ("3e" + "0" * 500 + "4", "3", False),
    ("1e999", "1e999", True),
    ("1e+1000", "1e1000", True),
    ("1e1234567", "1e1234568", False),
    ("1e1234567", "1e123456", False),
    ("1e-1234567", "1e-123456", False),
    ("1e1234567", "1e1234567", True),
    ("1e100001", "1e10000", False),
    ("0e1234567", "0", False),  # beyond the limit nothing is computed
    ("1e" + "9" * 6000, "1e" + "9" * 6000, True),
    ("1e" + "9" * 6000, "1e" + "9" * 5999, False),
    ("1e" + "9" * 6000, "1", False),
]


@pytest.mark.parametrize(("reply", "gold", "same"), EXPONENTS)
def test_exponents_are_read_to_their_last_digit(reply: str, gold: str, same: bool) -> None:
    assert right(reply, gold) is same
    assert final_answer(f"#### {reply}", {"answer": gold}) == float(same) or len(reply) > 1000


def test_an_exponent_has_one_spelling() -> None:
    assert plain("1e+0000005") == plain("1e5") == "1e5" and plain("1e-007") == "1e-7" and plain("1e-00") == "1e0"
    assert [t.text for t in tokens("7e+12345678901")] == ["7e12345678901"]


# Boxes.

BOXED = [
    (r"\fbox5", "5"),
    (r"\boxed5", "5"),
    (r"\fbox 5", "5"),
    (r"\boxed 5", "5"),
    (r"\fbox{5}", "5"),
    (r"\fbox {5}", "5"),
    (r"so \fbox7 and \boxed8", "8"),
    (r"so \boxed7 and \fbox8", "8"),
    (r"\setlength{\fboxsep}{3pt} \fbox{5}", "5"),
    (r"\fbox{5} \fboxsep", "5"),
    (r"\fbox{5} \fboxrule=1pt", "5"),
    (r"\fbox\frac12", None),
    (r"\fbox$5$", None),
    (r"\fbox", None),
    (r"\fbox ", None),
    (r"\fbox5\fbox", "5"),
    (r"\fbox{5", None),
]


@pytest.mark.parametrize(("text", "content"), BOXED)
def test_both_commands_box_alike(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
    twin = text.replace("fboxsep", "#").replace("fboxrule", "#").replace("fbox", "boxed").replace("#", "other")
    assert last_boxed(twin) == content
    assert len(boxes(text)) == len(boxes(twin))


def test_an_fbox_is_paid_as_a_box() -> None:
    for box in (r"\boxed", r"\fbox"):
        assert final_answer(f"It is {box}5, not 6", {"answer": "5"}) == 1.0
        assert final_answer(f"It is {box}{{x+1}}.", {"answer": "x+1"}) == 1.0
        assert final_answer(f"{box}5 or 6", {"answer": "5"}) == 0.0
        assert final_answer(f"not {box}5", {"answer": "5"}) == 0.0
        assert final_answer(f"{box}{{5", {"answer": "5"}) == 0.0
        assert final_answer(rf"{box}5 or {box}6", {"answer": "6"}) == 0.0


# Formulas in dollar signs and LaTeX brackets.

SPANS = [
    (r"cost \$5 or \$6", None),
    (r"\$5", None),
    (r"\$", None),
    (r"cost \$5, so $x$ is it", "x"),
    (r"so $x$ costs \$5", "x"),
    (r"$x$ is \$5 or \$6", "x"),
    (r"$\$5$", r"\$5"),
    (r"$x = \$5$ and \$7", r"x = \$5"),
    (r"\\$x$", "x"),  # a line break before a formula
    (r"\\\$x\$ and $y$", "y"),
    (r"$$a$$ for \$5", "a"),
    ("cost $5 or $6", None),
    ("$x$ costs $5", "x"),
    ("$x$ costs $5 or $6.50", "x"),
    ("it is $x$, for $5 each", "x"),
    ("$5$ or $6$", "6"),
    ("$$x$$", "x"),
    ("$a$$b$", "b"),
    ("$ x $", " x "),
    (r"\[ \begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix} \]", r" \begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix} "),
    (r"\(a\) and \\(b\\)", "a"),
    (r"\(a\) then \[b\]", "b"),
    (r"$a$ then \(b\)", "b"),
    ("$", None),
    ("$$", None),
    ("$$$$", None),
    ("", None),
    ("\\", None),
]


@pytest.mark.parametrize(("text", "content"), SPANS)
def test_escaped_dollars_and_prices_end_no_formula(text: str, content: str | None) -> None:
    assert last_span(text) == content
    where = span_at_end(text)
    assert where is None if content is None else where is not None and text[slice(*where)] == content


def test_prices_of_a_reply_are_no_formula() -> None:
    assert final_answer(r"We get $x+1$ for \$5 or \$6", {"answer": "x+1"}) == 1.0
    assert final_answer(r"We get $x+1$ for $5 or $6", {"answer": "x+1"}) == 1.0
    assert final_answer(r"It costs \$5 or \$6", {"answer": "5"}) == 0.0
    assert final_answer(r"It costs \$5 and \$6", {"answer": "6"}) == 0.0
    assert final_answer(r"It costs \$5.", {"answer": "5"}) == final_answer("It costs $5.", {"answer": "5"}) == 1.0
    assert last_number(r"the price is \$4 + \$5 = \$9") == last_number("the price is $4 + $5 = $9")


# Sets of numbers.

UNION = r"(1,2)\cup(3,4)"
SAME_SETS = [
    ("(1,2) or (3,4)", UNION),
    (r"(1,2) \text{ or } (3,4)", UNION),
    (r"(3,4) \text{ or } (1,2)", UNION),
    (UNION, "(1,2) or (3,4)"),
    (r"(-\infty,1] or [2,\infty)", r"(-\infty,1]\cup[2,\infty)"),
    (r"[0,1] or (2,3] or (4,\infty)", r"[0,1]\cup(2,3]\cup(4,\infty)"),
    (r"x\in(1,2) \text{ or } x\in(3,4)", UNION),
    (r"x\in(1,2) \text{ or } (3,4)", UNION),
    (r"(-\infty,1) or (2,\infty)", r"x<1 \text{ or } x>2"),
    (r"x<1 \text{ or } x\in(2,3)", r"(-\infty,1)\cup(2,3)"),
    (r"(0,1)\cup(1,2) or (3,4)", r"(0,1)\cup(1,2)\cup(3,4)"),
    (r"3 \ne x", r"x \ne 3"),
    (r"x \ne 3", r"3 \ne x"),
    (r"3 \neq x", r"(-\infty,3)\cup(3,\infty)"),
    (r"3 != x", r"\mathbb{R}\setminus\{3\}"),
    (r"\pi \ne x", r"x \ne \pi"),
    (r"\pi \ne x", r"(-\infty,\pi)\cup(\pi,\infty)"),
    (r"(1,2)\text{ or }(3,4)", "(3,4),(1,2)"),  # two points
    (r"(1,2)\text{ or }(1,2)", "(1,2)"),
    (r"x+y \ne 3", r"3 \ne x+y"),
]
OTHER_SETS = [
    ("(1,2) or (3,5)", UNION),
    ("(1,2) or [3,4]", UNION),
    ("(1,2)", UNION),
    (UNION, "(1,2)"),
    ("(1,2) or (3,4)", "(1,2)"),
    ("(1,2) and (3,4)", UNION),
    (r"x\in(1,2) \text{ or } y\in(3,4)", UNION),
    (r"y\in(1,2) \text{ or } (3,4)", r"x\in(1,2) \text{ or } (3,4)"),
    ("1 or (3,4)", UNION),
    (r"4 \ne x", r"x \ne 3"),
    (r"3 \ne y", r"x \ne 3"),
    (r"3 \ne 4", r"x \ne 3"),
    (r"3 \ne x", "3"),
    (r"e \ne x", r"x \ne \pi"),
    (r"x>1 \text{ and } x \ne 2", "(1,2)"),
    (r"x>1 \text{ and } 2 \ne x", "(1,2)"),
    (r"x<3 \text{ and } x \ne 1", "(1,3)"),
    (r"x>1, (-\infty,3)", "(1,3)"),
]


@pytest.mark.parametrize(("reply", "gold"), SAME_SETS)
def test_the_same_set_of_numbers(reply: str, gold: str) -> None:
    assert right(reply, gold)


@pytest.mark.parametrize(("reply", "gold"), OTHER_SETS)
def test_another_set_of_numbers(reply: str, gold: str) -> None:
    assert not right(reply, gold)


def test_or_and_cup_give_the_same_intervals() -> None:
    assert intervals(parse("(1,2) or (3,4)")) == intervals(parse(UNION)) is not None
    assert intervals(parse(r"3 \ne x")) == intervals(parse(r"x \ne 3")) is not None
    assert intervals(parse("(1,2), (3,4)")) is None and intervals(parse(r"x+1 \ne 3")) is None
    assert intervals(parse(r"3 \ne x \ne 4")) is None and intervals(parse("x<1 or y>2")) is None


def test_math_verify_takes_the_same_intervals_for_equal() -> None:
    import math_verify

    config = [math_verify.LatexExtractionConfig()]
    for reply, gold in ((UNION, r"(3,4)\cup(1,2)"), (r"[0,1]\cup(2,3]", r"(2,3]\cup[0,1]")):
        sides = [math_verify.parse(f"${text}$", config, parsing_timeout=0) for text in (gold, reply)]
        assert math_verify.verify(sides[0], sides[1], timeout_seconds=0) and right(reply.replace(r"\cup", " or "), gold)
