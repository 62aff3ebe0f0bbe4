"""Supervision under odd circumstances: a full disk, code of the owner that raises, ends that are not confirmed."""

import asyncio

from support.simulated import SimulatedCluster, outcome, simulate
from support.simulated_actors import Probe

from miles_agents.rpc.errors import NodeLost
from miles_controller import Policy


def test_a_full_disk_does_not_turn_supervision_off(tmp_path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")

    async def story():
        async with SimulatedCluster(2, run_dir=tmp_path) as cluster:
            mesh = await cluster.controller.spawn("m", Probe, policy=Policy("restart"))
            wide = await cluster.controller.spawn("n", Probe, dims={"hosts": 2, "r": 1})
            cluster.worker(mesh, 0).kill_9()
            await cluster.event("worker_restarted", "m[0]")
            pending = wide.slice(hosts=1).wait.call_one(1e5)
            await asyncio.sleep(1.0)
            await cluster.nodes["node-1"].crash()
            async with asyncio.timeout(cluster.timings.dead_s + 5.0):
                assert isinstance(await outcome(pending), NodeLost)
            assert cluster.controller.fabric.find("node-1") is None

    simulate(story)
