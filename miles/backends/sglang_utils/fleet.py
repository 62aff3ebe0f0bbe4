"""All engines of a run behind their router, as the controller sees them. In the controller's process; imports no torch.

* Consumes: the run's configuration, a controller with a node; the trainer's hand in weight updates (``send``).
* Produces: ``targets``, ``router_url``, ``api_key`` for those who generate; phases; the error with which it ends.
* Waits for: engines and router to come up, each with a deadline; answers of engines, likewise.
* Invariants: an engine that missed a weight update gets no requests and generates nothing; a router of ours and all
  engines of ours need the key that this run made; after ``stop`` nothing of them runs, and engines that somebody else
  has started (``--rollout-external``) are as they were.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.backends.sglang_utils.client import MEMORY_TAGS
from miles.backends.sglang_utils.equal_weights import check_engine
from miles.backends.sglang_utils.external import adopt, external_key, let_go
from miles.backends.sglang_utils.fleet_parts import (
    Engine,
    EngineService,
    all_of,
    death_of,
    start_engine,
    start_router,
)
from miles.backends.sglang_utils.fleet_update import Send, UpdateRunner, settings
from miles.backends.sglang_utils.router import RouterClient
from miles.backends.sglang_utils.server_arguments import BadEngineConfig
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
        node: Where everything runs; default: the first.
        devices: GPUs of each engine, by index, in the order of its ranks. Without meaning on a CPU.
        host: Address on that node that engines and router listen at. Its user's programs reach it, with the key.
    """

    def __init__(
        self,
        controller: Controller,
        config: Mapping[str, Any],
        *,
        node: str | None = None,
        devices: Sequence[Sequence[int]] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.is_external = bool(config.get("rollout_external"))
        self.api_key = (external_key() if self.is_external else "") or secrets.token_urlsafe(32)
        self.router_url = ""
        self._controller = controller
        self._config = dict(config)
        self._node = node
        self._devices = devices or [[] for _ in range(int(config["rollout_num_engines"]))]
        self._host = host
        self._engines: list[Engine] = []
        self._fenced: set[str] = set()
        self._stopping = False
        self._router: RouterClient | None = None
        self._router_service: ServiceHandle | None = None
        self._updates = UpdateRunner(fence=self._fence, **settings(config))

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
                starts = (self._start_engine(rank) for rank in range(len(self._devices)))
                await all_of(self._start_router(), *starts)
            self._engines.sort(key=lambda engine: engine.target.rank_offset)
            if self._router is None:
                raise AssertionError("started above")
            known = {worker["url"] for worker in await self._router.workers()} if self.is_external else set()
            new = [engine.target for engine in self._engines if engine.target.url not in known]
            await all_of(*(self._router.add(target.url, target.api_key) for target in new))
        except BaseException:
            await self.stop()
            raise

    def _joined(self, engine: Engine) -> None:
        self._engines.append(engine)
        self._updates.joined(engine, self._updates.state.version)

    async def _start_engine(self, rank: int) -> None:
        engine = await start_engine(
            self._controller,
            self._config,
            rank,
            node=self._node,
            host=self._host,
            api_key=self.api_key,
            devices=self._devices[rank],
        )
        self._joined(engine)

    async def _start_router(self) -> None:
        config = self._config
        if config.get("sglang_router_ip"):
            if not config.get("sglang_router_port"):
                raise BadEngineConfig(
                    "--sglang-router-ip names a router without its port",
                    evidence=f"--sglang-router-ip {config['sglang_router_ip']}, no --sglang-router-port",
                    advice="Give --sglang-router-port too, or leave both out: a router is started then.",
                )
            host = str(config["sglang_router_ip"])
            self.router_url = f"http://{f'[{host}]' if ':' in host else host}:{config['sglang_router_port']}"
        else:
            service = await start_router(
                self._controller, config, node=self._node, host=self._host, api_key=self.api_key
            )
            self._router_service, self.router_url = service, service.url
        self._router = RouterClient(self.router_url, self.api_key, name="router")

    async def stop(self) -> None:
        """End everything. An external router only forgets the engines; external engines are let go."""
        self._stopping = True
        if self.is_external:
            await asyncio.gather(*(let_go(engine, GROUP_NAME) for engine in self._living))
        elif self._router is not None and self._router_service is None:
            for engine in self._engines:
                await self._forget(engine)
        services: list[EngineService] = [
            engine.service for engine in self._engines if engine.service.phase not in ("dead", "lost")
        ]
        if self._router_service is not None and self._router_service.phase not in ("dead", "lost"):
            services.append(self._router_service)
        ends = await asyncio.gather(*(service.stop("the run is over") for service in services), return_exceptions=True)
        for client in (*(engine.client for engine in self._engines), self._router):
            if client is not None:
                await client.close()
        for end in ends:
            if isinstance(end, BaseException):
                logger.warning("a service did not stop in good order: %s", end)
        self._engines, self._router, self._router_service = [], None, None
        await asyncio.to_thread(forget_stale)  # of engines that died before they could do it themselves

    @property
    def targets(self) -> list[EngineTarget]:
        """The engines that generate."""
        return [engine.target for engine in self._living]

    @property
    def weight_version(self) -> int:
        """That of the last update; 0: as loaded from disk."""
        return self._updates.state.version

    @property
    def _living(self) -> list[Engine]:
        return [engine for engine in self._engines if engine.target.name not in self._fenced]

    async def failed(self) -> MilesError:
        """Waits until the router or an engine has died that was not fenced before; returns the error to end with."""
        services: list[EngineService] = [engine.service for engine in self._living]
        if self._router_service is not None:
            services.append(self._router_service)
        watches = {asyncio.ensure_future(death_of(service)) for service in services}
        try:
            while watches:
                done, watches = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
                for watch in done:
                    error = watch.result()
                    if not self._stopping and error.fields.get("engine") not in self._fenced:
                        return error
            nothing_left: asyncio.Future[MilesError] = asyncio.get_running_loop().create_future()
            return await nothing_left
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    # -- phases ----------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Generate nothing until ``resume``; engines are not probed meanwhile."""
        mode = self._updates.mode
        await all_of(*(engine.service.pause() for engine in self._living))
        await all_of(*(engine.client.pause(mode) for engine in self._living))

    async def resume(self) -> None:
        """Generate again."""
        await all_of(*(engine.client.resume() for engine in self._living))
        await all_of(*(engine.service.resume() for engine in self._living))

    async def release(self) -> dict[str, Any]:
        """Have engines give their memory back (``--offload-rollout``). No request may be running.

        Returns ``released``, the tags; and on a CPU, where that is none, ``why``.
        """
        if not self._config.get("offload_rollout"):
            return {"released": [], "why": "--offload-rollout is not set"}
        if self._config["device"] == "cpu":
            return {"released": [], "why": CPU_KEEPS}
        tags = self._offloaded_tags()
        await all_of(*(engine.client.release_memory(tags) for engine in self._living))
        return {"released": tags, "why": ""}

    async def resume_memory(self, what: str = "all") -> None:
        """Have them take it back: ``weights`` before a weight update, ``kv_cache`` (with what else there is) after."""
        tags = {"all": MEMORY_TAGS, "weights": ("weights",), "kv_cache": ("kv_cache", "cuda_graph")}[what]
        await all_of(*(engine.client.resume_memory(tags) for engine in self._living))

    def _offloaded_tags(self) -> list[str]:
        wanted = self._config.get("offload_rollout_level") or ["kv_cache", "weight"]
        named = {"kv_cache": "kv_cache", "weight": "weights"}
        return ["cuda_graph", *(named[level] for level in wanted)]

    # -- weights ---------------------------------------------------------------------------------------------

    async def weight_update(self, send: Send, *, version: int | None = None) -> int:
        """Give all engines the trainer's weights, as one transaction; returns the version that they report then.

        ``send(WeightUpdate)`` has the trainer move them. An engine that fails is fenced and gets no more requests;
        ``targets`` tells who is left.

        Raises:
            NoEngineLeft: none is. Errors of ``send`` that are not about engines: then all are fenced, too.
        """
        return await self._updates.update(send, version)

    async def check_equal(self, export: Path | str) -> None:
        """Check that all engines hold what they would load from this Hugging Face directory, which they load doing so.

        Raises:
            WeightsDiffer: the first engine that does not, both checksums, and the first parameters that differ.
        """
        skip = self._config.get("check_weight_update_skip_list") or ()
        for engine in self._living:
            await check_engine(engine.client, export, version=self.weight_version, skip=skip)

    async def _fence(self, engine: Engine, why: str) -> None:
        """Take an engine out: no requests from the router, then no process."""
        name = engine.target.name
        self._fenced.add(name)
        logger.error("%s is fenced: %s", name, why)
        await self._forget(engine)
        try:
            await engine.service.fence(why)
        except MilesError as error:
            logger.warning("%s could not be fenced: %s", name, error.what)

    async def _forget(self, engine: Engine) -> None:
        try:
            if self._router is not None:
                await self._router.remove(engine.target.url)
        except MilesError as error:
            logger.warning("the router did not forget %s: %s", engine.target.name, error.what)
