"""The order of copies, and the sums of a model's memory, against doing one step after the other."""

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from miles.backends.sglang_utils.copy_plan import Copy, Fill, Region, arrange, contested, in_place
from miles.backends.sglang_utils.model_memory import ModelMemory, Places, in_storage, tensors_of
from miles.backends.sglang_utils.replay_copies import Replay

SIZE = 96
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def view(storage, region):
    return in_storage(storage, region.dtype, region.start // region.dtype.itemsize, region.shape, region.strides)


@st.composite
def regions(draw, memory, shape=None):
    """Elements somewhere in ``SIZE`` bytes, row by row more often than not."""
    dtype = draw(st.sampled_from(DTYPES))
    room = SIZE // dtype.itemsize
    if shape is None:
        rows = draw(st.integers(0, 4))
        shape = (rows, draw(st.integers(1, max(room // max(rows, 1) // 2, 1))))
    rows, columns = shape
    options = [(columns, 1), (1, max(rows, 1)), (columns + 1, 1), (2 * columns, 2)]
    fitting = [s for s in options if (max(rows, 1) - 1) * s[0] + (columns - 1) * s[1] < room]
    strides = draw(st.sampled_from([*fitting[:1], *fitting])) if fitting else None
    if strides is None:
        return None
    last = (max(rows, 1) - 1) * strides[0] + (columns - 1) * strides[1]
    start = draw(st.integers(0, room - last - 1))
    return Region(memory, dtype, start * dtype.itemsize, shape, strides)


@st.composite
def all_steps(draw, addresses):
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        target = draw(regions(draw(st.sampled_from(addresses))))
        if target is None:
            continue
        if draw(st.integers(0, 3)) == 0:
            steps.append(Fill(target, draw(st.sampled_from([0, 1.0]))))
            continue
        source = draw(regions(0, target.shape))
        if source is not None:
            steps.append(Copy(target, source))
    again = draw(st.lists(st.sampled_from(steps), max_size=2)) if steps else []
    return steps + again


def one_after_the_other(steps, memory):
    """Two memories with nothing in them, and what they hold after all steps."""
    held = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(2)]
    wanted = [tensor.clone() for tensor in held]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held}
    of_wanted = dict(zip(storages, (tensor.untyped_storage() for tensor in wanted), strict=True))
    for step in steps(list(storages)):
        source = view(memory.untyped_storage(), step.source) if isinstance(step, Copy) else None
        target = view(of_wanted[step.target.memory], step.target)
        target.fill_(step.value) if source is None else target.copy_(source)
    return held, wanted, storages


def small_numbers():
    """In bytes: what float64 and bfloat16 make of them is finite."""
    return torch.randint(0, 60, (SIZE,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class Drawn:
    """Steps, once the memories' addresses are known."""

    def __init__(self, data):
        self._data, self.steps = data, []

    def __call__(self, addresses):
        self.steps = self._data.draw(all_steps(addresses))
        return self.steps


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_steps_have_the_effect_of_one_after_the_other(data):
    drawn, memory = Drawn(data), small_numbers()
    held, wanted, storages = one_after_the_other(drawn, memory)
    Replay(arrange(drawn.steps), storages).run(memory)
    assert all(map(torch.equal, held, wanted))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_arrives_in_its_place_and_the_rest_have_the_same_effect(data):
    """Whatever the spans are: those that are not in place come with the bucket."""
    drawn, memory = Drawn(data), small_numbers()
    held, wanted, storages = one_after_the_other(drawn, memory)
    sources = [step.source for step in drawn.steps if isinstance(step, Copy)]
    edges = sorted({0, SIZE, *(source.start for source in sources), *(source.stop for source in sources)})
    spans = [span for span in pairwise(edges) if data.draw(st.integers(0, 3))]
    pieces, rest = in_place(drawn.steps, [(start, stop - start) for start, stop in spans])
    bucket = memory.clone()
    for index, piece in pieces.items():
        start, stop = spans[index]
        assert (piece.source, piece.num_bytes) == (start, stop - start)
        target = in_storage(storages[piece.memory], torch.uint8, piece.target, (piece.num_bytes,), (1,))
        target.copy_(memory[start:stop])
        bucket[start:stop] = 0xA5  # it never arrives there
    Replay(arrange(rest), storages).run(bucket)
    assert all(map(torch.equal, held, wanted))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_contested_is_what_several_plans_write_to(data):
    plans = [data.draw(all_steps([1, 2])) for _ in range(data.draw(st.integers(1, 4)))]
    written = [
        {(s.target.memory, at) for s in steps if s.target.numel for at in range(s.target.start, s.target.stop)}
        for steps in plans
    ]
    several = {byte for index, one in enumerate(written) for other in written[:index] for byte in one & other}
    assert {(memory, at) for memory, start, stop in contested(plans) for at in range(start, stop)} == several


def row(memory, start, numel):
    return Region(memory, torch.bfloat16, start, (numel,), (1,))


@pytest.mark.parametrize(
    ("steps", "in_place_ones"),
    [
        ([Copy(row(1, 0, 8), row(0, 16, 8)), Copy(row(1, 32, 8), row(0, 32, 8))], {0: (1, 0), 1: (1, 32)}),
        ([Copy(row(1, 0, 8), row(0, 16, 8)), Fill(row(1, 16, 8), 0)], {0: (1, 0)}),
        ([Copy(row(1, 0, 4), row(0, 16, 4)), Copy(row(1, 8, 8), row(0, 32, 8))], {1: (1, 8)}),
        ([Copy(row(1, 0, 8), row(0, 16, 8)), Copy(row(2, 0, 8), row(0, 16, 8))], {}),
        ([Copy(row(1, 0, 8), row(0, 16, 8)), Copy(row(1, 0, 8), row(0, 32, 8))], {}),
        ([Copy(row(1, 0, 20), row(0, 8, 20))], {}),
        ([Copy(Region(1, torch.float32, 0, (8,), (1,)), row(0, 16, 8))], {}),
        ([Copy(Region(1, torch.bfloat16, 0, (8,), (2,)), row(0, 16, 8))], {}),
        ([Copy(row(1, 0, 8), row(0, 16, 8))] * 2, {0: (1, 0)}),
        ([Copy(row(1, 8, 16), row(0, 16, 16))], {0: (1, 8), 1: (1, 24)}),
        ([Copy(row(1, 8, 16), row(0, 16, 16)), Copy(row(2, 0, 2), row(0, 40, 2))], {}),
        ([Copy(row(1, 8, 20), row(0, 16, 20))], {}),
        ([Copy(row(1, 8, 12), row(0, 16, 12))], {}),
    ],
    ids=[
        *("two", "beside a fill", "a part", "two readers", "two writers", "two tensors", "converted", "gaps", "again"),
        *("both pieces", "one read twice", "and more", "and a part"),
    ],
)
def test_which_tensors_arrive_in_their_place(steps, in_place_ones):
    pieces, rest = in_place(steps, [(16, 16), (32, 16)])
    assert {index: (piece.memory, piece.target) for index, piece in pieces.items()} == in_place_ones
    assert bool(pieces) is (len(rest) < len(set(steps)))


def test_neighbours_on_both_sides_are_one_piece_in_the_widest_integers():
    def piece(memory, target, source, dtype=torch.bfloat16, numel=8):
        shape = ((numel,), (1,))
        return Copy(Region(memory, dtype, target, *shape), Region(0, dtype, source, *shape))

    steps = [
        piece(1, 16, 32),
        piece(1, 0, 16),
        piece(1, 32, 64),
        piece(2, 48, 80, torch.int16),
        piece(3, 6, 102, numel=1),
    ]
    plan = arrange(steps)
    assert (plan.loose, plan.ordered, plan.source_stop) == ((), (), 104)
    narrow, wide = plan.flat
    assert [(p.memory, p.target, p.source, p.num_bytes) for p in wide.pieces] == [
        (1, 0, 16, 32),
        (1, 32, 64, 16),
        (2, 48, 80, 16),
    ]
    assert wide.width == 8 and wide.sizes() == ([4, 2, 2, 2], [0, 2, 3])
    assert narrow.width == 2 and narrow.sizes() == ([1], [0])


def test_what_overlaps_through_a_third_keeps_its_order():
    def region(memory, start, numel):
        return Region(memory, torch.float32, start, (numel,), (1,))

    steps = [
        Copy(region(1, 32, 4), region(0, 0, 4)),
        Fill(region(1, 8, 2), 0),
        Copy(region(1, 0, 16), region(0, 16, 16)),
        Copy(region(1, 48, 2), region(0, 80, 2)),
    ]
    apart = Copy(region(1, 64, 4), region(0, 0, 4))
    plan = arrange([*steps[:2], apart, *steps[2:]])
    assert plan.ordered == tuple(steps) and [p.target for group in plan.flat for p in group.pieces] == [64]


def test_the_same_bytes_twice_are_cut_twice():
    def copy(target):
        return Copy(Region(1, torch.float32, target, (4,), (1,)), Region(0, torch.float32, 8, (4,), (1,)))

    plan = arrange([copy(0), copy(16), copy(0)])
    assert [len(group.pieces) for group in plan.flat] == [1, 1] and plan.ordered == ()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.arange(40, dtype=torch.bfloat16)
        self.part = nn.Parameter(whole[1:8], requires_grad=False)
        self.within = nn.Parameter(whole[2:3], requires_grad=False)
        self.overlapping = nn.Parameter(whole[4:10].view(2, 3).t(), requires_grad=False)
        self.apart = nn.Parameter(whole[20:40].view(4, 5)[:, :2], requires_grad=False)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("missing", None)
        self.child = nn.Linear(3, 2)
        self.again = self.child


def bits(model):
    return {name: tensor.contiguous().view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


def test_bits_are_inverted_once_each_and_come_back():
    model = Odd()
    memory = ModelMemory(model)
    before = bits(model)
    untouched = model.part.untyped_storage()[0]
    memory.flip()
    assert all(torch.equal(inverted, ~before[name]) for name, inverted in bits(model).items())
    assert model.part.untyped_storage()[0] == untouched
    memory.flip()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_a_digest_tells_each_bit_and_each_exchange():
    model = Odd()
    memory = ModelMemory(model)
    digests = [memory.digest()]
    for tensor in (model.part, model.apart, model.flags, model.child.bias):
        tensor.data.view(torch.uint8)[..., 0] ^= 1
        digests.append(memory.digest())
    model.child.weight.data.copy_(model.child.weight.data.flip(0))
    digests.append(memory.digest())
    model.child.weight.data.copy_(model.child.weight.data.flip(1))
    digests.append(memory.digest())
    assert not any(torch.equal(a, b) for i, a in enumerate(digests) for b in digests[:i])


@pytest.mark.parametrize("late", [nn.UninitializedParameter(), nn.Parameter(torch.empty(3, device="meta"))])
def test_nothing_is_known_of_a_model_with_parameters_that_have_no_memory(late):
    model, places = Odd(), Places()
    assert places.changed(model) and places.are_plain and not places.changed(model)
    model.late = late
    assert places.changed(model) and not places.are_plain and places.changed(model)
    del model.late
    assert places.changed(model) and places.are_plain and not places.changed(model)


def test_a_scripted_module_among_others_is_no_obstacle():
    """TorchScript shows its members through wrappers of its own."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        inner = torch.jit.script(nn.Linear(2, 2))
    model, places = nn.Sequential(nn.Linear(2, 2), inner), Places()
    assert len(tensors_of(model)) == 4
    assert places.changed(model) and places.are_plain
    inner.weight.data = torch.zeros(2, 2)
    assert places.changed(model)


def test_what_others_write_to_as_well_does_not_arrive_before_its_turn():
    steps = [Copy(row(1, 0, 8), row(0, 16, 8)), Copy(row(1, 32, 8), row(0, 32, 8))]
    assert in_place(steps, [(16, 16), (32, 16)], [(2, 0, 99), (1, 16, 33)])[0].keys() == {0}


def test_other_members_anywhere_in_a_model_are_noticed():
    model, places = Odd(), Places()
    model.child.below = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def put_below():
        model.child.below[1].further = nn.Linear(1, 1)

    def put_another():
        model.child.below[0] = nn.Linear(2, 2)

    def put_in_place_of_a_parameter():
        model.child.below[0].weight = nn.Parameter(model.child.below[0].weight.data)

    def take_away():
        model.child.below[0].bias = None

    def move():
        model.child.below[0].weight.data = model.child.below[0].weight.data.clone()

    def turn():
        model.child.below[0].weight.data = model.child.below[0].weight.data.t()

    places.changed(model)
    for change in (put_below, put_another, put_in_place_of_a_parameter, take_away, move, turn):
        assert not places.changed(model)
        change()
        assert places.changed(model), change.__name__
    assert places.changed(Odd())
