"""Why a dotted path to user code leads nowhere, told from the text of its module, which is not run for that."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from miles.utils.misc import not_built

_MAKE_NAMES = frozenset({"globals", "setattr", "exec", "eval", "vars", "__dict__", "update_wrapper"})
"""A module that uses one of these outside its functions may have names that its text does not show."""


def why_not_found(dotted: str) -> str:
    """Why ``package.module.name`` cannot be found, without running more of it than its packages' own imports."""
    found = find_module(dotted)
    return found if isinstance(found, str) else _why_no_name(found, dotted.rpartition(".")[2])


def find_module(dotted: str) -> ModuleSpec | str:
    """The module of ``package.module.name``, or why there is none."""
    module, _, name = dotted.rpartition(".")
    if not module or not name:
        return "it is not of the form module.name"
    try:
        found = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # boundary: a package of the user's runs here
        if isinstance(error, ModuleNotFoundError) and (why := not_built(module)):
            return why
        return f"{type(error).__name__}: {error}"
    if found is None:
        return not_built(module) or f"there is no module {module!r} on the import path"
    return found


def _why_no_name(spec: ModuleSpec, name: str) -> str:
    """Empty if the module has the name, or if its text does not tell."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError):
        return ""
    except SyntaxError as error:
        return f"{spec.origin}, line {error.lineno}: {error.msg}"
    names = _Names(tree)
    if name in names.bound:
        return "" if name in names.values else f"{name!r} of {spec.origin} is a module, and no function or class"
    if names.may_have_more:
        return ""
    if any(_is_module(Path(place), name) for place in spec.submodule_search_locations or ()):
        return f"{spec.name}.{name} is a module, and no function or class"
    there = sorted(known for known in names.values if not known.startswith("_"))
    near = difflib.get_close_matches(name, there, n=1)
    has = f"did you mean {near[0]}?" if near else f"it has: {', '.join(there[:20]) or 'nothing'}"
    return f"{spec.origin} has no {name!r}; {has}"


def _is_module(directory: Path, name: str) -> bool:
    return (directory / name).is_dir() or any(directory.glob(f"{name}.*"))


class _Names:
    """What a module's text binds outside its functions and classes.

    Attributes:
        bound: All names.
        values: Those that may be something else than a module.
        may_have_more: Others may be there when it has run.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.bound: set[str] = set()
        self.values: set[str] = set()
        self.may_have_more = False
        for node in _outside_functions(tree.body):
            self._take(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                self._value(*node.names)
        self.may_have_more |= "__getattr__" in self.bound

    def _value(self, *names: str) -> None:
        self.bound.update(names)
        self.values.update(names)

    def _take(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._value(node.name)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                self._value(node.id)
            self.may_have_more |= node.id in _MAKE_NAMES
        elif isinstance(node, ast.Attribute):
            self.may_have_more |= node.attr in _MAKE_NAMES or node.attr == "modules"
        elif isinstance(node, ast.Import):
            self.bound.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            self.may_have_more |= any(alias.name == "*" for alias in node.names)
            self._value(*(alias.asname or alias.name for alias in node.names))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            self._value(node.name)


def _outside_functions(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes that run when the module does, but for those inside classes."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _outside_functions([*node.decorator_list])
        elif not isinstance(node, ast.Lambda):
            yield from _outside_functions(ast.iter_child_nodes(node))
