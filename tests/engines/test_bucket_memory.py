"""Buckets' memory: what lies where, who may open it, and what needs a GPU."""

import pytest
import torch

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.fleet_update import settings
from miles.backends.sglang_utils.replay_copies import views
from miles.backends.sglang_utils.server_arguments import takes_stream
from miles.backends.sglang_utils.shared_sources import SharedSources
from miles.backends.weight_update.broadcast_requests import BroadcastRequestSender
from miles.backends.weight_update.broadcast_stream import BroadcastStreamSender
from miles.backends.weight_update.bucket_copies import COPIED_ALONE_BYTES, BucketCopies
from miles.backends.weight_update.bucket_memory import DeviceMemory, MemoryFile
from miles.backends.weight_update.buckets import Bucket, Entry
from miles.backends.weight_update.cuda_ipc import CudaIpcSender
from miles.backends.weight_update.cuda_memory import Allocated, CudaMemoryError, Opened, export
from miles.backends.weight_update.failures import BadUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.own_memory import OwnBuckets, OwnMemory, entry_of
from miles.backends.weight_update.sender import kind_of, make_sender
from miles.backends.weight_update.stream_sender import SharedStreamSender, _Filling, _Own

TENSORS = {
    "norm": torch.arange(32, dtype=torch.bfloat16),
    "odd": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "strided": torch.arange(64, dtype=torch.float32).reshape(8, 8).t(),
}


@pytest.mark.parametrize("together", [True, False])
def test_copies_are_found_at_their_places_also_after_a_message(together):
    memory, bucket, copies = torch.full((4096,), 255, dtype=torch.uint8), Bucket(4096), BucketCopies(together=together)
    for name, tensor in TENSORS.items():
        copies.add(memory, bucket.add(name, tensor), tensor)
    copies.flush()
    for entry in bucket.entries:
        there = Entry.of_plain(list(entry.as_plain()))
        assert there == entry and torch.equal(views([there], memory)[0][1], TENSORS[entry.name])


@pytest.mark.parametrize("beside_broadcast", [False, True])
def test_a_large_tensor_is_on_its_way_at_once_and_small_ones_wait_for_each_other(beside_broadcast):
    """Beside a broadcast all of them wait."""
    large, small = torch.full((COPIED_ALONE_BYTES,), 1, dtype=torch.uint8), torch.full((16,), 2, dtype=torch.uint8)
    memory, bucket = torch.zeros(COPIED_ALONE_BYTES + 16, dtype=torch.uint8), Bucket(1 << 30, 16)
    copies = BucketCopies(together=True, beside_broadcast=beside_broadcast)
    for tensor in (large, small):
        copies.add(memory, bucket.add(f"{len(tensor)}", tensor), tensor)
    assert bool(memory[: len(large)].all()) is not beside_broadcast and not memory[len(large) :].any()
    copies.flush()
    assert torch.equal(memory, torch.cat([large, small]))


class Handed(SharedStreamSender):
    """Hands buckets over to a list: names, and whether their memory stays as it is."""

    def __init__(self):
        super().__init__(ParallelState(), torch.device("cpu"))
        self.handed = []

    def hand_over(self, stream, entries, memory, *, stays=False):
        self.handed.append(([entry.name for entry in entries], stays))
        return len(self.handed) - 1

    def await_loaded(self, stream, number):
        assert number < len(self.handed)


class OneBuffer(OwnMemory):
    def description(self, tensor):
        return {"handle": b"", "offset": 0, "size": 64} if len(tensor) == 8 else None


def test_only_the_models_own_memory_is_said_to_stay():
    """Buckets that are copied into are written again as soon as engines have said that they were loaded."""
    sender, own_tensor, other = Handed(), torch.ones(8), torch.ones(9)
    memories = (MemoryFile(), MemoryFile())
    filling, own = _Filling(sender, None, memories, 40), _Own(sender, None, OneBuffer(()), 1 << 20)
    for name, tensor in {"a": own_tensor, "b": other, "c": other, "d": own_tensor}.items():
        if not own.takes(name, tensor):
            filling.take(name, tensor)
    own.hand_over()
    filling.hand_over()
    for memory in memories:
        memory.close()
    assert sender.handed == [(["b"], False), (["a", "d"], True), (["c"], False)]


