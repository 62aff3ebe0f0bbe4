"""Whoever is killed, at whatever moment: no segment stays behind, and nothing that was committed is lost."""

import asyncio

import pytest
from support.cluster import DEADLINE_S, error_of, kill, real_cluster
from support.procs import eventually
from support.store_actors import Keeper
from support.store_cluster import MIB, segments_anywhere, store_of, until_store

from miles_agents.rpc.errors import WorkerDied
from miles_agents.store.errors import NotAllowedHere
from miles_controller.policy import Policy

pytestmark = [pytest.mark.asyncio, pytest.mark.full]


async def pair(cluster, name="pair"):
    mesh = await cluster.controller.spawn(name, Keeper, dims={"gpus": 2})
    return mesh, mesh.slice(gpus=0), mesh.slice(gpus=1)


async def test_a_producer_killed_between_room_and_commit_leaves_nothing(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, second = await pair(cluster)
        sign = tmp_path / "half-written"
        writing = first.allocate_only.call_one(48 * MIB, str(sign))
        await eventually(sign.exists, DEADLINE_S)
        assert (await store_of(cluster))["used_bytes"] == 48 * MIB
        kill(await first.pid.call_one())
        await error_of(writing, WorkerDied)
        await until_store(cluster, lambda s: not s["used_bytes"])
        ref = await second.put_zeros.call_one(48 * MIB, 4)
        assert await second.summary.call_one(ref) == [48 * MIB, 4, 4]


async def test_what_a_producer_committed_outlives_it(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, second = await pair(cluster)
        ref = await first.put_zeros.call_one(20 * MIB, 6)
        pid = await first.pid.call_one()
        kill(pid)
        await cluster.event("worker_died", "pair[0]")
        assert await second.summary.call_one(ref) == [20 * MIB, 6, 6]
        assert "put by pair[0]" in (await store_of(cluster))["segments"][0]
        await second.remove.call_one(ref)
        await until_store(cluster, lambda s: not s["used_bytes"])


async def test_a_successor_removes_what_the_dead_put_and_told_nobody_of(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        policy = Policy("restart", backoff_s=0.0)
        mesh = await cluster.controller.spawn("pair", Keeper, dims={"gpus": 2}, policy=policy)
        first, second = mesh.slice(gpus=0), mesh.slice(gpus=1)
        known, *_ = [await first.put_zeros.call_one(5 * MIB, fill) for fill in (1, 2, 3)]
        others = await second.put_zeros.call_one(5 * MIB, 4)
        kill(await first.pid.call_one())
        await cluster.event("worker_restarted", "pair[0]")
        own = await mesh.slice(gpus=0).put_zeros.call_one(5 * MIB, 5)
        assert await mesh.slice(gpus=0).remove_left.call_one([known, others]) == 2
        assert await mesh.slice(gpus=0).remove_left.call_one([known]) == 0
        assert [(await second.summary.call_one(ref))[1] for ref in (known, others, own)] == [1, 4, 5]
        assert len([text for text in (await store_of(cluster))["segments"] if "put by pair" in text]) == 3
        assert await mesh.slice(gpus=0).remove_left.call_one([]) == 1


async def test_the_mappings_of_a_killed_reader_end(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, second = await pair(cluster)
        ref = await first.put_array.call_one(5 << 20, 1)
        await second.keep.call_one("held", ref)
        await first.remove.call_one(ref)
        assert (await store_of(cluster))["holders"] == 1
        waiting = first.put_zeros.call_one(40 * MIB, 2)
        await until_store(cluster, lambda s: s["waiting"] == 1)
        kill(await second.pid.call_one())
        assert await first.summary.call_one(await waiting) == [40 * MIB, 2, 2]
        await until_store(cluster, lambda s: not s["holders"])


async def test_a_killed_putter_that_waits_for_room_waits_no_more(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, second = await pair(cluster)
        ref = await first.put_zeros.call_one(60 * MIB)
        waiting = second.put_zeros.call_one(60 * MIB)
        await until_store(cluster, lambda s: s["waiting"] == 1)
        kill(await second.pid.call_one())
        await error_of(waiting, WorkerDied)
        await until_store(cluster, lambda s: s["waiting"] == 0)
        await first.remove.call_one(ref)
        await until_store(cluster, lambda s: not s["used_bytes"])


async def test_a_killed_agent_leaves_no_segment(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, second = await pair(cluster)
        ref = await first.put_array.call_one(1 << 20, 1)
        await second.keep.call_one("held", ref)
        first.hang_in_get.call_one(ref)
        assert segments_anywhere()
        kill(cluster.agent())
        await asyncio.wait_for(cluster.event("node_dead"), DEADLINE_S)
        await eventually(lambda: not segments_anywhere(), DEADLINE_S, what="the end of all segments")


async def test_a_run_that_ends_leaves_no_segment(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        mesh, first, second = await pair(cluster)
        await second.keep.call_one("held", await first.put_array.call_one(1 << 20, 1))
        await mesh.stop(grace_s=0.2)
        assert (await store_of(cluster))["objects"] == 1, "the object belongs to the run, not to the mesh"
        _, _, other = await pair(cluster, "later")
        assert await other.put.call_one(1)
    assert segments_anywhere() == []


async def test_producers_killed_at_any_moment(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        for round_number in range(6):
            mesh, first, second = await pair(cluster, f"pair{round_number}")
            working = first.many.call_one(1000, 300_000)
            pid = await first.pid.call_one()
            for _ in range(5 * round_number):  # some milliseconds each
                await store_of(cluster)
            kill(pid)
            await error_of(working, WorkerDied)
            assert await second.many.call_one(5, 100) == [[n, 100, n] for n in range(5)]
            await mesh.stop(grace_s=0.2)
        # What was committed the moment before the kill belongs to the run; nothing else is left of the dead.
        found = await until_store(cluster, lambda s: not s["holders"] and not s["waiting"])
        assert found["objects"] <= 6 * 8
        assert not any("being written" in line for line in found["segments"])


async def test_the_dead_are_not_let_in(tmp_path):
    async with real_cluster(tmp_path, store_bytes=64 * MIB) as cluster:
        _, first, _ = await pair(cluster)
        error = await error_of(first.greet_with.call_one("0" * 32), NotAllowedHere)
        assert "token" in str(error)
        assert (await store_of(cluster))["refused"] >= 1
