"""Who of a fleet is there: engines, those of them that get requests, and the router in front. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from miles.backends.sglang_utils.client import EngineSilent
from miles.backends.sglang_utils.fleet_parts import Engine, EngineService, all_of
from miles.backends.sglang_utils.fleet_update import UpdateRunner
from miles.backends.sglang_utils.router import RouterClient, WorkerNotTaken
from miles.backends.weight_update.messages import EngineTarget
from miles_agents.errors import MilesError
from miles_controller.services import ServiceHandle
from miles_controller.weight_versions import Holds

logger = logging.getLogger(__name__)
_INTRODUCTION_S = 20.0


class Roster:
    """Attributes:
    engines: One for each place, the newest.
    out: Names of those that get no requests: fenced, dead, or without the current weights.
    router, router_service, router_url: The last is None where the router is somebody else's.
    """

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.out: set[str] = set()
        self.router: RouterClient | None = None
        self.router_service: ServiceHandle | None = None
        self.router_url = ""
        self._ended: list[Engine] = []

    @property
    def living(self) -> list[Engine]:
        """Engines that get requests."""
        return [engine for engine in self.engines if engine.target.name not in self.out]

    def named(self, name: str) -> Engine | None:
        """The newest engine of that name."""
        return next((engine for engine in self.engines if engine.target.name == name), None)

    def put(self, engine: Engine) -> None:
        """In place of an earlier one of its name, if there is one."""
        places = {one.target.name: place for place, one in enumerate(self.engines)}
        if engine.target.name in places:
            self.engines[places[engine.target.name]] = engine
        else:
            self.engines.append(engine)
            self.engines.sort(key=lambda one: one.target.rank_offset)

    def has_ended(self, engine: Engine) -> bool:
        """Whether it was taken out for good."""
        return any(one is engine for one in self._ended)

    async def take_out(self, engine: Engine, why: str) -> None:
        """For good: no requests from the router, and no process. Whoever has its name next is not meant."""
        if self.has_ended(engine):
            return
        self._ended.append(engine)
        self.out.add(engine.target.name)
        await asyncio.gather(self.forget(engine), _fence(engine, why))

    async def forget(self, engine: Engine) -> None:
        """The router sends it nothing any more."""
        try:
            if self.router is not None:
                await self.router.remove(engine.target.url)
        except MilesError as error:
            logger.warning("the router did not forget %s: %s", engine.target.name, error.what)


async def _fence(engine: Engine, why: str) -> None:
    try:
        await engine.service.fence(why)
    except MilesError as error:
        logger.info("%s could not be fenced: %s", engine.target.name, error.what)


class FleetHands:
    """Ends and starts a fleet's services for its recovery: ``fleet_recovery.Hands``.

    Args:
        start_engine: Of a rank, until it answers.
        start_router: Likewise.
        loaded_version: What an engine holds that has just started, while no update was made: 0, as all others; None:
            nobody knows.
        router_failed: Told when the router does not answer.
    """

    def __init__(
        self,
        roster: Roster,
        updates: UpdateRunner,
        *,
        start_engine: Callable[[int], Awaitable[Engine]],
        start_router: Callable[[], Awaitable[tuple[ServiceHandle, RouterClient]]],
        loaded_version: int | None,
        router_failed: Callable[[str], None],
    ) -> None:
        self._roster = roster
        self._updates = updates
        self._start_engine = start_engine
        self._start_router = start_router
        self._loaded_version = loaded_version
        self._router_failed = router_failed

    async def retire(self, name: str, why: str) -> None:
        """See ``Hands``."""
        engine = self._roster.named(name)
        if engine is None:
            await self._retire_router()
            return
        await self._roster.take_out(engine, why)
        await _stop(engine.service, why)
        await engine.client.close()

    async def note_failure(self, name: str, why: str) -> None:
        """See ``Hands``."""
        engine = self._roster.named(name)
        if engine is not None:
            await self._updates.failed(engine, why)

    async def begin(self, name: str) -> EngineService:
        """See ``Hands``."""
        before = self._roster.named(name)
        if before is None:
            return await self._begin_router()
        engine = await self._start_engine(int(name.rpartition("-")[2]))
        try:
            version = self._loaded_version if self._updates.state.version == 0 else None
            await self._updates.replaced(engine, version)
        except BaseException:
            await engine.client.close()
            await _stop(engine.service, "it is not needed any more")
            raise
        self._roster.out.add(name)
        self._roster.put(engine)
        return engine.service

    async def admit(self, name: str) -> int | None:
        """See ``Hands``."""
        roster, engine = self._roster, self._roster.named(name)
        if engine is None:
            return 0  # the router
        if self._updates.holds(name) is not Holds.CURRENT:
            return None
        while (router := roster.router) is not None:
            try:
                await router.add(engine.target.url, engine.target.api_key)
                break
            except EngineSilent as error:
                if roster.router is not router:
                    continue
                if roster.router_service is None:
                    raise
                # When the router is back, it gets to know all that are living, which this one is from now on.
                self._router_failed(f"{error.what}: {error.evidence}")
                break
        if roster.has_ended(engine):
            return None  # it was taken out meanwhile, and its name is its successor's
        roster.out.discard(name)
        return self._updates.state.version

    async def _retire_router(self) -> None:
        service, client = self._roster.router_service, self._roster.router
        if service is not None:
            await _stop(service, "it has failed")
        if client is not None:
            await client.close()

    async def _begin_router(self) -> EngineService:
        roster = self._roster
        service, client = await self._start_router()
        known: set[str] = set()
        try:
            roster.router_service, roster.router, roster.router_url = service, client, client.url
            while new := [engine.target for engine in roster.living if engine.target.url not in known]:
                known.update(target.url for target in new)
                await all_of(*(_introduce(client, target) for target in new))
        except BaseException:
            await client.close()
            await _stop(service, "it did not take the engines")
            raise
        return service


async def _introduce(router: RouterClient, target: EngineTarget) -> None:
    """An engine that the router does not take is not well, which its own health checks find out; the router is."""
    try:
        await router.add(target.url, target.api_key, timeout_s=_INTRODUCTION_S)
    except WorkerNotTaken as error:
        logger.warning("the new router did not take %s: %s", target.name, error.what)


async def _stop(service: EngineService, why: str) -> None:
    """Until nothing of it runs; it may have ended by itself."""
    try:
        await service.stop(why)
    except MilesError as error:
        logger.info("%s was not there to be stopped: %s", service.name, error.what)
