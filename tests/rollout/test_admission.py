"""What the machine of test_staleness.py cannot bring about: an update that is made again as the next version."""

from types import SimpleNamespace

from support.fully_async_world import Numbers

from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.tracked_source import TrackedDataSource


def begun():
    """A source that may give one version away, and a group that version 1 has made."""
    source = TrackedDataSource(Numbers(SimpleNamespace()))
    source.bound_staleness(1)
    source.weights_are(1)
    source.begin(0)
    groups = source.get_samples(1)
    for sample in flat(groups[0]):
        sample.weight_versions = ["1"]
    return source, groups


def test_another_number_of_the_same_weights_makes_nothing_older_that_was_judged_by_them():
    source, groups = begun()
    assert source.may_become(2)
    assert source.admit(0, groups) == []
    source.weights_are(3)  # engines died with 2, and the same weights were sent again
    source.select(groups)
    assert source.trained(0) == 1
    assert source.admission.version == 3


def test_what_was_not_judged_before_is_judged_by_the_last_number():
    source, groups = begun()
    assert source.may_become(2)
    source.weights_are(3)
    assert source.admit(0, groups) == groups


def test_without_a_rollout_under_way_a_version_counts_at_once_and_none_goes_back():
    source, _ = begun()
    for told, version in ((4, 4), (2, 4), (None, 4), (5, 5)):
        source.weights_are(told)
        assert source.admission.version == version
