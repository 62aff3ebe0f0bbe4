"""The store of one node: the pool of segments, the objects in them, and who may have them. Lives in the agent.

Consumes: questions of workers (``door``), calls of other agents and the controller (``orders``), deaths of workers.
Produces: segments and descriptors; copies of objects of other nodes (``pulls``). Waits for: room, until the deadline
of whoever asked; threads that make and close segments; other agents, each time with a deadline.

Invariants: those of ``table``; what was committed is told to its producer, or removed again; when ``close`` returns,
this process has no segment any more (the store is one life of the agent long: after a fence, nothing is kept).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miles_agents.agent.background import Background
from miles_agents.errors import MilesError
from miles_agents.node_info import NodeInfo
from miles_agents.store import messages, table_view
from miles_agents.store.door import Answer, StoreDoor, Visitor
from miles_agents.store.errors import BadStoreArgument, ObjectRemoved, UnknownObject
from miles_agents.store.ref import Key, Ref
from miles_agents.store.segments import MAX_SEGMENTS, RESERVED_FDS, SegmentFile, SegmentMaker
from miles_agents.store.table import Close, Effect, Grant, Make, Owner, PoolTable, Refuse, StoredObject
from miles_agents.wire.envelope import Address

logger = logging.getLogger(__name__)
_THREADS = 4
MAX_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What a node's store is made of.

    Attributes:
        limit_bytes: The pool's size.
        max_segments: How many segments it may have.
        socket_path: Where workers ask.
        address: The address of the cluster's network on which copies are handed to other nodes.
    """

    limit_bytes: int
    max_segments: int
    socket_path: Path
    address: str


def store_parts(info: NodeInfo, store_bytes: int | None, socket_path: Path) -> StoreParts:
    """For a node: ``store_bytes``, or a tenth of its memory; as many segments as the agent may have open files for."""
    limit = info.memory_bytes // 10 if store_bytes is None else store_bytes
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = MAX_SEGMENTS if files == resource.RLIM_INFINITY else min(MAX_SEGMENTS, files - RESERVED_FDS)
    return StoreParts(limit, max(1, most), socket_path, info.addresses[0] if info.addresses else "127.0.0.1")


class Others(Protocol):
    """What the store asks of other nodes."""

    async def fetch(self, ref: Ref, timeout_s: float) -> None:
        """Make a copy of an object that is not here. Raises ObjectRemoved, ObjectLost, PullFailed, StoreFull."""

    async def copy_out(self, refs: Sequence[Ref], copies: int, timeout_s: float) -> None:
        """Have ``copies`` nodes have these objects, this one included. Raises NoSecondNode, PullFailed."""

    async def remove(self, refs: Sequence[Ref]) -> None:
        """Remove objects everywhere but here. It goes on when the caller is cancelled."""

    def start_removal(self, refs: Sequence[Ref]) -> object:
        """The same, for those that do not wait."""

    def report(self, kind: str, error: MilesError) -> None:
        """Let the run know of ``store_full`` or ``object_lost``."""

    def status(self) -> dict[str, int]:
        """Counters."""


@dataclass(frozen=True, slots=True)
class Room:
    """An allocated segment."""

    request: int
    segment: int
    capacity: int


