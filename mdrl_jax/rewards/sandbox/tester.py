"""Runs tests outside the sandbox against a program inside it.

The tests are ordinary Python. A name that they use but do not define is looked up in the program. The result is either
plain data (`wire.py`) or a `Remote`: a stand-in that asks the sandbox to call, index or iterate the object that it
stands for. Arguments and results are copies. The wanted values are therefore never where the program is, and `==` in a
test compares data of Python's own types.

Comparing a `Remote` with data raises an exception, whatever the program's `__eq__` would say. Builtins and modules of
the standard library are the real ones, even if the program redefines them. There is one exception: if the tests use no
names but those of builtins and such modules, the task was to define a builtin's name. A builtin's name then means the
program's definition if there is one.

A test cannot see a change that the program makes to an argument, nor what the program prints. It cannot catch an
exception by a class that the program defines, because the nearest builtin class arrives in its place.

One weakness remains. A test that compares two objects of the program's own classes, or only asks whether such an object
or a result of its methods is true, lets the program decide the verdict.
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
    """Stands for an object that only the program has. The sandbox carries out every operation on it."""

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
            raise TypeError("the program's __iter__ returned no iterator")
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
            raise TypeError("an object of a class of the program cannot be compared with data")
        return bool(self._ask(op, other))

    def _combine(self, op: str, left: Any, right: Any) -> Any:
        result = self.__dict__["_peer"].ask(op, left, right)
        # `abs(f(x) - 8) < 1e-6` must not pass because the `__sub__` of the program's class returns 0.
        if not (isinstance(result, Remote) or isinstance(left, Remote) and isinstance(right, Remote)):
            raise TypeError("an object of a class of the program cannot be combined with data to give data")
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
    """The global names of the tests: their own first, then those of Python and of the program (see the module)."""

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
    """Whether every use of the name is `name.attribute`, as with a module."""
    nodes = [n for t in trees for n in ast.walk(t)]
    dotted = sum(isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name for n in nodes)
    return dotted == sum(isinstance(n, ast.Name) and n.id == name for n in nodes)


def judge(read_fd: int, write_fd: int, program: str, tests: Sequence[str]) -> Verdict:
    """Loads the program in the guest, then runs the tests in one namespace in this process.

    Args:
      read_fd, write_fd: the pipes from and to the guest.
      program: Python source.
      tests: Python sources.

    Returns:
      "ok" if the program and every test ran without an exception; "memory" if one of them ran out of memory; "gone" if
      the guest ended or broke the protocol; "failed" otherwise.

    Raises:
      RuntimeError: if the guest could not be set up.
    """
    failed_in_callback = False

    def serve(op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        nonlocal failed_in_callback
        if op != "call" or isinstance(args[0], Remote):
            raise PermissionError(f"{op}: the program may only call the tests' functions")
        try:
            return args[0](*args[1:], **kwargs)
        except AssertionError:  # the program could catch it, so remember it here
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
        # Ask once more, because a program that has ended or broken the protocol has not passed.
        peer.ask("has", "")
    except Gone:
        return "gone"
    except MemoryError:
        return "memory"
    except BaseException:
        return "failed"
    return "failed" if failed_in_callback else "ok"
