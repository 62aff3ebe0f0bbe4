"""Controller here, agents by ssh on all hosts, actors on each: ``ours_child.py SETTINGS``, which is JSON.

Writes ``ready`` when all actors have answered, then ends everything.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop


async def main(wanted: dict[str, Any]) -> None:
    """Start, say so, stop."""
    from launch_bench.actors import HasModules
    from miles_controller import Controller, ControllerConfig
    from miles_controller.config import forwarded_environment
    from miles_launcher.local import agent_flags
    from miles_launcher.ssh import SshAgents, SshSettings
    from miles_launcher.ssh_nodes import bind_address
    from miles_launcher.ssh_start import Machine, Ssh

    run_dir, modules, ranks = Path(wanted["run_dir"]), list(wanted["modules"]), int(wanted["ranks"])
    ssh = Ssh(wanted["ssh_config"])
    machines = [Machine(name, name) for name in wanted["hosts"]]
    settings = SshSettings(
        ssh=ssh, flags=tuple(agent_flags(preload=tuple(modules))), slots=ranks, env=forwarded_environment()
    )
    config = ControllerConfig(
        bind=bind_address(None, machines, ssh), nodes=tuple(wanted["hosts"]), run_dir=run_dir, status=False
    )
    async with Controller(config) as controller, SshAgents(controller, machines, run_dir, settings):
        await controller.wait_for_nodes()
        mesh = await controller.spawn(
            "bench", HasModules, modules, dims={"hosts": len(machines), "gpus": ranks}, preload=modules
        )
        await mesh.ready.call()
        sys.stdout.write("ready\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as RUNNER:
        RUNNER.run(main(json.loads(sys.argv[1])))
