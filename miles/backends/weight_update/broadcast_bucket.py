"""What one message of an update by broadcast announces. Needs torch.

Small tensors travel packed, in one broadcast. Large ones travel alone, from where they lie: copies into a bucket and
out of it would take from the broadcast what they take of the memory's bandwidth. For receivers they all lie in one
memory: the packed ones first, then the others, one after the other; whoever knows a better place for one of the latter
receives it there.
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
    """A bucket that is being filled: it keeps tensors, and copies nothing. ``capacity`` is the most bytes that it
    takes, but for one tensor that is larger. ``device``: from which large tensors can be sent."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
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
        return Outgoing(entries, packed.num_bytes, end, small, large)

    def _is_large(self, tensor: torch.Tensor) -> bool:
        return tensor.nbytes >= self._alone_bytes and tensor.is_contiguous() and tensor.device == self._device


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
    small: Sequence[tuple[Entry, torch.Tensor]]
    large: Sequence[torch.Tensor]

    def parts(self, memory: torch.Tensor, copies: BucketCopies) -> list[torch.Tensor]:
        """What is to be broadcast, uint8 ``[n]`` each, with small tensors copied into ``memory``: ``packed`` bytes."""
        for entry, tensor in self.small:
            copies.add(memory, entry, tensor)
        copies.flush()
        packed = [memory[: self.packed]] if self.packed else []
        return packed + [tensor.view(-1).view(torch.uint8) for tensor in self.large]


def alone(entries: Sequence[Entry], packed: int) -> list[int]:
    """Which entries travel alone, in the order in which they do."""
    return [index for index, entry in enumerate(entries) if entry.num_bytes and entry.start >= packed]


def incoming_parts(
    entries: Sequence[Entry], packed: int, memory: torch.Tensor, places: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Where a receiver takes what ``Outgoing.parts`` sends: into ``memory``, or ``places``, by index of the entry."""
    parts = [memory[:packed]] if packed else []
    for index in alone(entries, packed):
        entry = entries[index]
        place = places.get(index)
        parts.append(memory[entry.start : entry.start + entry.num_bytes] if place is None else place)
    return parts
