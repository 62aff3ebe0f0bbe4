"""The errors of calls in words: what a node and a host say when a call cannot be made, taken or finished. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles_agents.errors import UserCodeError
from miles_agents.rpc.calls import OpenCall, Window
from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, NoSuchActor, WindowFull, WrongVerb
from miles_agents.rpc.inbox import Request
from miles_agents.wire.codec import CannotTravel, encode
from miles_agents.wire.envelope import Envelope

if TYPE_CHECKING:
    from miles_agents.rpc.node import RpcNode


def naming_the_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> CannotTravel | None:
    """The error for arguments that cannot travel, naming the one; None if each of them can."""
    named = [*((f"argument {i}", value) for i, value in enumerate(args))]
    named += [(f"argument {name}", value) for name, value in kwargs.items()]
    for what, value in named:
        try:
            encode(value, what=what)
        except CannotTravel as error:
            return error
    return None


def indescribable(error: BaseException, trouble: Exception) -> UserCodeError:
    """An exception of user code cannot even be described."""
    return UserCodeError(
        f"the callee raised {type(error).__name__}, which cannot be described",
        evidence=f"describing it raised {type(trouble).__name__}: {trouble}",
        advice="Let the class call the constructor of its base, and keep its attributes readable.",
    )


def hosts_nothing(envelope: Envelope, label: str) -> NoSuchActor:
    """A call reached a process without actors."""
    return NoSuchActor(
        f"{envelope.method} reached {label}, which hosts no actor",
        evidence="this process only makes calls",
        advice="Get a fresh handle with lookup(name).",
        may_have_run=False,
    )


def deadline_exceeded(call: OpenCall, waited_s: float, *, was_sent: bool) -> DeadlineExceeded:
    """A call was not answered in time."""
    return DeadlineExceeded(
        f"{call.method} on mesh {call.mesh} did not answer within its deadline",
        evidence=f"{len(call.owing)} receivers have not answered after {waited_s:.3f} s; "
        + ("the request was sent and may have run" if was_sent else "the request was never sent"),
        advice="Give the call more time, or look at the stack of the callee.",
        may_have_run=was_sent,
    )


def cancelled_here(call: OpenCall, *, was_sent: bool) -> CallCancelled:
    """The caller cancelled its call and does not wait for the callee to confirm."""
    return CallCancelled(
        f"{call.method} on mesh {call.mesh} was cancelled by its caller",
        evidence="it was sent and may have run" if was_sent else "it was not sent and never will be",
        advice="Nothing, if you cancelled it; else look for the failure that made a group call give up.",
        may_have_run=was_sent,
    )


def window_full(call: OpenCall, window: Window) -> WindowFull:
    """Too much is unanswered for one more call."""
    return WindowFull(
        f"{call.method} on mesh {call.mesh} cannot be queued",
        evidence=f"{window.calls} calls ({window.bytes} bytes) are unanswered and {window.num_waiting} more wait",
        advice="Await earlier calls before making more; send bulk data through the shared store.",
        may_have_run=False,
    )


def call_cancelled(method: str, label: str, *, may_have_run: bool) -> CallCancelled:
    """The end of a call that nobody wants any more."""
    return CallCancelled(
        f"{label}.{method} was cancelled",
        evidence="it had started" if may_have_run else "it had not started and never will",
        advice="Nothing, if you cancelled it; else look for the failure that made a group call give up.",
        may_have_run=may_have_run,
    )


def expired(request: Request, node: RpcNode) -> DeadlineExceeded:
    """The deadline of a request passed before its turn came."""
    waited = node.loop.time() - request.arrived_at
    return DeadlineExceeded(
        f"{node.label}.{request.endpoint.name} was not started: its deadline had passed",
        evidence=f"it waited {waited:.3f} s for its turn",
        advice="Give the call more time, or call less at once.",
        may_have_run=False,
    )


def needs_a_stream(label: str, name: str) -> WrongVerb:
    """A generator endpoint was called for one answer."""
    return WrongVerb(
        f"{label}.{name} is a generator endpoint and was called for one answer",
        evidence="it yields many items, one answer would lose them",
        advice="Use stream.",
        may_have_run=False,
    )
