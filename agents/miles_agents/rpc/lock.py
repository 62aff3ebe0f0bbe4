"""What actors ask of the runtime: named locks over the whole run, meshes by name, ports of their node.

A lock belongs to the process that acquired it and is given to the next waiter when that process dies. Tasks and threads
of one process exclude each other like those of two. It is not reentrant: whoever asks again for what it holds waits for
itself, until its deadline. A release always goes out: neither a deadline nor a cancellation of its caller holds it
back. ``token`` grows with every grant: hand it to whatever the lock protects, so that a holder that lost the lock
(``hold_s`` ran out) can be refused there.
"""

from __future__ import annotations

import asyncio
import itertools
from types import TracebackType

from miles_agents.rpc.context import current_actor, find_actor, outside_of_calls
from miles_agents.rpc.errors import NotAnActorProcess
from miles_agents.rpc.future import CallFuture
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.rpc.seconds import checked_seconds

_tickets = itertools.count(1)


class Lock:
    """A named lock: ``async with Lock("weights"):`` on a loop, ``with Lock("weights"):`` on a thread.

    One object is for one task or thread at a time; others make their own, of the same name.

    Args:
        name: Everybody who uses this name in the run shares the lock.
        hold_s: The longest that it may be held; then it goes to the next waiter. None: as long as the holder lives.
        timeout_s: The longest to wait for it; None: until the calling endpoint's deadline, if it has one.
        controller: For use outside of an actor: the controller's handle.

    Raises:
        NotADuration: ``hold_s`` is not a positive finite number, or ``timeout_s`` not a finite one.
    """

    def __init__(
        self,
        name: str,
        *,
        hold_s: float | None = None,
        timeout_s: float | None = None,
        controller: ActorMesh | None = None,
    ) -> None:
        self.name = name
        self.token: int | None = None
        self._hold_s = checked_seconds("hold_s", hold_s, positive=True)
        self._timeout_s = checked_seconds("timeout_s", timeout_s)
        self._controller = controller

    def acquire(self) -> CallFuture[int]:
        """Ask for it; the future brings the token."""
        controller = self._handle()
        ticket = next(_tickets)
        timed = controller.options(timeout_s=self._timeout_s)
        future: CallFuture[int] = timed.endpoint("lock_acquire").call_one(self.name, self._hold_s, ticket)
        context = outside_of_calls()  # giving up must not end with the deadline that makes it necessary

        def give_up_unless_granted(over: CallFuture[int]) -> None:
            # The grant may be on its way while the deadline or a cancellation ends the call: nobody would release it.
            if over.exception() is not None:
                context.run(controller.endpoint("lock_give_up").broadcast, ticket)

        future.add_done_callback(give_up_unless_granted)
        return future

    def release(self, token: int) -> CallFuture[None]:
        """Give it back, whatever happens to the caller. The future fails with StaleLockToken if it was not held."""
        release = self._handle().endpoint("lock_release")
        future: CallFuture[None] = outside_of_calls().run(release.call_one, self.name, token)
        return future.insist()

    async def __aenter__(self) -> Lock:
        asked = self.acquire()
        try:
            self.token = await asked
        except asyncio.CancelledError:
            context = outside_of_calls()
            asked.add_done_callback(lambda over: context.run(self._release_if_granted, over))
            raise
        return self

    def _release_if_granted(self, over: CallFuture[int]) -> None:
        if over.exception() is None:  # the grant was here when its task was cancelled
            self.release(over.get())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release(self._held())

    def __enter__(self) -> Lock:
        self.token = self.acquire().get()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(self._held()).get()

    def _held(self) -> int:
        assert self.token is not None
        token, self.token = self.token, None
        return token

    def _handle(self) -> ActorMesh:
        return self._controller or controller_handle()


def controller_handle() -> ActorMesh:
    """The controller, as an actor sees it. Raises NotAnActorProcess outside of an actor."""
    actor = find_actor() or current_actor()
    if actor.controller is None:
        raise NotAnActorProcess(
            "this actor has no way to its controller",
            evidence=f"{actor.mesh_name}[{actor.rank}]",
            advice="Report it; every worker gets one at its birth.",
        )
    return actor.controller


def lease_ports(count: int) -> CallFuture[list[int]]:
    """TCP ports of this node that nobody else is given; they come back when this worker ends.

    The future fails with NoFreePort when the node's range is exhausted.
    """
    actor = current_actor()
    if actor.agent is None:
        raise NotAnActorProcess(
            "this actor has no way to its agent",
            evidence=f"{actor.mesh_name}[{actor.rank}]",
            advice="Report it; every worker gets one at its birth.",
        )
    future: CallFuture[list[int]] = actor.agent.endpoint("lease_my_ports").call_one(count)
    return future


def lookup(name: str) -> CallFuture[ActorMesh]:
    """A fresh handle of the mesh of that name, from inside an actor."""
    future: CallFuture[ActorMesh] = controller_handle().endpoint("lookup").call_one(name)
    return future
