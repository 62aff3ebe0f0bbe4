"""A directory is replaced such that a crash at any point leaves the old or the new one under its name."""

import itertools
import os
import threading

import pytest

from miles.backends.checkpoint_layout import TRACKER, DamagedCheckpoint, find_checkpoint
from miles.backends.fsdp_utils.checkpoint import is_checkpoint
from miles.backends.training_utils.checkpoints import _begin, _publish
from miles.utils.replace_directory import exchange, put_back, put_in_place, recover, recover_all
from miles.utils.rollout_state import is_published


class Crash(BaseException):
    """In place of the end of the process."""


def made(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def text_of(path):
    return (path / "file").read_text()


def cannot(one, other):
    """As a network file system."""
    return False


@pytest.mark.parametrize("swap", [exchange, cannot])
def test_the_new_one_has_the_name_and_the_old_one_can_come_back(tmp_path, swap):
    final, aside = tmp_path / "iter_1", tmp_path / ".iter_1.tmp"
    assert put_in_place(made(aside, "first"), final, swap=swap) is None
    previous = put_in_place(made(aside, "second"), final, swap=swap)
    assert (text_of(final), text_of(previous), aside.exists()) == ("second", "first", False)
    put_back(final, previous, aside, swap=swap)
    assert (text_of(final), text_of(aside), previous.exists()) == ("first", "second", False)
    previous = put_in_place(aside, final, swap=swap)
    assert text_of(final) == "second"
    recover_all(tmp_path, "iter_*", clean_up=True)
    assert os.listdir(tmp_path) == ["iter_1"]


def test_without_an_earlier_one_the_name_is_free_again(tmp_path):
    final, aside = tmp_path / "iter_1", tmp_path / ".iter_1.tmp"
    put_back(final, put_in_place(made(aside, "first"), final), aside)
    assert os.listdir(tmp_path) == [".iter_1.tmp"]


def test_the_name_is_never_free_where_names_can_be_exchanged(tmp_path):
    final, aside = made(tmp_path / "iter_1", "0"), tmp_path / ".iter_1.tmp"
    made(aside, "probe")
    assert exchange(aside, final), "the file system of the tests can do it"
    done, missing = threading.Event(), []

    def look():
        while not done.is_set():
            if not final.exists():
                missing.append(True)

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(100):
        if not aside.exists():
            made(aside, str(number))
        put_in_place(aside, final)
    done.set()
    looking.join()
    assert not missing


@pytest.mark.parametrize("after", [1, 2])
def test_a_crash_between_the_two_renames_is_mended(tmp_path, after):
    """After the first rename nothing has the name; after the second the new one has it."""
    final, aside = made(tmp_path / "iter_1", "old"), made(tmp_path / ".iter_1.tmp", "new")
    count = itertools.count(1)

    class Path(type(final)):
        def rename(self, target):
            super().rename(target)
            if next(count) == after:
                raise Crash

        def with_name(self, name):
            return Path(super().with_name(name))

    with pytest.raises(Crash):
        put_in_place(Path(aside), Path(final), swap=cannot)
    assert final.exists() == (after == 2)
    recover(final)
    assert text_of(final) == ("old" if after == 1 else "new")


def test_a_failure_of_the_second_rename_changes_nothing(tmp_path):
    final = made(tmp_path / "iter_1", "old")
    with pytest.raises(OSError):
        put_in_place(tmp_path / "absent", final, swap=cannot)
    assert text_of(final) == "old"


def crashed(root):
    """Checkpoint 3 was being saved again, on a file system that cannot exchange names."""
    old = made(root / ".iter_0000003.old", "old")
    (old / "meta.json").write_text("{}")
    (old / "model").mkdir()
    made(root / ".iter_0000003.tmp", "half")
    (root / TRACKER).write_text("3")


@pytest.mark.parametrize("step", [None, 3])
def test_a_checkpoint_that_lost_its_name_in_a_crash_is_found(tmp_path, step):
    crashed(tmp_path)
    found = find_checkpoint(tmp_path, step)
    assert found is not None
    assert found.rollout_id == 3
    assert text_of(found.directory) == "old"


def test_the_fsdp_backend_finds_it_too(tmp_path):
    crashed(tmp_path)
    assert is_checkpoint(tmp_path)


def test_the_next_save_puts_it_back_first(tmp_path):
    crashed(tmp_path)
    _begin(tmp_path, tmp_path / ".iter_0000004.tmp")
    assert text_of(tmp_path / "iter_0000003") == "old"


def test_nothing_is_found_where_nothing_can_be_put_back(tmp_path):
    (tmp_path / TRACKER).write_text("3")
    with pytest.raises(DamagedCheckpoint):
        find_checkpoint(tmp_path)


def test_a_tracker_that_cannot_be_written_leaves_the_earlier_checkpoint_of_the_same_name(tmp_path):
    final, aside = made(tmp_path / "iter_0000003", "old"), made(tmp_path / ".iter_0000003.tmp", "new")
    (tmp_path / f".{TRACKER}.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        _publish(tmp_path, aside, final, 3)
    assert text_of(final) == "old"
    (tmp_path / f".{TRACKER}.tmp").rmdir()
    _publish(tmp_path, aside, final, 3)
    assert text_of(final) == "new"
    assert sorted(os.listdir(tmp_path)) == ["iter_0000003", TRACKER]


def test_a_checkpoint_names_the_rollout_state_that_was_saved_for_it(tmp_path):
    pending = made(tmp_path / "rollout", "x") / ".pending_3"
    pending.mkdir()
    (pending / "token").write_text("of this state")
    for rollout_id, wanted in ((3, True), (4, False)):
        final, aside = tmp_path / f"iter_000000{rollout_id}", made(tmp_path / f".iter_000000{rollout_id}.tmp", "new")
        _publish(tmp_path, aside, final, rollout_id)
        assert is_published(tmp_path, rollout_id) == wanted
        assert (final / "rollout_state").exists() == wanted
