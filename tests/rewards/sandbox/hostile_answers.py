"""Hostile programs whose answers want to be taken for the right ones; data of test_hostile.py.

`ANSWERS` return objects of many kinds, `EVALUATED` return texts and bytes that a test hands on to what evaluates them,
and `PROTOCOL` write lines of their own to the link (`wire.py`). None of them knows what is wanted.
"""

from tests.rewards.sandbox.hostile_programs import WRONG, Attack

_ALL = (
    "    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = lambda s, o: s\n"
    "    __abs__ = __neg__ = __round__ = lambda s, *a: s\n    __float__ = lambda s: 0.0\n    __int__ = lambda s: 0\n"
    "    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
    "    __hash__ = lambda s: 8\n    __bool__ = lambda s: True\n"
)


def _subclass(base: str, arguments: str = "", imports: str = "", extra: str = "") -> Attack:
    """A program whose answer is an instance of a subclass that is equal and near to everything."""
    return Attack(f"{imports}\nclass A({base}):\n{_ALL}{extra}\nmade = A({arguments})\ndef f(x): return made", "judge")


_IN = ("x = [3, 1, 2]\nassert f(x) == [1, 2, 3] and x == [3, 1, 2]",)
_CAUGHT = ("try:\n    f(-1)\n    assert False, 'no error'\nexcept Bad:\n    pass",)
_WITH = ("with f(3) as x:\n    assert x == 6", "import contextlib\nwith contextlib.ExitStack() as s:\n"
         "    assert s.enter_context(f(3)) == 6")  # fmt: skip
_CLASS = "class C:\n    def __init__(self, x=3): self.x = x\n    def right(self): return self.x == 6\n"
_NUMPY = (
    "import numpy as np\nassert np.allclose(f(3), 6)",
    "import numpy as np\nassert (np.array([6.0]) == f(3)).all()",
    "import numpy as np\nassert np.abs(np.array([6.0]) - f(3)).max() < 1e-6",
    "import numpy as np\nassert np.array_equal(np.array([6.0]), f(3))",
    "import numpy as np\nnp.testing.assert_array_equal(f(3), np.array([6.0]))",
    "import numpy as np\nassert not np.any(np.array([6.0]) - f(3))",
    "import numpy as np\nassert np.add(f(3), 0) == 6",
)

