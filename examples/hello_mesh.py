"""Two agents with four workers each on this machine: call them, kill one with -9, see what a user would see.

python examples/hello_mesh.py
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from pathlib import Path

from miles_agents import Actor, current_actor, endpoint
from miles_agents.rpc.errors import WorkerDied
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents


class Hello(Actor):
    """An actor like any other: its constructor and endpoints run in a worker process."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    @endpoint
    def greet(self, name: str) -> str:
        """Runs on the worker's main thread."""
        me = current_actor()
        return f"{self.greeting}, {name}! This is {me.mesh_name}{dict(me.point)} on {me.node_name}, pid {os.getpid()}"

    @endpoint(thread="io")
    def pid(self) -> int:
        """Answers also while the main thread is busy."""
        return os.getpid()

    @endpoint
    def work(self, seconds: float) -> str:
        """Keeps the main thread busy, like a training step."""
        time.sleep(seconds)
        return "done"


async def main() -> None:
    """The whole story."""
    nodes = ["node-0", "node-1"]
    with tempfile.TemporaryDirectory(prefix="hello-mesh-") as run_dir:
        config = ControllerConfig(nodes=tuple(nodes), run_dir=Path(run_dir))
        started = time.perf_counter()
        async with Controller(config) as controller, LocalAgents(controller, nodes, run_dir=Path(run_dir), cpu_slots=4):
            await controller.wait_for_nodes()
            mesh = await controller.spawn("hello", Hello, "Hello", dims={"hosts": 2, "gpus": 4})
            print(f"{mesh} is up after {time.perf_counter() - started:.2f} s\n")

            for point, answer in (await mesh.greet.call("world")).items():
                print(f"  {dict(point)}: {answer}")

            victim = await mesh.slice(hosts=1, gpus=2).pid.call_one()
            print(f"\ncalling all eight, then kill -9 {victim} ...\n")
            working = mesh.work.call(30.0)
            await mesh.pid.call()  # io endpoints answer meanwhile: everybody is at work
            killed = time.perf_counter()
            os.kill(victim, signal.SIGKILL)
            try:
                await working
            except WorkerDied as error:
                print(f"after {(time.perf_counter() - killed) * 1000:.1f} ms the caller gets:\n\n{error}\n")
            survivors = mesh.slice(hosts=0)
            print(f"node-0 still answers: {len(await survivors.pid.call())} ranks")
        print("all processes have ended")


if __name__ == "__main__":
    asyncio.run(main())
