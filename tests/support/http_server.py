"""A real HTTP server of this process, for tests of what asks one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from miles.utils.async_utils import LoopThread


@contextmanager
def server(handler: Callable[[web.Request, int], Awaitable[web.StreamResponse]]) -> Iterator[str]:
    """Answers everything by ``handler(request, number)``; gives its address."""
    thread = LoopThread("server")
    count = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        return await handler(request, count)

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = thread.run(serve())
    try:
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        thread.run(runner.cleanup())
        thread.stop()
