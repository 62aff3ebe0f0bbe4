"""The same flags train on both backends, with engines beside the trainer or on its devices
(``test_matrix_colocated.py``), with 1 to 4 ranks, 1 and 2 engines, and engines of two ranks: real Megatron-core or
FSDP2, real SGLang; the reward rises alike, and the engines hold exactly the trainer's weights."""

import pytest
from support.run_trace import generating_while_training
from support.training_runs import assert_trains, train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

MATRIX = {
    "megatron, DP 2, 2 engines": {"actor_num_gpus_per_node": 2, "rollout_num_gpus": 2},
    "megatron, TP 2 and DP 2, dynamic batches": {
        "actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 2, "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 256,
    },
    "fsdp, 1 rank, an engine of 2": {
        "train_backend": "fsdp", "rollout_num_gpus": 2, "rollout_num_gpus_per_engine": 2,
    },
}  # fmt: skip


LONG = ("megatron, DP 2, 2 engines", "fsdp, 1 rank, an engine of 2")
"""What is different here is in other whole runs, too."""


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, id=name, marks=[pytest.mark.long] * (name in LONG)) for name, flags in MATRIX.items()]
)
def test_it_trains_and_the_reward_rises(tmp_path, flags):
    # Six rollouts: after four the worst of many runs had risen by 0.24 only, and a rollout takes a second.
    done = train(tmp_path, check_weight_update_equal=True, num_rollout=6, timeout_s=580, **flags)
    assert_trains(done, 6)
    # In turns: while the trainer works on a rollout, engines have no request.
    assert generating_while_training(done.run_dir) < 1e-3