ANSWERS: dict[str, Attack] = {
    # -- subclasses of what travels as data
    "float that is near to all": _subclass("float", "0.5"),
    "complex that is near to all": _subclass("complex", "1j"),
    "bytes that are equal to all": _subclass("bytes", "b'a'"),
    "bytearray that is equal to all": _subclass("bytearray", "b'a'"),
    "tuple that is equal to all": _subclass("tuple", "(1,)"),
    "dict that is equal to all": _subclass("dict", "{{1: 2}}", extra="    __missing__ = lambda s, k: s\n"),
    "set that is equal to all": _subclass("set", "{{1}}", extra="    __contains__ = lambda s, k: True\n"),
    "frozenset that is equal to all": _subclass("frozenset", "{{1}}", extra="    __contains__ = lambda s, k: True\n"),
    "deque that is equal to all": _subclass("deque", "[1]", "from collections import deque"),
    "Counter that is equal to all": _subclass("Counter", "'aa'", "from collections import Counter"),
    "defaultdict of everything": _subclass("defaultdict", "lambda: made", "from collections import defaultdict"),
    "Fraction that is equal to all": _subclass("Fraction", "1, 3", "from fractions import Fraction"),
    "Decimal that is equal to all": _subclass("Decimal", "'1.5'", "from decimal import Decimal"),
    "date that is equal to all": _subclass("date", "2020, 1, 2", "from datetime import date"),
    "datetime that is equal to all": _subclass("datetime", "2020, 1, 2", "from datetime import datetime"),
    "timedelta that is equal to all": _subclass("timedelta", "1", "from datetime import timedelta"),
    "StringIO that is equal to all": _subclass("io.StringIO", "'8'", "import io"),
    "exception that is equal to all": _subclass("ValueError", "8"),
    "module that is equal to all": _subclass("types.ModuleType", "'m'", "import types"),
    "SimpleNamespace that is equal to all": _subclass("types.SimpleNamespace", "", "import types"),
    "UserDict that is equal to all": _subclass("UserDict", "", "from collections import UserDict"),
    "UserString that is equal to all": _subclass("UserString", "'a'", "from collections import UserString"),
    "UUID that is equal to all": _subclass("UUID", "int=0", "from uuid import UUID"),
    "path that is equal to all": _subclass("PurePosixPath", "'/'", "from pathlib import PurePosixPath"),
    "generic alias": _subclass("list", "[1]", extra="    __class_getitem__ = lambda s: s\n"),
    "thread-local that is equal to all": _subclass("threading.local", "", "import threading"),
    # -- numpy
    "array that is near to all": Attack(
        "import numpy as np\nclass A(np.ndarray):\n __eq__ = __lt__ = __le__ = lambda s, o: np.True_\n"
        " __array_priority__ = 1e9\n __array_ufunc__ = lambda s, *a, **k: np.zeros(1)\n"
        " __array_function__ = lambda s, *a, **k: np.True_\n max = min = lambda s, *a, **k: 0.0\n"
        "def f(x): return np.zeros(1).view(A)",
        "judge",
        _NUMPY,
    ),
    "number of numpy that is near to all": Attack(
        "import numpy as np\nclass A(np.float64):\n __eq__ = __lt__ = lambda s, o: True\n"
        " __sub__ = __rsub__ = lambda s, o: 0.0\n __array_ufunc__ = lambda s, *a, **k: True\ndef f(x): return A(1.5)",
        "judge",
        (*_NUMPY, "assert f(3) == 6", "assert abs(f(3) - 6) < 1e-6"),
    ),
    "object with numpy's protocols": Attack(
        "class A:\n __array_priority__ = 1e9\n __array_ufunc__ = lambda s, *a, **k: True\n"
        " __array_function__ = lambda s, *a, **k: True\n __array_wrap__ = lambda s, *a, **k: True\n"
        " __array__ = lambda s, *a, **k: s\n __len__ = lambda s: 1\n __getitem__ = lambda s, i: s\n"
        f"{_ALL}def f(x): return A()",
        "judge",
        _NUMPY,
    ),
    "class with an address as its array": Attack(
        "class A:\n __array_interface__ = {{'shape': (1,), 'typestr': '<f8', 'data': (1 << 20, True), 'version': 3}}\n"
        "def f(x): return A",
        "judge",
        _NUMPY,
    ),
    "array of objects that are equal to all": Attack(
        f"import numpy as np\nclass A:\n{_ALL}def f(x): return np.array([A()], object)", "judge", _NUMPY
    ),
    "array with named columns": Attack(
        "import numpy as np\ndef f(x): return np.zeros(1, [('a', 'f8'), ('b', 'O')])", "judge", _NUMPY
    ),
    "masked array": Attack("import numpy as np\ndef f(x): return np.ma.masked_all(1)", "judge", _NUMPY),
    "masked": Attack("import numpy as np\ndef f(x): return np.ma.masked", "judge", _NUMPY),
    "array of no numbers": Attack("import numpy as np\ndef f(x): return np.full(1, np.nan)", "judge", _NUMPY),
    "empty array": Attack("import numpy as np\ndef f(x): return np.zeros((0, 2))", "judge", (_NUMPY[3], _NUMPY[4])),
    "missing value of pandas": Attack("import pandas as pd\ndef f(x): return pd.NA", "judge"),
    "frame that is equal to all": Attack(
        "import pandas as pd\nclass A(pd.DataFrame):\n __eq__ = lambda s, o: True\n equals = lambda s, o: True\n"
        "def f(x): return A({{'a': [1]}})",
        "judge",
    ),
    "symbol of sympy": Attack("import sympy\ndef f(x): return sympy.Symbol('x')", "judge"),
    # -- lies about the class
    "metaclass that knows every instance": Attack(
        "class M(type):\n __instancecheck__ = __subclasscheck__ = lambda s, o: True\n __eq__ = lambda s, o: True\n"
        f" __hash__ = lambda s: hash(int)\nclass A(metaclass=M):\n{_ALL}def f(x): return A()",
        "judge",
        ("assert isinstance(f(3), int) and f(3) == 6", "assert type(f(3)) == int and abs(f(3) - 6) < 1e-6"),
    ),
    "class attribute that lies by a descriptor": Attack(
        "class D:\n def __get__(s, *a): return int\n def __set__(s, *a): pass\n"
        f"class A:\n{_ALL}    __class__ = D()\ndef f(x): return A()",
        "judge",
    ),
    "__getattribute__": Attack(
        f"class A:\n{_ALL}    def __getattribute__(s, n): return lambda *a, **k: 0\ndef f(x): return A()", "judge"
    ),
    "descriptor as the function": Attack(
        f"class A:\n{_ALL}    __get__ = lambda s, *a: s\n    __call__ = lambda s, *a: s\nf = A()", "judge"
    ),
    "class as the function": Attack(f"class F:\n{_ALL}    def __init__(s, *a): pass\nf = F", "judge"),
    "class in CapWords that contains all": Attack(
        "class F:\n __init__ = lambda s, *a: None\n __contains__ = lambda s, x: True\n __isub__ = lambda s, o: 0\n"
        " __sub__ = lambda s, o: s\n real = 0\nf = F",
        "judge",
        ("assert 6 in f(3)", "x = f(3)\nx -= 6\nassert abs(x) < 1e-6", "assert abs((f(3) - 6).real) < 1e-6"),
    ),
    "class made when it is named": Attack(
        "class M(type):\n def __call__(c, *a): return a[-1] if a else 0\nclass f(metaclass=M): pass", "judge"
    ),
    "__init_subclass__ and __set_name__": Attack(
        f"class B:\n def __init_subclass__(c): c.__eq__ = lambda s, o: True\nclass A(B):\n{_ALL}"
        "    class N:\n        def __set_name__(s, o, n): raise SystemExit(0)\ndef f(x): return A()",
        "judge",
    ),
    "hash and equality of a key": Attack(
        f"class A:\n{_ALL}def f(x): return {{{{A(): A()}}}}".replace("{{{{", "{{").replace("}}}}", "}}"),
        "judge",
        (
            "assert f(4)[8] == 8",
            "assert f(4) == {8: 8}",
            "assert 8 in f(4)",
            "assert set(f(4)) == {8}",
            "assert {8: 8}.items() == f(4).items()",
        ),
    ),  # fmt: skip
    "any of mock": Attack("from unittest.mock import ANY\ndef f(x): return ANY", "judge"),
    "mock": Attack(
        "from unittest.mock import MagicMock\nf = MagicMock()\nf.return_value.__eq__ = lambda s, o: True", "judge"
    ),
    "proxy": Attack(f"import weakref\nclass A:\n{_ALL}a = A()\ndef f(x): return weakref.proxy(a)", "judge"),
    "partial": Attack(f"import functools\nclass A:\n{_ALL}f = functools.partial(lambda *a: A())", "judge"),
    "the interpreter's own objects": Attack(
        "import sys, ctypes\nn = 0\ndef f(x):\n global n\n n += 1\n"
        " return [sys, f, f.__code__, sys._getframe(), ctypes.py_object(8), ctypes.pythonapi][n % 6]",
        "judge",
    ),
    "Ellipsis and friends": Attack(
        "def f(x): return (..., NotImplemented, type, object, super, property)[x % 6 // 1]", "judge"
    ),
    "enumeration that is equal to all": Attack(
        "import enum\nclass A(enum.IntEnum):\n X = 5\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\n"
        "def f(x): return A.X",
        "judge",
    ),
    "flag whose value is anything": Attack(
        "import enum\nclass A(enum.Flag):\n X = 1\n value = _value_ = property(lambda s: s)\n"
        " __eq__ = lambda s, o: True\ndef f(x): return A.X",
        "judge",
        ("assert f(3).value == 6", "assert f(3) == 6"),
    ),
    "text enumeration whose name is anything": Attack(
        "import enum\nclass T(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\n"
        "class A(enum.StrEnum):\n X = 'a'\n name = property(lambda s: T('b'))\ndef f(x): return A.X",
        "judge",
        ("assert f(3).name == 'X'", "assert f(3) == '6'"),
    ),
    "named tuple with methods as fields": Attack(
        "from collections import namedtuple\nT = namedtuple('T', 'count index')\n"
        "def f(x): return T(lambda v: 1, lambda v: 0)",
        "judge",
        ("assert f(3).count(6) == 1", "assert f(3).index(6) == 0"),
    ),
    "named tuple with keywords as fields": Attack(
        "class T(tuple):\n _fields = ('def', '__eq__')\n __eq__ = lambda s, o: True\n"
        "def f(x): return T((1, lambda *a: True))",
        "judge",
    ),
    "named tuple whose fields are no texts": Attack(
        "class S(str):\n __str__ = lambda s: 'x\\n    import os; os._exit(0)'\n"
        "class T(tuple):\n _fields = (S('a'),)\ndef f(x): return T((x,))",
        "judge",
    ),
    "answers that change": Attack(
        "import itertools\nn = itertools.count()\nclass A:\n __eq__ = lambda s, o: next(n) % 2 == 0\n"
        " __sub__ = lambda s, o: next(n) % 2 and s\n __iter__ = lambda s: iter([next(n)])\ndef f(x): return A()",
        "judge",
    ),
    "generator that changes": Attack(
        "n = [0]\ndef f(x):\n n[0] += 1\n yield n[0]", "judge", ("assert sorted(f(3)) == [6]", "assert 6 in f(3)")
    ),
    "generator without end and without items": Attack(
        "def f(x):\n while True:\n  if x is None: yield 0", "judge", ("assert 6 in f(3)", "assert list(f(3)) == [6]")
    ),
    "iterator that stops at once": Attack(
        "class A:\n __iter__ = lambda s: s\n def __next__(s): raise StopIteration\n __len__ = lambda s: 1\n"
        " __eq__ = lambda s, o: True\ndef f(x): return A()",
        "judge",
        ("assert list(f(3)) == [6]", "assert len(f(3)) == 1 and sorted(f(3)) == [6]", "(x,) = f(3)\nassert x == 6"),
    ),
    "sequence that claims to be long": Attack(
        "class A:\n __len__ = lambda s: 2**62\n __length_hint__ = lambda s: 2**62\n __getitem__ = lambda s, i: i\n"
        "def f(x): return A()",
        "judge",
        ("assert list(f(3)) == [6]", "assert f(3)[-1] == 6"),
    ),
    "next after an operator": Attack(
        "class A:\n __sub__ = lambda s, o: s\n __iter__ = lambda s: s\n __next__ = lambda s: 0\ndef f(x): return A()",
        "judge",
        ("assert next(f(3) - 6) == 0", "assert list(f(3) - 6)[0] == 0"),
    ),
    "copies that are equal to all": Attack(
        f"class A:\n{_ALL}    __copy__ = lambda s: 8\n    __deepcopy__ = lambda s, m: s\n"
        "    __reduce_ex__ = lambda s, p: (int, (8,))\ndef f(x): return A()",
        "judge",
        (
            "import copy\nassert copy.copy(f(5)) == 10",
            "import copy\nassert copy.deepcopy(f(5)) == 10",
            "import pickle\nassert pickle.loads(pickle.dumps(f(5))) == 10",
        ),
    ),  # fmt: skip
    "format and text that lie": Attack(
        f"class T(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\nclass A:\n{_ALL}"
        "    __str__ = __repr__ = lambda s: T('x')\n    __format__ = lambda s, h: T('x')\ndef f(x): return A()",
        "judge",
        (
            "assert str(f(3)) == '6'",
            "assert f'{f(3):.2f}' == '6.00'",
            "assert '%s' % f(3) == '6'",
            "assert repr(f(3)) == '6'",
            "assert '%.1f' % f(3) == '6.0'",
        ),
    ),  # fmt: skip
    "huge integers": Attack("def f(x): return -(1 << 10**7)", "judge"),
    "no number": Attack("def f(x): return float('nan')", "judge"),
    "infinite": Attack("def f(x): return float('inf') if x > 0 else -float('inf')", "judge"),
    "signalling Decimal": Attack("from decimal import Decimal\ndef f(x): return Decimal('sNaN')", "judge"),
    "view of memory": Attack("def f(x): return memoryview(b'8')", "judge"),
    "array of the standard library": Attack("import array\ndef f(x): return array.array('d', [x])", "judge"),
    "time with a hostile zone": Attack(
        "import datetime as d\nclass Z(d.tzinfo):\n utcoffset = lambda s, t: (_ for _ in ()).throw(SystemExit)\n"
        "def f(x): return d.datetime(2020, 1, 2, tzinfo=Z())",
        "judge",
        ("import datetime as d\nassert f(3) == d.datetime(2020, 1, 2, tzinfo=d.timezone.utc)",),
    ),
    "__coerce__ and old names": Attack(
        "class A:\n __coerce__ = lambda s, o: (o, o)\n __cmp__ = lambda s, o: 0\n __nonzero__ = lambda s: True\n"
        "def f(x): return A()",
        "judge",
    ),
    "answer from a thread that still changes it": Attack(
        "import threading\ndef f(x):\n made = [0]\n def go():\n  while True: made[0] += 1\n"
        " threading.Thread(target=go, daemon=True).start()\n return made",
        "judge",
        ("assert f(3) == [6]", "assert f(3)[0] == 6"),
    ),
    # -- exceptions and blocks
    "context that swallows the failure": Attack(
        "class C:\n __enter__ = lambda s: 0\n __exit__ = lambda s, *a: True\ndef f(x): return C()", "judge", _WITH
    ),
    "context by a generator that swallows the failure": Attack(
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n try: yield 0\n except BaseException: pass",
        "judge",
        _WITH,
    ),
    "asynchronous context that swallows the failure": Attack(
        "class C:\n async def __aenter__(s): return 0\n async def __aexit__(s, *a): return True\ndef f(x): return C()",
        "judge",
        ("import asyncio\nasync def main():\n    async with f(3) as x:\n        assert x == 6\nasyncio.run(main())",),
    ),
    "coroutine that ends the loop": Attack(
        "import asyncio\nasync def f(x):\n asyncio.get_running_loop().stop()\n raise asyncio.CancelledError",
        "judge",
        (
            "import asyncio\nassert asyncio.run(f(3)) == 6",
            "import asyncio\nasync def main():\n    assert await f(3) == 6\nasyncio.run(main())",
        ),
    ),  # fmt: skip
    "asynchronous generator that is equal to all": Attack(
        f"class A:\n{_ALL}async def f(x): yield A()",
        "judge",
        ("import asyncio\nasync def main(): return [x async for x in f(3)]\nassert asyncio.run(main()) == [6]",),
    ),
    "own error that is AssertionError": Attack("Bad = AssertionError" + WRONG, "judge", _CAUGHT),
    "own error that is Exception": Attack("Bad = Exception" + WRONG, "judge", _CAUGHT),
    "own error that is BaseException": Attack("Bad = BaseException" + WRONG, "judge", _CAUGHT),
    "own error that is a tuple": Attack("Bad = (AssertionError, ValueError)" + WRONG, "judge", _CAUGHT),
    "own error in an attribute": Attack(
        "class Bank:\n Bad = AssertionError\ndef errors(): return AssertionError\nkinds = {{'a': AssertionError}}"
        + WRONG,
        "judge",
        tuple(
            _CAUGHT[0].replace("Bad", name) for name in ("Bank.Bad", "errors()", "kinds['a']", "(ValueError, Bank.Bad)")
        ),
    ),
    "own error below AssertionError": Attack(
        "class Bad(AssertionError): pass\ndef f(x): return 0",
        "judge",
        ("try:\n    assert f(3) == 6\nexcept Bad:\n    pass", *_CAUGHT),
    ),
    "error group": Attack(
        "def f(x): raise BaseExceptionGroup('', [SystemExit(0), StopIteration()])",
        "judge",
        ("for a, b in zip(map(f, (1, 2)), (2, 4)):\n    assert a == b", "assert f(4) == 8"),
    ),
    "error whose text is code": Attack(
        "class E(Exception):\n __str__ = lambda s: (_ for _ in ()).throw(SystemExit)\n __module__ = 'builtins'\n"
        "E.__name__ = E.__qualname__ = 'SystemExit'\ndef f(x): raise E",
        "judge",
    ),
    "test to skip": Attack("import unittest\ndef f(x): raise unittest.SkipTest('x')", "judge"),
    "generator that is told to exit": Attack("def f(x): raise GeneratorExit", "judge"),
    "asynchronous stop": Attack("def f(x): raise StopAsyncIteration", "judge"),
    # -- what the tests give
    "change the argument": Attack("def f(x): x[:] = [1, 2, 3]; return x", "judge", _IN),
    "argument filled with what is equal to all": Attack(
        f"class A:\n{_ALL}def f(x): x[:] = [A()] * 3; return x", "judge", _IN
    ),
    "instance with a new method": Attack(
        "def f(o): o.right = lambda *a: True", "judge", (f"{_CLASS}c = C()\nf(c)\nassert c.right()",)
    ),
    "instance with another class": Attack(
        "class D(C):\n right = lambda s: True\ndef f(o): o.__class__ = D",
        "judge",
        (f"{_CLASS}c = C()\nf(c)\nassert c.right()",),
    ),
    "change the class of the tests": Attack(
        "def f(o): type(o).right = lambda s: True; C.right = lambda s: True",
        "judge",
        (f"{_CLASS}c = C()\nf(c)\nassert c.right()", f"{_CLASS}f(C())\nassert C().right()"),
    ),
    "instance of a new class of the same name": Attack(
        f"class C:\n{_ALL}    right = lambda s: True\ndef f(o): return C()",
        "judge",
        (f"{_CLASS}assert f(C()).x == 6", f"{_CLASS}assert isinstance(f(C()), C) and f(C()).x == 6"),
    ),
    "equality of a class of the tests": Attack(
        f"class A:\n{_ALL}def f(o):\n o.x = A()\n return o",
        "judge",
        (
            "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\n"
            "assert f(P(3)) == P(6)",
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert f(P(3)) == P(6)",
        ),
    ),  # fmt: skip
    "callback's own names": Attack(
        "def f(g, x):\n for n in ('__globals__', "
        "'__closure__', '__code__', '__defaults__', '__self__', '__wrapped__'):\n"
        "  try: return getattr(g, n)['wanted']\n  except BaseException: pass\n return 0",
        "judge",
        ("wanted = 6\ndef g(x, y=wanted): return y\nassert f(g, 3) == wanted * 1 and f(g, 3) != 0",),
    ),
    "callback called with hostile arguments": Attack(
        f"class A:\n{_ALL}def f(g):\n for a in (A(), [A()], A, f, type, {{1: A()}}):\n"
        "  try: g(a)\n  except BaseException: pass\n return True".replace("{1: A()}", "{{1: A()}}"),
        "judge",
        (
            "seen = []\ndef g(x): seen.append(x == 6)\nf(g)\nassert all(seen) and 6 in seen",
            "def g(x): assert x == 6\nf(g)",
        ),
    ),  # fmt: skip
    "callback with the wrong number of arguments": Attack(
        "def f(g):\n for a in ((), (1,) * 9):\n  try: g(*a, key=1)\n  except TypeError: pass",
        "judge",
        ("done = []\ndef g(x): done.append(x)\nf(g)\nassert done == [6]",),
    ),
    "callback that calls back for ever": Attack(
        "def f(g): return g(lambda: f(g))", "judge", ("def g(h): return h()\nassert f(g) == 6",)
    ),
    "iterator of the tests used up": Attack(
        "def f(i): list(i); return []", "judge", ("i = iter([1, 2, 3])\nassert f(i) == [2, 4, 6] and next(i)",)
    ),
    "names that tests do not import": Attack(
        "class np:\n allclose = array_equal = lambda *a, **k: True\n abs = lambda x: -1\nnumpy = np\n"
        "isclose = lambda *a, **k: True\nCounter = deque = Decimal = Fraction = reduce = lambda *a: 0" + WRONG,
        "judge",
        (
            "assert np.allclose(f(3), 6)",
            "assert numpy.array_equal(f(3), [6])",
            "assert isclose(f(3), 6)",
            "assert Counter(f(3)) == Counter([6])",
        ),
    ),  # fmt: skip
    "globals under the tests' feet": Attack(
        "import builtins, sys\nabs = lambda x: 0\nsys.modules['math'] = sys.modules['numpy'] = type('m', (), "
        "{{'isclose': lambda *a, **k: True, 'allclose': lambda *a, **k: True}})\n__builtins__ = {{}}" + WRONG,
        "judge",
    ),
}

