"""The store's shell in the agent: what the kernel refuses, what comes too late, what is left at the end."""

import asyncio
import os
import socket
from contextlib import asynccontextmanager

import psutil
import pytest
from support.procs import eventually, no_descriptors

from miles_agents.agent.background import Background
from miles_agents.store.client import Connection, StoreClient, leave_to_parent
from miles_agents.store.door import StoreDoor
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


async def test_a_connection_that_is_closed_is_over_although_a_child_has_it_too(tmp_path):
    async with store(tmp_path) as made:
        asking = await on_thread(Connection, str(tmp_path / "store"), "good", 1)
        with socket.socket(fileno=os.dup(asking.channel.fileno())):  # as after a fork
            _, fd = await on_thread(asking.ask, ["alloc", MIB, 5.0], 5.0)
            os.close(fd)
            assert made.facts()["used_bytes"]
            asking.close()
            await eventually(lambda: not made.facts()["used_bytes"], what="what was allocated to be free")


async def test_a_child_closes_what_it_has_of_its_parents_questions_and_keeps_what_stands_for_its_mappings(tmp_path):
    async with store(tmp_path):
        worker = await on_thread(client, tmp_path)
        asking = await on_thread(Connection, str(tmp_path / "store"), "good", 1)
        pid = os.fork()
        if not pid:
            leave_to_parent()
            closed, anchor = asking.channel.fileno(), worker._anchor
            del worker
            os._exit(0 if closed == -1 and anchor.channel.fileno() >= 0 else 1)
        _, status = await on_thread(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        (ref,) = await on_thread(worker.put, [1], 1, soon())
        await on_thread(asking.ask, ["remove", [ref.to_plain()]], 5.0)
        asking.close()
        await on_thread(worker.close)


class Forgetful:
    """A desk that fails at the first times it is told that mappings are gone."""

    def __init__(self, failures):
        self.failures, self.told = failures, []

    def owner_of(self, token, process):
        return ME

    async def answer(self, visitor, question):
        if self.failures:
            self.failures -= 1
            raise StoreSilent("no", evidence="not now", advice="again")
        self.told.append(question)
        return [], None

    def not_taken(self, visitor, question):
        pass

    def left(self, visitor):
        pass


async def test_mappings_that_are_gone_are_told_again_until_they_are_heard_of(tmp_path):
    tasks, desk = Background(), Forgetful(failures=4)
    door = StoreDoor(tmp_path / "store", desk, lambda: tasks)
    worker = await on_thread(client, tmp_path)
    try:
        worker._on_gone((0, 0), None, 17)
        await eventually(lambda: desk.told == [["release", [17]]], what="the end of the mapping to be told")
        assert desk.failures == 0
    finally:
        await on_thread(worker.close)
        await tasks.close()
        door.close()


async def test_without_descriptors_the_door_pauses_and_goes_on(tmp_path, caplog):
    async with store(tmp_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as knocking:
            with no_descriptors():
                knocking.connect(str(tmp_path / "store"))
                for _ in range(200):
                    await asyncio.sleep(0)
            assert len([r for r in caplog.records if "can let nobody in" in r.message]) == 1
        worker = await on_thread(client, tmp_path)
        await on_thread(worker.close)
