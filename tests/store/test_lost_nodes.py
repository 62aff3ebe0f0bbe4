"""Nodes that are lost while they hold, give or fetch objects: what was copied is found, and the rest is told."""

import asyncio
import signal

import pytest
from support.cluster import DEADLINE_S, SHORT, error_of, kill, real_cluster
from support.store_cluster import MIB, keepers, segments_anywhere, store_of, until_store

from miles_agents.store import ObjectLost
from miles_agents.store.errors import PullFailed

pytestmark = [pytest.mark.asyncio, pytest.mark.full]


async def test_copies_outlive_the_agent_of_their_home(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=3, store_bytes=64 * MIB) as cluster:
        (here, _), (there, _), (third, _) = await keepers(cluster, 3)
        kept = await here.put_array.call_one(1 << 20, 4, 2)
        lost = await here.put_array.call_one(1 << 20, 5)
        seen = await here.put_array.call_one(1 << 20, 6)
        assert await there.keep.call_one("seen", seen) == 6 << 20
        kill(cluster.agent("node-0"))
        await cluster.event("node_dead", "node-0")
        for reader in (there, third):
            assert await reader.keep.call_one("kept", kept) == 4 << 20
        assert await third.keep.call_one("seen", seen) == 6 << 20
        error = await error_of(third.get.call_one(lost), ObjectLost)
        assert "node-0" in error.what and "reaper" in error.evidence and "asked: 1 nodes" in error.evidence
        for worker in (there, third):
            for name in ("kept", "seen"):
                await worker.keep.call_one(name, kept)
        await there.remove.call_one(kept)
        await third.remove.call_one(seen)
        for worker in (there, third):
            await worker.let_go.call_one("kept")
            await worker.let_go.call_one("seen")
        for node in ("node-1", "node-2"):
            await until_store(cluster, lambda s: not (s["objects"] or s["used_bytes"]), node)
        await error_of(there.get.call_one(kept), ObjectLost)
    assert segments_anywhere() == []


@pytest.mark.parametrize("round_number", range(3))
async def test_a_home_that_is_killed_while_it_is_read(tmp_path_factory, round_number):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2, store_bytes=300 * MIB) as cluster:
        (here, _), (there, other) = await keepers(cluster, 2)
        ref = await here.put_zeros.call_one(256 * MIB, 1)
        reading = there.summary.call_one(ref)
        await until_store(cluster, lambda s: s["used_bytes"] >= 256 * MIB, "node-1")
        for _ in range(10 * round_number):
            await store_of(cluster, "node-1")
        kill(cluster.agent("node-0"))
        try:
            assert await asyncio.wait_for(reading, DEADLINE_S) == [256 * MIB, 1, 1]
        except (ObjectLost, PullFailed):
            await until_store(cluster, lambda s: not s["used_bytes"], "node-1")
        assert await other.many.call_one(3, 100) == [[n, 100, n] for n in range(3)]
    assert segments_anywhere() == []


async def test_an_agent_that_is_killed_while_it_reads(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2, store_bytes=300 * MIB) as cluster:
        (here, _), (there, _) = await keepers(cluster, 2)
        ref = await here.put_zeros.call_one(256 * MIB, 1)
        reading = there.summary.call_one(ref)
        await until_store(cluster, lambda s: s["holders"] >= 1)
        kill(cluster.agent("node-1"))
        await error_of(reading, Exception)
        await until_store(cluster, lambda s: not s["holders"])
        assert await here.summary.call_one(ref) == [256 * MIB, 1, 1]
        await here.remove.call_one(ref)
        await until_store(cluster, lambda s: not s["used_bytes"])
    assert segments_anywhere() == []


async def test_a_node_that_was_fenced_begins_with_an_empty_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    async with real_cluster(path, num_nodes=2, store_bytes=64 * MIB, timings=SHORT) as cluster:
        (here, _), (there, _) = await keepers(cluster, 2)
        lost = await here.put_array.call_one(1 << 20, 1)
        kept = await here.put_array.call_one(1 << 20, 2, 2)
        kill(cluster.agent("node-0"), signal.SIGSTOP)
        await cluster.event("node_dead", "node-0")
        assert await there.keep.call_one("kept", kept) == 2 << 20
        await error_of(there.get.call_one(lost), ObjectLost)
        kill(cluster.agent("node-0"), signal.SIGCONT)
        await cluster.controller.wait_for_nodes("node-0", timeout_s=DEADLINE_S)
        found = await store_of(cluster, "node-0")
        assert found["objects"] == found["held_bytes"] == 0
        error = await error_of(there.get.call_one(lost), ObjectLost)
        assert "node-0 ended" in error.evidence
        assert (await cluster.event("object_lost", "node-1")).text.startswith("object 1 of node-0")
