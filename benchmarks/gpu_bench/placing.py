"""Which GPUs trainers and engines of up to two ranks each get, and which the ranks of one communicator. Pure.

NCCL from 2.30 on lets several ranks of a communicator be on one GPU where the environment asks for it. Their kernels
take turns there, so what such a group needs says nothing about separate GPUs; that the bytes arrive, it does show.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
SHARED = "several ranks on a GPU"
SEPARATE_GPUS, SHARED_GPUS = 4, 2


def may_share(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether NCCL is asked to let ranks share GPUs."""
    return environ.get(VARIABLE) == "1"


def is_shared(group: Sequence[int]) -> bool:
    """Whether several ranks of a communicator, whose ranks are on these GPUs, are on one."""
    return len(set(group)) < len(group)


@dataclass(frozen=True)
class Placing:
    """A trainer's ranks are on the first of so many ``gpus``, one on each."""

    gpus: int

    @property
    def is_shared(self) -> bool:
        """Trainer and engine are on the same GPUs, as there are too few."""
        return self.gpus < SEPARATE_GPUS

    @property
    def note(self) -> str:
        """What the name of every figure has to say."""
        return f", {SHARED}" if self.is_shared else ""

    def engine(self, ranks: int) -> tuple[int, ...]:
        """GPUs of an engine of one or two ranks: the last."""
        return ((0, 1) if self.is_shared else (2, 3))[-ranks:]

    def bare(self, ranks: int) -> tuple[int, ...]:
        """GPUs of a group that broadcasts to so many ranks: where GPUs are shared, those of an update's own group,
        which are the trainer's first and the engine's."""
        return (0, *self.engine(ranks)) if self.is_shared else tuple(range(1 + ranks))
