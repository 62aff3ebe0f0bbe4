"""Parameters that are put together many at a time are what each of them is alone."""

import pytest
import torch
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from miles.backends.fsdp_utils.gather import gathered

SHAPES = [(7, 3), (5,), (1, 4), (12, 2, 2), (640, 3), (3,), (2, 5), (9, 9)]
CPU = torch.device("cpu")


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}


CASES = [(1, torch.float32), (200, torch.bfloat16), (None, torch.float32)]


def on_ranks(mesh_shape, only_first=False):
    return [gathered_once(init_device_mesh("cpu", mesh_shape), *case, only_first) for case in CASES]


def gathered_once(mesh, at_once, dtype, only_first):
    placements = [*([Replicate()] * (mesh.ndim - 1)), Shard(0)]
    shards = [(name, distribute_tensor(tensor, mesh, placements)) for name, tensor in tensors().items()]
    shards[4] = ("p4", distribute_tensor(tensors()["p4"], mesh, [*placements[:-1], Shard(1)]))
    found = list(gathered(iter(shards), CPU, dtype, at_once=at_once, only_first=only_first))
    assert all(not tensor.requires_grad and (tensor.is_contiguous() or name == "p4") for name, tensor in found)
    return [(name, tensor.clone()) for name, tensor in found]


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (3,), (2, 2)])
def test_each_is_whole_on_all_ranks_in_order(mesh_shape):
    ranks = torch.Size(mesh_shape).numel()
    for by_case in run_ranks(ranks, on_ranks, mesh_shape):
        for found, (_, dtype) in zip(by_case, CASES, strict=True):
            assert [name for name, _ in found] == list(tensors())
            for (name, tensor), wanted in zip(found, tensors().values(), strict=True):
                assert tensor.dtype == dtype and torch.equal(tensor, wanted.to(dtype)), name


@pytest.mark.parametrize("mesh_shape", [(1,), (3,), (2, 2)])
def test_the_first_rank_alone_may_have_them(mesh_shape):
    """Of each that shards lie on; others have what does not lie in rows, which is put together on all."""
    found = run_ranks(torch.Size(mesh_shape).numel(), on_ranks, mesh_shape, True)
    for rank, by_case in enumerate(found):
        for held, (_, dtype) in zip(by_case, CASES, strict=True):
            is_first = rank % mesh_shape[-1] == 0
            assert [name for name, _ in held] == (list(tensors()) if is_first else ["p4"])
            assert all(torch.equal(tensor, tensors()[name].to(dtype)) for name, tensor in held)


def calls_on_ranks(at_once):
    mesh = init_device_mesh("cpu", (2,))
    shards = [(name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in tensors().items()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        list(gathered(iter(shards), CPU, torch.float32, at_once=at_once))
    return sum(event.count for event in profile.key_averages() if "allgather" in event.key and "c10d" in event.key)


def test_few_collectives_gather_many():
    one_by_one, together = run_ranks(2, calls_on_ranks, 1)[0], run_ranks(2, calls_on_ranks, None)[0]
    assert (one_by_one, together) == (len(SHAPES), 1)


def test_what_is_here_already_is_not_copied():
    assert run_ranks(1, shares_memory) == [True]


def shares_memory():
    mesh = init_device_mesh("cpu", (1,))
    shard = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    ((_, tensor),) = gathered([("p", shard)], CPU, torch.float32)
    return tensor.data_ptr() == shard.to_local().data_ptr()