class NodeStore:
    """See the module's docstring. Create it on the agent's loop, once the agent has joined."""

    def __init__(
        self, parts: StoreParts, node: str, address: Address, find_worker: Callable[[str], str | None]
    ) -> None:
        self.parts = parts
        self.node = node
        self.address = address
        self.table = PoolTable(parts.limit_bytes, parts.max_segments)
        self.others: Others | None = None
        self.tasks: Background | None = None
        self.files: dict[int, SegmentFile] = {}
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self.loop = asyncio.get_running_loop()
        self._find_worker = find_worker
        self._requests = itertools.count(1)
        self._given = 0
        self._asked: dict[int, asyncio.Future[Room]] = {}
        self._wanted: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._maker = SegmentMaker()
        self.door = StoreDoor(parts.socket_path, self, lambda: self.tasks)

    def close(self) -> None:
        """Hang up, and let go of all memory."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.door.close()
        for file in self.files.values():
            file.abandon()  # a thread may still be sending from it
        self.files.clear()
        for asked in self._asked.values():
            asked.cancel()
        self.threads.shutdown(wait=False, cancel_futures=True)

    # -- room and objects, for the agent's own use -------------------------------------------------------------

    async def room(self, owner: Owner, nbytes: int, timeout_s: float, *, goes_first: bool = False) -> Room:
        """A segment for ``nbytes``; ``goes_first``: before all who wait and do not.

        Raises StoreFull, ObjectTooLarge, NoMemory.
        """
        if nbytes > self.table.limit_bytes:
            raise table_view.too_large(self.table, nbytes, self.node)
        request, now = next(self._requests), self.loop.time()
        asked: asyncio.Future[Room] = self.loop.create_future()
        self._asked[request], self._wanted[request] = asked, nbytes
        try:
            self._carry_out(self.table.ask(request, owner, nbytes, now + timeout_s, now, goes_first=goes_first))
            return await asked
        except BaseException:
            self.give_up(request)
            raise
        finally:
            self._asked.pop(request, None)
            self._wanted.pop(request, None)

    def give_up(self, request: int) -> None:
        """What was asked for, or allocated and not committed, is not wanted any more."""
        self._carry_out(self.table.give_up(request, self.loop.time()))

    def commit(self, room: Room, parts: Sequence[tuple[Key, int, int]]) -> None:
        """What lies there is objects from now on."""
        self.table.commit(room.segment, room.request, parts, self.loop.time())

    def drop(self, keys: Sequence[Key]) -> None:
        """Remove objects here."""
        for key in keys:
            self._carry_out(self.table.remove(key, self.loop.time()))

    def release(self, ident: str, holds: Sequence[int]) -> None:
        """Mappings that are gone."""
        self._carry_out(self.table.release(ident, holds, self.loop.time()))

    def worker_gone(self, token: str) -> None:
        """A worker is dead, and all that it had started."""
        if not self._closed:
            self.door.hang_up_on(f"{token}:")

    def facts(self) -> dict[str, int]:
        """Numbers for beats."""
        return table_view.facts_of(self.table)

    def status(self) -> dict[str, Any]:
        """Numbers, and who holds what."""
        counters = {} if self.others is None else self.others.status()
        return {**table_view.status_of(self.table, self.loop.time()), "refused": self.door.num_refused, **counters}

    def is_home_of(self, key: Key) -> bool:
        """Whether the object was put here."""
        return (key.rank, key.incarnation) == (self.address.rank, self.address.incarnation)

    def not_here(self, ref: Ref) -> ObjectRemoved | UnknownObject:
        """The error for an object of this node that is not there."""
        last = self._given
        if ref.key.number <= last:
            return removed(ref)
        return UnknownObject(
            f"{ref} is unknown",
            evidence=f"{self.node} has given out numbers up to {last}",
            advice="Use the reference that put returned.",
        )

    # -- questions of workers ----------------------------------------------------------------------------------

    def owner_of(self, token: str, process: int) -> Owner | None:
        """See ``Desk``."""
        label = self._find_worker(token)
        return None if label is None else Owner(f"{token}:{process}", label)

    async def answer(self, visitor: Visitor, question: list[Any]) -> Answer:
        """See ``Desk``."""
        match question:
            case [messages.ALLOC, int(nbytes), timeout_s]:
                return await self._alloc(visitor, nbytes, _seconds(timeout_s))
            case [messages.COMMIT, int(segment), list(places), int(copies), timeout_s]:
                return await self._commit(visitor, segment, places, copies, _seconds(timeout_s))
            case [messages.GET, int(hold), plain, timeout_s]:
                return await self._get(visitor, hold, Ref.from_plain(plain), _seconds(timeout_s))
            case [messages.REMOVE, list(plains)]:
                await self._remove([Ref.from_plain(plain) for plain in plains])
                return [], None
            case [messages.REMOVE_LEFT, list(kept)]:
                return [await self._remove_left(visitor.me, {Key(*key) for key in kept})], None
            case [messages.RELEASE, list(holds)]:
                self.release(visitor.me.ident, holds)
                return [], None
        raise ValueError(f"no question: {question!r:.100}")

    def not_taken(self, visitor: Visitor, question: list[Any]) -> None:
        """See ``Desk``: nobody will ever use what was given."""
        if question[0] == messages.GET:
            self.release(visitor.me.ident, [question[1]])
        elif question[0] == messages.COMMIT and visitor.committed:
            self._take_back(visitor.committed)

    def left(self, visitor: Visitor) -> None:
        """See ``Desk``."""
        for request in visitor.granted.values():
            self.give_up(request)
        visitor.granted.clear()
        if visitor.owner is not None and not self.door.is_here(visitor.owner.ident):
            self._carry_out(self.table.owner_gone(visitor.owner.ident, self.loop.time()))

    async def _alloc(self, visitor: Visitor, nbytes: int, timeout_s: float) -> Answer:
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes")
        room = await self.room(visitor.me, nbytes, timeout_s)
        visitor.granted[room.segment] = room.request
        return [room.segment, room.capacity], self.files[room.segment].writer_fd()

    async def _commit(self, visitor: Visitor, segment: int, places: list[Any], copies: int, timeout_s: float) -> Answer:
        request = visitor.granted.pop(segment)  # a KeyError is the worker's fault, and told as one
        room = Room(request, segment, self.files[segment].capacity)
        try:
            checked = checked_places(places, room.capacity)
        except ValueError:
            self.give_up(request)
            raise
        rank, incarnation = self.address.rank, self.address.incarnation
        refs = [Ref(self.node, Key(rank, incarnation, self._next_number()), nbytes) for _, nbytes in checked]
        parts = [(ref.key, offset, ref.nbytes) for ref, (offset, _) in zip(refs, checked, strict=True)]
        self.commit(room, parts)
        visitor.committed = refs
        if copies > 1:
            await self._copy_out(refs, copies, timeout_s)
        return [[ref.to_plain() for ref in refs]], None

    async def _copy_out(self, refs: list[Ref], copies: int, timeout_s: float) -> None:
        try:
            if self.others is None:
                raise BadStoreArgument(f"copies={copies}", evidence="this store knows no other nodes", advice="")
            await self.others.copy_out(refs, copies, timeout_s)
        except BaseException:
            self._take_back(refs)
            raise

    def _take_back(self, refs: Sequence[Ref]) -> None:
        """Nobody was told these references: remove the objects here, and the copies that others have already."""
        self.drop([ref.key for ref in refs])
        if self.others is not None:
            self.others.start_removal(refs)

    async def _get(self, visitor: Visitor, hold: int, ref: Ref, timeout_s: float) -> Answer:
        stored = await self.hold(ref, hold, visitor.me, timeout_s)
        try:
            return [stored.segment, stored.offset, stored.nbytes], self.files[stored.segment].reader_fd()
        except BaseException:
            self.release(visitor.me.ident, [hold])
            raise

    async def hold(self, ref: Ref, hold: int, owner: Owner, timeout_s: float) -> StoredObject:
        """Hold an object, which is fetched if it is not here."""
        stored = self.table.hold(ref.key, hold, owner)
        if stored is not None:
            return stored
        if self.is_home_of(ref.key) or self.others is None:
            raise self.not_here(ref)
        await self.others.fetch(ref, timeout_s)
        stored = self.table.hold(ref.key, hold, owner)
        if stored is None:
            raise removed(ref)
        return stored

    async def _remove(self, refs: list[Ref]) -> None:
        self.drop([ref.key for ref in refs])
        if self.others is not None:
            await self.others.remove(refs)

    async def _remove_left(self, owner: Owner, kept: set[Key]) -> int:
        token = owner.ident.partition(":")[0]
        left = [found for found in self.table.left_behind(owner.label, f"{token}:") if self.is_home_of(found.key)]
        refs = [Ref(self.node, found.key, found.nbytes) for found in left if found.key not in kept]
        await self._remove(refs)
        return len(refs)

    # -- inside ------------------------------------------------------------------------------------------------

    def _next_number(self) -> int:
        self._given += 1
        return self._given

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        if self._closed:
            return
        for effect in effects:
            match effect:
                case Grant(request, segment, capacity):
                    asked = self._asked.get(request)
                    if asked is not None and not asked.done():
                        asked.set_result(Room(request, segment, capacity))
                case Refuse(request):
                    self._refuse(effect, request)
                case Make(segment, capacity):
                    making = self.loop.run_in_executor(self.threads, self._maker.make, segment, capacity)
                    making.add_done_callback(functools.partial(self._on_made, segment))
                case Close(segment):
                    closing = self.loop.run_in_executor(self.threads, self.files.pop(segment).close)
                    closing.add_done_callback(functools.partial(self._on_closed, segment))
        self._set_timer()

    def _refuse(self, refuse: Refuse, request: int) -> None:
        asked = self._asked.get(request)
        if asked is not None and not asked.done():
            error = table_view.store_full(self.table, refuse, self._wanted[request], self.node, self.loop.time())
            asked.set_exception(error)
            logger.warning("%s", error)
            if self.others is not None:
                self.others.report("store_full", error)

    def _on_made(self, segment: int, making: asyncio.Future[SegmentFile]) -> None:
        if making.cancelled():
            return
        error = making.exception()
        if error is not None:
            self._carry_out(self.table.make_failed(segment, f"{type(error).__name__}: {error}", self.loop.time()))
        elif self._closed:
            making.result().close()
        else:
            self.files[segment] = making.result()
            self._carry_out(self.table.made(segment, self.loop.time()))

    def _on_closed(self, segment: int, closing: asyncio.Future[None]) -> None:
        if not self._closed and not closing.cancelled():
            with contextlib.suppress(OSError):
                closing.result()
            self._carry_out(self.table.closed(segment, self.loop.time()))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.table.next_deadline
        if due is not None:
            self._timer = self.loop.call_at(due, self._on_time)

    def _on_time(self) -> None:
        self._carry_out(self.table.tick(self.loop.time()))


def removed(ref: Ref) -> ObjectRemoved:
    """The error for an object that was removed."""
    return ObjectRemoved(
        f"{ref} was removed",
        evidence="somebody called remove with its reference",
        advice="Remove an object only when nobody will get it any more.",
    )


def checked_places(places: list[Any], capacity: int) -> list[tuple[int, int]]:
    """Offsets and sizes of the parts of a segment: in order, apart, inside. Raises ValueError."""
    end, found = 0, []
    for offset, nbytes in places:
        if type(offset) is not int or type(nbytes) is not int or offset < end or nbytes <= 0:
            raise ValueError("parts out of order")
        end = offset + nbytes
        found.append((offset, nbytes))
    if not found or len(found) > messages.MAX_PARTS or end > capacity:
        raise ValueError(f"{len(found)} parts that end at {end} of {capacity}")
    return found


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= MAX_TIMEOUT_S:
        raise ValueError(f"{value!r:.50} seconds")
    return float(value)
