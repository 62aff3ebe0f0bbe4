"""The controller's end of the process of the trackers: what is sent to it, what it says, and how it ends.

Consumes: orders, by ``send``. Produces: lines for the terminal, what trackers remember. Waits for: the process's answer
to ``finish``, with a deadline, after which it is killed with everything below it. Invariants: ``send`` neither waits
nor raises; of a process that is gone or does not read, one line tells; nothing of it is left when ``finish`` returns.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from miles_agents.runtime_dir import sweep

logger = logging.getLogger(__name__)
Say: TypeAlias = Callable[[str], None]
Remember: TypeAlias = Callable[[str, dict[str, Any]], None]

MAX_UNREAD = 32 * 2**20
"""Bytes that may wait for the process to read them."""
GRACE_S = 5.0
"""Beyond the deadline that the process has itself."""
GONE_S = 2.0
"""For the kernel to end what was killed."""
_POLL_S = 0.02
_LINE_LIMIT = 2**20
_TAIL = 3


class TrackerProcess:
    """Made by ``start``. ``grace_s`` and ``max_unread`` may be changed."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, say: Say, remember: Remember) -> None:
        self.grace_s = GRACE_S
        self.max_unread = MAX_UNREAD
        self._process = process
        self._log = log
        self._say = say
        self._remember = remember
        self._finished = asyncio.Event()
        self._told: set[str] = set()
        self._is_ending = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls,
        names: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str],
        say: Say,
        remember: Remember,
        module: str = "miles.tracking.host",
    ) -> TrackerProcess:
        """Start it.

        Args:
            names: The trackers.
            log: Takes what their libraries write.
            env: Its environment.
            say: Takes lines for the terminal.
            remember: Takes a tracker's name and what the next run of it is to know.
            module: What is run.
        """
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *names),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=dict(env),
                start_new_session=True,  # Ctrl-C is for the controller
                limit=_LINE_LIMIT,
            )
        return cls(process, log, say, remember)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, order: Mapping[str, Any]) -> None:
        """Give an order."""
        stdin = self._process.stdin
        if stdin is None or stdin.is_closing() or self._process.returncode is not None:
            return
        if stdin.transport.get_write_buffer_size() > self.max_unread:
            self._tell("trackers do not keep up: records for them are dropped; metrics.jsonl has every metric")
            return
        stdin.write(json.dumps(order).encode() + b"\n")

    async def finish(self, outcome: str, timeout_s: float) -> None:
        """Let the trackers write what is left and end, for so long. Also if this is cancelled, nothing is left."""
        self._is_ending = True
        self.send({"do": "finish", "outcome": outcome, "timeout_s": timeout_s})
        try:
            async with asyncio.timeout(timeout_s + self.grace_s):
                await self._finished.wait()
        except TimeoutError:
            self._tell("trackers have not finished in time and are ended; metrics.jsonl has every metric")
        finally:
            below = self._kill()
            await self._process.wait()
            self._reader.cancel()
            await _gone(below)
            await asyncio.to_thread(sweep)  # its temporary directory, if it could not do so itself

    def _kill(self) -> list[psutil.Process]:
        """The process and what it has started; returns the latter. Collected first: it moves away when its parent
        ends."""
        try:
            tree = [*psutil.Process(self._process.pid).children(recursive=True)]
        except psutil.Error:
            tree = []
        if self._process.returncode is None:
            self._process.kill()
        for child in tree:
            try:
                child.kill()  # psutil compares start times: a pid that was given out again is spared
            except psutil.Error:
                continue
        return tree

    async def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is None:
            return
        async for line in stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                logger.warning("trackers: %r", line[:200])
                continue
            if "say" in answer:
                self._tell(str(answer["say"]))
            elif "began" in answer:
                self._remember(answer["began"], answer["remembered"])
            elif "finished" in answer:
                self._finished.set()
        code = await self._process.wait()
        if not self._is_ending:
            self._tell(
                f"the process of the trackers ended with exit code {code}: {self._last_words()}. The run goes on; "
                f"metrics.jsonl has every metric, {self._log} what the trackers wrote"
            )
        self._finished.set()

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError as error:
            return str(error)
        return " / ".join(line.strip() for line in lines[-_TAIL:] if line.strip())[-400:] or "it wrote nothing"

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


async def _gone(processes: Sequence[psutil.Process]) -> None:
    """Wait until these, which were killed, run no more; whoever adopted them reaps them."""
    for _ in range(int(GONE_S / _POLL_S)):
        if not any(map(_runs, processes)):
            return
        await asyncio.sleep(_POLL_S)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
