"""Whole runs of models that are spread over ranks: pipeline stages, shared sequences, shared experts. The reward rises,
metrics count each sample once, and engines hold exactly the trainer's weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_model
from support.training_runs import environment, train

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

LAYOUTS = {
    "TP 2 with SP and PP 2, disaggregated": {
        "actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
    "CP 2, colocated": {
        "colocate": True, "actor_num_gpus_per_node": 2, "context_parallel_size": 2, "rollout_num_gpus_per_engine": 2,
        "use_dynamic_batch_size": True, "max_tokens_per_gpu": 128,
    },
}  # fmt: skip


def check(done, rollouts=4):
    assert done.code == 0, done.output
    versions = [f"weight version {version} checked" in done.output for version in range(1, rollouts + 3)]
    assert versions == [True] * (rollouts + 1) + [False]
    rows = done.rows()
    # What the trainer computes of the engines' answers is what they did: every layer and every expert arrived.
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in rows) < 1e-4
    for row in rows:
        assert row["rollout/response_lengths"] == pytest.approx(row["rollout/response_len/mean"])
        assert row["rollout/advantages"] == pytest.approx(0, abs=1e-5)
    rewards = done.rewards()
    assert rewards[-1] > rewards[0] + 0.1, (rewards, done.output)


@pytest.mark.long  # minutes on two cores; the numbers of these layouts: tests/training/test_parallelism.py
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_a_model_over_several_ranks_trains_in_a_whole_run(tmp_path, flags):
    check(train(tmp_path, check_weight_update_equal=True, num_rollout=4, timeout_s=580, **flags))


def test_a_model_with_experts_trains_in_a_whole_run_is_exported_and_converted(tmp_path):
    model = tiny_model("qwen3_moe", hidden=64, layers=2, tied=False)
    done = train(
        tmp_path, model=model, colocate=True, actor_num_gpus_per_node=2, expert_model_parallel_size=2,
        rollout_num_gpus_per_engine=2, check_weight_update_equal=True, num_rollout=4, save=tmp_path / "save",
        use_rollout_routing_replay=True, save_debug_rollout_data=tmp_path / "rollout-{rollout_id}.pt",
        save_hf=tmp_path / "{rollout_id}", timeout_s=580,
    )  # fmt: skip
    check(done)
    for sample in torch.load(tmp_path / "rollout-3.pt", weights_only=True)["samples"]:
        experts = sample["rollout_routed_experts"]
        assert experts.shape == (len(sample["tokens"]) - 1, 2, 2) and (experts[..., 0] != experts[..., 1]).all()
    exported, original = weights(tmp_path / "3"), weights(model)
    assert {name: value.shape for name, value in exported.items()} == {
        name: value.shape for name, value in original.items()
    }
    moved = [name for name, value in exported.items() if not torch.equal(value, original[name])]
    assert len(moved) > 0.9 * len(original)
    # The checkpoint of two ranks, read by one.
    words = ["torch-dist-to-hf", tmp_path / "save", tmp_path / "converted", "--hf-checkpoint", model]
    argv = [sys.executable, "-m", "miles_launcher.cli", "convert", *map(str, words)]
    told = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    converted = weights(tmp_path / "converted")
    assert converted.keys() == exported.keys()
    assert all(torch.equal(converted[name], value) for name, value in exported.items())


def weights(directory):
    assert json.loads((directory / "config.json").read_text())["model_type"] == "qwen3_moe"
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
