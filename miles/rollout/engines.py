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

    def set(self, targets: Sequence[EngineTarget], router_url: str, api_key: str) -> None:
        """These are the engines from now on."""
        self.targets, self.router_url = list(targets), router_url.rstrip("/")
        client = http_client()
        if router_url:
            client.register(router_url, api_key)
        for target in targets:
            client.register(target.url, target.api_key)

    def owns(self, url: str) -> bool:
        """Whether this is an address of the router or of an engine."""
        return origin_of(url) in {origin_of(u) for u in (self.router_url, *(t.url for t in self.targets)) if u}

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


engines = Engines()
"""Of this process."""
