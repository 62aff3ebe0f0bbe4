"""``Actor`` and ``@endpoint``: how a class says what of it can be called from afar.

Where an endpoint runs:

============================  ==========================================================================
``def``                       main thread; one at a time, in order: CUDA, NCCL and Megatron live there
``async def``                 the worker's async thread; started in order, may overlap
``thread="io"``               the I/O loop, next to heartbeats; answers while the main thread is busy;
                              must not block
generator (sync or async)     as above; yields items to ``stream`` or ``call_one``
============================  ==========================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from miles_agents.errors import ConfigError

Thread = Literal["main", "async", "io"]
F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__miles_endpoint__"
RESERVED_NAMES = frozenset(
    {
        "endpoint", "endpoints", "failure", "flatten", "from_plain", "kill", "log_tail", "name", "node", "options",
        "shape", "slice", "stack", "stop", "targets", "to_plain", "wait_failed",
    }
)  # fmt: skip
"""What handles have themselves: ``mesh.stop`` ends the mesh, whatever its actors call so. Held by a test."""


class BadEndpoint(ConfigError):
    """An endpoint is declared in a way that cannot work."""

    code = "E-CALL-009"


@dataclass(frozen=True, slots=True)
class EndpointInfo:
    """What a caller or host has to know of an endpoint. ``group``: endpoints of one group run one at a time."""

    name: str
    thread: Thread
    is_async: bool
    is_generator: bool
    group: str | None = None


class Actor:
    """Base of everything that can be called from afar. Only methods marked ``@endpoint`` can be.

    The constructor runs in the worker, on its main thread. ``close`` runs there when the actor is stopped in good
    order; a killed one gets no call.
    """

    def close(self) -> None:
        """Release what the actor holds. Called once, at an orderly stop; the default does nothing."""


@overload
def endpoint(method: F) -> F: ...


@overload
def endpoint(*, thread: Thread | None = None, group: str | None = None) -> Callable[[F], F]: ...


def endpoint(method: F | None = None, *, thread: Thread | None = None, group: str | None = None) -> Any:
    """Mark a method as callable from afar.

    Args:
        method: The method, when used without arguments.
        thread: Where it runs; see the table of this module. Default: "main" for ``def``, "async" for ``async def``.
        group: Async endpoints of one thread that share a group never overlap. (Sync ones never overlap anyway.)

    Raises:
        BadEndpoint: the combination cannot work, or handles have something of that name themselves.
    """

    def mark(function: F) -> F:
        setattr(function, _MARK, _info(function, thread, group))
        return function

    return mark if method is None else mark(method)


def _info(function: Callable[..., Any], thread: Thread | None, group: str | None) -> EndpointInfo:
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    is_generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    where: Thread = thread or ("async" if is_async else "main")
    name = function.__name__
    _check_name(name)
    problem = None
    if where not in ("main", "async", "io"):
        problem = f"thread={where!r}; allowed are 'main', 'async', 'io'"
    elif where == "main" and is_async:
        problem = "an async method cannot run on the main thread, which has no event loop"
    elif where == "async" and not is_async:
        problem = "a sync method would block the async thread"
    elif where == "io" and is_generator and not is_async:
        problem = "a sync generator would block the I/O loop"
    elif group is not None and not is_async:
        problem = f"group={group!r}: a sync method runs to its end before anything else does on its thread"
    if problem is not None:
        raise BadEndpoint(
            f"endpoint {name} is declared in a way that cannot work",
            evidence=problem,
            advice="Drop thread= or group=, or make the method async where it has to be.",
        )
    return EndpointInfo(name, where, is_async, is_generator, group)


def _check_name(name: str) -> None:
    if name in RESERVED_NAMES or name.startswith("_"):
        raise BadEndpoint(
            f"an endpoint cannot be called {name}",
            evidence=f"mesh.{name} would not reach it: names that begin with _ and these belong to handles themselves: "
            f"{', '.join(sorted(RESERVED_NAMES))}",
            advice="Give the method another name.",
        )


def endpoints_of(cls: type) -> dict[str, EndpointInfo]:
    """The endpoints of a class by name, inherited ones included.

    Raises:
        BadEndpoint: A group has endpoints on two threads, where it could not keep them apart.
    """
    found: dict[str, EndpointInfo] = {}
    for name, member in inspect.getmembers(cls):
        info = getattr(member, _MARK, None)
        if isinstance(info, EndpointInfo):
            found[name] = info
    _check_groups(cls, found.values())
    return found


def _check_groups(cls: type, infos: Iterable[EndpointInfo]) -> None:
    first: dict[str, EndpointInfo] = {}
    for info in infos:
        if info.group is None:
            continue
        other = first.setdefault(info.group, info)
        if other.thread != info.thread:
            raise BadEndpoint(
                f"{cls.__qualname__} has a group over two threads",
                evidence=f"group {info.group!r}: {other.name} runs on {other.thread!r}, {info.name} on {info.thread!r}",
                advice="Give the endpoints of a group the same thread=.",
            )
