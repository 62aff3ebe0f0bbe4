"""Full tensors of a model over ranks: what its files hold, in every layout, by few collectives, a batch at a time."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.megatron_cases import make_backend
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from miles.backends.megatron_utils.gather import all_shards, from_owner
from miles.backends.megatron_utils.weights import full_tensors

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
ETP, SP = "expert_tensor_parallel_size", {"sequence_parallel": True}
MOE = "qwen3_moe"
LAYOUTS = {
    "one rank": ("qwen3", 1, {}),
    "TP 2": ("qwen2", 2, {TP: 2}),
    "PP 2": ("qwen3", 2, {PP: 2}),
    "TP 2, PP 2": ("qwen3", 4, {TP: 2, PP: 2}),
    "EP 2": (MOE, 2, {EP: 2}),
    "EP 2, SP 2": (MOE, 2, {EP: 2, TP: 2, **SP}),
    "ETP 2, SP 2": (MOE, 2, {ETP: 2, TP: 2, **SP}),
    "EP 2, PP 2": (MOE, 4, {EP: 2, PP: 2}),
    "EP 2, ETP 2, SP 2": (MOE, 4, {EP: 2, ETP: 2, TP: 2, **SP}),
}
AT_ONCE = (1, 30_000, None)
"""Each parameter alone, a few batches (some parameters are larger), all in one."""


def weights(backend, at_once, merge=None, *, only_first=False):
    return full_tensors(
        backend.model.module,
        backend.rules,
        stage=backend.stage,
        parallel=backend.parallel,
        merge=merge,
        at_once=at_once,
        only_first=only_first,
    )


def doubled(rule, tensors):
    assert len(tensors) == len(rule.hf)
    return [2 * tensor for tensor in tensors]


def every_way(path, changed):
    """All of them are kept, as senders do, before any is looked at."""
    backend = make_backend(path, **changed)
    kept = [list(weights(backend, at_once)) for at_once in AT_ONCE]
    return kept, [list(weights(backend, at_once, doubled)) for at_once in AT_ONCE]


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_those_of_the_files_in_order(name):
    architecture, ranks, changed = LAYOUTS[name]
    path = tiny_model(architecture, tied=architecture == "qwen3", vocab=301)
    expected = load_file(path / "model.safetensors")
    order = [name for name, _ in run_ranks(1, every_way, path, {})[0][0][0]]
    assert set(order) == set(expected)
    for plain, merged in run_ranks(ranks, every_way, path, changed):
        for factor, ways in ((1, plain), (2, merged)):
            for found in ways:
                assert [name for name, _ in found] == order
                for key, tensor in found:
                    assert not tensor.requires_grad
                    assert torch.equal(tensor, factor * expected[key]), key


FURTHER_LAYOUTS = {
    "DP 2, PP 2": ("qwen3", 4, {PP: 2}),
    "EP 2, DP 2": (MOE, 4, {EP: 2}),
    "ETP 1, SP 2, PP 2": (MOE, 4, {ETP: 1, TP: 2, PP: 2, **SP}),
    "CP 2, TP 2": ("qwen3", 4, {"context_parallel_size": 2, TP: 2}),
}


def for_the_first(path, changed):
    backend = make_backend(path, **changed)
    kept = [list(weights(backend, at_once, only_first=True)) for at_once in AT_ONCE]
    return kept, list(weights(backend, None, doubled, only_first=True))


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS | FURTHER_LAYOUTS)
def test_the_first_rank_alone_may_have_them(name):
    """All do with ``merge``, which may have to do with others."""
    architecture, ranks, changed = (LAYOUTS | FURTHER_LAYOUTS)[name]
    path = tiny_model(architecture, tied=architecture == "qwen3", vocab=301)
    expected = load_file(path / "model.safetensors")
    (first, _), *others = found = run_ranks(ranks, for_the_first, path, changed)
    assert others == [([[], [], []], merged) for _, merged in found[1:]]
    order = [name for name, _ in first[0]]
    for kept in first:
        assert set(order) == set(expected) and [name for name, _ in kept] == order
        assert all(torch.equal(tensor, expected[key]) for key, tensor in kept)
    for _, merged in found:
        assert all(torch.equal(tensor, 2 * expected[key]) for key, tensor in merged) and len(merged) == len(expected)


def calls(path, changed, at_once):
    """How many gathers and broadcasts there are: of all tensors, and until the first is there."""
    backend = make_backend(path, **changed)
    return counted(lambda: list(weights(backend, at_once))), first_calls(weights(backend, at_once))


def first_calls(iterator):
    found = counted(lambda: next(iterator))
    assert list(iterator)
    return found


def counted(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key: event.count for event in profile.key_averages() if event.key.startswith("c10d::")}
    return tuple(sum(count for name, count in names.items() if kind in name) for kind in ("allgather", "broadcast"))


LAYERS, EXPERTS = 3, 4
ONE_BY_ONE_CALLS = {
    # The embedding, and four linears of each layer.
    "TP 2": ("qwen3", {TP: 2}, ((1 + 4 * LAYERS, 0), (1, 0))),
    # Each parameter, with all that it is made of.
    "PP 2": ("qwen3", {PP: 2, "decoder_first_pipeline_num_layers": 2}, ((0, 2 + 8 * LAYERS), (0, 1))),
    # Two linears of each expert.
    "EP 2": (MOE, {EP: 2}, ((0, 2 * EXPERTS * LAYERS), (0, 0))),
}
CALLS = {"TP 2": (1, 0), "PP 2": (0, 2), "EP 2": (0, 2)}
"""One gather; one broadcast from each stage, or expert-parallel rank."""


@pytest.mark.parametrize("name", CALLS)
def test_few_collectives_put_many_together(name):
    architecture, changed, one_by_one = ONE_BY_ONE_CALLS[name]
    path = tiny_model(architecture, layers=LAYERS)
    assert run_ranks(2, calls, path, changed, 1) == [one_by_one] * 2
    assert run_ranks(2, calls, path, changed, None) == [(CALLS[name], CALLS[name])] * 2


def storages(path, changed):
    """Names of tensors that lie in this rank's model."""
    backend = make_backend(path, **changed)
    own = {parameter.untyped_storage().data_ptr() for parameter in backend.model.module.parameters()}
    return {name for name, tensor in weights(backend, None) if tensor.untyped_storage().data_ptr() in own}


