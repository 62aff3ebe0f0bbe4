"""A worker's end of the store: asks its agent for segments, copies into them, maps what others put.

Consumes values and references, from any thread; the ends of mappings, from the garbage collector. Produces objects in
segments; values whose arrays are views of mappings. Waits for: the agent's answers, until the deadline and ``_GRACE_S``
more; the end of the agent closes the connection. A thread of its own tells the agent of mappings that are gone,
again every ``_TELL_AGAIN_S`` until it has heard.

Invariants: a value is visible to others only after all of it was copied; what a reader changes in its arrays nobody
else sees; memory is not given back while a view of it lives; a process that was forked off works with connections of
its own and never speaks for the mappings of its parent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miles_agents.store import layout, messages
from miles_agents.store.errors import StoreSilent
from miles_agents.store.layout import PAGE, Layout, align
from miles_agents.store.memory import Mapping, address_of, copy_bytes, copy_into
from miles_agents.store.ref import Ref
from miles_agents.wire.codec import Gathered, decode_bulk, encode_bulk

logger = logging.getLogger(__name__)
_GRACE_S = 10.0
_IDLE_CONNECTIONS = 16
_MAPPINGS = 32
_BATCH = 1000
_TELL_AGAIN_S = 0.5
Place = tuple[int, int]
"""Segment and offset."""


_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_of_parents: list[socket.socket] = []


def leave_to_parent() -> None:
    """In a process that was forked off: let go of the connections of its parent.

    But for those that say that the parent's mappings are there: this process has them, too, and may read them.
    """
    for connection in list(_open):
        if connection.for_life:
            _of_parents.append(connection.channel)
        else:
            connection.channel.close()
    _open.clear()


class Connection:
    """One connection to the agent, for one question at a time.

    Args:
        path: The agent's socket.
        token: The worker's.
        process: A number that this process has chosen.
        for_life: It stands for the process's mappings: one that is forked off keeps it.
    """

    def __init__(self, path: str, token: str, process: int, *, for_life: bool = False) -> None:
        self.for_life = for_life
        self._pid = os.getpid()
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        _open.add(self)
        try:
            self.channel.settimeout(_GRACE_S)
            self.channel.connect(path)
            self.ask([messages.HELLO, token, process], 0.0)
        except OSError as error:
            self.close()
            raise _silent(f"{type(error).__name__}: {error}") from None
        except BaseException:
            self.close()
            raise

    def ask(self, question: Sequence[Any], timeout_s: float) -> tuple[list[Any], int | None]:
        """The answer, and a descriptor that is now the caller's. Raises what the agent raised; StoreSilent."""
        try:
            self.channel.settimeout(timeout_s + _GRACE_S)
            messages.send(self.channel, question)
            answer, fd = messages.receive(self.channel)
        except (OSError, EOFError, ValueError) as error:
            raise _silent(f"{type(error).__name__}: {error or 'it hung up'}") from None
        if answer[0] == messages.OK:
            return answer[1:], fd
        if fd is not None:
            os.close(fd)
        raise messages.rebuild(answer)

    def close(self) -> None:
        """Hang up: what was allocated over this connection and not committed is given back.

        Also if a process that was forked off has the socket, too: closing alone would tell the agent nothing then.
        """
        _open.discard(self)
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)
        self.channel.close()


@dataclass(frozen=True, slots=True)
class _Part:
    """One value on its way into a segment."""

    offset: int
    body: bytes
    buffers: list[memoryview | Gathered]
    plan: Layout

    def write(self, address: int) -> None:
        """Copy it to where its segment is mapped."""
        start = address + self.offset
        copy_bytes(start, self.plan.head)
        copy_bytes(start + self.plan.body, self.body)
        for at, buffer in zip(self.plan.buffers, self.buffers, strict=True):
            copy_into(start + at, buffer)


