"""How long a cut link takes to be a verdict and a decision, with the leases that runs have by default."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from support.host_agents import host_cluster
from support.netns import HERE, network

from launch_bench.actors import HasModules
from launch_bench.reaction_figures import Reaction
from launch_bench.starts import HOSTS
from miles_agents.errors import MilesError
from miles_agents.timings import Timings
from miles_controller import Policy


def react(run_dir: Path, timings: Timings) -> Reaction:
    """Cut the link of one of three hosts on which a mesh waits for all its ranks."""
    return asyncio.run(_react(run_dir, timings))


async def _react(run_dir: Path, timings: Timings) -> Reaction:
    with network(HOSTS) as net:
        async with host_cluster(run_dir, net, timings=timings) as cluster:
            mesh = await cluster.controller.spawn(
                "job", HasModules, ["asyncio"], dims={"hosts": 3, "gpus": 1}, policy=Policy("kill_group")
            )
            await mesh.ready.call()
            waits = asyncio.ensure_future(mesh.wait_failed())
            dead = asyncio.ensure_future(cluster.event("node_dead", "node2"))
            failed = asyncio.ensure_future(cluster.event("mesh_failed", "job"))
            net.cut(HERE, "node2")
            begin = time.monotonic()
            at: dict[str, float] = {}
            for name, task in (("error", waits), ("dead", dead), ("decision", failed)):
                task.add_done_callback(lambda _, name=name: at.setdefault(name, time.monotonic() - begin))
            results = await asyncio.gather(waits, dead, failed, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, MilesError):
                    raise result
            return Reaction(at["error"], at["dead"], at["decision"])
