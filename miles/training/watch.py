"""Deaths that end a job, as one thing to wait for. With recovery, those that it has given up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles.training.errors import JobPartDied
from miles.training.parts import Parts
from miles_controller import OwnedMesh

T = TypeVar("T")
_OWN_ERROR_S = 3.0
"""A death also fails the call that the loop waits for, with more to say: it gets so long to do so."""


async def run_watched(parts: Parts, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, or until a process that it needs has died.

    Raises:
        JobPartDied: With how the process ended, if ``work`` itself raised nothing soon after.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_first_death(parts))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await asyncio.wait({working}, timeout=_OWN_ERROR_S)
        if not working.done():
            raise watching.result()
        return await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _first_death(parts: Parts) -> BaseException:
    watches: list[Coroutine[Any, Any, BaseException]] = []
    if parts.recovery is not None:
        watches.append(parts.recovery.given_up())
    else:
        watches += [_mesh_death(mesh) for mesh in (parts.rollout, parts.trainer) if mesh is not None]
    if parts.fleet is not None:
        watches.append(parts.fleet.failed())
    tasks = [asyncio.ensure_future(watch) for watch in watches]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _mesh_death(mesh: OwnedMesh) -> BaseException:
    failure = await mesh.wait_failed()
    if failure is not None:
        return failure
    return JobPartDied(
        f"{mesh.name} was stopped while the job was running",
        evidence="its node was dismissed, or somebody stopped it",
        advice="Look at events.jsonl in the run directory for who did.",
    )
