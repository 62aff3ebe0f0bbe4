"""Carries out what ``engine_lives`` decides, for one fleet (``--use-fault-tolerance``). Imports no torch.

Waits for: deaths that the services of engines and router report; what the fleet does for it, each with a deadline of
its own; whoever uses a fleet waits here (``until``) for engines to come back, which ends at the latest when a budget is
used up. Invariants: ``over`` is set once, with the error to end the run with; after ``close`` nothing goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from miles.backends.sglang_utils import engine_lives as lives
from miles.backends.sglang_utils.engine_lives import ROUTER, Lives, Stage
from miles.backends.sglang_utils.fleet_parts import EngineService, death_of
from miles_agents.errors import ConfigError, MilesError, PeerFault
from miles_controller.policy import Policy

logger = logging.getLogger(__name__)
Emit = Callable[..., None]
"""Of the controller's events: kind, subject, text, and fields."""


class EngineGivenUp(PeerFault):
    """An engine or the router has failed more often than restarts are allowed, or cannot be started any more."""

    code = "E-ENG-010"


class Hands(Protocol):
    """What a fleet does for its recovery."""

    async def retire(self, name: str, why: str) -> None:
        """Nothing is sent to it any more, and nothing of it runs any more."""

    async def note_failure(self, name: str, why: str) -> None:
        """No weight update counts on it any more. Waits for one that is under way."""

    async def begin(self, name: str) -> EngineService:
        """Start another process under this name, and make it known. Raises MilesError."""

    async def admit(self, name: str) -> int | None:
        """Have it get requests if it has the current weights; returns their version. None: it has not."""


