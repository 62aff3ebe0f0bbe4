"""A controller in the test's process, and agents on the hosts of ``support.netns``, each started by hand with its key
on stdin, as somebody would who logs in there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_agents.timings import Timings
from miles_controller import Controller, ControllerConfig
from miles_controller.events import Event
from support.netns import Network
from support.procs import eventually

DEADLINE_S = 120.0
"""Hosts start on a machine with other things to do."""
LEASES = Timings(beat_s=0.2, suspect_s=2.0, fence_s=6.0, dead_s=8.0)
"""Short enough to be waited for; a machine that stops for seconds ends nothing."""
PATIENT = Timings(beat_s=0.5, suspect_s=5.0, fence_s=45.0, dead_s=60.0)
"""Nothing ends by a lease unless it is really gone."""


@dataclass
class HostCluster:
    """A controller, and the agents that were started."""

    controller: Controller
    net: Network
    run_dir: Path
    timings: Timings
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_agent(self, name: str) -> None:
        """``miles agent`` on that host, with a new key."""
        argv = [sys.executable, "-m", "miles_launcher.cli", "agent", "--node", name, "--cpu-slots", "2"]
        argv += ["--controller", self.controller.address, "--run-dir", str(self.run_dir)]
        argv += ["--store-bytes", str(256 << 20)]
        for number in ("beat_s", "suspect_s", "fence_s", "dead_s"):
            argv += [f"--{number.replace('_', '-')}", str(getattr(self.timings, number))]
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "logs" / f"by-hand-{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.net[name].command(argv), stdin=subprocess.PIPE, stdout=log, stderr=log, env=host_environment()
            )
        assert process.stdin is not None
        process.stdin.write(self.controller.issue_key(name).strip().encode() + b"\n")
        process.stdin.flush()
        self.agents[name] = process

    def let_go(self, name: str) -> None:
        """The end of its stdin, and of our interest."""
        process = self.agents.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(DEADLINE_S)

    def log(self, name: str) -> str:
        """What agent and reaper wrote."""
        return (self.run_dir / "logs" / f"by-hand-{name}.log").read_text(errors="replace")

    def incarnation(self, name: str) -> int:
        """Of the node's life now."""
        found = self.controller.fabric.find(name)
        assert found is not None, f"{name} is not in the run"
        return found.incarnation

    async def event(self, kind: str, subject: str = "", *, fits: Callable[[Event], bool] = lambda _: True) -> Event:
        """The first event of this kind, past or future."""
        try:
            return await self.controller.wait_for_event(
                lambda e: e.kind == kind and subject in e.subject and fits(e), timeout_s=DEADLINE_S
            )
        except TimeoutError:
            told = "\n".join(f"{e.kind} {e.subject}: {e.text}" for e in self.controller.events.history)
            raise AssertionError(f"no {kind} of {subject!r}; events were:\n{told}") from None

    def events(self, kind: str, subject: str = "") -> list[Event]:
        """So far."""
        return [e for e in self.controller.events.history if e.kind == kind and subject in e.subject]

    async def clean(self, name: str) -> None:
        """Until nothing runs on that host that is not the host's own."""
        await eventually(lambda: not self.net[name].processes(), DEADLINE_S, what=f"end of all on {name}")


def host_environment() -> dict[str, str]:
    """That of somebody who logged in: no runtime directory of this session's."""
    path = os.pathsep.join(dict.fromkeys(entry for entry in sys.path if entry))
    dropped = ("XDG_RUNTIME_DIR", "MILES_TEST_SESSION")
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, "PYTHONPATH": path}


@asynccontextmanager
async def host_cluster(
    run_dir: Path, net: Network, *, names: Sequence[str] = (), timings: Timings = PATIENT, **config: Any
) -> AsyncIterator[HostCluster]:
    """All hosts of the network, or those named, joined. On leaving they are dismissed; nothing may be left on them."""
    wanted = tuple(names or net.hosts)
    settings = ControllerConfig(
        nodes=wanted, run_dir=run_dir, bind=f"tcp://{net.here}:0", timings=timings, status=False, **config
    )
    async with Controller(settings) as controller:
        cluster = HostCluster(controller, net, run_dir, timings)
        try:
            for name in wanted:
                cluster.start_agent(name)
            try:
                await controller.wait_for_nodes(timeout_s=DEADLINE_S)
            except Exception as error:
                raise AssertionError("\n".join([str(error), *(cluster.log(name) for name in wanted)])) from error
            yield cluster
            await controller.dismiss(*cluster.agents, reason="the test is over")
        finally:
            net.restore()
            await asyncio.gather(*(asyncio.to_thread(cluster.let_go, name) for name in list(cluster.agents)))
    for name in set(wanted) & set(net.hosts):
        await cluster.clean(name)
