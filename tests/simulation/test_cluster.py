"""A cluster that works: who can call whom, what belongs to whom, and how it ends. Virtual time."""

import asyncio
from dataclasses import replace

import pytest
from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import Picky, Probe

from miles_agents.agent.errors import AgentRefused
from miles_agents.agent.process_launch import CannotStart
from miles_agents.agent.worker_errors import WorkerNeverReady
from miles_agents.rpc.errors import NoSuchActor
from miles_agents.rpc.inline import InlineExecutors
from miles_agents.simulation import Fate
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Envelope
from miles_agents.worker.runtime import WorkerRuntime
from miles_controller.placement import InfeasiblePlacement

EIGHT = {"hosts": 2, "gpus": 4}


def test_ranks_are_spread_over_the_nodes_and_called_by_coordinate():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            for point, (node, rank, _) in (await mesh.who.call()).items():
                assert node == f"node-{point.hosts}"
                assert rank == 4 * point.hosts + point.gpus
            node, rank, _ = await mesh.slice(hosts=1, gpus=2).who.call_one()
            assert (node, rank) == ("node-1", 6)
            assert list((await mesh.slice(gpus=0).who.call()).shape.ranks) == [0, 4]

    simulate(story)


def test_workers_call_workers_of_their_own_node_and_of_others_by_handles_that_travel():
    async def story():
        async with SimulatedCluster(3) as cluster:
            callers = await cluster.controller.spawn("callers", Probe, dims={"hosts": 3, "gpus": 2})
            callees = await cluster.controller.spawn("callees", Probe, "good day", dims={"hosts": 3, "gpus": 2})
            for _, answers in (await callers.ask.call(callees, "you")).items():
                assert answers == ["good day, you"] * 6
            one = callees.slice(hosts=2, gpus=1)
            for _, answers in (await callers.ask_all.call(one)).items():
                assert answers == [["node-2", 5, callees._info.incarnations[5]]]
            # Every rank of a mesh calls all ranks of its own mesh, itself included, at the same time.
            for _, answers in (await callees.ask.call(callees, "me")).items():
                assert len(answers) == 6

    simulate(story)


def test_the_callee_sees_who_asked():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            assert await mesh.source.call_one() == list(cluster.controller.fabric.node.address)

    simulate(story)


def test_calls_of_a_task_that_outlives_its_call_do_not_inherit_the_deadline_of_that():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            await mesh.options(timeout_s=1.0).greet_later.call_one(mesh, 5.0)
            assert await mesh.greeted.call_one() == ["hello, later"]

    simulate(story)


def test_an_actor_finds_a_mesh_by_name_and_learns_of_names_that_are_none():
    async def story():
        async with SimulatedCluster(2) as cluster:
            seeker = await cluster.controller.spawn("seeker", Probe)
            await cluster.controller.spawn("sought", Probe, dims={"ranks": 3})
            assert len(await seeker.find_and_ask.call_one("sought")) == 3
            assert isinstance(await outcome(seeker.find_and_ask.call_one("nobody")), NoSuchActor)

    simulate(story)


def test_a_mesh_that_is_being_started_cannot_be_found_yet():
    async def story():
        async with SimulatedCluster(1) as cluster:
            seeker = await cluster.controller.spawn("seeker", Probe)
            spawning = asyncio.create_task(cluster.controller.spawn("late", Probe))
            await asyncio.sleep(0.005)
            assert "still being started" in str(await outcome(seeker.find_and_ask.call_one("late")))
            assert cluster.controller.find_mesh("late") is None
            await spawning
            assert len(await seeker.find_and_ask.call_one("late")) == 1

    simulate(story)


def test_devices_are_used_once_and_free_again_after_the_stop():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            spawn = cluster.controller.spawn
            first = await spawn("first", Probe, dims={"ranks": 4})
            assert isinstance(await outcome(spawn("second", Probe)), InfeasiblePlacement)
            await first.stop()
            assert cluster.living == []
            second = await spawn("second", Probe, dims={"ranks": 4})
            slots = {(worker.birth.node, worker.spec.devices) for worker in cluster.living}
            assert len(slots) == len(second) == 4

    simulate(story)


def test_calls_on_a_mesh_that_was_stopped_fail_at_once():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            await mesh.stop()
            began = cluster.now
            assert isinstance(await outcome(mesh.greet.call_one("x")), NoSuchActor)
            assert cluster.now - began < 0.01

    simulate(story)


def test_a_constructor_that_raises_leaves_nothing_behind():
    async def story():
        async with SimulatedCluster(2) as cluster:
            error = await outcome(cluster.controller.spawn("m", Picky, 3, dims={"hosts": 2, "gpus": 2}))
            assert isinstance(error, ValueError)
            assert "rank 3 is not wanted" in str(error)
            assert cluster.living == []
            assert len(cluster.controller.inventory().get("node-0").free) == 8
            await cluster.controller.spawn("m", Probe)

    simulate(story)


def start_with_fate(fate, **options):
    """Spawn three ranks of which the last has this fate; returns the error."""
    found = []

    async def story():
        async with SimulatedCluster(2) as cluster:
            for node in cluster.nodes.values():
                node.starter.fate = lambda spec: fate if spec.rank == 2 else Fate.LIVES
            found.append(await outcome(cluster.controller.spawn("m", Probe, dims={"ranks": 3}, **options)))
            assert cluster.living == []
            assert cluster.controller.find_mesh("m") is None

    simulate(story)
    return found[0]


