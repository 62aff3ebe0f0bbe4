"""Calls that take much longer than usual are told, once, wherever they pass by. Virtual time."""

import asyncio

import pytest
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_an_overdue_call_between_workers_is_told_once_also_if_it_never_leaves_their_node(num_nodes):
    async def story():
        async with SimulatedCluster(num_nodes, overdue_s=30.0) as cluster:
            dims = {"hosts": num_nodes, "gpus": 2 // num_nodes}
            mesh = await cluster.controller.spawn("m", Probe, dims=dims)
            flat = mesh.flatten("all")
            first, second = flat.slice(all=0), flat.slice(all=1)
            asking = first.outlive.broadcast(second)  # the controller itself waits for no answer
            await asking
            at, event = await cluster.event("call_overdue", "m[1]")
            assert 30.0 < at - cluster.events("mesh_started")[0][0] < 41.0
            assert "wait has not answered for" in event.text and event.fields["stack"]
            await asyncio.sleep(60.0)
            assert len(cluster.events("call_overdue")) == 1

    simulate(story)


def test_what_passes_by_the_controller_is_not_told_twice():
    async def story():
        async with SimulatedCluster(1, overdue_s=30.0) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            waiting = mesh.wait.call_one(1e6)
            await asyncio.sleep(120.0)
            assert [event.subject for _, event in cluster.events("call_overdue")] == ["m[0]"]
            waiting.cancel()

    simulate(story)
