"""What a broadcast carries: small tensors packed, large ones from where they lie to where they go."""

import pytest
import torch

from miles.backends.sglang_utils.replay_copies import views
from miles.backends.weight_update.broadcast_bucket import (
    ALONE_BYTES,
    BroadcastBucket,
    Cut,
    incoming_parts,
    spans_alone,
)
from miles.backends.weight_update.broadcast_group import BroadcastGroup
from miles.backends.weight_update.bucket_copies import BucketCopies

CPU = torch.device("cpu")
TENSORS = {
    "norm": torch.arange(7, dtype=torch.bfloat16),
    "large": torch.arange(600, dtype=torch.float32).reshape(20, 30),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "strided": torch.arange(600, dtype=torch.float32).reshape(20, 30).t(),
    "larger": torch.arange(3001, dtype=torch.int16),
    "last": torch.arange(9, dtype=torch.uint8),
}


def bucket_of(tensors, capacity=8 * 2000, pieces=1):
    bucket = BroadcastBucket(capacity, CPU, pieces)
    for name, tensor in tensors.items():
        bucket.add(name, tensor)
    return bucket.laid_out()


def spans_of(outgoing):
    return spans_alone(outgoing.entries, outgoing.packed, outgoing.cut)


def sent(outgoing):
    memory = torch.zeros(outgoing.packed, dtype=torch.uint8)
    return [part.clone() for part in outgoing.parts(memory, BucketCopies(together=False))]


@pytest.mark.parametrize("names", [list(TENSORS), ["large"], ["norm", "strided"], ["empty"]])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_what_is_sent_is_found_at_its_place(names, pieces):
    outgoing = bucket_of({name: TENSORS[name] for name in names}, 8 * 800, pieces)
    assert [entry.name for entry in outgoing.entries] == names, "load_weights is given them in their order"
    memory = torch.full((outgoing.num_bytes,), 0xA5, dtype=torch.uint8)
    targets = incoming_parts(outgoing.packed, spans_of(outgoing), memory, {})
    for target, part in zip(targets, sent(outgoing), strict=True):
        target.copy_(part)
    found = dict(views(outgoing.entries, memory))
    assert all(torch.equal(found[name], TENSORS[name]) for name in names)


def test_large_ones_are_sent_from_where_they_lie_and_may_be_received_elsewhere():
    outgoing = bucket_of(TENSORS)
    large, larger = TENSORS["large"], TENSORS["larger"]
    assert [size for _, size in spans_of(outgoing)] == [large.nbytes, larger.nbytes]
    memory = torch.zeros(outgoing.packed, dtype=torch.uint8)
    packed, *parts = outgoing.parts(memory, BucketCopies(together=False))
    assert packed.data_ptr() == memory.data_ptr()
    assert [part.data_ptr() for part in parts] == [large.data_ptr(), larger.data_ptr()]
    place = torch.zeros(larger.nbytes, dtype=torch.uint8)
    memory = torch.zeros(outgoing.num_bytes - larger.nbytes, dtype=torch.uint8)
    targets = incoming_parts(outgoing.packed, spans_of(outgoing), memory, {1: place})
    assert targets[-1] is place and [len(target) for target in targets] == [len(part) for part in (packed, *parts)]


def test_what_is_large_enough_for_each_piece_travels_in_pieces():
    """Those begin where a tensor of any dtype may."""
    assert Cut(2, 800).sizes(800) == [400, 400] and Cut(2, 800).sizes(784) == [784]
    assert Cut(2, 800).sizes(816) == [816], "half of it is no multiple of 16"
    outgoing = bucket_of({"cut": torch.zeros(8, 100), "whole": torch.zeros(7, 100)}, 8 * 1600, 2)
    assert spans_of(outgoing) == [(0, 1600), (1600, 1600), (3200, 2800)]
    assert [len(part) for part in sent(outgoing)] == [1600, 1600, 2800]


@pytest.mark.parametrize(("capacity", "goes_alone"), [(1 << 30, ALONE_BYTES), (8000, 1000), (4, 1)])
def test_how_large_a_tensor_has_to_be(capacity, goes_alone):
    for size in (goes_alone - 1, goes_alone):
        outgoing = bucket_of({"w": torch.zeros(size, dtype=torch.uint8)}, capacity)
        assert bool(outgoing.large) is (size == goes_alone)


def test_a_bucket_takes_what_fits_and_one_tensor_that_is_larger():
    bucket = BroadcastBucket(100, CPU)
    assert not bucket and bucket.takes(torch.zeros(1000))
    bucket.add("first", torch.zeros(3, dtype=torch.uint8))
    assert bucket and bucket.takes(torch.zeros(84, dtype=torch.uint8))
    assert not bucket.takes(torch.zeros(85, dtype=torch.uint8)), "the second begins at 16"


class Work:
    def __init__(self, *, is_over, fails=False):
        self._is_over, self._fails = is_over, fails

    def is_completed(self):
        return self._is_over

    def wait(self):
        if self._fails:
            raise RuntimeError("it was cut off")


class Backend:
    """Of a group that knows no way to send several as one."""

    supports_coalescing = False

    def __init__(self, works):
        self._works = iter(works)

    def broadcast(self, tensors, options):
        assert len(tensors) == 1 and options.rootRank == 0
        return next(self._works)

    def name(self):
        return "gloo"


@pytest.mark.parametrize(
    ("works", "is_over", "fails"),
    [
        ([Work(is_over=True), Work(is_over=True)], True, False),
        ([Work(is_over=True), Work(is_over=False)], False, False),
        ([Work(is_over=True), Work(is_over=True, fails=True)], True, True),
        ([], True, False),
    ],
)
def test_several_broadcasts_are_over_and_fail_as_one(works, is_over, fails):
    group = BroadcastGroup("several", Backend(works), None)
    work = group.broadcast([torch.zeros(4)] * len(works))
    assert work.is_completed() is is_over
    if fails:
        with pytest.raises(RuntimeError, match="cut off"):
            work.wait()
    else:
        work.wait()
    group.close()


class Together(Backend):
    """Of a group that sends several as one."""

    supports_coalescing = True


def test_what_cannot_be_sent_as_one_is_refused_before_anything_is_sent():
    """What is begun with NCCL has to be ended, and the other side would wait for the rest."""
    group = BroadcastGroup("together", Together([]), None)
    with pytest.raises(ValueError, match="in one piece each, on one device"):
        group.broadcast([torch.zeros(4), torch.zeros(4, 4).t()])
    group.close()
