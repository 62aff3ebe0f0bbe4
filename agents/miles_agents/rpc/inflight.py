"""What a hop passed on and is not answered: so that a death is answered by the one who knows of it. Pure; no I/O.

The agent keeps one for its workers, the controller one for everybody. Consumes: the calls and answers that pass.
Produces: the requests to answer when their receiver is gone. Invariant: an entry leaves with its answer or with the
death of its receiver or its sender, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from miles_agents.wire.envelope import CALL, END, ERROR, ONE_WAY, REPLY, STARTED, Address, Envelope

_LAST_ANSWERS = frozenset({REPLY, ERROR, END, STARTED})
_tuple = tuple.__new__


class RequestKey(NamedTuple):
    """One request as its sender numbered it."""

    source: Address
    rid: int


class Passed(NamedTuple):
    """A request that was passed on to one receiver."""

    key: RequestKey
    receiver: Address
    method: str
    since: float
    trace: int


MAX_METHODS = 1000
"""Methods of which it is known how long they took: those that took longest."""


class InFlight:
    """Requests by receiver."""

    def __init__(self) -> None:
        self._by_receiver: dict[Address, dict[RequestKey, Passed]] = {}
        self._longest: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._by_receiver.values())

    def passed(self, envelope: Envelope, receiver: Address, now: float) -> None:
        """A call was passed on to a receiver."""
        if envelope.kind == CALL:
            self.note(envelope.source, envelope.rid, receiver, envelope.method, now, envelope.trace)

    def note(self, source: Address, rid: int, receiver: Address, method: str, now: float, trace: int) -> None:  # noqa: PLR0917
        """``passed``, for a call of which only this is known."""
        key = _tuple(RequestKey, (source, rid))
        requests = self._by_receiver.get(receiver)
        if requests is None:
            requests = self._by_receiver[receiver] = {}
        requests[key] = _tuple(Passed, (key, receiver, method, now, trace))

    def answered(self, envelope: Envelope, now: float) -> None:
        """An answer passes on its way back."""
        if envelope.kind in _LAST_ANSWERS:
            rank, incarnation = envelope.targets[:2]
            asker = _tuple(Address, (envelope.mesh, rank, incarnation))
            self.answer(envelope.kind, envelope.source, asker, envelope.rid, now)

    def answer(self, kind: int, receiver: Address, asker: Address, rid: int, now: float) -> None:
        """``answered``, for a message of which only this is known."""
        if kind not in _LAST_ANSWERS:
            return
        requests = self._by_receiver.get(receiver)
        if requests is None:
            return
        passed = requests.pop(_tuple(RequestKey, (asker, rid)), None)
        if passed is None:
            return
        if now - passed.since > self._longest.get(passed.method, 0.0):
            self._remember(passed, now)
        if not requests:
            del self._by_receiver[receiver]

    def receiver_died(self, receiver: Address) -> list[Passed]:
        """The receiver is gone: these requests have to be answered, oldest first."""
        return list(self._by_receiver.pop(receiver, {}).values())

    def senders_died(self, senders: Collection[Address]) -> list[Passed]:
        """Nobody waits for these any more: their receivers are to be told to stop.

        Looks at every open request, once for all of the dead: an index by sender would cost every call something.
        """
        orphans = []
        for receiver in list(self._by_receiver):
            requests = self._by_receiver[receiver]
            orphans += [requests.pop(key) for key in list(requests) if key.source in senders]
            if not requests:
                del self._by_receiver[receiver]
        return orphans

    def pending_at(self, receiver: Address) -> list[Passed]:
        """Requests that the receiver has not answered, oldest first."""
        return list(self._by_receiver.get(receiver, {}).values())

    def overdue(self, now: float, *, at_least_s: float, factor: float) -> list[Passed]:
        """Requests much older than the longest of their method that was ever answered."""
        found = []
        for requests in self._by_receiver.values():
            for passed in requests.values():
                usual = self._longest.get(passed.method, 0.0)
                if now - passed.since > max(at_least_s, factor * usual):
                    found.append(passed)
        return found

    def _remember(self, passed: Passed, now: float) -> None:
        self._longest[passed.method] = now - passed.since
        if len(self._longest) > MAX_METHODS:
            del self._longest[min(self._longest, key=self._longest.__getitem__)]


def expects_answer(envelope: Envelope) -> bool:
    """Whether a receiver that cannot take the message has to say so."""
    return envelope.kind == CALL


def is_one_way(envelope: Envelope) -> bool:
    """Whether the sender only waits for the message to be taken."""
    return bool(envelope.flags & ONE_WAY)