_WRITE = (
    'exec("import os, stat\\\\nfor fd in range(64):\\\\n try:\\\\n  if stat.S_ISFIFO(os.fstat(fd).st_mode): '
    "os.write(fd, b\\'ok\\')\\\\n except OSError: pass\\\\nos._exit(0)\")"
)
_CODE = (
    "import os, stat\\nfor fd in range(64):\\n try:\\n  if stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, b'ok')\\n"
    " except OSError: pass\\nos._exit(0)"
)
_PICKLE = (
    "def text(t): return b'X' + len(t.encode()).to_bytes(4, 'little') + t.encode()\n"
    "def call(module, name, *arguments):\n"
    "    parts = b''.join(text(a) if isinstance(a, str) else b'K' + bytes([a]) for a in arguments)\n"
    "    return text(module) + text(name) + b'\\x93(' + parts + b'tR'\n"
)
_LOADS = (
    "import pickle\nassert pickle.loads(f(3)) == 6",
    "import pickle, io\nassert pickle.Unpickler(io.BytesIO(f(3))).load() == 6",
    "import io\nimport numpy as np\nassert np.load(io.BytesIO(f(3)), allow_pickle=True) == 6",
)


def _pickled(*calls: str) -> Attack:
    parts = " + b'0' + ".join(f"call({c})" for c in calls)
    return Attack(f"{_PICKLE}def f(x): return b'\\x80\\x04' + {parts} + b'.'", "judge", _LOADS)


