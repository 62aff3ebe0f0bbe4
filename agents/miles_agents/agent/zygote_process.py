"""One zygote as its agent sees it: its start, its verdict, the hand-over of each worker. docs/design.md, "Fast start".

Consumes: starts. Produces: children of this process. Waits for: the zygote's verdict or its end (bounded by the
caller); the steps of a hand-over, ``HAND_OVER_S`` in all. Invariants: when ``hand_over`` raises, the line is closed, so
that whoever was made for it ends by itself; only a child that is watched is told to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miles_agents.agent.process import NotAdopted, ProcessTable
from miles_agents.agent.process_child import Child
from miles_agents.agent.process_launch import (
    STARTED,
    Command,
    check,
    explain,
    no_resources,
    open_log,
    settle_options,
)
from miles_agents.agent.process_tree import ProcessId
from miles_agents.agent.zygote_profile import Profile, is_late
from miles_agents.worker.zygote_talk import (
    GO,
    HERE,
    LEAVE,
    MAX_BATCH,
    MAX_MESSAGE,
    Start,
    Verdict,
    Wishes,
    parse_born,
)

HAND_OVER_S = 10.0
_ENDED_S = 5.0
OnStep = Callable[[str, int], None]
"""Told the name of a step before it is taken, and the pid of the zygote."""


class HandOverFailed(Exception):
    """A zygote did not make a worker. It is to be ended, and the start to be made again."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    start: Start
    log: int
    line: socket.socket


class Zygote:
    """One living zygote. Make it with ``launch``."""

    def __init__(self, profile: Profile, table: ProcessTable, child: Child, control: socket.socket) -> None:
        self.profile = profile
        self.child = child
        self._table = table
        self._control = control
        self._loop = asyncio.get_running_loop()
        self.verdict: asyncio.Future[Verdict | None] = self._loop.create_future()
        """What it says of itself; None: it ended without a word. Do not cancel it."""
        self._queue: list[_Waiting] = []
        self._loop.add_reader(control, self._on_verdict)

    @classmethod
    async def launch(cls, profile: Profile, table: ProcessTable, log_path: Path, also: tuple[str, ...] = ()) -> Zygote:
        """Execute one. ``also``: more modules to import. Raises CannotStart, OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # The agent's late variables matter to nobody, but tell whoever looks at /proc whose process this is.
            env = {name: value for name, value in os.environ.items() if is_late(name)} | dict(profile.env)
            argv = (profile.python, "-m", "miles_agents.worker", "--zygote", str(theirs.fileno()), *profile.modules)
            command = Command(argv=argv, env=env, cwd=profile.cwd, log_path=log_path, pass_fds=(theirs.fileno(),))
            ours.setblocking(False)
            ours.send(Wishes(profile.sys_path, also, os.getpid()).pack())
            child = await table.spawn(command)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(profile, table, child, ours)

    def _on_verdict(self) -> None:
        self._loop.remove_reader(self._control)
        try:
            message = self._control.recv(MAX_MESSAGE)
        except OSError:
            message = b""
        if not self.verdict.done():
            self.verdict.set_result(Verdict.unpack(message) if message else None)

    async def hand_over(self, command: Command, birth: bytes, on_step: OnStep) -> Child:
        """A worker of this zygote's, as if ``command`` had been executed and had read ``birth``.

        Raises:
            HandOverFailed: The zygote or the worker died, or took too long.
            CannotStart: The worker could not settle (its working directory is gone, say), or this process lacks means,
                or no process can have such a command.
        """
        check(command)  # else each zygote that is asked would be blamed
        try:
            log = open_log(command.log_path)
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError:
                os.close(log)
                raise
        except OSError as error:
            raise no_resources(command, error) from None
        ours.setblocking(False)
        waiting = _Waiting(Start(settle_options(command), dict(command.env), birth), log, theirs)
        try:
            on_step("ask", self.child.pid)
            self._send_soon(waiting)
            async with asyncio.timeout(HAND_OVER_S):
                return await self._receive(command, _Line(ours), on_step)
        except TimeoutError:
            raise HandOverFailed(f"no worker within {HAND_OVER_S:g} s") from None
        except NotAdopted as error:
            raise HandOverFailed(f"{error.what}: {error.evidence}") from None
        finally:
            ours.close()
            if waiting in self._queue:
                self._queue.remove(waiting)
                _close(waiting)

    async def _receive(self, command: Command, line: _Line, on_step: OnStep) -> Child:
        words = await line.hear()
        found = parse_born(words)
        if found is None:
            raise HandOverFailed(f"the zygote said {words!r}" if words else "the zygote ended")
        process = ProcessId(*found)
        self._table.expect(process)
        try:
            on_step("leave", self.child.pid)
            line.say(LEAVE)
            if (words := await line.hear()) != HERE:
                raise HandOverFailed(f"the worker said {words!r}" if words else "the worker ended")
            on_step("adopt", self.child.pid)
            child = self._table.adopt(process)
        finally:
            self._table.forget(process)
        try:
            on_step("go", self.child.pid)
            line.say(GO)
            said = await line.hear_all()
        except BaseException:
            child.send(signal.SIGKILL)
            await child.wait(_ENDED_S)
            raise
        if said == STARTED:
            return child
        child.send(signal.SIGKILL)
        how = await child.wait(_ENDED_S)
        if not said:
            raise HandOverFailed(f"the worker ended: {how.describe() if how else 'it does not end'}")
        raise explain(command, said, how, HAND_OVER_S)

    def _send_soon(self, waiting: _Waiting) -> None:
        """With all that are asked for in this turn of the loop: they then share one M."""
        self._queue.append(waiting)
        if len(self._queue) == 1:
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        while batch := self._queue[:MAX_BATCH]:
            del self._queue[: len(batch)]
            # It has ended, or reads nothing, or there are no descriptors: whoever waits sees the end of the line.
            with contextlib.suppress(OSError):
                self._send_batch(batch)
            for waiting in batch:
                _close(waiting)

    def _send_batch(self, batch: list[_Waiting]) -> None:
        with contextlib.ExitStack() as stack:
            fds: list[int] = []
            for waiting in batch:
                file = stack.enter_context(os.fdopen(os.memfd_create("start"), "wb"))
                file.write(waiting.start.pack())
                file.seek(0)
                fds += (file.fileno(), waiting.log, waiting.line.fileno())
            socket.send_fds(self._control, [b"fork"], fds)

    def close(self) -> None:
        """Let go of its socket, at whose end it ends. Idempotent."""
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()
        if not self.verdict.done():
            self.verdict.set_result(None)


def _close(waiting: _Waiting) -> None:
    os.close(waiting.log)
    waiting.line.close()


class _Line:
    """The agent's end of one worker's line."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_
        self._loop = asyncio.get_running_loop()

    def say(self, words: bytes) -> None:
        """If nobody is there any more, the next ``hear`` tells."""
        with contextlib.suppress(OSError):
            self._socket.send(words)

    async def hear(self) -> bytes:
        """The next message; b"" at the end."""
        while True:
            try:
                return self._socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                pass
            except OSError:
                return b""
            await self._readable()

    async def hear_all(self) -> bytes:
        """Everything until the end."""
        parts = []
        while part := await self.hear():
            parts.append(part)
        return b"".join(parts)

    async def _readable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def on_readable() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_reader(self._socket, on_readable)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._socket)
