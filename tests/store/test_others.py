"""Objects between stores, when others are silent, gone, or fail half way: nothing is kept that nobody knows of."""

import asyncio

import pytest
from support.procs import eventually
from support.store_peers import INCARNATION, silent, stores

from miles_agents.errors import PeerFault
from miles_agents.rpc.errors import NodeLost
from miles_agents.store import ObjectLost, messages
from miles_agents.store.errors import NoSecondNode, ObjectRemoved, PullFailed
from miles_agents.store.ref import Key, Ref

DATA = bytes(range(256)) * 1000
LONG_S = 20.0
DEADLINE_S = 20.0


def broken():
    return PeerFault("it broke", evidence="a test", advice="")


def gone():
    return NodeLost("it ended", evidence="a test", advice="", node="node-0", may_have_run=True)


async def until(condition):
    await eventually(condition, DEADLINE_S, what="the other store")


# -- copies of a put that nobody was told of ---------------------------------------------------------------------


async def test_a_put_that_finds_too_few_nodes_leaves_no_copies(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, *others = network.nodes
        network.failing = {(node.name, "store_fetch"): [broken()] for node in others[:1]}
        with pytest.raises(NoSecondNode):
            await here.put(DATA, copies=3)
        assert sum(node.others.num_fetched for node in others) == 1
        await until(lambda: not any(node.num_objects for node in network.nodes))


async def test_a_put_whose_producer_dies_leaves_no_copies(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, there, other = network.nodes
        await network.freeze(other.name)
        putting = asyncio.create_task(here.put(DATA, copies=3))
        await until(lambda: there.num_objects)
        putting.cancel()
        await until(lambda: not there.num_objects)
        await network.thaw(other.name)
        await until(lambda: not any(node.num_objects for node in network.nodes))


async def test_a_put_whose_answer_is_not_taken_leaves_no_copies(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        await here.put(DATA, copies=2)
        assert there.num_objects == 1
        here.store.not_taken(here.visitor, [messages.COMMIT])
        await until(lambda: not there.num_objects and not here.num_objects)


# -- removals ----------------------------------------------------------------------------------------------------


async def test_a_removal_goes_on_without_whoever_asked_for_it(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA, copies=2)
        await network.freeze(there.name)
        removing = asyncio.create_task(here.store.answer(here.visitor, [messages.REMOVE, [ref.to_plain()]]))
        await until(lambda: network.times_asked(there.name, "store_drop"))
        removing.cancel()
        await asyncio.wait([removing])
        await network.thaw(there.name)
        await until(lambda: not there.has(ref))
        await until(lambda: not here.others.removals.places(ref.key))


async def test_a_node_that_was_not_told_to_drop_is_told_again(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA, copies=2)
        network.failing[there.name, "store_drop"] = [silent()]
        await here.others.remove([ref])
        assert not there.has(ref)


async def test_where_a_copy_is_stays_known_until_it_is_dropped(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA, copies=2)
        network.failing[there.name, "store_drop"] = [broken()]
        await here.others.remove([ref])
        assert there.has(ref) and here.others.removals.places(ref.key) == [there.place]
        await here.others.remove([ref])
        assert not there.has(ref) and here.others.removals.places(ref.key) == []


async def test_a_removal_from_afar_reaches_the_home_and_its_copies(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, there, _ = network.nodes
        ref = await here.put(DATA, copies=3)
        network.failing[here.name, "store_remove"] = [silent()]
        await there.store.answer(there.visitor, [messages.REMOVE, [ref.to_plain()]])
        assert not any(node.has(ref) for node in network.nodes)


async def test_copies_of_a_node_that_is_gone_are_removed_and_forgotten(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, there, other = network.nodes
        ref = await here.put(DATA, copies=3)
        kept = await here.put(DATA, copies=2)
        await network.end(there.name)
        await here.others.remove([ref])
        assert here.others.removals.places(ref.key) == [] and not other.has(ref)
        await network.end(here.name)
        await other.others.remove([kept])
        assert not other.has(kept)


# -- who has a copy ----------------------------------------------------------------------------------------------


async def test_a_copy_is_found_with_a_node_that_answers_late(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, there, reader = network.nodes
        ref = await here.put(DATA)
        await there.others.fetch(ref, LONG_S)
        await network.end(here.name)
        network.failing[there.name, "store_has"] = [silent()]
        await reader.others.fetch(ref, LONG_S)
        assert reader.has(ref) and network.reports == []


async def test_an_object_is_not_called_lost_while_a_node_has_not_answered(tmp_path):
    async with stores(tmp_path, 4) as network:
        here, there, reader, _ = network.nodes
        ref = await here.put(DATA)
        await there.others.fetch(ref, LONG_S)
        await network.end(here.name)
        await network.freeze(there.name)
        with pytest.raises(PullFailed) as caught:
            await reader.others.fetch(ref, 0.2)
        assert "node-1 did not say" in caught.value.evidence and "node-3" not in caught.value.evidence
        await network.thaw(there.name)
        await reader.others.fetch(ref, LONG_S)
        await network.end(there.name)
        await network.end(reader.name)
        with pytest.raises(ObjectLost, match="asked: 0 nodes"):
            await network.nodes[3].others.fetch(ref, LONG_S)
        assert network.reports == ["object_lost"]


async def test_a_silent_node_that_ends_has_no_copy(tmp_path):
    async with stores(tmp_path, 3) as network:
        here, there, reader = network.nodes
        ref = await here.put(DATA)
        await network.end(here.name)
        await network.freeze(there.name)
        reading = asyncio.create_task(reader.others.fetch(ref, LONG_S))
        await until(lambda: network.times_asked(there.name, "store_has"))
        await network.end(there.name)
        with pytest.raises(ObjectLost):
            await reading


# -- how long readers wait ---------------------------------------------------------------------------------------


async def test_a_fetch_waits_for_its_turn_as_long_as_its_reader_does(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        await there.others.fetch(ref, 500.0)
        (timeout_s,) = [seconds for _, order, seconds in network.asked if order == "store_offer"]
        assert 400.0 < timeout_s <= 500.0


async def test_a_reader_that_shares_a_fetch_has_its_own_time(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        await network.freeze(here.name)
        hasty = asyncio.create_task(there.others.fetch(ref, 0.2))
        await until(lambda: network.times_asked(here.name, "store_offer"))
        patient = [asyncio.create_task(there.others.fetch(ref, LONG_S)) for _ in range(2)]
        with pytest.raises(PullFailed):
            await hasty
        await network.thaw(here.name)
        await asyncio.gather(*patient)
        assert there.has(ref) and there.others.num_fetched == 1


@pytest.mark.parametrize("error", [RuntimeError("a fault"), OSError("another")], ids=repr)
async def test_every_reader_of_a_fetch_that_fails_is_told_why(tmp_path, error):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        await network.freeze(here.name)
        network.failing[here.name, "store_offer"] = [error]
        reading = [asyncio.create_task(there.store.hold(ref, n, there.visitor.me, LONG_S)) for n in range(2)]
        await until(lambda: network.times_asked(here.name, "store_offer"))
        reading.append(asyncio.create_task(there.store.hold(ref, 2, there.visitor.me, LONG_S - 10)))
        await asyncio.gather(network.thaw(here.name), *reading, return_exceptions=True)
        found = [task.exception() for task in reading[::2]]
        assert [type(one) for one in found] == [PullFailed] * 2 and str(error) in found[0].evidence


# -- copies that their home does not know of ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [silent(), broken()], ids=["silent", "broken"])
async def test_a_copy_that_its_home_may_not_know_of_is_dropped(tmp_path, error):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        network.failing[here.name, "store_fetched"] = [error]
        with pytest.raises(PeerFault):
            await there.others.fetch(ref, 5.0)
        assert not there.has(ref) and not there.store.facts()["used_bytes"]


async def test_a_copy_whose_home_is_gone_is_kept(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        network.failing[here.name, "store_fetched"] = [gone()]
        await there.others.fetch(ref, LONG_S)
        assert there.has(ref)


async def test_what_is_removed_while_it_is_fetched_is_not_kept(tmp_path):
    async with stores(tmp_path, 2) as network:
        here, there = network.nodes
        ref = await here.put(DATA)
        await network.freeze(here.name)
        reading = asyncio.create_task(there.others.fetch(ref, LONG_S))
        await until(lambda: network.times_asked(here.name, "store_offer"))
        await there.others.drop([list(ref.key)])
        await network.thaw(here.name)
        with pytest.raises(ObjectRemoved):
            await reading
        assert not there.has(ref)


async def test_a_reference_to_nothing_is_lost(tmp_path):
    async with stores(tmp_path, 2) as network:
        with pytest.raises(ObjectLost):
            await network.nodes[0].others.fetch(Ref("node-9", Key(9, INCARNATION, 1), 10), LONG_S)
