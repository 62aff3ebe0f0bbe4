"""The agent's short way for short frames: they are passed on as they came, and no envelope is made of them.

Two messages of each call pass the agent, so what it does with one is a good part of what a call costs. Consumes: short
frames of the controller and of workers. Produces: the same for workers and the controller, and entries of the switch's
list of open requests. Declines whatever is not plain (False): a deadline, from which the agent has to take off what it
spent; a receiver that is dead, not connected yet, stale, unknown, or the agent itself; then ``on_envelope`` sees it.
Invariants: the same as of the switch and ``on_envelope``, which do the same in more steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles_agents.wire.envelope import AGENT_MESH, CALL, Address, Envelope, Target
from miles_agents.wire.peer import Peer
from miles_agents.wire.short_frame import (
    INCARNATION,
    KIND,
    LEFT,
    MESH,
    POSITION,
    RANK,
    RID,
    SOURCE_MESH,
    TRACE,
    Numbers,
    method_of,
    pack_each,
    packed_of,
)

if TYPE_CHECKING:
    from miles_agents.agent.worker_pool import WorkerPool
    from miles_agents.rpc.inflight import InFlight

_tuple = tuple.__new__


class Relay:
    """See the module's docstring."""

    def __init__(self, pool: WorkerPool, in_flight: InFlight, uplink: Peer) -> None:
        self._pool = pool
        self._in_flight = in_flight
        self._uplink = uplink

    def down(self, peer: Peer, numbers: Numbers, short: bytes) -> bool:
        """From the controller to a worker."""
        worker = self._pool.find_living(numbers[MESH], numbers[RANK])
        if worker is None or numbers[LEFT] or worker.address != numbers[MESH:POSITION]:
            return False
        if numbers[KIND] == CALL:
            source = _tuple(Address, numbers[SOURCE_MESH:MESH])
            method = method_of(numbers, short)
            self._in_flight.note(source, numbers[RID], worker.address, method, peer.last_heard, numbers[TRACE])
        assert worker.peer is not None
        worker.peer.send(packed_of(short))
        return True

    def spread(self, envelope: Envelope, now: float) -> Sequence[Target]:
        """From the controller to many workers. Returns those of the receivers to whom it was not passed on."""
        receivers = envelope.receivers()
        packed = pack_each(envelope)
        if packed is None:
            return receivers
        declined: list[Target] = []
        is_call, mesh, note = envelope.kind == CALL, envelope.mesh, self._in_flight.note
        for target, item in zip(receivers, packed, strict=True):
            worker = self._pool.find_living(mesh, target.rank)
            if worker is None or worker.peer is None or worker.address.incarnation != target.incarnation:
                declined.append(target)
                continue
            if is_call:
                note(envelope.source, envelope.rid, worker.address, envelope.method, now, envelope.trace)
            worker.peer.send(item)
        return declined

    def up(self, peer: Peer, numbers: Numbers, short: bytes) -> bool:
        """From a worker to the controller or beyond."""
        pool = self._pool
        worker = pool.heard(peer)
        mesh = numbers[MESH]
        if worker is None or numbers[LEFT] or worker.address != numbers[SOURCE_MESH:MESH] or mesh == AGENT_MESH:
            return False
        if pool.find_living(mesh, numbers[RANK]) is not None or pool.knows(mesh, numbers[RANK], numbers[INCARNATION]):
            return False
        self._uplink.send(packed_of(short))
        asker = _tuple(Address, (mesh, numbers[RANK], numbers[INCARNATION]))
        self._in_flight.answer(numbers[KIND], worker.address, asker, numbers[RID], peer.last_heard)
        return True
