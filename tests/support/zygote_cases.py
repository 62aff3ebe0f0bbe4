"""Zygotes without a cluster: births of workers that nobody waits for, and a pool on a process table of the test's."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from miles_agents.agent.process import Command, ProcessTable
from miles_agents.agent.process_child import Child
from miles_agents.agent.process_exit import OomWatch
from miles_agents.agent.process_tree import children_of
from miles_agents.agent.zygote_profile import Profile, profile_environment
from miles_agents.agent.zygotes import Zygotes
from miles_agents.rpc.shape import Shape
from miles_agents.timings import Timings
from miles_agents.worker.spec import Birth, WorkerSpec

WAIT_S = 60.0


class Pool:
    """Zygotes in ``folder``, with the news of them."""

    def __init__(self, folder: Path, *, oom: OomWatch | None = None, **options: Any) -> None:
        self.folder = folder
        self.table = ProcessTable(oom=oom)
        self.zygotes = Zygotes(self.table, folder, **options)
        self.news: list[tuple[str, str]] = []
        self.zygotes.news = lambda kind, text: self.news.append((kind, text))

    def command(self, number: int = 0, **env: str) -> Command:
        """A worker's, with the environment of this process."""
        return Command(
            argv=(sys.executable, "-m", "miles_agents.worker"),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RANK": str(number), **env},
            cwd=self.folder,
            log_path=self.folder / f"worker-{number}.log",
        )

    def profile(self, *modules: str, sys_path: tuple[str, ...] = (), **env: str) -> Profile:
        """Of ``command``."""
        command = self.command(**env)
        return Profile(sys.executable, command.cwd, profile_environment(command.env), modules, sys_path)

    async def start(self, profile: Profile, number: int = 0, *, wait_s: float = WAIT_S, **env: str) -> Child:
        """A worker that dials an agent that is not there."""
        return await self.zygotes.start(profile, self.command(number, **env), self.birth(number), wait_s=wait_s)

    def birth(self, number: int) -> bytes:
        """Of a worker that lives for as long as the test may take."""
        spec = WorkerSpec("run", 7, "lonely", number, 8, 9, Shape.of(ranks=64))
        timings = Timings(fence_s=200.0, dead_s=300.0)
        return Birth(spec, "unix:///nonexistent/nobody", (0, 1), "token", "node-0", timings).pack()

    def zygote_pids(self) -> list[int]:
        """Of those that execute."""
        return [fact["pid"] for fact in self.zygotes.facts() if fact["pid"]]

    def strangers(self) -> set[int]:
        """Children of this process that the table does not know."""
        return set(children_of(os.getpid())) - set(self.table.spared())


@asynccontextmanager
async def pool(folder: Path, **options: Any) -> AsyncIterator[Pool]:
    """Nothing of it is left, and nobody was left alone meanwhile."""
    made = Pool(folder, **options)
    try:
        yield made
    finally:
        await made.zygotes.close()
        await made.table.kill_all(grace_s=0.0)
        assert await made.table.reap_orphans() == ()
        assert made.strangers() == set()
        made.table.close()
