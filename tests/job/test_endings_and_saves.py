"""However a run ends, nothing that was saved is damaged, and a run goes on from it."""

import signal
import subprocess

import psutil
import pytest
from support.recorded_rollouts import write_rollouts
from support.training_runs import all_gone, running, train, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def test_ctrl_c_while_it_trains_ends_everything_and_keeps_what_was_saved(tmp_path):
    save = tmp_path / "ckpt"
    with running(tmp_path, colocate=True, num_rollout=1000, save=save, save_interval=1) as process:
        until(process, "rollout    2/1000")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 5
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "interrupted" in output
    assert "Traceback" not in output
    assert all_gone(below)
    newest = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert newest >= 1
    assert not [path for path in save.iterdir() if path.name.startswith(".")]
    # Without engines: all that is asked is whether the trainer takes what is there.
    recorded = write_rollouts(tmp_path / "recorded", rollouts=newest + 2)
    again = train(
        tmp_path, colocate=True, num_rollout=newest + 2, save=save, load=save, run_dir=tmp_path / "again",
        debug_train_only=True, load_debug_rollout_data=recorded,
    )  # fmt: skip
    assert again.code == 0, again.output
    assert again.rows()[0]["rollout_id"] == newest + 1


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
