"""A job for Slurm tests: an agent and a rank on each node of its allocation, held until a signal or a node's death.

Run as a script in a job. Writes what the ranks see to the file named, and ends like ``train.py``: 143 after SIGTERM.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from miles.flags.slurm_facts import slurm_facts
from miles.training.job import Nodes
from miles_agents.rpc.actor import Actor, endpoint
from miles_controller import Controller, ControllerConfig
from miles_launcher.launchers import agent_environment
from miles_launcher.slurm import nodes_by_slurm


class Sees(Actor):
    """A rank that tells where it is."""

    @endpoint
    def where(self):
        return os.environ.get("SLURMD_NODENAME"), os.getpid(), os.getcwd()


def config(**more):
    """What the launcher reads of a run's config."""
    names = slurm_facts(os.environ).nodes
    return {
        "launcher": "slurm", "machines": [{"name": name} for name in names], "device": "cpu", "cpu_slots": 1,
        "interface": None, "controller_host": None, "start_timeout": 60.0, "debug_rollout_only": True, "env": {},
        "train_env_vars": {}, **more,
    }  # fmt: skip


async def hold(out, run_dir):
    task = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    nodes: Nodes = nodes_by_slurm(config(), agent_environment(config()))
    options = ControllerConfig(bind=nodes.bind, nodes=nodes.names, run_dir=run_dir)
    async with Controller(options) as controller, nodes.start(controller, run_dir):
        mesh = await controller.spawn("sees", "support.slurm_holder:Sees", dims={"hosts": len(nodes.names)})
        seen = (await mesh.where.call()).values
        out.with_suffix(".draft").write_text(json.dumps(list(seen)))
        out.with_suffix(".draft").rename(out)
        event = await controller.wait_for_event(lambda event: event.kind in ("node_gone", "node_dead"), timeout_s=600)
        raise SystemExit(f"{event.subject} is gone: {event.text}")


if __name__ == "__main__":
    try:
        asyncio.run(hold(Path(sys.argv[1]), Path(sys.argv[2])))
    except asyncio.CancelledError:
        sys.exit(143)
