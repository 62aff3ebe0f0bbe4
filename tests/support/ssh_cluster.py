"""A controller with agents that were started by ssh on hosts of ``support.sshd``, and what may not be left of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.timings import Timings
from miles_controller import Controller, ControllerConfig
from miles_launcher.ssh import SshAgents, SshSettings
from miles_launcher.ssh_start import Machine, Ssh

PATIENT = Timings(beat_s=1.0, suspect_s=20.0, fence_s=40.0, dead_s=60.0)
"""A busy machine makes nobody look dead."""


class Asked(Actor):
    """Tells what its process has."""

    @endpoint
    def variable(self, name: str) -> str:
        """Of its environment."""
        import os

        return os.environ.get(name, "")

    @endpoint
    def file_of(self, module: str) -> str:
        """Where a module was imported from."""
        import importlib

        return str(importlib.import_module(module).__file__)


def machines(*names: str, **fields: Any) -> list[Machine]:
    """Hosts that are called like their nodes."""
    return [Machine(name, name, **fields) for name in names]


@asynccontextmanager
async def ssh_cluster(
    run_dir: Path, config: Path | None, hosts: Sequence[Machine], *, timings: Timings = PATIENT, **settings: Any
) -> AsyncIterator[tuple[Controller, SshAgents]]:
    """Entered when all hosts have joined."""
    run_dir.mkdir(exist_ok=True)  # noqa: ASYNC240  # of a test
    names = tuple(host.name for host in hosts)
    flags = tuple(word for name in ("beat_s", "suspect_s", "fence_s", "dead_s") for word in
                  ("--" + name.replace("_", "-"), str(getattr(timings, name))))  # fmt: skip
    chosen = SshSettings(
        ssh=Ssh(str(config) if config else None),
        **{"slots": 2, "timeout_s": 120.0, "flags": flags, "grace_s": 5.0, **settings},
    )
    options = ControllerConfig(nodes=names, run_dir=run_dir, status=False, timings=timings)
    async with Controller(options) as controller, SshAgents(controller, hosts, run_dir, chosen) as agents:
        yield controller, agents


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes, but for sshds, whose home lies below: all that was ever started through the sshds there."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("HOME", "")
            if (
                home.startswith(str(folder))
                and process.status() != psutil.STATUS_ZOMBIE
                and "sshd" not in process.name()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found
