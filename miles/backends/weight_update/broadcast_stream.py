"""Weight updates by stream through a process group of trainer rank 0 and all engines' ranks. Needs torch.

The group is kept from update to update, for as long as all engines are in it. Two buckets take turns: the next is
gathered while the one before is on its way; on a GPU this side waits for none of it until the end. Large tensors are
sent from where they lie (``broadcast_bucket``), so they are kept until they have been sent.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from miles.backends.base import ParallelState
from miles.backends.weight_update.broadcast_bucket import BroadcastBucket, Outgoing
from miles.backends.weight_update.broadcast_group import BroadcastGroup, Gathering, has_arrived
from miles.backends.weight_update.bucket_copies import BucketCopies
from miles.backends.weight_update.failures import not_made
from miles.backends.weight_update.messages import WeightUpdate
from miles.backends.weight_update.stream_sender import StreamSender, Weights
from miles.backends.weight_update.stream_update import Roles, Stream, all_ranks

_LOOK_EVERY_S = 0.0002
_FIRST_ON_CPU = 8
"""There the first bucket is so many times smaller: nothing is on its way until it is full. On a GPU that takes less
time than engines need to connect."""


class BroadcastStreamSender(StreamSender):
    """``broadcast``: rank 0 has everything to do with engines, the others gather with it."""

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        super().__init__(parallel, device)
        self.reads_only_first = True
        self._group: BroadcastGroup | None = None

    def _give_back(self) -> None:
        """Leave the process group."""
        if self._group is not None:
            group, self._group = self._group, None
            group.close()

    def _roles(self, update: WeightUpdate) -> Roles | None:
        return Roles(update.engines, all_ranks(update.engines)) if self.parallel.rank == 0 else None

    def _pump(self, update: WeightUpdate, weights: Weights, stream: Stream) -> None:
        try:
            self._send_all(update, weights, stream)
        except _Broken as error:
            traceback.clear_frames(error.__traceback__)  # they hold broadcasts, and so the group's connections
            stream.lines.settle_blame()
            self._give_back()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self._give_back()
            raise

    def _send_all(self, update: WeightUpdate, weights: Weights, stream: Stream) -> None:
        capacity, on_gpu, turn = self._capacity(update), self.device.type == "cuda", 0
        memories = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(2)]
        sent: list[_Sent | None] = [None, None]
        pieces = max(engine.tp_size for engine in update.engines)
        bucket = BroadcastBucket(capacity if on_gpu else max(capacity // _FIRST_ON_CPU, 1), self.device, pieces)
        for name, tensor in weights:
            if not bucket.takes(tensor):
                sent[turn] = self._broadcast(update, stream, bucket, memories, turn)
                bucket, turn = BroadcastBucket(capacity, self.device, pieces), 1 - turn
            if not bucket:
                before, sent[turn] = sent[turn], None
                self._await_sent(stream, before, update.timeout_s)
                del before
            bucket.add(name, tensor)
        if bucket:
            sent[turn] = self._broadcast(update, stream, bucket, memories, turn)
        self._come_to_an_end(stream, [sent[1 - turn], sent[turn]], update.timeout_s)

    def _broadcast(
        self, update: WeightUpdate, stream: Stream, bucket: BroadcastBucket, memories: list[torch.Tensor], turn: int
    ) -> _Sent:
        outgoing = bucket.laid_out()
        at = time.perf_counter()
        if memories[turn].numel() < outgoing.packed:
            room = _room(outgoing.packed, bucket.capacity)
            memories[turn] = torch.empty(room, dtype=torch.uint8, device=self.device)
        copies = BucketCopies(together=self.device.type == "cuda", beside_broadcast=True)
        parts = outgoing.parts(memories[turn], copies)  # the broadcast comes after the copies on the device
        self._times["copy"] += time.perf_counter() - at
        group = self._joined(update, stream)
        number, self.num_buckets = self.num_buckets, self.num_buckets + 1
        message = {"say": "bucket", "number": number, "entries": [entry.as_plain() for entry in outgoing.entries]}
        message |= {"num_bytes": outgoing.num_bytes, "packed": outgoing.packed}
        message |= {"cut": [outgoing.cut.pieces, outgoing.cut.from_bytes]}
        message |= {"room": _room(outgoing.num_bytes, bucket.capacity)}
        stream.lines.tell(lambda _: message)
        _raise_if_broken(stream)
        return _Sent(group.broadcast(parts), outgoing)

    def _await_sent(self, stream: Stream, sent: _Sent | None, timeout_s: float) -> None:
        """Until a bucket's memory may be written; on a GPU, until what is written there comes after. Raises _Broken."""
        if sent is None:
            return
        at = time.perf_counter()
        if self.device.type == "cpu":
            self._listen_until(stream, sent.work.is_completed, timeout_s)
        self._times["wait"] += time.perf_counter() - at
        while stream.lines.listen(0.0):
            pass
        _raise_if_broken(stream)
        if not has_arrived(sent.work):
            raise _Broken

    def _come_to_an_end(self, stream: Stream, last: list[_Sent | None], timeout_s: float) -> None:
        """Until everybody has everything. Raises _Broken."""
        at = time.perf_counter()
        stream.lines.tell(lambda _: {"say": "end"})
        works = [sent.work for sent in last if sent is not None]
        self._listen_until(
            stream, lambda: not stream.lines.peers and all(work.is_completed() for work in works), timeout_s
        )
        if not all(has_arrived(work) for work in works):
            self._give_back()  # everybody has everything, but the group is of no more use
        self._times["wait"] += time.perf_counter() - at

    @staticmethod
    def _listen_until(stream: Stream, is_over: Callable[[], bool], timeout_s: float) -> None:
        """Raises _Broken: an engine has failed, or nobody has said anything for so long."""
        deadline = time.monotonic() + timeout_s
        while not is_over():
            if stream.lines.listen(_LOOK_EVERY_S):
                deadline = time.monotonic() + timeout_s
            _raise_if_broken(stream)
            if time.monotonic() > deadline:
                stream.lines.fail_slowest(f"has loaded nothing for {timeout_s:g} s")
                raise _Broken

    def _joined(self, update: WeightUpdate, stream: Stream) -> BroadcastGroup:
        """Not before the first bucket is full: engines take milliseconds to connect. Raises GroupNotMade, _Broken."""
        if self.num_buckets and self._group is not None:
            return self._group
        stream.connect()
        _raise_if_broken(stream)
        group, lines = self._group, stream.lines
        if group is not None and not update.new_group and set(lines.groups.values()) == {group.name}:
            return group
        self._give_back()
        first = {engine.name: engine.rank_offset for engine in update.engines}
        size = 1 + sum(engine.tp_size for engine in update.engines)
        gathering = Gathering(stream.host, size, self.device)
        message = {"say": "join", "name": gathering.name, "host": gathering.host, "port": gathering.port, "size": size}
        lines.tell(lambda peer: message | {"rank": first[peer[0]] + peer[1]})

        def is_hopeless() -> bool:
            lines.listen(0.0)
            return lines.is_broken

        found = gathering.wait(is_hopeless)
        if not isinstance(found, BroadcastGroup):
            lines.hear_of_blame()
            _raise_if_broken(stream)
            raise not_made(update, {}, found)
        self._group = found
        lines.await_joined()
        _raise_if_broken(stream)
        return found


@dataclass(frozen=True, slots=True)
class _Sent:
    """A bucket on its way. ``outgoing`` keeps the tensors that are sent from where they lie."""

    work: Any
    outgoing: Outgoing


def _room(num_bytes: int, capacity: int) -> int:
    """How much memory to take for a bucket of this size, so that the next ones fit in, too."""
    return max(num_bytes, capacity) if num_bytes > capacity // 2 else num_bytes


class _Broken(Exception):
    """A broadcast will not reach everybody: an engine has failed, and others may wait for it, as data goes from one to
    the other, and so may this side."""


def _raise_if_broken(stream: Stream) -> None:
    if stream.lines.is_broken:
        raise _Broken
