"""Weights laid out in buckets, as senders do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from miles.backends.weight_update.buckets import Bucket, Entry, copy_into


def buckets_of(
    weights: Mapping[str, torch.Tensor], capacity: int = 1 << 30, *, alignment: int = 16
) -> Iterator[tuple[tuple[Entry, ...], torch.Tensor]]:
    """What lies where, and the memory, uint8 ``[n]``."""
    bucket = Bucket(capacity, alignment)
    for name, tensor in weights.items():
        if not bucket.takes(tensor):
            yield _filled(bucket, weights)
            bucket = Bucket(capacity, alignment)
        bucket.add(name, tensor)
    yield _filled(bucket, weights)


def _filled(bucket: Bucket, weights: Mapping[str, torch.Tensor]) -> tuple[tuple[Entry, ...], torch.Tensor]:
    memory = torch.full((bucket.num_bytes,), 0xA5, dtype=torch.uint8)
    for entry in bucket.entries:
        copy_into(memory, entry, weights[entry.name])
    return tuple(bucket.entries), memory
