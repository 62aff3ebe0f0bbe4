"""Objects between nodes, with real agents: fetched once, removed everywhere, found where their home is gone."""

import asyncio

import pytest
import pytest_asyncio
from support.cluster import DEADLINE_S, error_of, real_cluster
from support.procs import eventually
from support.store_cluster import MIB, keepers, store_of, until_store

from miles_agents.rpc.guard import NotYourOrder
from miles_agents.store import ObjectLost
from miles_agents.store.errors import NoSecondNode, ObjectRemoved, ObjectTooLarge, PullFailed, UnknownObject
from miles_agents.store.ref import Key, Ref

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2, store_bytes=128 * MIB) as cluster:
        cluster.workers = await keepers(cluster, 2)
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def workers(cluster):
    yield cluster.workers
    for node in ("node-0", "node-1"):
        await until_store(cluster, lambda s: not (s["objects"] or s["holders"] or s["used_bytes"]), node)


async def fetched(cluster, node="node-1"):
    return (await store_of(cluster, node))["fetched"]


@pytest.mark.parametrize("nbytes", [1, 100_000, 5 * MIB, 40 * MIB + 7])
async def test_a_value_comes_from_another_node_and_goes_everywhere(cluster, workers, nbytes):
    (here, _), (there, _) = workers
    ref = await here.put_zeros.call_one(nbytes, 9)
    assert await there.summary.call_one(ref) == [nbytes, 9, 9]
    assert (await store_of(cluster, "node-1"))["objects"] == 1
    await there.remove.call_one(ref)
    await error_of(here.get.call_one(ref), ObjectRemoved)
    await error_of(there.get.call_one(ref), ObjectRemoved)


async def test_readers_of_a_node_share_one_fetch(cluster, workers):
    (here, _), (first, second) = workers
    before = await fetched(cluster)
    ref = await here.put_array.call_one(4 << 20, 2)
    sums = await asyncio.gather(*(worker.keep.call_one("big", ref) for worker in (first, second, first, second)))
    assert sums == [8 << 20] * 4
    assert await fetched(cluster) == before + 1
    assert await first.change_kept.call_one("big", 1) == 4 << 20
    assert await second.sum_kept.call_one("big") == 8 << 20
    await here.remove.call_one(ref)
    assert await second.sum_kept.call_one("big") == 8 << 20
    await asyncio.gather(first.let_go.call_one("big"), second.let_go.call_one("big"))


async def test_only_the_parts_that_are_read_are_fetched(cluster, workers):
    (here, _), (there, _) = workers
    refs = await here.put_parts.call_one([bytes([n]) * MIB for n in range(6)])
    found = await there.summary.call_one(refs[4])
    assert found == [MIB, 4, 4]
    assert (await store_of(cluster, "node-1"))["used_bytes"] < 2 * MIB
    for ref in refs:
        await there.remove.call_one(ref)


async def test_a_copy_is_there_when_put_returns_if_asked_for(cluster, workers):
    (here, _), (there, _) = workers
    ref = await here.put_array.call_one(100_000, 3, 2)
    assert (await store_of(cluster, "node-1"))["objects"] == 1
    before = await fetched(cluster)
    assert await there.keep.call_one("copy", ref) == 300_000
    assert await fetched(cluster) == before
    await there.let_go.call_one("copy")
    await here.remove.call_one(ref)


async def test_more_copies_than_nodes_are_refused_and_nothing_is_left(workers):
    error = await error_of(workers[0][0].put_array.call_one(1000, 1, 3), NoSecondNode)
    assert "1 other nodes" in str(error)


async def test_errors_of_other_nodes_are_told(cluster, workers):
    (here, _), (there, _) = workers
    ref = await here.put.call_one([1])
    await error_of(there.get.call_one(Ref(ref.home, ref.key._replace(number=10**6), ref.nbytes)), UnknownObject)
    await error_of(there.get.call_one(Ref(ref.home, ref.key, ref.nbytes + 1)), PullFailed)
    await error_of(there.get.call_one(Ref(ref.home, ref.key, 10**12)), ObjectTooLarge)
    error = await error_of(there.get.call_one(Ref("node-9", Key(77, 5, 1), 100)), ObjectLost)
    assert "node-9" in error.what
    await here.remove.call_one(ref)


async def test_only_agents_may_ask_agents_for_objects(workers):
    (here, _), _ = workers
    ref = await here.put.call_one([1])
    error = await error_of(here.order_agent.call_one("store_offer", ref.to_plain(), "me"), NotYourOrder)
    assert "store_offer" in error.what
    await here.remove.call_one(ref)


async def test_many_objects_at_once(cluster, workers):
    (here, _), (first, second) = workers
    refs = await asyncio.gather(*(here.put_zeros.call_one(MIB + n, n) for n in range(50)))
    found = await asyncio.gather(*((first, second)[n % 2].summary.call_one(ref) for n, ref in enumerate(refs)))
    assert found == [[MIB + n, n, n] for n in range(50)]
    await asyncio.gather(*(first.remove.call_one(ref) for ref in refs))


async def test_nobody_can_connect_while_nothing_is_offered(cluster, workers):
    import psutil

    (here, _), (there, _) = workers
    ref = await here.put_zeros.call_one(MIB)
    await there.summary.call_one(ref)
    agent = psutil.Process(cluster.agent("node-0"))

    def listening():
        return [c.laddr for c in agent.net_connections("tcp") if c.status == psutil.CONN_LISTEN]

    await eventually(lambda: not listening(), DEADLINE_S, what="the end of the listener")
    await here.remove.call_one(ref)