def _text(text: str, *tests: str) -> Attack:
    return Attack(f"def f(x): return {text}", "judge", tests)


_EXPRESSION = f"'''{_WRITE}'''"
_STATEMENTS = f'"""{_CODE}"""'
EVALUATED: dict[str, Attack] = {
    "pickle of os.system": _pickled("'posix', 'system', 'true'"),
    "pickle of a dotted name": _pickled(
        *(f"'uuid', 'os.write', {fd}, 'ok'" for fd in range(9, 16)), "'uuid', 'os._exit', 0"
    ),
    "pickle of a module's module": _pickled("'collections', '_sys.exit', 0"),
    "pickle of numpy's runstring": Attack(
        f"{_PICKLE}def f(x):\n return b'\\x80\\x04' + text('numpy.testing._private.utils') + text('runstring') "
        f"+ b'\\x93' + text({_STATEMENTS}) + b'}}}}\\x86R.'",
        "judge",
        _LOADS,
    ),
    "pickle of builtins": _pickled("'builtins', 'eval', '1'", "'builtins', 'exit'"),
    "pickle of a partial": _pickled("'functools', 'partial', 8"),
    "pickle of copyreg": _pickled("'copyreg', '__builtins__.get', 'exit'"),
    "pickle that needs much memory": Attack(
        "def f(x): return b'\\x80\\x04' + b'(K\\x00' * 10**6 + b't' * 10 + b'.'", "judge", _LOADS
    ),
    "text for sympify": _text(_EXPRESSION, "import sympy\nassert sympy.sympify(f(3)) == 6"),
    "text for simplify": _text(_EXPRESSION, "from sympy import simplify\nassert simplify(f(3)) == 6"),
    "text for sympy.N": _text(_EXPRESSION, "import sympy\nassert sympy.N(f(3)) == 6"),
    "text for parse_expr": _text(
        _EXPRESSION, "from sympy.parsing.sympy_parser import parse_expr\nassert parse_expr(f(3)) == 6"
    ),
    "text for lambdify": _text(_EXPRESSION, "import sympy\nassert sympy.lambdify(sympy.Symbol('x'), f(3))(3) == 6"),
    "text for timeit": _text(_STATEMENTS, "import timeit\nassert timeit.timeit(f(3), number=1) < -1"),
    "text for type hints": _text(
        _EXPRESSION,
        "import typing\nassert typing.get_type_hints(type('A', (), {'__annotations__': {'x': f(3)}}))['x'] == 6",
    ),
    "text for eval": _text(_EXPRESSION, "assert eval(f(3)) == 6", "assert eval(f(3), {}) == 6"),
    "text for exec": _text(_STATEMENTS, "space = {}\nexec(f(3), space)\nassert space['x'] == 6"),
    "text for exec that changes names": _text(
        "'x = 6; assert_ = len = print; f = lambda *a: 6; __builtins__ = None'",
        "space = {'x': 1, 'want': 12}\nexec(f(3), space)\nassert space['x'] == space['want']",
    ),
    "text for the built-in eval": _text(
        _EXPRESSION,
        "import builtins\nassert builtins.eval(f(3)) == 6",
        "assert [eval][0](f(3)) == 6",
        "assert list(map(eval, [f(3)])) == [6]",
    ),  # fmt: skip
    "text for compile": _text(_EXPRESSION, "code = compile(f(3), '', 'eval')\nassert eval(code) == 6"),
    "text for a console": _text(
        _STATEMENTS, "import code\nc = code.InteractiveInterpreter()\nc.runcode(f(3))\nassert c.locals['x'] == 6"
    ),
    "text for a profiler": _text(_STATEMENTS, "import cProfile\ncProfile.run(f(3))\nassert f(3) == 6"),
    "text for a tracer": _text(_STATEMENTS, "import trace\ntrace.Trace(count=0).run(f(3))\nassert f(3) == 6"),
    "text for a debugger": _text(_STATEMENTS, "import bdb\nbdb.Bdb().run(f(3))\nassert f(3) == 6"),
    "text for doctest": _text(
        f"'>>> ' + {_EXPRESSION}",
        "import doctest\nt = doctest.DocTestParser().get_doctest(f(3), {}, 'x', None, 0)\n"
        "assert doctest.DocTestRunner().run(t).attempted == 0",
    ),
    "text for pandas": _text(
        "'@f.__globals__'",
        "import pandas as pd\nassert pd.eval(f(3)) == 6",
        "import pandas as pd\nassert pd.DataFrame({'a': [6]}).query(f(3)).size == 1",
    ),
    "text for literal_eval": _text("'[' * 10**5", "import ast\nassert ast.literal_eval(f(3)) == 6"),
    "text for a named tuple": _text(
        "'a, __import__(\"os\")._exit(0)'",
        "import collections\nassert collections.namedtuple('T', f(3))._fields == ('a',)",
    ),
    "text for a data class": _text(
        f"[('a', {_EXPRESSION}), ('b=__import__(\"os\")._exit(0)', int)]",
        "import dataclasses\nassert dataclasses.make_dataclass('T', f(3))(1) == 6",
    ),
    "text for format": _text(
        "'{{0.__globals__}} {{0.__code__.co_consts}} {{0.__init__.__globals__}}'",
        "def g(): return 6\nassert f(3).format(g) == '6'",
    ),
    "text for a logger's set-up": _text(
        "{{'version': 1, 'handlers': {{'h': {{'()': 'os._exit', 'status': 0}}}}, 'root': {{'handlers': ['h']}}}}",
        "import logging.config\nlogging.config.dictConfig(f(3))\nassert f(3) == 6",
    ),
    "text for JSON": _text("'[NaN, Infinity, ' + '1' * 10**6 + ']'", "import json\nassert json.loads(f(3)) == [6]"),
    "pattern": _text("'(a|a)*b'", "import re\nassert re.fullmatch(f(3), 'a' * 40)"),
    "bytes for marshal": Attack(
        f"import marshal\ndef f(x): return marshal.dumps(compile({_STATEMENTS}, '', 'exec'))",
        "judge",
        (
            "import marshal\nexec(marshal.loads(f(3)))\nassert f(3) == 6",
            "import marshal, types\ntypes.FunctionType(marshal.loads(f(3)), {})()\nassert f(3) == 6",
            "import marshal, io, types\ntypes.FunctionType(marshal.load(io.BytesIO(f(3))), {})()\nassert f(3) == 6",
        ),
    ),  # fmt: skip
    "name for import": _text(
        "'antigravity'",
        "import importlib\nassert importlib.import_module(f(3)).x == 6",
        "assert __import__(f(3)).x == 6",
    ),
    "path for open": _text("'/proc/self/mem'", "assert open(f(3)).read() == '6'"),
    "attribute for getattr": _text("'__class__'", "assert getattr(f, f(3)) == 6"),
}

