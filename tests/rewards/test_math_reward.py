"""The math reward against hand-judged replies and the gold answers of GSM8K."""

import json
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from mdrl_jax.rewards.base import Score
from mdrl_jax.rewards.formulas import proof
from mdrl_jax.rewards.formulas.boxes import last_boxed, last_span
from mdrl_jax.rewards.math import final_answer
from mdrl_jax.rewards.pool import RewardPool

SAME = [
    ("so \\boxed{72}", "72"),
    ("first \\boxed{3}, then \\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{5} and a broken \\boxed{6", "5"),
    ("\\boxed{72} #### 5", "72"),
    ("The answer is 5\n#### 72", "72"),
    ("#### 1,234", "1234"),
    ("#### $18.00", "18"),
    ("#### 18 dollars", "18"),
    ("The answer is 4. No: the answer is: **+7**.", "7"),
    ("The answer is $5$. I hope this helps with 3 others.", "5"),
    ("The answer is $-5.50 today", "-11/2"),
    ("5 + 3 = 8", "8"),
    ("she pays 10-3 = 7", "7"),
    ("x=−3", "-3"),
    ("it is 50%.", "50"),
    ("42", "42"),
    (".5", "1/2"),
    ("\\boxed{-\\dfrac{3}{4}}", "-0.75"),
    ("\\boxed{x^2 + 1}", "x^2+1"),
    ("\\boxed{\\text{Yes}}", "yes"),
    ("The answer is Paris.", "paris"),
    ("\\boxed{(1, 2)}", "(1,2)"),
    ("\\boxed{0." + "3" * 50 + "}", "0." + "3" * 50),
]
DIFFERENT = [
    ("\\boxed{72} or 73", "73"),
    ("0.3333", "1/3"),
    ("1000000000000000000000000.1", "1000000000000000000000000"),
    ("The answer is 3 + 4 = 7", "3"),
    ("The answer is 5 or 6", "5"),
    ("\\boxed{5, 6}", "5"),
    ("\\boxed{5}", "5, 6"),
    ("\\boxed{2,3}", "23"),
    ("18 apples", "18 pears"),
    ("", "0"),
    ("", ""),
    ("no number", "7"),
    ("\\boxed{}", "7"),
    ("1/0", "0"),
    ("7" * 100_000, "7"),
]