@pytest.mark.parametrize(
    "cut",
    [
        lambda whole: whole[3:9],
        lambda whole: whole[1:, 2:5],
        lambda whole: whole.t(),
        lambda whole: whole[4],
        lambda whole: whole[:, ::3],
        lambda whole: whole[2, 3],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_view_of_a_larger_buffer_is_found_in_it_with_its_strides(cut, dtype):
    whole = torch.arange(120).to(dtype).reshape(10, 12)
    piece = cut(whole)
    entry = entry_of("piece", piece)
    memory = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage())
    ((_, found),) = views([Entry.of_plain(entry.as_plain())], memory)
    assert torch.equal(found, piece) and found.data_ptr() == piece.data_ptr()
    assert (entry.strides is None) == piece.is_contiguous()


def test_memory_that_grows_is_opened_as_it_is_now_and_not_as_it_was():
    memory, sources = MemoryFile(), SharedSources()
    memory.at_least(5000)[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    before = memory.describe()
    there = sources.bytes_of(before)
    assert there[:3].tolist() == [1, 2, 3] and there.numel() == 8192
    assert sources.bytes_of(before).data_ptr() == there.data_ptr(), "opened twice"
    memory.at_least(100_000)[99_999] = 7
    assert sources.bytes_of(memory.describe())[99_999] == 7
    with pytest.raises(FileNotFoundError, match="not the trainer's memory any more"):
        sources.bytes_of(before)
    with pytest.raises(FileNotFoundError, match="not the trainer's memory any more"):
        sources.bytes_of(memory.describe() | {"inode": 1})
    sources.close()
    memory.close()
    with pytest.raises(OSError):  # the place is free, or has something else by now
        SharedSources().bytes_of(before)


class Piece:
    """Stands for memory of a GPU: which of it is given back, and when, is seen."""

    def __init__(self, num_bytes):
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8)
        self.is_open = True

    def close(self):
        assert self.is_open, "given back twice"
        self.is_open = False


def test_memory_of_a_gpu_that_became_too_small_stays_until_nobody_can_have_it_open():
    pieces = []
    memory = DeviceMemory(lambda num_bytes: pieces.append(Piece(num_bytes)) or pieces[-1])
    small = memory.at_least(100)
    assert memory.at_least(60) is small and len(pieces) == 1
    assert memory.at_least(300).numel() == 300 and memory.at_least(200) is pieces[1].tensor
    assert [piece.is_open for piece in pieces] == [True, True], "an engine may have it open still"
    memory.close()
    memory.close()
    assert [piece.is_open for piece in pieces] == [False, False]
    assert memory.at_least(10).numel() == 10 and len(pieces) == 3


def test_buffers_of_one_allocation_are_handed_over_each_by_itself():
    first = {"handle": b"same", "offset": 0, "size": 512}
    second = {"handle": b"same", "offset": 512, "size": 512}
    tensors = [("a", first), ("b", second), ("c", dict(first)), ("d", {**first, "handle": b"other"})]
    buckets = OwnBuckets()
    for name, description in tensors:
        buckets.add(description, Entry(name, torch.uint8, (10,), 0, 10))
    assert buckets.num_bytes == 40
    taken = [([entry.name for entry in entries], description["offset"]) for entries, description in buckets.take()]
    assert taken == [(["a", "c"], 0), (["b"], 512), (["d"], 0)]
    assert buckets.num_bytes == 0 and buckets.take() == []


def test_on_a_cpu_nothing_is_handed_over_as_it_lies_in_the_model():
    buffer = torch.zeros(16 << 20)
    own = OwnMemory([buffer[start : start + 10] for start in range(0, 100, 10)])
    assert own.description(buffer[:10]) is None


def test_memory_that_is_on_no_gpu_is_refused_by_name():
    for use in (lambda: export(torch.zeros(4)), lambda: Opened(bytes(64)), lambda: Allocated(1 << 62)):
        with pytest.raises(CudaMemoryError, match=r"libcuda|cu[A-Z]"):
            use()


def target(name="engine-0", **options):
    return EngineTarget(name, "http://127.0.0.1:1", "", 1, 1, True, **options)


@pytest.mark.parametrize(
    ("method", "device", "streams", "kind"),
    [
        ("tensor", "cpu", (True, True), SharedStreamSender),
        ("tensor", "cuda", (True, True), SharedStreamSender),
        ("broadcast", "cpu", (True,), BroadcastStreamSender),
        ("broadcast", "cuda", (True,), BroadcastStreamSender),
        ("broadcast", "cpu", (True, False), BroadcastRequestSender),
        ("tensor", "cuda", (False, True), CudaIpcSender),
    ],
)
def test_the_way_is_one_that_all_engines_of_the_update_take(method, device, streams, kind):
    engines = tuple(target(f"engine-{index}", has_stream=has) for index, has in enumerate(streams))
    update = WeightUpdate(1, engines, method, 100)
    sender = make_sender(ParallelState(), update, torch.device(device))
    assert type(sender) is kind
    assert sender.reads_only_first is (method == "broadcast" or device == "cpu"), "else each rank hands its own over"
    assert kind_of(update) == f"{method}, {'stream' if all(streams) else 'requests'}"


def test_an_engine_without_streams_is_not_given_memory_of_a_cpu():
    update = WeightUpdate(1, (target(), target("engine-1", has_stream=False)), "tensor", 100)
    with pytest.raises(BadUpdate, match="takes no streams") as caught:
        make_sender(ParallelState(), update, torch.device("cpu"))
    assert caught.value.evidence == "engine-1"


def test_engines_that_speculate_take_no_streams_nor_memory_of_a_cpu():
    assert takes_stream({}) and takes_stream({"speculative_algorithm": None})
    assert not takes_stream({"speculative_algorithm": "EAGLE"})
    groups = [{"num_engines": 1}, {"num_engines": 1, "overrides": {"speculative_algorithm": "EAGLE"}}]
    for speculating in ({"sglang_speculative_algorithm": "NEXTN"}, {"engine_groups": groups}):
        config = {"colocate": True, **speculating}
        assert settings(config | {"device": "cpu"})["method"] == "broadcast"
        assert settings(config | {"device": "cuda"})["method"] == "tensor"
