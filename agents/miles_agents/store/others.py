"""Objects of other nodes: fetched once for all readers of this one, handed to others, copied, removed everywhere.

Consumes what workers of this node want (``Others``) and calls of other agents (``endpoints``). Produces copies in this
node's pool, tickets for other agents, removals at all who have a copy (``removals``). Waits for: other agents and the
controller, each call with a deadline, the reader's where there is one; transfers, which end without progress.
Invariants: one fetch of an object at a time; it says for each reader, within that reader's own time, how it ended;
a copy is visible only when all of it was checked; the home of an object knows of every copy, or is gone, or the copy
is dropped; an object is called lost only when every living agent has said that it has none; what other agents may
ask, nobody else may.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles_agents.errors import MilesError, PeerFault
from miles_agents.rpc.context import current_call, outside_of_calls
from miles_agents.rpc.errors import DeadlineExceeded
from miles_agents.rpc.guard import not_your_order
from miles_agents.store.bulk_fetch import BulkClient
from miles_agents.store.bulk_serve import BulkServer
from miles_agents.store.bulk_wire import BadPeer, Ticket
from miles_agents.store.errors import NoSecondNode, ObjectLost, ObjectRemoved, PullFailed, StoreFull
from miles_agents.store.layout import PAGE, align
from miles_agents.store.memory import Mapping
from miles_agents.store.node_store import NodeStore, Room, removed
from miles_agents.store.peers import GONE, ORDER_S, PAUSE_S, Peers, Place, home_of
from miles_agents.store.ref import Key, Ref
from miles_agents.store.removals import Removals
from miles_agents.store.table import Owner
from miles_agents.wire.envelope import AGENT_MESH

logger = logging.getLogger(__name__)
_TRIES = 2
_REPORT_S = 10.0
_FETCH_S = 600.0
"""The longest that a fetch goes on for readers that have given up."""
_GRACE_S = 1.0
"""A fetch whose time is up tells why a moment later: that is more than that the time is up."""
_PATIENCE_S = 20.0
"""The longest that somebody is kept waiting for a removal, which goes on."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """A fetch, until it is over. ``deadline``: for room, and for answers; ``unwanted``: removed meanwhile."""

    ref: Ref
    deadline: float
    task: asyncio.Task[None] | None = None
    unwanted: bool = False
    error: MilesError | None = None


class OtherNodes:
    """See the module's docstring. Create it on the agent's loop; ``store.tasks`` runs its tasks."""

    def __init__(self, store: NodeStore, peers: Peers) -> None:
        self.server = BulkServer(store.parts.address)
        self.removals = Removals(peers, lambda: store.tasks)
        self._client = BulkClient()
        self._store = store
        self._peers = peers
        self._fetching: dict[Key, _Fetch] = {}
        self._holds = itertools.count(1)
        self.num_fetched = 0
        self._reported: dict[str, float] = {}

    def report(self, kind: str, error: MilesError) -> None:
        """Let the run know of ``store_full`` or ``object_lost``; not more often than every ``_REPORT_S``."""
        now = self._store.loop.time()
        if now - self._reported.get(kind, -_REPORT_S) >= _REPORT_S:
            self._reported[kind] = now
            self._peers.report(kind, error.what, error.evidence)

    def status(self) -> dict[str, int]:
        """Counters."""
        server = self.server
        return {"fetched": self.num_fetched, "given": server.num_offers, "strangers": server.num_refused}

    def close(self) -> None:
        """Cut everything off."""
        self.removals.close()
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
        """Have a copy here. Concurrent callers share one fetch; who has time left tries anew when it fails for time."""
        deadline = self._store.loop.time() + timeout_s
        while True:
            fetch = self._fetching.get(ref.key) or self._start(ref, deadline)
            assert fetch.task is not None
            left = max(0.0, deadline - self._store.loop.time()) + _GRACE_S
            await asyncio.wait([fetch.task], timeout=left)
            if not fetch.task.done():
                raise _not_fetched(ref, f"not within {timeout_s:g} s; it is still tried")
            if fetch.task.cancelled():
                raise _not_fetched(ref, "this node's agent leaves the run")
            if fetch.error is None:
                return
            had_less_time = fetch.deadline < deadline and deadline > self._store.loop.time()
            if not had_less_time or not isinstance(fetch.error, StoreFull | PullFailed):
                raise fetch.error

    def _start(self, ref: Ref, deadline: float) -> _Fetch:
        assert self._store.tasks is not None
        fetch = _Fetch(ref, deadline)
        create = self._store.tasks.create_task
        fetch.task = outside_of_calls().run(create, self._run(fetch), name=f"store: fetch {ref}")
        self._fetching[ref.key] = fetch
        return fetch

    async def copy_out(self, refs: Sequence[Ref], copies: int, timeout_s: float) -> None:
        """Have other nodes fetch these objects of ours, until there are ``copies`` with this one."""
        deadline = self._store.loop.time() + timeout_s
        others, _ = await self._peers.nodes("", ORDER_S)
        wanted, troubles = copies - 1, []
        start = refs[0].key.number % len(others) if others else 0  # not always the same node
        candidates = [*others[start:], *others[:start]]
        while wanted and len(candidates) >= wanted:
            chosen, candidates = candidates[:wanted], candidates[wanted:]
            plains = [ref.to_plain() for ref in refs]
            left = max(0.0, deadline - self._store.loop.time())
            calls = [self._peers.ask(place, left, "store_fetch", plains, left) for place in chosen]
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

    def start_removal(self, refs: Sequence[Ref]) -> asyncio.Task[None] | None:
        """Remove objects everywhere but here; see ``Removals.start``."""
        for ref in refs:
            if ref.key in self._fetching:
                self._fetching[ref.key].unwanted = True
        at_home = [ref.key for ref in refs if self._store.is_home_of(ref.key)]
        return self.removals.start(at_home, [ref for ref in refs if not self._store.is_home_of(ref.key)])

    async def remove(self, refs: Sequence[Ref]) -> None:
        """Remove objects everywhere but here. Waits ``_PATIENCE_S`` at most; it goes on, also when cancelled."""
        if (running := self.start_removal(refs)) is not None:
            await asyncio.wait([running], timeout=_PATIENCE_S)

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
            self.removals.note(ref.key, (by[:64], source.rank, source.incarnation))
        return True

    async def has(self, plain: list[Any]) -> bool:
        """Whether a copy is here."""
        return self._store.table.find(Ref.from_plain(plain).key) is not None

    async def fetch_for_other(self, plains: list[Any], timeout_s: float) -> None:
        """Have copies of these objects here."""
        deadline = self._store.loop.time() + timeout_s
        for ref in map(Ref.from_plain, plains):
            if self._store.table.find(ref.key) is None:
                await self.fetch(ref, max(0.0, deadline - self._store.loop.time()))

    async def remove_at_home(self, plains: list[Any]) -> None:
        """Remove objects that were put here, and all their copies."""
        refs = [Ref.from_plain(plain) for plain in plains]
        self._store.drop([ref.key for ref in refs])
        await self.remove([ref for ref in refs if self._store.is_home_of(ref.key)])

    async def drop(self, keys: list[list[int]]) -> None:
        """Remove what is here of these objects."""
        found = [Key(*key) for key in keys]
        for key in found:
            if key in self._fetching:
                self._fetching[key].unwanted = True
        self._store.drop(found)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _run(self, fetch: _Fetch) -> None:
        ref, now = fetch.ref, self._store.loop.time()
        try:
            async with asyncio.timeout(max(fetch.deadline - now, _FETCH_S)):
                await self._copy_here(fetch)
        except DeadlineExceeded as error:
            fetch.error = _not_fetched(ref, f"{error.what}; {error.evidence}")
        except MilesError as error:
            fetch.error = error
        except (OSError, BadPeer, ValueError) as error:  # TimeoutError too
            fetch.error = _not_fetched(ref, f"{type(error).__name__}: {error}")
        except Exception as error:  # boundary: one fetch; its readers are told
            logger.exception("a fetch of %s failed", ref)
            fetch.error = _not_fetched(ref, f"{type(error).__name__}: {error}")
        finally:
            del self._fetching[ref.key]

    async def _copy_here(self, fetch: _Fetch) -> None:
        ref, room_s = fetch.ref, self._left(fetch)
        owner = Owner("fetch", f"a fetch of {ref}")
        room = await self._store.room(owner, ref.nbytes, room_s, goes_first=True)
        committed = False
        try:
            async with self._client.slots:
                source, token = await self._fill(fetch, room)
            if fetch.unwanted:
                raise removed(ref)
            self._store.commit(room, [(ref.key, 0, ref.nbytes)])
            committed = True
        finally:
            if not committed:
                self._store.give_up(room.request)
        try:
            await self._register(fetch, source, token)
        except BaseException:  # whoever does not know of this copy could not remove it
            self._store.drop([ref.key])
            raise

    async def _register(self, fetch: _Fetch, source: Place, token: bytes) -> None:
        """Tell the source. Only now: a removal in between finds either the copy here, or us not registered."""
        told = ("store_fetched", fetch.ref.to_plain(), token, self._store.node)
        try:
            may_keep = await self._peers.ask(source, max(ORDER_S, self._left(fetch)), *told)
        except GONE:
            may_keep = True
        if not may_keep or fetch.unwanted:
            raise removed(fetch.ref)

    def _left(self, fetch: _Fetch) -> float:
        return max(0.0, fetch.deadline - self._store.loop.time())

    async def _fill(self, fetch: _Fetch, room: Room) -> tuple[Place, bytes]:
        """From its home, or else from whoever has a copy."""
        ref = fetch.ref
        try:
            return await self._fill_from(home_of(ref), fetch, room)
        except GONE as error:
            gone = error
        others, story = await self._peers.nodes(ref.home, self._left(fetch))
        silent, troubles = {place[0] for place in others}, []
        asking = {asyncio.ensure_future(self._has(place, fetch)) for place in others}
        try:
            for answer in asyncio.as_completed(asking, timeout=self._left(fetch)):
                place, has_one = await answer
                silent.discard(place[0])
                try:
                    if has_one:
                        return await self._fill_from(place, fetch, room)
                except GONE:
                    pass  # its copy is gone too
                except (PeerFault, ObjectRemoved) as error:
                    troubles.append(f"{place[0]}: {error.what}")
        except TimeoutError:
            troubles += [f"{name} did not say whether it has a copy" for name in sorted(silent)]
        finally:
            for task in asking:
                task.cancel()
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

    async def _has(self, place: Place, fetch: _Fetch) -> tuple[Place, bool]:
        """Whether a copy is there. Asks until there is an answer; whoever wants to know has a deadline."""
        while True:
            try:
                return place, await self._peers.ask(place, ORDER_S, "store_has", fetch.ref.to_plain()) is True
            except GONE:
                return place, False
            except MilesError as error:
                logger.warning("%s is asked again whether it has %s: %s", place[0], fetch.ref, error)
                await asyncio.sleep(PAUSE_S)

    async def _fill_from(self, source: Place, fetch: _Fetch, room: Room) -> tuple[Place, bytes]:
        mapping = self._store.files[room.segment].map()
        try:
            return source, await self._receive(source, fetch, memoryview(mapping.exporter(fetch.ref.nbytes)).cast("B"))
        finally:
            self._store.threads.submit(mapping.unmap)

    async def _receive(self, source: Place, fetch: _Fetch, to: memoryview) -> bytes:
        """Returns the token by which it was given."""
        ref, trouble = fetch.ref, None
        for _ in range(_TRIES):
            order = ("store_offer", ref.to_plain(), self._store.node)
            ticket = Ticket.from_plain(await self._peers.ask(source, self._left(fetch), *order))
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
