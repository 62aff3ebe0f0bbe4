"""However a run ends: a clear word, an exit code, no process left, nothing that was saved damaged."""

import os
import signal
import subprocess

import psutil
import pytest
from support.recorded_rollouts import write_rollouts
from support.training_runs import all_gone, find_below, running, train, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]


def test_ctrl_c_while_it_trains_ends_everything_and_keeps_what_was_saved(tmp_path):
    save = tmp_path / "ckpt"
    with running(tmp_path, colocate=True, num_rollout=1000, save=save, save_interval=1) as process:
        until(process, "rollout    2/1000")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 5
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    assert "Traceback" not in output
    assert all_gone(below)
    newest = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert newest >= 1
    assert not [path for path in save.iterdir() if path.name.startswith(".")]
    again = train(tmp_path, colocate=True, num_rollout=newest + 2, save=save, load=save, run_dir=tmp_path / "again")
    assert again.code == 0, again.output
    assert again.rows()[0]["rollout_id"] == newest + 1


def test_an_error_in_a_users_reward_shows_their_traceback_first(tmp_path):
    done = train(tmp_path, colocate=True, custom_rm_path="user_code.broken_reward")
    assert done.code == 1, done.output
    told = done.output[done.output.index("the run failed") :]
    assert "RewardWasWrong: cannot grade" in told
    assert told.index("user_code.py") < told.index("code: E-")
    assert "raise RewardWasWrong" in told


def test_a_killed_engine_ends_the_run_with_the_reason(tmp_path):
    with running(tmp_path, colocate=True, num_rollout=1000) as process:
        until(process, "rollout    1/1000")
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(find_below(process.pid, "launch_engine")[0].pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "engine-0" in output
    assert "SIGKILL" in output
    assert all_gone(below)


def test_a_killed_rank_ends_the_run_with_the_reason(tmp_path):
    recorded = write_rollouts(tmp_path / "recorded", rollouts=200)
    with running(
        tmp_path, debug_train_only=True, colocate=True, load_debug_rollout_data=recorded, num_rollout=200,
        actor_num_gpus_per_node=2,
    ) as process:  # fmt: skip
        until(process, "rollout   2/200")
        below = psutil.Process(process.pid).children(recursive=True)
        logs = {os.readlink(f"/proc/{p.pid}/fd/1"): p for p in below if p.is_running()}
        next(p for log, p in logs.items() if "/trainer-1." in log).kill()
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "trainer[1]" in output
    assert "SIGKILL" in output
    assert all_gone(below)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB. Needs root, or user namespaces; where neither is there, this fails."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_at_save_is_told_and_leaves_the_older_checkpoint_whole(tmp_path, small_disk):
    flags = {
        "debug_train_only": True, "colocate": True, "num_rollout": 8, "save": small_disk / "ckpt", "save_interval": 1,
        "load_debug_rollout_data": write_rollouts(tmp_path / "recorded", rollouts=9),
    }  # fmt: skip
    full = train(tmp_path, **flags)
    assert full.code == 1, full.output
    assert "disk" in full.output.lower(), full.output
    newest = int((small_disk / "ckpt" / "latest_checkpointed_iteration.txt").read_text())
    assert sorted(path.name for path in (small_disk / "ckpt").glob("iter_*")) == [
        f"iter_{number:07d}" for number in range(newest + 1)
    ]
    assert not [path for path in (small_disk / "ckpt").iterdir() if path.name.startswith(".")]
    elsewhere = tmp_path / "elsewhere"
    flags |= {"load": small_disk / "ckpt", "save": elsewhere, "num_rollout": newest + 2, "save_interval": None}
    again = train(tmp_path, run_dir=tmp_path / "again", **flags)
    assert again.code == 0, again.output
    assert [row["rollout_id"] for row in again.rows()] == [newest + 1]
