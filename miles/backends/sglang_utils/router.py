"""sglang-router over HTTP: which engines it sends requests to. Imports no torch."""

from __future__ import annotations

import asyncio
from typing import Any

from miles.backends.sglang_utils.client import CALL_S, EngineSilent, HttpCaller
from miles_agents.errors import PeerFault

_LOOK_EVERY_S = 0.05


class WorkerNotTaken(PeerFault):
    """The router did not take an engine as a worker in time."""

    code = "E-ENG-005"


class RouterClient(HttpCaller):
    """One router."""

    async def __aenter__(self) -> RouterClient:
        return self

    async def add(self, url: str, api_key: str, *, timeout_s: float = CALL_S) -> None:
        """Register an engine; returns when requests can go to it.

        Raises:
            WorkerNotTaken: it is not there after ``timeout_s``.
        """
        body: dict[str, Any] = {"url": url, "worker_type": "regular"}
        if api_key:
            body["api_key"] = api_key
        await self.call("POST", "/workers", body, expected=(200, 202))
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not any(worker["url"] == url and worker["is_healthy"] for worker in await self.workers()):
            if asyncio.get_running_loop().time() > deadline:
                raise WorkerNotTaken(
                    f"the router did not take {url} within {timeout_s:g} s",
                    evidence=f"its workers: {await self.workers()}",
                    advice=f"Read the log of {self.name}: it asks an engine for /health and /model_info first.",
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    async def remove(self, url: str) -> None:
        """Send nothing to this engine any more. Does nothing if it is not known."""
        for worker in await self.workers():
            if worker["url"] == url:
                await self.call("DELETE", f"/workers/{worker['id']}", expected=(200, 202, 404))

    async def workers(self) -> list[dict[str, Any]]:
        """All that it knows: ``id``, ``url``, ``is_healthy``, ``load``, ..."""
        return list((await self.call("GET", "/workers"))[1]["workers"])

    async def is_ready(self) -> bool:
        """Whether it answers at all."""
        try:
            await self.call("GET", "/health", timeout_s=5.0)
        except EngineSilent:
            return False
        return True