@pytest.mark.parametrize(("reply", "gold"), SAME)
def test_same(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 1.0


@pytest.mark.parametrize(("reply", "gold"), DIFFERENT)
def test_different(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 0.0


def test_any_of_several_answers() -> None:
    assert final_answer("so 4", {"answer": ["3", "4"]}) == 1.0
    assert final_answer("so 5", {"answer": ["3", "4"]}) == 0.0


def test_every_rational_equals_itself_and_no_other() -> None:
    numbers = [Fraction(a, b) for a in range(-6, 7) for b in range(1, 5)]
    for x in numbers:
        for y in numbers:
            whole = y.denominator == 1
            for form in (f"{y}", f"+{y}".replace("+-", "-"), rf"\frac{{{y.numerator}}}{{{y.denominator}}}"):
                counts = "frac" not in form or not whole  # 4/1 is a division left to do
                assert final_answer(rf"\boxed{{{form}}}", {"answer": str(x)}) == float(x == y and counts), (form, x)


def test_braces_balance() -> None:
    assert last_boxed("\\boxed{a{b}{c{d}}} e}") == "a{b}{c{d}}"
    assert last_boxed("\\boxed{a") is None


def test_gsm8k_golds_and_changed_golds(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data/math/gsm8k_test.jsonl").read_text().splitlines()]
    assert len(rows) == 1319
    for row in rows:
        working, _, gold = row["answer"].rpartition("#### ")
        changed = str(int(gold.replace(",", "")) + 1)
        for right in (row["answer"], f"{working}\n\\boxed{{{gold}}}", f"{working}\nThe answer is ${gold}."):
            assert final_answer(right, {"answer": gold}) == 1.0
            assert final_answer(right, {"answer": changed}) == 0.0
        for wrong in (f"{working}#### {changed}", f"{working}\nThe answer is {changed}."):
            assert final_answer(wrong, {"answer": gold}) == 0.0


FORMULAS_SAME = [
    (r"\boxed{x=5}", "5"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{\pi/2}", r"\frac{\pi}{2}"),
    (r"\boxed{1+x^2}", "x^2+1"),
    (r"The set is $\{2, 1\}$.", r"\{1,2\}"),
    (r"so \(x < 3\) and \[ 2x+1=y \]", "y=2x+1"),
    (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\boxed{2,-2}", r"\pm 2"),
    (r"\boxed{10\%}", r"10\%"),
    (r"\boxed{\text{(B)}}", "B"),
]
FORMULAS_DIFFERENT = [
    (r"\boxed{2 \text{ or } 3}", "2"),
    (r"\boxed{5 = 6}", "5"),
    (r"\boxed{\sqrt{2}}", "1.414"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{[0,1]}", "[0,1)"),
    (r"\boxed{x^2-1}", "x^2+1"),
    (r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{\pm 2}", "2"),
    (r"\boxed{\text{odd}}", r"\text{even}"),
    (r"\boxed{Pairs}", "Paris"),  # to math-verify both are the product of a, i, p, r and s
    (r"\boxed{\frac{1}{0}}", r"\sqrt{2}"),
    (r"\boxed{\frac{}{}\left(}", r"\sqrt{2}"),
    ("The answer is 3 + 4", "7"),  # a copied question must not score
    (r"\boxed{\frac{\sqrt{4}}{4}}", "1/2"),
    (r"\boxed{2^{10}}", "1024"),
]


@pytest.mark.parametrize(("reply", "gold"), FORMULAS_SAME)
def test_the_same_formula(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 1.0


@pytest.mark.parametrize(("reply", "gold"), FORMULAS_DIFFERENT)
def test_another_formula(reply: str, gold: str) -> None:
    assert final_answer(reply, {"answer": gold}) == 0.0


def test_formulas_in_text() -> None:
    assert last_span(r"$a$ then \(b\)") == "b" and last_span(r"\[b\] then $a$") == "a"
    assert last_span("costs $5") is None and last_span("") is None


def test_it_works_off_the_main_thread() -> None:
    """No time limit rests on signals, which only the main thread may set."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(final_answer(r"\boxed{1+x}", {"answer": "x+1"})))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_numbers_never_load_the_algebra() -> None:
    code = (
        "import sys; from mdrl_jax.rewards.math import final_answer as f\n"
        "f('#### 5', {'answer': '5'}); f('7 7 ; 3', {'answer': '5'}); f(r'\\boxed{6}', {'answer': '5'})\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FORMULAS = [
    r"9^{9^{9^{9}}}",
    r"(10^9)!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"(x+1)^{100000}",
    r"(x+y+z)^{60}-(z+y+x)^{60}+\sqrt{3}",
    "(" * 450 + "1" + ")" * 450,
    r"\sqrt{" * 100 + "2" + "}" * 100,
    r"\frac{1}{" * 100 + "2" + "}" * 100,
    "+".join(["x"] * 450),
    r"e^{e^{e^{e^{e^{e}}}}}",
]
STALLING = [
    *FORMULAS,
    r"\boxed{" * 20_000,
    "$" * 100_000,
    "answer is " * 20_000,
    "answer is 5. No, " * 10_000,
    r"\(" * 50_000,
    "1+" * 50_000,
    "1" * 100_000 + "!",
    " or ".join(r"\boxed{1}" for _ in range(10_000)),
    "{" * 100_000,
    "\n" * 100_000 + "x",
    r"not \boxed{1} " * 10_000,
    "the wrong answer is 1. " * 10_000,
    "at least " * 20_000,
    r"\frac{1}" * 20_000,
]


# Long replies are read alike for every formula as gold: only what is compared with it depends on it.
@pytest.mark.parametrize(
    ("gold", "replies"), [(r"\sqrt{2}", STALLING), ("7", STALLING), (r"2^{x}+y", FORMULAS), (r"(x+y+z)^{60}", FORMULAS)]
)
def test_no_reply_takes_long(gold: str, replies: list[str]) -> None:
    final_answer(r"\boxed{\sqrt{8}/2}", {"answer": r"\sqrt{2}"})  # sympy is there
    for reply in replies:
        start = time.thread_time()
        assert final_answer(rf"\boxed{{{reply}}}", {"answer": gold}) == final_answer(reply, {"answer": gold}) == 0.0
        # Work that grows with the square of such lengths takes minutes; a slow machine takes a few seconds.
        assert time.thread_time() - start < 20.0, reply[:40]


def test_what_stalls_ends_with_its_worker() -> None:
    """Such a reply scores 0 and says so; the pool judges on."""
    with RewardPool(1, cpu_seconds=1.0) as pool:
        good = ("math", r"\boxed{1+x}", {"answer": "x+1"})
        assert pool.score([good, ("tests.rewards.test_math_reward:never", "", {}), good]) == [
            Score(1, 1), Score(0, 0, "timeout: CPU time used up"), Score(1, 1)
        ]  # fmt: skip


def test_the_import_of_sympy_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []

    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            left.append(signal.getitimer(signal.ITIMER_PROF)[0])
            raise ModuleNotFoundError(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "sympy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent()])
    signal.setitimer(signal.ITIMER_PROF, 1000.0)
    try:
        with pytest.raises(ModuleNotFoundError):
            proof._sympy.__wrapped__()
        assert left == [0.0] and 900 < signal.getitimer(signal.ITIMER_PROF)[0] < 1001
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def never(completion: str, check: object) -> float:
    while True:
        pass


@pytest.mark.parametrize("command", ["\\text{", "\\mathrm{", "\\boxed{", "{", "\\sqrt{", "("])
def test_hundreds_of_nested_braces_are_an_unread_reply(command: str) -> None:
    deep = command * 900 + "5" + (")" if command == "(" else "}") * 900
    for reply in (deep, f"\\boxed{{{deep}}}"):
        assert final_answer(reply, {"answer": "x+1"}) == 0.0
        if command in ("\\text{", "\\mathrm{", "\\sqrt{"):
            assert final_answer(f"\\boxed{{{deep}}}", {"answer": "5"}) == 0.0
    few = command * 3 + "5" + (")" if command == "(" else "}") * 3
    assert command in ("\\sqrt{", "(") or final_answer(f"\\boxed{{{few}}}", {"answer": "5"}) == 1.0


def test_thousands_of_lines_that_point_on_are_passed() -> None:
    lines = "below\n" * 5000
    assert final_answer(f"The answer is below\n{lines}5", {"answer": "5"}) == 1.0
    assert final_answer(f"The answer is as follows:\n{lines}$$x+1$$", {"answer": "x+1"}) == 1.0
    assert final_answer(f"The answer is below\n{lines}", {"answer": "5"}) == 0.0
