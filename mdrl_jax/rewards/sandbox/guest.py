"""Runs a program inside a sandbox: for tests, whose requests it carries out, or once with a standard input.

The process holds no secret: neither a token nor a wanted answer. A program that takes it over can therefore still do
no more than choose the values that its functions return and the text that it prints.
"""

import importlib
import io
import operator
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox import wire

# A test may ask these operations of an object of the program. `Guest._serve` carries out the others.
OPERATIONS: dict[str, Any] = {
    "call": lambda f, *args, **kwargs: f(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "delattr": delattr,
    "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "iter": iter, "reversed": lambda a: iter(reversed(a)), "len": len, "bool": bool, "str": str, "repr": repr,
    "format": format, "int": int, "float": float, "complex": complex, "hash": hash, "dir": dir,
    "index": operator.index, "round": round, "abs": abs, "neg": operator.neg, "pos": operator.pos,
    "invert": operator.invert, "isinstance": isinstance, "issubclass": issubclass,
    "type": lambda a: wire.Kept(type(a)), "plain": lambda a: a,
    "eq": lambda a, b: bool(a == b), "lt": lambda a, b: bool(a < b), "le": lambda a, b: bool(a <= b),
    "gt": lambda a, b: bool(a > b), "ge": lambda a, b: bool(a >= b), "contains": operator.contains,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "divmod": divmod, "pow": pow, "matmul": operator.matmul,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift,
    "rshift": operator.rshift, "iadd": operator.iadd, "isub": operator.isub, "imul": operator.imul,
    "itruediv": operator.itruediv, "ifloordiv": operator.ifloordiv, "imod": operator.imod, "ipow": operator.ipow,
    "imatmul": operator.imatmul, "iand": operator.iand, "ior": operator.ior, "ixor": operator.ixor,
    "ilshift": operator.ilshift, "irshift": operator.irshift,
    "enter": lambda c: type(c).__enter__(c), "exit": lambda c, *e: type(c).__exit__(c, *e),
    "close": lambda g: g.close(),
}  # fmt: skip
_COMPARED = {"eq": "__eq__", "order": "__lt__", "contains": "__contains__"}
_PROTOCOLS = {"coroutine": "__await__", "asyncgen": "__anext__", "asynciter": "__aiter__", "asyncwith": "__aenter__"}


class Guest(wire.Peer):
    """The end of the connection that holds the program. Its namespace is the module `__main__`."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd)
        self._program = types.ModuleType("__main__")
        self._classes: dict[int, Any] = {}
        self._class_numbers: dict[type, int] = {}
        self._numbers_there: dict[int, int] = {}  # by id of a stand-in, which `_strangers` keeps alive
        self._loop: Any = None

    def _serve(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        names = self._program.__dict__
        match op:
            case "load":
                names.update(args[1])
                sys.modules["__main__"] = self._program
                # optimize=0, because PYTHONOPTIMIZE would otherwise switch off the asserts of the program.
                exec(compile(args[0], "<program>", "exec", dont_inherit=True, optimize=0), names)
                return None
            case "has":
                return args[0] in names
            case "get":
                return wire.Kept(names[args[0]]) if isinstance(names[args[0]], type) else names[args[0]]
            case "eval":
                return eval(args[0], {})
            case "exec":
                exec(args[0], args[1])
                args[1].pop("__builtins__", None)
                return None
            case "new":
                made = args[0](*args[1:], **kwargs)
                return wire.Kept(made) if type(made).__module__ != "builtins" else made
            case "next":
                return wire.next_item(args[0])
            case "class":
                return self._mirror(*args)
            case "copy" | "deepcopy":
                import copy

                return copy.copy(args[0]) if op == "copy" else copy.deepcopy(args[0])
            case "await" | "anext" | "aenter" | "aexit":
                return self._wait(op, *args)
        return OPERATIONS[op](*args, **kwargs)

    def _wait(self, op: str, value: Any, *args: Any) -> Any:
        import asyncio

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)

        async def wait() -> Any:
            match op:
                case "anext":
                    try:
                        return [await value.__anext__()]
                    except StopAsyncIteration:
                        return []
                case "aenter":
                    return await type(value).__aenter__(value)
                case "aexit":
                    return await type(value).__aexit__(value, *args, None)
            return await value

        return self._loop.run_until_complete(wait())

    def _describe(self, value: Any) -> list[Any]:
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, BaseException):
            chain = [[self.number(c), c.__name__] for c in kind.__mro__ if c.__module__ != "builtins"]
            return ["errors" if isinstance(value, type) else "error", wire.builtin_name(kind), chain]
        compared = [(name, getattr(kind, m, None), getattr(object, m, None)) for name, m in _COMPARED.items()]
        traits = [name for name, own, default in compared if own is not default]
        traits += [name for name, method in _PROTOCOLS.items() if hasattr(kind, method)]
        return ["class" if isinstance(value, type) else "object", kind.__name__, traits]

    def _own_error(self, error: BaseException, table: "wire._Table") -> Any:
        number = self._class_number(type(error))
        if number is not None:
            return ["class", number]
        return None if type(error).__module__ == "builtins" else table._mine(error)

    def _stand_in(self, number: int, description: list[Any]) -> Any:
        there = wire.Foreign(self, number)

        def items() -> Iterator[Any]:
            while item := self.ask("next", there):
                yield item[0]

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.ask("call", there, *args, **kwargs)

        made: Any = items() if description[0] == "iter" else call
        made.__name__ = made.__qualname__ = str(description[-1])
        self._numbers_there[id(made)] = number
        return made

    def _theirs(self, value: Any) -> int | None:
        return self._numbers_there.get(id(value))

    # Classes that the tests define. The program has classes of the same names; their methods run in the tester.

    def _class_number(self, kind: type) -> int | None:
        return self._class_numbers.get(kind)

    def _import(self, module: str, name: str) -> Any:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def _class_of(self, number: int) -> Any:
        return self._classes[number]

    def _mirror(self, number: int, name: str, bases: list[Any], methods: dict[str, str], data: dict[str, Any]) -> None:
        """Makes, or extends, a class whose methods run in the tester.

        Args:
          number: the class's number at both ends.
          name: the class's name.
          bases: classes.
          methods: name -> "method", "static", "class" or "property".
          data: plain class attributes; for an enumeration the members, in "members".
        """
        if "members" in data:
            import enum

            made: Any = enum.Enum(name, data["members"], module="__main__")
        else:
            made = self._classes.get(number) or type(name, tuple(bases), {"__module__": "__main__"})
            for key, value in data.items():
                setattr(made, key, value)
            for method, kind in methods.items():
                setattr(made, method, self._stub(number, method, kind))
        self._classes[number] = made
        self._class_numbers[made] = number

    def _stub(self, number: int, name: str, kind: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            return self.ask("method", number, name, *args, **kwargs)

        method.__name__ = name
        match kind:
            case "static":
                return staticmethod(method)
            case "class":
                return classmethod(lambda cls, *args, **kwargs: method(*args, **kwargs))
            case "property":
                return property(method)
        return method


def serve(link: int, seed: int) -> NoReturn:
    """Answers the requests of the tests until they close the link, then ends this process with the exit status 0.

    An error of the link ends it in the same way. Warnings are switched off.

    Args:
      link: the file descriptor of a socket to the tester.
      seed: seed of the program's random numbers (the module `random`).
    """
    _quiet(seed)
    try:
        Guest(link, link).serve_forever()
    finally:
        os._exit(0)


def run_once(program: str, seed: int) -> NoReturn:
    """Runs a program as a script, from standard input to standard output, and ends the process.

    The exit status is 0 if the program ends normally or by SystemExit, whatever its status; 1 if it is not valid
    Python, raises another exception, or its output cannot be written; 77 if it runs out of memory. Input and output are
    UTF-8. Warnings are switched off.

    Args:
      program: Python source.
      seed: seed of the program's random numbers (the module `random`).
    """
    _quiet(seed)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="replace")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace", write_through=False
    )
    names = types.ModuleType("__main__")
    sys.modules["__main__"] = names
    status = 1
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True, optimize=0), names.__dict__)
        status = 0
    except SystemExit:
        status = 0
    except MemoryError:
        status = 77
    except BaseException:
        pass
    try:
        sys.stdout.flush()
    except BaseException:
        status = 1
    os._exit(status)


def _quiet(seed: int) -> None:
    import random
    import warnings

    warnings.simplefilter("ignore")
    random.seed(seed)
