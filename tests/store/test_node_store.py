"""The store's shell in the agent: what the kernel refuses, what comes too late, what is left at the end."""

import asyncio
import os
from contextlib import asynccontextmanager

import psutil
import pytest

from miles_agents.agent.background import Background
from miles_agents.store.client import StoreClient
from miles_agents.store.errors import NoMemory, NotAllowedHere, ObjectTooLarge, StoreFull, StoreSilent
from miles_agents.store.node_store import NodeStore, StoreParts
from miles_agents.store.table import Owner
from miles_agents.wire.envelope import Address

ME = Owner("me", "me[0]")
MIB = 1 << 20


@asynccontextmanager
async def store(tmp_path, limit=8 * MIB):
    """A store of its own, without an agent; the worker with the token ``good`` lives."""
    parts = StoreParts(limit, 100, tmp_path / "store", "127.0.0.1")
    workers = {"good": "worker[0]"}
    made = NodeStore(parts, "node-0", Address(1, 0, 7), workers.get)
    made.tasks = Background()
    try:
        yield made
    finally:
        await made.tasks.close()
        made.close()


def client(tmp_path, token="good"):
    return StoreClient(str(tmp_path / "store"), token)


async def on_thread(work, *args):
    async with asyncio.timeout(30):
        return await asyncio.to_thread(work, *args)


def soon():
    import time

    return time.monotonic() + 20


async def test_more_memory_than_the_machine_has_is_an_error_and_kills_nobody(tmp_path):
    memory = psutil.virtual_memory()
    async with store(tmp_path, limit=4 * memory.total) as made:
        with pytest.raises(NoMemory, match="no memory on node-0") as caught:
            await made.room(ME, memory.total, 5.0)
        assert "available" in caught.value.evidence and made.table.total_bytes == 0
        await made.room(ME, MIB, 5.0)
        with pytest.raises(ObjectTooLarge):
            await made.room(ME, 5 * memory.total, 5.0)


async def test_who_gives_up_while_a_segment_is_made_leaves_it_to_others(tmp_path):
    async with store(tmp_path) as made:
        asking = asyncio.create_task(made.room(ME, 8 * MIB, 5.0))
        await asyncio.sleep(0)
        asking.cancel()
        room = await made.room(ME, 8 * MIB, 20.0)
        assert room.segment == 1
        with pytest.raises(StoreFull, match="being written by me"):
            await made.room(ME, MIB, 0.0)


async def test_put_and_get_over_the_socket(tmp_path):
    async with store(tmp_path) as made:
        worker = await on_thread(client, tmp_path)
        (ref,) = await on_thread(worker.put, [{"k": bytes(100_000)}], 1, soon())
        assert (await on_thread(worker.get, ref, soon()))["k"] == bytes(100_000)
        assert made.facts()["objects"] == 1
        made.worker_gone("good")
        with pytest.raises(StoreSilent):
            await on_thread(worker.remove, [ref], soon())
        assert made.facts()["objects"] == 1
        await on_thread(worker.close)


async def test_without_the_token_of_a_living_worker_nobody_gets_in(tmp_path):
    async with store(tmp_path) as made:
        for token in ("bad", "", "good2"):
            with pytest.raises(NotAllowedHere):
                await on_thread(client, tmp_path, token)
        assert made.door.num_refused == 3


async def test_after_the_end_nothing_is_open(tmp_path):
    async with store(tmp_path) as made:
        worker = await on_thread(client, tmp_path)
        await on_thread(worker.put, [bytes(MIB)], 1, soon())
        assert made.files and "store" in os.listdir(tmp_path)
        await on_thread(worker.close)
    assert not made.files and os.listdir(tmp_path) == []
    with pytest.raises((StoreSilent, NotAllowedHere)):
        await on_thread(client, tmp_path)
    made.worker_gone("good")
