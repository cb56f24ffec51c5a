"""Finds out, from the sources of tests, what their names mean: the tests' own, Python's or the program's."""

import ast
import importlib
import symtable
from collections.abc import Sequence
from typing import Any

# Names under which tests use packages that they do not import.
PACKAGES = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "scipy": "scipy", "sympy": "sympy",
             "nx": "networkx", "networkx": "networkx"}  # fmt: skip
_STANDARD = ("math", "collections", "itertools", "functools", "statistics", "operator", "copy", "fractions", "decimal")


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


def free_names(trees: Sequence[ast.Module]) -> list[set[str]]:
    """For each test, the global names that it reads and that the tests have not bound when it does.

    The tests run in this order in one namespace, so what an earlier one binds is bound in a later one. A function reads
    its globals when it is called, so a name that any test binds at its top level is no free name of a function. Names
    of builtins are free names too.

    Returns:
      A set of names for each test, in the order of the tests.
    """
    found: list[tuple[set[str], set[str]]] = []
    bound: set[str] = set()
    for tree in trees:
        reads = _Reads()
        reads.bound = bound
        reads.visit(tree)
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


def uses_as_module(name: str, trees: Sequence[ast.Module]) -> bool:
    """Whether every use of the name is `name.attribute`, as with a module. True if the tests do not use it."""
    nodes = [n for t in trees for n in ast.walk(t)]
    dotted = sum(isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name for n in nodes)
    return dotted == sum(isinstance(n, ast.Name) and n.id == name for n in nodes)


def standard_functions(names: set[str], trees: Sequence[ast.Module]) -> dict[str, Any]:
    """The functions of the standard library that tests apply to the program's results and have not imported.

    Such a test is `assert isclose(f(3), 6)`: `isclose` judges, so it must not be the program's. Only the modules math,
    collections, itertools, functools, statistics, operator, copy, fractions and decimal are searched, in this order.

    Args:
      names: the names that may be the program's: those that the tests read and do not bind, without modules, builtins
        and the function under test.
      trees: the tests.

    Returns:
      By name, what the module has under it. Only a name that is called with another one of `names` in its positional
      arguments is here. {} if no other name of `names` would be left for the program.
    """
    calls = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    found: dict[str, Any] = {}
    for call in calls:
        name = call.func.id  # type: ignore[attr-defined]
        inner = {n.id for a in call.args for n in ast.walk(a) if isinstance(n, ast.Name)} & names - {name}
        if name in names and name not in found and inner:
            modules = [vars(importlib.import_module(module)) for module in _STANDARD]
            found |= next(({name: m[name]} for m in modules if name in m and not name.startswith("_")), {})
    return {name: value for name, value in found.items() if names - found.keys()}


def shared_classes(program: str, trees: list[ast.Module]) -> list[ast.ClassDef]:
    """The classes of the tests that the program names and does not define, such as LeetCode's ListNode.

    Args:
      program: Python source.
      trees: the tests.

    Returns:
      The definitions at the top level of the tests, in order. [] if the program is not valid Python.
    """
    try:
        table = _table(program)
        read = {s.get_name() for s in table.get_symbols() if s.is_referenced()} | _read_inside(table)
        wanted = read - _bound(table)
    except (SyntaxError, ValueError):
        return []
    return [n for t in trees for n in t.body if isinstance(n, ast.ClassDef) and n.name in wanted]
