"""The trainer's side of weight updates: buckets, several engines, engines that fail. Against scripted engines."""

import asyncio
import os
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import torch
from support.fake_engine import fake_engine
from support.procs import eventually

from miles.backends.base import ParallelState
from miles.backends.weight_update.broadcast_group import BROADCAST_S, JOIN_S, has_arrived, variables_set
from miles.backends.weight_update.broadcast_requests import _causes
from miles.backends.weight_update.buckets import ALIGNMENT, Bucket, copy_into
from miles.backends.weight_update.connections import Refused
from miles.backends.weight_update.engine_calls import Pending
from miles.backends.weight_update.failures import BadUpdate, EnginesMissedUpdate, GroupNotMade
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.sender import make_sender

WEIGHTS = {
    "embed": torch.arange(640, dtype=torch.float32).reshape(20, 32),
    "norm": torch.arange(32, dtype=torch.bfloat16),
    "odd": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "strided": torch.arange(64, dtype=torch.float32).reshape(8, 8).t(),
    "large": torch.randn(3000, generator=torch.Generator().manual_seed(0)),
    "last": torch.ones(5, dtype=torch.float16),
}
SOURCE = ParallelState(rank=0, world_size=2, dp_size=2)
OTHER = ParallelState(rank=1, world_size=2, dp_rank=1, dp_size=2)


def same(held, sent):
    return held.keys() == sent.keys() and all(torch.equal(held[name], sent[name]) for name in sent)


class Weights:
    """An iterator that knows how far it got."""

    def __init__(self, weights):
        self.left = list(weights.items())

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


async def engines_of(stack, count, *, has_stream=True, **options):
    fakes = [await stack.enter_async_context(fake_engine(api_key="key", **options)) for _ in range(count)]
    for fake in fakes:
        fake.session_open = True
    return fakes, tuple(
        EngineTarget(f"engine-{index}", fake.url, "key", 1, 1 + index, True, has_stream=has_stream)
        for index, fake in enumerate(fakes)
    )


async def send(sender, update, weights):
    """In a thread, as the trainer's main thread is not the engines'."""
    return await asyncio.to_thread(sender.send, update, weights)


WAYS = pytest.mark.parametrize(("method", "has_stream"), [("tensor", True), ("broadcast", True), ("broadcast", False)])


@WAYS
@pytest.mark.parametrize("bucket_bytes", [1, 100, 2600, 1 << 20])
async def test_every_engine_gets_every_weight_bit_for_bit(method, has_stream, bucket_bytes):
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 2, has_stream=has_stream)
        update = WeightUpdate(1, targets, method, bucket_bytes)
        sender = make_sender(SOURCE, update, torch.device("cpu"))
        seconds = await send(sender, update, Weights(WEIGHTS))
        for fake in fakes:
            assert same(fake.weights, WEIGHTS)
        assert seconds["total"] >= seconds["copy"] and all(value >= 0 for value in seconds.values())
        assert sender.num_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())
        assert sender.num_buckets == {1: 7, 1 << 20: 1 if has_stream else 2}.get(bucket_bytes, sender.num_buckets)
        sender.close()


async def test_an_engine_that_is_done_is_not_waited_for_once_more():
    async with AsyncExitStack() as stack:
        (fake,), targets = await engines_of(stack, 1)
        sender = make_sender(SOURCE, WeightUpdate(1, targets, "tensor", 100), torch.device("cpu"))
        fake.answers.clear()
        await send(sender, WeightUpdate(1, targets, "tensor", 100), Weights(WEIGHTS))
        assert same(fake.weights, WEIGHTS)
        changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
        again = asyncio.ensure_future(send(sender, WeightUpdate(2, targets, "tensor", 100), Weights(changed)))
        fake.answers.set()  # the next update waits for the answer to the last one
        await again
        assert same(fake.weights, changed) and fake.count("/update_weights_from_tensor") == 2
        sender.close()


def connections(fake):
    """Those of HTTP that are open."""
    return list(fake._runner.server.connections)


@pytest.mark.parametrize("method", ["tensor", "broadcast"])
async def test_an_update_finds_the_connections_of_the_last_one(method):
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 2)
        sender = make_sender(SOURCE, WeightUpdate(1, targets, method, 100), torch.device("cpu"))
        await send(sender, WeightUpdate(1, targets, method, 100), Weights(WEIGHTS))
        first = [connections(fake) for fake in fakes]
        for version in (2, 3):
            await send(sender, WeightUpdate(version, targets, method, 100, new_group=False), Weights(WEIGHTS))
        assert [connections(fake) for fake in fakes] == first and all(len(each) == 1 for each in first)
        sender.close()
        await eventually(lambda: not any(connections(fake) for fake in fakes))


