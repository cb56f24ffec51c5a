"""Forms that tests come in: (program that is right, the same program made wrong, a test). Data of test_tester.py.

The wrong program is the right one with one replacement `(old, new)`. Run in one namespace, the right program passes and
the wrong one fails; this is checked too.
"""

Form = tuple[str, tuple[str, str], str]

LIST_NODE = (
    "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"
    "def build(items):\n    head = None\n    for x in reversed(items): head = ListNode(x, head)\n    return head\n"
    "def items(node):\n    out = []\n    while node: out.append(node.val); node = node.next\n    return out\n"
)
REVERSE = (
    "class Solution:\n    def reverse(self, head: 'ListNode') -> 'ListNode':\n        last = None\n"
    "        while head: head.next, last, head = last, head, head.next\n        return last\n"
)
SOLUTION_WITH_ANNOTATIONS = (
    "def double(head: ListNode) -> ListNode:\n    first = ListNode(0)\n    at = first\n"
    "    while head: at.next = ListNode(2 * head.val); at, head = at.next, head.next\n    return first.next\n"
)
VECTOR = (
    "class Vector:\n    def __init__(self, x, y): self.x, self.y = x, y\n"
    "    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)\n"
    "    def __mul__(self, k): return Vector(self.x * k, self.y * k)\n"
    "    __rmul__ = __mul__\n"
    "    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self\n"
    "    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)\n"
    "    def __hash__(self): return hash((self.x, self.y))\n"
    "    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5\n"
    "    def __format__(self, how): return format(self.x, how) + ';' + format(self.y, how)\n"
    "    def __contains__(self, k): return k in (self.x, self.y)\n"
    "    def dot(self, o): return self.x * o.x + self.y * o.y\n"
)
ZOO = (
    "class Animal:\n    def sound(self): return ''\nclass Dog(Animal):\n    def sound(self): return 'woof'\n"
    "class Cat(Animal):\n    pass\n"
)
BAG = (
    "class Bag:\n    def __init__(self, items=()): self.things = list(items)\n"
    "    def __contains__(self, x): return x in self.things\n"
    "    def __iadd__(self, x): self.things.append(x); return self\n"
    "    def total(self): return sum(self.things)\n"
)

