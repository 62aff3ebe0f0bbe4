"""Whole runs of models that are spread over ranks: pipeline stages, shared sequences, shared experts. The reward rises,
metrics are those of all samples once, and engines hold exactly the trainer's weights."""

import json

import pytest
from safetensors import safe_open
from support.tiny_models import tiny_model
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

LAYOUTS = {
    "PP 2, disaggregated": {"actor_num_gpus_per_node": 2, "pipeline_model_parallel_size": 2},
    "CP 2 and TP 2 with SP, colocated": {
        "colocate": True, "actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True,
        "context_parallel_size": 2, "rollout_num_gpus_per_engine": 4,
    },
}  # fmt: skip


def check(done, rollouts):
    assert done.code == 0, done.output
    versions = [f"weight version {version} checked" in done.output for version in range(1, rollouts + 3)]
    assert versions == [True] * (rollouts + 1) + [False]
    rows = done.rows()
    # What the trainer computes of the engines' answers is what the engines did: every layer and expert arrived.
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in rows) < 1e-4
    for row in rows:
        assert row["rollout/response_lengths"] == pytest.approx(row["rollout/response_len/mean"])
    rewards = done.rewards()
    assert rewards[-1] > rewards[0] + 0.2, done.output


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_a_model_over_several_ranks_trains_in_a_whole_run(tmp_path, flags):
    check(train(tmp_path, check_weight_update_equal=True, num_rollout=5, timeout_s=580, **flags), 5)


def test_a_model_with_experts_trains_in_a_whole_run_and_is_exported(tmp_path):
    model = tiny_model("qwen3_moe", hidden=64, layers=2)
    done = train(
        tmp_path, model=model, colocate=True, actor_num_gpus_per_node=2, expert_model_parallel_size=2,
        check_weight_update_equal=True, num_rollout=5, save=tmp_path / "save", save_hf=tmp_path / "hf",
        timeout_s=580,
    )  # fmt: skip
    check(done, 5)
    assert names(tmp_path / "hf") == names(model)


def names(directory):
    found = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {(name, *opened.get_slice(name).get_shape()) for name in opened.keys()}
    assert json.loads((directory / "config.json").read_text())["model_type"] == "qwen3_moe"
    return found
