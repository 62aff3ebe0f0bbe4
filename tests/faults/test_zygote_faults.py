"""Agents that end or are fenced while they have zygotes: nothing is left, and the next life has new ones."""

import os
from dataclasses import replace

import pytest
from support.actors import Victim
from support.cluster import DEADLINE_S, SHORT, Proxy, all_gone, error_of, kill, known, real_cluster
from support.procs import alive, eventually

from miles_agents.rpc.errors import NodeLost, PeerFault
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents

pytestmark = pytest.mark.full


def zygotes(cluster):
    """What the node says of them in its beats."""
    return cluster.controller.status()["nodes"][0].get("zygotes", [])


async def test_the_death_of_the_agent_is_the_death_of_zygotes_and_forked_workers(tmp_path):
    async with real_cluster(tmp_path) as cluster:
        mesh = await cluster.controller.spawn("forked", Victim, dims={"ranks": 2}, start_method="zygote")
        await eventually(lambda: zygotes(cluster), what="the beats tell of the zygote")
        everybody = [known(zygotes(cluster)[0]["pid"]), *map(known, (await mesh.pid.call()).values)]
        pending = mesh.slice(ranks=0).hang.call_one()
        await mesh.pid.call()
        kill(cluster.agent())
        await error_of(pending, NodeLost)
        await all_gone(everybody)
        assert [text for _, text in cluster.door.exits], "the reaper vouches for the node"


async def test_a_fenced_node_has_neither_workers_nor_zygotes_and_its_next_life_has_new_ones(tmp_path):
    async with Proxy() as proxy, real_cluster(tmp_path, timings=SHORT, address=proxy.lead_to) as cluster:
        mesh = await cluster.controller.spawn("forked", Victim, dims={"ranks": 2}, start_method="zygote")
        await eventually(lambda: zygotes(cluster), what="the beats tell of the zygote")
        agent, zygote = known(cluster.agent()), known(zygotes(cluster)[0]["pid"])
        everybody = [zygote, *map(known, (await mesh.pid.call()).values)]
        pending = mesh.slice(ranks=0).hang.call_one()
        await mesh.pid.call()
        proxy.cut()
        await error_of(pending, PeerFault)
        await all_gone(everybody)
        proxy.heal()
        await cluster.controller.wait_for_nodes(timeout_s=DEADLINE_S)
        assert alive(agent)
        await mesh.stop(grace_s=0.2)
        again = await cluster.controller.spawn("again", Victim, dims={"ranks": 2}, start_method="zygote")
        assert len(set((await again.pid.call()).values)) == 2
        cluster.identities()


async def test_a_zygote_that_the_agent_was_told_to_warm_is_the_one_that_is_used(tmp_path):
    env = {**os.environ, "MILES_SECRET": "late", "NCCL_DEBUG": "WARN"}
    config = ControllerConfig(nodes=("node-0",), run_dir=tmp_path, timings=replace(SHORT, beat_s=0.05), status=False)
    async with (
        Controller(config) as controller,
        LocalAgents(controller, ["node-0"], run_dir=tmp_path, cpu_slots=4, env=env, preload=["numpy"]),
    ):
        await controller.wait_for_nodes()

        def seen():
            return controller.status()["nodes"][0].get("zygotes", [])

        await eventually(lambda: [zygote["state"] for zygote in seen()] == ["ready"], DEADLINE_S)
        (warm,) = seen()
        mesh = await controller.spawn("warm", Victim, dims={"ranks": 3}, preload=("numpy",), start_method="zygote")
        assert len(set((await mesh.pid.call()).values)) == 3
        await eventually(lambda: [(zygote["pid"], zygote["made"]) for zygote in seen()] == [(warm["pid"], 3)])
