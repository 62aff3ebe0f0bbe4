"""The store between workers of one node, with a real agent: values, isolation, reuse, room, errors."""

import asyncio
import time

import numpy as np
import pytest
import pytest_asyncio
import torch
from support.cluster import DEADLINE_S, error_of, real_cluster
from support.procs import eventually
from support.store_actors import Keeper
from support.store_cluster import MIB, store_of, until_store

from miles_agents.rpc.errors import NotAnActorProcess
from miles_agents.store import Ref, StoreFull
from miles_agents.store.errors import (
    BadStoreArgument,
    NoStoreHere,
    NotAllowedHere,
    ObjectRemoved,
    ObjectTooLarge,
    UnknownObject,
)
from miles_agents.store.ref import Key
from miles_agents.wire.codec import CannotTravel

pytestmark = pytest.mark.asyncio(loop_scope="module")
POOL = 64 * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), store_bytes=POOL) as cluster:
        cluster.mesh = await cluster.controller.spawn("keepers", Keeper, dims={"gpus": 3})
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def trio(cluster):
    """Three workers; afterwards the store is as empty as before."""
    yield [cluster.mesh.slice(gpus=rank) for rank in range(3)]
    await until_store(cluster, lambda s: not (s["objects"] or s["holders"] or s["used_bytes"] or s["waiting"]))


async def there_and_back(trio, value):
    ref = await trio[0].put.call_one(value)
    assert isinstance(ref, Ref) and ref.home == "node-0"
    found = await trio[1].get.call_one(ref)
    await trio[2].remove.call_one(ref)
    return found


@pytest.mark.parametrize("value", [None, 7, "text", b"", b"x" * 200_000, [1, [2.5, ("a", {3})]], {"k": {"l": None}}])
async def test_plain_values(trio, value):
    assert await there_and_back(trio, value) == value


@pytest.mark.parametrize("dtype", ["<f8", "<f2", "|b1", "<c16", "<U5", "<M8[ns]", ">i4"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 70)])
async def test_arrays(trio, dtype, shape):
    value = np.zeros(shape, dtype)
    found = await there_and_back(trio, {"a": [value]})
    assert found["a"][0].dtype == value.dtype and found["a"][0].shape == shape
    assert np.array_equal(found["a"][0], value)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (200, 90)])
async def test_tensors(trio, name, shape):
    value = torch.randint(0, 2, shape).to(getattr(torch, name))
    found = await there_and_back(trio, ["deep", {"t": (value, 1)}])
    tensor = found[1]["t"][0]
    assert tensor.dtype == value.dtype and tensor.shape == value.shape
    assert tensor.view(torch.uint8).equal(value.view(torch.uint8)) if value.ndim else tensor.item() == value.item()


async def test_arrays_that_do_not_lie_in_order(trio):
    base = np.arange(60_000).reshape(200, 300)
    grid = torch.arange(60_000, dtype=torch.bfloat16).reshape(200, 300)
    value = {
        "t": base.T,
        "s": base[::2, 3:],
        "r": base[::-1],
        "tt": grid.t(),
        "ts": grid[:, ::3],
        "e": grid.expand(2, 200, 300),
    }
    found = await trio[0].on_loop.call_one(value)  # arguments are put in order on the way there
    for name, want in value.items():
        assert (found[0][name] == want).all() and found[0][name].shape == want.shape
    found = await trio[0].odd_arrays.call_one()
    assert found == [True] * 6


async def test_what_a_reader_changes_is_its_own(trio):
    first, second, third = trio
    ref = await first.put_array.call_one(1 << 20, 1)
    assert await second.keep.call_one("mine", ref) == 1 << 20
    assert await third.keep.call_one("mine", ref) == 1 << 20
    assert await second.change_kept.call_one("mine", 5) == 5 << 20
    assert await third.sum_kept.call_one("mine") == 1 << 20
    assert await first.keep.call_one("mine", ref) == 1 << 20
    await asyncio.gather(*(worker.let_go.call_one("mine") for worker in trio))
    await first.remove.call_one(ref)


