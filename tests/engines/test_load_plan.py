"""What ``load_weights`` copied is done again without it, and the model is always as ``load_weights`` makes it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from support.bucket_cases import buckets_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from miles.backends.sglang_utils.load_plan import LoadPlans
from miles.backends.weight_update.bucket_copies import COPIED_ALONE_BYTES

BF16 = torch.bfloat16


def parameter(*shape, dtype=BF16):
    return nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False)


class Model(nn.Module):
    """Loads as SGLang's classes do, as rank 1 of 2 where a weight is cut."""

    def __init__(self):
        super().__init__()
        self.qkv = parameter(24, 8)
        self.embedding = parameter(16, 8)
        self.head = self.embedding
        self.row = parameter(8, 4)
        self.transposed = parameter(8, 4, dtype=torch.float32)
        self.experts = parameter(2, 6, 3)
        self.converted = parameter(5)
        self.register_buffer("bias", torch.full((3,), 7.0))
        self.register_buffer("other", torch.arange(5))
        self.empty = parameter(0, 4)
        self.norm = parameter(8)
        self.calls = 0

    def load_weights(self, weights):
        self.calls += 1
        for name, loaded in weights:
            getattr(self, f"load_{name.split('.')[0]}")(loaded, name)

    def load_q(self, loaded, name):
        index = int(name[-1])
        self.qkv.data.narrow(0, index * 8, 8).copy_(loaded)

    def load_embedding(self, loaded, _):
        for tied in (self.embedding, self.head):
            tied[: loaded.shape[0]].data.copy_(loaded)
            tied[loaded.shape[0] :].data.fill_(0)

    def load_row(self, loaded, _):
        self.row.data.copy_(loaded.narrow(1, 4, 4).to(self.row.device))

    def load_transposed(self, loaded, _):
        self.transposed.data.copy_(loaded.t())

    def load_experts(self, loaded, name):
        expert = self.experts.data[int(name[-1])]
        expert.narrow(0, 3, 3).copy_(loaded.narrow(0, 3, 3).transpose(0, 1))
        expert.narrow(0, 0, 3).zero_()

    def load_converted(self, loaded, _):
        assert torch.tensor(3).item() == 3  # has to do with neither the bucket nor the model
        self.converted.data.copy_(loaded)

    def load_bias(self, loaded, _):
        self.bias.copy_(loaded.reshape(3))

    def load_norm(self, loaded, _):
        self.norm.data.copy_(loaded)

    def load_empty(self, loaded, _):
        self.empty.data.copy_(loaded[:, :4])


SHAPES = {
    "q.0": ((8, 8), BF16),
    "q.1": ((8, 8), BF16),
    "q.2": ((8, 8), BF16),
    "embedding": ((13, 8), BF16),
    "empty": ((0, 8), BF16),
    "row": ((8, 8), BF16),
    "transposed": ((4, 8), torch.float32),
    "experts.0": ((6, 3), BF16),
    "experts.1": ((6, 3), BF16),
    "converted": ((5,), torch.float32),
    "norm": ((8,), BF16),
    "bias": ((1, 3), torch.float64),
}


def weights(seed=0, names=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(SHAPES[name][0], generator=generator, dtype=torch.float64).to(SHAPES[name][1])
        for name in names
    }


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Loaded:
    """A model that is loaded by plans, and one that is loaded by ``load_weights``."""

    model: nn.Module
    reference: nn.Module
    plans: LoadPlans

    @classmethod
    def of(cls, kind):
        model = kind()
        return cls(model, kind(), LoadPlans(model))

    def update(self, sent, capacity=1 << 20, alignment=16, **how):
        self.plans.begin()
        for entries, memory in buckets_of(sent, capacity, alignment=alignment):
            self.plans.load(entries, memory, **how)
            self.reference.load_weights([(e.name, sent[e.name]) for e in entries])
        self.plans.end()
        assert same(bits(self.model), bits(self.reference))

    @property
    def counts(self):
        plans = self.plans
        return plans.recorded, plans.checked, plans.replayed, plans.plain


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("capacity", [1 << 20, 300])
def test_the_third_update_is_replayed_and_the_model_is_the_same(mode, capacity):
    with mode():
        loaded = Loaded.of(Model)
        buckets = sum(1 for _ in buckets_of(weights(), capacity))
        for seed in range(4):
            loaded.update(weights(seed), capacity)
    assert loaded.counts == (buckets, buckets, 2 * buckets, 0)
    assert loaded.model.calls == 3 * buckets, "once when recorded, twice when checked"


