"""What one message of an update by broadcast announces. Needs torch.

Small tensors travel packed, in one broadcast. Large ones travel alone, from where they lie: copies into a bucket and
out of it would take from the broadcast what they take of the memory's bandwidth. For receivers they all lie in one
memory: the packed ones first, then the others, one after the other; whoever knows a better place for one of the latter
receives it there. An engine of several ranks keeps a part of most on each of them: tensors that are large enough travel
in as many pieces, each of which may have a better place on one of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from miles.backends.weight_update.bucket_copies import BucketCopies
from miles.backends.weight_update.buckets import ALIGNMENT, Bucket, Entry

ALONE_BYTES = 4 << 20
"""From here on a tensor travels alone: a smaller one takes about as long to announce to NCCL as to send. Or if it takes
up an eighth of its bucket."""


class BroadcastBucket:
    """A bucket that is being filled: it keeps tensors, and copies nothing.

    Args:
        capacity: The most bytes that it takes, but for one tensor that is larger.
        device: From which large tensors can be sent.
        pieces: In how many they travel, if they are large enough.
    """

    def __init__(self, capacity: int, device: torch.device, pieces: int = 1) -> None:
        self.capacity = capacity
        self._pieces = pieces
        self._device = device
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._num_bytes = 0
        self._alone_bytes = min(ALONE_BYTES, max(capacity // 8, 1))

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it fits in."""
        return not self._tensors or self._num_bytes + tensor.nbytes <= self.capacity

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """It has to stay as it is until it is sent."""
        self._tensors.append((name, tensor.detach()))
        self._num_bytes = -(-(self._num_bytes + tensor.nbytes) // ALIGNMENT) * ALIGNMENT

    def laid_out(self) -> Outgoing:
        """All of it, with places."""
        packed, places, large = Bucket(self.capacity), dict[int, Entry](), list[torch.Tensor]()
        small = []
        for index, (name, tensor) in enumerate(self._tensors):
            if not self._is_large(tensor):
                places[index] = packed.add(name, tensor)
                small.append((places[index], tensor))
        end = packed.num_bytes
        for index, (name, tensor) in enumerate(self._tensors):
            if index not in places:
                start = -(-end // ALIGNMENT) * ALIGNMENT
                places[index] = Entry(name, tensor.dtype, tuple(tensor.shape), start, tensor.nbytes)
                large.append(tensor)
                end = start + tensor.nbytes
        entries = tuple(places[index] for index in range(len(places)))
        cut = Cut(self._pieces, self._pieces * self._alone_bytes)
        return Outgoing(entries, packed.num_bytes, end, cut, small, large)

    def _is_large(self, tensor: torch.Tensor) -> bool:
        return tensor.nbytes >= self._alone_bytes and tensor.is_contiguous() and tensor.device == self._device


@dataclass(frozen=True, slots=True)
class Cut:
    """In how many pieces a tensor travels that has so many bytes, or more."""

    pieces: int
    from_bytes: int

    def sizes(self, num_bytes: int) -> list[int]:
        """Of the pieces of a tensor."""
        is_cut = num_bytes >= self.from_bytes and num_bytes % (self.pieces * ALIGNMENT) == 0
        return [num_bytes // self.pieces] * self.pieces if is_cut else [num_bytes]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A full bucket at the sender.

    Attributes:
        entries: In the order of the tensors.
        packed: Bytes of the part that travels packed; what begins there, or later, travels alone.
        num_bytes: Of the whole.
    """

    entries: tuple[Entry, ...]
    packed: int
    num_bytes: int
    cut: Cut
    small: Sequence[tuple[Entry, torch.Tensor]]
    large: Sequence[torch.Tensor]

    def parts(self, memory: torch.Tensor, copies: BucketCopies) -> list[torch.Tensor]:
        """What is to be broadcast, uint8 ``[n]`` each, with small tensors copied into ``memory``: ``packed`` bytes."""
        for entry, tensor in self.small:
            copies.add(memory, entry, tensor)
        copies.flush()
        parts = [memory[: self.packed]] if self.packed else []
        for tensor in self.large:
            parts += torch.split(tensor.view(-1).view(torch.uint8), self.cut.sizes(tensor.nbytes))
        return parts


Span = tuple[int, int]
"""First byte in the bucket, and number of bytes."""


def spans_alone(entries: Sequence[Entry], packed: int, cut: Cut) -> list[Span]:
    """What travels by itself, in the order in which it does, which is that of the places."""
    spans = []
    for entry in entries:
        if entry.num_bytes and entry.start >= packed:
            sizes = cut.sizes(entry.num_bytes)
            spans += [(entry.start + index * size, size) for index, size in enumerate(sizes)]
    return spans


def incoming_parts(
    packed: int, spans: Sequence[Span], memory: torch.Tensor, places: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Where a receiver takes what ``Outgoing.parts`` sends: into ``memory``, or ``places``, by index of the span."""
    parts = [memory[:packed]] if packed else []
    for index, (start, num_bytes) in enumerate(spans):
        place = places.get(index)
        parts.append(memory[start : start + num_bytes] if place is None else place)
    return parts
