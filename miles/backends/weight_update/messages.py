"""What the controller tells the trainer about a weight update. Plain values that travel; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from miles_agents import register_type

UpdateMethod = Literal["tensor", "broadcast"]
"""``tensor``: handles of buckets in memory that both sides share (colocated: CUDA IPC, or shared memory on CPU).
``broadcast``: a process group of trainer and engines (disaggregated: NCCL, or gloo on CPU)."""

GROUP_NAME = "miles"
"""Of the process group of ``broadcast``."""


@register_type
@dataclass(frozen=True)
class EngineTarget:
    """One engine as others reach it.

    Attributes:
        name: Of its service, such as ``engine-0``.
        url: ``http://host:port``, without a slash at the end.
        api_key: What requests carry as ``Authorization: Bearer``; empty: none.
        tp_size: Ranks of the engine: each takes one payload, or one place in the process group.
        rank_offset: Place of the engine's first rank in a process group in which the trainer is rank 0.
        has_bracket: It needs ``/begin_weight_update`` and ``/end_weight_update`` around buckets.
        has_stream: It loads weights with our loader (``sglang_utils.receive_weights``), so that one request is enough.
    """

    name: str
    url: str
    api_key: str = field(repr=False)
    tp_size: int
    rank_offset: int
    has_bracket: bool
    has_stream: bool = True


@register_type
@dataclass(frozen=True)
class WeightUpdate:
    """One update: which version goes where, and how.

    Attributes:
        version: The weight version that the engines will report; grows by one with each update.
        engines: Those that take part.
        method: How the bytes travel.
        bucket_bytes: The most bytes that one bucket holds (``--update-weight-buffer-size``); a larger tensor is
            a bucket of its own.
        group_name: Of the process group; ``broadcast`` only.
        new_group: The engines have changed since the last update: a process group must be made anew.
        timeout_s: How long an engine may take for one bucket, or one request of another kind.
    """

    version: int
    engines: tuple[EngineTarget, ...]
    method: UpdateMethod
    bucket_bytes: int
    group_name: str = GROUP_NAME
    new_group: bool = True
    timeout_s: float = 600.0