async def test_an_update_that_failed_leaves_no_connection():
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 2)
        sender = make_sender(SOURCE, WeightUpdate(1, targets, "tensor", 100), torch.device("cpu"))
        await send(sender, WeightUpdate(1, targets, "tensor", 100), Weights(WEIGHTS))
        fakes[0].faults["/update_weights_from_tensor"] = [500]
        with pytest.raises(EnginesMissedUpdate):
            await send(sender, WeightUpdate(2, targets, "tensor", 100), Weights(WEIGHTS))
        await eventually(lambda: not any(connections(fake) for fake in fakes))
        await send(sender, WeightUpdate(3, targets, "tensor", 100), Weights(WEIGHTS))
        sender.close()


async def test_a_sender_that_is_closed_waits_for_no_answer():
    async with AsyncExitStack() as stack:
        (fake,), targets = await engines_of(stack, 1)
        sender = make_sender(SOURCE, WeightUpdate(1, targets, "tensor", 100), torch.device("cpu"))
        fake.answers.clear()
        stack.callback(fake.answers.set)
        await send(sender, WeightUpdate(1, targets, "tensor", 100), Weights(WEIGHTS))
        sender.close()


def weight_files():
    """Inodes of the memory files that this process holds."""
    links = {os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")}
    return {os.stat(link).st_ino for link in links if os.path.lexists(link) and "memfd:weights" in os.readlink(link)}


async def test_memory_is_kept_from_update_to_update_and_given_back_at_the_end():
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 1)
        sender = make_sender(SOURCE, WeightUpdate(1, targets, "tensor", 1 << 20), torch.device("cpu"))
        await send(sender, WeightUpdate(1, targets, "tensor", 1 << 20), Weights(WEIGHTS))
        held = weight_files()
        changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
        await send(sender, WeightUpdate(2, targets, "tensor", 1 << 20), Weights(changed))
        assert len(held) == 2
        assert weight_files() == held
        assert same(fakes[0].weights, changed)
        sender.close()
        assert weight_files() == set()


@WAYS
async def test_ranks_that_do_not_speak_to_engines_exhaust_the_iterator(method, has_stream):
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 1, has_stream=has_stream)
        update, weights = WeightUpdate(1, targets, method, 100), Weights(WEIGHTS)
        await send(make_sender(OTHER, update, torch.device("cpu")), update, weights)
        assert weights.left == [] and fakes[0].calls == []


@pytest.mark.parametrize(
    ("method", "fault"), [("tensor", 500), ("tensor", "reset"), ("broadcast", 500), ("broadcast", "die")]
)
async def test_an_engine_that_refuses_the_request_is_named_alone(method, fault):
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 2)
        fakes[1].faults["/update_weights_from_tensor"] = [fault]
        update, weights = WeightUpdate(4, targets, method, 100), Weights(WEIGHTS)
        with pytest.raises(EnginesMissedUpdate, match="engine-1 failed while taking weight version 4") as caught:
            await send(make_sender(SOURCE, update, torch.device("cpu")), update, weights)
        assert caught.value.fields["engines"] == ["engine-1"] and weights.left == []
        assert method == "broadcast" or same(fakes[0].weights, WEIGHTS)
        assert [fake.count("/update_weights_from_tensor") for fake in fakes] == [1, 1], "spoken to again"


async def test_an_engine_that_refuses_a_broadcast_ends_it_at_once_and_the_next_one_begins_anew():
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 1, has_stream=False)
        update = WeightUpdate(4, targets, "broadcast", 100)
        sender = make_sender(SOURCE, update, torch.device("cpu"))
        fakes[0].faults["/update_weights_from_distributed"] = [500]
        weights = Weights(WEIGHTS)
        async with asyncio.timeout(BROADCAST_S / 60):
            with pytest.raises(EnginesMissedUpdate, match="engine-0"):
                await send(sender, update, weights)
        assert weights.left == []
        again = WeightUpdate(5, targets, "broadcast", 100, new_group=False)
        await send(sender, again, Weights(WEIGHTS))
        assert same(fakes[0].weights, WEIGHTS)
        sender.close()


@pytest.mark.parametrize("fault", [500, "reset", "die"])
@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_broadcast_that_one_of_several_engines_does_not_take_leaves_nobody_waiting(fault, which):
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 3, has_stream=False)
        update = WeightUpdate(4, targets, "broadcast", 100)
        sender = make_sender(SOURCE, update, torch.device("cpu"))
        stack.callback(sender.close)
        fakes[which].faults["/update_weights_from_distributed"] = [fault]
        weights = Weights(WEIGHTS | {"huge": torch.zeros(8 << 20)})
        async with asyncio.timeout(JOIN_S / 4):
            with pytest.raises(EnginesMissedUpdate) as caught:
                await send(sender, update, weights)
        assert f"engine-{which}" in caught.value.fields["engines"] and weights.left == []
        assert all(not fake.groups for fake in fakes if not fake.dead)
        rest = tuple(target for target, fake in zip(targets, fakes, strict=True) if not fake.dead)
        placed = tuple(replace(target, rank_offset=1 + index) for index, target in enumerate(rest))
        await send(sender, WeightUpdate(5, placed, "broadcast", 100), Weights(WEIGHTS))
        for fake in fakes:
            assert fake.dead or same({name: fake.weights[name] for name in WEIGHTS}, WEIGHTS)