def test_what_is_whole_on_a_rank_lies_in_the_model():
    path = tiny_model("llama", layers=2)
    names = set(load_file(path / "model.safetensors"))
    apart = {name for name in names if any(part in name for part in ("q_proj", "k_proj", "v_proj"))}
    assert run_ranks(1, storages, path, {}) == [names - apart]
    first, last = run_ranks(2, storages, path, {PP: 2})
    assert first | last == names - apart
    assert first & last == set()


def of_several_dtypes():
    rank = dist.get_rank()
    shards = [
        torch.full((3, 5), rank, dtype=torch.bfloat16),
        torch.full((2,), 10 + rank, dtype=torch.float32),
        torch.full((7, 2), 20 + rank, dtype=torch.bfloat16).t(),
    ]
    return all_shards(shards, dist.group.WORLD), all_shards([], dist.group.WORLD), all_shards(shards, None)


def test_shards_of_several_dtypes_stay_what_they_are():
    for rank, (found, none, alone) in enumerate(run_ranks(2, of_several_dtypes)):
        assert none == []
        for parts, first, (own,) in zip(found, (0, 10, 20), alone, strict=True):
            assert [part.unique().tolist() for part in parts] == [[first], [first + 1]]
            assert {(part.shape, part.dtype) for part in parts} == {(own.shape, own.dtype)}
            assert torch.equal(parts[rank], own)


def sent_by(owner):
    rank = dist.get_rank()
    own = [torch.full(shape, float(rank)) for shape in ((3, 5), (2,), (1, 1, 9))]
    return from_owner(own, owner, dist.group.WORLD), from_owner([], owner, dist.group.WORLD)


def test_an_owners_tensors_come_in_their_shapes():
    for found, none in run_ranks(3, sent_by, 1):
        assert none == []
        assert [tensor.shape for tensor in found] == [(3, 5), (2,), (1, 1, 9)]
        assert all(tensor.eq(1).all() for tensor in found)