class StoreClient:
    """See the module's docstring. One per process."""

    def __init__(self, path: str, token: str) -> None:
        self._hello = (path, token, secrets.randbits(62))
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._writable: OrderedDict[int, Mapping] = OrderedDict()
        self._idle: OrderedDict[Place, Mapping] = OrderedDict()
        self._holds = itertools.count(1)
        self._gone: queue.SimpleQueue[tuple[Place, Mapping | None, int] | None] = queue.SimpleQueue()
        # Open for as long as this process lives: with the last connection, its mappings end for the agent.
        self._anchor = Connection(*self._hello, for_life=True)
        self._teller = threading.Thread(target=self._tell_what_is_gone, name="store", daemon=True)
        self._teller.start()

    def close(self) -> None:
        """Hang up. Values that were got may still be used, but not counted on: workers never do this."""
        self._gone.put(None)
        self._teller.join()
        with self._lock:
            connections, self._connections = [*self._connections, self._anchor], []
            self._writable.clear()
            self._idle.clear()
        for connection in connections:
            connection.close()

    # -- the verbs ---------------------------------------------------------------------------------------------

    def put(self, values: Sequence[Any], copies: int, deadline: float) -> list[Ref]:
        """Put values into one segment, committed together; a reference for each."""
        parts, end = _plan_parts(values)
        with self._connection() as connection:
            (segment, capacity), fd = connection.ask([messages.ALLOC, end, _left(deadline)], _left(deadline))
            mapping = self._map_to_write(segment, capacity, fd)
            for part in parts:
                part.write(mapping.address)
            places = [[part.offset, part.plan.nbytes] for part in parts]
            question = [messages.COMMIT, segment, places, copies, _left(deadline)]
            (plains,), _ = connection.ask(question, _left(deadline))
        return [Ref.from_plain(plain) for plain in plains]

    def get(self, ref: Ref, deadline: float) -> Any:
        """The value: its large arrays and tensors are views of memory that this process maps for itself."""
        hold = next(self._holds)
        try:
            with self._connection() as connection:
                question = [messages.GET, hold, ref.to_plain(), _left(deadline)]
                (segment, offset, nbytes), fd = connection.ask(question, _left(deadline))
            mapping = self._map_to_read((segment, offset), nbytes, fd)
        except BaseException:
            # The connection is closed by now: no answer that is under way can make this hold any more.
            self._on_gone((0, 0), None, hold)
            raise
        on_gone = functools.partial(self._on_gone, (segment, offset), mapping, hold)
        exporter = mapping.exporter_until(nbytes, on_gone)
        body, buffers = layout.read(memoryview(exporter).cast("B"))
        return decode_bulk(bytes(body), buffers)

    def remove(self, refs: Sequence[Ref], deadline: float) -> None:
        """Remove objects here and everywhere."""
        with self._connection() as connection:
            connection.ask([messages.REMOVE, [ref.to_plain() for ref in refs]], _left(deadline))

    def remove_left(self, kept: Sequence[Ref], deadline: float) -> int:
        """Remove what earlier lives of this worker's actor put on this node; how many objects."""
        with self._connection() as connection:
            question = [messages.REMOVE_LEFT, [list(ref.key) for ref in kept]]
            (count,), _ = connection.ask(question, _left(deadline))
        return int(count)

    # -- connections -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        """One for one caller; one that was left in the middle of something is closed."""
        with self._lock:
            connection = self._connections.pop() if self._connections else None
        connection = connection or Connection(*self._hello)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._connections) < _IDLE_CONNECTIONS:
                self._connections.append(connection)
                return
        connection.close()

    # -- mappings ----------------------------------------------------------------------------------------------

    def _map_to_write(self, segment: int, capacity: int, fd: int | None) -> Mapping:
        if fd is None:
            raise _silent("it sent no descriptor")
        try:
            with self._lock:
                mapping = self._writable.pop(segment, None)
            mapping = mapping or Mapping(fd, capacity, private=False, populate=True)
        finally:
            os.close(fd)
        with self._lock:
            self._writable[segment] = mapping
            while len(self._writable) > _MAPPINGS:
                self._writable.popitem(last=False)
        return mapping

    def _map_to_read(self, place: Place, nbytes: int, fd: int | None) -> Mapping:
        if fd is None:
            raise _silent("it sent no descriptor")
        try:
            with self._lock:
                mapping = self._idle.pop(place, None)
            if mapping is None or mapping.nbytes < nbytes:
                mapping = Mapping(fd, align(nbytes, PAGE), offset=place[1], private=True)
        finally:
            os.close(fd)
        return mapping

    def _on_gone(self, place: Place, mapping: Mapping | None, hold: int) -> None:
        """No view of a mapping is left. Runs wherever the garbage collector does: takes no lock."""
        if os.getpid() == self._pid:
            self._gone.put((place, mapping, hold))

    def _tell_what_is_gone(self) -> None:
        untold: list[int] = []
        closing = False
        while not closing:
            holds, closing = self._clear_away(_TELL_AGAIN_S if untold else None)
            untold += holds
            try:
                while untold:
                    self._tell([messages.RELEASE, untold[:_BATCH]])
                    del untold[:_BATCH]
            except Exception as error:  # noqa: BLE001 - boundary: this thread serves all; the agent's end is ours
                logger.debug("the store was not told yet of %d mappings that are gone: %s", len(untold), error)

    def _clear_away(self, at_most_s: float | None) -> tuple[list[int], bool]:
        """Wait until mappings are gone; keep or end them; their holds, and whether ``close`` was called."""
        holds: list[int] = []
        with contextlib.suppress(queue.Empty):
            one = self._gone.get(timeout=at_most_s)
            while one is not None:
                place, mapping, hold = one
                self._keep_for_later(place, mapping)
                holds.append(hold)
                if len(holds) == _BATCH:
                    return holds, False
                one = self._gone.get_nowait()
            return holds, True
        return holds, False

    def _tell(self, question: list[Any]) -> None:
        """Over the connection that is always open; one that fails is replaced before it is closed."""
        try:
            self._anchor.ask(question, 0.0)
        except StoreSilent:
            broken, self._anchor = self._anchor, Connection(*self._hello, for_life=True)
            broken.close()
            self._anchor.ask(question, 0.0)

    def _keep_for_later(self, place: Place, mapping: Mapping | None) -> None:
        """Mapping costs as much as copying; the segment, and so the place, will be used again."""
        if mapping is None or not mapping.drop_private_pages():
            return
        with self._lock:
            self._idle[place] = mapping
            while len(self._idle) > _MAPPINGS:
                self._idle.popitem(last=False)


def _plan_parts(values: Sequence[Any]) -> tuple[list[_Part], int]:
    parts, end = [], 0
    for index, value in enumerate(values):
        what = "value" if len(values) == 1 else f"values[{index}]"
        body, buffers = encode_bulk(value, what=what)
        offset = align(end, PAGE)
        part = _Part(offset, body, buffers, layout.plan(len(body), [(b.nbytes, address_of(b)) for b in buffers]))
        parts.append(part)
        end = offset + part.plan.nbytes
    return parts, end


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _silent(why: str) -> StoreSilent:
    return StoreSilent(
        "the node's store does not answer",
        evidence=why,
        advice="Look at the agent's log: it has ended, is stopped, or has very much to do.",
    )
