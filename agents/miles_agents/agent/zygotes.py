"""The zygotes of an agent: started when wanted, replaced when dead, ended when idle. docs/design.md, "Fast start".

Consumes: starts of workers, ends of zygotes, the clock. Produces: children that zygotes made; news, for the log and
the controller. Waits for: a zygote that imports (``IMPORT_S``; each caller bounds its own wait); a hand-over (bounded
by itself). Invariants: ``ZygoteTable`` decides; a hand-over that failed ends its zygote, and is made again once;
nothing of a start that raises is left; the workers of a zygote that ends are not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles_agents.agent.background import Background
from miles_agents.agent.logs import last_lines, last_words
from miles_agents.agent.process import ProcessTable
from miles_agents.agent.process_child import Child
from miles_agents.agent.process_launch import CannotStart, Command
from miles_agents.agent.zygote_process import HandOverFailed, OnStep, Zygote
from miles_agents.agent.zygote_profile import Profile
from miles_agents.agent.zygote_table import Limits, No, ZygoteTable

logger = logging.getLogger(__name__)
IMPORT_S = 300.0
_SWEEP_S = 10.0
_GIVEN_UP_S = 1.0
_END_S = 25.0
"""How long ending one may take: killing (10 s), GPU memory (10 s), margin."""
_TRIES = 2
_TAIL_LINES = 5
News = Callable[[str, str], None]
"""Told what happened (``zygote_refused``, ``zygote_failed``), and the story."""


class NoZygote(Exception):
    """No zygote for this worker, and why; it is to be started by exec."""


class MissingModule(Exception):
    """A module is not found without the run's own ``sys.path`` entries: they belong into the profile."""


class _Life:
    """One zygote, from the wish for it to the end of its process."""

    def __init__(self, number: int, profile: Profile, log_path: Path) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.profile = profile
        self.log_path = log_path
        self.pid = 0
        self.ready: asyncio.Future[Zygote | Exception] = loop.create_future()
        """The zygote, or why there is none."""
        self.unwanted: asyncio.Future[None] = loop.create_future()
        self.task: asyncio.Task[None] | None = None

    def end(self) -> None:
        """Its process is to end."""
        if not self.unwanted.done():
            self.unwanted.set_result(None)

    def tell(self, outcome: Zygote | Exception) -> None:
        """To all who wait for it; the first word counts."""
        if not self.ready.done():
            self.ready.set_result(outcome)


