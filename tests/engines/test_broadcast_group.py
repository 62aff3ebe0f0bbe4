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
WAIT_S = 60.0


class Nccl:
    """``eager_connect_single_device`` blocks until the other side comes to its first collective. As NCCL's, it does not
    end with ``abort``, which knows nothing of a communicator that is not made yet."""

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
        self.others.wait()

    def abort(self):
        self.is_aborted.set()


def gathering(backend, *, prefixed=""):
    waiting = [backend]
    return Gathering("127.0.0.1", 2, GPU, prefixed=prefixed, make_backend=lambda *_: waiting.pop())


async def test_a_group_with_engines_of_ours_is_connected_when_it_stands():
    backend = Nccl()
    group = await asyncio.to_thread(gathering(backend).wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and backend.connected_for == [GPU]
    assert group.connect(lambda: False, WAIT_S) == "" and backend.connected_for == [GPU]
    group.close()


async def test_sglangs_own_group_stands_before_anybody_connects():
    """Its engines connect in their first broadcast, which they take part in when they are asked to."""
    backend = Nccl(others_come=False)
    group = await asyncio.to_thread(gathering(backend, prefixed="miles").wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and backend.connected_for == []
    connecting = asyncio.create_task(asyncio.to_thread(group.connect, lambda: False, WAIT_S))
    await eventually(lambda: backend.connected_for == [GPU])
    assert not connecting.done()
    backend.others.set()
    assert await connecting == ""
    group.close()


async def test_an_engine_that_refuses_the_first_broadcast_keeps_nobody():
    backend = Nccl(others_come=False)
    group = await asyncio.to_thread(gathering(backend, prefixed="miles").wait, lambda: False)
    assert isinstance(group, BroadcastGroup)
    why = await asyncio.to_thread(group.connect, lambda: bool(backend.connected_for), WAIT_S)
    assert "somebody failed" in why
    group.close()
    assert backend.is_aborted.is_set()
    backend.others.set()


async def test_a_first_broadcast_that_nobody_comes_to_ends_in_time():
    backend = Nccl(others_come=False)
    group = await asyncio.to_thread(gathering(backend, prefixed="miles").wait, lambda: False)
    assert isinstance(group, BroadcastGroup)
    assert "within 0.02 s" in await asyncio.to_thread(group.connect, lambda: False, 0.02)
    backend.others.set()
    group.close()


@pytest.mark.parametrize(("kind", "words"), [(RuntimeError, ()), (ValueError, ("no such device",))])
async def test_a_backend_that_cannot_be_made_is_told_at_once_and_with_words(kind, words):
    def fails(*_):
        raise kind(*words)

    coming = Gathering("127.0.0.1", 2, GPU, make_backend=fails)
    found = await asyncio.to_thread(coming.wait, lambda: False)
    assert found == (*words, kind.__name__)[0]


async def test_engines_of_ours_that_fail_to_connect_keep_nobody():
    backend = Nccl(others_come=False)
    found = await asyncio.to_thread(gathering(backend).wait, lambda: bool(backend.connected_for))
    assert "somebody failed" in str(found) and backend.is_aborted.is_set()
    backend.others.set()


@pytest.mark.parametrize("prefixed", ["", "miles"])
async def test_nothing_but_the_group_keeps_a_backend(prefixed):
    """Its connections end with it, which is what others wait for."""
    backend = Nccl()
    alive, coming = weakref.ref(backend), gathering(backend, prefixed=prefixed)
    group = await asyncio.to_thread(coming.wait, lambda: False)
    assert isinstance(group, BroadcastGroup) and group.connect(lambda: False, WAIT_S) == ""
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
