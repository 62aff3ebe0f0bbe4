"""What a broadcast carries: small tensors packed, large ones from where they lie to where they go."""

import pytest
import torch

from miles.backends.sglang_utils.replay_copies import views
from miles.backends.weight_update.broadcast_bucket import ALONE_BYTES, BroadcastBucket, alone, incoming_parts
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


def bucket_of(tensors, capacity=8 * 2000):
    bucket = BroadcastBucket(capacity, CPU)
    for name, tensor in tensors.items():
        bucket.add(name, tensor)
    return bucket.laid_out()


def sent(outgoing):
    memory = torch.zeros(outgoing.packed, dtype=torch.uint8)
    return [part.clone() for part in outgoing.parts(memory, BucketCopies(together=False))]


@pytest.mark.parametrize("names", [list(TENSORS), ["large"], ["norm", "strided"], ["empty"]])
def test_what_is_sent_is_found_at_its_place(names):
    outgoing = bucket_of({name: TENSORS[name] for name in names})
    assert [entry.name for entry in outgoing.entries] == names, "load_weights is given them in their order"
    memory = torch.full((outgoing.num_bytes,), 0xA5, dtype=torch.uint8)
    for target, part in zip(incoming_parts(outgoing.entries, outgoing.packed, memory, {}), sent(outgoing), strict=True):
        target.copy_(part)
    found = dict(views(outgoing.entries, memory))
    assert all(torch.equal(found[name], TENSORS[name]) for name in names)


def test_large_ones_are_sent_from_where_they_lie_and_may_be_received_elsewhere():
    outgoing = bucket_of(TENSORS)
    apart = [outgoing.entries[index].name for index in alone(outgoing.entries, outgoing.packed)]
    assert apart == ["large", "larger"]
    memory = torch.zeros(outgoing.packed, dtype=torch.uint8)
    packed, *parts = outgoing.parts(memory, BucketCopies(together=False))
    assert packed.data_ptr() == memory.data_ptr()
    assert [part.data_ptr() for part in parts] == [TENSORS[name].data_ptr() for name in apart]
    place = torch.zeros(TENSORS["larger"].nbytes, dtype=torch.uint8)
    memory = torch.zeros(outgoing.num_bytes - TENSORS["larger"].nbytes, dtype=torch.uint8)
    targets = incoming_parts(outgoing.entries, outgoing.packed, memory, {5: place})
    assert targets[-1] is place and [len(target) for target in targets] == [len(part) for part in (packed, *parts)]


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