def test_what_is_only_queued_is_known_before_it_is_loaded():
    loaded, told = Loaded.of(Model), []
    for seed in range(4):
        told.append(loaded.plans.replays(next(buckets_of(weights(seed)))[0]))
        loaded.update(weights(seed))
    assert told == [False, False, True, True] and loaded.plans.replayed == 2
    assert not loaded.plans.replays(next(buckets_of({"other": weights()["q.0"]}))[0])


def test_a_replay_fills_what_is_padded():
    """Memory that was released and taken back holds nothing in particular."""
    loaded = Loaded.of(Model)
    for seed in range(2):
        loaded.update(weights(seed))
    for tensor in (*loaded.model.parameters(), loaded.model.bias):
        tensor.data.fill_(float("nan"))
    loaded.update(weights(2))
    assert loaded.plans.replayed == 1


class Sizes(nn.Module):
    """A weight that is worth a copy of its own, between small ones."""

    def __init__(self):
        super().__init__()
        self.first, self.large, self.last = parameter(8), parameter(COPIED_ALONE_BYTES // 2), parameter(9)

    def load_weights(self, weights):
        for name, loaded in weights:
            getattr(self, name).data.copy_(loaded)


@pytest.mark.parametrize("beside_broadcast", [False, True])
def test_large_pieces_and_small_ones_are_replayed_alike(beside_broadcast):
    loaded = Loaded.of(Sizes)
    for value in range(3):
        sizes = {"last": 9, "large": COPIED_ALONE_BYTES // 2, "first": 8}
        sent = {name: torch.full((size,), float(value), dtype=BF16) for name, size in sizes.items()}
        loaded.update(sent, 1 << 30, beside_broadcast=beside_broadcast)
    assert loaded.counts == (1, 1, 1, 0)


def test_an_update_that_changes_nothing_is_checked_all_the_same():
    loaded = Loaded.of(Model)
    for _ in range(3):
        loaded.update(weights(0))
    assert loaded.counts == (1, 1, 1, 0)


@pytest.mark.parametrize("other", [{"names": list(SHAPES)[::-1]}, {"alignment": 64}], ids=["order", "places"])
def test_another_layout_is_another_plan(other):
    loaded = Loaded.of(Model)
    for seed in range(6):
        options = other if seed % 2 else {}
        loaded.update(weights(seed, options.get("names", SHAPES)), alignment=options.get("alignment", 16))
    assert loaded.counts == (2, 2, 2, 0)


def test_a_layout_is_found_by_its_tuple_or_by_what_is_in_it():
    loaded = Loaded.of(Model)
    first, second = (next(buckets_of({"q.0": weights(seed)["q.0"]})) for seed in range(2))
    for entries, memory in [first, second, first, (list(first[0]), second[1]), second, ((), first[1]), second, first]:
        loaded.plans.load(entries, memory)
    assert loaded.counts == (2, 1, 5, 0)
    assert torch.equal(loaded.model.qkv[:8], weights(0)["q.0"])


def test_what_two_updates_had_no_use_for_is_forgotten():
    loaded = Loaded.of(Model)
    for seed, names in enumerate([["q.0"], ["q.1"], ["q.1"], ["q.1"], ["q.0"]]):
        loaded.update(weights(seed, names))
    assert loaded.counts == (3, 1, 1, 0)


class Converts(Model):
    def load_converted(self, loaded, _):
        self.converted.data.copy_(loaded * 2)


class Reads(Model):
    def load_bias(self, loaded, _):
        self.bias.fill_(loaded[0, 0].item())


class KeepsConverted(Model):
    def load_converted(self, loaded, _):
        self.converted.data.copy_(loaded.to(BF16))


class FromElsewhere(Model):
    def load_converted(self, loaded, _):
        self.converted.data.copy_(torch.ones(5))


class PutsBy(Model):
    """The first half waits for the second."""

    def load_q(self, loaded, name):
        self.__dict__.setdefault("held", []).append(loaded.clone() if name == "q.0" else loaded)
        super().load_q(loaded, name)


class AccumulatesInPlace(Model):
    def load_bias(self, loaded, _):
        self.bias.add_(1)


class WritesElsewhere(Model):
    def load_bias(self, loaded, _):
        self.__dict__.setdefault("side", torch.empty(3)).copy_(loaded[0])


@pytest.mark.parametrize("kind", [Converts, Reads, KeepsConverted, FromElsewhere, PutsBy, WritesElsewhere])
def test_a_model_that_does_more_than_copying_is_left_to_load_weights(kind):
    loaded = Loaded.of(kind)
    buckets = sum(1 for _ in buckets_of(weights(), 300))
    for seed in range(4):
        loaded.update(weights(seed), 300)
    recorded, checked, replayed, plain = loaded.counts
    assert loaded.plans.refusal and (checked, replayed) == (0, 0) and recorded + plain == 4 * buckets


def test_a_model_whose_weights_depend_on_what_it_held_is_left_to_load_weights():
    loaded = Loaded.of(AccumulatesInPlace)
    for seed in range(3):
        loaded.update(weights(seed))
    assert loaded.counts == (1, 0, 0, 2)


class CopiesInThreads(Model):
    def load_row(self, loaded, name):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().load_row, loaded, name).result(60)


class FillsInThreads(Model):
    def load_row(self, loaded, name):
        super().load_row(loaded, name)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.other.fill_, 5).result(60)


