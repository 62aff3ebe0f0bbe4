"""The same flags train on both backends, in both layouts, with 1 to 4 ranks, 1 and 2 engines, and engines of two ranks:
real Megatron-core or FSDP2, real SGLang; the reward rises alike, and the engines hold exactly the trainer's weights."""

import pytest
from support.run_trace import generating_while_training
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

MATRIX = {
    "megatron, colocated, 1 rank, 1 engine": {"colocate": True},
    "megatron, colocated, TP 2, an engine of 2": {
        "colocate": True, "actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2,
        "rollout_num_gpus_per_engine": 2,
    },
    "megatron, disaggregated, DP 2, 2 engines": {"actor_num_gpus_per_node": 2, "rollout_num_gpus": 2},
    "megatron, disaggregated, TP 2 and DP 2, dynamic batches": {
        "actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 2, "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 256,
    },
    "fsdp, colocated, 2 ranks, 2 engines": {
        "train_backend": "fsdp", "colocate": True, "actor_num_gpus_per_node": 2,
    },
    "fsdp, disaggregated, 1 rank, an engine of 2": {
        "train_backend": "fsdp", "rollout_num_gpus": 2, "rollout_num_gpus_per_engine": 2,
    },
}  # fmt: skip


LONG = ("megatron, colocated, 1 rank, 1 engine", "fsdp, disaggregated, 1 rank, an engine of 2")
"""One rank and these layouts are in other whole runs, too."""


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, id=name, marks=[pytest.mark.long] * (name in LONG)) for name, flags in MATRIX.items()]
)
def test_it_trains_and_the_reward_rises(tmp_path, flags):
    # Six rollouts: after four the worst of many runs had risen by 0.24 only, and a rollout takes a second.
    done = train(tmp_path, check_weight_update_equal=True, num_rollout=6, timeout_s=580, **flags)
    assert done.code == 0, done.output
    # After the first update and after each step: the engines hold exactly what the trainer does.
    assert [f"weight version {version} checked" in done.output for version in range(1, 9)] == [True] * 7 + [False]
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in done.rows()) < 1e-4
    # In turns: while the trainer works on a rollout, engines have no request.
    assert generating_while_training(done.run_dir) < 1e-3
    rewards = done.rewards()
    assert len(rewards) == 6
    # A random model writes a letter now and then; a policy that is trained, mostly.
    assert rewards[0] < 0.35, done.output
    assert rewards[-1] > rewards[0] + 0.25, done.output
    assert [row["rollout/weight_version/mean"] for row in done.rows()] == [1, 2, 3, 4, 5, 6]