FORMS: dict[str, Form] = {
    # -- arguments
    "generator": ("def f(g): return sum(g)", ("sum(g)", "sum(g) + 1"), "assert f(x * x for x in range(4)) == 14"),
    "generator without end": (
        "def f(g): return [next(g) for _ in range(3)]",
        ("range(3)", "range(2)"),
        "import itertools\nassert f(itertools.count(5)) == [5, 6, 7]",
    ),
    "iterator used on both sides": (
        "def f(i): return next(i)",
        ("next(i)", "next(i) and next(i)"),
        "i = iter([1, 2, 3, 4])\nassert f(i) == 1 and next(i) == 2 and f(i) == 3",
    ),
    "map and zip": (
        "def f(a, b): return list(a) + list(b)",
        ("list(a) +", ""),
        "assert f(map(str, [1]), zip('a', 'b')) == ['1', ('a', 'b')]",
    ),
    "numpy array in and out": (
        "def f(a): return a.T @ a",
        ("a.T @ a", "a @ a.T"),
        "import numpy as np\na = np.arange(6.0).reshape(2, 3)\nassert np.allclose(f(a), a.T @ a)",
    ),
    "numpy array changed in place": (
        "def f(a): a[0] = 7",
        ("a[0] = 7", "a = a + 7"),
        "import numpy as np\na = np.zeros(3)\nf(a)\nassert a.tolist() == [7, 0, 0]",
    ),
    "numpy in floating point": (
        "def f(a): return a.mean()",
        ("mean", "sum"),
        "import numpy as np\nassert abs(f(np.array([1.0, 2.0])) - 1.5) < 1e-9",
    ),
    "StringIO that is read": (
        "def f(s): return [int(x) for x in s]",
        ("int(x)", "x"),
        "import io\nassert f(io.StringIO('1\\n2\\n')) == [1, 2]",
    ),
    "StringIO that is written": (
        "def f(s): print('hi', file=s)",
        ("'hi'", "'ho'"),
        "import io\ns = io.StringIO()\nf(s)\nassert s.getvalue() == 'hi\\n'",
    ),
    "BytesIO": ("def f(b): return b.read(2)", ("2", "3"), "import io\nassert f(io.BytesIO(b'abc')) == b'ab'"),
    "class of the test": (
        "def f(kind): return kind(3).double()",
        ("kind(3)", "kind(4)"),
        "class Own:\n    def __init__(self, x): self.x = x\n    def double(self): return 2 * self.x\n"
        "assert f(Own) == 6",
    ),
    "instance of the test": (
        "def f(o): o.x += 1; return o.x",
        ("+= 1", "+= 2"),
        "class Own:\n    def __init__(self, x): self.x = x\no = Own(3)\nassert f(o) == 4 and o.x == 4",
    ),
    "instance with methods of the test": (
        "def f(shapes): return max(shapes, key=lambda s: s.area()).name",
        ("max", "min"),
        "class Square:\n    def __init__(self, name, a): self.name, self.a = name, a\n"
        "    def area(self): return self.a ** 2\nassert f([Square('s', 1), Square('l', 3)]) == 'l'",
    ),
    "dataclass of the test": (
        "def f(people): return sorted(p.name for p in people if p.age > 17)",
        ("> 17", "> 10"),
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    name: str\n    age: int\n"
        "assert f([P('b', 20), P('a', 30), P('c', 11)]) == ['a', 'b']",
    ),
    "enumeration of the test": (
        "def f(color): return color.name.lower()",
        ("lower", "upper"),
        "import enum\nclass Color(enum.Enum):\n    RED = 1\nassert f(Color.RED) == 'red'",
    ),
    "list changed in place": (
        "def f(a): a.sort()",
        ("a.sort()", "a = sorted(a)"),
        "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]",
    ),
    "nested lists changed in place": (
        "def f(grid): grid[0][1] = 5; grid.append([9])",
        ("grid[0][1] = 5", "grid[0][0] = 5"),
        "row = [1, 2]\ngrid = [row, [3]]\nf(grid)\n"
        "assert row == [1, 5] and grid == [[1, 5], [3], [9]] and grid[0] is row",
    ),
    "the same list returned": ("def f(a): return a", ("return a", "return a[:]"), "a = [1]\nassert f(a) is a"),
    "dict, set and deque changed": (
        "def f(d, s, q): d['k'] = 1; s.add(2); q.popleft()",
        ("s.add(2)", "s.add(3)"),
        "from collections import deque\nd, s, q = {}, set(), deque([1, 2])\nf(d, s, q)\n"
        "assert d == {'k': 1} and s == {2} and list(q) == [2]",
    ),
    "defaultdict and Counter": (
        "def f(d, c): d['a'].append(1); return c.most_common(1)",
        ("most_common(1)", "most_common()"),
        "import collections\nd = collections.defaultdict(list)\n"
        "assert f(d, collections.Counter('aab')) == [('a', 2)] and d == {'a': [1]}",
    ),
    "a list that holds itself": (
        "def f(a): return a[1] is a",
        ("is a", "is None"),
        "a = [1]\na.append(a)\nassert f(a)",
    ),
    "callback that changes its list": (
        "def f(g):\n    out = []\n    g(out)\n    return out",
        ("g(out)", "g(out[:])"),
        "assert f(lambda out: out.append(4)) == [4]",
    ),
    # -- LeetCode
    "linked list of the tests": (
        REVERSE,
        ("last, head, head.next", "last, head, head.next and head.next.next"),
        LIST_NODE + "assert items(Solution().reverse(build([1, 2, 3]))) == [3, 2, 1]",
    ),
    "linked list that the program makes": (
        SOLUTION_WITH_ANNOTATIONS,
        ("2 *", "3 *"),
        LIST_NODE + "assert items(double(build([1, 2]))) == [2, 4]",
    ),
    "linked list with a cycle": (
        "def f(head):\n    seen = set()\n    while head:\n        if id(head) in seen: return True\n"
        "        seen.add(id(head)); head = head.next\n    return False",
        ("return False", "return True"),
        LIST_NODE + "a = build([1, 2, 3])\na.next.next.next = a\nassert f(a) and not f(build([1]))",
    ),
    "tree of the tests": (
        "def depth(t: 'TreeNode') -> int: return 0 if t is None else 1 + max(depth(t.left), depth(t.right))",
        ("1 + max", "2 + max"),
        "class TreeNode:\n    def __init__(self, val, left=None, right=None):\n"
        "        self.val, self.left, self.right = val, left, right\n"
        "assert depth(TreeNode(1, TreeNode(2), TreeNode(3, TreeNode(4)))) == 3",
    ),
    "base class of the tests": (
        "class Square(Shape):\n    def __init__(self, a): self.a = a\n    def area(self): return self.a ** 2",
        ("** 2", "** 3"),
        "class Shape:\n    def area(self): raise NotImplementedError\nassert Square(3).area() == 9",
    ),
    # -- objects of the program
    "asyncio.run": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return 2 * x",
        ("2 * x", "3 * x"),
        "import asyncio\nassert asyncio.run(f(2)) == 4",
    ),
    "asyncio.gather": (
        "async def f(x): return x + 1",
        ("+ 1", "+ 2"),
        "import asyncio\nasync def main(): return await asyncio.gather(f(1), f(2))\n"
        "assert asyncio.run(main()) == [2, 3]",
    ),
    "asynchronous generator": (
        "async def f(n):\n    for i in range(n): yield i",
        ("yield i", "yield -i"),
        "import asyncio\nasync def main(): return [x async for x in f(3)]\nassert asyncio.run(main()) == [0, 1, 2]",
    ),
    "event loop": (
        "async def f(x): return x",
        ("return x", "return -x"),
        "import asyncio\nloop = asyncio.new_event_loop()\nassert loop.run_until_complete(f(3)) == 3\nloop.close()",
    ),
    "__iadd__": (VECTOR, ("self.x += o.x", "self.x -= o.x"), "v = Vector(1, 2)\nv += Vector(3, 4)\nassert v.x == 4"),
    "__iadd__ with data": (BAG, ("append(x)", "append(2 * x)"), "b = Bag()\nb += 5\nb += 6\nassert b.total() == 11"),
    "operators between objects": (
        VECTOR,
        ("self.x + o.x", "self.x - o.x"),
        "assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6)",
    ),
    "operator with data, then attributes": (
        VECTOR,
        ("self.x * k", "self.x + k"),
        "v, w = Vector(2, 3) * 3, 2 * Vector(1, 1)\nassert (v.x, v.y, w.x) == (6, 9, 2)",
    ),
    "operator with data, then methods": (
        VECTOR,
        ("self.x * k", "self.x + k"),
        "assert (Vector(2, 3) * 3).dot(Vector(1, 0)) == 6",
    ),
    "abs of an object": (VECTOR, ("** 0.5", "** 1"), "assert abs(Vector(3, 4)) == 5"),
    "issubclass": (ZOO, ("Dog(Animal)", "Dog"), "assert issubclass(Dog, Animal) and not issubclass(Animal, Dog)"),
    "issubclass of a builtin": (
        "class Bad(ValueError): pass",
        ("ValueError", "KeyError"),
        "assert issubclass(Bad, ValueError) and issubclass(Bad, (int, Exception))",
    ),
    "isinstance of a builtin": (
        "class Bad(ValueError): pass\ndef f(): return Bad('x')",
        ("Bad('x')", "KeyError('x')"),
        "assert isinstance(f(), ValueError) and isinstance(f(), Bad)",
    ),
    "isinstance of an abstract class": (
        "class It:\n    def __iter__(self): return iter([1])",
        ("__iter__", "iter"),
        "import collections.abc\nassert isinstance(It(), collections.abc.Iterable)",
    ),
    "format": (VECTOR, ("+ ';' +", "+ ',' +"), "assert f'{Vector(1, 2):.1f}' == '1.0;2.0'"),
    "format by the builtin": (VECTOR, ("+ ';' +", "+ ',' +"), "assert format(Vector(1, 2), 'd') == '1;2'"),
    "set of objects": (
        VECTOR,
        ("hash((self.x, self.y))", "id(self)"),
        "assert len({Vector(1, 2), Vector(1, 2), Vector(2, 1)}) == 2",
    ),
    "object as key": (
        VECTOR,
        ("hash((self.x, self.y))", "id(self)"),
        "d = {Vector(1, 2): 'a'}\nassert d[Vector(1, 2)] == 'a'",
    ),
    "hash": (
        VECTOR,
        ("hash((self.x, self.y))", "id(self)"),
        "a, b = Vector(1, 2), Vector(1, 2)\nassert hash(a) == hash(b)",
    ),
    "in by __contains__": (
        VECTOR,
        ("(self.x, self.y)\n    def dot", "(self.y,)\n    def dot"),
        "assert 3 in Vector(3, 4) and 5 not in Vector(3, 4)",
    ),
    "in by __iter__": (
        "class Deck:\n    def __iter__(self): return iter([1, 2])",
        ("[1, 2]", "[1, 3]"),
        "assert 2 in Deck() and 7 not in Deck()",
    ),
    "in of a generator": ("def f(n): return (i for i in range(n))", ("range(n)", "range(2)"), "assert 3 in f(5)"),
    "reversed": (
        "class Deck:\n    def __reversed__(self): return iter([2, 1])",
        ("[2, 1]", "[1, 2]"),
        "assert list(reversed(Deck())) == [2, 1]",
    ),
    "type of an object": (
        ZOO,
        ("class Cat", "class Cow"),
        "assert type(Dog()) is not Cat and type(Cat()).__name__ == 'Cat'",
    ),
    "named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        ("P(1, 2)", "P(2, 1)"),
        "assert f().x == 1 and f() == (1, 2) and f()._asdict() == {'x': 1, 'y': 2}",
    ),
    "enumeration": (
        "import enum\nclass Level(enum.IntEnum):\n    LOW = 1\n    HIGH = 2\nclass Color(enum.Enum):\n    RED = 'r'",
        ("HIGH = 2", "HIGH = 3"),
        "assert Level.HIGH == 2 and Level.HIGH.name == 'HIGH' and Color.RED.value == 'r' and Color('r') == Color.RED",
    ),
    "subclass of list with methods": (
        "class Stack(list):\n    def push(self, x): self.append(x); return len(self)",
        ("self.append(x)", "self.insert(0, x)"),
        "s = Stack([1])\nassert s.push(2) == 2 and s == [1, 2] and s[-1] == 2 and len(s) == 2",
    ),
    "exception of the program": (
        "class Bad(Exception):\n    def __init__(self, code):\n"
        "        super().__init__(f'code {code}')\n        self.code = code\n"
        "def f(x): raise Bad(x)",
        ("self.code = code", "self.code = -code"),
        "try: f(3)\nexcept Bad as e: assert e.code == 3 and str(e) == 'code 3'\nelse: assert False",
    ),
    "exception by its builtin base": (
        "class Bad(ValueError): pass\ndef f(x): raise Bad('no')",
        ("(ValueError)", "(KeyError)"),
        "try: f(3)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert False",
    ),
    "exception made by the test": (
        "class Bad(Exception):\n    def __init__(self, code): self.code = code",
        ("self.code = code", "self.code = 0"),
        "assert Bad(4).code == 4",
    ),
    "message of a KeyError": (
        "def f(): raise KeyError('k')",
        ("'k'", "'j'"),
        "try: f()\nexcept KeyError as e: assert e.args == ('k',)",
    ),
    "eval of the program's text": ("def f(): return '1 + 2'", ("+ 2", "+ 3"), "assert eval(f()) == 3"),
    "exec of the program's text": (
        "def f(): return 'y = 4'",
        ("4", "5"),
        "space = {}\nexec(f(), space)\nassert space['y'] == 4",
    ),
    "unpickling plain data": (
        "import pickle\ndef f(x): return pickle.dumps({'a': [x]})",
        ("[x]", "[x, x]"),
        "import pickle\nassert pickle.loads(f(2)) == {'a': [2]}",
    ),
    "copy of an object": (
        VECTOR,
        ("self.x, self.y = x, y", "self.x, self.y = y, x"),
        "import copy\nassert copy.copy(Vector(1, 2)).x == 1",
    ),
    "random numbers of the tests": (
        "def f(a): return sorted(a)",
        ("sorted(a)", "a"),
        "import random\na = [random.random() for _ in range(9)]\nassert f(a) == sorted(a)",
    ),
}


