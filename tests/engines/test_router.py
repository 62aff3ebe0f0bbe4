"""What flags of the router do: the real router before scripted engines."""

from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
from support.cluster import real_cluster
from support.engines import engine_model, external_config
from support.fake_engine import fake_engine

from miles.backends.sglang_utils.client import EngineClient, EngineRefused
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.fleet_parts import start_router
from miles.backends.sglang_utils.router import RouterClient

pytestmark = pytest.mark.full
TWO = {"max_new_tokens": 2}


async def keyed(client, key, index):
    """A request with a routing key."""
    body = {"input_ids": [1, index], "sampling_params": TWO}
    async with client._session.post(client.url + "/generate", json=body, headers={"X-SMG-Routing-Key": key}) as answer:
        assert answer.status == 200


async def test_policy_timeout_and_retries_are_those_of_the_flags(tmp_path):
    config = {
        "sglang_router_policy": "manual", "sglang_router_request_timeout_secs": 4, "router_policy": "random",
        "router_disable_retries": True,
    }  # fmt: skip
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(api_key="key")) for _ in range(2)]
        cluster = await stack.enter_async_context(real_cluster(tmp_path / "run"))
        service = await start_router(cluster.controller, config, node=None, host="127.0.0.1", api_key="key")
        router = await stack.enter_async_context(RouterClient(service.url, "key", name="router"))
        client = await stack.enter_async_context(EngineClient(service.url, "key", name="router"))
        for fake in fakes:
            await router.add(fake.url, "key")
        await client.generate([1, 2], TWO)
        before = [fake.count("/generate") for fake in fakes]
        for index in range(6):
            await keyed(client, "one", index)
        grown = sorted(fake.count("/generate") - count for fake, count in zip(fakes, before, strict=True))
        assert grown == [0, 6], "--sglang-router-policy manual: a key stays with an engine"
        for fake in fakes:
            fake.faults["/generate"] = ["hang"]
        with pytest.raises(EngineRefused, match="50"):
            await client.generate([1, 2], TWO, timeout_s=60.0)
        for fake in fakes:
            fake.faults["/generate"] = [500]
        with pytest.raises(EngineRefused, match="500"):
            await client.generate([1, 3], TWO)
        cluster.identities()
        await service.stop()


async def test_a_router_that_runs_already_is_used_and_left(tmp_path):
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(model=engine_model())) for _ in range(2)]
        cluster = await stack.enter_async_context(real_cluster(tmp_path / "run"))
        service = await start_router(cluster.controller, {}, node=None, host="127.0.0.1", api_key="")
        router = await stack.enter_async_context(RouterClient(service.url, name="router"))
        await router.add(fakes[0].url, "")
        place = urlsplit(service.url)
        fleet = EngineFleet(
            cluster.controller,
            external_config(*fakes, sglang_router_ip=place.hostname, sglang_router_port=place.port),
        )
        await fleet.start()
        assert fleet.router_url == service.url
        assert [s["name"] for s in cluster.controller.services.snapshot()] == ["router"]
        known = {worker["url"] for worker in await router.workers()}
        assert known == {fake.url for fake in fakes}
        async with EngineClient(fleet.router_url, fleet.api_key, name="router") as client:
            assert len((await client.generate([1, 2], TWO))["output_ids"]) == 2
        await fleet.stop()
        assert {worker["url"] for worker in await router.workers()} == known, "somebody else's, both of them"
        assert service.phase == "ready"
        cluster.identities()
        await service.stop()
