"""The journal of train batches: what was written is read, or told to be damaged; what is covered goes."""

import os

import numpy as np
import pytest
from support.rollout_cases import make_args

from miles.rollout.batch_journal import Batch, BatchJournal, DamagedBatch
from miles.rollout.messages import RolloutBatchRefs
from miles.rollout.saved_state import CannotSave, NotSavable
from miles.utils.train_data import split_train_data


def batch(rollout_id, count=4):
    """A rollout of some samples for two ranks."""
    rng = np.random.default_rng(rollout_id)
    lengths = rng.integers(1, 9, count).tolist()
    data = {
        "tokens": [rng.integers(0, 256, length + 3).tolist() for length in lengths],
        "response_lengths": lengths,
        "loss_masks": [[1] * length for length in lengths],
        "rewards": rng.random(count).tolist(),
        "rollout_log_probs": [(-rng.random(length)).tolist() for length in lengths],
        "weight_versions": [["1"]] * count,
        "rollout_routed_experts": [rng.integers(0, 9, (length + 2, 2, 300))[:, :, ::2] for length in lengths],
    }
    parts = split_train_data(make_args(dp_size=2, global_batch_size=4), data)
    return Batch(RolloutBatchRefs([], {"rollout/raw_reward": float(rollout_id)}, count), parts)


def same(ours, theirs):
    """Whether two values are equal, with the types of arrays."""
    if isinstance(ours, np.ndarray):
        return isinstance(theirs, np.ndarray) and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_a_batch_is_read_as_it_was_written(tmp_path):
    journal = BatchJournal(tmp_path / "batches")
    for rollout_id in (3, 12, 4):
        journal.write(rollout_id, batch(rollout_id))
    assert journal.rollouts() == [3, 4, 12]
    for rollout_id in journal.rollouts():
        found, wrote = journal.read(rollout_id), batch(rollout_id)
        assert found.answer == wrote.answer
        assert len(found.parts) == 2
        assert same(wrote.parts, found.parts)


def test_what_a_checkpoint_has_is_forgotten_and_so_is_what_never_counted(tmp_path):
    journal = BatchJournal(tmp_path)
    for rollout_id in range(6):
        journal.write(rollout_id, batch(rollout_id))
    size = journal.num_bytes()
    journal.remove_through(1)
    journal.remove_after(4)
    assert journal.rollouts() == [2, 3, 4]
    assert 0 < journal.num_bytes() < size
    journal.remove_through(4)
    assert (journal.rollouts(), journal.num_bytes()) == ([], 0)


def test_a_write_that_fails_leaves_nothing_and_what_was_there_before(tmp_path):
    journal = BatchJournal(tmp_path)
    journal.write(1, batch(1))
    with pytest.raises(NotSavable) as raised:
        journal.write(1, Batch(batch(1).answer, [{"objects": {"mine": [object()]}}]))
    assert "mine" in raised.value.evidence
    assert [path.name for path in tmp_path.iterdir()] == ["batch_0000001.msgpack"]
    assert same(journal.read(1).parts, batch(1).parts)
    (tmp_path / "file").touch()
    with pytest.raises(CannotSave):
        BatchJournal(tmp_path / "file").write(0, batch(0))


@pytest.mark.parametrize("keep", [0, 1, 20, 40, 400, -1])
def test_a_file_that_was_cut_is_told(tmp_path, keep):
    journal = BatchJournal(tmp_path)
    journal.write(1, batch(1))
    [path] = tmp_path.iterdir()
    os.truncate(path, keep % path.stat().st_size)
    with pytest.raises(DamagedBatch) as raised:
        journal.read(1)
    assert str(path) in raised.value.what
    with pytest.raises(DamagedBatch):
        journal.read(2)
