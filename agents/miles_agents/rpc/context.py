"""Who am I, and whose call is this: for code that runs in an endpoint, and for handles that need a way out."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miles_agents.rpc.errors import NotAnActorProcess
from miles_agents.rpc.shape import Point, Shape
from miles_agents.wire.envelope import Address

if TYPE_CHECKING:
    from miles_agents.rpc.mesh import ActorMesh
    from miles_agents.rpc.node import RpcNode


@dataclass(frozen=True, slots=True)
class ActorContext:
    """The actor that this process hosts, and its place in the mesh that was spawned.

    ``devices`` are the indices of the node's GPUs or CPU slots that belong to this rank.
    """

    node: RpcNode
    run_id: str
    mesh_name: str
    rank: int
    shape: Shape
    incarnation: int
    node_name: str
    devices: tuple[int, ...] = ()
    local_rank: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    controller: ActorMesh | None = None
    agent: ActorMesh | None = None
    store: tuple[str, str] | None = field(default=None, repr=False)
    """Where the node's store is asked, and with which token."""

    @property
    def size(self) -> int:
        """Ranks in the mesh."""
        return len(self.shape)

    @property
    def point(self) -> Point:
        """Named coordinates in the mesh."""
        return self.shape.extent.point(self.rank)


@dataclass(frozen=True, slots=True)
class CallContext:
    """The call being answered. ``position`` and ``size`` count in the slice that was called; ``source`` asked."""

    node: RpcNode
    source: Address
    rid: int
    method: str
    position: int
    size: int
    deadline: float | None
    trace: int
    is_cancelled: Callable[[], bool]
    is_answered: Callable[[], bool] = lambda: False

    def remaining_s(self) -> float | None:
        """Seconds until the deadline (negative when past), None without one."""
        return None if self.deadline is None else self.deadline - self.node.loop.time()


_actor: ContextVar[ActorContext | None] = ContextVar("miles_actor", default=None)
_call: ContextVar[CallContext | None] = ContextVar("miles_call", default=None)


class _Process:
    """What holds for every thread of a worker process, also for those that user code starts."""

    actor: ActorContext | None = None


def enter_process(actor: ActorContext) -> None:
    """This process hosts exactly this actor: make it known to all threads."""
    _Process.actor = actor


def find_actor() -> ActorContext | None:
    """The actor that the running code belongs to, if any."""
    return _actor.get() or _Process.actor


def current_actor() -> ActorContext:
    """The actor that the running code belongs to.

    Raises:
        NotAnActorProcess: outside of a worker.
    """
    actor = find_actor()
    if actor is None:
        raise NotAnActorProcess(
            "there is no actor here",
            evidence="current_actor() works in the constructor, the endpoints and the threads of an actor",
            advice="Call it from inside a worker.",
        )
    return actor


def current_call() -> CallContext:
    """The call that the running endpoint answers.

    Raises:
        NotAnActorProcess: outside of an endpoint.
    """
    call = _call.get()
    if call is None:
        raise NotAnActorProcess(
            "no call is being answered here",
            evidence="current_call() works in an endpoint, on the thread or task that runs it",
            advice="Call it in the endpoint itself and pass on what you need.",
        )
    return call


def find_call() -> CallContext | None:
    """The call being answered, if any. A task that outlives the call that began it answers nothing any more."""
    call = _call.get()
    return None if call is None or call.is_answered() else call


def outside_of_calls() -> Context:
    """This context less the call being answered: for what must not end with that call's deadline."""
    context = copy_context()
    context.run(_call.set, None)
    return context


actor_variable = _actor
call_variable = _call
