"""Connections of the in-memory transport: what is under way in each direction, and what befalls it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from miles_agents.wire.frames import flat_frames
from miles_agents.wire.transport import MAX_FRAME_BYTES, ZERO_COPY_BYTES, Buffer, Connection

if TYPE_CHECKING:
    from miles_agents.wire.memory_transport import MemoryAcceptor, MemoryDialer, MemoryNetwork


@dataclass(frozen=True, slots=True)
class Faults:
    """What one direction between two hosts does to messages. Probabilities in [0, 1]; delays in seconds.

    ``reorder`` is the chance that a message is overtaken by those sent up to ``reorder_s`` after it.
    With ``bytes_per_s`` a message takes as long as its size demands, and those behind it wait.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_s: tuple[float, float] = (0.0, 0.0)
    reorder_s: float = 0.01
    bytes_per_s: float | None = None


_NO_FAULTS = Faults()


class Link:
    """One connection: a lane for each direction, and the watch over its silence."""

    def __init__(
        self, network: MemoryNetwork, name: Connection, dialer: MemoryDialer, acceptor: MemoryAcceptor
    ) -> None:
        self.name = name
        self.dialer = dialer
        self.acceptor = acceptor
        self.is_alive = True
        self.up = Lane(network, self, dialer.host, acceptor.host, acceptor)
        self.down = Lane(network, self, acceptor.host, dialer.host, dialer)
        self._network = network
        self._silence: asyncio.TimerHandle | None = None

    def review(self, *, is_silent: bool) -> None:
        """The faults have changed: start or stop the clock of silence; bring a lost end through after all."""
        if not is_silent:
            if self._silence is not None:
                self._silence.cancel()
                self._silence = None
            for lane in (self.up, self.down):
                lane.repeat_end()
        elif self._silence is None:
            self._silence = self._network._loop.call_later(self._network.silence_s, self.abort)

    def abort(self) -> None:
        """Break at once, for both sides."""
        self.finish()
        for lane in (self.up, self.down):
            lane.clear()
        for endpoint in (self.dialer, self.acceptor):
            self._tell(endpoint)

    def finish(self) -> None:
        """The connection is over; what was delivered remains so."""
        self.is_alive = False
        self._network._links.pop(self.name, None)
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _tell(self, endpoint: MemoryDialer | MemoryAcceptor) -> None:
        self._network._on_host(endpoint.host, lambda: endpoint._lose(self))


@dataclass(order=True, slots=True)
class _Parcel:
    """A message under way; ``frames`` None is the end of the connection."""

    due: float
    number: int
    frames: list[Buffer] | None = field(compare=False)


class Lane:
    """One direction of one connection: what is under way, in order of arrival."""

    def __init__(
        self,
        network: MemoryNetwork,
        link: Link,
        source: str,
        target: str,
        receiver: MemoryDialer | MemoryAcceptor,
    ) -> None:
        self.source = source
        self.target = target
        self._network = network
        self._link = link
        self._receiver = receiver
        self._parcels: list[_Parcel] = []
        self._num_parcels = 0
        self._last_due = 0.0
        self._is_ending = False
        self._timer: asyncio.TimerHandle | None = None

    def carry(self, message: list[Buffer]) -> None:
        """Take a message along, with whatever befalls it."""
        network = self._network
        if not self._link.is_alive or not network._is_open(self.source, self.target):
            return
        faults = network._faults.get((self.source, self.target), _NO_FAULTS)
        rng = network.rng
        if faults.drop and rng.random() < faults.drop:
            return
        now = network._loop.time()
        due = max(self._last_due, now + network.latency_s)
        if faults.delay_s[1]:
            due = max(self._last_due, now + network.latency_s + rng.uniform(*faults.delay_s))
        if faults.bytes_per_s is not None:
            due += sum(map(len, message)) / faults.bytes_per_s
        if faults.reorder and rng.random() < faults.reorder:
            self._add(due + rng.uniform(0.0, faults.reorder_s), message)
        else:
            self._last_due = due
            self._add(due, message)
        if faults.duplicate and rng.random() < faults.duplicate:
            self._add(due + rng.uniform(0.0, faults.reorder_s), isolated(message))

    def end(self) -> None:
        """The side that sends here has closed: the other one hears it after what was sent before."""
        self._is_ending = True
        self.repeat_end()

    def repeat_end(self) -> None:
        """Announce the end, if there is one to announce and nothing stops it."""
        network = self._network
        if self._is_ending and self._link.is_alive and network._is_open(self.source, self.target):
            last = max((parcel.due for parcel in self._parcels), default=0.0)
            self._add(max(last, network._loop.time() + network.latency_s), None)

    def clear(self) -> None:
        """Lose what is under way."""
        self._parcels.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _add(self, due: float, frames: list[Buffer] | None) -> None:
        self._num_parcels += 1
        heappush(self._parcels, _Parcel(due, self._num_parcels, frames))
        self._arm()

    def _arm(self) -> None:
        """One timer per lane, for the next parcel: equal times of separate timers would have no order."""
        if not self._parcels:
            return
        due = self._parcels[0].due
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._network._loop.call_at(due, self._deliver, due)

    def _deliver(self, due: float) -> None:
        self._timer = None
        try:
            while self._parcels and self._parcels[0].due <= due:
                frames = heappop(self._parcels).frames
                if frames is None:
                    self._deliver_end()
                else:
                    self._deliver_message(frames)
        finally:
            self._arm()  # also when a handler raised

    def _deliver_message(self, frames: list[Buffer]) -> None:
        self._network._on_host(self.target, lambda: self._receiver._take(self._link, frames))

    def _deliver_end(self) -> None:
        if self._link.is_alive:
            self._link.finish()
            self._network._on_host(self.target, lambda: self._receiver._lose(self._link))


def isolated(frames: Sequence[Buffer]) -> list[Buffer]:
    """A copy that shares no writable memory with the original, in the types that a receiver gets."""
    flat, _ = flat_frames(frames, MAX_FRAME_BYTES)
    return [bytes(frame) if len(frame) < ZERO_COPY_BYTES else memoryview(bytearray(frame)) for frame in flat]
