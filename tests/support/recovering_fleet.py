"""A fleet with recovery whose engines are scripted ones in processes of their own, to be killed and stopped; and what
the training loop and the rollout manager are for it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.places import FleetPlaces
from miles.backends.weight_update.sender import make_sender
from miles.rollout.engines import Engines
from miles.training.engine_recovery import EngineRecovery
from miles.utils.http_utils import close_http_client, post
from miles_controller.policy import Policy
from support.cluster import DEADLINE_S, Cluster, real_cluster
from support.engines import engine_config, engine_model
from support.procs import POLL_S

HEALTH = {
    "use_fault_tolerance": True,
    "rollout_health_check_interval": 1,
    "rollout_health_check_timeout": 3,
    "rollout_health_check_first_wait": 0,
}
FAKES = {
    **HEALTH,
    "rollout_num_engines": 2,
    "engine_launcher": "support.launch_fake_engine",
    "colocate": True,
    "sglang_router_policy": "round_robin",
}
QUICK = Policy("restart", max_restarts=3, window_s=3600.0, backoff_s=0.1, backoff_cap_s=0.2)


class Trainer:
    """Sends weights from this process: all of them have the value of the version that it trained last."""

    def __init__(self) -> None:
        self.value = 0.0
        self.senders: dict[str, Any] = {}
        self.updates: list[Any] = []
        self.before_send: Any = None

    async def __call__(self, update: Any) -> None:
        self.updates.append(update)
        if self.before_send is not None:
            hook, self.before_send = self.before_send, None
            hook()
        if update.method not in self.senders:
            self.senders[update.method] = make_sender(ParallelState(), update, torch.device("cpu"))
        weights = {"a": torch.full((50,), self.value), "b": torch.full((3, 3), self.value)}
        await asyncio.to_thread(self.senders[update.method].send, update, iter(weights.items()))

    def close(self) -> None:
        for sender in self.senders.values():
            sender.close()


class Job:
    """What a training loop does with engines, and what a rollout manager does."""

    def __init__(self, cluster: Cluster, fleet: EngineFleet, strikes: Path) -> None:
        self.cluster, self.fleet, self.trainer, self.strikes = cluster, fleet, Trainer(), strikes
        self.engines = Engines()
        self.has_newer_weights = False
        self.shares_memory = False
        self.serving_without_cache: list[str] = []
        rollout = SimpleNamespace(set_engines=SimpleNamespace(call_one=self._set_engines))
        parts: Any = SimpleNamespace(fleet=fleet, trainer=self.trainer, rollout=rollout, calls=lambda mesh, _: mesh)
        self.loop = EngineRecovery(
            parts, catch_up=self._catch_up, update=self.update, can_catch_up=lambda: not self.has_newer_weights
        )

    async def _set_engines(self, targets: Any, url: str, key: str) -> None:
        self.engines.set(targets, url, key, are_restarted=True)

    async def _catch_up(self) -> None:
        await self.fleet.catch_up(self.trainer)

    def train(self) -> None:
        """Other weights; engines have the old ones."""
        self.trainer.value += 1.0
        self.has_newer_weights = True

    async def update(self) -> bool:
        """As the training loop has it: where memory is shared, it changes hands around it."""
        if self.shares_memory:
            await self.fleet.release()
            await self.fleet.resume_memory("weights")
        await self.fleet.weight_update(self.trainer)
        if self.shares_memory:
            self.serving_without_cache += [target.name for target in self.fleet.targets]
            await self.fleet.resume_memory("kv_cache")
        self.has_newer_weights = False
        return True

    async def generate(self, count: int = 12) -> list[dict[str, Any]]:
        """So many answers, as the rollout manager asks for them, while engines that come back get weights."""

        async def ask(number: int) -> dict[str, Any]:
            body = {"input_ids": [1, 2, number], "sampling_params": {"max_new_tokens": 60}}
            return await post(self.engines.router_url + "/generate", body)

        asked = asyncio.ensure_future(_all(ask(number) for number in range(count)))
        return await self.loop.result_of(asked)

    async def until_busy(self) -> None:
        """Each engine works on a request."""
        for target in self.fleet.targets:
            async with EngineClient(target.url, target.api_key) as client, asyncio.timeout(DEADLINE_S):
                while True:
                    if (await client.server_info())["num_running"]:
                        break
                    await asyncio.sleep(POLL_S)

    async def until_all_serve(self) -> None:
        """In which the loop waits for something else than engines."""
        recovery = self.fleet.recovery
        names = len(self.fleet._places.engines)
        waiting = asyncio.ensure_future(recovery.until(lambda: recovery.num_serving == names))
        await self.loop.result_of(waiting)

    def pid(self, name: str, node: str = "") -> int:
        """Of the process that lives under this name now, on that node if an engine spans several."""
        services = self.cluster.controller.services.snapshot()
        [found] = [one for one in services if one["name"] == name and node in ("", one["node"])]
        return int(found["pid"])

    def strike(self, name: str, number: int, node: str = "") -> None:
        """A signal for a service, all its processes at once."""
        process = psutil.Process(self.pid(name, node))
        for one in (process, *process.children(recursive=True)):
            with suppress(ProcessLookupError):
                os.kill(one.pid, number)

    def strike_at(self, path: str, name: str, count: int = 1) -> None:
        """So many engines get the signal when such a request comes to them."""
        for number in range(count):
            (self.strikes / f"{path}.{name}.{number}").touch()

    async def checksums(self) -> dict[str, str]:
        """What engines hold."""
        found = {}
        for target in self.fleet.targets:
            async with EngineClient(target.url, target.api_key) as client:
                found[target.name] = (await client.checksums())[0]
        return found

    def recoveries(self, name: str = "") -> list[Any]:
        return self.cluster.events("recovered", name)


async def _all(calls: Any) -> list[Any]:
    return list(await asyncio.gather(*calls))


@asynccontextmanager
async def recovering(
    run_dir: Any, policy: Policy = QUICK, *, num_nodes: int = 1, places: FleetPlaces | None = None, **config: Any
) -> AsyncIterator[Job]:
    """The fleet has started, and all engines have version 1."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    async with real_cluster(run_dir, num_nodes=num_nodes) as cluster:
        cluster.controller.forwarded_env["PYTHONPATH"] = path  # where the scripted engine is
        strikes = Path(run_dir) / "strikes"
        strikes.mkdir(parents=True)
        cluster.controller.forwarded_env["MILES_TEST_STRIKES"] = str(strikes)
        fleet = EngineFleet(cluster.controller, engine_config(engine_model(), **{**FAKES, **config}), places=places)
        fleet.restart_policy = policy
        await fleet.start()
        job = Job(cluster, fleet, strikes)
        try:
            job.train()
            await job.update()
            async with job.loop.telling():
                await job._set_engines(fleet.targets, fleet.router_url, fleet.api_key)
                yield job
        finally:
            with suppress(ProcessLookupError, ValueError, psutil.NoSuchProcess):
                for service in cluster.controller.services.snapshot():
                    os.kill(int(service["pid"]), signal.SIGCONT)
            await fleet.stop()
            job.trainer.close()
            close_http_client()
