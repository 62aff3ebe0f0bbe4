"""Flags of the trainer in whole runs: saves on request and what follows them, traces, engines that stay as they are."""

import gzip
import json

import pytest
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
SFT = {"loss_type": "sft_loss", "custom_rm_path": None, "lr": 1e-3, "num_rollout": 3, "rollout_num_gpus": None}


def test_a_save_that_is_asked_for_ends_with_the_users_function(tmp_path):
    """Supervised, on two ranks: a checkpoint by request after the first rollout, the usual one after the last."""
    sentinel = tmp_path / "save now"
    sentinel.write_text("")
    done = train(
        tmp_path,
        **SFT,
        actor_num_gpus_per_node=2,
        save=tmp_path / "checkpoints",
        save_hf=tmp_path / "hf_{rollout_id}",
        save_trigger_sentinel=sentinel,
        custom_megatron_post_save_hook_path="user_code.note_save",
        use_pytorch_profiler=True,
        profile_step_start=1,
        profile_step_end=2,
        record_memory_history=True,
        memory_recorder="memray",
        save_local_weight_checksum=True,
    )
    assert done.code == 0, done.output
    assert not sentinel.exists()
    saves = [json.loads(line) for line in (tmp_path / "checkpoints" / "saves.jsonl").read_text().splitlines()]
    wanted = [
        [number, f"{tmp_path}/checkpoints/iter_000000{number}", f"{tmp_path}/hf_{number}", True] for number in (0, 2)
    ]
    assert saves == wanted
    _check_traces(done.run_dir)


def _check_traces(run_dir):
    (trace,) = (run_dir / "traces").iterdir()
    names = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"train", "actor_train", "data_preprocess", "aten::mm"} <= names
    recordings = sorted(path.name for path in run_dir.glob("rank*.memray"))
    assert recordings == ["rank00000-snapshot.memray", "rank00001-snapshot.memray"]
    assert len((run_dir / "weight_checksums" / "rank00001.jsonl").read_text().splitlines()) == 3


def test_engines_can_keep_their_weights(tmp_path):
    """They answer as they did before: with greedy sampling the same rewards again."""
    flags = {"num_rollout": 2, "rollout_temperature": 0.0, "rollout_batch_size": 4, "n_samples_per_prompt": 2}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} plus {n}?", "label": "0"}) + "\n" for n in range(4)))
    done = train(tmp_path, **flags, colocate=True, rollout_num_gpus=None, debug_skip_weight_update=True, lr=1e-1)
    assert done.code == 0, done.output
    first, second = done.rewards()
    assert second == pytest.approx(first)
    assert not any("perf/update_weights/send_time" in row for row in done.rows())


def test_an_exception_of_a_hook_ends_the_run_with_its_traceback_first(tmp_path):
    done = train(tmp_path, **SFT, custom_megatron_before_train_step_hook_path="user_code.broken_step")
    assert done.code == 1
    story = done.output[done.output.index("the run failed:") :]
    assert story.startswith("the run failed: Traceback (most recent call last):")
    assert story.index("RewardWasWrong: no step 0") < story.index("--custom-megatron-before-train-step-hook-path")
