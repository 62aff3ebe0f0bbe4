"""``--launcher external``: somebody else starts ``miles agent`` on each node; here are keys and commands for it.

``ExternalAgents`` consumes names and a controller that listens where the nodes reach it. It produces a key file for
each node, the commands that join, lines that say who is missing, and nodes that have joined. It waits for them until
its deadline. Invariants: key files are readable for this user alone and gone when all have joined or the run has ended;
agents are told when the run ends, and nothing else is done to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from miles.training.job import Nodes
from miles_agents.errors import EnvironmentFault
from miles_controller import Controller
from miles_launcher.local import agent_flags
from miles_launcher.own_address import bind_address

KEYS = "join"
"""Directory of the key files, in the run's."""
_TOLD_AGAIN_S = 60.0
_TOGETHER_S = 1.0
_SHOWN = 16


class CannotWriteKeys(EnvironmentFault):
    """The key files of a run cannot be written."""

    code = "E-EXTERNAL-001"


def nodes_by_others(config: Mapping[str, Any]) -> Nodes:
    """Nodes that somebody else brings."""
    names = tuple(str(machine["name"]) for machine in config["machines"])
    timeout_s = float(config["start_timeout"])
    flags = agent_flags(cpu_slots=config["cpu_slots"] or None, interface=config["interface"])

    def start(controller: Controller, run_dir: Path) -> AbstractAsyncContextManager[Any]:
        return ExternalAgents(controller, names, run_dir=run_dir, flags=flags, timeout_s=timeout_s)

    return Nodes(names, start, bind=bind_address(config["controller_host"], names), join_s=timeout_s)


class ExternalAgents:
    """See the module.

    Args:
        run_dir: Key files go to ``<run_dir>/join/<node>.key``.
        flags: Of ``miles agent``, for all nodes.
        timeout_s: Until all have joined.
        say: Shows a line to a person.
    """

    def __init__(
        self,
        controller: Controller,
        names: Sequence[str],
        *,
        run_dir: Path,
        flags: Sequence[str] = (),
        timeout_s: float,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self._controller = controller
        self._names = list(names)
        self._keys = run_dir.absolute() / KEYS
        self._flags = list(flags)
        self._timeout_s = timeout_s
        self._say = say or _to_stdout
        self._written: list[Path] = []

    async def __aenter__(self) -> ExternalAgents:
        try:
            self._write_keys()
            self._tell_commands()
            await self._wait()
        except BaseException:
            await self._end("the nodes did not all join")
            raise
        self._remove_keys()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._end("the run is done" if kind is None else f"the run failed: {kind.__name__}")

    async def _end(self, reason: str) -> None:
        self._remove_keys()
        await self._controller.dismiss(*self._names, reason=reason)

    def key_file(self, node: str) -> Path:
        """Of that node."""
        return self._keys / f"{node}.key"

    def join_command(self, node: str) -> str:
        """What somebody runs on that node: as it stands where the directory is shared, else with a copied key file."""
        words = ["miles", "agent", "--controller", self._controller.address, "--key-file", str(self.key_file(node))]
        return shlex.join([*words, *self._flags])

    def _write_keys(self) -> None:
        try:
            self._own_directory()
            for node in self._names:
                self.key_file(node).unlink(
                    missing_ok=True
                )  # whatever was there: nobody else has it open, or waits in it
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with os.fdopen(os.open(self.key_file(node), flags, 0o600), "w") as file:
                    self._written.append(self.key_file(node))
                    file.write(self._controller.issue_key(node).rstrip("\n") + "\n")
        except OSError as error:
            raise CannotWriteKeys(
                f"the keys of the nodes cannot be written to {self._keys}",
                evidence=str(error),
                advice="Give a --run-dir that you can write to.",
            ) from error

    def _own_directory(self) -> None:
        """Ours, and nobody else may look into it or put anything there."""
        with contextlib.suppress(FileExistsError):
            self._keys.mkdir(mode=0o700)
        fd = os.open(self._keys, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(f"{self._keys} belongs to another user")
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)

    def _remove_keys(self) -> None:
        """Those that were written here; nothing else that is in their place."""
        for path in self._written:
            with contextlib.suppress(OSError):
                path.unlink()
        self._written.clear()
        with contextlib.suppress(OSError):
            self._keys.rmdir()

    def _tell_commands(self) -> None:
        self._say(f"the controller listens at {self._controller.address}; run on each node:")
        for node in self._names:
            self._say(f"  {self.join_command(node)}")

    async def _wait(self) -> None:
        """Until all have joined; says who is missing whenever that changes, and every minute."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        joins = (self._controller.wait_for_nodes(name, timeout_s=2 * self._timeout_s) for name in self._names)
        waits = dict(zip(map(loop.create_task, joins), self._names, strict=True))
        pending = set(waits)
        try:
            while pending and (left := deadline - loop.time()) > 0:
                missing = [name for wait, name in waits.items() if wait in pending]
                self._say(f"{len(waits) - len(pending)} of {len(waits)} nodes have joined; missing: {_few(missing)}")
                first = asyncio.FIRST_COMPLETED
                done, pending = await asyncio.wait(pending, timeout=min(left, _TOLD_AGAIN_S), return_when=first)
                if done and pending:  # those that come together are told together
                    more, pending = await asyncio.wait(pending, timeout=_TOGETHER_S)
                    done |= more
                for wait in done:
                    wait.result()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if pending:
            await self._controller.wait_for_nodes(*(waits[wait] for wait in pending), timeout_s=0.0)  # says why
        self._say(f"all {len(waits)} nodes have joined")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
