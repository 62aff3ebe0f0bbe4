"""A way to ask one host: a probe process behind a command (this machine, ssh, srun), or a run's agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from miles_agents import probe
from miles_agents.errors import EnvironmentFault, MilesError
from miles_controller import Controller

Answer: TypeAlias = Mapping[str, Any]
Wrap: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
"""Arguments for the host's Python (``-c PROGRAM``) to the whole command that runs it there."""

_END_S = 5.0
_MAX_LINE = 4 << 20
_TAIL = 500


class NoAnswer(EnvironmentFault):
    """A host did not answer a question of the preflight check."""

    code = "E-DOCTOR-001"


class Channel(Protocol):
    """One host."""

    @property
    def name(self) -> str:
        """The host's, for people."""

    async def ask(self, do: str, timeout_s: float, **details: Any) -> Answer:
        """The answer to a question of ``miles_agents.probe``. Raises NoAnswer."""

    async def close(self) -> None:
        """End it; idempotent."""


class ProcessChannel:
    """A probe that is sent to a Python somewhere and ends with its stdin.

    Args:
        name: The host's, for people.
        wrap: Makes the command.
        env: Variables of the probe, over those that it has there. They may be secret: no command line has them.
    """

    def __init__(self, name: str, wrap: Wrap, env: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._command = list(wrap(["-u", "-c", probe.BOOT]))
        self._env = dict(env or {})
        self._process: asyncio.subprocess.Process | None = None
        self._noise: list[str] = []
        self._stderr: asyncio.Task[None] | None = None
        self._wrote = b""

    @property
    def name(self) -> str:
        """The host's."""
        return self._name

    async def ask(self, do: str, timeout_s: float, **details: Any) -> Answer:
        """See ``Channel``. The first question starts the process."""
        try:
            async with asyncio.timeout(timeout_s):
                process = self._process or await self._start()
                line = json.dumps({"do": do, **details}) + "\n"
                if process.stdin is None or process.stdout is None:
                    raise AssertionError("started with pipes")
                await _send(process.stdin, line.encode())
                return await self._next_answer(process.stdout)
        except TimeoutError:
            raise await self._no_answer(f"nothing within {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise await self._no_answer(str(error)) from error

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_MAX_LINE, start_new_session=True
        )
        self._process = process
        if process.stdin is None or process.stderr is None:
            raise AssertionError("started with pipes")
        self._stderr = asyncio.create_task(self._keep(process.stderr))
        source = _source()
        await _send(process.stdin, f"{json.dumps(self._env)}\n{len(source)}\n".encode() + source)
        return process

    async def _keep(self, stderr: asyncio.StreamReader) -> None:
        while text := await stderr.read(1 << 16):
            self._wrote = (self._wrote + text)[-_TAIL:]

    async def _next_answer(self, stdout: asyncio.StreamReader) -> Answer:
        while line := (await stdout.readline()).decode(errors="replace"):
            if line.startswith(probe.MARK):
                answer: Answer = json.loads(line.removeprefix(probe.MARK))
                return answer
            self._noise.append(line)
        raise await self._no_answer("it ended")

    async def _no_answer(self, why: str) -> NoAnswer:
        self._kill()  # behind ssh and srun, too, this ends its stdin
        said = await self._said()
        return NoAnswer(
            f"{self.name} does not answer",
            evidence=f"{why}; it wrote: {said}" if said else why,
            advice="Run the command by hand: " + " ".join(self._command[:-1]),
        )

    async def _said(self) -> str:
        """The end of what it wrote beside answers. Ends the process."""
        await self.close()
        text = "".join(self._noise[-10:]) + self._wrote.decode(errors="replace")
        return " / ".join(line for line in text.strip()[-_TAIL:].splitlines() if line.strip())

    async def close(self) -> None:
        """The end of its stdin ends it; else it is killed."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            self._kill()
        await process.wait()
        if self._stderr is not None:
            await asyncio.wait([self._stderr], timeout=1.0)
            self._stderr.cancel()

    def _kill(self) -> None:
        """With what it has started (a ``ProxyCommand``), unless it has ended well."""
        if self._process is not None and self._process.returncode != 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own


async def _send(stdin: asyncio.StreamWriter, data: bytes) -> None:
    """Raises OSError where nobody reads any more."""
    try:
        stdin.write(data)
        await stdin.drain()
    except RuntimeError as error:  # of uvloop, once the process has ended
        raise BrokenPipeError("it ended") from error


def _source() -> bytes:
    return Path(probe.__file__).read_bytes()


class AgentChannel:
    """A node's agent, which has joined a run."""

    def __init__(self, controller: Controller, node: str) -> None:
        self._controller = controller
        self._node = node

    @property
    def name(self) -> str:
        """The node's."""
        return self._node

    async def ask(self, do: str, timeout_s: float, **details: Any) -> Answer:
        """See ``Channel``."""
        fabric = self._controller.fabric
        node = fabric.find(self._node)
        if node is None:
            raise NoAnswer(f"{self.name} does not answer", evidence="its agent has left", advice="Look at its log.")
        agent = fabric.agent(node).options(timeout_s=timeout_s)
        try:
            answer: Answer = await agent.endpoint("examine").call_one({"do": do, **details})
        except MilesError as error:
            raise NoAnswer(f"{self.name} does not answer", evidence=error.what, advice=error.advice) from error
        return answer

    async def close(self) -> None:
        """Its listeners close."""
        try:
            await self.ask("close", 5.0)
        except NoAnswer:
            return  # it is gone, and they with it
