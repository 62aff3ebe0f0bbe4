"""The agent process: ``python -m miles_agents.agent``, started by the reaper that ``miles agent`` becomes.

Owns what outlives one life in a run (process table, ports, sockets, runtime directory), makes an ``Agent`` per life,
and joins again after a fence for as long as somebody may want the node. Ends on: goodbye, SIGTERM or SIGINT (in good
order); the end of stdin with the link down, the reaper's death (at once); a controller that does not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import uvloop

from miles_agents.agent.agent import Agent, AgentParts
from miles_agents.agent.inventory import (
    DriverNvml,
    address_towards,
    gpu_notices,
    interface_addresses,
    interface_of,
    inventory_notices,
    take_inventory,
)
from miles_agents.agent.lease import Fence
from miles_agents.agent.ports import PortLeases
from miles_agents.agent.process import ProcessTable
from miles_agents.agent.process_gpu import NvmlProbe
from miles_agents.agent.reaper import LIFELINE_VARIABLE, watch_reaper
from miles_agents.agent.starter import ProcessStarter
from miles_agents.agent.zygotes import Zygotes
from miles_agents.errors import MilesError
from miles_agents.free_memory import return_free_memory
from miles_agents.names import checked_name
from miles_agents.node_info import ADDRESS_VARIABLE, NodeInfo
from miles_agents.run_files import usable_directory
from miles_agents.runtime_dir import runtime_dir
from miles_agents.store.node_store import store_parts
from miles_agents.timings import Timings
from miles_agents.wire.keys import AgentKey
from miles_agents.wire.transport import Transport
from miles_agents.wire.unix_transport import UnixAcceptor, UnixDialer
from miles_agents.wire.zmq_transport import ZmqDialer, ZmqNetwork
from miles_agents.worker.spec import check_start

KEY_FD_VARIABLE = "MILES_KEY_FD"
EXIT_FENCED = 70
_REMEMBERED_LIVES = 100
_MAX_OPEN_FILES = 65536
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """The flags of ``miles agent`` that reach this process; the launcher has checked them."""

    controller: str
    node: str | None = None
    cpu_slots: int | None = None
    interface: str | None = None
    run_dir: str | None = None
    key_file: str | None = None
    join_timeout_s: float = 60.0
    preload: tuple[str, ...] | None = None
    also_import: tuple[str, ...] = ()
    store_bytes: int | None = None
    timings: Timings = field(default_factory=Timings)


def parse_options(argv: list[str]) -> AgentOptions:
    """Read the flags."""
    parser = argparse.ArgumentParser(prog="miles agent", allow_abbrev=False)
    parser.add_argument("--controller", required=True)
    parser.add_argument("--node")
    parser.add_argument("--cpu-slots", type=int)
    parser.add_argument("--interface")
    parser.add_argument("--run-dir")
    parser.add_argument("--key-file")
    parser.add_argument("--join-timeout-s", type=float, default=60.0)
    parser.add_argument("--preload", type=_modules)
    parser.add_argument("--also-import", type=_modules, default=())
    parser.add_argument("--store-bytes", type=int)
    numbers = [number.name for number in fields(Timings)]
    for name in numbers:
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(Timings(), name))
    found = vars(parser.parse_args(argv))
    timings = Timings(**{name: found.pop(name) for name in numbers})
    return AgentOptions(**found, timings=timings)


def _modules(text: str) -> tuple[str, ...]:
    return check_start([*filter(None, text.split(","))], "auto") or ()


def raise_file_limit() -> None:
    """As many open files as allowed: each segment of the store, each connection and each child's pipe is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """Run until the node is not wanted any more; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    options = parse_options(sys.argv[1:])
    raise_file_limit()
    try:
        with os.fdopen(int(os.environ.pop(KEY_FD_VARIABLE)), "r") as file:
            key = AgentKey.from_line(file.read())
        fence = uvloop.run(_Process(options, key).serve())
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logger.info("agent ends: %s", fence.reason)
    return 0 if fence.orderly else EXIT_FENCED


