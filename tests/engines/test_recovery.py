"""Engines and router that are killed or stopped, as processes: found, restarted, at the current version again."""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest
from support.cluster import error_of, real_cluster
from support.engines import engine_model, external_config
from support.fake_engine import fake_engine
from support.recovering_fleet import HEALTH, QUICK, recovering

from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.fleet_recovery import EngineGivenUp
from miles_controller.policy import Policy

pytestmark = pytest.mark.full
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def versions(answers):
    """Of all tokens of these answers."""
    return {span["version"] for answer in answers for span in answer["meta_info"]["weight_versions"]}


async def strike_while_generating(job, name, number):
    """Returns the answers, all of them."""
    asked = asyncio.ensure_future(job.generate())
    await job.until_busy()
    job.strike(name, number)
    return await asked


async def all_are_well(job, version):
    """Both serve, with the same weights, of this version, and nobody makes tokens with others."""
    await job.until_all_serve()
    sums = await job.checksums()
    assert sorted(sums) == ["engine-0", "engine-1"] and len(set(sums.values())) == 1
    assert job.fleet.weight_version == version
    assert versions(await job.generate()) == {str(version)}


async def test_what_dies_or_hangs_comes_back_with_the_current_weights(tmp_path):
    async with recovering(tmp_path / "run") as job:
        pid = job.pid("engine-1")
        # In generation: the others go on, and it catches up, at the version that they have.
        assert versions(await strike_while_generating(job, "engine-1", KILL)) == {"1"}
        await all_are_well(job, 1)
        assert job.pid("engine-1") != pid
        [told] = job.recoveries()
        assert told.subject == "engine-1" and told.fields["version"] == 1 and told.fields["seconds"] > 0
        assert "SIGKILL" in told.fields["cause"] and "(weight version 1, restart 1 of 3)" in told.text
        assert [target.name for target in job.trainer.updates[-1].engines] == ["engine-1"]
        # In training: nobody can give it the engines' weights any more, so it joins in the next update.
        job.train()
        job.strike("engine-0", STOP)
        await job.fleet.recovery.until(lambda: job.fleet.recovery.num_waiting == 1)
        assert "2 health probes failed" in job.cluster.events("engine_lost")[-1].text
        assert versions(await job.generate(4)) == {"1"} and len(job.fleet.targets) == 1
        await job.update()
        await all_are_well(job, 2)
        # In a weight update: the others have it, and who missed it comes back with it.
        job.train()
        job.trainer.before_send = lambda: job.strike("engine-1", KILL)
        await job.update()
        assert [target.name for target in job.fleet.targets] == ["engine-0"]
        await all_are_well(job, 3)
        # The router: requests under way are made again at its successor.
        url = job.fleet.router_url
        assert versions(await strike_while_generating(job, "router", KILL)) == {"3"}
        assert job.fleet.router_url != url
        await all_are_well(job, 3)
        assert [event.subject for event in job.recoveries()] == ["engine-1", "engine-0", "engine-1", "router"]


async def test_engines_that_fall_after_the_commit_of_an_update_come_back_with_its_weights(tmp_path):
    async with recovering(tmp_path / "run", update_weight_silence_timeout=5.0) as job:
        # All have reported the version, which is not the fleet's yet: the others make it that.
        job.train()
        job.strike_at("end_weight_update", "SIGKILL")
        await job.update()
        assert len(job.fleet.targets) == 1
        await all_are_well(job, 2)
        # It is the fleet's, and one of them does not go on.
        job.train()
        job.strike_at("continue_generation", "SIGSTOP")
        await job.update()
        await all_are_well(job, 3)
        # None goes on: the next one makes it again, with a version of its own.
        job.train()
        job.strike_at("continue_generation", "SIGKILL", count=2)
        await job.update()
        await all_are_well(job, 5)
        causes = [event.fields["cause"] for event in job.recoveries()]
        assert len(causes) == 4 and "said nothing for 5 s" in causes[1]
        assert all("SIGKILL" in cause or "did not answer" in cause for cause in (causes[0], *causes[2:]))


@pytest.mark.long
async def test_a_mute_engine_is_found_by_its_heartbeats(tmp_path):
    async with recovering(tmp_path / "run") as job:
        assert versions(await strike_while_generating(job, "engine-1", STOP)) == {"1"}
        await all_are_well(job, 1)
        assert "health probes failed" in job.recoveries("engine-1")[0].fields["cause"]


@pytest.mark.long
async def test_one_that_stops_in_a_weight_update_is_fenced_and_comes_back(tmp_path):
    async with recovering(tmp_path / "run", update_weight_silence_timeout=3.0) as job:
        job.train()
        job.trainer.before_send = lambda: job.strike("engine-1", STOP)
        await job.update()
        await all_are_well(job, 2)
        assert "said nothing for 3 s" in job.recoveries("engine-1")[0].fields["cause"]


@pytest.mark.long
async def test_a_mute_router_is_restarted(tmp_path):
    async with recovering(tmp_path / "run") as job:
        assert versions(await strike_while_generating(job, "router", STOP)) == {"1"}
        await all_are_well(job, 1)
        assert "health probes failed" in job.recoveries("router")[0].fields["cause"]


