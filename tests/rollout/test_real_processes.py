"""The rollout manager in a worker of its own, and behind the real router."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from support.cluster import real_cluster
from support.procs import eventually
from support.rollout_cases import KEY, Answer, adds, make_config, manager, servers, sums

from miles.backends.sglang_utils.launch_key import KEY_VARIABLE
from miles.backends.sglang_utils.router import RouterClient
from miles.rollout.hooks import HookFailed
from miles.utils.http_utils import http_client
from miles.utils.misc import get_free_port
from miles_agents import Actor, endpoint, store
from miles_agents.errors import UserCodeError

pytestmark = pytest.mark.full
WAITS = "\\boxed{waits for ever, and a day}"


class Reader(Actor):
    """In place of a trainer."""

    @endpoint
    def lengths(self, ref):
        part = store.get(ref)
        return part["total_lengths"].tolist()


async def test_train_data_goes_through_the_store_and_errors_come_with_the_users_traceback(tmp_path):
    config = make_config(prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path), save=str(tmp_path))
    failing = config | {"custom_rm_path": "support.rollout_hooks.failing_rm"}
    with servers(adds) as fake:
        async with real_cluster(tmp_path / "run") as cluster:
            spawn = cluster.controller.spawn
            rollout = await spawn("rollout", "miles.rollout.manager:RolloutManager", config, devices_per_rank=0)
            reader = await spawn("reader", Reader, devices_per_rank=0)
            facts = await rollout.start.call_one(fake.targets, fake.router.url, KEY)
            assert facts["dataset_size"] == 8
            assert (await rollout.progress.call_one())["phase"] == "idle"
            batch = await rollout.generate.call_one(0)
            assert len(await reader.lengths.call_one(batch.refs[0])) == batch.num_samples == 8
            assert await rollout.trained.call_one(0) == 4
            with pytest.raises(Exception, match="removed"):
                await reader.lengths.call_one(batch.refs[0])
            await rollout.save.call_one(0, str(tmp_path))
            assert not await rollout.load.call_one(0, str(tmp_path))
            await rollout.commit_save.call_one(0, str(tmp_path))
            assert await rollout.load.call_one(0, str(tmp_path))
            await rollout.stop()
            broken = await spawn("broken", "miles.rollout.manager:RolloutManager", failing, devices_per_rank=0)
            await broken.start.call_one(fake.targets, fake.router.url, KEY)
            with pytest.raises(HookFailed) as caught:
                await broken.generate.call_one(0)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "in failing_rm" in lines[1]
    assert isinstance(caught.value, UserCodeError)


@contextmanager
def real_router(engines):
    """sglang-router as runs start it."""
    port = get_free_port(23000, consecutive=2)
    ports = json.dumps({"http": port, "metrics": port + 1})
    arguments = json.dumps({"router_policy": "round_robin", "router_log_level": "warn"})
    process = subprocess.Popen(
        [sys.executable, "-m", "miles.backends.sglang_utils.launch_router", "127.0.0.1", ports, arguments],
        env={**os.environ, KEY_VARIABLE: KEY},
        start_new_session=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_through_the_real_router_ids_keys_and_aborts_arrive(tmp_path):
    def slow_sixth(payload, prompt):
        return Answer(WAITS, hangs_after=3) if prompt.startswith("5") else adds(payload, prompt)

    config = make_config(
        prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path), over_sampling_batch_size=6, partial_rollout=True
    )
    with servers(slow_sixth, count=2) as fake, real_router(fake.engines) as url, manager(config) as rollout:
        async with RouterClient(url, KEY) as router:
            await http_client().request("GET", f"{url}/health", max_retries=200, deadline_s=60.0)
            for engine in fake.engines:
                await router.add(engine.url, KEY)
        await rollout.start(fake.targets, url, KEY)
        batch = await rollout.generate(0)
        assert batch.num_samples == 8
        assert all(engine.requests for engine in fake.engines)
        sent = {r["rid"] for r in fake.requests}
        assert len(sent) == len(fake.requests)
        assert set(fake.engines[0].aborted) <= sent
        await eventually(lambda: not any(engine.running for engine in fake.engines))
