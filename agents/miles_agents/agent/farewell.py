"""The last message of an agent's life: that nothing of it runs any more.

Waits for: the controller's word that the session is over there (it refuses the next HELLO), ``GOODBYE_S`` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from miles_agents.wire.link import LinkDialer

GOODBYE_S = 1.0
_AGAIN_S = 0.05


async def say_goodbye(link: LinkDialer, reason: str, *, is_dismissed: Callable[[], bool]) -> None:
    """Say it until it was heard: the transport does not linger, and a goodbye that is lost costs ``dead_s`` of waiting.

    ``is_dismissed``: the controller said goodbye first, so a link that goes down means that it has left.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GOODBYE_S
    was_up = link.peer.is_up
    while was_up and link.is_welcome and loop.time() < deadline:
        if link.peer.is_up:
            link.peer.say_goodbye(reason)
        elif is_dismissed():
            return
        else:
            link.beat({})  # says HELLO again where the one before was lost
        await asyncio.sleep(_AGAIN_S)
