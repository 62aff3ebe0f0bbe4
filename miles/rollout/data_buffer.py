"""What lies between a producer of finished prompt groups and the training loop: a bounded queue, first in, first out.

``--custom-async-data-buffer-path`` names a subclass of ``DataBuffer`` that is used instead.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from argparse import Namespace
from collections import deque
from dataclasses import dataclass
from typing import Any

from miles.rollout.base_types import Group


@dataclass(frozen=True)
class DataBufferConstructorInput:
    """What a buffer is made with. ``capacity``: groups that it shall hold at most."""

    args: Namespace
    capacity: int


class DataBuffer(ABC):
    """Groups that wait to be trained on. All methods are called on the loop of user code."""

    def __init__(self, input: DataBufferConstructorInput) -> None:  # noqa: A002
        self.args = input.args
        self.capacity = input.capacity

    @abstractmethod
    async def put(self, group: Group) -> None:
        """Take a group in; waits while there is no room."""

    @abstractmethod
    async def get(self, num_groups: int) -> list[Group]:
        """As many groups; waits until they are there."""

    def get_metrics(self) -> dict[str, Any]:
        """Numbers to log with the next rollout."""
        return {}


class FifoDataBuffer(DataBuffer):
    """The default: the oldest groups first."""

    def __init__(self, input: DataBufferConstructorInput) -> None:  # noqa: A002
        super().__init__(input)
        self._groups: deque[Group] = deque()
        self._changed = asyncio.Condition()

    async def put(self, group: Group) -> None:
        """See ``DataBuffer``."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._groups) < self.capacity)
            self._groups.append(group)
            self._changed.notify_all()

    async def get(self, num_groups: int) -> list[Group]:
        """See ``DataBuffer``. More than the capacity can never be had at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._groups) >= num_groups)
            found = [self._groups.popleft() for _ in range(num_groups)]
            self._changed.notify_all()
            return found

    def get_metrics(self) -> dict[str, Any]:
        """``buffered``: groups that wait."""
        return {"buffered": float(len(self._groups))}


def buffer_capacity(args: Any) -> int:
    """``--async-data-buffer-capacity-factor`` times ``--rollout-batch-size``, rounded down, at least 1."""
    return max(1, math.floor(float(args.async_data_buffer_capacity_factor) * int(args.rollout_batch_size)))
