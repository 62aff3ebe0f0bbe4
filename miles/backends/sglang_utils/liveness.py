"""Whether an engine is there while it does something that takes long: asked aside, so that a hang is told from work.

An engine's HTTP side answers ``/model_info`` whatever its schedulers do, generation paused or not. One that gives no
answer at all for ``silence_s`` hangs, or its machine does; one whose schedulers hang is told by the step's deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from miles.backends.sglang_utils.client import EngineClient, EngineRefused, EngineSilent

T = TypeVar("T")
_ASKS = 6
"""Questions in ``silence_s``."""


async def silence_of(client: EngineClient, silence_s: float) -> EngineSilent:
    """Waits until an engine has said nothing for that long; returns the error that says so."""
    loop = asyncio.get_running_loop()
    heard = loop.time()
    while True:
        left_s = heard + silence_s - loop.time()
        if left_s <= 0:
            return EngineSilent(
                f"{client.name} hangs",
                evidence=f"{client.url} has said nothing for {silence_s:g} s, not even to GET /model_info",
                advice=f"Read the log of {client.name}. --update-weight-silence-timeout is how long it may be silent.",
                engine=client.name,
            )
        asked = loop.time()
        try:
            await client.call("GET", "/model_info", timeout_s=left_s)
            heard = loop.time()
        except EngineRefused:
            heard = loop.time()
        except EngineSilent:
            pass  # no connection, or no answer: asked again until it is silent for too long
        await asyncio.sleep(max(0.0, asked + silence_s / _ASKS - loop.time()))


async def while_alive(call: Awaitable[T], client: EngineClient, *, silence_s: float, timeout_s: float) -> T:
    """The result of a call to an engine that has to give signs of life meanwhile.

    Raises:
        EngineSilent: It hangs, or the call is not done in time. Whatever the call raises.
    """
    task = asyncio.ensure_future(call)
    watch = asyncio.ensure_future(silence_of(client, silence_s))
    try:
        await asyncio.wait({task, watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            raise watch.result()
        raise EngineSilent(
            f"{client.name} was not done within {timeout_s:g} s",
            evidence=f"{client.url} answers, and does not end what it was asked to do",
            advice=f"Read the log of {client.name}. --update-weight-timeout is how long a step may take.",
            engine=client.name,
        )
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
