"""Runs tests in a sandbox of their own against a program in another one.

The tests are ordinary Python. A name that they use but do not define is looked up in the program. The result is either
plain data (`wire.py`) or a `Remote`: a stand-in that asks the program's sandbox to call, index or iterate the object
that it stands for. Arguments and results are copies, and changes that a call makes to its arguments are copied back.
The wanted values are therefore never where the program is, and `==` in a test compares data of Python's own types.

What the program could decide by its own methods, a test cannot ask of it:

- A `Remote` is never equal to data. If its class defines `__eq__`, the comparison is an error of the kind
  "unsupported". An instance of a builtin's subclass is compared by the builtin's data.
- Operators between a `Remote` and data give a `Remote` that can no longer become data: `abs(f(3) - 6) < 1e-6` is an
  error whatever `__sub__` and `__abs__` of the program's class return. Also `x in f(3)` needs data.

The tests say that they test a class by its name in CapWords: what `Stack(3)` returns may define operators and `in`, and
its attributes and methods give data after them; turned into a number, a truth value or a comparison with data, it is
still an error.

Builtins and modules of the standard library are the real ones, even if the program redefines them. Only if the tests
use no other free name, they test a function that has a builtin's name: the one that `entry_point` gives, or the one
builtin that every test uses. `eval` and `exec` of a text run in the program's sandbox, and unpickling makes plain data
only, so no output of the program is executed among the tests.

A few weaknesses remain. A test that compares two objects of the program's own classes, that only asks whether such an
object or a result of its methods is true, that writes the wanted value into such an object and reads it back, or that
lets pandas evaluate a text of the program among its own names, lets the program decide the verdict.
"""

import ast
import builtins
import importlib
import os
import symtable
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox import wire
from mdrl_jax.rewards.sandbox.wire import Foreign, Gone, Unsupported

_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor",
              "lshift", "rshift")  # fmt: skip
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
             "ilshift", "irshift")  # fmt: skip
_TO_DATA = ("int", "float", "complex", "index", "round", "abs", "bool", "len", "hash")
_OTHERS = ("getitem", "setitem", "delitem", "str", "repr", "format", "neg", "pos", "invert", "enter", "dir")
_SPECIAL = ("__name__", "__qualname__", "__doc__", "__module__", "__dict__", "__annotations__", "__defaults__",
            "__kwdefaults__", "__wrapped__", "__mro__", "__bases__", "__members__", "__class__")  # fmt: skip
# Methods of builtin types that compare with an argument. A test asks them of data.
_QUERIES = {"count", "index", "find", "rfind", "startswith", "endswith", "issubset", "issuperset", "isdisjoint",
            "equals"}  # fmt: skip
_KINDS = {"method": "method", "staticmethod": "static", "classmethod": "class", "property": "property"}
# Names under which tests use packages that they do not import.
_PACKAGES = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "scipy": "scipy", "sympy": "sympy",
             "nx": "networkx", "networkx": "networkx"}  # fmt: skip
