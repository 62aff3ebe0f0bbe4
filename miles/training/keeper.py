"""A part of the job that comes back after a death, and calls that outlast it.

Consumes: deaths of the part's mesh, calls of the loop, a function that starts the part anew in the state that it had.
Produces: answers, as from the mesh itself; a mesh after a mesh; an error once the part is given up. Waits for: calls
(with the caller's deadline), a new mesh (until it is up or given up). Invariants: a call that a death ended is made
again on the next mesh, and no other is: errors of user code and of flags end the run; decisions are those of
``recovery_plan``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from miles.backends.weight_update.failures import EnginesMissedUpdate, GroupNotMade
from miles.training.errors import JobPartDied
from miles.training.recovery_plan import Begin, Broke, Died, GiveUp, Life, Rebuilt, RecoveryGivenUp, Wanted, step
from miles_agents.errors import ConfigError, MilesError, PeerFault, UserCodeError
from miles_agents.rpc.errors import DeadlineExceeded, WorkerDied
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.wire.remote_error import RemoteError
from miles_controller import OwnedMesh, Policy

logger = logging.getLogger(__name__)
T = TypeVar("T")
DEATH_S = 5.0
"""How long after an error that may be another's a death may come that explains it: when a rank dies, those that are in
a collective with it often say so first. So much later a user's own mistake on one of several ranks is told."""
GROUP_ENDS_S = 60.0
"""How long the survivors of a death that was seen may take to end, and a hang to be found."""

Change = Callable[[ActorMesh], ActorMesh]


class DiedAgain(PeerFault):
    """A process died while its part was being started anew. Only ever caught."""

    code = "E-REC-002"


def is_final(mesh: OwnedMesh, error: BaseException) -> bool:
    """Whether it would come again for certain: user code or a flag has to be changed. What other libraries raise, torch
    above all, may be the consequence of a death; so may what user code raises on one of several ranks, as it may have
    been in a collective with the rank that died."""
    if isinstance(error, RemoteError):
        return False
    return isinstance(error, ConfigError) or (isinstance(error, UserCodeError) and len(mesh) == 1)


async def is_death(mesh: OwnedMesh, error: BaseException, death_s: float = DEATH_S) -> bool:
    """Whether a call of the mesh failed because the mesh has. Waits for a death that explains the error: ``death_s``,
    or longer where a death is known or a hang."""
    if isinstance(error, EnginesMissedUpdate | GroupNotMade):
        return mesh.failure is not None  # the ranks are well, and say what engines did
    try:
        known = isinstance(error, WorkerDied | DeadlineExceeded)  # of a rank that hangs, heartbeats will tell
        async with asyncio.timeout(GROUP_ENDS_S if known else death_s):
            return await mesh.wait_failed() is not None
    except TimeoutError:
        return False


