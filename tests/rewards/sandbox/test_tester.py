"""What tests outside the sandbox see of a program inside it, against the same tests in one namespace."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mdrl_jax.rewards.pool import RewardPool

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
    "assert Stack(1) == [1]",
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
