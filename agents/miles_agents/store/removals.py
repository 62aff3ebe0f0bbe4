"""Removals of objects everywhere else: what was begun goes on until nobody has a copy.

Consumes copies that others say they have (``note``), and objects that are to go (``start``), which are removed here
already. Produces orders to drop them. Waits for: an answer of each agent that has a copy, or that agent's end; who
does not answer is asked again. Invariants: a removal does not end with whoever asked for it; where a copy of an object
of this node is, is forgotten only when it is dropped there or its agent is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from miles_agents.agent.background import Background
from miles_agents.errors import MilesError
from miles_agents.rpc.context import outside_of_calls
from miles_agents.store.peers import GONE, NO_ANSWER, ORDER_S, PAUSE_S, Peers, Place, home_of
from miles_agents.store.ref import Key, Ref

logger = logging.getLogger(__name__)


class Removals:
    """See the module's docstring. ``tasks``: what runs them; None before the store is in use, and after."""

    def __init__(self, peers: Peers, tasks: Callable[[], Background | None]) -> None:
        self._peers = peers
        self._tasks = tasks
        self._copies: dict[Key, dict[tuple[int, int], Place]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    def note(self, key: Key, place: Place) -> None:
        """An agent has a copy of an object of this node."""
        self._copies.setdefault(key, {})[place[1:]] = place

    def places(self, key: Key) -> list[Place]:
        """Who has copies of an object of this node."""
        return list(self._copies.get(key, {}).values())

    def start(self, at_home: Sequence[Key], elsewhere: Sequence[Ref]) -> asyncio.Task[None] | None:
        """Remove objects that were put here from everywhere else, and others from everywhere. It never raises.

        Returns:
            The task, for those that want to wait (not cancel it); None at the end of the store.
        """
        tasks = self._tasks()
        if tasks is None or self._closed:
            return None
        create = outside_of_calls().run
        running = create(tasks.create_task, self._run(at_home, elsewhere), name="store: a removal")
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return running

    def close(self) -> None:
        """The store is over."""
        self._closed = True
        for running in list(self._running):
            running.cancel()

    async def _run(self, at_home: Sequence[Key], elsewhere: Sequence[Ref]) -> None:
        by_place: dict[Place, list[Key]] = {}
        for key in at_home:
            for place in self.places(key):
                by_place.setdefault(place, []).append(key)
        dropping = [self._drop_at(place, keys) for place, keys in by_place.items()]
        await asyncio.gather(*dropping, *map(self._remove_elsewhere, elsewhere))

    async def _drop_at(self, place: Place, keys: Sequence[Key]) -> None:
        try:
            await self._insist(place, "store_drop", [list(key) for key in keys])
        except GONE:
            pass  # and its copies with it
        except MilesError as error:
            logger.warning("%s did not drop %d objects: %s", place[0], len(keys), error)
            return
        for key in keys:
            left = self._copies.get(key, {})
            left.pop(place[1:], None)
            if not left:
                self._copies.pop(key, None)

    async def _remove_elsewhere(self, ref: Ref) -> None:
        try:
            await self._insist(home_of(ref), "store_remove", [ref.to_plain()])
        except GONE:
            others = await self._living(ref)
            await asyncio.gather(*(self._drop_at(place, [ref.key]) for place in others))
        except MilesError as error:
            logger.warning("%s did not remove %s: %s", ref.home, ref, error)

    async def _insist(self, place: Place, order: str, *args: Any) -> None:
        """Ask until there is an answer."""
        while True:
            try:
                await self._peers.ask(place, ORDER_S, order, *args)
            except NO_ANSWER as error:
                logger.warning("%s does not answer %s and is asked again: %s", place[0], order, error)
                await asyncio.sleep(PAUSE_S)
            else:
                return

    async def _living(self, ref: Ref) -> list[Place]:
        while True:
            try:
                return (await self._peers.nodes(ref.home, ORDER_S))[0]
            except NO_ANSWER as error:
                logger.warning("the controller is asked again who may have %s: %s", ref, error)
                await asyncio.sleep(PAUSE_S)
            except MilesError as error:
                logger.warning("it is not known who may have %s: %s", ref, error)
                return []