class FleetRecovery:
    """See the module's docstring. Lives on the controller's loop, from when all services serve to ``close``."""

    def __init__(
        self,
        services: Iterable[tuple[str, EngineService]],
        hands: Hands,
        emit: Emit,
        *,
        is_ours: bool = True,
        policy: Policy = lives.BUDGET,
    ) -> None:
        found = dict(services)
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[MilesError] = loop.create_future()
        self.say: Callable[[str], None] = logger.info
        """Told of each recovery, in a line."""
        self._loop = loop
        self._hands = hands
        self._emit = emit
        self._state = Lives.of(found, policy=policy, is_ours=is_ours)
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._admitting = asyncio.Lock()
        for name, service in found.items():
            self._watch(name, service)
        self._do(self._keep_time(), "engine recovery clock")

    # -- for the fleet ---------------------------------------------------------------------------------------

    def died(self, name: str, cause: str) -> None:
        """The life of now is over, whatever its process does."""
        self._take(lives.Died(name, self._number(name), cause))

    def hold(self, holds: bool) -> None:
        """No engine is started (``holds``), or again."""
        self._take(lives.Hold(holds))

    async def admit_all(self) -> None:
        """Those that wait and have the current weights now get requests."""
        await asyncio.gather(*(self._admit(name) for name in self._state.engines_in(Stage.WAITING)))

    @property
    def num_waiting(self) -> int:
        """Engines that are ready and have not the current weights."""
        return len(self._state.engines_in(Stage.WAITING))

    @property
    def num_starting(self) -> int:
        """Engines that are being started now."""
        return len(self._state.engines_in(Stage.STARTING))

    @property
    def num_serving(self) -> int:
        """Engines that get requests."""
        return len(self._state.engines_in(Stage.SERVING))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this is so. Raises EngineGivenUp if it is over before."""
        while not holds():
            if self.over.done():
                raise self.over.result()
            await self.next_change()

    async def next_change(self) -> None:
        """Until something has changed in who serves and who waits."""
        await self._changed.wait()

    async def close(self) -> None:
        """Nothing is watched or restarted any more."""
        self._closing = True
        while tasks := [task for task in self._tasks if task is not asyncio.current_task()]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- the shell -------------------------------------------------------------------------------------------

    def _take(self, event: lives.Event) -> None:
        if self._closing:
            return
        self._state, effects = lives.step(self._state, event, self._loop.time())
        for effect in effects:
            match effect:
                case lives.Retire(name, number, cause):
                    self._do(self._retire(name, number, cause), f"retire {name}")
                    self._do(self._hands.note_failure(name, cause), f"note the failure of {name}")
                case lives.Start(name, number):
                    self._do(self._begin(name, number), f"restart {name}")
                case lives.Recovered():
                    self._tell(effect)
                case lives.GiveUp():
                    self._give_up(effect)
        self._notify()

    def _do(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.over.done():
            self.over.set_result(error if isinstance(error, MilesError) else _unexpected(task.get_name(), error))
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _number(self, name: str) -> int:
        life = self._state.lives.get(name)
        return 0 if life is None else life.number

    def _watch(self, name: str, service: EngineService) -> None:
        self._do(self._death(name, self._number(name), service), f"watch {name}")

    async def _death(self, name: str, number: int, service: EngineService) -> None:
        error = await death_of(service)
        self._take(lives.Died(name, number, _first_line(error), is_final=service.phase == "lost"))

    async def _retire(self, name: str, number: int, cause: str) -> None:
        self._emit("engine_lost", name, cause.splitlines()[0], cause=cause, life=number)
        await self._hands.retire(name, cause)
        self._take(lives.Ended(name, number))

    async def _begin(self, name: str, number: int) -> None:
        try:
            service = await self._hands.begin(name)
        except MilesError as error:
            self._take(lives.Died(name, number, _first_line(error), is_final=isinstance(error, ConfigError)))
            return
        self._watch(name, service)
        self._take(lives.Started(name, number))
        await self._admit(name)

    async def _admit(self, name: str) -> None:
        async with self._admitting:  # nobody twice
            if self._state.lives[name].stage is not Stage.WAITING:
                return
            number = self._number(name)
            try:
                version = await self._hands.admit(name)
            except MilesError as error:
                self._take(lives.Died(name, number, _first_line(error)))
                return
            if version is not None:
                self._take(lives.Rejoined(name, number, version))

    async def _keep_time(self) -> None:
        while True:
            at = lives.wake_at(self._state)
            try:
                async with asyncio.timeout_at(at):
                    await self._changed.wait()
            except TimeoutError:
                self._take(lives.Tick())

    def _tell(self, effect: lives.Recovered) -> None:
        weights = "" if effect.name == ROUTER else f"weight version {effect.version}, "
        how = f"{weights}restart {effect.restarts} of {self._state.policy.max_restarts}"
        text = f"recovered {effect.name} in {effect.seconds:.1f} s ({how}) after: {effect.cause}"
        self._emit(
            "recovered", effect.name, text,
            cause=effect.cause, seconds=round(effect.seconds, 3), version=effect.version, restarts=effect.restarts,
        )  # fmt: skip
        self.say(text)

    def _give_up(self, effect: lives.GiveUp) -> None:
        self._emit("engine_given_up", effect.name, effect.reason, causes=list(effect.causes))
        if self.over.done():
            return
        self.over.set_result(
            EngineGivenUp(
                effect.reason,
                evidence="\n".join(f"{number}. {cause}" for number, cause in enumerate(effect.causes, 1)),
                advice=f"Read the log of {effect.name}; what happens again and again has a cause that a restart does "
                "not mend. Continue from the newest checkpoint.",
                engine=effect.name,
            )
        )


def _first_line(error: MilesError) -> str:
    evidence = (error.evidence or "").splitlines()
    return f"{error.what}: {evidence[0]}" if evidence else error.what


def _unexpected(what: str, error: BaseException) -> EngineGivenUp:
    logger.error("%s failed", what, exc_info=error)
    return EngineGivenUp(
        f"{what} failed in a way that was not foreseen",
        evidence=f"{type(error).__name__}: {error}",
        advice="Report it with the traceback in logs/controller.log; continue from the newest checkpoint.",
    )
