"""The shell around the lock table: requests that wait for a grant are calls that are not answered yet."""

from __future__ import annotations

import asyncio
from typing import Any

from miles_agents.errors import MilesError
from miles_agents.rpc import lock_table
from miles_agents.rpc.context import current_call
from miles_agents.rpc.lock_table import Acquire, Cancel, Grant, Holder, HolderDied, LockTable, Refuse, Release, Waiter
from miles_agents.rpc.seconds import checked_seconds
from miles_agents.wire.envelope import Address


class LockService:
    """Consumes calls of actors and deaths; produces grants, by answering. One per controller."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._table = LockTable()
        self._waiting: dict[Waiter, asyncio.Future[int | None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, name: str, hold_s: float | None, ticket: int) -> int:
        """Endpoint: wait for the lock; returns the token. ``ticket`` is the caller's own number for this request."""
        held_s = checked_seconds("hold_s", hold_s, positive=True)
        waiter = Waiter(Holder(*current_call().source), -ticket)  # below 0, where the numbers of releases are not
        granted = self._expect(waiter)
        self._step(Acquire(name, waiter, held_s))
        try:
            token = await granted
        except asyncio.CancelledError:
            self._step(Cancel(waiter))
            raise
        finally:
            self._waiting.pop(waiter, None)
        assert token is not None
        return token

    async def give_up(self, ticket: int) -> None:
        """Endpoint: the request ended without its caller seeing a grant; one that was made is taken back."""
        self._step(Cancel(Waiter(Holder(*current_call().source), -ticket)))

    async def release(self, name: str, token: int) -> None:
        """Endpoint: give it back. Raises StaleLockToken."""
        call = current_call()
        caller = Waiter(Holder(*call.source), call.rid)
        released = self._expect(caller)
        self._step(Release(name, caller, token))
        try:
            await released
        finally:
            self._waiting.pop(caller, None)

    def holder_died(self, address: Address) -> None:
        """A process is gone: what it held goes to the next."""
        holder = Holder(*address)
        self._step(HolderDied(holder))
        for waiter, future in list(self._waiting.items()):
            if waiter.holder == holder:
                future.cancel()

    def snapshot(self) -> Any:
        """For the status page: name, holder, number of waiters."""
        return {
            name: {"holder": str(lock.held.waiter.holder), "waiting": len(lock.waiting)}
            for name, lock in self._table.locks.items()
        }

    def _expect(self, waiter: Waiter) -> asyncio.Future[int | None]:
        future: asyncio.Future[int | None] = self._loop.create_future()
        self._waiting[waiter] = future
        return future

    def _step(self, event: lock_table.Event) -> None:
        self._table, effects = lock_table.step(self._table, event, self._loop.time())
        for effect in effects:
            match effect:
                case Grant(_, waiter, token):
                    self._settle(waiter, token)
                case lock_table.Released(_, by):
                    self._settle(by, None)
                case Refuse():
                    self._settle(effect.waiter, lock_table.refusal_error(effect))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._table.next_expiry()
        if due is not None:
            self._timer = self._loop.call_at(due, self._step, lock_table.Tick())

    def _settle(self, waiter: Waiter, outcome: int | MilesError | None) -> None:
        future = self._waiting.get(waiter)
        if future is None or future.done():
            return
        if isinstance(outcome, MilesError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