@pytest.mark.parametrize("kind", [CopiesInThreads, FillsInThreads])
@pytest.mark.parametrize("seeds", [(0, 1, 2, 3), (0, 0, 0, 1)], ids=["changing", "unchanged"])
def test_what_a_recorder_cannot_see_is_found_out(kind, seeds, caplog):
    loaded = Loaded.of(kind)
    for seed in seeds:
        loaded.update(weights(seed))
    assert loaded.counts == (1, 1, 0, 2)
    assert "q.0" in loaded.plans.refusal, "the first tensor of the bucket"
    assert [r.levelname for r in caplog.records if "load_weights" in r.message] == ["WARNING"]


class ByTurns(Model):
    """Writes the same each time, and in between something else."""

    def load_row(self, loaded, name):
        if self.calls % 2:
            self.row.data[:2].copy_(loaded[:2, :4])
        self.row.data.copy_(loaded[:, :4])


def test_a_model_that_copies_otherwise_the_second_time_is_left_to_load_weights():
    loaded = Loaded.of(ByTurns)
    for seed in range(3):
        loaded.update(weights(seed))
    assert loaded.counts == (1, 1, 0, 1)


def test_a_loader_that_fails_in_the_check_leaves_other_weights_as_they_were():
    loaded = Loaded.of(Model)
    loaded.update(weights(0))
    before = bits(loaded.model)
    [(entries, memory)] = buckets_of({"row": weights(0)["row"]})
    loaded.plans.begin()
    loaded.plans.load(entries, memory)
    loaded.model.load_row = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loaded.plans.load(entries, memory)
    held = bits(loaded.model)
    assert all(torch.equal(before[name], held[name]) for name in before if name != "row")
    del loaded.model.load_row
    loaded.plans.load(entries, memory)
    assert same(bits(loaded.model), before)


def replace_parameter(model):
    model.qkv = parameter(24, 8)


def replace_data(model):
    model.row.data = torch.zeros_like(model.row)


def replace_buffer(model):
    model.register_buffer("bias", torch.zeros(3))


def reshape(model):
    model.transposed.data = model.transposed.data.as_strided((8, 4), (1, 8))


@pytest.mark.parametrize("replace", [replace_parameter, replace_data, replace_buffer, reshape])
def test_plans_of_parameters_that_are_elsewhere_are_forgotten(replace):
    loaded = Loaded.of(Model)
    for seed in range(6):
        if seed == 3:
            replace(loaded.model)
        loaded.update(weights(seed))
    assert loaded.counts == (2, 2, 2, 0)


def test_plans_are_forgotten_when_experts_have_changed_places():
    """Which no tensor tells."""

    class Moves(Model):
        first = 0

        def load_experts(self, loaded, name):
            self.experts.data[(int(name[-1]) + self.first) % 2].copy_(loaded)

    loaded = Loaded.of(Moves)
    loaded.plans = LoadPlans(loaded.model, state=lambda: loaded.model.first)
    for seed in range(6):
        loaded.model.first = loaded.reference.first = seed // 3
        loaded.update(weights(seed))
    assert loaded.counts == (2, 2, 2, 0)


