"""Objects of other nodes: fetched once for all readers of this one, handed to others, copied, removed everywhere.

Consumes what workers of this node want (``Others``) and calls of other agents (``endpoints``). Produces copies in this
node's pool, tickets for other agents, removals at all who have a copy. Waits for: other agents and the controller,
each call with a deadline; transfers, which end without progress. Invariants: one fetch of an object at a time; a copy
is visible only when all of it was checked; the home of an object knows of every copy, or the copy is dropped; what
other agents may ask, nobody else may.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from miles_agents.errors import MilesError, PeerFault
from miles_agents.rpc.context import current_call, outside_of_calls
from miles_agents.rpc.errors import DeadlineExceeded, NodeLost, NoSuchActor, StaleHandle
from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.guard import not_your_order
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.node import RpcNode
from miles_agents.rpc.shape import Extent, Shape
from miles_agents.store.bulk_fetch import BulkClient
from miles_agents.store.bulk_serve import BulkServer
from miles_agents.store.bulk_wire import BadPeer, Ticket
from miles_agents.store.errors import NoSecondNode, ObjectLost, ObjectRemoved, PullFailed
from miles_agents.store.layout import PAGE, align
from miles_agents.store.memory import Mapping
from miles_agents.store.node_store import NodeStore, Room, removed
from miles_agents.store.ref import Key, Ref
from miles_agents.store.table import Owner
from miles_agents.wire.envelope import AGENT_MESH

logger = logging.getLogger(__name__)
_ORDER_S = 30.0
_TRIES = 2
_REPORT_S = 10.0
_FETCH_S = 600.0
"""The longest that a fetch goes on for readers that have given up."""
GONE = (NodeLost, StaleHandle, NoSuchActor)
Place = tuple[str, int, int]
"""A living agent: name of its node, rank, incarnation."""


class OtherNodes:
    """See the module's docstring. Create it on the agent's loop; ``store.tasks`` runs its tasks."""

    def __init__(self, store: NodeStore, node: RpcNode, controller: ActorMesh) -> None:
        self.server = BulkServer(store.parts.address)
        self._client = BulkClient()
        self._store = store
        self._node = node
        self._controller = controller
        self._fetching: dict[Key, asyncio.Task[None]] = {}
        self._failed: dict[Key, MilesError] = {}
        self._unwanted: set[Key] = set()
        self._copies: dict[Key, dict[tuple[int, int], Place]] = {}
        self._holds = itertools.count(1)
        self.num_fetched = 0
        self._reported: dict[str, float] = {}

    def report(self, kind: str, error: MilesError) -> None:
        """Let the run know of ``store_full`` or ``object_lost``; not more often than every ``_REPORT_S``."""
        now = self._store.loop.time()
        if now - self._reported.get(kind, -_REPORT_S) < _REPORT_S:
            return
        self._reported[kind] = now
        tell = self._controller.endpoint("store_trouble").broadcast
        outside_of_calls().run(tell, kind, error.what, error.evidence).add_done_callback(nobody_cares)

    def status(self) -> dict[str, int]:
        """Counters."""
        server = self.server
        return {"fetched": self.num_fetched, "given": server.num_offers, "strangers": server.num_refused}

    def close(self) -> None:
        """Cut everything off."""
        self.server.close()
        self._client.close()

    def endpoints(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """What other agents may ask of this one; name to function."""
        asked: dict[str, Callable[..., Awaitable[Any]]] = {
            "store_offer": self.give_ticket,
            "store_fetched": self.was_fetched,
            "store_has": self.has,
            "store_fetch": self.fetch_for_other,
            "store_remove": self.remove_at_home,
            "store_drop": self.drop,
        }
        return {name: _for_agents(name, function) for name, function in asked.items()}

    # -- for workers of this node ------------------------------------------------------------------------------

    async def fetch(self, ref: Ref, timeout_s: float) -> None:
        """Have a copy here. Concurrent callers share one fetch; a failed one is tried anew by the next caller."""
        task = self._fetching.get(ref.key)
        if task is None:
            assert self._store.tasks is not None
            self._failed.pop(ref.key, None)
            work = outside_of_calls().run(
                self._store.tasks.create_task, self._fetch(ref, timeout_s), name=f"store: fetch {ref}"
            )
            task = self._fetching[ref.key] = work
            task.add_done_callback(lambda _: self._fetching.pop(ref.key, None))
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            raise _not_fetched(ref, f"not within {timeout_s:g} s; it is still tried")
        error = self._failed.get(ref.key)
        if error is not None:
            raise error

    async def copy_out(self, refs: Sequence[Ref], copies: int, timeout_s: float) -> None:
        """Have other nodes fetch these objects of ours, until there are ``copies`` with this one."""
        deadline = self._store.loop.time() + timeout_s
        others, _ = await self._nodes("")
        wanted, troubles = copies - 1, []
        start = refs[0].key.number % len(others) if others else 0  # not always the same node
        candidates = [*others[start:], *others[:start]]
        while wanted and len(candidates) >= wanted:
            chosen, candidates = candidates[:wanted], candidates[wanted:]
            plains = [ref.to_plain() for ref in refs]
            left = max(0.0, deadline - self._store.loop.time())
            calls = [self._agent(place, left).endpoint("store_fetch").call_one(plains, left) for place in chosen]
            for place, found in zip(chosen, await asyncio.gather(*calls, return_exceptions=True), strict=True):
                if isinstance(found, BaseException):
                    troubles.append(f"{place[0]}: {found}")
                else:
                    wanted -= 1
        if wanted:
            raise NoSecondNode(
                f"{copies} copies of {refs[0]} cannot be had",
                evidence="\n".join([f"there are {len(others)} other nodes", *troubles]),
                advice="Put with fewer copies, or wait until more nodes have joined.",
            )

    async def remove(self, refs: Sequence[Ref]) -> None:
        """Remove objects everywhere but here."""
        at_home = [ref for ref in refs if self._store.is_home_of(ref.key)]
        await self._drop_copies([ref.key for ref in at_home])
        for ref in refs:
            if ref not in at_home:
                await self._remove_elsewhere(ref)

    async def _remove_elsewhere(self, ref: Ref) -> None:
        if ref.key in self._fetching:
            self._unwanted.add(ref.key)
        try:
            await self._agent(_home_of(ref)).endpoint("store_remove").call_one([ref.to_plain()])
        except GONE:
            others, _ = await self._nodes(ref.home)
            await self._drop_at(others, [ref.key])

    # -- for other agents --------------------------------------------------------------------------------------

    async def give_ticket(self, plain: list[Any], by: str) -> list[Any]:
        """A ticket for one object that is here. Waits for its turn. Raises ObjectRemoved, UnknownObject."""
        ref = Ref.from_plain(plain)
        await self.server.slot()
        hold, owner = next(self._holds), Owner("others", f"the agent of {by[:64]}")
        try:
            stored = self._store.table.hold(ref.key, hold, owner)
            if stored is None:
                raise self._store.not_here(ref) if self._store.is_home_of(ref.key) else removed(ref)
            try:
                if stored.nbytes != ref.nbytes:
                    raise OSError(f"it has {stored.nbytes} bytes there")
                file = self._store.files[stored.segment]
                mapping = Mapping(file.fd, align(stored.nbytes, PAGE), offset=stored.offset, private=False)
                end = functools.partial(self._store.release, owner.ident, [hold])
                return self.server.offer(mapping, stored.nbytes, end).to_plain()
            except OSError as error:
                self._store.release(owner.ident, [hold])
                raise _not_fetched(ref, f"{self._store.node} cannot hand it out: {error}") from None
        except BaseException:
            self.server.free_slot()
            raise

    async def was_fetched(self, plain: list[Any], token: bytes, by: str) -> bool:
        """The caller has a copy now. Whether it may keep it: not if the object was removed meanwhile."""
        self.server.end(token)
        ref = Ref.from_plain(plain)
        if self._store.table.find(ref.key) is None:
            return False
        if self._store.is_home_of(ref.key):
            source = current_call().source
            place = (by[:64], source.rank, source.incarnation)
            self._copies.setdefault(ref.key, {})[source.rank, source.incarnation] = place
        return True

    async def has(self, plain: list[Any]) -> bool:
        """Whether a copy is here."""
        return self._store.table.find(Ref.from_plain(plain).key) is not None

    async def fetch_for_other(self, plains: list[Any], timeout_s: float) -> None:
        """Have copies of these objects here."""
        for ref in map(Ref.from_plain, plains):
            if self._store.table.find(ref.key) is None:
                await self.fetch(ref, timeout_s)

    async def remove_at_home(self, plains: list[Any]) -> None:
        """Remove objects that were put here, and all their copies."""
        keys = [Ref.from_plain(plain).key for plain in plains]
        self._store.drop(keys)
        await self._drop_copies(keys)

    async def drop(self, keys: list[list[int]]) -> None:
        """Remove what is here of these objects."""
        found = [Key(*key) for key in keys]
        self._unwanted.update(key for key in found if key in self._fetching)
        self._store.drop(found)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _drop_copies(self, keys: Sequence[Key]) -> None:
        by_place: dict[Place, list[Key]] = {}
        for key in keys:
            for place in self._copies.pop(key, {}).values():
                by_place.setdefault(place, []).append(key)
        await asyncio.gather(*(self._drop_at([place], mine) for place, mine in by_place.items()))

    async def _drop_at(self, places: Sequence[Place], keys: Sequence[Key]) -> None:
        """Where an agent is gone, so are its copies; one that does not answer will be."""
        calls = [self._agent(place).endpoint("store_drop").call_one([list(key) for key in keys]) for place in places]
        for place, found in zip(places, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(found, BaseException) and not isinstance(found, GONE):
                logger.warning("%s was not told to drop %d objects: %s", place[0], len(keys), found)

    async def _fetch(self, ref: Ref, timeout_s: float) -> None:
        key = ref.key
        try:
            async with asyncio.timeout(max(timeout_s, _FETCH_S)):
                await self._copy_here(ref, timeout_s)
        except MilesError as error:
            self._failed[key] = error
        except (OSError, BadPeer, ValueError) as error:  # TimeoutError too
            self._failed[key] = _not_fetched(ref, f"{type(error).__name__}: {error}")
        finally:
            self._unwanted.discard(key)
            while len(self._failed) > 1000:
                del self._failed[next(iter(self._failed))]

    async def _copy_here(self, ref: Ref, timeout_s: float) -> None:
        owner = Owner("fetch", f"a fetch of {ref}")
        room = await self._store.room(owner, ref.nbytes, timeout_s, goes_first=True)
        committed = False
        try:
            async with self._client.slots:
                source, token = await self._fill(ref, room)
            if ref.key in self._unwanted:
                raise removed(ref)
            self._store.commit(room, [(ref.key, 0, ref.nbytes)])
            committed = True
        finally:
            if not committed:
                self._store.give_up(room.request)
        await self._register(ref, source, token)

    async def _register(self, ref: Ref, source: Place, token: bytes) -> None:
        """Tell the source. Only now: a removal in between finds either the copy here, or us not registered."""
        try:
            told = self._agent(source).endpoint("store_fetched")
            may_keep = await told.call_one(ref.to_plain(), token, self._store.node)
        except (*GONE, DeadlineExceeded):
            may_keep = True
        if not may_keep or ref.key in self._unwanted:
            self._store.drop([ref.key])
            raise removed(ref)

    async def _fill(self, ref: Ref, room: Room) -> tuple[Place, bytes]:
        """From its home, or else from whoever has a copy."""
        try:
            return await self._fill_from(_home_of(ref), ref, room)
        except GONE as error:
            gone = error
        others, story = await self._nodes(ref.home)
        plain = ref.to_plain()
        asked = [self._agent(place, 5.0).endpoint("store_has").call_one(plain) for place in others]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        troubles = []
        for place, answer in zip(others, answers, strict=True):
            if answer is True:
                try:
                    return await self._fill_from(place, ref, room)
                except (PeerFault, ObjectRemoved) as error:
                    troubles.append(f"{place[0]}: {error.what}")
        if troubles:
            raise _not_fetched(ref, "\n".join([f"its home {ref.home} is gone", *troubles]))
        lost = ObjectLost(
            f"{ref} is lost",
            evidence=f"{story or gone.what}; nobody else has a copy (asked: {len(others)} nodes)",
            advice="Make it again, or put what must not be lost with copies=2.",
            home=ref.home,
        )
        self.report("object_lost", lost)
        raise lost

    async def _fill_from(self, source: Place, ref: Ref, room: Room) -> tuple[Place, bytes]:
        mapping = self._store.files[room.segment].map()
        try:
            return source, await self._receive(source, ref, memoryview(mapping.exporter(ref.nbytes)).cast("B"))
        finally:
            self._store.threads.submit(mapping.unmap)

    async def _receive(self, source: Place, ref: Ref, to: memoryview) -> bytes:
        """Returns the token by which it was given."""
        trouble: Exception | None = None
        for _ in range(_TRIES):
            asked = self._agent(source).endpoint("store_offer").call_one(ref.to_plain(), self._store.node)
            ticket = Ticket.from_plain(await asked)
            if ticket.nbytes != ref.nbytes:
                raise ValueError(f"it has {ticket.nbytes} bytes")
            try:
                await self._client.fetch(ticket, to)
            except (OSError, BadPeer) as error:
                trouble = error
                logger.warning("%s did not come from %s: %s", ref, source[0], error)
            else:
                self.num_fetched += 1
                return ticket.token
        raise _not_fetched(ref, f"from {source[0]}: {type(trouble).__name__}: {trouble}")

    async def _nodes(self, home: str) -> tuple[list[Place], str]:
        """The other agents that live, and how that of ``home`` ended."""
        asked = self._controller.options(timeout_s=_ORDER_S).endpoint("store_nodes").call_one(home)
        found, story = await asked
        own = (self._store.address.rank, self._store.address.incarnation)
        return [(name, rank, inc) for name, rank, inc in found if (rank, inc) != own], story

    def _agent(self, place: Place, timeout_s: float = _ORDER_S) -> ActorMesh:
        name, rank, incarnation = place
        info = MeshInfo(AGENT_MESH, f"agent of {name}", {rank: incarnation})
        return ActorMesh(info, Shape(Extent((), ()), (rank,)), self._node).options(timeout_s=timeout_s)


def nobody_cares(told: CallFuture[None]) -> None:
    """For reports: they fail only when this life leaves the run."""
    told.exception()


def _home_of(ref: Ref) -> Place:
    return ref.home, ref.key.rank, ref.key.incarnation


def _for_agents(name: str, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(function)
    async def guarded(*args: Any) -> Any:
        source = current_call().source
        if source.mesh != AGENT_MESH:
            raise not_your_order(name, source)
        return await function(*args)

    return guarded


def _not_fetched(ref: Ref, why: str) -> PullFailed:
    return PullFailed(
        f"{ref} could not be fetched",
        evidence=why,
        advice="Get it again; if it fails again, see whether TCP connections between the nodes are allowed.",
        home=ref.home,
    )