_STANDARD = ("math", "collections", "itertools", "functools", "statistics", "operator", "copy", "fractions", "decimal")
# What may be unpickled: (module, name) of classes and functions that make plain data.
_UNPICKLED = {
    *(("builtins", n) for n in ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list")),
    *(("builtins", n) for n in ("object", "range", "set", "slice", "str", "tuple")),
    *(("collections", n) for n in ("Counter", "OrderedDict", "defaultdict", "deque")),
    *(("datetime", n) for n in ("date", "datetime", "time", "timedelta", "timezone")),
    *(("numpy", n) for n in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", n) for core in ("core", "_core") for n in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("copyreg", "_reconstructor"), ("_codecs", "encode"), ("decimal", "Decimal"), ("fractions", "Fraction"),
    ("uuid", "UUID"),
}  # fmt: skip
_CODE_EVENTS = {"marshal.load", "marshal.loads", "code.__new__", "function.__new__"}
# Modules that make code from names that they check, and run it.
_MAKERS = {"collections", "dataclasses", "enum", "scipy.stats._distn_infrastructure"}


def _special(name: str) -> Any:
    return property(lambda self: self._mdrl_ask("getattr", name))


# A class cannot be given some of these names after it is made, so the stand-ins inherit them.
_Special: Any = type(
    "_Special", (Foreign,), {"__slots__": ()} | {n: _special(n) for n in _SPECIAL if n != "__qualname__"}
)


class Remote(_Special):
    """Stands for an object that only the program has. The program's sandbox carries out every operation on it.

    Args:
      peer: the connection.
      number: the object's number at the other end.
      kind: "object" or "class".
      name: the name of its class, or of the class that it is.
      traits: what its class defines: some of "eq", "order", "contains", "iter" and protocols of asyncio.
    """

    # tested: whether the tests name it as a class. own: whether they made it by calling such a class. mixed: whether an
    # operator has combined it with data.
    __slots__ = ("_mdrl_kind", "_mdrl_name", "_mdrl_traits", "_mdrl_tested", "_mdrl_own", "_mdrl_mixed")
    _mdrl_peer: "Tester"
    _mdrl_kind: str
    _mdrl_name: str
    _mdrl_traits: frozenset[str]
    _mdrl_tested: bool
    _mdrl_own: bool
    _mdrl_mixed: bool

    def __init__(self, peer: "Tester", number: int, kind: str, name: str, traits: Sequence[str]) -> None:
        super().__init__(peer, number)
        self._mdrl_set(kind=kind, name=name, traits=frozenset(traits), tested=False, own=False, mixed=False)

    def _mdrl_set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, f"_mdrl_{name}", value)

    def _mdrl_ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        result = self._mdrl_peer.ask(op, self, *args, **kwargs)
        if self._mdrl_mixed and op not in ("setattr", "delattr", "setitem", "delitem", "exit", "next"):
            if not self._mdrl_own or op in _TO_DATA:
                return self._mdrl_still_mixed(result)
        return result

    def _mdrl_still_mixed(self, result: Any) -> Any:
        if not isinstance(result, Remote):
            self._mdrl_refuse("turns an object of the program that an operator has combined with data into data")
        result._mdrl_set(mixed=True)
        return result

    def _mdrl_refuse(self, what: str) -> NoReturn:
        self._mdrl_peer.refuse(f"the test {what} (class {self._mdrl_name}); let the test compare plain data")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._mdrl_kind != "class" or not self._mdrl_tested:
            return self._mdrl_ask("call", *args, **kwargs)
        made = self._mdrl_ask("new", *args, **kwargs)
        if isinstance(made, Remote):
            made._mdrl_set(own=True)
        return made

    def __getattr__(self, name: str) -> Any:
        # Python and libraries ask for special names to find out what an object can do; a stand-in has its own methods.
        if name.startswith("__") and name.endswith("__") and name not in _SPECIAL:
            raise AttributeError(name)
        if name in _QUERIES and not self._mdrl_own and self._mdrl_kind == "object":
            self._mdrl_refuse(f"asks by {name}() what the program decides")
        return named(self._mdrl_ask("getattr", name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._mdrl_ask("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._mdrl_ask("delattr", name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._mdrl_ask("iter")
        if not isinstance(iterator, Remote):
            return iter(iterator)
        return iterator._mdrl_items()

    def _mdrl_items(self) -> Generator[Any, Any, None]:
        while item := self._mdrl_peer.ask("next", self):
            if self._mdrl_mixed:
                self._mdrl_still_mixed(item[0])
            yield item[0]

    def __next__(self) -> Any:
        for item in self._mdrl_peer.ask("next", self):
            return self._mdrl_still_mixed(item) if self._mdrl_mixed else item
        raise StopIteration

    def __reversed__(self) -> Iterator[Any]:
        return self._mdrl_ask("reversed")._mdrl_items()

    def __contains__(self, item: Any) -> bool:
        if self._mdrl_own:
            return bool(self._mdrl_ask("contains", item))
        if "contains" in self._mdrl_traits and not self._mdrl_is_data():
            self._mdrl_refuse("asks with `in` what the program decides")
        return any(item is found or item == found for found in self)

    def _mdrl_is_data(self) -> bool:
        return not isinstance(self._mdrl_peer.ask("plain", self), Remote)

    def __eq__(self, other: object) -> Any:
        return self._mdrl_equal(other)

    def __ne__(self, other: object) -> Any:
        equal = self._mdrl_equal(other)
        return equal if equal is NotImplemented else not equal

    def _mdrl_equal(self, other: object) -> Any:
        if isinstance(other, Remote):
            return self is other or bool(self._mdrl_peer.ask("eq", self, other))
        plain = self._mdrl_peer.ask("plain", self)
        if self._mdrl_mixed or "eq" in self._mdrl_traits and isinstance(plain, Remote):
            self._mdrl_refuse("compares an object of the program with data")
        return NotImplemented if isinstance(plain, Remote) else plain == other

    def _mdrl_ordered(self, op: str, other: object) -> Any:
        if isinstance(other, Remote):
            return bool(self._mdrl_peer.ask(op, self, other))
        if self._mdrl_mixed or "order" in self._mdrl_traits:
            self._mdrl_refuse("compares an object of the program with data")
        return NotImplemented

    def __lt__(self, other: object) -> Any:
        return self._mdrl_ordered("lt", other)

    def __le__(self, other: object) -> Any:
        return self._mdrl_ordered("le", other)

    def __gt__(self, other: object) -> Any:
        return self._mdrl_ordered("gt", other)

    def __ge__(self, other: object) -> Any:
        return self._mdrl_ordered("ge", other)

    def __hash__(self) -> int:
        return int(self._mdrl_peer.ask("hash", self))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and bool(instance._mdrl_peer.ask("isinstance", instance, self))

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, Remote) and bool(kind._mdrl_peer.ask("issubclass", kind, self))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        swallowed = bool(self._mdrl_ask("exit", kind, error, None))
        return swallowed and _may_be_swallowed(kind)

    def __copy__(self) -> Any:
        return self._mdrl_ask("copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return self._mdrl_ask("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._mdrl_refuse("pickles an object of the program")

    def _mdrl_combine(self, op: str, left: Any, right: Any, *rest: Any) -> Any:
        result = self._mdrl_peer.ask(op, left, right, *rest)
        others = [value for value in (left, right) if value is not self]
        mixed = any(not isinstance(value, Remote) or value._mdrl_mixed for value in [self, *others])
        if not mixed or self._mdrl_own and op in _IN_PLACE:
            return result
        if not isinstance(result, Remote):
            self._mdrl_refuse("combines an object of the program with data to give data")
        result._mdrl_set(mixed=True, own=self._mdrl_own)
        return result


def _may_be_swallowed(kind: Any) -> bool:
    """Whether a context manager of the program may swallow an exception: not that the test fails or cannot go on."""
    return kind is not None and issubclass(kind, Exception) and not issubclass(kind, AssertionError)


def named(value: Any, name: str) -> Any:
    """Marks a class of the program that the tests name in CapWords: they test it as a class."""
    if isinstance(value, Remote) and value._mdrl_kind == "class" and name.lstrip("_")[:1].isupper():
        value._mdrl_set(tested=True)
    return value


def _unary(op: str) -> Any:
    return lambda self, *args: self._mdrl_ask(op, *args)


def _binary(op: str, swapped: bool = False) -> Any:
    if swapped:
        return lambda self, other, *rest: self._mdrl_combine(op, other, self, *rest)
    return lambda self, other, *rest: self._mdrl_combine(op, self, other, *rest)


for _op in (
    "getitem",
    "setitem",
    "delitem",
    "str",
    "repr",
    "format",
    "neg",
    "pos",
    "invert",
    "enter",
    "dir",
    *_TO_DATA,
):
    if _op != "hash":
        setattr(Remote, f"__{_op}__", _unary(_op))
for _op in _REFLECTED:
    setattr(Remote, f"__{_op}__", _binary(_op))
    setattr(Remote, f"__r{_op}__", _binary(_op, swapped=True))
for _op in _IN_PLACE:
    setattr(Remote, f"__{_op}__", _binary(_op))


class RemoteCoroutine(Remote):
    """A coroutine of the program. The program's event loop runs it to its end when it is awaited here."""

    __class__ = property(type)  # asyncio asks for it  # type: ignore[assignment]

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._mdrl_ask("await")
        yield

    def send(self, value: Any = None) -> NoReturn:
        raise StopIteration(self._mdrl_ask("await"))

    __next__ = send  # asyncio calls one or the other

    def throw(self, *exc: Any) -> NoReturn:
        raise exc[0]

    def close(self) -> None:
        self._mdrl_peer.ask("close", self)

    def __aiter__(self) -> "RemoteCoroutine":
        return self

    async def __anext__(self) -> Any:
        for item in self._mdrl_ask("anext"):
            return item
        raise StopAsyncIteration

    async def __aenter__(self) -> Any:
        return self._mdrl_ask("aenter")

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        swallowed = bool(self._mdrl_ask("aexit", kind, error))
        return swallowed and _may_be_swallowed(kind)


for _kind in (Remote, RemoteCoroutine):
    for _attribute in ("__doc__", "__module__", "__annotations__"):
        setattr(_kind, _attribute, _special(_attribute))


class Tester(wire.Peer):
    """The end of the connection that holds the tests.

    Attributes:
      unsupported: the first thing that a test asked for and that cannot be decided; "" for none.
      failed: whether a function of the tests failed an assertion while the program called it.
    """

    def __init__(self, link: int) -> None:
        super().__init__(link, link)
        self.unsupported = ""
        self.failed = False
        self._classes: list[Any] = []
        self._class_numbers: dict[type, int] = {}
        self._methods: list[dict[str, str]] = []
        self._errors: dict[int, Any] = {}

    def refuse(self, why: str) -> NoReturn:
        """Records that the tests cannot be decided, and raises Unsupported."""
        self.unsupported = self.unsupported or why
        raise Unsupported(why)

    def _serve(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            match op, args:
                case "call", [f, *rest] if callable(f) and id(f) in self._numbers:
                    return f(*rest, **kwargs)
                case "next", [iterator] if id(iterator) in self._numbers:
                    for item in iterator:
                        return [item]
                    return []
                case "method", [int(number), str(name), *rest] if name in self._methods[number]:
                    return self._method(number, name, rest, kwargs)
        except AssertionError:  # the program could catch it, so remember it here
            self.failed = True
            raise
        raise PermissionError(f"{op}: the program may only call what the tests gave it")

    def _method(self, number: int, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kind = self._classes[number]
        found = next(base.__dict__[name] for base in kind.__mro__ if name in base.__dict__)
        if isinstance(found, property):
            return found.__get__(args[0], kind)
        if isinstance(found, staticmethod | classmethod):
            return getattr(kind, name)(*args, **kwargs)
        return found(*args, **kwargs)

    def _describe(self, value: Any) -> list[Any] | None:
        if isinstance(value, type) and value.__module__ == "__main__":
            return None
        if callable(value):
            return ["call", str(getattr(value, "__name__", "callback"))]
        return ["iter"] if hasattr(type(value), "__next__") and not hasattr(value, "read") else None

    def _stand_in(self, number: int, description: list[Any]) -> Any:
        match description:
            case ["errors" | "error" as kind, str(base), list(chain)]:
                made = self._error_class(base, chain)
                return made if kind == "errors" else self._error_of(made, number)
            case ["class" | "object" as kind, str(name), list(traits)]:
                awaited = kind == "object" and {"coroutine", "asyncgen", "asynciter", "asyncwith"} & set(traits)
                return (RemoteCoroutine if awaited else Remote)(self, number, kind, name, traits)
        raise ValueError(description)

    # Exceptions of the program's own classes: classes of the same names, made here.

    def _error_class(self, base: str, chain: list[list[Any]]) -> Any:
        made: Any = wire.builtin_exception(base)
        if not chain and issubclass(AssertionError, made):  # `except Bad` would catch the failure of an assertion
            self.refuse(f"the test catches {made.__name__} by a name of the program")
        for number, name in reversed(chain):
            if number not in self._errors:
                members = {"__module__": "__main__", "_mdrl_number": number, "_mdrl_peer": self}
                self._errors[number] = type(
                    str(name), (_ProgramError, made) if made in vars(builtins).values() else (made,), members
                )
            made = self._errors[number]
        return made

    def _error_of(self, kind: Any, number: int) -> Any:
        made = kind.__new__(kind)
        made.__dict__["_mdrl_of"] = number
        return made

    def _error(self, name: str, text: str, stranger: Any) -> BaseException:
        if isinstance(stranger, _ProgramError):
            stranger.args = (text,)
            return stranger
        if isinstance(stranger, type) and stranger in self._class_numbers and issubclass(stranger, Exception):
            if not issubclass(stranger, StopIteration | StopAsyncIteration):  # they would end a loop of the tests
                return stranger(text)
        return super()._error(name, text, stranger)

    def _theirs(self, value: Any) -> int | None:
        if isinstance(value, _ProgramError):
            return value.__dict__["_mdrl_of"]
        if isinstance(value, type) and issubclass(value, _ProgramError):
            return value.__dict__.get("_mdrl_number")
        return super()._theirs(value)

    # Classes that the tests define.

    def _class_number(self, kind: type) -> int | None:
        return self._class_numbers.get(kind)

    def _stranger_class(self, kind: type) -> list[Any] | None:
        known = kind.__module__.partition(".")[0] in sys.stdlib_module_names
        return ["import", kind.__module__, kind.__qualname__] if known else None

    def _give(self, kind: type) -> int | None:
        if kind.__module__ != "__main__" or issubclass(kind, Foreign):
            return None
        return self.share(kind, all_methods=True)

    def share(self, kind: Any, all_methods: bool) -> int:
        """Gives the program a class of the tests. The methods keep running here.

        Args:
          kind: the class.
          all_methods: whether the program may call its public methods too. Otherwise it has those that Python calls
            by itself (`__init__`, `__eq__`), but not `__call__`.

        Returns:
          The number of the class at both ends.
        """
        members = {n: v for b in reversed(kind.__mro__) if b.__module__ == "__main__" for n, v in b.__dict__.items()}
        methods = {name: method for name, value in members.items() if (method := _method_kind(value)) is not None}
        methods = {
            name: method
            for name, method in methods.items()
            if (name.startswith("__") and name.endswith("__") and name != "__call__" if not all_methods else True)
            and name not in ("__new__", "__init_subclass__", "__class_getitem__", "__getattribute__")
        }
        number = self._class_numbers.get(kind)
        if number is None:
            number = self._class_numbers[kind] = len(self._classes)
            self._classes.append(kind)
            self._methods.append({})
        elif methods.keys() <= self._methods[number].keys():
            return number
        bases = [b for b in kind.__bases__ if b.__module__ == "__main__" or b in wire._BUILTIN_TYPES]
        bases = [wire.Shared(self.share(b, all_methods)) if b.__module__ == "__main__" else b for b in bases]
        data: dict[str, Any] = {}
        enum = getattr(sys.modules.get("enum"), "Enum", None)
        if enum is not None and issubclass(kind, enum):
            data["members"], methods = {n: m.value for n, m in kind.__members__.items()}, {}
        elif all_methods:
            data = {n: v for n, v in members.items() if not n.startswith("_") and _is_scalar(v)}
        self._methods[number] = methods
        self.ask("class", number, kind.__name__, bases or [object], methods, data)
        return number

    def _class_of(self, number: int) -> Any:
        return self._classes[number]

    def _may_set(self, value: Any, name: str) -> bool:
        defined = {n: v for kind in reversed(type(value).__mro__) for n, v in kind.__dict__.items()}.get(name)
        return _method_kind(defined) is None and not (name.startswith("__") and name.endswith("__"))


class _ProgramError(Exception):
    """Base of the stand-ins for exceptions of the program's own classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)
        kind = type(self)
        peer = kind._mdrl_peer  # type: ignore[attr-defined]
        if "_mdrl_of" not in self.__dict__ and "_mdrl_number" in kind.__dict__:
            made = peer.ask("call", kind, *args, **kwargs)
            self.__dict__["_mdrl_of"] = made.__dict__["_mdrl_of"]

    def __getattr__(self, name: str) -> Any:
        number = self.__dict__.get("_mdrl_of")
        if number is None or name.startswith("__"):
            raise AttributeError(name)
        return type(self)._mdrl_peer.ask("getattr", self, name)  # type: ignore[attr-defined]


def _method_kind(value: Any) -> str | None:
    return "method" if type(value).__name__ == "function" else _KINDS.get(type(value).__name__)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


class _Names(dict[str, Any]):
    """The global names of the tests: their own first, then those of Python and of the program (see the module)."""

    def __init__(self, peer: Tester, shadowed: str, modules: Mapping[str, str], functions: Mapping[str, Any]) -> None:
        super().__init__(functions, __name__="__main__", __builtins__=_builtins(peer))
        self._peer, self._shadowed, self._modules = peer, shadowed, modules

    def __missing__(self, name: str) -> Any:
        if name in ("__type__", "__caught__"):  # `_Types` writes them; the program's mean nothing
            raise KeyError(name)
        if name in self._modules:
            return importlib.import_module(self._modules[name])
        if hasattr(builtins, name) and name != self._shadowed:
            raise KeyError(name)  # Python then looks among the builtins
        if not self._peer.ask("has", name):
            raise KeyError(name)
        return named(self._peer.ask("get", name), name)


def _builtins(peer: Tester) -> dict[str, Any]:
    """The builtins of the tests: those that ask for a class or run a text know the program's objects."""

    def is_instance(value: Any, kinds: Any) -> bool:
        if type(kinds) is tuple:
            return any(is_instance(value, kind) for kind in kinds)
        if isinstance(value, Remote) and not isinstance(kinds, Remote):
            return bool(peer.ask("isinstance", value, kinds))
        kind: Any = kinds
        return isinstance(value, kind)

    def is_subclass(kind: Any, kinds: Any) -> bool:
        if type(kinds) is tuple:
            return any(is_subclass(kind, one) for one in kinds)
        if isinstance(kind, Remote) and not isinstance(kinds, Remote):
            return bool(peer.ask("issubclass", kind, kinds))
        one: Any = kind
        all_kinds: Any = kinds
        return issubclass(one, all_kinds)

    def evaluate(text: Any, *spaces: Any) -> Any:
        if not isinstance(text, str | bytes) or any(spaces):
            peer.refuse("the test calls eval with more than a text")
        return peer.ask("eval", text)

    def execute(text: Any, space: dict[str, Any] | None = None) -> None:
        if not isinstance(text, str | bytes):
            peer.refuse("the test calls exec with more than a text and a dict")
        peer.ask("exec", text, {} if space is None else space)

    def type_of(*args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Remote):
            return peer.ask("type", args[0])
        return type(*args)

    def caught(kinds: Any) -> Any:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            if isinstance(kind, tuple):
                caught(kind)
            elif isinstance(kind, type) and issubclass(AssertionError, kind):
                peer.refuse(f"the test catches {kind.__name__}, a failed assertion too, by a name of the program")
        return kinds

    own = {"isinstance": is_instance, "issubclass": is_subclass, "eval": evaluate, "exec": execute}
    return vars(builtins) | own | {"__type__": type_of, "__caught__": caught}


class _Types(ast.NodeTransformer):
    """Rewrites what the builtins of the tests cannot do.

    `type(x)` becomes a call that knows the program's objects; elsewhere `type` stays the class. `except X` checks X.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1 and not node.keywords:
            node.func = ast.copy_location(ast.Name("__type__", ast.Load()), node.func)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        names = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if not all(n is None or isinstance(n, ast.Name) and hasattr(builtins, n.id) for n in names):
            assert node.type is not None
            node.type = ast.copy_location(ast.Call(ast.Name("__caught__", ast.Load()), [node.type], []), node.type)
        return node


class _Reads(ast.NodeVisitor):
    """Collects the global names that statements read before they bind them, in the order of evaluation.

    Attributes:
      bound: the names bound so far at the top level.
      free: the names read before they are bound.
      inside: the global names that functions read; they do so when they are called.
    """

    def __init__(self) -> None:
        self.bound: set[str] = set()
        self.free: set[str] = set()
        self.inside: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.free |= {node.id} - self.bound
        else:
            self.bound.add(node.id)

    def _in_order(self, *nodes: Any) -> None:
        for node in nodes:
            for one in node if isinstance(node, list) else [node]:
                if one is not None:
                    self.visit(one)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._in_order(node.value, node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.free |= {node.target.id} - self.bound
        self._in_order(node.value, node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._in_order(node.annotation, node.value, node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._in_order(node.value, node.target)

    def visit_For(self, node: ast.For) -> None:
        self._in_order(node.iter, node.target, node.body, node.orelse)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._in_order(node.type)
        self.bound |= {node.name} if node.name else set()
        self._in_order(node.body)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._in_order(node.decorator_list)
        if isinstance(node, ast.ClassDef):
            self._in_order(node.bases, node.keywords)
        else:
            self._in_order(node.args.defaults, node.args.kw_defaults)
        self.inside |= _read_inside(_table(ast.unparse(node)))
        self.bound.add(node.name)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._in_order(node.args.defaults, node.args.kw_defaults)
        self.inside |= _read_inside(_table(ast.unparse(node)))

    def _comprehension(self, node: Any) -> None:
        self._in_order(node.generators[0].iter)
        self.free |= _read_inside(_table(ast.unparse(node))) - self.bound

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815


def free_names(tests: Sequence[str]) -> list[set[str]]:
    """For each test, the global names that it reads and that the tests have not bound when it does.

    A function reads its globals when it is called, so a name that any test binds at its top level is no free name of a
    function.
    """
    found: list[tuple[set[str], set[str]]] = []
    bound: set[str] = set()
    for test in tests:
        reads = _Reads()
        reads.bound = bound
        reads.visit(ast.parse(test))
        found.append((reads.free, reads.inside))
    return [free | (inside - bound) for free, inside in found]


def _table(source: str) -> symtable.SymbolTable:
    return symtable.symtable(source, "<test>", "exec")


def _bound(table: symtable.SymbolTable) -> set[str]:
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def _read_inside(table: symtable.SymbolTable) -> set[str]:
    """The names that the functions and classes of a source read as globals."""
    found: set[str] = set()
    for child in table.get_children():
        found |= {s.get_name() for s in child.get_symbols() if s.is_referenced() and s.is_global()}
        found |= _read_inside(child)
    return found


def _uses_as_module(name: str, trees: list[ast.Module]) -> bool:
    """Whether every use of the name is `name.attribute`, as with a module."""
    nodes = [n for t in trees for n in ast.walk(t)]
    dotted = sum(isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name for n in nodes)
    return dotted == sum(isinstance(n, ast.Name) and n.id == name for n in nodes)


def names_of(peer: Tester, tests: Sequence[str], entry_point: str) -> _Names:
    """Makes the global names of the tests.

    Args:
      peer: the connection.
      tests: Python sources.
      entry_point: the name of the function under test; "" if the check does not say.

    Raises:
      Unsupported: if the tests use several builtins and nothing else, and `entry_point` is "".
    """
    free = free_names(tests)
    trees = [ast.parse(test) for test in tests]
    everything: set[str] = set().union(*free)
    known = {n: n for n in sys.stdlib_module_names} | _PACKAGES
    modules = {n: known[n] for n in everything if n in known and _uses_as_module(n, trees)}
    shadowed = entry_point if hasattr(builtins, entry_point or "?") else ""
    if not shadowed and all(hasattr(builtins, n) or n in modules for n in everything):
        testing = [names - modules.keys() for names in free if names - modules.keys()]
        called = {n for t in trees for c in ast.walk(t) if isinstance(c, ast.Call) for n in _name(c.func)}
        common = set.intersection(*testing) & called if testing else set()
        if len(common) > 1:
            peer.refuse(f"the tests call only builtins ({', '.join(sorted(common))}); give the check an entry_point")
        shadowed = next(iter(common), "")
    candidates = {n for n in everything if n not in modules and not hasattr(builtins, n)} - {entry_point}
    return _Names(peer, shadowed, modules, _standard_functions(candidates, trees))


def _standard_functions(names: set[str], trees: list[ast.Module]) -> dict[str, Any]:
    """The functions of the standard library that tests apply to the program's results and have not imported.

    Such a test is `assert isclose(f(3), 6)`: `isclose` judges, so it must not be the program's.
    """
    calls = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    found: dict[str, Any] = {}
    for call in calls:
        name = call.func.id  # type: ignore[attr-defined]
        inner = {n.id for a in call.args for n in ast.walk(a) if isinstance(n, ast.Name)} & names - {name}
        if name in names and name not in found and inner:
            for module in _STANDARD:
                if hasattr(importlib.import_module(module), name) and not name.startswith("_"):
                    found[name] = getattr(importlib.import_module(module), name)
                    break
    return {name: value for name, value in found.items() if names - found.keys()}


def _name(node: ast.expr) -> list[str]:
    return [node.id] if isinstance(node, ast.Name) else []


def judge(peer: Tester, program: str, tests: Sequence[str], entry_point: str) -> str:
    """Loads the program in the guest, then runs the tests in one namespace in this process.

    Args:
      peer: the connection to the guest.
      program: Python source.
      tests: Python sources.
      entry_point: the name of the function under test; "" if the check does not say.

    Returns:
      "ok" if the program and every test ran without an exception; "memory" if one of them ran out of memory; "gone" if
      the guest ended or broke the protocol; "unsupported: " and the reason if the tests cannot be decided; "failed"
      otherwise.
    """
    try:
        names = names_of(peer, tests, entry_point)
        trees = [ast.parse(test) for test in tests]
        classes = _shared_classes(program, trees)
        for tree in trees:  # the program may name these classes when it is loaded
            early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) or node in classes]
            if classes:
                tree.body = [node for node in tree.body if node not in early]
                exec(compile(_module(early), "<test>", "exec", dont_inherit=True, optimize=0), names)
        shared = {node.name: wire.Shared(peer.share(names[node.name], all_methods=False)) for node in classes}
        peer.ask("load", program, shared)
        for tree in trees:
            exec(compile(_typed(tree), "<test>", "exec", dont_inherit=True, optimize=0), names)
        # Ask once more, because a program that has ended or broken the protocol has not passed.
        peer.ask("has", "")
    except Gone:
        return "gone"
    except Unsupported as e:
        peer.unsupported = peer.unsupported or str(e)
    except MemoryError:
        return "memory"
    except BaseException:
        return f"unsupported: {peer.unsupported}" if peer.unsupported else "failed"
    if peer.unsupported:
        return f"unsupported: {peer.unsupported}"
    return "failed" if peer.failed else "ok"


def _typed(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_Types().visit(tree))


def _module(body: list[ast.stmt]) -> ast.Module:
    return _typed(ast.Module(body, type_ignores=[]))


def _shared_classes(program: str, trees: list[ast.Module]) -> list[ast.ClassDef]:
    """The classes of the tests that the program names and does not define, such as LeetCode's ListNode."""
    try:
        table = _table(program)
        read = {s.get_name() for s in table.get_symbols() if s.is_referenced()} | _read_inside(table)
        wanted = read - _bound(table)
    except (SyntaxError, ValueError):
        return []
    return [n for t in trees for n in t.body if isinstance(n, ast.ClassDef) and n.name in wanted]


def _makes_code(caller: Any) -> bool:
    """Whether code that a frame runs is no text of the program: the frame belongs to a maker or to an import."""
    if caller.f_globals.get("__name__") in _MAKERS:
        return True
    while caller is not None and not caller.f_code.co_filename.startswith("<frozen importlib"):
        caller = caller.f_back
    return caller is not None


def _guard(peer: Tester) -> None:
    """Keeps this process from executing what it unpickles, and texts that a library evaluates."""

    def hook(event: str, args: Any) -> None:
        if event == "pickle.find_class" and tuple(args) not in _UNPICKLED:
            peer.refuse(f"the test unpickles {args[0]}.{args[1]}")
        elif event == "exec":
            file, caller = args[0].co_filename, sys._getframe(1)
            if file != "<test>" and not file.startswith(("/", "<frozen ")) and not _makes_code(caller):
                peer.refuse(f"the test runs code that {caller.f_globals.get('__name__')} makes of a text")
        elif event in _CODE_EVENTS and sys._getframe(1).f_code.co_filename == "<test>":
            peer.refuse("the test makes code of data")

    sys.addaudithook(hook)


def run(link: int, verdict_fd: int, request: dict[str, Any]) -> NoReturn:
    """Runs the tests of a request, writes the verdict, and ends the process.

    Args:
      link: a socket to the guest.
      verdict_fd: the pipe for the verdict (`judge`).
      request: "program", "tests", "entry_point" and "seed", the seed of the tests' random numbers.
    """
    verdict = "failed"
    try:
        import random

        random.seed(request["seed"])
        if any("numpy" in test for test in request["tests"]):
            import numpy

            numpy.random.seed(request["seed"] % 2**32)
        peer = Tester(link)
        _guard(peer)
        verdict = judge(peer, request["program"], request["tests"], request["entry_point"])
    except BaseException as e:
        verdict = f"unsupported: {type(e).__name__}: {e}"
    finally:
        os.write(verdict_fd, verdict.encode(errors="replace")[:4000])
        os._exit(0)
