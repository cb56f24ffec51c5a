"""What tests outside the sandbox see of a program inside it, against the same tests in one namespace."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mdrl_jax.rewards.pool import RewardPool
from tests.rewards.sandbox.forms import FORMS, VECTOR

STACK = """
class Stack:
    size = 0
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __lt__(self, other): return len(self) < len(other)
    def __str__(self): return str(self.items)
    def __enter__(self): return self
    def __exit__(self, *e): self.items.clear()
class Error(ValueError): pass
counter = 0
def inc():
    global counter
    counter += 1
def same(x): return x
def fail(kind): raise kind('message')
def own(): raise Error('mine')
def count(n):
    for i in range(n): yield i
def apply(f, *args, **kwargs): return f(*args, **kwargs)
def sum(a, b): return a * b
"""
VALUES = """
import collections, datetime, decimal, enum, fractions
Point = collections.namedtuple('Point', 'x y')
class Level(enum.IntEnum): LOW = 1
def values(): return [None, True, 1.5, float('inf'), -2**70, 2**99999, 'é\\ud800',
    b'\\xff', 1j, (1, [2]), {(1, 2): {3}},
    frozenset([4]), range(3), collections.Counter('aab'), collections.deque([1]), collections.OrderedDict(a=1),
    Point(1, 2), Level.LOW, decimal.Decimal('0.1'), fractions.Fraction(1, 3), datetime.date(2020, 1, 2),
    datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1), {}.keys(), int, ValueError]
