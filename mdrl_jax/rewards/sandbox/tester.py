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
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mdrl_jax.rewards.sandbox import names, wire
from mdrl_jax.rewards.sandbox.remote import RefusingPeer, Remote, RemoteCoroutine, is_special, named
from mdrl_jax.rewards.sandbox.wire import Foreign, Gone, Unsupported

_KEPT = ("__new__", "__init_subclass__", "__class_getitem__", "__getattribute__")  # of the tests' classes
_KINDS = {"method": "method", "staticmethod": "static", "classmethod": "class", "property": "property"}
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


class Tester(RefusingPeer):
    """The end of the connection that holds the tests.

    Attributes:
      failed: whether a function of the tests failed an assertion while the program called it.
    """

    def __init__(self, link: int) -> None:
        super().__init__(link)
        self.failed = False
        self._classes: list[Any] = []
        self._class_numbers: dict[type, int] = {}
        self._methods: list[dict[str, str]] = []
        self._errors: dict[int, Any] = {}

    def _serve(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            match op, args:
                case "call", [f, *rest] if callable(f) and id(f) in self._numbers:
                    return f(*rest, **kwargs)
                case "next", [iterator] if id(iterator) in self._numbers:
                    return wire.next_item(iterator)
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
                bases = (made,) if issubclass(made, _ProgramError) else (_ProgramError, made)
                self._errors[number] = type(str(name), bases, members)
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
        return None

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
        """Gives the program a class of the tests, and the classes of the tests that it inherits from.

        The methods keep running here. An enumeration goes as its members, without methods. A class that the program has
        already with these methods is not sent again.

        Args:
          kind: the class.
          all_methods: whether the program may call its public methods too. Otherwise it has those that Python calls
            by itself (`__init__`, `__eq__`), but not `__call__`.

        Returns:
          The number of the class at both ends.

        Raises:
          Exception, Unsupported, Gone: as `wire.Peer.ask`.
        """
        members = {n: v for b in reversed(kind.__mro__) if b.__module__ == "__main__" for n, v in b.__dict__.items()}
        given = [n for n in members if n not in _KEPT and (all_methods or is_special(n) and n != "__call__")]
        methods = {name: method for name in given if (method := _method_kind(members[name])) is not None}
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
        return _method_kind(defined) is None and not is_special(name)


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

    def knowing(builtin: Any) -> Any:
        def check(value: Any, kinds: Any) -> bool:
            if type(kinds) is tuple:
                return any(check(value, kind) for kind in kinds)
            if isinstance(value, Remote) and not isinstance(kinds, Remote):
                return bool(peer.ask(builtin.__name__, value, kinds))
            return builtin(value, kinds)

        return check

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

    own = {"isinstance": knowing(isinstance), "issubclass": knowing(issubclass), "eval": evaluate, "exec": execute}
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


def _names_of(peer: Tester, trees: Sequence[ast.Module], entry_point: str) -> _Names:
    """Makes the global names of the tests.

    Args:
      peer: the connection.
      trees: the tests.
      entry_point: the name of the function under test; "" if the check does not say.

    Raises:
      Unsupported: if the tests use several builtins and nothing else, and `entry_point` is "".
    """
    free = names.free_names(trees)
    everything: set[str] = set().union(*free)
    known = {n: n for n in sys.stdlib_module_names} | names.PACKAGES
    modules = {n: known[n] for n in everything if n in known and names.uses_as_module(n, trees)}
    shadowed = entry_point if hasattr(builtins, entry_point or "?") else ""
    if not shadowed and all(hasattr(builtins, n) or n in modules for n in everything):
        testing = [own - modules.keys() for own in free if own - modules.keys()]
        calls = [n.func for t in trees for n in ast.walk(t) if isinstance(n, ast.Call)]
        called = {f.id for f in calls if isinstance(f, ast.Name)}
        common = set.intersection(*testing) & called if testing else set()
        if len(common) > 1:
            peer.refuse(f"the tests call only builtins ({', '.join(sorted(common))}); give the check an entry_point")
        shadowed = next(iter(common), "")
    candidates = {n for n in everything if n not in modules and not hasattr(builtins, n)} - {entry_point}
    return _Names(peer, shadowed, modules, names.standard_functions(candidates, trees))


def judge(peer: Tester, program: str, tests: Sequence[str], entry_point: str) -> str:
    """Loads the program in the guest, then runs the tests in one namespace in this process.

    It raises nothing: every exception becomes a verdict.

    Args:
      peer: the connection to the guest.
      program: Python source.
      tests: Python sources.
      entry_point: the name of the function under test; "" if the check does not say.

    Returns:
      "ok" if the program and every test ran without an exception; "memory" if one of them ran out of memory; "gone" if
      the guest ended or broke the protocol; "unsupported: " and the reason if the tests cannot be decided; "failed"
      otherwise, also if the program or a test is not valid Python, or if a function of the tests failed an assertion
      that the program has caught.
    """
    try:
        trees = [ast.parse(test) for test in tests]
        space = _names_of(peer, trees, entry_point)
        classes = names.shared_classes(program, trees)
        for tree in trees if classes else []:  # the program may name these classes when it is loaded
            early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) or node in classes]
            tree.body = [node for node in tree.body if node not in early]
            _execute(ast.Module(early, type_ignores=[]), space)
        shared = {node.name: wire.Shared(peer.share(space[node.name], all_methods=False)) for node in classes}
        peer.ask("load", program, shared)
        for tree in trees:
            _execute(tree, space)
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


def _execute(tree: ast.Module, space: _Names) -> None:
    rewritten = ast.fix_missing_locations(_Types().visit(tree))
    exec(compile(rewritten, "<test>", "exec", dont_inherit=True, optimize=0), space)


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
    """Runs the tests of a request, writes the verdict, and ends the process with the exit status 0.

    Args:
      link: the file descriptor of a socket to the guest.
      verdict_fd: the file descriptor of the pipe for the verdict: that of `judge`, cut off at 4000 bytes. What goes
        wrong outside the tests is "unsupported: " and the error.
      request: "program", "tests", "entry_point" and "seed", the seed of the tests' random numbers: those of `random`,
        and those of numpy if a test mentions it.
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
