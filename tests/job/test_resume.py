"""A run that ended and was resumed is the run that went on. By default on two data-parallel ranks; that each backend
resumes bit for bit on the other layouts is shown without a whole run, too, in ``tests/megatron`` and ``tests/fsdp``."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.recorded_rollouts import write_rollouts
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(1300)]


def compare(ours, theirs):
    """Names of what differs between two checkpoints, and how many tensors and values there are."""
    script = Path(__file__).parents[1] / "support" / "compare_checkpoints.py"
    done = subprocess.run(
        [sys.executable, script, ours, theirs], capture_output=True, text=True, timeout=300, check=True
    )
    *differing, count = done.stdout.split("\n")[:-1]
    return differing, int(count)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            {"train_backend": "megatron", "actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2},
            id="megatron, TP 2",
            marks=pytest.mark.long,
        ),
        pytest.param({"train_backend": "megatron", "actor_num_gpus_per_node": 2}, id="megatron, DP 2"),
        pytest.param(
            {"train_backend": "fsdp", "actor_num_gpus_per_node": 2}, id="fsdp, 2 ranks", marks=pytest.mark.long
        ),
    ],
)
def test_six_iterations_equal_three_and_three_bit_for_bit(tmp_path, flags):
    flags = {
        **flags, "num_rollout": 6, "load_debug_rollout_data": write_rollouts(tmp_path / "recorded", rollouts=6),
        "lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 1e-4, "rollout_num_gpus": None, "colocate": True,
        "debug_train_only": True, "custom_rm_path": None, "rm_type": "random",
    }  # fmt: skip
    whole = train(tmp_path, run_dir=tmp_path / "whole", save=tmp_path / "a", **flags)
    assert whole.code == 0, whole.output
    first = train(
        tmp_path, run_dir=tmp_path / "first", save=tmp_path / "b", save_interval=3, debug_exit_after_rollout=3, **flags
    )
    assert first.code == 0, first.output
    second = train(tmp_path, run_dir=tmp_path / "second", save=tmp_path / "b", load=tmp_path / "b", **flags)
    assert second.code == 0, second.output

    assert [row["rollout_id"] for row in second.rows()] == [3, 4, 5]
    names = ("train/loss", "train/grad_norm", "train/lr-pg_0")
    for ours, theirs in zip(first.rows() + second.rows(), whole.rows(), strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    differing, count = compare(tmp_path / "b" / "iter_0000005", tmp_path / "a" / "iter_0000005")
    assert differing == []
    assert count > 20


def ends_of(run_dir):
    """How often each group ended by which transition, from the journal."""
    steps = [json.loads(line) for line in (run_dir / "journal" / "rollout.jsonl").read_text().splitlines()]
    return Counter((step["group"], step["kind"]) for step in steps if step["kind"] in ("train", "filter"))


def test_with_live_engines_data_buffer_ledger_and_counters_go_on(tmp_path):
    flags = {
        "colocate": True, "num_rollout": 4, "save": tmp_path / "ckpt", "rollout_shuffle": True,
        "rollout_batch_size": 6, "over_sampling_batch_size": 10, "partial_rollout": True,
        "dynamic_sampling_filter_path": "user_code.not_the_first",
        "save_debug_rollout_data": f"{tmp_path}/{{rollout_id}}.pt",
    }  # fmt: skip
    first = train(tmp_path, run_dir=tmp_path / "first", save_interval=2, debug_exit_after_rollout=2, **flags)
    assert first.code == 0, first.output
    second = train(tmp_path, run_dir=tmp_path / "second", resume="auto", **flags)
    assert second.code == 0, second.output

    assert [row["rollout_id"] for row in second.rows()] == [2, 3]
    versions = [row["rollout/weight_version/max"] for row in first.rows() + second.rows()]
    assert versions == [1, 2, 3, 4]  # as if nothing had happened
    trained = []
    for rollout_id in range(4):
        samples = torch.load(tmp_path / f"{rollout_id}.pt", weights_only=True)["samples"]
        groups = dict.fromkeys(sample["group_index"] for sample in samples)
        assert len(groups) == 6
        trained += groups
    assert len(set(trained)) == 24  # no prompt twice, over both runs
    assert 0 not in trained
    ended = ends_of(tmp_path / "first") + ends_of(tmp_path / "second")
    assert ended[0, "filter"] == 1
    assert {group for group, kind in ended if kind == "train"} == set(trained)
    assert set(ended.values()) == {1}
    # What was taken beyond need is waited for in the buffer, not taken anew: over both runs few are fresh.
    assert max(trained) < 4 * 10