async def test_a_mapping_that_is_used_again_has_nothing_of_its_last_reader(cluster, trio):
    first, second, _ = trio
    for round_number in range(4):
        ref = await first.put_array.call_one(1 << 20, round_number)
        assert await second.keep.call_one("mine", ref) == round_number << 20
        await second.change_kept.call_one("mine", 77)
        await first.remove.call_one(ref)
        await second.let_go.call_one("mine")
        await until_store(cluster, lambda s: not s["holders"])


async def test_segments_are_used_again(cluster, trio):
    before = (await store_of(cluster))["held_bytes"]
    for _ in range(10):
        ref = await trio[0].put_zeros.call_one(5 * MIB)
        await trio[0].remove.call_one(ref)
    assert (await store_of(cluster))["held_bytes"] <= before + 6 * MIB


async def test_a_removed_object_lives_for_as_long_as_it_is_mapped(cluster, trio):
    first, second, third = trio
    ref = await first.put_array.call_one(1 << 20, 3)
    await second.keep.call_one("held", ref)
    await first.remove.call_one(ref)
    assert isinstance(await error_of(third.keep.call_one("x", ref), ObjectRemoved), ObjectRemoved)
    others = [await first.put_array.call_one(1 << 20, 9) for _ in range(3)]
    assert await second.sum_kept.call_one("held") == 3 << 20
    await second.let_go.call_one("held")
    for other in others:
        await first.remove.call_one(other)


async def test_parts_are_objects_of_their_own(cluster, trio):
    refs = await trio[0].put_parts.call_one([np.full(50_000, n) for n in range(4)])
    assert len({ref.key for ref in refs}) == 4
    await trio[1].remove.call_one(refs[0])
    sums = [await trio[n % 3].keep.call_one("part", ref) for n, ref in enumerate(refs) if n]
    assert sums == [50_000 * n for n in (1, 2, 3)]
    await error_of(trio[1].keep.call_one("part", refs[0]), ObjectRemoved)
    for worker in trio:
        await worker.let_go.call_one("part")
    for ref in refs:
        await trio[2].remove.call_one(ref)


async def test_removing_twice_is_nothing(trio):
    ref = await trio[0].put.call_one([1])
    await trio[1].remove.call_one(ref)
    await trio[2].remove.call_one(ref)


async def test_a_full_store_makes_wait_and_then_names_the_holders(cluster, trio):
    first, second, third = trio
    ref = await first.put_zeros.call_one(40 * MIB)
    await second.summary.call_one(ref)
    error = await error_of(third.put_zeros.call_one(40 * MIB, 0, 0.5), StoreFull)
    assert error.code == "E-STORE-003" and "keepers[0]" in error.evidence and "40.0 MiB" in str(error)
    assert isinstance(error, TimeoutError)
    waiting = third.put_zeros.call_one(40 * MIB, 8)
    await until_store(cluster, lambda s: s["waiting"] == 1)
    await first.remove.call_one(ref)
    other = await waiting
    assert await first.summary.call_one(other) == [40 * MIB, 8, 8]
    await first.remove.call_one(other)


async def test_the_error_names_who_maps_what_was_removed(trio):
    first, second, third = trio
    ref = await first.put_array.call_one(5 << 20, 1)
    await second.keep.call_one("held", ref)
    await first.remove.call_one(ref)
    error = await error_of(third.put_zeros.call_one(40 * MIB, 0, 0.3), StoreFull)
    assert "mapped by keepers[1]" in error.evidence and "removed" in error.evidence
    await second.let_go.call_one("held")


async def test_what_can_never_fit_is_refused_at_once(trio):
    at = time.monotonic()
    error = await error_of(trio[0].put_zeros.call_one(POOL + 1), ObjectTooLarge)
    assert "64.0 MiB" in str(error) and time.monotonic() - at < 15