class Keeper:
    """See the module's docstring. ``run`` it for as long as the job lives.

    Args:
        mesh: The part, up.
        rebuild: Given the dead mesh, ends what is left of it and returns its successor; it calls what it is given with
            that successor as soon as there are processes. Raises DiedAgain for a death.
        on_rebuilt: Told the cause and the seconds from the death on.
        beside: Runs beside each life of the part, also while it is being brought to its state, and is cancelled at its
            end.
        death_s: See ``DEATH_S``.
    """

    def __init__(
        self,
        mesh: OwnedMesh,
        rebuild: Callable[[OwnedMesh, Callable[[OwnedMesh], None]], Awaitable[OwnedMesh]],
        on_rebuilt: Callable[[str, float], None],
        *,
        policy: Policy,
        eager: bool = True,
        beside: Callable[[Keeper, OwnedMesh], Coroutine[Any, Any, None]] | None = None,
        death_s: float = DEATH_S,
    ) -> None:
        self.mesh = mesh
        self.name = mesh.name
        self.note = ""
        """Why we killed it, if we did."""
        self._rebuild = rebuild
        self._on_rebuilt = on_rebuilt
        self._beside = beside
        self._death_s = death_s
        self._watch: asyncio.Future[None] | None = None
        self._life = Life(policy, eager)
        self._wanted = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self.lost: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Watch and bring back, until it is given up. The error is then in ``lost``."""
        self._begin_watch(self.mesh)
        try:
            while not self.lost.done():
                failure = await self.mesh.wait_failed()
                await self._end_watch()
                self._settled.clear()
                if failure is None:
                    self._lose(_stopped(self.name))
                    return
                cause = self._cause(failure.evidence or failure.what)
                logger.info("%s: %s", self.name, cause)
                try:
                    await self._bring_back(cause)
                except Exception as error:  # noqa: BLE001  boundary: it ends the run
                    self._lose(error)
        finally:
            await self._end_watch()

    def _begin_watch(self, mesh: OwnedMesh) -> None:
        if self._beside is not None:
            self._watch = asyncio.ensure_future(self._beside(self, mesh))

    async def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    def _cause(self, found: str) -> str:
        """Why it ended: our own reason, if we had one."""
        cause, self.note = self.note or found, ""
        return cause

    async def _bring_back(self, cause: str) -> None:
        loop = asyncio.get_running_loop()
        began, event = loop.time(), Died(cause)
        self._life, effect = step(self._life, event, loop.time())
        if effect is None:
            await self._wanted.wait()
            began = loop.time()
            self._life, effect = step(self._life, Wanted(), loop.time())
        while isinstance(effect, Begin):
            await asyncio.sleep(max(0.0, effect.at - loop.time()))
            try:
                self.mesh = await self._rebuild(self.mesh, self._begin_watch)
            except DiedAgain as error:
                await self._end_watch()
                again = self._cause(error.evidence)
                logger.warning("%s died while it was started anew: %s", self.name, again)
                self._life, effect = step(self._life, Died(again), loop.time())
            except BaseException:
                self._life, _ = step(self._life, Broke(), loop.time())
                raise
            else:
                self._life, effect = step(self._life, Rebuilt(), loop.time())
                self._wanted.clear()
                self._on_rebuilt(cause, loop.time() - began)
                self._settled.set()
        if isinstance(effect, GiveUp):
            self._lose(self._given_up(effect))

    def _given_up(self, effect: GiveUp) -> RecoveryGivenUp:
        policy = self._life.policy
        return RecoveryGivenUp(
            f"{self.name} died again, and its {policy.max_restarts} restarts within {policy.window_s:g} s are used up",
            evidence="\n".join(effect.causes),
            advice="Read the first cause and its log: a death that comes again has a reason. When that is gone, start "
            "again from the newest checkpoint (--resume auto).",
        )

    def _lose(self, error: BaseException) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        self._settled.set()

    async def ready(self) -> OwnedMesh:
        """The mesh, once it is up. Raises what it was given up with."""
        while True:
            if self.lost.done():
                raise self.lost.result()
            if self.mesh.failure is None:
                if self._settled.is_set():
                    return self.mesh
            else:
                self._settled.clear()  # ``run`` learns of it in a moment
            self._wanted.set()
            await self._settled.wait()

    async def calling(self, work: Callable[[ActorMesh], Awaitable[T]]) -> T:
        """Do something with the mesh; again with its successor, if a death ended it."""
        while True:
            mesh = await self.ready()
            try:
                return await work(mesh)
            except Exception as error:
                if is_final(mesh, error):
                    raise
                if self.mesh is mesh and not await is_death(mesh, error, self._death_s):
                    raise
                logger.info("a call of %s is made again: %s", self.name, _brief(error))


class Lasting:
    """The mesh of a keeper as its callers see it: ``call`` and ``call_one`` outlast its deaths."""

    def __init__(self, keeper: Keeper, change: Change) -> None:
        self._keeper = keeper
        self._change = change

    def options(self, **options: Any) -> Lasting:
        """As of a mesh."""
        return Lasting(self._keeper, lambda mesh: self._change(mesh).options(**options))

    def slice(self, **selectors: int | slice) -> Lasting:
        """As of a mesh."""
        return Lasting(self._keeper, lambda mesh: self._change(mesh).slice(**selectors))

    def __getattr__(self, name: str) -> _LastingEndpoint:
        if name.startswith("_"):
            raise AttributeError(name)
        return _LastingEndpoint(self._keeper, self._change, name)


class _LastingEndpoint:
    """One endpoint of it."""

    def __init__(self, keeper: Keeper, change: Change, name: str) -> None:
        self._keeper = keeper
        self._change = change
        self._name = name

    async def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call every rank."""
        return await self._keeper.calling(lambda mesh: self._change(mesh).endpoint(self._name).call(*args, **kwargs))

    async def call_one(self, *args: Any, **kwargs: Any) -> Any:
        """Call the one rank."""
        return await self._keeper.calling(
            lambda mesh: self._change(mesh).endpoint(self._name).call_one(*args, **kwargs)
        )


def _stopped(name: str) -> JobPartDied:
    return JobPartDied(
        f"{name} was stopped while the job was running",
        evidence="its node was dismissed, or somebody stopped it",
        advice="Look at events.jsonl in the run directory for who did.",
    )


def _brief(error: BaseException) -> str:
    return error.what if isinstance(error, MilesError) else f"{type(error).__name__}: {error}"
