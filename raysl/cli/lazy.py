"""Import the library name by name, so that the command answers before torch and Ray are loaded.

The command line needs the configuration classes, which stand beside the classes that they configure, in modules that
import torch. After `install_import_hook`, a module of raysl runs only those of its top-level statements that a name
needs which somebody asks for: the statement that binds the name, the statements that bind the names which it mentions,
and so on, in the order of the file. `Pirl` needs torch, and `Config` beside it does not.

Only the command installs this. In Python, and in the workers of Ray, the modules are imported as ever.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_FLAGS = __future__.annotations.compiler_flag
# One lock for all modules: to run a statement of one may ask for names of others.
_LOCK = threading.RLock()


def install_import_hook() -> None:
    """Import modules of raysl name by name from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if not name.startswith("raysl."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        tree = ast.parse(self.get_data(self.path), self.path)
        module.__doc__ = ast.get_docstring(tree, clean=False)
        vars(module)["_statements"] = _Statements(module, self.path, tree)
        module.__class__ = _LazyModule
        vars(module)["_statements"].run_effects()


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        statements: _Statements = vars(self)["_statements"]
        if not statements.run(name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return vars(self)[name]

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *vars(self)["_statements"].names})

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles functions that hold modules, and its pickler knows plain modules only.
        return importlib.import_module, (self.__name__,)


class _Statements:
    """The top-level statements of a module that have not run yet.

    Attributes:
        names: for each name, the positions of the statements that bind it.
    """

    def __init__(self, module: ModuleType, path: str, tree: ast.Module) -> None:
        self._module = module
        self._path = path
        self._nodes: list[ast.stmt] = [one for node in tree.body for one in _split(node)]
        self._waiting = set(range(len(self._nodes)))
        self.names: dict[str, list[int]] = {}
        self._effects: list[int] = []
        for position, node in enumerate(self._nodes):
            bound = set(_bound(node))
            for name in bound:
                self.names.setdefault(name, []).append(position)
            if not bound:
                self._effects.append(position)

    def run_effects(self) -> None:
        """Run the statements that bind no name, with what they need, as an ordinary import does."""
        self._run(self._effects)

    def run(self, name: str) -> bool:
        """Run what `name` needs. Return False when the module does not bind it."""
        if name not in self.names:
            return False
        self._run(self.names[name])
        return name in vars(self._module)

    def _run(self, positions: Sequence[int]) -> None:
        with _LOCK:
            for position in sorted(self._needed(positions)):
                if position not in self._waiting:
                    continue  # A statement before it has asked for it through another module.
                self._waiting.discard(position)
                code = ast.Module([self._nodes[position]], [])
                try:
                    exec(compile(code, self._path, "exec", _FLAGS, dont_inherit=True), vars(self._module))
                except BaseException:
                    self._waiting.add(position)
                    raise

    def _needed(self, positions: Sequence[int]) -> set[int]:
        needed: set[int] = set()
        look = [position for position in positions if position in self._waiting]
        while look:
            position = look.pop()
            if position in needed:
                continue
            needed.add(position)
            for name in _mentioned(self._nodes[position]):
                look += [one for one in self.names.get(name, ()) if one in self._waiting]
        return needed


def _split(node: ast.stmt) -> Iterator[ast.stmt]:
    """Yield an import of several names as one import of each; leave out what only a type checker or reader sees."""
    if isinstance(node, ast.ImportFrom):
        if node.module != "__future__":
            for alias in node.names:
                yield ast.copy_location(ast.ImportFrom(node.module, [alias], node.level), node)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield ast.copy_location(ast.Import([alias]), node)
    elif not _is_text(node) and not _is_for_types(node):
        yield node


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement binds in its module."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, ast.expr) or isinstance(node, ast.Tuple | ast.List | ast.NamedExpr):
        for child in ast.iter_child_nodes(node):
            yield from _bound(child)


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Yield the names in a statement, but for the annotations of functions, which nothing evaluates."""
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.arg) or child is getattr(node, "returns", None):
            continue
        yield from _mentioned(child)
