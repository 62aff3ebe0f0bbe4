"""Placements in use, on virtual time: spares are kept and used, ranks move together, bad placements are refused."""

import asyncio
import dataclasses

import pytest
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_controller import Policy
from miles_controller.placement import BadPlacementRequest, InfeasiblePlacement, Request

BACK = Policy("restart", backoff_s=0.1)
FOREVER_S = 200.0


def where(mesh):
    return [(rank.slot.node, rank.slot.devices, rank.slot.local_rank) for rank in mesh._supervisor.ranks]


async def lose(cluster, node):
    await cluster.nodes[node].crash()
    cluster.controller.report_node_exit(node, "its reaper ended")


def test_a_spare_node_is_kept_and_takes_over_for_colocated_meshes_together():
    async def story():
        async with SimulatedCluster(3, cpu_slots=2) as cluster:
            requests = [Request("train", 4), Request("engine", 2, 2, colocate_with="train")]
            placement = cluster.controller.place(requests, num_spares=1)
            train = await cluster.controller.spawn("train", Probe, dims={"r": 4}, placement=placement, policy=BACK)
            engine = await cluster.controller.spawn("engine", Probe, dims={"r": 2}, placement=placement, policy=BACK)
            with pytest.raises(InfeasiblePlacement, match=r"spare of train\+engine"):
                await cluster.controller.spawn("other", Probe)
            await lose(cluster, "node-1")
            for label in ("train[2]", "train[3]", "engine[1]"):
                await cluster.event("worker_restarted", label)
            assert where(train)[2:] == [("node-2", (0,), 0), ("node-2", (1,), 1)]
            assert where(train)[:2] == [("node-0", (0,), 0), ("node-0", (1,), 1)]
            assert where(engine) == [("node-0", (0, 1), 0), ("node-2", (0, 1), 0)]
            assert cluster.worker(train, 3).spec.devices == (1,)
            assert [who[0] for who in (await train.who.call()).values] == ["node-0", "node-0", "node-2", "node-2"]

    simulate(story)


def test_spares_are_free_when_the_last_mesh_of_their_placement_has_ended():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            placement = cluster.controller.place([Request("a", 1), Request("b", 1)], num_spares=1)
            a = await cluster.controller.spawn("a", Probe, placement=placement)
            b = await cluster.controller.spawn("b", Probe, placement=placement)
            await a.stop()
            assert cluster.controller.inventory().get("node-1").free == ()
            await b.stop()
            assert cluster.controller.inventory().get("node-1").free == (0, 1)

    simulate(story)


def test_without_spares_ranks_move_to_free_devices_with_other_indices():
    async def story():
        async with SimulatedCluster(3, cpu_slots=2) as cluster:
            controller = cluster.controller
            for name, node, ranks in (("half", "node-2", 1), ("full", "node-1", 2)):
                placement = controller.place([Request(name, ranks, nodes=(node,))])
                await controller.spawn(name, Probe, dims={"r": ranks}, placement=placement)
            mesh = await controller.spawn("m", Probe, policy=BACK)
            assert where(mesh) == [("node-0", (0,), 0)]
            await lose(cluster, "node-0")
            await cluster.event("worker_restarted", "m[0]")
            assert where(mesh) == [("node-2", (1,), 0)]
            assert cluster.worker(mesh, 0).spec.devices == (1,)

    simulate(story)


def test_ranks_that_join_others_of_their_mesh_get_local_ranks_of_their_own():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            request = Request("m", 2, max_ranks_per_node=1)
            placement = dataclasses.replace(
                cluster.controller.place([request]), requests=(dataclasses.replace(request, max_ranks_per_node=None),)
            )
            mesh = await cluster.controller.spawn("m", Probe, dims={"r": 2}, placement=placement, policy=BACK)
            await lose(cluster, "node-0")
            await cluster.event("worker_restarted", "m[0]")
            assert where(mesh) == [("node-1", (1,), 1), ("node-1", (0,), 0)]

    simulate(story)


def test_a_slice_does_not_move_to_the_node_of_another_slice():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"hosts": 2, "r": 1}, policy=BACK)
            await lose(cluster, "node-1")
            await cluster.event("mesh_failed", "m")
            failure = str(mesh.failure)
            assert "1 nodes to replace, 0 of 1 nodes fit" in failure
            assert "exactly 1 ranks on each node" in failure

    simulate(story)


def test_where_nothing_fits_the_failure_has_the_table():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, dims={"r": 4}, policy=BACK)
            await lose(cluster, "node-1")
            await cluster.event("mesh_failed", "m")
            assert "node-1 is lost with 2 devices in use by m" in str(mesh.failure)
            assert "m: 0-1" in str(mesh.failure)

    simulate(story)


def test_a_node_that_is_back_in_time_keeps_its_ranks():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            policy = Policy("restart", backoff_s=FOREVER_S, backoff_cap_s=FOREVER_S)
            mesh = await cluster.controller.spawn("m", Probe, policy=policy)
            await lose(cluster, "node-0")
            cluster.nodes["node-0"].start()
            await cluster.event("worker_restarted", "m[0]", timeout_s=2 * FOREVER_S)
            assert where(mesh) == [("node-0", (0,), 0)]

    simulate(story)


def test_a_placement_that_does_not_fit_the_mesh_is_refused_with_all_that_is_wrong():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            controller = cluster.controller
            placement = controller.place([Request("m", 2), Request("wide", 1, 4, kind="service")][:1])
            with pytest.raises(BadPlacementRequest, match="no request 'other'; it has m"):
                await controller.spawn("other", Probe, placement=placement)
            await controller.spawn("taker", Probe)
            with pytest.raises(BadPlacementRequest) as refused:
                await controller.spawn("m", Probe, dims={"r": 3}, placement=placement)
            assert "2 ranks were placed, the dimensions ask for 3" in refused.value.evidence
            assert "rank 0: devices [0] of node-0 are taken by taker" in refused.value.evidence
            assert controller.find_mesh("m") is None

    simulate(story)


def test_a_placement_whose_ranks_span_nodes_or_whose_nodes_are_gone_is_refused():
    async def story():
        async with SimulatedCluster(2, cpu_slots=2) as cluster:
            controller = cluster.controller
            wide = controller.place([Request("wide", 1, 4, kind="service")])
            with pytest.raises(BadPlacementRequest, match="rank 0 spans node-0, node-1"):
                await controller.spawn("wide", Probe, placement=wide)
            placement = controller.place([Request("m", 1)], num_spares=1)
            await controller.spawn("taker", Probe, placement=controller.place([Request("taker", 1, nodes=("node-1",))]))
            with pytest.raises(BadPlacementRequest, match="spare node node-1 is taken by taker"):
                await controller.spawn("m", Probe, placement=placement)
            await lose(cluster, "node-0")
            await asyncio.sleep(1.0)
            with pytest.raises(BadPlacementRequest, match="node node-0 is not there"):
                await controller.spawn("m", Probe, placement=placement)

    simulate(story)


def test_hosts_means_nodes_in_the_first_place_only():
    async def story():
        async with SimulatedCluster(1, cpu_slots=2) as cluster:
            await (await cluster.controller.spawn("m", Probe, dims={"r": 1, "hosts": 2})).stop()
            with pytest.raises(InfeasiblePlacement):
                await cluster.controller.spawn("m", Probe, dims={"hosts": 2, "r": 1})

    simulate(story)