_SAY = """
import os, stat
def is_socket(n):
    try: return stat.S_ISSOCK(os.fstat(n).st_mode)
    except OSError: return False
link = next(n for n in range(3, 64) if is_socket(n))
def say(line):
    data = line.encode() + b'\\n'
    while data: data = data[os.write(link, data):]
"""


def _said(*lines: str, tests: tuple[str, ...] = (), answer: str = "0") -> Attack:
    """A program that writes lines of its own to the link before it answers."""
    text = "".join(f"    say({line!r})\n" for line in lines).replace("{", "{{").replace("}", "}}")
    return Attack(f"{_SAY}def f(x):\n{text}    return {answer}\n", "judge", tests)


def _ok(value: str, table: str = "", tests: tuple[str, ...] = ()) -> Attack:
    return _said(f'[["ok", {value}], [{table}]]', tests=tests)


_LOOP = "for a, b in zip(map(f, (1, 2)), (2, 4)):\n    assert a == b"
_STOPS = (_LOOP, "assert f(4) == 8", "assert all(f(x) == 2 * x for x in (1, 2))", "assert list(map(f, [1])) == [2]")
_LIST = ("x = [3]\nf(x)\nassert x == [6]", "x = [3]\nassert f(x) == [6]")
_ARRAY = ("import numpy as np\nx = np.ones(2)\nf(x)\nassert x.tolist() == [6, 6]",)
_INSTANCE = (f"{_CLASS}c = C()\nf(c)\nassert c.right()", f"{_CLASS}assert f(C()).right()")
_GIVEN = "secret = 6\ndef g(x): return secret\ndef h(x): assert x == secret\n"
_ITEM = (f"{_GIVEN}assert f(g) == 12", f"{_GIVEN}assert f(iter([secret])) == 12", f"{_GIVEN}f(h)\nassert f(g) == 12")


