"""The switch of a hop: sends each envelope on, and answers for receivers that cannot answer any more.

The agent has one for its workers, the controller one for all nodes. Consumes: envelopes of links and of the process
itself. Produces: envelopes on other links, or errors back to the sender. Invariant: a CALL that enters a switch is
passed on or answered, also if the way on refuses it; one that was passed on is answered by its receiver, or by
``receivers_died``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from miles_agents.errors import InternalError, MilesError
from miles_agents.rpc.inflight import InFlight, Passed
from miles_agents.rpc.node import RpcNode
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Envelope, Target

logger = logging.getLogger(__name__)
_tuple = tuple.__new__


class Hop(Protocol):
    """One way on. ``answers_for_itself``: the next switch answers for what lies behind (an agent's uplink)."""

    answers_for_itself: bool

    def send(self, envelope: Envelope) -> None:
        """Pass an envelope on."""


Resolve = Callable[[int, Target], Hop | MilesError]
"""The way to a receiver of a mesh, or why there is none. Checks the incarnation."""


class Switch:
    """See the module's docstring."""

    def __init__(self, resolve: Resolve) -> None:
        self.in_flight = InFlight()
        self.dropped = 0
        self._resolve = resolve
        self._node: RpcNode | None = None

    def attach(self, node: RpcNode) -> None:
        """The node of this process, in whose name errors are answered."""
        self._node = node

    def route(self, envelope: Envelope) -> None:
        """Send an envelope on its way."""
        if len(envelope.targets) == 3:
            target = envelope.target
            hop = self._resolve(envelope.mesh, target)
            if isinstance(hop, MilesError):
                self._answered(envelope)
                self._undeliverable(envelope, target, hop)
            else:
                self.forward(hop, envelope, target)
            return
        self._answered(envelope)
        now = self._now()
        groups: dict[int, tuple[Hop, list[Target]]] = {}
        for target in envelope.receivers():
            hop = self._resolve(envelope.mesh, target)
            if isinstance(hop, MilesError):
                self._undeliverable(envelope, target, hop)
            else:
                groups.setdefault(id(hop), (hop, []))[1].append(target)
        for hop, targets in groups.values():
            self._pass_on(hop, envelope.to(targets), targets, now)

    def forward(self, hop: Hop, envelope: Envelope, target: Target) -> None:
        """Send an envelope with one receiver on by a known way, and take note of it afterwards: that can wait."""
        if envelope.kind == wire.CALL:
            self._pass_on(hop, envelope, (target,), self._now())
            return
        try:
            hop.send(envelope)
        finally:
            self.in_flight.answered(envelope, self._now())

    def _now(self) -> float:
        assert self._node is not None
        return self._node.loop.time()

    def _answered(self, envelope: Envelope) -> None:
        self.in_flight.answered(envelope, self._now())

    def receivers_died(self, receivers: Collection[Address], error: MilesError) -> None:
        """Answer everything that these still owed, and stop what they had asked of others."""
        assert self._node is not None
        for receiver in receivers:
            for passed in self.in_flight.receiver_died(receiver):
                self._node.answer_error(_request_of(passed), error, source=receiver)
        for passed in self.in_flight.senders_died(receivers):
            self.route(_cancel_of(passed))

    def _pass_on(self, hop: Hop, envelope: Envelope, targets: Sequence[Target], now: float) -> None:
        is_call = envelope.kind == wire.CALL
        mesh = envelope.mesh
        if is_call and not hop.answers_for_itself:
            for rank, incarnation, _ in targets:
                self.in_flight.passed(envelope, _tuple(Address, (mesh, rank, incarnation)), now)
        try:
            hop.send(envelope)
        except Exception as trouble:  # boundary: whatever a hop raises, its call has to end
            if not is_call:
                raise
            logger.exception("%s could not be passed on", envelope.method)
            for target in targets:
                self._undeliverable(envelope, target, _not_passed_on(envelope, trouble))

    def _undeliverable(self, envelope: Envelope, target: Target, error: MilesError) -> None:
        if envelope.kind != wire.CALL or self._node is None:
            self.dropped += 1
            return
        receiver = Address(envelope.mesh, target.rank, target.incarnation)
        self._node.answer_error(envelope, _did_not_run(error), source=receiver)


class LocalHop:
    """Into this very process."""

    answers_for_itself = True

    def __init__(self, node: RpcNode) -> None:
        self._node = node

    def send(self, envelope: Envelope) -> None:
        """Deliver."""
        self._node.deliver(envelope)


def _not_passed_on(envelope: Envelope, trouble: Exception) -> MilesError:
    if isinstance(trouble, MilesError):
        return trouble
    return InternalError(
        f"{envelope.method} could not be passed on to mesh {envelope.mesh}",
        evidence=f"{type(trouble).__name__}: {trouble}",
        advice="Report this.",
    )


def _did_not_run(error: MilesError) -> MilesError:
    """The same for a call that was not passed on: what is said of those that were is not true of it."""
    if not error.fields.get("may_have_run"):
        return error
    other = copy.copy(error)
    other.fields = {**error.fields, "may_have_run": False}
    return other


def _request_of(passed: Passed) -> Envelope:
    receiver = passed.receiver
    flat = (receiver.rank, receiver.incarnation, 0)
    key = passed.key
    return Envelope(wire.CALL, key.rid, key.source, receiver.mesh, flat, 1, passed.method, trace=passed.trace)


def _cancel_of(passed: Passed) -> Envelope:
    request = _request_of(passed)
    request.kind = wire.CANCEL
    return request
