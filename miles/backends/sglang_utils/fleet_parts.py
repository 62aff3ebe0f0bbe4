"""Engines and router as services of the controller: what is started, and how it is spoken to. Imports no torch."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.environment import engine_environment
from miles.backends.sglang_utils.launch_key import KEY_VARIABLE
from miles.backends.sglang_utils.server_arguments import (
    engine_size,
    rank_offset,
    router_arguments,
    server_arguments,
)
from miles.backends.weight_update.messages import EngineTarget
from miles_agents.errors import PeerFault
from miles_controller import Controller
from miles_controller.services import ServiceHandle

START_S = 1800.0
"""Until an engine answers: a large model has to be read from a disk."""
_WATCH_S = 3600.0

# A dead engine ends the run with its log: what it was doing is lost, and a new one would have old weights.
_ENGINE_LIFE = {"max_restarts": 0, "start_timeout_s": START_S, "probe_interval_s": 1.0, "probe_timeout_s": 30.0}
_ROUTER_LIFE = {"max_restarts": 0, "start_timeout_s": 60.0, "probe_interval_s": 1.0, "probe_timeout_s": 30.0}
_GRACE_S = 3.0


class EngineDied(PeerFault):
    """An engine or the router has ended, or does not answer its health probe any more."""

    code = "E-ENG-006"


class EngineService(Protocol):
    """What keeps an engine: a service of ours, or what stands for it where the engine is somebody else's."""

    name: str
    phase: str
    fault: str
    log: str

    async def pause(self) -> None:
        """Do not probe its health until ``resume``."""

    async def resume(self) -> None:
        """Probe its health again."""

    async def fence(self, why: str) -> None:
        """It counts no more."""

    async def stop(self, why: str = "") -> None:
        """End it, or let it go."""

    async def wait_for_phase(self, *phases: str, timeout_s: float) -> str:
        """Until it is in one of these phases; returns which. Raises TimeoutError."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine that has started."""

    target: EngineTarget
    service: EngineService
    client: EngineClient


async def start_engine(
    controller: Controller,
    config: Mapping[str, Any],
    rank: int,
    *,
    node: str | None,
    host: str,
    api_key: str,
    devices: Sequence[int],
) -> Engine:
    """Start engine ``rank`` and wait until it answers.

    Raises:
        BadEngineConfig; what ``Controller.start_service`` raises, with the last lines of the engine's log.
    """
    name, size, arguments = f"engine-{rank}", engine_size(config, rank), server_arguments(config, rank)
    if os.environ.get("MILES_SGLANG_DUMMY_LOAD") == "1":  # the first weight update brings the weights
        arguments["load_format"] = "dummy"
    env = engine_environment(
        config["device"],
        index=rank,
        tp_size=size,
        colocate=bool(config.get("colocate")),
        inherited={**os.environ, **controller.forwarded_env},
        device_ids=[str(device) for device in devices],
    )
    service = await controller.start_service(
        name,
        _argv("launch_engine", ("http", "nccl"), arguments),
        node=node,
        host=host,
        env={**env, KEY_VARIABLE: api_key},
        ports=["http", "nccl"],
        numbers={**_ENGINE_LIFE, "grace_s": _GRACE_S},
        ready_timeout_s=START_S,
    )
    client = EngineClient(service.url, api_key, name=name, vocab_size=config["hf_config"].get("vocab_size"))
    try:
        bracket = await client.has_bracket()
    except BaseException:
        await client.close()
        raise
    target = EngineTarget(name, service.url, api_key, size, rank_offset(config, rank), bracket)
    return Engine(target, service, client)


async def start_router(
    controller: Controller, config: Mapping[str, Any], *, node: str | None, host: str, api_key: str
) -> ServiceHandle:
    """Start sglang-router and wait until it answers."""
    return await controller.start_service(
        "router",
        _argv("launch_router", ("http", "metrics"), router_arguments(config)),
        node=node,
        host=host,
        env={KEY_VARIABLE: api_key},
        ports=["http", "metrics"],
        numbers={**_ROUTER_LIFE, "grace_s": _GRACE_S},
        ready_timeout_s=60.0,
    )


def _argv(module: str, ports: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
    """Command line of a launcher of ours; the agent puts host and ports in."""
    by_name = ", ".join(f'"{port}": {{ports[{port}]}}' for port in ports)
    program = [sys.executable, "-m", f"miles.backends.sglang_utils.{module}"]
    return [*program, "{host}", f"{{{by_name}}}", json.dumps(arguments)]


async def death_of(service: EngineService) -> EngineDied:
    """Waits until a service is dead."""
    while True:
        try:
            phase = await service.wait_for_phase("dead", "lost", "unhealthy", timeout_s=_WATCH_S)
        except TimeoutError:
            continue
        if phase == "unhealthy":  # it is being killed; what comes then says more
            try:
                phase = await service.wait_for_phase("dead", "lost", timeout_s=60.0)
            except TimeoutError:
                phase = "not answering"
        return EngineDied(
            f"{service.name} is {phase}",
            evidence=service.fault or "it was stopped by somebody else than the run",
            advice=f"Read {service.log}; the first error in it is usually the cause.",
            engine=service.name,
        )


async def all_of(*calls: Any) -> None:
    """Run these at once and wait for all. Raises the first of their errors, when none runs any more."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
