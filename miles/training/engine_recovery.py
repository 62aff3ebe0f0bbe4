"""Gives engines that come back the weights they lack, while the loop waits for generation (``--use-fault-tolerance``).

An engine that was restarted has loaded what the run began with. It gets no requests before it has the weights of the
others, which the trainer can only send while it does nothing else. So this happens where the loop waits for the
rollout manager, in the loop's own task:

* the trainer's weights are still those that the engines have, and it is awake: the engine catches up, at their version;
* else, if another engine serves: the engine waits for the next update;
* else, nobody serves, and what is waited for does not come before an update: it is made at once; unless what is waited
  for is complete and on its way, judged by the weights of now.

Consumes: the fleet's recovery, a task to wait for. Produces: its result; orders to the loop; the rollout manager's view
of engines and router. Waits for: the task, or a change of engines. Invariant: no catch-up is under way when a wait is
over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from miles.training.parts import Parts
from miles_agents.errors import MilesError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_TELL_S = 60.0
_TELL_AGAIN_S = 1.0


class EngineRecovery:
    """See the module's docstring. Does nothing for a run whose engines are not recovered.

    Args:
        catch_up: Sends the trainer's weights to the engines that wait for them.
        update: An ordinary weight update, whatever else it needs. False: it must not be made now.
        can_catch_up: Whether the trainer has the engines' weights, and has them in memory.
        say: Shows a line to the person.
        ask_again_s: After an update that must not be made now.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        catch_up: Callable[[], Awaitable[None]],
        update: Callable[[], Awaitable[bool]],
        can_catch_up: Callable[[], bool],
        say: Callable[[str], None] = logger.info,
        ask_again_s: float = 1.0,
    ) -> None:
        self._parts = parts
        self._catch_up = catch_up
        self._update = update
        self._can_catch_up = can_catch_up
        self._say = say
        self._ask_again_s = ask_again_s

    @property
    def _recovery(self) -> Any:
        return None if self._parts.fleet is None else self._parts.fleet.recovery

    async def result_of(self, task: asyncio.Task[T]) -> T:
        """The result of a task that may need engines. Cancelling this does not cancel the task."""
        while await self._changed_before(task):
            if self._can_catch_up():
                await self._catch_up()
            elif not await self._update():
                await asyncio.wait({task}, timeout=self._ask_again_s)
        return await task

    async def until_update(self, task: asyncio.Task[Any]) -> None:
        """Until a task is done that the next update waits for, or will not be without that update."""
        while await self._changed_before(task):
            if not self._can_catch_up():
                return
            await self._catch_up()

    async def _changed_before(self, task: asyncio.Task[Any]) -> bool:
        """Waits until the task is done (False), or engines wait for weights and should get them now (True)."""
        recovery = None if self._parts.trainer is None else self._recovery  # without trainer, weights never change
        while not task.done():
            if recovery is None:
                await asyncio.wait({task})
                continue
            if recovery.num_waiting and (self._can_catch_up() or not recovery.num_serving):
                return True
            change = asyncio.ensure_future(recovery.next_change())
            try:
                await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                change.cancel()
        return False

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Inside, the rollout manager is told of engines and router as they change."""
        if self._recovery is None:
            yield
            return
        self._recovery.say = self._say
        task = asyncio.ensure_future(self._tell())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell(self) -> None:
        fleet, recovery = self._parts.fleet, self._recovery
        if fleet is None:
            return
        told: Any = None
        while True:
            now = list(fleet.targets), fleet.router_url
            if now == told:
                await recovery.next_change()
                continue
            told = now
            try:
                rollout = self._parts.calls(self._parts.rollout, _TELL_S)
                await rollout.set_engines.call_one(*now, fleet.api_key)
            except MilesError as error:  # it may be about to be brought back itself
                logger.info("the rollout manager was not told of its engines: %s", error.what)
                told = None
                await asyncio.sleep(_TELL_AGAIN_S)