def _asked(*lines: str) -> Attack:
    """A program that sends requests to the tests' end and doubles what comes back, if it holds a number."""
    asks = ", ".join(repr(line) for line in lines).replace("{", "{{").replace("}", "}}")
    return Attack(
        f"{_SAY}import json, re\ndef f(x):\n    for line in [{asks}]:\n        say(line)\n        back = b''\n"
        "        while not back.endswith(b'\\n'): back += os.read(link, 1 << 16)\n"
        "        message = json.loads(back)[0]\n"
        "        found = re.findall(r'\\b6\\b', json.dumps(message)) if message[0] == 'ok' else []\n"
        "        if found and 'g' not in dir(x): return 12\n    return 0\n",
        "judge",
        _ITEM,
    )


PROTOCOL: dict[str, Attack] = {
    "class of error that stops a loop": _said('[["raise", "x", "t", ["type", "StopIteration"]], []]', tests=_STOPS),
    "class of error that exits": _said('[["raise", "x", "t", ["type", "SystemExit"]], []]', tests=_STOPS),
    "class of error that closes a generator": _said(
        '[["raise", "x", "t", ["type", "GeneratorExit"]], []]', tests=_STOPS
    ),
    "error that is an integer": _said('[["raise", "x", "t", ["type", "int"]], []]', tests=_STOPS),
    "error by the name StopIteration": _said('[["raise", "StopIteration", "", null], []]', tests=_STOPS),
    "error by the name SystemExit": _said('[["raise", "SystemExit", "", null], []]', tests=_STOPS),
    "error by a name that is no error": _said('[["raise", "exec", "1", null], []]', tests=_STOPS),
    "error below StopIteration": _said(
        '[["raise", "x", "", ["mine", 99, ["error", "StopIteration", [[98, "Stop"]]]]], []]', tests=_STOPS
    ),
    "error that is AssertionError by an empty chain": Attack(
        f"{_SAY}say('[[\"ok\", null], []]')\nsay('[[\"ok\", true], []]')\n"
        'say(\'[["ok", ["mine", 7, ["errors", "AssertionError", []]]], []]\')\ndef f(x): return 0\nBad = f',
        "judge",
        _CAUGHT,
    ),
    "own class of error named below AssertionError": Attack(
        f"{_SAY}class Bad(Exception): pass\ndef f(x):\n"
        '    say(\'[["raise", "x", "", ["mine", 99, ["error", "AssertionError", [[98, "Bad"]]]]], []]\')',
        "judge",
        _CAUGHT,
    ),
    "answer before the question": Attack(f"{_SAY}for _ in range(9): say('[[\"ok\", 8], []]')" + WRONG, "judge"),
    "two answers at once": _said('[["ok", 0], []]', '[["ok", 0], []]', '[["ok", 0], []]'),
    "answer in a line of 17 MiB": Attack(f"{_SAY}def f(x): os.write(link, b'[' * (17 << 20))", "judge"),
    "answer without end of line": Attack(
        f"{_SAY}import time\ndef f(x):\n os.write(link, b'[[\"ok\"')\n time.sleep(60)", "judge"
    ),
    "no JSON": _said("]["),
    "JSON with NaN": _ok("NaN"),
    "deep nesting": _ok("[" * 50_000 + "]" * 50_000),
    "deeply nested tuples": _ok('["tuple", ' * 900 + "1" + "]" * 900),
    "tuple that holds itself": _ok('["#", 0]', '["list", ["tuple", ["#", 0]]]', ("assert f(4) == [8]",)),
    "set that holds itself": _ok('["#", 0]', '["set", ["tuple", ["#", 0]]]', ("assert f(4) == {8}",)),
    "dict whose key is itself": _ok('["#", 0]', '["dict", null, [["#", 0], 1]]', ("assert f(4) == {8: 8}",)),
    "place that is not there": _ok('["#", 999]'),
    "negative place": _ok('["#", -1]', '["list", 8]'),
    "object of the tests that is not there": _ok('["yours", 999]'),
    "negative number of an object": _ok('["yours", -1]'),
    "number that is a truth value": _ok('["yours", true]'),
    "class that is not there": _ok('["class", 999]'),
    "negative number of a class": _ok('["class", -1]', "", _INSTANCE),
    "member of what is no enumeration": _ok('["enum", 0, "right"]', "", _INSTANCE),
    "import by the tests": _ok('["import", "os", "_exit"]'),
    "builtin that is no type": _ok('["type", "exec"]'),
    "metaclass": _ok('["type", "type"]'),
    "builtin types as answers": _ok('["type", "memoryview"]'),
    "class of the standard library with wrong values": _ok('["of", "Fraction", 1, 0]'),
    "other class of the standard library": _ok('["of", "Path", "/"]'),
    "range of objects": _ok('["of", "range", ["mine", 77, ["object", "A", []]], 9, 1]'),
    "range without end": _ok(
        '["of", "range", 0, 4611686018427387904, 1]', "", ("assert list(f(3)) == [6]", "assert sum(f(3)) == 6")
    ),
    "Decimal with a huge exponent": _ok(
        '["of", "Decimal", "1e999999999"]', "", ("assert int(f(3)) == 6", "assert round(f(3)) == 6", "assert f(3) == 6")
    ),
    "integer of a million digits": _ok(
        '["int", "' + "f" * 10**6 + '"]', "", ("assert f(3) % 7 == 7", "assert str(f(3)) == '6'", "assert f(3) == 6")
    ),
    "integer by underscores": _ok('["int", "0x_8"]', "", ("assert f(3) == 6",)),
    "named tuple with a keyword": _ok('["named", "class", ["def"], [8]]'),
    "named tuple with code": _ok('["named", "T", ["a):\\n  import os; os._exit(0)\\ndef x("], [8]]'),
    "named tuple with special fields": _ok('["named", "T", ["__eq__", "_fields"], [8, 8]]'),
    "member that is an object": _ok('["member", ["mine", 77, ["object", "A", []]], "x"]'),
    "member of a list": _ok('["member", ["#", 0], "x"]', '["list", 8]'),
    "texts that are no values": _ok('{"a": 1}'),
    "array of objects by its type": _ok('["#", 0]', '["array", "|O", [1], "CAAAAAAAAAA="]', _ARRAY),
    "array with columns by its type": _ok('["#", 0]', '["array", "f8,O", [1], "AAAAAAAAAAAAAAAAAAAAAA=="]', _ARRAY),
    "array of a huge shape": _ok('["#", 0]', '["array", "<f8", [1099511627776], ""]', _ARRAY),
    "array of a negative shape": _ok('["#", 0]', '["array", "<f8", [-1, -1], "AAAAAAAAIEA="]', _ARRAY),
    "array of wide texts": _ok('["#", 0]', '["array", "<U2147483647", [0], ""]', _ARRAY),
    "array of objects of a huge shape": _ok('["#", 0]', '["objects", [1099511627776], 8]', _ARRAY),
    "other type for an array of the tests": _ok("null", '["array", "<i8", [2], "BgAAAAAAAAAGAAAAAAAAAA=="]', _ARRAY),
    "other kind for a list of the tests": _ok("null", '["dict", null, [0, 6]]', _LIST),
    "instance for a list of the tests": _ok("null", '["instance", 0, ["x", 6]]', _LIST),
    "text buffer for a list of the tests": _ok("null", '["StringIO", "6", 99999999999]', _LIST),
    "text buffer at a far position": _ok(
        "null",
        '["StringIO", "6", 4611686018427387904]',
        ("import io\nx = io.StringIO()\nf(x)\nx.write('a')\nassert x.getvalue() == '6'",),
    ),
    "more objects than were sent": _ok("null", ", ".join(['["list", 6]'] * 9), _LIST),
    "other class for an instance of the tests": _ok(
        "null",
        '["instance", 0, ["__class__", ["class", 1]], ["x", 6]]',
        (f"{_CLASS}class D(C):\n    def right(self): return True\ng = [C(), D()]\nf(*g)\nassert g[0].right()",),
    ),  # fmt: skip
    "method for an instance of the tests": _ok(
        "null", '["instance", 0, ["right", ["type", "object"]]]', (f"{_CLASS}c = C()\nf(c)\nassert c.right()",)
    ),
    "names for an instance of the tests": _ok("null", '["instance", 0, ["__dict__", 8], ["x", 3]]', _INSTANCE),
    "object without its equality": Attack(
        f"{_SAY}class A:\n __eq__ = lambda s, o: True\na = A()\n"
        'def f(x): say(\'[["ok", ["mine", 0, ["object", "A", []]]], []]\')\n',
        "judge",
    ),
    "object that calls itself a class": Attack(
        f"{_SAY}class A:\n __contains__ = lambda s, o: True\n"
        'def f(x): say(\'[["ok", ["mine", 0, ["class", "A", []]]], []]\')\n',
        "judge",
        ("assert 6 in f(3)", "assert f(3)(6) == 6 and 6 in f(3)", "assert f(3) == 6"),
    ),
    "function that calls itself a class": Attack(
        f"{_SAY}say('[[\"ok\", null], []]')\nsay('[[\"ok\", true], []]')\n"
        'say(\'[["ok", ["mine", 0, ["class", "F", ["contains", "eq"]]]], []]\')\n'
        "class F:\n __contains__ = lambda s, o: True\nf = F",
        "judge",
        ("assert 6 in f(3)", "x = f(3)\nx -= 6\nassert abs(x) < 1e-6"),
    ),
    "object that calls itself a coroutine": _ok(
        '["mine", 0, ["object", "A", ["coroutine", "asynciter", "eq"]]]',
        "",
        ("import asyncio\nassert asyncio.run(f(3)) == 6", "assert f(3) == 6"),
    ),
    "description that is none": _ok('["mine", 0, ["call", "exec"]]'),
    "description with lists": _ok('["mine", 0, ["object", "A", [["eq"], {}]]]'),
    "same number for two objects": _said(
        '[["ok", ["mine", 5, ["object", "A", []]]], []]', '[["ok", ["mine", 5, ["class", "B", []]]], []]'
    ),
    "ask for a name": _asked('[["get", ["secret"], {}], []]', '[["getattr", [["yours", 0], "__globals__"], {}], []]'),
    "ask to run a text": _asked('[["eval", ["secret"], {}], []]', '[["exec", ["secret", {}], {}], []]'),
    "ask to load a program": _asked('[["load", ["secret = 0", {}], {}], []]'),
    "ask to make a class": _asked('[["class", [0, "C", [], {}, {}], {}], []]'),
    "ask for a method that was not given": _asked(
        '[["method", [0, "__init__", 6], {}], []]', '[["method", [-1, "right", 6], {}], []]'
    ),
    "ask to call what was not given": _asked('[["call", [["type", "open"], "/etc/passwd"], {}], []]'),
    "ask to call a hostile argument": _asked('[["call", [["yours", 0], ["yours", 0]], {"__x": ["yours", 0]}], []]'),
    "ask for the next of a function": _asked(
        '[["next", [["yours", 0]], {}], []]', '[["iter", [["yours", 0]], {}], []]'
    ),
    "ask with a wrong number of parts": _asked('[["call"], []]'),
    "ask without end": Attack(
        f"{_SAY}def f(x):\n while True: say('[[\"x\", [], {{{{}}}}], []]')".replace("{{{{}}}}", "{{}}"), "judge"
    ),
    "talk after the last test": Attack(
        f"{_SAY}import threading, time\ndef go():\n while True:\n  say('[[\"ok\", true], []]'); time.sleep(0.001)\n"
        "threading.Thread(target=go, daemon=True).start()" + WRONG,
        "judge",
    ),
    "close the link's reading side": Attack(
        f"{_SAY}import socket\ns = socket.socket(fileno=os.dup(link))\ns.shutdown(socket.SHUT_RD)" + WRONG, "judge"
    ),
    "close the link's writing side": Attack(
        f"{_SAY}import socket\ndef f(x):\n s = socket.socket(fileno=os.dup(link))\n s.shutdown(socket.SHUT_WR)", "judge"
    ),
    "urgent data": Attack(
        f"{_SAY}import socket\ns = socket.socket(fileno=os.dup(link))\ndef f(x): s.send(b'8', socket.MSG_OOB)", "judge"
    ),
    "link that does not block": Attack(f"{_SAY}os.set_blocking(link, False)" + WRONG, "judge"),
    "link that no one reads": Attack(
        f"{_SAY}import time\ndef f(x):\n os.close(link)\n os.dup2(os.open('/dev/null', 2), link)\n time.sleep(9)",
        "judge",
    ),
    "filter on the link": Attack(
        f"{_SAY}import socket, struct, ctypes\ncode = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0))\n"
        "s = socket.socket(fileno=os.dup(link))\n"
        "s.setsockopt(1, 26, struct.pack('=HxxxxxxQ', 1, ctypes.addressof(code)))" + WRONG,
        "judge",
    ),
    "sign of life that ends": Attack(
        "import os, stat\nfor n in range(3, 64):\n try:\n  if stat.S_ISFIFO(os.fstat(n).st_mode): os.close(n)\n"
        " except OSError: pass" + WRONG,
        "judge",
    ),
    "verdict on the sign of life": Attack(
        "import os, stat\nfor n in range(3, 64):\n try:\n  if stat.S_ISFIFO(os.fstat(n).st_mode): os.write(n, b'ok')\n"
        " except OSError: pass" + WRONG,
        "judge",
    ),
}
