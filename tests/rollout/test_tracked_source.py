"""The accounted data source: what moves while its user's code runs."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.rollout_cases import make_args, sums

from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.hooks import HookFailed
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.misc import function_registry


def numbers(groups):
    return [group[0].group_index for group in groups]


def test_what_comes_back_while_a_filter_looks_at_the_buffer_is_not_lost(tmp_path):
    """Who gives a group back does not wait for a filter either: it may be the loop that the filter waits for."""
    looking, go_on = threading.Event(), threading.Event()

    def slow(args, rollout_id, buffer, num_samples):
        taken, left = buffer[:num_samples], buffer[num_samples:]
        looking.set()
        assert go_on.wait(30)
        buffer[:] = left
        return taken

    with function_registry.temporary("tests.slow_filter", slow):
        args = make_args(prompt_data=sums(tmp_path / "p.jsonl"), buffer_filter_path="tests.slow_filter")
        source = TrackedDataSource(RolloutDataSourceWithBuffer(args))
        groups = source.get_samples(4)
        source.give_back(groups[:2], "stale")
        with ThreadPoolExecutor(2) as threads:
            taking = threads.submit(source.get_samples, 1)
            assert looking.wait(30)
            source.give_back(groups[2:], "stale")
            assert source.get_buffer_length() >= 2
            assert {group[0].group_index for group in source.checkpoint()[1]} >= {2, 3}
            other = threads.submit(source.get_samples, 2)  # waits for its turn
            go_on.set()
            assert numbers(taking.result(30)) == [0]
            taken = {0, *numbers(other.result(30))}
    left = numbers(source.inner.buffer)
    assert len(left) == 1 and taken | set(left) == {0, 1, 2, 3} and source.ledger.returned


def test_a_data_source_gets_one_call_at_a_time_and_may_call_back(tmp_path):
    class Own(RolloutDataSourceWithBuffer):
        inside, most = 0, 0

        def _alone(self, call, *args):
            self.inside += 1
            self.most = max(self.most, self.inside)
            found = call(*args)
            for _ in range(100):
                os.sched_yield()  # others may come in here, if they may at all
            self.inside -= 1
            return found

        def get_samples(self, num_samples):
            tracked.add_samples([])
            assert tracked.get_buffer_length() >= 0
            return self._alone(super().get_samples, num_samples)

        def add_samples(self, samples):
            self._alone(super().add_samples, samples)

    tracked = TrackedDataSource(Own(make_args(prompt_data=sums(tmp_path / "p.jsonl"))))

    def work(_):
        for _ in range(10):
            tracked.give_back(tracked.get_samples(2), "stale")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert tracked.inner.most == 1
    assert {group[0].group_index for group in tracked.inner.buffer} == tracked.ledger.returned
    assert not tracked.ledger.open


def test_what_is_given_back_while_a_state_is_saved_waits_for_nobody(tmp_path):
    """The data source's own ``save`` may need the loop that gives groups back."""
    saving, given = threading.Event(), threading.Event()
    source = TrackedDataSource(RolloutDataSourceWithBuffer(make_args(prompt_data=sums(tmp_path / "p.jsonl"))))
    groups = source.get_samples(3)

    def save():
        saving.set()
        assert given.wait(30)

    with ThreadPoolExecutor(2) as threads:
        cut = threads.submit(source.cut, save, source.snapshot)
        assert saving.wait(30)
        source.give_back(groups[:2], "stale")
        taking = threads.submit(source.get_samples, 1)  # this one waits
        assert source.inner.buffer == []
        given.set()
        plain, kept = cut.result(30)
        taking.result(30)
    assert plain["ledger"]["returned"]
    assert numbers(kept) == [0, 1, 2]
    assert len(source.inner.buffer) + len(source.ledger.open) == 3


def test_samples_of_a_prompt_that_are_selected_as_several_groups_are_all_kept(tmp_path):
    source = TrackedDataSource(RolloutDataSourceWithBuffer(make_args(prompt_data=sums(tmp_path / "p.jsonl"))))
    [group] = source.get_samples(1)
    assert len(group) == 2
    source.select([group[:1], group[1:]])
    assert [len(kept) for kept in source.snapshot()[1]] == [2]


@pytest.mark.parametrize("breaks", ["get_samples", "add_samples"])
def test_what_was_given_back_is_still_there_when_the_data_source_breaks(tmp_path, breaks):
    class Own(RolloutDataSourceWithBuffer):
        is_broken = False

        def get_samples(self, num_samples):
            if self.is_broken:
                raise RuntimeError("the disk is gone")
            return super().get_samples(num_samples)

        def add_samples(self, samples):
            if self.is_broken and breaks == "add_samples":
                raise RuntimeError("the disk is gone")
            raise NotImplementedError

    source = TrackedDataSource(Own(make_args(prompt_data=sums(tmp_path / "p.jsonl"))))
    groups = source.get_samples(2)
    if breaks == "get_samples":
        source.give_back(groups, "stale")
        source.inner.is_broken = True
        with pytest.raises(HookFailed):
            source.get_samples(4)
    else:
        source.inner.is_broken = True
        with pytest.raises(HookFailed):
            source.give_back(groups, "stale")
    assert numbers(source.overflow) == numbers(groups)
    assert set(source.ledger.returned) == set(numbers(groups))
