"""Libraries that can be imported and not used: what the stand-ins of this folder have in common.

Every name of such a library is a class that cannot be made, so that ``isinstance``, annotations and base classes can
name it; every module below it exists.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class _Absent(type):
    """Type of the names that nothing on a CPU uses."""

    def __getattr__(cls, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is a stand-in: there is none on a CPU")


def absent(name: str) -> _Absent:
    """The class that stands for ``name``."""
    return _Absent(name, (), {})


class _Module(types.ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, fill: Callable[[types.ModuleType], None]) -> None:
        self._package = package
        self._fill = fill

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._package + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        self._fill(module)


def any_module_below(package: str, fill: Callable[[types.ModuleType], None] = lambda module: None) -> None:
    """From now on any ``package.*`` can be imported; ``fill`` puts into a new one what has to be real."""
    sys.meta_path.append(_Finder(package, fill))