async def test_a_cancelled_put_waits_for_nothing(cluster, trio):
    ref = await trio[0].put_zeros.call_one(60 * MIB)
    await trio[1].cancel_a_put.call_one(60 * MIB)
    await trio[0].remove.call_one(ref)
    await until_store(cluster, lambda s: not s["used_bytes"])


async def test_event_loops_use_the_async_verbs(trio):
    value = {"n": [1, 2], "a": np.arange(100_000)}
    again, refusal = await trio[0].on_loop.call_one(value)
    assert (again["a"] == value["a"]).all() and again["n"] == [1, 2]
    assert "put_async" in refusal and "E-STORE-002" in refusal


async def test_many_at_once(trio):
    found = await asyncio.gather(*(worker.many.call_one(50, 70_000) for worker in trio))
    assert found == [[[n, 70_000, n % 256] for n in range(50)]] * 3


async def test_unknown_references_and_bad_arguments(trio):
    ref = await trio[0].put.call_one(1)
    strange = Ref(ref.home, Key(ref.key.rank, ref.key.incarnation, 10**9), 100)
    await error_of(trio[0].get.call_one(strange), UnknownObject)
    await error_of(trio[0].put.call_one(1, 0), BadStoreArgument)
    await error_of(trio[0].get.call_one("no ref"), BadStoreArgument)
    await trio[0].remove.call_one(ref)


async def test_what_cannot_travel_is_refused_with_the_path_to_it(trio):
    error = await error_of(trio[0].put_untransportable.call_one(), CannotTravel)
    assert "value['deep'][1]" in error.what


STRANGE = [["alloc", -1, 1.0], ["commit", 99, [[0, 1]], 1, 1.0], ["what"], ["get", 1, [], 1.0], ["alloc", 1, "x"]]


@pytest.mark.parametrize("question", STRANGE)
async def test_strange_questions_are_refused_and_harm_nobody(trio, question):
    await error_of(trio[0].ask_raw.call_one(question), NotAllowedHere)
    assert await there_and_back(trio, [1]) == [1]


async def test_other_threads_go_on_while_a_large_object_is_put(trio):
    assert await trio[0].longest_beat_gap.call_one(50 * MIB) < 5.0


async def test_a_forked_process_has_mappings_of_its_own(cluster, trio):
    ref = await trio[0].put_array.call_one(100_000, 1)
    assert await trio[1].sum_in_child.call_one(ref) == [200_000 % 256, 100_000]
    assert (await until_store(cluster, lambda s: s["holders"] < 2))["holders"] == 1, "the child spoke for its parent"
    await trio[1].let_go.call_one("forked")
    await trio[0].remove.call_one(ref)


async def test_the_run_is_told_of_a_full_store(cluster, trio):
    ref = await trio[0].put_zeros.call_one(60 * MIB)
    await error_of(trio[1].put_zeros.call_one(60 * MIB, 0, 0.1), StoreFull)
    told = await cluster.event("store_full", "node-0")
    assert "60.0 MiB" in told.fields["evidence"] or "MiB" in told.text
    await trio[0].remove.call_one(ref)


async def test_the_status_shows_the_store(cluster, trio):
    ref = await trio[0].put_zeros.call_one(3 * MIB)
    found = await store_of(cluster)
    assert found["objects"] == 1 and found["limit_bytes"] == POOL and "keepers[0]" in found["segments"][0]

    def seen():
        return (cluster.controller.status()["nodes"][0].get("store") or {}).get("objects") == 1

    await eventually(seen, DEADLINE_S, what="the beat that tells of the object")
    await trio[0].remove.call_one(ref)


async def test_outside_of_a_worker_there_is_no_store():
    from miles_agents import store

    with pytest.raises(NoStoreHere, match="not a worker"):
        await store.put_async(1)
    assert not issubclass(NoStoreHere, NotAnActorProcess)