def test_there_are_no_plans_where_places_of_experts_cannot_be_told():
    loaded = Loaded.of(Model)
    loaded.plans = LoadPlans(loaded.model, state=lambda: None)
    for seed in range(3):
        loaded.update(weights(seed))
    assert loaded.counts == (0, 0, 0, 3)


def test_nothing_keeps_the_memory_of_a_bucket():
    loaded = Loaded.of(Model)
    for seed in range(3):
        loaded.plans.begin()
        [(entries, memory)] = buckets_of(weights(seed))
        watched = StorageWeakRef(memory.untyped_storage())
        loaded.plans.load(entries, memory)
        del memory
        assert watched.expired()
    assert loaded.plans.replayed == 1


def test_a_model_that_is_no_module_is_loaded_by_its_load_weights():
    class Fake:
        held: dict

        def load_weights(self, named):
            self.held = {name: tensor.clone() for name, tensor in named}

    fake = Fake()
    plans = LoadPlans(fake)
    for seed in range(3):
        plans.begin()
        for entries, memory in buckets_of(weights(seed)):
            plans.load(entries, memory)
        assert same(fake.held, weights(seed))
    assert plans.plain == 3


@dataclass(frozen=True)
class Strided:
    """As an entry of a bucket that has its elements apart."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    strides: tuple[int, ...] | None = None


def test_entries_may_have_strides_and_buckets_begin_within_their_storage():
    loaded = Loaded.of(Model)
    entries = (
        Strided("row", BF16, (8, 8), 2, 128, (1, 8)),
        Strided("bias", torch.float64, (1, 3), 136, 24),
        Strided("converted", torch.float32, (5,), 160, 20, (3,)),
    )
    other = tuple(replace(entry, strides=None) for entry in entries)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        whole = torch.empty(512, dtype=torch.uint8)
        whole.view(BF16).copy_(torch.randn(256, generator=generator))
        memory = whole[32 : 32 + 224]
        loaded.plans.begin()
        loaded.plans.load(entries, memory)
        sent = [
            ("row", memory[2:130].view(BF16).reshape(8, 8).t()),
            ("bias", memory[136:160].view(torch.float64).reshape(1, 3)),
            ("converted", memory[160:].view(torch.float32)[:13:3]),
        ]
        loaded.reference.load_weights(sent)
        held, wanted = bits(loaded.model), bits(loaded.reference)
        assert all(held[name].view(torch.uint8).equal(wanted[name].view(torch.uint8)) for name in held)
    assert loaded.counts == (1, 1, 2, 0)
    loaded.plans.load(other, memory)
    assert loaded.plans.recorded == 2, "strides are part of a layout"


def test_a_bucket_that_lies_askew_is_loaded_by_load_weights():
    loaded = Loaded.of(Model)
    sent = {"q.1": weights()["q.1"]}
    [(entries, memory)] = buckets_of(sent)
    askew = torch.cat([torch.zeros(2, dtype=torch.uint8), memory])[2:]
    for _ in range(3):
        loaded.plans.load(entries, askew)
        loaded.reference.load_weights(list(sent.items()))
        assert same(bits(loaded.model), bits(loaded.reference))
    assert loaded.counts == (0, 0, 0, 3)


@pytest.mark.parametrize(("start", "says"), [(1, "no place for"), (200, "ends at byte 328 of a bucket of 256")])
def test_a_tensor_that_is_not_within_the_bucket_is_refused(start, says):
    plans = LoadPlans(Model())
    with pytest.raises(ValueError, match=says):
        plans.load((Strided("q.0", BF16, (8, 8), start, 128),), torch.zeros(256, dtype=torch.uint8))


def test_a_replay_from_a_shorter_bucket_is_refused():
    loaded = Loaded.of(Model)
    for seed in range(2):
        loaded.update(weights(seed))
    [(entries, memory)] = buckets_of(weights(2))
    with pytest.raises(ValueError, match="bytes, where"):
        loaded.plans.load(entries, memory[:-1])
