"""Fully asynchronous: whatever versions made the tokens of the groups that come, none older than the bound is trained
on, and each group ends exactly once."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.fully_async_rollout import FullyAsyncRolloutFn, staleness
from miles.utils.types import Sample

VERSION = 9


def made(index, spans):
    """A sample as the engine reports it: spans of tokens by the version that made them, the last one by itself."""
    sample = Sample(index=index)
    reported = [{"version": str(version), "start": 0, "end": 1} for version in spans]
    meta = {"finish_reason": {"type": "stop"}, "weight_version": str(spans[-1])}
    sample.update_from_meta_info(SimpleNamespace(), meta | ({"weight_versions": reported} if len(spans) > 1 else {}))
    return sample


class Groups:
    """In place of the producer: gives what is finished, and is told what is not used."""

    def __init__(self, groups):
        self.groups, self.given, self.refused = iter(groups), [], []
        self.counts = Counter()

    async def get(self, count):
        assert count == 1
        self.given.append(next(self.groups))
        return self.given[-1:]

    def unused(self, group, why):
        assert why == "stale"
        self.refused.append(group)


SPANS = st.lists(st.integers(1, VERSION), min_size=1, max_size=3).map(sorted)
GROUPS = st.lists(st.lists(SPANS, min_size=1, max_size=3), max_size=12)


@given(GROUPS, st.integers(0, 4), st.integers(1, 4))
@settings(deadline=None)
def test_no_token_that_is_trained_on_is_older_than_the_bound(spans, bound, target):
    fresh = [[[VERSION]]] * target  # so that every rollout ends
    groups = [[made(i, s) for i, s in enumerate(group)] for group in spans + fresh]
    function = object.__new__(FullyAsyncRolloutFn)
    function.args = SimpleNamespace(rollout_batch_size=target, max_weight_staleness=bound)
    function.state = SimpleNamespace(progress=SimpleNamespace(finished=0))
    function.producer = Groups(groups)
    trained = asyncio.run(function._collect(VERSION))
    oldest = {id(group): min(min(s) for s in of) for group, of in zip(groups, spans + fresh, strict=True)}
    assert len(trained) == target
    assert all(VERSION - oldest[id(group)] <= bound for group in trained)
    assert all(VERSION - oldest[id(group)] > bound for group in function.producer.refused)
    ended = [id(group) for group in (*trained, *function.producer.refused)]
    assert sorted(ended) == sorted(map(id, function.producer.given))


@pytest.mark.parametrize(
    ("spans", "versions", "age"),
    [([9], ["9"], 0), ([7, 9], ["7", "9"], 2), ([6, 7, 8], ["6", "7", "8"], 3)],
)
def test_an_answer_is_as_old_as_its_first_token(spans, versions, age):
    sample = made(0, spans)
    assert sample.weight_versions == versions
    assert staleness([sample], VERSION) == age
