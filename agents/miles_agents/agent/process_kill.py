"""Ends whole process trees: a child, everything below it, and every orphan that this process has adopted.

Why nothing escapes: every child is a child subreaper (``exec_shim``), so the descendants of a living child hang
below it; this process is one too, so those of a dead child become its own children. A child of this process that
it did not start is therefore the orphan of a dead child. Passes repeat until one finds nothing.

Waits for: process ends, each wait bounded by a deadline; what does not end is reported with state and ``wchan``.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from miles_agents.agent.process_child import Child
from miles_agents.agent.process_exit import Exit
from miles_agents.agent.process_gpu import GpuMemoryProbe
from miles_agents.agent.process_tree import (
    GONE_STATES,
    ProcessId,
    Survivor,
    children_of,
    descendants,
    describe_survivor,
    kill_below,
    read_stat,
)

FIRST_PAUSE_S = 0.001
LAST_PAUSE_S = 0.05
GPU_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class KillReport:
    """What ``kill_tree`` did.

    ``ended_by_itself``: the child ended within the grace period. ``processes``: all that were seen in the tree, the
    child first. ``gpu_bytes``: GPU memory still held, by pid, when the wait for it was given up.
    """

    exit: Exit | None
    ended_by_itself: bool
    processes: tuple[ProcessId, ...]
    survivors: tuple[Survivor, ...] = ()
    gpu_bytes: dict[int, int] = field(default_factory=dict)
    took_s: float = 0.0

    @property
    def clean(self) -> bool:
        """Nothing runs any more and no GPU memory is held."""
        return not self.survivors and not self.gpu_bytes

    def describe(self) -> str:
        """For people; one line per thing that is left."""
        lines = [f"{self.exit.describe() if self.exit else 'not ended'}, {len(self.processes)} processes"]
        lines += [f"cannot be killed: {survivor.describe()}" for survivor in self.survivors]
        lines += [f"pid {pid} still holds {size >> 20} MiB of GPU memory" for pid, size in self.gpu_bytes.items()]
        return "\n".join(lines)


class Kin(Protocol):
    """Whom not to take for an orphan."""

    def spared(self) -> Collection[int]:
        """The pids of the direct children that live rightfully, as of now."""


async def kill_tree(
    child: Child,
    kin: Kin,
    *,
    grace_s: float,
    kill_s: float = 10.0,
    gpu: GpuMemoryProbe | None = None,
    gpu_s: float = 10.0,
) -> KillReport:
    """TERM to the child's group, ``grace_s`` for the child to end, then KILL to everything, until all is reaped.

    Args:
        child: May have ended already: then what it left behind is ended.
        kin: Tells orphans from children.
        grace_s: 0 kills at once (fencing).
        kill_s: How long killed processes may take to end.
        gpu: If given, the call also waits until none of the processes holds GPU memory, up to ``gpu_s``.
        gpu_s: See ``gpu``.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    # Taken before the first signal, because GPU memory outlives who obeys TERM; and kept with the child, because
    # whoever looks once more after its end has to know whose memory to wait for.
    seen = child.tree
    if child.exit is None:
        seen |= dict.fromkeys(stat.id for stat in descendants(child.pid))
    if grace_s > 0 and child.send_group(signal.SIGTERM):
        child.send_group(signal.SIGCONT)  # a stopped process sees TERM only once it runs again
        await child.wait(grace_s)
    ended_by_itself = child.exit is not None
    survivors = await _end_all(child, kin, deadline=loop.time() + kill_s, seen=seen)
    held = {}
    if gpu is not None:
        held = await _gpu_memory_left(gpu, seen, deadline=loop.time() + gpu_s)
    return KillReport(
        exit=child.exit,
        ended_by_itself=ended_by_itself,
        processes=tuple(seen),
        survivors=survivors,
        gpu_bytes=held,
        took_s=loop.time() - start,
    )


async def reap_orphans(kin: Kin, *, kill_s: float = 10.0) -> tuple[Survivor, ...]:
    """Kill and reap everything that dead children left behind. Returns what could not be killed."""
    deadline = asyncio.get_running_loop().time() + kill_s
    return await _end_all(None, kin, deadline=deadline, seen={})


async def _end_all(
    child: Child | None, kin: Kin, *, deadline: float, seen: dict[ProcessId, None]
) -> tuple[Survivor, ...]:
    loop = asyncio.get_running_loop()
    pause = FIRST_PAUSE_S
    while True:
        running: list[ProcessId] = []
        if child is not None and child.exit is None:
            child.send_group(signal.SIGKILL)
            child.send(signal.SIGKILL)
            running = [child.id, *kill_below(child.pid)]
        running += kill_below(os.getpid(), spare=kin.spared())
        seen |= dict.fromkeys(running)
        adopted = _reap(_adopted(kin))
        if not running and not adopted:
            return ()
        if loop.time() >= deadline:
            return _left(child, kin)
        if child is not None and child.exit is None:
            await child.wait(pause)
        else:
            await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_S)


def _adopted(kin: Kin) -> set[int]:
    # Read twice: the kernel's list may skip an entry when another one vanishes under the reader.
    return {*children_of(os.getpid()), *children_of(os.getpid())} - set(kin.spared())


def _reap(pids: Iterable[int]) -> int:
    """Reap those that have ended. Returns how many there were, ended or not: each calls for another pass."""
    count = 0
    for pid in pids:
        count += 1
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # a pass for another child was faster
            continue
    return count


def _left(child: Child | None, kin: Kin) -> tuple[Survivor, ...]:
    roots = list(_adopted(kin))
    if child is not None and child.exit is None:
        roots.insert(0, child.pid)
    left: list[ProcessId] = []
    for pid in roots:
        stat = read_stat(pid)
        if stat is not None:
            left.append(stat.id)
        left += [below.id for below in descendants(pid) if below.state not in GONE_STATES]
    return tuple(survivor for process in left if (survivor := describe_survivor(process)) is not None)


async def _gpu_memory_left(probe: GpuMemoryProbe, tree: Iterable[ProcessId], *, deadline: float) -> dict[int, int]:
    loop = asyncio.get_running_loop()
    while True:
        held = probe.used_bytes([process.pid for process in tree if not _is_reused(process)])
        if not held or loop.time() >= deadline:
            return held
        await asyncio.sleep(GPU_PAUSE_S)


def _is_reused(process: ProcessId) -> bool:
    """Whether the number means another process by now."""
    stat = read_stat(process.pid)
    return stat is not None and stat.id != process