@pytest.mark.long
@pytest.mark.parametrize("number", [KILL, STOP])
async def test_a_router_that_falls_while_others_work_keeps_nobody(tmp_path, number):
    async with recovering(tmp_path / "run") as job:
        job.train()
        job.strike("router", number)
        await job.cluster.event("recovered", "router")
        job.trainer.before_send = lambda: job.strike("router", number)
        await job.update()
        await job.fleet.recovery.until(lambda: len(job.recoveries("router")) == 2)
        await all_are_well(job, 2)
        assert len(job.recoveries()) == 2


@pytest.mark.long
@pytest.mark.parametrize("has_newer_weights", [False, True])
async def test_generation_that_lost_all_engines_waits_for_the_first_that_comes_back(tmp_path, has_newer_weights):
    """By a catch-up; or, where the trainer has gone on meanwhile, by an update at once."""
    async with recovering(tmp_path / "run") as job:
        if has_newer_weights:
            job.train()
        asked = asyncio.ensure_future(job.generate())
        await job.until_busy()
        for name in ("engine-0", "engine-1"):
            job.strike(name, KILL)
        made = versions(await asked)
        assert made <= ({"1", "2"} if has_newer_weights else {"1"})
        await job.until_all_serve()
        await all_are_well(job, 2 if has_newer_weights else 1)


@pytest.mark.long
async def test_an_update_that_no_engine_survives_is_made_again(tmp_path):
    async with recovering(tmp_path / "run") as job:
        job.train()
        job.trainer.before_send = lambda: [job.strike(f"engine-{number}", KILL) for number in (0, 1)]
        await job.update()
        await all_are_well(job, 2)


@pytest.mark.long
async def test_engines_without_memory_are_neither_judged_nor_started(tmp_path):
    """As on a GPU, where memory changes hands. Who is down joins in the next update."""
    config = {"device": "cuda", "offload_rollout": True, "update_weight_silence_timeout": 3.0}
    async with recovering(tmp_path / "run", **config) as job:
        assert (await job.fleet.release())["released"]
        job.train()
        job.strike("engine-1", KILL)
        job.strike("engine-0", STOP)
        await job.cluster.event("engine_lost", "engine-1")
        assert job.fleet.recovery.num_starting == 0 and not job.cluster.events("engine_lost", "engine-0")
        await job.fleet.resume_memory("weights")
        await job.cluster.event("engine_lost", "engine-0")
        assert "said nothing for 3 s" in job.cluster.events("engine_lost", "engine-0")[0].text
        await job.fleet.resume_memory("kv_cache")
        await job.update()
        await all_are_well(job, 2)


async def test_an_engine_that_comes_back_gets_requests_only_with_all_of_its_memory(tmp_path):
    """Of a rollout whose only engine died: the next takes weights first, on the trainer's GPU."""
    config = {"device": "cuda", "offload_rollout": True, "rollout_num_engines": 1}
    async with recovering(tmp_path / "run", **config) as job:
        job.train()
        job.shares_memory = True
        asked = asyncio.ensure_future(job.generate())
        await job.until_busy()
        job.strike("engine-0", KILL)
        assert versions(await asked) <= {"1", "2"}
        assert job.serving_without_cache == []
        assert len(job.recoveries("engine-0")) == 1  # a request without a KV cache would have ended it
        assert job.fleet.weight_version == 2


async def test_engines_of_others_are_left_out_and_the_last_ends_the_run(tmp_path):
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(model=engine_model())) for _ in range(2)]
        cluster = await stack.enter_async_context(real_cluster(tmp_path / "run"))
        fleet = EngineFleet(cluster.controller, external_config(*fakes, **HEALTH))
        await fleet.start()
        stack.push_async_callback(fleet.stop)
        await fakes[0].die()
        lost = await cluster.event("engine_lost", "external-0")
        assert "did not answer" in lost.text
        assert [target.name for target in fleet.targets] == ["external-1"] and not fleet.recovery.over.done()
        await fakes[1].die()
        error = await asyncio.wait_for(fleet.failed(), 60.0)
        assert isinstance(error, EngineGivenUp) and "no engine is left" in error.what


async def test_a_budget_that_is_used_up_ends_the_run_with_all_causes(tmp_path):
    policy = Policy("restart", max_restarts=0, window_s=QUICK.window_s, backoff_s=0.0, backoff_cap_s=0.0)
    async with recovering(tmp_path / "run", policy) as job:
        failed = asyncio.ensure_future(job.fleet.failed())
        job.strike("engine-0", KILL)
        error = await asyncio.wait_for(failed, 60.0)
        assert isinstance(error, EngineGivenUp) and "engine-0 has failed 1 times" in error.what
        assert "0 restarts within 3600 s are used up" in error.what and "SIGKILL" in error.evidence
        assert job.cluster.events("engine_given_up", "engine-0")
        error = await error_of(job.fleet.recovery.until(lambda: False), EngineGivenUp)
        assert error.fields["engine"] == "engine-0"
