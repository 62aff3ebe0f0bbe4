"""Runs whose training ranks or rollout manager die or stop, with ``--use-fault-tolerance``: the weights are, bit for
bit, those of a run in which nobody did."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.recorded_rollouts import write_rollouts
from support.tiny_models import tiny_model
from support.training_runs import train

from miles.rollout.journal import replay

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
PACKAGE = "miles.backends"
STEPS = f"{PACKAGE}.training_utils.rollout_trainer:RolloutTrainer._steps"
SAVE = f"{PACKAGE}.training_utils.checkpoints:_make_durable"
SEND = f"{PACKAGE}.weight_update.stream_sender:StreamSender._add"
BROADCAST = f"{PACKAGE}.weight_update.broadcast_bucket:BroadcastBucket.add"
LORA = {
    "lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_kl_loss": True, "kl_loss_coef": 0.1,
}  # fmt: skip
BELOW = "weights that only the adapter stands on"
QUICK_HEARTS = {
    "trainer_heartbeat_checker_first_wait": 0, "trainer_heartbeat_checker_interval": 0.5,
    "trainer_heartbeat_checker_timeout": 4,
}  # fmt: skip


def differing(ours, theirs):
    """Names of what differs between two checkpoints: weights, optimizer, schedule, generators."""
    script = Path(__file__).parents[1] / "support" / "compare_checkpoints.py"
    command = [sys.executable, script, ours, theirs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *names, count = done.stdout.split("\n")[:-1]
    assert int(count) > 20
    return names


def recorded(tmp_path, **flags):
    """A run on recorded rollouts, whose optimizer and schedule have much to lose."""
    if not (tmp_path / "recorded").exists():
        write_rollouts(tmp_path / "recorded", rollouts=6)
    return {
        "num_rollout": 6, "load_debug_rollout_data": f"{tmp_path}/recorded/{{rollout_id}}.pt", "debug_train_only": True,
        "colocate": True, "lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 1e-4, "rollout_num_gpus": None,
        "custom_rm_path": None, "actor_num_gpus_per_node": 2, **flags,
    }  # fmt: skip


def fatal(tmp_path, place):
    """``place``: rank, how often, signal, function."""
    return {
        "use_fault_tolerance": True, "custom_megatron_init_path": "fatal_code.plan",
        "env": f"FATAL={place},{tmp_path / 'marker'}",
    }  # fmt: skip


def recoveries(done):
    """Events of it."""
    events = map(json.loads, (done.run_dir / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == "recovered"]


def compared(tmp_path, flags, place, *, last=5, **fault_flags):
    """Both runs; the events of the one whose rank fell."""
    whole = train(tmp_path, run_dir=tmp_path / "whole", save=tmp_path / "a", timeout_s=280, **flags)
    assert whole.code == 0, whole.output
    flags = {**flags, **fatal(tmp_path, place), **fault_flags}
    fallen = train(tmp_path, run_dir=tmp_path / "fallen", save=tmp_path / "b", timeout_s=280, **flags)
    assert fallen.code == 0, fallen.output
    assert (tmp_path / "marker").exists()
    assert [row["rollout_id"] for row in fallen.rows()] == list(range(last + 1))
    for name in ("train/loss", "train/grad_norm", "train/lr-pg_0"):
        assert [row[name] for row in fallen.rows()] == [row[name] for row in whole.rows()]
    found = recoveries(fallen)
    assert all(event["text"] in fallen.output for event in found)
    assert differing(tmp_path / "a" / f"iter_{last:07d}", tmp_path / "b" / f"iter_{last:07d}") == []
    return found


def test_a_rank_that_is_killed_in_training_changes_nothing(tmp_path):
    [event] = compared(tmp_path, recorded(tmp_path), f"1,4,SIGKILL,{STEPS}", recovery_interval=2)
    assert "the checkpoint of rollout 1, 1 rollout trained again" in event["text"]
    assert "SIGKILL" in event["fields"]["cause"]
    assert event["fields"]["seconds"] > 0


def test_user_code_that_raises_in_a_rank_ends_the_run_with_its_traceback(tmp_path):
    hook = "fatal_code.broken_step"
    done = train(
        tmp_path, use_fault_tolerance=True, custom_megatron_before_train_step_hook_path=hook, **recorded(tmp_path)
    )
    assert done.code == 1
    told = done.output[done.output.index("the run failed") :]
    assert "BrokenRank: cannot train rollout 1" in told
    assert told.index("fatal_code.py") < told.index("code: E-HOOK-002")
    assert not recoveries(done)


def test_an_asynchronous_run_with_engines_outlives_a_rank_that_falls_in_a_weight_update(tmp_path):
    done = train(
        tmp_path, train_async=True, num_rollout=4, check_weight_update_equal=True, timeout_s=400,
        **fatal(tmp_path, f"0,30,SIGKILL,{BROADCAST}"),
    )  # fmt: skip
    assert done.code == 0, done.output
    assert [row["rollout_id"] for row in done.rows()] == [0, 1, 2, 3]
    [event] = recoveries(done)
    assert "trainer's rank" in event["subject"]
    # The update was repeated: no version was left out, and the engine that waited in it was not fenced.
    assert [f"weight version {version} checked" in done.output for version in range(1, 7)] == [True] * 5 + [False]
    assert "fenced" not in done.output
    ledger = replay(done.run_dir / "journal" / "rollout.jsonl")
    assert ledger.num_trained == 4 * 8
    assert not ledger.open


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "place"),
    [
        ({}, f"1,4,SIGSTOP,{STEPS}"),
        ({"save_interval": 2}, f"0,2,SIGKILL,{SAVE}"),
        ({"save_interval": 2}, f"1,4,SIGKILL,{STEPS}"),
        ({"train_backend": "fsdp", "recovery_interval": 2}, f"1,4,SIGKILL,{STEPS}"),
        ({"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}, f"0,3,SIGKILL,{STEPS}"),
        ({"advantage_estimator": "ppo", "use_kl_loss": True, "kl_loss_coef": 0.1, "recovery_interval": 2},
         f"1,4,SIGKILL,{STEPS}"),
        ({"global_batch_size": 32, "num_steps_per_rollout": 2}, f"1,3,SIGKILL,{STEPS}"),
        ({**LORA, "recovery_interval": 2}, f"1,4,SIGKILL,{STEPS}"),
        ({**LORA, "recovery_interval": 2, "load": BELOW}, f"1,4,SIGKILL,{STEPS}"),
        ({**LORA, "recovery_interval": 2, "load": BELOW, "train_backend": "fsdp"}, f"0,2,SIGKILL,{STEPS}"),
    ],
    ids=["stopped", "in saving", "behind a checkpoint", "fsdp", "TP 2", "with critic and reference", "two steps",
         "an adapter", "an adapter on weights of its own", "the same with fsdp, before a checkpoint"],
)  # fmt: skip
def test_wherever_it_falls_and_whatever_it_trains(tmp_path, flags, place):
    if flags.get("load") == BELOW:
        flags = {**flags, "load": tiny_model("qwen3", hidden=64, layers=2, seed=5)}
    given = {name: flags[name] for name in flags if name != "recovery_interval"}
    only = {"recovery_interval": flags["recovery_interval"]} if "recovery_interval" in flags else {}
    assert len(compared(tmp_path, recorded(tmp_path, **given), place, **QUICK_HEARTS, **only)) == 1


FULLY = {"train_async": True, "fully_async": True, "max_weight_staleness": 1, "async_unused_samples_handler": "retry"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"colocate": True}, "SIGKILL"), ({"train_async": True}, "SIGKILL"), (FULLY, "SIGKILL"),
        ({"train_async": True}, "SIGSTOP"),
    ],
    ids=["one after the other", "one step ahead", "fully asynchronous", "stopped"],
)  # fmt: skip
def test_a_rollout_manager_that_falls_loses_nothing(tmp_path, flags, name):
    done = train(
        tmp_path, num_rollout=4, use_fault_tolerance=True, custom_rm_path="fatal_code.deadly_reward",
        recovery_stop_timeout=3, env=f"FATAL={name},{tmp_path / 'marker'}", timeout_s=400, **flags,
    )  # fmt: skip
    assert_nothing_is_lost(done, name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("place", [f"0,3,{{}},{STEPS}", f"0,60,{{}},{SEND}"], ids=["in training", "in a weight update"])
def test_a_rollout_manager_that_falls_while_others_work_loses_nothing(tmp_path, name, place):
    flags = fatal(tmp_path, place.format(name))
    done = train(
        tmp_path, **{**flags, "env": flags["env"] + ",rollout"}, num_rollout=4, recovery_stop_timeout=3, colocate=True,
        custom_rm_path="fatal_code.noted_reward", check_weight_update_equal=True, timeout_s=400,
    )  # fmt: skip
    assert (tmp_path / "marker").exists()
    assert_nothing_is_lost(done, name)


def assert_nothing_is_lost(done, name):
    assert done.code == 0, done.output
    assert [row["rollout_id"] for row in done.rows()] == [0, 1, 2, 3]
    [event] = recoveries(done)
    assert event["subject"] == "the rollout manager"
    assert ("SIGKILL" if name == "SIGKILL" else "was stopped (SIGSTOP) for") in event["fields"]["cause"]
    ledger = replay(done.run_dir / "journal" / "rollout.jsonl")
    assert ledger.num_trained == 4 * 8
    assert ledger.num_taken == ledger.num_trained + ledger.num_filtered + ledger.num_returned + len(ledger.open)