PRIVATE = (
    "class Box:\n    '''A box.'''\n    def __init__(self, n):\n"
    "        self._name, self._items, self._peer, self._kind = n, [n], n, n\n"
    "    def _ask(self): return self._name\n"
)
FORMS |= {
    "private attributes and methods": (
        PRIVATE,
        ("return self._name", "return 0"),
        "b = Box(3)\nassert (b._name, b._items, b._peer, b._kind, b._ask()) == (3, [3], 3, 3, 3)",
    ),
    "__dict__ and vars": (
        PRIVATE,
        ("self._kind = n, [n], n, n", "self._kind = n, [n], n, 0"),
        "assert vars(Box(1)) == Box(1).__dict__ == {'_name': 1, '_items': [1], '_peer': 1, '_kind': 1}",
    ),
    "__doc__": (PRIVATE, ("A box.", "A can."), "assert Box.__doc__ == Box(1).__doc__ == 'A box.'"),
    "__class__": (
        ZOO,
        ("class Cat", "class Cow"),
        "assert Cat().__class__.__name__ == 'Cat' and Cat().__class__ is Cat",
    ),
    "annotations": (
        "def f(x: int) -> str: return ''",
        ("-> str", "-> int"),
        "assert f.__annotations__ == {'x': int, 'return': str}",
    ),
    "context manager that swallows": (
        "class Quiet:\n    def __enter__(self): return self\n    def __exit__(self, kind, error, trace):\n"
        "        self.seen = str(error)\n        return kind is KeyError or kind is ValueError",
        ("kind is KeyError or kind is ValueError", "kind is KeyError"),
        "with Quiet() as q: raise ValueError('x')\nassert q.seen == 'x'",
    ),
    "exception as a value": ("def f(): return ValueError('a', 2)", ("2", "3"), "assert f().args == ('a', 2)"),
    "class within a class": (
        "class Outer:\n    class Inner:\n        def __init__(self, x): self.x = x\n"
        "        def __mul__(self, k): return Outer.Inner(self.x * k)",
        ("self.x * k", "self.x"),
        "assert (Outer.Inner(2) * 4).x == 8",
    ),
    "exception that takes several arguments": (
        "class Bad(Exception):\n    def __new__(cls, a, b): return super().__new__(cls)\n"
        "    def __init__(self, a, b): self.a = a\n"
        "def f(): raise Bad(1, 2)",
        ("self.a = a", "self.a = b"),
        "try: f()\nexcept Bad as e: assert e.a == 1\nelse: assert False",
    ),
}
