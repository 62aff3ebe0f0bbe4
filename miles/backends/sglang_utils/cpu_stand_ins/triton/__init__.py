"""Import-only ``triton`` for SGLang on a CPU: kernels can be declared, none can run.

There is no need for the real one (900 MB) where no GPU is: SGLang imports it all over, but on a CPU it takes the paths
that do without. Decorators return the function as it is, every ``triton.*`` module exists, everything else is a class
that cannot be made.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any, TypeVar

from absent_library import absent, any_module_below  # type: ignore[import-not-found]  # beside this one

_F = TypeVar("_F", bound=Callable[..., Any])

__version__ = "0.0.0"


def _fill(module: types.ModuleType) -> None:
    if module.__name__ == __name__ + ".language":
        module.constexpr = constexpr  # type: ignore[attr-defined]
    elif module.__name__ == __name__ + ".knobs":  # so that SGLang does not hook itself into what is not there
        module.runtime = module.compilation = None  # type: ignore[attr-defined]


class constexpr:  # noqa: N801  # triton's name
    """An annotation of kernels; constants at module level are wrapped in it, too."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Config:
    """One candidate of ``autotune``; SGLang lists them at import."""

    def __init__(self, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        self.kwargs = kwargs or {}
        self.options = options


def jit(function: _F | None = None, **_: Any) -> Any:
    """``@jit`` and ``@jit(...)``: the function as it is."""
    return function if function is not None else _as_it_is


def autotune(*_: Any, **__: Any) -> Callable[[_F], _F]:
    """``@autotune(...)``: the function as it is."""
    return _as_it_is


heuristics = autotune


def cdiv(x: int, y: int) -> int:
    """Quotient, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _as_it_is(function: _F) -> _F:
    return function


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return absent(f"{__name__}.{name}")


any_module_below(__name__, _fill)

language = importlib.import_module(f"{__name__}.language")  # an attribute also for who imports only the top
