"""When trainer and engines make NCCL's communicator, on a stand-in for the backend that blocks as NCCL does."""

import asyncio
import threading
import weakref

import pytest
import torch
from support.procs import eventually

from miles.backends.training_utils.rendezvous import rank_device
from miles.backends.weight_update.broadcast_group import BroadcastGroup, Gathering

GPU = torch.device("cuda", 1)


class Nccl:
    """``eager_connect_single_device`` blocks until the other side comes to its first collective, or until ``abort``."""

    def __init__(self, others_come=True):
        self.connected_for = []
        self.is_aborted = threading.Event()
        self.others = threading.Event()
        if others_come:
            self.others.set()

    def name(self):
        return "nccl"

    def eager_connect_single_device(self, device):
        self.connected_for.append(device)
        while not self.others.wait(0.01):
            if self.is_aborted.is_set():
                raise RuntimeError("aborted")

    def abort(self):
        self.is_aborted.set()


def gathering(backend, *, prefixed=""):
    waiting = [backend]
    return Gathering("127.0.0.1", 2, GPU, prefixed=prefixed, make_backend=lambda *_: waiting.pop())


async def test_a_group_with_engines_of_ours_is_connected_when_it_stands():
    backend = Nccl()
    group = await asyncio.to_thread(gathering(backend).wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and backend.connected_for == [GPU]
    assert group.connect(lambda: False) == "" and backend.connected_for == [GPU]
    group.close()


async def test_sglangs_own_group_stands_before_anybody_connects():
    """Its engines connect in their first broadcast, which they take part in when they are asked to."""
    backend = Nccl(others_come=False)
    group = await asyncio.to_thread(gathering(backend, prefixed="miles").wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and backend.connected_for == []
    connecting = asyncio.create_task(asyncio.to_thread(group.connect, lambda: False))
    backend.others.set()
    assert await connecting == "" and backend.connected_for == [GPU]
    group.close()


async def test_an_engine_that_refuses_the_first_broadcast_keeps_nobody():
    backend = Nccl(others_come=False)
    group = await asyncio.to_thread(gathering(backend, prefixed="miles").wait, lambda: False)
    assert isinstance(group, BroadcastGroup)
    assert "not everybody came" in await asyncio.to_thread(group.connect, lambda: bool(backend.connected_for))
    assert backend.is_aborted.is_set()
    group.close()


async def test_engines_of_ours_that_fail_to_connect_keep_nobody():
    backend = Nccl(others_come=False)
    found = await asyncio.to_thread(gathering(backend).wait, lambda: bool(backend.connected_for))
    assert isinstance(found, str) and backend.is_aborted.is_set()


@pytest.mark.parametrize("prefixed", ["", "miles"])
async def test_nothing_but_the_group_keeps_a_backend(prefixed):
    """Its connections end with it, which is what others wait for."""
    backend = Nccl()
    alive, coming = weakref.ref(backend), gathering(backend, prefixed=prefixed)
    group = await asyncio.to_thread(coming.wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and group.connect(lambda: False) == ""
    del backend
    group.close()
    await eventually(lambda: alive() is None)
    assert coming.name == group.name


def test_a_ranks_gpu_has_an_index():
    assert rank_device("cuda", lambda: 3) == torch.device("cuda", 3)
    assert rank_device("cpu") == torch.device("cpu")


def test_a_group_is_refused_for_a_gpu_without_an_index():
    """NCCL would connect it for one key, and broadcast by another."""
    with pytest.raises(ValueError, match="index"):
        Gathering("127.0.0.1", 2, torch.device("cuda"))