async def test_a_group_that_an_engine_does_not_join_is_not_made():
    async with AsyncExitStack() as stack:
        fakes, targets = await engines_of(stack, 1, has_stream=False)
        fakes[0].faults["/init_weights_update_group"] = [500]
        update, weights = WeightUpdate(1, targets, "broadcast", 100), Weights(WEIGHTS)
        sender = make_sender(SOURCE, update, torch.device("cpu"))
        with pytest.raises(GroupNotMade, match="engine-0") as caught:
            await send(sender, update, weights)
        assert "scripted 500" in caught.value.evidence and weights.left == []


async def test_an_update_without_engines_or_room_is_refused():
    sender = make_sender(SOURCE, WeightUpdate(1, (), "tensor", 100), torch.device("cpu"))
    with pytest.raises(BadUpdate, match="no engine"):
        await send(sender, WeightUpdate(1, (), "tensor", 100), Weights(WEIGHTS))


def test_a_bucket_takes_what_fits_and_one_tensor_that_is_larger():
    bucket = Bucket(100)
    assert bucket.takes(torch.zeros(1000))
    bucket.add("first", torch.zeros(3, dtype=torch.uint8))
    assert bucket.takes(torch.zeros(21)) and not bucket.takes(torch.zeros(22))
    assert bucket.add("second", torch.zeros(21)).start == ALIGNMENT
    assert not bucket.takes(torch.zeros(1))


def test_without_gaps_a_tensor_that_would_lie_askew_begins_another_bucket():
    bucket = Bucket(100, 1)
    bucket.add("first", torch.zeros(3, dtype=torch.uint8))
    assert bucket.takes(torch.zeros(5, dtype=torch.uint8)) and not bucket.takes(torch.zeros(1))
    assert bucket.add("second", torch.zeros(1, dtype=torch.uint8)).start == 3
    assert bucket.takes(torch.zeros(1))


def test_what_is_copied_into_a_bucket_is_found_at_its_place():
    memory, bucket = torch.full((4096,), 255, dtype=torch.uint8), Bucket(4096)
    for name in ("norm", "odd", "scalar", "strided"):
        copy_into(memory, bucket.add(name, WEIGHTS[name]), WEIGHTS[name])
    for entry in bucket.entries:
        raw = memory[entry.start : entry.start + entry.num_bytes].view(entry.dtype).reshape(entry.shape)
        assert torch.equal(raw, WEIGHTS[entry.name])
        assert getattr(torch, entry.dtype_name) is entry.dtype


class Work:
    """As NCCL's: completed when it has failed, and says so only to those who wait."""

    def __init__(self, error):
        self._error = error

    def is_completed(self):
        return True

    def is_success(self):
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self):
        if self._error is not None:
            raise self._error
        return True


@pytest.mark.parametrize(
    ("error", "went_well"), [(None, True), (torch.distributed.DistBackendError("remote process exited"), False)]
)
def test_whether_a_broadcast_went_well_is_told_by_waiting_for_it(error, went_well):
    assert has_arrived(Work(error)) is went_well


def test_variables_that_are_set_while_a_group_is_made_are_as_before_afterwards():
    os.environ["MILES_TEST_HELD"] = "before"
    try:
        with variables_set({"MILES_TEST_HELD": "now", "MILES_TEST_NEW": "now"}):
            assert os.environ["MILES_TEST_HELD"] == os.environ["MILES_TEST_NEW"] == "now"
        assert os.environ["MILES_TEST_HELD"] == "before" and "MILES_TEST_NEW" not in os.environ
    finally:
        del os.environ["MILES_TEST_HELD"]


class Heard(Future):
    """A request that has failed, which is heard of when it is asked for the third time."""

    def __init__(self, error, asked=2):
        super().__init__()
        self.set_exception(error)
        self._left = asked

    def done(self):
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(
    ("late", "causes"), [(ConnectionResetError("gone"), ["engine-0"]), (Refused("cut off, too"), ["engine-1"])]
)
def test_whoever_was_cut_off_by_an_engine_that_ended_is_no_cause(late, causes):
    """Also if it is heard first."""
    requests = Pending({"engine-0": Heard(late), "engine-1": Heard(Refused("cut off"), 0)})
    assert requests.has_failed and _causes(requests) == causes
