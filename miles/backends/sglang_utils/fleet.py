"""All engines of a run behind their router, as the controller sees them. In the controller's process; imports no torch.

* Consumes: the run's configuration, a controller with a node; the trainer's hand in weight updates (``send``).
* Produces: ``targets``, ``router_url``, ``api_key`` for those who generate; phases; the error with which it ends.
* Waits for: engines and router to come up, each with a deadline; answers of engines, likewise.
* With ``--use-fault-tolerance`` engines and router that die, go mute or miss an update are restarted
  (``fleet_recovery``).
* Invariants: an engine that missed a weight update gets no requests and generates nothing; a router of ours and all
  engines of ours need the key that this run made; after ``stop`` nothing of them runs, and engines that somebody else
  has started (``--rollout-external``) are as they were.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from miles.backends.sglang_utils.client import LOAD_S, MEMORY_TAGS, EngineSilent
from miles.backends.sglang_utils.engine_lives import BUDGET, ROUTER
from miles.backends.sglang_utils.equal_weights import check_engine
from miles.backends.sglang_utils.external import adopt, external_key, let_go
from miles.backends.sglang_utils.fleet_parts import (
    Engine,
    EngineService,
    all_of,
    first_death,
    loads_weights,
    start_engine,
    start_router,
    url_of_others,
)
from miles.backends.sglang_utils.fleet_recovery import FleetRecovery
from miles.backends.sglang_utils.fleet_update import NoEngineLeft, Send, UpdateRunner, settings
from miles.backends.sglang_utils.liveness import while_alive
from miles.backends.sglang_utils.places import FleetPlaces
from miles.backends.sglang_utils.roster import FleetHands, Roster
from miles.backends.sglang_utils.router import RouterClient
from miles.backends.sglang_utils.settle import forget_stale
from miles.backends.weight_update.messages import GROUP_NAME, EngineTarget
from miles_agents.errors import MilesError
from miles_controller import Controller
from miles_controller.services import ServiceHandle

logger = logging.getLogger(__name__)
CPU_KEEPS = "SGLang gives no memory back on a CPU"


class EngineFleet:
    """See the module's docstring.

    Args:
        config: The run's, resolved.
        places: Nodes and devices of engines and router; default: all on the first node. Each listens where its node is
            reached (``Controller.address_of``); users' programs reach it, with the key.

    Attributes:
        recovery: With ``--use-fault-tolerance``, from ``start`` on: who serves, who waits, who comes back.
        restart_policy: Budget and backoff of it, for each engine and the router.
    """

    restart_policy = BUDGET

    def __init__(
        self,
        controller: Controller,
        config: Mapping[str, Any],
        *,
        places: FleetPlaces | None = None,
    ) -> None:
        self.is_external = bool(config.get("rollout_external"))
        self.api_key = (external_key() if self.is_external else "") or secrets.token_urlsafe(32)
        self.recovery: FleetRecovery | None = None
        self._controller = controller
        self._config = dict(config)
        self._places = places or FleetPlaces.anywhere(int(config["rollout_num_engines"]))
        self._roster = Roster()
        self._stopping = False
        self._memory_is_released = False
        how = settings(config, on_one_node=self._places.on_one_node)
        self._silence_s = float(how["silence_s"])
        self._updates = UpdateRunner(fence=self._fence, are_judged=lambda: not self._memory_is_released, **how)

    # -- beginning and end -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start router and engines, all at once; returns when requests can be sent to ``router_url``.

        Raises:
            BadEngineConfig; ServiceDied, ServiceNotReady, with the last lines of a log; EngineRefused, EngineSilent,
            WorkerNotTaken, ExternalEngineUnfit. Nothing is left then.
        """
        try:
            if self.is_external:
                for engine in await adopt(self._config, external_key()):
                    self._joined(engine)
                await self._start_router()
            else:
                await all_of(
                    self._start_router(), *(self._start_first(rank) for rank in range(len(self._places.engines)))
                )
            router = self._roster.router
            if router is None:
                raise AssertionError("started above")
            known = {worker["url"] for worker in await router.workers()} if self.is_external else set()
            new = [target for target in self.targets if target.url not in known]
            await all_of(*(router.add(target.url, target.api_key) for target in new))
            if self._config.get("use_fault_tolerance"):
                self.recovery = self._begin_recovery()
        except BaseException:
            await self.stop()
            raise

    def _begin_recovery(self) -> FleetRecovery:
        hands = FleetHands(
            self._roster,
            self._updates,
            start_engine=self._start_engine,
            start_router=self._start_our_router,
            loaded_version=0 if loads_weights() else None,
            router_failed=lambda why: None if self.recovery is None else self.recovery.died(ROUTER, why),
        )
        services = {engine.target.name: engine.service for engine in self._roster.engines}
        if self._roster.router_service is not None:
            services[ROUTER] = self._roster.router_service
        emit = self._controller.events.emit
        return FleetRecovery(services.items(), hands, emit, is_ours=not self.is_external, policy=self.restart_policy)

    def _joined(self, engine: Engine) -> None:
        self._roster.put(engine)
        self._updates.joined(engine, self._updates.state.version)

    async def _start_first(self, rank: int) -> None:
        self._joined(await self._start_engine(rank))

    async def _start_engine(self, rank: int) -> Engine:
        return await start_engine(
            self._controller,
            self._config,
            rank,
            places=self._places.engines[rank],
            api_key=self.api_key,
        )

    async def _start_router(self) -> None:
        config, roster = self._config, self._roster
        if not config.get("sglang_router_ip"):
            roster.router_service, roster.router = await self._start_our_router()
            roster.router_url = roster.router.url
            return
        roster.router_url = url_of_others(config)
        roster.router = RouterClient(roster.router_url, self.api_key, name="router")

    async def _start_our_router(self) -> tuple[ServiceHandle, RouterClient]:
        node = self._places.head
        host = self._controller.address_of(node)
        service = await start_router(self._controller, self._config, node=node, host=host, api_key=self.api_key)
        return service, RouterClient(service.url, self.api_key, name="router")

    async def stop(self) -> None:
        """End everything. An external router only forgets the engines; external engines are let go."""
        self._stopping = True
        roster = self._roster
        if self.recovery is not None:
            await self.recovery.close()
        if self.is_external:
            await asyncio.gather(*(let_go(engine, GROUP_NAME) for engine in roster.living))
        elif roster.router is not None and roster.router_service is None:
            for engine in roster.engines:
                await roster.forget(engine)
        services: list[EngineService] = [
            engine.service for engine in roster.engines if engine.service.phase not in ("dead", "lost")
        ]
        if roster.router_service is not None and roster.router_service.phase not in ("dead", "lost"):
            services.append(roster.router_service)
        ends = await asyncio.gather(*(service.stop("the run is over") for service in services), return_exceptions=True)
        for client in (*(engine.client for engine in roster.engines), roster.router):
            if client is not None:
                await client.close()
        for end in ends:
            if isinstance(end, BaseException):
                logger.warning("a service did not stop in good order: %s", end)
        roster.engines, roster.router, roster.router_service = [], None, None
        await asyncio.to_thread(forget_stale)  # of engines that died before they could do it themselves

    @property
    def targets(self) -> list[EngineTarget]:
        """The engines that generate."""
        return [engine.target for engine in self._roster.living]

    @property
    def router_url(self) -> str:
        """Where requests go."""
        return self._roster.router_url

    @property
    def weight_version(self) -> int:
        """That of the last update; 0: as loaded from disk."""
        return self._updates.state.version

    async def failed(self) -> MilesError:
        """Waits until something has failed that the run cannot go on without; returns the error to end with: the first
        death of router or engine that was not fenced before; with recovery, what it gives up for."""
        if self.recovery is not None:
            return await asyncio.shield(self.recovery.over)
        roster = self._roster
        services: list[EngineService] = [engine.service for engine in roster.living]
        if roster.router_service is not None:
            services.append(roster.router_service)
        return await first_death(services, lambda name: self._stopping or name in roster.out)

    # -- phases ----------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Generate nothing until ``resume``; engines are not probed meanwhile."""
        mode, engines = self._updates.mode, self._roster.living
        await all_of(*(engine.service.pause() for engine in engines))
        await all_of(*(engine.client.pause(mode) for engine in engines))

    async def resume(self) -> None:
        """Generate again."""
        engines = self._roster.living
        await all_of(*(engine.client.resume() for engine in engines))
        await all_of(*(engine.service.resume() for engine in engines))

    async def release(self) -> dict[str, Any]:
        """Have engines give their memory back (``--offload-rollout``). No request may be running. They are not probed,
        and none is restarted, before they have all of it again.

        Returns ``released``, the tags; and on a CPU, where that is none, ``why``.
        """
        if not self._config.get("offload_rollout"):
            return {"released": [], "why": "--offload-rollout is not set"}
        if self._config["device"] == "cpu":
            return {"released": [], "why": CPU_KEEPS}
        tags = self._offloaded_tags()
        recovery = self.recovery
        if recovery is not None:
            recovery.hold(True)
            await recovery.until(lambda: recovery.num_starting == 0)
        self._memory_is_released = True
        await all_of(*(engine.service.pause() for engine in self._ready))
        await all_of(*(self._bounded(engine, engine.client.release_memory(tags)) for engine in self._ready))
        return {"released": tags, "why": ""}

    async def resume_memory(self, what: str = "all") -> None:
        """Have them take it back: ``weights`` before a weight update, ``kv_cache`` (with what else there is) after.

        Engines that wait for requests get them only with all of their memory."""
        tags = {"all": MEMORY_TAGS, "weights": ("weights",), "kv_cache": ("kv_cache", "cuda_graph")}[what]
        await all_of(*(self._bounded(engine, engine.client.resume_memory(tags)) for engine in self._ready))
        if what == "weights" or not self._memory_is_released:
            return
        self._memory_is_released = False
        await all_of(*(engine.service.resume() for engine in self._ready))
        if self.recovery is not None:
            self.recovery.hold(False)
            await self.recovery.admit_all()

    def _offloaded_tags(self) -> list[str]:
        wanted = self._config.get("offload_rollout_level") or ["kv_cache", "weight"]
        named = {"kv_cache": "kv_cache", "weight": "weights"}
        return ["cuda_graph", *(named[level] for level in wanted)]

    @property
    def _ready(self) -> list[Engine]:
        """Those that have memory: that generate, or wait for weights."""
        return [engine for engine in self._roster.engines if not self._roster.has_ended(engine)]

    async def _bounded(self, engine: Engine, call: Coroutine[Any, Any, None]) -> None:
        """With recovery, an engine that fails in it or hangs is replaced."""
        if self.recovery is None:
            await call
            return
        try:
            await while_alive(call, engine.client, silence_s=self._silence_s, timeout_s=LOAD_S)
        except MilesError as error:
            await self._fence(engine, f"{error.what}: {error.evidence}")

    # -- weights ---------------------------------------------------------------------------------------------

    async def weight_update(self, send: Send, *, version: int | None = None) -> int:
        """Give all engines the trainer's weights, as one transaction; returns the version that they report then.

        ``send(WeightUpdate)`` has the trainer move them. An engine that fails is fenced and gets no more requests;
        ``targets`` tells who is left.

        With recovery, engines that wait for weights take part, and it is waited for one where there is none.

        Raises:
            NoEngineLeft: none is. EngineGivenUp: none comes back. Errors of ``send`` that are not about engines: then
            all are fenced, too.
        """
        recovery = self.recovery
        if recovery is None:
            return await self._updates.update(send, version)
        while True:
            await recovery.until(lambda: recovery.num_serving + recovery.num_waiting > 0)
            try:
                done = await self._updates.update(send, version)
                break
            except NoEngineLeft as error:
                logger.warning("%s; it is made again when one is back", error.what)
                if version is not None and version <= self._updates.state.version:
                    version = self._updates.state.version + 1  # all had it, and died before they went on
        if not self._memory_is_released:  # else when it is back: a request without a KV cache ends an engine
            await recovery.admit_all()
        return done

    async def catch_up(self, send: Send) -> None:
        """Give engines that wait for it the version of the others, which the trainer's weights have to be still.

        Raises: as ``weight_update``. Engines that fail in it are restarted, which is no error."""
        if self.recovery is None:
            return
        try:
            await self._updates.catch_up(send)
        except NoEngineLeft as error:
            logger.warning("%s", error)
        await self.recovery.admit_all()

    async def check_equal(self, export: Path | str) -> None:
        """Check that all engines hold what they would load from this Hugging Face directory, which they load doing so.

        Raises:
            WeightsDiffer: the first engine that does not, both checksums, and the first parameters that differ.
        """
        skip = self._config.get("check_weight_update_skip_list") or ()
        for engine in self._roster.living:
            try:
                await check_engine(engine.client, export, version=self.weight_version, skip=skip)
            except EngineSilent as error:
                if self.recovery is None:
                    raise
                await self._fence(engine, f"{error.what}: {error.evidence}")

    async def _fence(self, engine: Engine, why: str) -> None:
        """Take an engine out: no requests from the router, then no process."""
        name = engine.target.name
        if self._roster.has_ended(engine):
            return
        logger.error("%s is fenced: %s", name, why)
        await self._roster.take_out(engine, why)
        if self.recovery is not None:
            self.recovery.died(name, why)
