"""Which engine a trainer rank shares a GPU with."""

import pytest

from miles.backends.base import ParallelState
from miles.backends.weight_update.colocation import engine_of
from miles.backends.weight_update.failures import BadUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate


def update(*sizes):
    offset, targets = 1, []
    for index, size in enumerate(sizes):
        targets.append(EngineTarget(f"engine-{index}", "http://x:1", "", size, offset, True))
        offset += size
    return WeightUpdate(1, tuple(targets), "tensor", 100)


def test_engines_lie_one_after_the_other_on_the_ranks_gpus():
    found = [engine_of(ParallelState(rank=rank, world_size=4), update(2, 1)) for rank in range(4)]
    assert [engine and engine.name for engine in found] == ["engine-0", "engine-0", "engine-1", None]


def test_an_engine_without_trainer_ranks_cannot_be_reached():
    with pytest.raises(BadUpdate, match="engine-1 is not on the trainer's GPUs") as caught:
        engine_of(ParallelState(rank=0, world_size=3), update(2, 2))
    assert "trainer ranks: 3" in caught.value.evidence
