"""Stand-ins, among the tests, for objects that only the program has. `tester.py` says what they refuse to do."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox.wire import Foreign, Peer, Unsupported

_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor",
              "lshift", "rshift")  # fmt: skip
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
             "ilshift", "irshift")  # fmt: skip
_TO_DATA = ("int", "float", "complex", "index", "round", "abs", "bool", "len")
_OTHERS = ("getitem", "setitem", "delitem", "str", "repr", "format", "neg", "pos", "invert", "enter", "dir")
_SPECIAL = ("__name__", "__qualname__", "__doc__", "__module__", "__dict__", "__annotations__", "__defaults__",
            "__kwdefaults__", "__wrapped__", "__mro__", "__bases__", "__members__", "__class__")  # fmt: skip
# Methods of builtin types that compare with an argument. A test asks them of data.
_QUERIES = {"count", "index", "find", "rfind", "startswith", "endswith", "issubset", "issuperset", "isdisjoint",
            "equals"}  # fmt: skip


def is_special(name: str) -> bool:
    """Whether Python itself asks for a name, such as `__eq__`: it begins and ends with two underscores."""
    return name.startswith("__") and name.endswith("__")


def _special(name: str) -> Any:
    return property(lambda self: self._mdrl_ask("getattr", name))


# A class cannot be given some of these names after it is made, so the stand-ins inherit them.
_Special: Any = type(
    "_Special", (Foreign,), {"__slots__": ()} | {n: _special(n) for n in _SPECIAL if n != "__qualname__"}
)


class RefusingPeer(Peer):
    """An end of the connection that records why the tests cannot be decided.

    Attributes:
      unsupported: the first thing that a test asked for and that cannot be decided; "" for none.
    """

    def __init__(self, link: int) -> None:
        super().__init__(link, link)
        self.unsupported = ""

    def refuse(self, why: str) -> NoReturn:
        """Records that the tests cannot be decided, and always raises Unsupported.

        Args:
          why: the reason. `unsupported` keeps that of the first call.
        """
        self.unsupported = self.unsupported or why
        raise Unsupported(why)


class Remote(_Special):
    """Stands for an object that only the program has. The program's sandbox carries out every operation on it.

    Args:
      peer: the connection (`tester.Tester`).
      number: the object's number at the other end.
      kind: "object" or "class".
      name: the name of its class, or of the class that it is.
      traits: what its class defines: some of "eq", "order", "contains" and protocols of asyncio.
    """

    # tested: whether the tests name it as a class. own: whether they made it by calling such a class. mixed: whether an
    # operator has combined it with data.
    __slots__ = ("_mdrl_kind", "_mdrl_name", "_mdrl_traits", "_mdrl_tested", "_mdrl_own", "_mdrl_mixed")
    _mdrl_peer: "RefusingPeer"
    _mdrl_kind: str
    _mdrl_name: str
    _mdrl_traits: frozenset[str]
    _mdrl_tested: bool
    _mdrl_own: bool
    _mdrl_mixed: bool

    def __init__(self, peer: "RefusingPeer", number: int, kind: str, name: str, traits: Sequence[str]) -> None:
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
        if is_special(name) and name not in _SPECIAL:
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
    """Marks a class of the program that the tests name in CapWords: they test it as a class.

    Args:
      value: what the name means. Only a stand-in for a class is marked, in place.
      name: the name that the tests use. It marks a class if it begins with a capital letter, underscores before that
        aside.

    Returns:
      The value itself, marked or not.
    """
    if isinstance(value, Remote) and value._mdrl_kind == "class" and name.lstrip("_")[:1].isupper():
        value._mdrl_set(tested=True)
    return value


def _unary(op: str) -> Any:
    return lambda self, *args: self._mdrl_ask(op, *args)


def _binary(op: str, swapped: bool = False) -> Any:
    if swapped:
        return lambda self, other, *rest: self._mdrl_combine(op, other, self, *rest)
    return lambda self, other, *rest: self._mdrl_combine(op, self, other, *rest)


for _op in (*_OTHERS, *_TO_DATA):
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
        """Lets the program run the coroutine to its end. Raises StopIteration with its result; `value` is not used.

        What the coroutine raises is raised instead, as `Peer.ask` does.
        """
        raise StopIteration(self._mdrl_ask("await"))

    __next__ = send  # asyncio calls one or the other

    def throw(self, *exc: Any) -> NoReturn:
        """Raises the first argument here; the program's coroutine does not get it."""
        raise exc[0]

    def close(self) -> None:
        """Closes the coroutine in the program's sandbox. Raises what `Peer.ask` raises."""
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
