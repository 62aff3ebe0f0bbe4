"""However a run ends: a clear word, an exit code, no process left. What was saved: ``test_endings_and_saves.py``."""

import os
import signal

import psutil
import pytest
from support.recorded_rollouts import write_rollouts
from support.training_runs import all_gone, find_below, running, train, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


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
        output, _ = process.communicate(timeout=200)
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
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "trainer[1]" in output
    assert "SIGKILL" in output
    assert all_gone(below)