class _Process:
    """What outlives one life in the run."""

    def __init__(self, options: AgentOptions, key: AgentKey) -> None:
        self.options = options
        self.key = key
        self.node = checked_name("node", options.node or key.node)
        self.agent: Agent | None = None
        self.stdin_open = True
        self.ending: Fence | None = None

    async def serve(self) -> Fence:
        """Lives, one after the other."""
        loop = asyncio.get_running_loop()
        interface = self.options.interface or address_towards(self.options.controller)
        info = take_inventory(self.node, cpu_slots=self.options.cpu_slots, interface=interface, nvml=DriverNvml())
        if interface is not None:
            name_interface(info.addresses[0], os.environ)
        for notice in inventory_notices(info):
            logger.info(notice)
        for notice in gpu_notices(DriverNvml(), info):
            logger.warning(notice)
        reaper = os.getppid() if LIFELINE_VARIABLE in os.environ else 0
        with ExitStack() as owned:
            owned.callback(watch_reaper(loop, functools.partial(self._end, "the reaper died", orderly=False)))
            for number in (signal.SIGTERM, signal.SIGINT):
                name = signal.Signals(number).name
                loop.add_signal_handler(number, functools.partial(self._end, f"{name} received", orderly=True))
            table = ProcessTable(gpu=NvmlProbe() if info.gpus else None)
            owned.callback(table.close)
            ports = _port_leases(info, interface)
            owned.callback(ports.close)
            directory = runtime_dir(f"{self.key.run_id[:20]}-{os.getpid()}")
            owned.enter_context(directory)
            network = ZmqNetwork()
            owned.callback(network.close)
            owned.callback(self._watch_stdin(loop))
            return_free_memory()
            log_dir = self._make_log_dir()
            lives = 0
            fenced: list[int] = []
            while True:
                lives += 1
                zygotes = Zygotes(table, log_dir, also=self.options.also_import)
                starter = ProcessStarter(table, info, zygotes=zygotes)
                if self.options.preload is not None:
                    starter.warm(self.options.preload)
                address = f"unix://{directory.socket_path(f'agent{lives}')}"
                parts = AgentParts(
                    info=info,
                    dial=lambda link: self._dial(link, network),
                    accept=lambda link, address=address: UnixAcceptor(address, link),  # type: ignore[misc]
                    starter=starter,
                    zygotes=zygotes,
                    log_dir=log_dir,
                    processes=table,
                    ports=ports,
                    store=store_parts(info, self.options.store_bytes, directory.socket_path(f"store{lives}")),
                    fenced=tuple(fenced),
                    reaper=reaper,
                    join_timeout_s=self.options.join_timeout_s,
                )
                fence, session = await self._live(parts, table, zygotes)
                fenced = [*fenced, session][-_REMEMBERED_LIVES:]
                if self.ending is not None or fence.orderly or not self.stdin_open:
                    return self.ending or fence
                logger.warning("fenced (%s); everything was ended; joining again", fence.reason)

    def _dial(self, link: Any, network: ZmqNetwork) -> Transport:
        address = self.options.controller
        if address.startswith("unix:"):
            return UnixDialer(address, link, key=self.key.own)
        keys, timings = self.key.client_keys(), self.options.timings
        return ZmqDialer(address, link, curve=keys, network=network, timings=timings)

    def _make_log_dir(self) -> Path:
        run_dir = Path(self.options.run_dir or Path("runs") / checked_name("run", self.key.run_id))
        return usable_directory(run_dir / "logs" / self.node)

    async def _live(self, parts: AgentParts, table: ProcessTable, zygotes: Zygotes) -> tuple[Fence, int]:
        agent = self.agent = Agent(parts, self.options.timings)
        try:
            if self.ending is not None:
                return self.ending, 0
            return await agent.run(), agent.session_id
        finally:
            self.agent = None
            await zygotes.close()
            await table.kill_all(grace_s=0.0)
            await table.reap_orphans()

    def _end(self, reason: str, *, orderly: bool) -> None:
        self.ending = Fence(reason, orderly=orderly)
        if self.agent is not None:
            self.agent.end(self.ending)

    def _watch_stdin(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        """The lifeline: the starter's end of our stdin. Only what the key came by is one."""
        mode = os.fstat(0).st_mode
        if self.options.key_file is not None or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            return lambda: None
        os.set_blocking(0, False)

        def on_readable() -> None:
            try:
                if os.read(0, 4096):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass  # a socket that was reset has ended, too
            loop.remove_reader(0)
            self.stdin_open = False
            if self.agent is not None:
                self.agent.stdin_closed()

        loop.add_reader(0, on_readable)

        def stop() -> None:
            loop.remove_reader(0)

        return stop


def name_interface(address: str, environ: MutableMapping[str, str]) -> None:
    """Have process groups of everything that runs here talk over the interface of ``address``, unless the user chose:
    else gloo takes the one that this machine's name resolves to, which often is loopback."""
    environ[ADDRESS_VARIABLE] = address
    name = interface_of(address, interface_addresses())
    if name is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _port_leases(info: NodeInfo, interface: str | None) -> PortLeases:
    """Ports that are free on the address that peers are told, if one was chosen; it is the first of the node's."""
    return PortLeases(interface=info.addresses[0] if interface else None)
