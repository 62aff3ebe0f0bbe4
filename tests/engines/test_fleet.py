"""Real engines behind a real router, as services of a real controller."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from support.cluster import error_of, real_cluster
from support.engines import changed_copy, engine_config, engine_model
from support.fake_engine import fake_engine
from support.tiny_models import tiny_model

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.client import EngineClient, EngineRefused
from miles.backends.sglang_utils.equal_weights import WeightsDiffer
from miles.backends.sglang_utils.fleet import CPU_KEEPS, EngineFleet
from miles.backends.sglang_utils.fleet_parts import EngineDied, start_router
from miles.backends.sglang_utils.router import RouterClient
from miles.backends.weight_update.sender import make_sender
from miles_agents.agent.service import ServiceDied

pytestmark = pytest.mark.full
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


class Trainer:
    """Stands for the mesh: sends weights from this process."""

    def __init__(self, weights):
        self.weights, self.senders = weights, {}

    async def __call__(self, update):
        if update.method not in self.senders:
            self.senders[update.method] = make_sender(ParallelState(), update, torch.device("cpu"))
        await asyncio.to_thread(self.senders[update.method].send, update, iter(self.weights.items()))

    def close(self):
        for sender in self.senders.values():
            sender.close()


def shown(key, pids, run_dir):
    """Where a key can be read."""
    proc = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("environ", "cmdline")]
    return [path for path in (*proc, *run_dir.rglob("*.log")) if key.encode() in path.read_bytes()]


async def test_a_colocated_fleet_of_a_tensor_parallel_engine(tmp_path):
    config = engine_config(engine_model(), rollout_num_gpus_per_engine=2, colocate=True, offload_rollout=True)
    path, weights = changed_copy(engine_model(), tmp_path / "changed", factor=1.25)
    trainer = Trainer(weights)
    async with real_cluster(tmp_path / "run") as cluster:
        fleet = EngineFleet(cluster.controller, config)
        await fleet.start()
        seen = [identity.pid for identity in cluster.identities()]
        assert fleet.targets[0].tp_size == 2 and fleet.targets[0].rank_offset == 1
        async with EngineClient(fleet.router_url, fleet.api_key, name="router") as client:
            before = await client.generate([1, 2, 3], GREEDY)
            assert await fleet.release() == {"released": [], "why": CPU_KEEPS}
            await fleet.resume_memory("weights")
            assert await fleet.weight_update(trainer) == 1 == fleet.weight_version
            await fleet.resume_memory("kv_cache")
            await fleet.check_equal(path)
            after = await client.generate([1, 2, 3], GREEDY)
            assert after["output_ids"] != before["output_ids"] and after["meta_info"]["weight_version"] == "1"
            await fleet.pause()
            waiting = asyncio.ensure_future(client.generate([1, 2, 3], GREEDY))
            assert not (await asyncio.wait({waiting}, timeout=0.3))[0]
            await fleet.resume()
            assert (await waiting)["output_ids"] == after["output_ids"]
        error = await error_of(fleet.check_equal(engine_model()), WeightsDiffer)
        assert "engine-0" in error.what and "rank 0 model." in error.evidence and "more" in error.evidence
        assert shown(fleet.api_key, seen, tmp_path / "run") == []
        await fleet.stop()
        assert not cluster.controller.services.snapshot()
    trainer.close()


async def test_two_engines_of_two_groups_get_broadcasts_one_that_hangs_is_fenced_one_that_dies_ends_it(tmp_path):
    groups = [
        {"num_engines": 1, "num_gpus_per_engine": 1, "overrides": {"max_running_requests": running}}
        for running in (2, 3)
    ]
    config = engine_config(
        engine_model(), rollout_num_engines=2, sglang_router_policy="round_robin", engine_groups=groups,
        update_weight_silence_timeout=15.0, sglang_schedule_policy="lpm", sglang_max_running_requests=4,
    )  # fmt: skip
    path, weights = changed_copy(engine_model(), tmp_path / "changed", factor=0.75)
    trainer = Trainer(weights)
    async with real_cluster(tmp_path / "run") as cluster:
        fleet = EngineFleet(cluster.controller, config)
        await fleet.start()
        for version in (1, 2):
            assert await fleet.weight_update(trainer) == version
        await fleet.check_equal(path)
        async with EngineClient(fleet.router_url, fleet.api_key, name="router") as client:
            answers = await asyncio.gather(*(client.generate([1, 2, index], GREEDY) for index in range(6)))
        assert {answer["meta_info"]["weight_version"] for answer in answers} == {"2"}
        async with EngineClient(fleet.router_url, "", name="router") as stranger:
            with pytest.raises(EngineRefused, match="401"):
                await stranger.generate([1, 2], GREEDY)
        told = [await engine.client.server_info() for engine in fleet._roster.engines]
        assert [(info["max_running_requests"], info["schedule_policy"]) for info in told] == [(2, "lpm"), (3, "lpm")]
        cluster.identities()
        pids = {s["name"]: s["pid"] for s in cluster.controller.services.snapshot()}
        os.kill(pids["engine-1"], signal.SIGSTOP)
        assert await fleet.weight_update(trainer) == 3
        assert [target.name for target in fleet.targets] == ["engine-0"]
        assert "hangs" in fleet._updates.failures["engine-1"]
        failed = asyncio.ensure_future(fleet.failed())
        os.kill(pids["engine-0"], signal.SIGKILL)
        error = await failed
        assert isinstance(error, EngineDied) and "engine-0 is dead" in error.what
        assert "SIGKILL" in error.evidence and "last lines of" in error.evidence
        await fleet.stop()
    trainer.close()


async def test_an_engine_that_cannot_start_ends_the_start_with_its_log_and_nothing_is_left(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model("qwen3").iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    async with real_cluster(tmp_path / "run") as cluster:
        fleet = EngineFleet(cluster.controller, engine_config(model))
        error = await error_of(fleet.start(), ServiceDied, timeout_s=300.0)
        assert "engine-0" in error.what and "safetensors" in error.evidence
        assert not cluster.controller.services.snapshot()


async def test_the_router_tries_elsewhere_when_an_engine_fails_or_is_gone(tmp_path):
    config = {"sglang_router_policy": "round_robin", "router_health_check_interval_secs": 1}
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(api_key="key")) for _ in range(2)]
        cluster = await stack.enter_async_context(real_cluster(tmp_path / "run"))
        service = await start_router(cluster.controller, config, node=None, host="127.0.0.1", api_key="key")
        router = await stack.enter_async_context(RouterClient(service.url, "key", name="router"))
        client = await stack.enter_async_context(EngineClient(service.url, "key", name="router"))
        with pytest.raises(EngineRefused, match="503"):
            await client.generate([1], {"max_new_tokens": 2})
        for fake in fakes:
            await router.add(fake.url, "key")
        fakes[0].faults["/generate"] = [500, "reset", 503]
        for index in range(6):
            assert len((await client.generate([1, index], {"max_new_tokens": 2}))["output_ids"]) == 2
        assert fakes[0].faults["/generate"] == [] and fakes[1].count("/generate") >= 3
        await fakes[0].die()
        for index in range(4):
            assert len((await client.generate([2, index], {"max_new_tokens": 2}))["output_ids"]) == 2
        await router.remove(fakes[0].url)
        assert [worker["url"] for worker in await router.workers()] == [fakes[1].url]
        await router.remove("http://127.0.0.1:1")
        cluster.identities()
        await service.stop()
