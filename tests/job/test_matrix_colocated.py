"""As ``test_matrix.py``, with engines on the devices of the trainer."""

import pytest
from support.training_runs import assert_trains, train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

MATRIX = {
    "megatron, 1 rank, 1 engine": {},
    "megatron, TP 2, an engine of 2": {
        "actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2, "rollout_num_gpus_per_engine": 2,
    },
    "fsdp, 2 ranks, 2 engines": {"train_backend": "fsdp", "actor_num_gpus_per_node": 2},
}  # fmt: skip


LONG = ("megatron, 1 rank, 1 engine",)
"""In other whole runs, too."""


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, id=name, marks=[pytest.mark.long] * (name in LONG)) for name, flags in MATRIX.items()]
)
def test_it_trains_and_the_reward_rises(tmp_path, flags):
    flags = {**flags, "colocate": True, "check_weight_update_equal": True, "num_rollout": 6}
    assert_trains(train(tmp_path, timeout_s=580, **flags), 6)