class Zygotes:
    """See the module's docstring. Of one life of the agent; ``close`` it before the next."""

    def __init__(
        self,
        table: ProcessTable,
        log_dir: Path,
        *,
        also: tuple[str, ...] = (),
        limits: Limits | None = None,
        on_step: OnStep = lambda step, pid: None,
    ) -> None:
        """``also``: modules of the runtime that most workers import with their actor's class, whatever is named."""
        self.news: News = lambda kind, text: None
        self._table = table
        self._log_dir = log_dir
        self._also = also
        self._on_step = on_step
        self._loop = asyncio.get_running_loop()
        self._zygotes = ZygoteTable(limits)
        self._lives: dict[Profile, _Life] = {}
        self._tasks = Background()
        self._numbers = itertools.count()
        self._sweep: asyncio.TimerHandle | None = None
        self._undoing: set[asyncio.Task[None]] = set()

    def lives(self, profile: Profile) -> bool:
        """Whether there is one, ready or not."""
        return self._zygotes.lives(profile)

    def warm(self, profile: Profile) -> None:
        """Start a zygote now, and keep it."""
        with contextlib.suppress(NoZygote):
            life = self._want(profile, keep=True)
            self._zygotes.leave(profile, life.number, self._loop.time(), made=False)

    async def start(self, profile: Profile, command: Command, birth: bytes, *, wait_s: float) -> Child:
        """A worker of a zygote of this profile, as if ``command`` had been executed and had read ``birth``.

        ``wait_s``: how long to wait for a zygote that still imports. May be cancelled: nothing is left then.

        Raises:
            NoZygote: There is none, or it failed twice.
            MissingModule: The profile needs ``sys_path``.
            CannotStart: The worker could not settle.
        """
        deadline = self._loop.time() + wait_s
        why = ""
        for _ in range(_TRIES):
            life = self._want(profile)
            made = False
            try:
                zygote = await self._ready(life, deadline)
                child = await self._hand_over(life, zygote, command, birth)
                made = True
            except HandOverFailed as failure:
                why = str(failure)
            else:
                return child
            finally:
                self._zygotes.leave(profile, life.number, self._loop.time(), made=made)
            await self._fail(life, why)
        raise NoZygote(why)

    async def close(self) -> None:
        """End all zygotes. Their workers live on."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._zygotes.keep_none()
        lives = list(self._lives.values())
        for life in lives:
            self._end(life)
        tasks = [life.task for life in lives if life.task is not None]
        if waits := {*tasks, *self._undoing}:
            await asyncio.wait(waits, timeout=_END_S)
        await self._tasks.close()

    def facts(self) -> list[dict[str, Any]]:
        """For the status: one entry per living zygote."""
        return [
            {
                "name": profile.name,
                "modules": list(profile.modules),
                "state": record.state,
                "pid": self._lives[profile].pid,
                "made": record.made,
                "memory_bytes": _resident(self._lives[profile].pid),
            }
            for profile, record in self._zygotes.living.items()
        ]

    # -- starts ----------------------------------------------------------------------------------------------

    def _want(self, profile: Profile, *, keep: bool = False) -> _Life:
        """The zygote of the profile, begun if need be; the caller is a user of it. Raises NoZygote."""
        answer = self._zygotes.ask(profile, self._loop.time(), keep=keep)
        if isinstance(answer, No):
            raise NoZygote(answer.why)
        for other in answer.end:
            self._end(self._lives[other])
        if answer.start:
            number = next(self._numbers)
            life = self._lives[profile] = _Life(answer.life, profile, self._log_dir / f"zygote-{number}.log")
            life.task = self._tasks.create_task(self._live(life), name=f"zygote {profile.name}")
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SWEEP_S, self._end_idle)
        return self._lives[profile]

    async def _ready(self, life: _Life, deadline: float) -> Zygote:
        await asyncio.wait([life.ready], timeout=max(0.0, deadline - self._loop.time()))
        if not life.ready.done():
            raise NoZygote("the zygote still imports")
        outcome = life.ready.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _hand_over(self, life: _Life, zygote: Zygote, command: Command, birth: bytes) -> Child:
        making = self._loop.create_task(zygote.hand_over(command, birth, self._on_step))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            # It cannot be stopped half-way without leaving somebody for a moment: let it come to its end, and end that.
            # Whoever cancels again stops waiting for this, not this.
            undoing = self._loop.create_task(self._undo(life, making), name=f"undo a start of {life.profile.name}")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            await asyncio.shield(undoing)
            raise

    async def _undo(self, life: _Life, making: asyncio.Task[Child]) -> None:
        await asyncio.wait([making], timeout=_GIVEN_UP_S)
        if not making.done():
            await self._fail(life, "it does not react")
            await asyncio.wait([making])
        if not making.cancelled() and making.exception() is None:
            await self._table.kill_tree(making.result(), grace_s=0.0)

    # -- lives of zygotes --------------------------------------------------------------------------------------

    async def _live(self, life: _Life) -> None:
        try:
            zygote = await Zygote.launch(life.profile, self._table, life.log_path, self._also)
        except (CannotStart, OSError) as error:
            self._note_failure(
                life, f"it cannot be executed: {error.what if isinstance(error, CannotStart) else error}"
            )
            return
        except BaseException:
            self._note_failure(life, "its start was broken off")
            raise
        life.pid = zygote.child.pid
        try:
            if await self._judge(life, zygote):
                waits: set[asyncio.Future[Any]] = {life.unwanted, zygote.child.exited}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                self._note_end(life, zygote)
        finally:
            zygote.close()
            await self._table.kill_tree(zygote.child, grace_s=0.0)

    async def _judge(self, life: _Life, zygote: Zygote) -> bool:
        """Wait for its verdict on itself. False: it is of no use."""
        waits: set[asyncio.Future[Any]] = {life.unwanted, zygote.verdict}
        await asyncio.wait(waits, timeout=IMPORT_S, return_when=asyncio.FIRST_COMPLETED)
        verdict = zygote.verdict.result() if zygote.verdict.done() else None
        if verdict is None:
            if not zygote.verdict.done() and not life.unwanted.done():
                self._note_failure(life, f"it imports for {IMPORT_S:g} s already")
            else:
                await zygote.child.wait(_GIVEN_UP_S)
                self._note_end(life, zygote)
            return False
        if verdict.missing:
            self._forget(life)
            self._zygotes.ended(life.profile)
            life.tell(MissingModule(verdict.missing))
            return False
        if verdict.refusal:
            self._zygotes.refused(life.profile, life.number, verdict.refusal)
            self._forget(life)
            life.tell(NoZygote(verdict.refusal))
            self._tell(life, "zygote_refused", verdict.refusal)
            return False
        self._zygotes.ready(life.profile, life.number)
        life.tell(zygote)
        return True

    def _note_end(self, life: _Life, zygote: Zygote) -> None:
        if life.unwanted.done():
            life.tell(HandOverFailed("the zygote was ended"))
        else:
            words = last_words(last_lines(life.log_path), _TAIL_LINES)
            self._note_failure(life, f"it ended: {zygote.child.describe()}; its last lines:\n{words}")

    def _note_failure(self, life: _Life, why: str) -> None:
        life.tell(HandOverFailed(why))
        if self._zygotes.failed(life.profile, life.number, why, self._loop.time()):
            self._forget(life)
            self._tell(life, "zygote_failed", why)
            self._warm_again()
        life.end()

    async def _fail(self, life: _Life, why: str) -> None:
        """It could not make a worker: returns when nothing of it is left."""
        self._note_failure(life, why)
        if life.task is not None:
            await asyncio.wait([life.task], timeout=_END_S)

    def _end(self, life: _Life) -> None:
        self._zygotes.ended(life.profile)
        self._forget(life)
        life.end()

    def _end_idle(self) -> None:
        for profile in self._zygotes.idle(self._loop.time()):
            life = self._lives[profile]
            logger.info("zygote %s is not used any more and ends", profile.name)
            self._forget(life)
            life.end()
        self._warm_again()
        wanted = bool(self._lives) or self._zygotes.keeps
        self._sweep = self._loop.call_later(_SWEEP_S, self._end_idle) if wanted else None

    def _warm_again(self) -> None:
        for profile in self._zygotes.lacking(self._loop.time()):
            self.warm(profile)

    def _forget(self, life: _Life) -> None:
        if self._lives.get(life.profile) is life:
            del self._lives[life.profile]

    def _tell(self, life: _Life, kind: str, why: str) -> None:
        text = f"zygote {life.profile.name}: {why} (log {life.log_path})"
        logger.warning("%s", text)
        self.news(kind, text)


def _resident(pid: int) -> int:
    """Bytes that a process has in memory; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
