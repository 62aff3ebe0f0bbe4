"""The engines as the rollout sees them: the router for generation, each engine itself for aborts.

The router does not pass aborts on, and an engine only knows the exact id of a request, so an abort goes to every
engine. An abort that comes before its request does nothing there: ``abort_all`` repeats them until nothing is left.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from miles.backends.weight_update.messages import EngineTarget
from miles.utils.http_utils import RequestFailed, RequestRefused, http_client, origin_of
from miles_agents.errors import PeerFault

logger = logging.getLogger(__name__)
ABORT_AGAIN_S = 0.5
ABORT_DEADLINE_S = 10.0


class EnginesFail(PeerFault):
    """Prompt groups cannot be generated, also when repeated."""

    code = "E-ROLL-006"


@dataclass
class Engines:
    """Where to generate and where to abort. Shared by all generate states of the process."""

    router_url: str = ""
    targets: list[EngineTarget] = field(default_factory=list)
    _turn: itertools.count[int] = field(default_factory=itertools.count)
    _routers: set[str] = field(default_factory=set)
    _engines: set[str] = field(default_factory=set)

    def set(
        self, targets: Sequence[EngineTarget], router_url: str, api_key: str, *, are_restarted: bool = False
    ) -> None:
        """These are the engines from now on. Requests to those that were there before, and are not now, go to them.

        ``are_restarted``: those that die are started again, and requests wait for that."""
        self.targets, self.router_url = list(targets), router_url.rstrip("/")
        client = http_client()
        router = [origin_of(router_url)] if router_url else []
        now = [origin_of(target.url) for target in targets]
        if router_url:
            client.register(router_url, api_key, is_restarted=are_restarted)
        for target in targets:
            client.register(target.url, target.api_key, is_restarted=are_restarted)
        in_use = {*router, *now}
        _move(self._routers, router, in_use)
        _move(self._engines, now, in_use)

    def owns(self, url: str) -> bool:
        """Whether this is, or was, an address of the router or of an engine."""
        return origin_of(url) in self._routers | self._engines

    def next_engine_url(self) -> str:
        """Of one engine after the other: for requests with fields that the router drops."""
        if not self.targets:
            return self.router_url
        return self.targets[next(self._turn) % len(self.targets)].url

    async def abort(self, rids: Sequence[str]) -> None:
        """Abort requests at every engine, once. Engines that do not answer are left out."""
        calls = [self._abort_one(target, rid) for target in self.targets for rid in rids]
        await asyncio.gather(*calls)

    async def _abort_one(self, target: EngineTarget, rid: str) -> None:
        try:
            await http_client().request(
                "POST", f"{target.url}/abort_request", {"rid": rid}, max_retries=1, deadline_s=ABORT_DEADLINE_S
            )
        except (RequestFailed, RequestRefused) as error:
            logger.warning("abort of a request at %s: %s", target.name, error.evidence)

    async def abort_all(self, scope: str) -> None:
        """Abort the requests of a scope again and again, until it has none, or this is cancelled."""
        while rids := http_client().in_flight(scope):
            await self.abort(rids)
            await asyncio.sleep(ABORT_AGAIN_S)


def _move(known: set[str], now: list[str], in_use: set[str]) -> None:
    """``known`` are all that there were. While there are none, requests are repeated where they were sent to."""
    for origin in known - in_use if now else ():
        http_client().moved(origin, now)
    known.update(now)


engines = Engines()
"""Of this process."""