def test_a_worker_that_dies_before_hello_fails_the_spawn():
    error = start_with_fate(Fate.DIES_BEFORE_HELLO)
    assert isinstance(error, WorkerNeverReady)
    assert "exit code 1" in error.what


def test_a_worker_that_cannot_be_started_fails_the_spawn():
    assert isinstance(start_with_fate(Fate.CANNOT_START), CannotStart)


def test_a_worker_that_never_says_hello_is_killed_when_its_time_is_up():
    error = start_with_fate(Fate.NEVER_GREETS, start_timeout_s=7.0)
    assert isinstance(error, WorkerNeverReady)
    assert "did not say hello in time" in error.what


def test_goodbye_is_orderly():
    async def story():
        cluster = SimulatedCluster(2)
        async with cluster:
            await cluster.controller.spawn("m", Probe, dims=EIGHT)
            workers = cluster.living
        assert all(worker.gone_at is not None for worker in workers)
        for node in cluster.nodes.values():
            assert not node.is_running
            assert [life.over.orderly for life in node.lives] == [True]
        kinds = {event.kind for event in cluster.controller.events.history}
        assert "node_gone" in kinds
        assert not kinds & {"node_dead", "node_left_behind", "worker_died", "mesh_failed"}

    simulate(story)


def test_a_node_can_be_dismissed_while_the_others_go_on():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"ranks": 1})
            await cluster.controller.dismiss("node-1", reason="not needed")
            await cluster.nodes["node-1"].wait_ended()
            assert await mesh.greet.call_one("x") == "hello, x"

    simulate(story)


def test_a_second_agent_under_a_living_name_is_turned_away_with_the_reason():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            double = cluster.make_node("node-0", process="-double", join_timeout_s=8.0)
            double.start()
            await double.wait_ended()
            (life,) = double.lives
            assert isinstance(life.over, AgentRefused)
            assert "taken" in str(life.over)
            assert await mesh.greet.call_one("x") == "hello, x"
            assert cluster.events("node_dead") == []

    simulate(story)


def test_an_agent_with_the_key_of_another_node_is_refused():
    async def story():
        async with SimulatedCluster(2) as cluster:
            await cluster.nodes["node-1"].crash()
            cluster.controller.report_node_exit("node-1", "it was ended by the test")
            thief = cluster.make_node("node-1", key_of="node-0", process="-thief")
            thief.start()
            await thief.wait_ended()
            assert isinstance(thief.lives[0].over, AgentRefused)
            assert "key was issued for another node" in str(thief.lives[0].over)
            assert cluster.controller.status()["counters"]["impostors"] == 1

    simulate(story)


def test_an_agent_with_an_unknown_key_does_not_get_in():
    async def story():
        async with SimulatedCluster(1, join=False) as cluster:
            stranger = cluster.make_node("node-0", join_timeout_s=5.0)
            stranger._user_id = "a key that nobody issued"
            stranger.start()
            await stranger.wait_ended()
            assert "the key is not allowed" in str(stranger.lives[0].over)
            assert cluster.controller.fabric.nodes == []

    simulate(story)


@pytest.mark.full
def test_a_hundred_nodes_with_eight_ranks_each_join_and_answer():
    async def story():
        async with SimulatedCluster(100) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 100, "gpus": 8})
            answers = (await mesh.who.call()).values
            assert [rank for _, rank, _ in answers] == list(range(800))
            assert {node for node, _, _ in answers} == set(cluster.names)

    simulate(story)


def test_messages_in_anothers_name_are_dropped_and_counted():
    async def story():
        async with SimulatedCluster(2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims=EIGHT)
            forger, agent = cluster.worker(mesh, 0).runtime, cluster.nodes["node-0"].agent

            def forged(victim):
                target = mesh.targets()[5]
                source = Address(mesh._info.mesh, victim, mesh._info.incarnations[victim])
                return Envelope(wire.CALL, 1, source, mesh._info.mesh, (*target[:2], 0), 1, "greet")

            forger.link.peer.send(forged(1))  # a neighbour on the same node
            forger.link.peer.send(forged(6))  # a rank of another node
            await mesh.who.call()
            assert agent.workers.link.stats.dropped["message in another's name"] == 2
            agent.link.peer.send(forged(6))  # an agent that speaks for a rank of another node
            await mesh.who.call()
            assert cluster.controller.status()["counters"]["dropped"]["message in another's name"] == 1

    simulate(story)


def test_workers_with_a_wrong_token_or_a_second_session_are_refused():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            worker = cluster.worker(mesh, 0)
            pool = cluster.nodes["node-0"].agent.workers
            left = []
            for birth in (replace(worker.birth, token="guessed"), worker.birth):
                runtime = WorkerRuntime(birth, InlineExecutors(asyncio.get_running_loop()), left.append)
                runtime.start(lambda link: cluster.network.dialer(worker.birth.agent_address, link, host="intruder"))
            await cluster.until(lambda: len(left) == 2)
            assert "no worker with this token" in left[0]
            assert "said hello before" in left[1]
            assert len(pool.link.peers) == 1
            assert await mesh.greet.call_one("x") == "hello, x"

    simulate(story)
