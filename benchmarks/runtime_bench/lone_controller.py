"""A controller with its status server and nothing else, until stdin ends: its memory is measured from outside."""

import sys

import uvloop

from miles_controller import Controller, ControllerConfig


async def _serve() -> None:
    import asyncio
    import json

    async with Controller(ControllerConfig(nodes=("node-0",))) as controller:
        assert controller.status_server is not None
        about = {"url": controller.status_server.url, "token": controller.status_server.token}
        sys.stdout.write(json.dumps(about) + "\n")
        sys.stdout.flush()
        end = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin, end.set)
        await end.wait()


if __name__ == "__main__":
    uvloop.run(_serve())
