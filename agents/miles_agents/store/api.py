"""What an actor does with the store. See docs/store.md; ``miles_agents.store`` exports it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from miles_agents.rpc.context import find_actor, find_call
from miles_agents.rpc.seconds import checked_seconds
from miles_agents.store.client import StoreClient, leave_to_parent
from miles_agents.store.errors import BadStoreArgument, BlocksLoop, NoStoreHere
from miles_agents.store.messages import MAX_PARTS
from miles_agents.store.node_store import MAX_TIMEOUT_S
from miles_agents.store.ref import Ref

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 60.0
MAX_COPIES = 16
_WAITING_AT_ONCE = 64
"""Threads of each verb that wait for the agent on behalf of event loops; more wait for a thread."""

_clients: dict[tuple[str, str], StoreClient] = {}
_pools: dict[str, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _forget_parent() -> None:
    """In a process that was forked off: its threads are not there, and its locks may be held by nobody."""
    global _lock
    _lock = threading.Lock()
    leave_to_parent()
    _clients.clear()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_parent)


def put(value: Any, *, copies: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ref:
    """Put a value into the node's store. Other workers get it by the reference, also on other nodes.

    Args:
        value: Whatever can travel in a call. Arrays and CPU tensors in it, however nested, are copied once.
        copies: On how many nodes it is before this returns. With 2, it survives the loss of this node.
        timeout_s: The longest to wait for room (and for the copies); the deadline of the running call counts too.

    Raises:
        StoreFull: No room in time; the error names who has it.
        ObjectTooLarge, CannotTravel, NoSecondNode, NoStoreHere, BlocksLoop, StoreSilent, NoMemory.
    """
    _not_on_a_loop("put")
    return _client().put([value], _copies(copies), _deadline(timeout_s))[0]


def put_parts(values: Sequence[Any], *, copies: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Ref]:
    """Put values side by side, all or none of them; a reference for each, whose reader maps only that.

    Their memory is given back when all of them are removed. Raises: see ``put``.
    """
    _not_on_a_loop("put_parts")
    parts = _parts(values)
    return _client().put(parts, _copies(copies), _deadline(timeout_s)) if parts else []


def get(ref: Ref, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """The value. Its large arrays and tensors are views of shared memory, and yours to change: nobody else sees it.

    Raises:
        ObjectRemoved, UnknownObject: It is not there any more, or never was.
        ObjectLost: Its node is gone, and no other has a copy.
        PullFailed, StoreFull, StoreSilent, NoStoreHere, BlocksLoop.
    """
    _not_on_a_loop("get")
    return _client().get(_checked(ref), _deadline(timeout_s))


def remove(ref: Ref, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Remove an object everywhere. Whoever has its value keeps it. Nothing happens if it is removed already."""
    _not_on_a_loop("remove")
    _client().remove([_checked(ref)], _deadline(timeout_s))


async def put_async(value: Any, *, copies: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ref:
    """``put`` for event loops. Do not change the value before it is done. If cancelled, nothing is left."""
    return (await put_parts_async([value], copies=copies, timeout_s=timeout_s))[0]


async def put_parts_async(values: Sequence[Any], *, copies: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Ref]:
    """``put_parts`` for event loops."""
    client, deadline, number = _client(), _deadline(timeout_s), _copies(copies)
    parts = _parts(values)

    def take_back(over: Future[list[Ref]]) -> None:
        if over.exception() is None:
            client.remove(over.result(), time.monotonic() + DEFAULT_TIMEOUT_S)

    return await _in_thread("put", lambda: client.put(parts, number, deadline), take_back) if parts else []


async def get_async(ref: Ref, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """``get`` for event loops."""
    client, deadline, checked = _client(), _deadline(timeout_s), _checked(ref)
    return await _in_thread("get", lambda: client.get(checked, deadline))


async def remove_async(ref: Ref, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """``remove`` for event loops."""
    client, deadline, checked = _client(), _deadline(timeout_s), _checked(ref)
    await _in_thread("remove", lambda: client.remove([checked], deadline))


async def remove_left_async(kept: Sequence[Ref], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
    """For an actor that takes the place of one that died: remove what processes of its name and rank before this one
    put on this node, but for the objects that somebody still has to read. Nobody else may know how these are called:
    a process can die between a put and telling of it.

    Args:
        kept: References of those objects.

    Returns:
        How many objects were removed.
    """
    client, deadline, checked = _client(), _deadline(timeout_s), [_checked(ref) for ref in kept]
    return await _in_thread("remove", lambda: client.remove_left(checked, deadline))


async def _in_thread(verb: str, work: Callable[[], T], take_back: Callable[[Future[T]], None] | None = None) -> T:
    job = _pool(verb).submit(work)
    try:
        return await asyncio.wrap_future(job)
    except asyncio.CancelledError:
        if not job.cancel() and take_back is not None:
            job.add_done_callback(take_back)
        raise


def _pool(verb: str) -> ThreadPoolExecutor:
    """One per verb: puts that wait for room must not keep out the removal that makes it."""
    with _lock:
        if verb not in _pools:
            _pools[verb] = ThreadPoolExecutor(_WAITING_AT_ONCE, thread_name_prefix=f"store-{verb}")
        return _pools[verb]


def _client() -> StoreClient:
    actor = find_actor()
    if actor is None or actor.store is None:
        raise NoStoreHere(
            "there is no store here",
            evidence="this process is not a worker" if actor is None else f"the agent of {actor.node_name} has none",
            advice="Use the store in an actor's constructor, endpoints and threads; elsewhere, pass references on.",
        )
    with _lock:
        if actor.store not in _clients:
            _clients[actor.store] = StoreClient(*actor.store)
        return _clients[actor.store]


def _not_on_a_loop(verb: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise BlocksLoop(
        f"store.{verb}() would block an event loop",
        evidence=f"an event loop runs on this thread ({threading.current_thread().name})",
        advice=f"Use `await store.{verb}_async(...)`.",
    )


def _deadline(timeout_s: float) -> float:
    wanted = checked_seconds("timeout_s", timeout_s)
    wanted = MAX_TIMEOUT_S if wanted is None else min(wanted, MAX_TIMEOUT_S)
    call = find_call()
    left = None if call is None else call.remaining_s()
    return time.monotonic() + max(0.0, wanted if left is None else min(wanted, left))


def _copies(copies: int) -> int:
    if type(copies) is not int or not 1 <= copies <= MAX_COPIES:
        raise BadStoreArgument(
            f"copies={copies!r} is no number of copies",
            evidence=f"allowed are 1 to {MAX_COPIES}, the one on this node included",
            advice="Use 2 for what has to survive the loss of a node.",
        )
    return copies


def _parts(values: Sequence[Any]) -> list[Any]:
    parts = list(values)
    if len(parts) > MAX_PARTS:
        raise BadStoreArgument(
            f"{len(parts)} parts in one put",
            evidence=f"allowed are {MAX_PARTS}",
            advice="Put several values into one part, or call put_parts more than once.",
        )
    return parts


def _checked(ref: Ref) -> Ref:
    if not isinstance(ref, Ref):
        raise BadStoreArgument(
            f"a '{type(ref).__name__}' is no reference",
            evidence=f"{ref!r:.200}",
            advice="Pass what store.put returned.",
        )
    return ref
