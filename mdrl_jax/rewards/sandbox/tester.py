"""Runs tests outside the sandbox against a program inside it.

The tests are ordinary Python. A name in them that they do not define themselves is looked up in the
program; what it gives is plain data (wire.py) or a `Remote`, a stand-in that asks the sandbox to
call, index or iterate the object behind it. Arguments and results are copies. So the wanted values
are never where the program is, and `==` here compares data with Python's own types.

A `Remote` is never equal, greater or less than data: the comparison raises, whatever the program's
`__eq__` says. Builtins and modules of the standard library are the real ones, also where the program
has redefined them (a builtin's name means the program's only in tests that ask for nothing else).

What a test cannot do here: see a change that the program makes to an argument, or what it prints;
catch an exception class of the program's by its own name (the nearest builtin class arrives).
What remains possible: a test that compares two of the program's own objects, or only asks whether
a method of one is true, asks the program for the verdict and believes it.
"""

import ast
import builtins
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from mdrl_jax.rewards.sandbox.wire import Foreign, Gone, Peer

Verdict = Literal["ok", "failed", "memory", "gone"]


class Remote(Foreign):
    """An object of the program's; every operation on it is asked of the sandbox."""

    def _ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_peer"].ask(op, self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("delattr", name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter")
        if not isinstance(iterator, Remote):
            raise TypeError("the program's iterator is not one")
        while item := iterator._ask("next"):
            yield item[0]

    def __next__(self) -> Any:
        for item in self._ask("next"):
            return item
        raise StopIteration

    def __eq__(self, other: object) -> bool:
        return self._compare("eq", other)

    def __ne__(self, other: object) -> bool:
        return not self._compare("eq", other)

    def __lt__(self, other: object) -> bool:
        return self._compare("lt", other)

    def __le__(self, other: object) -> bool:
        return self._compare("le", other)

    def __gt__(self, other: object) -> bool:
        return self._compare("gt", other)

    def __ge__(self, other: object) -> bool:
        return self._compare("ge", other)

    def __hash__(self) -> int:
        return id(self)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and bool(instance._ask("isinstance", self))

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __exit__(self, *exc: object) -> None:
        self._ask("exit")

    def _compare(self, op: str, other: object) -> bool:
        if not isinstance(other, Remote):
            raise TypeError("an object of the program's own is not comparable with data")
        return bool(self._ask(op, other))

    def _combine(self, op: str, left: Any, right: Any) -> Any:
        result = self.__dict__["_peer"].ask(op, left, right)
        # `abs(f(x) - 8) < 1e-6` must not pass because the program's `__sub__` says 0.
        if not (isinstance(result, Remote) or isinstance(left, Remote) and isinstance(right, Remote)):
            raise TypeError("an object of the program's own is not a number")
        return result


def _unary(op: str) -> Any:
    return lambda self, *args: self._ask(op, *args)


def _binary(op: str, swapped: bool) -> Any:
    return lambda self, other: self._combine(op, *((other, self) if swapped else (self, other)))


for _op in ("getitem", "setitem", "delitem", "len", "int", "float", "index", "round", "abs", "neg", "enter"):
    setattr(Remote, f"__{_op}__", _unary(_op))
for _op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Remote, f"__{_op}__", _binary(_op, swapped=False))
    setattr(Remote, f"__r{_op}__", _binary(_op, swapped=True))


class _Names(dict[str, Any]):
    """The tests' globals: their own names first, then what they may use of the program's."""

    def __init__(self, peer: Peer, tests: Sequence[str]) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self._peer = peer
        trees = [ast.parse(test) for test in tests]
        free = _used(trees) - _bound(trees)
        self._modules = {n for n in free if n in sys.stdlib_module_names and _only_attributes(n, trees)}
        self._all_builtin = all(hasattr(builtins, n) or n in self._modules for n in free)

    def __missing__(self, name: str) -> Any:
        if name in self._modules:
            return importlib.import_module(name)
        if hasattr(builtins, name) and not self._all_builtin:
            raise KeyError(name)  # Python then looks among the builtins
        if not self._peer.ask("has", name):
            raise KeyError(name)
        return self._peer.ask("get", name)


def _used(trees: list[ast.Module]) -> set[str]:
    return {n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound(trees: list[ast.Module]) -> set[str]:
    names: set[str] = set()
    for node in (n for t in trees for n in ast.walk(t)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update((a.asname or a.name).partition(".")[0] for a in aliases)
    return names


def _only_attributes(name: str, trees: list[ast.Module]) -> bool:
    """Whether the name is only ever used as `name.attribute`, as a module is."""
    nodes = [n for t in trees for n in ast.walk(t)]
    dotted = sum(isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name for n in nodes)
    return dotted == sum(isinstance(n, ast.Name) and n.id == name for n in nodes)


def judge(read_fd: int, write_fd: int, program: str, tests: Sequence[str]) -> Verdict:
    """Loads the program at the other end of the line, then runs the tests in one namespace here.

    "gone": the sandbox ended or broke the protocol. Raises RuntimeError if it could not be set up.
    """
    failed_in_callback = False

    def serve(op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        nonlocal failed_in_callback
        if op != "call" or isinstance(args[0], Remote):
            raise PermissionError(f"{op}: the program may only call the tests' functions")
        try:
            return args[0](*args[1:], **kwargs)
        except AssertionError:  # which the program could swallow
            failed_in_callback = True
            raise

    peer = Peer(read_fd, write_fd, serve, Remote)
    try:
        match peer.receive():
            case ["ready", list()]:
                pass
            case message:
                raise RuntimeError(f"the sandbox could not be set up: {message}")
    except Gone as e:
        raise RuntimeError(f"the sandbox did not start ({e})") from e
    try:
        peer.ask("load", program)
        names = _Names(peer, tests)
        for test in tests:
            exec(compile(test, "<test>", "exec", dont_inherit=True, optimize=0), names)
        # A program that is no longer there, or broke the line, has not passed.
        peer.ask("has", "")
    except Gone:
        return "gone"
    except MemoryError:
        return "memory"
    except BaseException:
        return "failed"
    return "failed" if failed_in_callback else "ok"