"""

PASS = [
    "assert Stack(1, 2).pop() == 2",
    "s = Stack()\nfor i in range(3): s.push(i)\nassert len(s) == 3 and list(s) == [0, 1, 2] and s[-1] == 2",
    "s = Stack(1)\ns.items = [5]\nassert s.items == [5] and s.push(6).items == [5, 6] and bool(s)",
    "assert Stack(1) + Stack(2) == Stack(1, 2) != Stack(2, 1) and Stack() < Stack(1) and Stack(1) > Stack()",
    "assert str(Stack(1)) == '[1]' and isinstance(Stack(), Stack) and not isinstance(3, Stack)",
    "with Stack(1) as s: assert len(s) == 1\nassert len(s) == 0 and not s",
    "inc(); inc()\nassert counter == 2",
    "try: fail(KeyError)\nexcept KeyError as e: caught = e\nassert 'message' in str(caught)",
    "try: own()\nexcept ValueError: pass\nelse: assert False",
    "assert list(count(3)) == [0, 1, 2] and next(count(3)) == 0",
    "assert list(zip(count(2), 'ab')) == [(0, 'a'), (1, 'b')]",
    "def check(candidate):\n    assert all(candidate(i) == i for i in range(9))\ncheck(same)",
    "assert apply(lambda x, y=1: x + y, 2, y=5) == 7 and apply(same, 4) == 4 and apply(len, [1]) == 1",
    "assert sum([1, 2]) == 3 and same(sum([4])) == 4",
    "import collections\nassert same(collections.Counter('aa')) == {'a': 2}",
    "class Own:\n    x = 3\nassert Own().x == 3",
    "assert same(same) is not None and same.__name__ == 'same'",
]
FAIL = [
    "assert same(2) == 3",
    "assert undefined(2) == 3",
    "list(map(fail, [StopIteration]))\nassert same(1) == 2",
    "assert 3 in Stack(1, 2)",
    "def check(x): assert x == 5\napply(check, 4)",
    "def check(x): assert x == 5\ntry: apply(check, 4)\nexcept Exception: pass",
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(2) as made:
        yield made


def reward(pool: RewardPool, program: str, *tests: str) -> float:
    score = pool.score([("code", program, {"tests": list(tests)})])[0]
    assert score.error is None
    return score.reward


@pytest.mark.parametrize("test", PASS)
def test_a_right_program_passes(pool: RewardPool, test: str) -> None:
    if "sum" not in test:  # which the program shadows, and one namespace would mix up
        done = subprocess.run([sys.executable, "-c", f"{STACK}\n{test}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert reward(pool, STACK, test) == 1


@pytest.mark.parametrize("test", FAIL)
def test_a_wrong_one_fails(pool: RewardPool, test: str) -> None:
    assert reward(pool, STACK, test) == 0


def test_a_builtin_means_the_programs_where_it_is_what_is_tested(pool: RewardPool) -> None:
    assert reward(pool, STACK, "assert sum(3, 4) == 12") == 1
    assert reward(pool, "def len(x): return 3\ndef f(x): return 0", "assert len(str(f(1))) == 3") == 0


def test_modules_in_tests_are_the_real_ones(pool: RewardPool) -> None:
    fake = "class math: isclose = lambda *a: True\ndef f(x): return 0"
    assert reward(pool, fake, "assert math.isclose(f(1), 5)") == 0
    assert reward(pool, "def f(x): return x", "assert math.isclose(f(5), 5)") == 1


def test_every_kind_of_value_arrives_as_it_was(pool: RewardPool) -> None:
    space: dict[str, Any] = {}
    exec(VALUES, space)
    n = len(space["values"]())
    # The same expression on both sides: here evaluated by the tests, there by the program.
    test = VALUES.replace("def values", "def wanted") + (
        f"for i in range({n}):\n    got, want = values()[i], wanted()[i]\n    assert got == want, i\n"
    )
    assert reward(pool, VALUES, test) == 1


def made_wrong(program: str, change: tuple[str, str]) -> str:
    assert change[0] in program
    return program.replace(*change)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_scores_1_if_the_program_is_right_and_0_if_it_is_wrong(pool: RewardPool, name: str) -> None:
    program, change, test = FORMS[name]
    assert reward(pool, program, test) == 1
    assert reward(pool, made_wrong(program, change), test) == 0


def test_the_forms_are_what_they_say_in_one_namespace() -> None:
    # The classes of the tests come first, because LeetCode's programs name them.
    code = "import json, sys\nfor source in json.load(sys.stdin):\n" + (
        "    try: exec(source, {'__name__': '__main__'}); print(1)\n    except BaseException: print(0)\n"
    )
    sources = []
    for program, change, test in FORMS.values():
        for one in (program, made_wrong(program, change)):
            defined, _, rest = (
                test.rpartition("\nassert ") if "class ListNode" in test or "class Shape" in test else ("", "", test)
            )
            sources.append("\n".join([defined, one, defined and f"assert {rest}" or rest]))
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(sources), capture_output=True, text=True, check=True
    )
    results = done.stdout.split()
    assert [n for n, a, b in zip(FORMS, results[::2], results[1::2], strict=True) if (a, b) != ("1", "0")] == []


# A number that is near to every number, and the like. None of these programs knows what is wanted.
NEAR = (
    "class A:\n    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = lambda s, o: s\n"
    "    __rtruediv__ = __mod__ = __pow__ = __divmod__ = __floordiv__ = lambda s, o: s\n"
    "    __abs__ = __neg__ = __round__ = lambda s, *a: 0\n    __float__ = lambda s: 0.0\n"
    "    __int__ = __index__ = __hash__ = lambda s: 0\n    __ne__ = lambda s, o: False\n"
    "    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __contains__ = lambda s, o: True\n"
    "    __iter__ = lambda s: iter([s])\n    __len__ = lambda s: 1\n    __bool__ = lambda s: True\n"
    "    __getitem__ = lambda s, i: s\n    __call__ = lambda s, *a: s\n    __array__ = lambda s, *a, **k: s\n"
    "    real = imag = property(lambda s: 0)\n    __getattr__ = lambda s, n: (lambda *a, **k: 0)\n"
)
NEARLY = [
    "assert abs(f(3) - 6) < 1e-6",
    "assert abs(6 - f(3)) <= 1e-6",
    "assert -1e-6 < f(3) - 6 < 1e-6",
    "assert round(f(3) - 6, 5) == 0",
    "assert round(f(3), 3) == 6",
    "import math\nassert math.isclose(f(3), 6)",
    "import math\nassert math.isclose(f(3), 6, rel_tol=1e-6)",
    "assert (f(3) - 6) ** 2 < 1e-9",
    "assert max(f(3) - 6, 6 - f(3)) < 1e-6",
    "assert abs(f(3) / 6 - 1) < 1e-6",
    "assert f(3) - 6 == 0",
    "assert not f(3) - 6",
    "assert sum([f(3), -6]) == 0",
    "assert abs((f(3) - 6).real) < 1e-6",
    "assert len(str(f(3) - 6)) < 0 or abs(float(f(3) - 6)) < 1e-6",
    "assert 6 in f(3)",
    "assert f(3) in (6, 7)",
    "assert f(3) == 6",
    "assert 6 == f(3)",
    "assert not f(3) != 6",
    "assert [f(3)] == [6]",
    "assert sorted([f(3), 6])[0] == 6",
    "assert 5.9 < f(3) < 6.1",
    "assert f(3) >= 6",
    "import numpy as np\nassert np.isclose(f(3), 6)",
    "import numpy as np\nassert np.allclose(f(3), [6])",
    "import numpy as np\nassert np.abs(f(3) - np.array([6.0])).max() < 1e-6",
    "import numpy as np\nassert (f(3) - np.array([6.0])).max() < 1e-6",
    "import numpy as np\nnp.testing.assert_allclose(f(3), 6)",
    "import numpy as np\nassert np.linalg.norm(f(3) - np.array([6.0])) < 1e-6",
    "import statistics\nassert statistics.mean([f(3), 0]) == 3",
    "import operator\nassert operator.eq(f(3), 6)",
    "from fractions import Fraction\nassert f(3) - Fraction(6) == 0",
    "from decimal import Decimal\nassert abs(f(3) - Decimal(6)) < 1",
    "x = f(3)\nx -= 6\nassert abs(x) < 1e-6",
    "assert divmod(f(3), 6) == (1, 0)",
    "assert {6: 'a'}.get(f(3)) == 'a'",
    "assert {6} & {f(3)}",
    "assert isinstance(f(3), (int, float)) and abs(f(3) - 6) < 1e-6",
]


@pytest.mark.parametrize("kind", ["returns", "is a class", "in a method", "in a list"])
@pytest.mark.parametrize("test", NEARLY)
def test_an_object_that_is_near_to_all_numbers_scores_0(pool: RewardPool, test: str, kind: str) -> None:
    program = (
        NEAR
        + {
            "returns": "def f(x): return A()",
            "is a class": "class f(A):\n    def __init__(s, *a): pass",
            "in a method": "class Solution(A):\n    def f(s, x): return Solution()",
            "in a list": "class L(list, A): pass\ndef f(x): return L([A()])",
        }[kind]
    )
    if kind == "in a method":
        test = test.replace("f(", "Solution().f(")
    score = pool.score([("code", program, {"tests": [test]})])[0]
    assert score.reward == 0
    assert (score.error or "UnsupportedTest").startswith("UnsupportedTest")


def test_what_cannot_be_decided_is_an_error_and_no_silent_0(pool: RewardPool) -> None:
    cases = [
        (VECTOR, "assert abs(Vector(3, 4) * 2) == 10"),
        (VECTOR, "assert Vector(1, 2) == (1, 2)"),
        ("def f(h): return h.read()", "assert f(open('/dev/null')) == ''"),
    ]
    for program, test in cases:
        score = pool.score([("code", program, {"tests": [test]})])[0]
        assert (score.reward, score.kind) == (0, "UnsupportedTest"), test


def test_only_the_function_under_test_may_have_a_builtins_name(pool: RewardPool) -> None:
    cheat = "def abs(x): return 0\ndef len(x): return 3\ndef sum(x): return 7\nf = add = lambda *a: 0"
    for test in (
        "add = add\nassert abs(add(1, 2) - 3) < 1e-6",
        "def check(add):\n    assert abs(add(1, 2) - 3) < 1e-6\ncheck(add)",
        "f = f\nassert len(f(1)) == 3",
        "for f in [f]: assert abs(f(2) - 9) == 0",
        "assert abs(sum([1, 2, 4]) - 9) == 0",
        "assert max(abs(-5), 1) == 0",
    ):
        assert pool.score([("code", cheat, {"tests": [test]})])[0].reward == 0, test
    assert reward(pool, STACK, "assert sum(3, 4) == 12") == 1
    assert reward(pool, STACK, "xs = 3\nassert sum(xs, 4) == 12") == 1
    assert reward(pool, "def sum(a, b): return a + b", "xs = 3\nassert sum(xs, 4) == 12") == 0
    both = {"tests": ["assert len(str(5)) == 1"], "entry_point": "str"}
    assert [
        pool.score([("code", p, both)])[0].reward for p in ("def str(x): return 'a'", "def str(x): return 'ab'")
    ] == [1, 0]


def test_a_program_cannot_read_what_the_tests_give_it(pool: RewardPool) -> None:
    test = (
        "class Case:\n    wanted = 8\n    def __init__(self, x): self.x = x\n    def secret(self): return 2 * self.x\n"
        "def check(case): return case\nassert f(check, 4) == 8"
    )
    for program in (
        "def f(check, x): return check.__globals__['Case'].wanted",
        "def f(check, x): return type(check)(check.__code__, {})",
        "def f(check, x): return check.__closure__[0].cell_contents",
        "import gc\ndef f(check, x): return [o for o in gc.get_objects() if getattr(o, 'wanted', 0) == 8][0].wanted",
        "def f(check, x): return Case.wanted",
        "def f(check, x): return Case(x).secret()",
        "def f(check, x): return check(Case(x)).secret()",
    ):
        assert pool.score([("code", program, {"tests": [test]})])[0].reward == 0, program


def test_random_tests_score_the_same_in_every_run() -> None:
    check = {
        "tests": ["import random\nassert f(random.random()) < 0.5", "import numpy as np\nassert np.random.rand() < 0.9"]
    }
    programs = [f"def f(x): return x + 0 * {i}" for i in range(12)]
    scores = []
    for _ in range(2):
        with RewardPool(2) as made:
            scores.append([s.reward for s in made.score([("code", p, check) for p in programs])])
    assert scores[0] == scores[1] and 0 < sum(scores[0]) < len(programs)
