"""Engines and router as services of the controller: what is started, and how it is spoken to. Imports no torch."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.environment import engine_environment
from miles.backends.sglang_utils.launch_key import KEY_VARIABLE
from miles.backends.sglang_utils.places import Place
from miles.backends.sglang_utils.server_arguments import (
    BadEngineConfig,
    engine_size,
    rank_offset,
    router_arguments,
    server_arguments,
    takes_stream,
)
from miles.backends.sglang_utils.spanning import SpanningService, start_spanning
from miles.backends.weight_update.messages import EngineTarget
from miles_agents.errors import MilesError, PeerFault
from miles_controller import Controller
from miles_controller.services import ServiceHandle

START_S = 1800.0
"""Until an engine answers: a large model has to be read from a disk."""
_WATCH_S = 3600.0

# No agent restarts an engine: a new one would answer with old weights. That is for whoever gives it new ones.
_LIFE = {"max_restarts": 0, "probe_interval_s": 1.0, "probe_timeout_s": 30.0, "grace_s": 3.0}
_ROUTER_START_S = 60.0
HEARTBEATS = 2
"""Unanswered, one after the other: then it is mute."""
AGAIN_S = 1.0
"""Between one that is not answered and its repetition."""
LAUNCHER = "miles.backends.sglang_utils.launch_engine"


def health_numbers(config: Mapping[str, Any]) -> dict[str, float]:
    """When engines and router are asked for their health, as fields of the agent's ``LifeNumbers``. Without
    ``--use-fault-tolerance``: each second, and the third that fails counts."""
    if not config.get("use_fault_tolerance"):
        return {**_LIFE}
    return {
        **_LIFE,
        "probe_interval_s": float(config["rollout_health_check_interval"]),
        "probe_timeout_s": float(config["rollout_health_check_timeout"]),
        "first_wait_s": float(config["rollout_health_check_first_wait"]),
        "starting_interval_s": 1.0,
        "again_interval_s": AGAIN_S,
        "failures_until_unhealthy": HEARTBEATS,
    }


class EngineDied(PeerFault):
    """An engine or the router has ended, or does not answer its health probe any more."""

    code = "E-ENG-006"


class EngineService(Protocol):
    """What keeps an engine: a service of ours, or what stands for it where the engine is somebody else's."""

    name: str

    @property
    def phase(self) -> str:
        """As it was reported last."""

    @property
    def fault(self) -> str:
        """Why it is dead or unhealthy."""

    @property
    def log(self) -> str:
        """Where its output is."""

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


def loads_weights() -> bool:
    """Whether engines read their weights from disk when they start. If not, the first weight update brings them."""
    return os.environ.get("MILES_SGLANG_DUMMY_LOAD") != "1"


async def start_engine(
    controller: Controller, config: Mapping[str, Any], rank: int, *, places: Sequence[Place], api_key: str
) -> Engine:
    """Start engine ``rank`` and wait until it answers; with several places, a server on each. ``engine_launcher`` of
    ``config`` may name another module than ours that is run in its place, with the same arguments.

    Raises:
        BadEngineConfig; what ``Controller.start_service`` raises, with the last lines of the engine's log.
    """
    name, size, arguments = f"engine-{rank}", engine_size(config, rank), server_arguments(config, rank)
    if not loads_weights():
        arguments["load_format"] = "dummy"

    async def start_part(place: Place, further: dict[str, Any]) -> ServiceHandle:
        host = controller.address_of(place.node)
        env = engine_environment(
            config["device"],
            index=rank,
            tp_size=size,
            colocate=bool(config.get("colocate")),
            inherited={**os.environ, **controller.forwarded_env},
            device_ids=[str(device) for device in place.devices],
            num_cores=controller.node_info(place.node).cores,
            is_alone=host.startswith("127."),
        )
        return await controller.start_service(
            name,
            _argv(str(config.get("engine_launcher") or LAUNCHER), ("http", "nccl"), arguments | further),
            node=place.node,
            host=host,
            env={**env, KEY_VARIABLE: api_key},
            ports=["http", "nccl"],
            numbers={**health_numbers(config), "start_timeout_s": START_S},
            ready_timeout_s=START_S,
        )

    service: ServiceHandle | SpanningService
    if len(places) == 1:
        service = await start_part(places[0], {})
    else:
        service = await start_spanning(controller, name, places, start_part)
    client = EngineClient(service.url, api_key, name=name, vocab_size=config["hf_config"].get("vocab_size"))
    try:
        bracket = await client.has_bracket()
    except BaseException:
        await client.close()
        await service.stop("it did not answer")
        raise
    place, streams = rank_offset(config, rank), takes_stream(arguments)
    target = EngineTarget(name, service.url, api_key, size, place, bracket, has_stream=streams)
    return Engine(target, service, client)


async def start_router(
    controller: Controller, config: Mapping[str, Any], *, node: str | None, host: str, api_key: str
) -> ServiceHandle:
    """Start sglang-router and wait until it answers."""
    return await controller.start_service(
        "router",
        _argv("miles.backends.sglang_utils.launch_router", ("http", "metrics"), router_arguments(config)),
        node=node,
        host=host,
        env={KEY_VARIABLE: api_key},
        ports=["http", "metrics"],
        numbers={**health_numbers(config), "first_wait_s": 0.0, "start_timeout_s": _ROUTER_START_S},
        ready_timeout_s=_ROUTER_START_S,
    )


def url_of_others(config: Mapping[str, Any]) -> str:
    """Of the router that somebody else has started (``--sglang-router-ip``). Raises BadEngineConfig."""
    if not config.get("sglang_router_port"):
        raise BadEngineConfig(
            "--sglang-router-ip names a router without its port",
            evidence=f"--sglang-router-ip {config['sglang_router_ip']}, no --sglang-router-port",
            advice="Give --sglang-router-port too, or leave both out: a router is started then.",
        )
    host = str(config["sglang_router_ip"])
    return f"http://{f'[{host}]' if ':' in host else host}:{config['sglang_router_port']}"


def _argv(module: str, ports: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
    """Command line of a launcher of ours; the agent puts host and ports in."""
    by_name = ", ".join(f'"{port}": {{ports[{port}]}}' for port in ports)
    program = ["{python}", "-m", module]
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


async def first_death(services: Iterable[EngineService], is_expected: Callable[[str], bool]) -> MilesError:
    """Waits until one of these is dead whose death is not expected then, by its name; without end if none is."""
    watches = {asyncio.ensure_future(death_of(service)) for service in services}
    try:
        while watches:
            done, watches = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                error = watch.result()
                if not is_expected(str(error.fields["engine"])):
                    return error
        nothing_left: asyncio.Future[MilesError] = asyncio.get_running_loop().create_future()
        return await nothing_left
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


async def all_of(*calls: Any) -> None:
    """Run these at once and wait for all. Raises the first of their errors, when none runs any more."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
