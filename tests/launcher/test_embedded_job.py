"""Jobs inside another program, as far as they get without ranks: their life, and what they leave alone."""

import asyncio
import logging
import os
import signal
import sys
from collections import deque

import pytest
import uvloop
from support.embedding import Machine, Scheduler, ended, job_flags
from support.procs import eventually

from miles.flags.problems import FlagProblems, ResolverFailed, UserArgumentsFailed
from miles_launcher import Job, LocalNode, current_job
from miles_launcher.job import JobBroke, JobCancelled, JobMisused, RunDirectoryTaken
from miles_launcher.job_events import Ended, Said
from miles_launcher.job_narrator import Feed, JobNarrator


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return job_flags(tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="module")
def config(flags):
    async def resolved():
        return (await Job.from_flags(flags))._config

    return asyncio.run(resolved())


@pytest.fixture
def new_job(config, tmp_path):
    def new(nodes=None, run_dir="run", **options):
        return Job({**config, "run_dir": str(tmp_path / run_dir)}, nodes=nodes, **options)

    return new


async def test_flags_are_read_in_another_process_and_all_problems_come_at_once(tmp_path):
    with pytest.raises(FlagProblems) as caught:
        await Job.from_flags(["--lr", "fast", "--num-rolout", "3"])
    assert {"--lr", "--num-rolout"} <= {problem.flag for problem in caught.value.problems}
    (tmp_path / "adds_flags.py").write_text("def rollout(*_):\n    pass\nraise RuntimeError('no key')\n")
    with pytest.raises(UserArgumentsFailed) as caught:
        await Job.from_flags(["--rollout-function-path", "adds_flags.rollout"], python_path=[tmp_path])
    assert "RuntimeError: no key" in caught.value.evidence
    assert str(tmp_path) not in sys.path


async def test_a_resolver_that_does_not_answer_is_ended(flags):
    with pytest.raises(ResolverFailed):
        await Job.from_flags(flags, resolve_timeout_s=0.01)


async def test_a_dry_run_is_no_job(flags):
    with pytest.raises(FlagProblems) as caught:
        await Job.from_flags([*flags, "--dry-run"])
    assert [problem.flag for problem in caught.value.problems] == ["--dry-run"]


async def test_the_jobs_own_modules_and_secrets_stay_its_own(flags, tmp_path):
    job = await Job.from_flags([*flags, "--use-wandb", "--wandb-key", "secret-key"], python_path=[tmp_path / "code"])
    assert job._config["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "code")
    assert "secret-key" not in repr(job.config)
    assert "secret-key" not in repr(dict(os.environ))
    assert str(tmp_path / "code") not in os.environ.get("PYTHONPATH", "")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_job_that_waits_for_nodes_can_be_cancelled_in_any_loop(new_job, run):
    scheduler = Scheduler()

    async def life():
        job = new_job(scheduler, name="queued")
        assert job.state == "new"
        job.start()
        await eventually(lambda: scheduler.needs)
        assert job.status().state == "nodes"
        await job.cancel("not wanted any more")
        await job.cancel("again")
        error = await ended(job)
        assert isinstance(error, JobCancelled)
        assert error.evidence == "not wanted any more"

    run(life())
    (need,) = scheduler.needs
    assert (need.job, need.kind, need.devices) == ("queued", "cpu", 2)
    assert [(gang.name, gang.count) for gang in need.gangs] == [("trainer", 2), ("engines", 2)]
    assert scheduler.told == []


async def test_a_job_is_started_once_and_not_after_it_was_cancelled(new_job):
    job = new_job(Scheduler())
    with pytest.raises(JobMisused):
        await job.wait()
    job.start()
    with pytest.raises(JobMisused):
        job.start()
    await job.cancel()
    never = new_job(Scheduler(), "never")
    await never.cancel("before it began")
    with pytest.raises(JobMisused):
        never.start()
    assert isinstance(await ended(never), JobCancelled)


async def test_whoever_awaits_a_job_ends_it_and_whoever_waits_for_it_does_not(new_job):
    scheduler = Scheduler()
    job = new_job(scheduler)

    async def run_it():
        await job

    awaiting = asyncio.create_task(run_it())
    await eventually(lambda: scheduler.needs)
    waiting = asyncio.create_task(job.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert job.state == "nodes"
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    assert isinstance(await ended(job), JobCancelled)


async def test_leaving_the_context_ends_the_job(new_job):
    async with new_job(Scheduler()) as job:
        assert job.state == "nodes"
    assert job.state == "cancelled"


async def test_a_task_that_ends_with_its_loop_ends_the_job(new_job):
    job = new_job(scheduler := Scheduler())
    job.start()
    await eventually(lambda: scheduler.needs)
    job._task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job.wait()
    assert job.state == "cancelled"


async def test_two_jobs_cannot_write_into_one_run_directory(new_job):
    async with new_job(scheduler := Scheduler()) as first:
        await eventually(lambda: scheduler.needs)
        second = new_job(Scheduler())
        second.start()
        assert isinstance(await ended(second), RunDirectoryTaken)
        assert first.state == "nodes"
    third = new_job(Scheduler())
    third.start()
    await third.cancel()
    assert isinstance(await ended(third), JobCancelled)


def of_the_process():
    """What a job must leave alone."""
    root = logging.getLogger()
    return {
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "logging": (list(root.handlers), root.level, list(logging.getLogger("miles_controller").handlers)),
        "directory": os.getcwd(),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


async def test_jobs_leave_the_process_alone_and_print_nothing(new_job, capfd):
    before = of_the_process()
    told = []

    class Tells(logging.Handler):
        def emit(self, record):
            told.append((current_job.get(), record.getMessage()))

    logger, handler = logging.getLogger("miles_controller"), Tells()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        one, two = Scheduler([LocalNode("a"), Machine()]), Scheduler([LocalNode("b"), Machine()])
        async with new_job(one, "one", name="first"), new_job(two, "two", name="second"):
            await eventually(lambda: {"a", "b"} <= {text[0] for _, text in told if "joined with" in text}, 60)
            logger.removeHandler(handler)
            assert of_the_process() == before
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    assert {(job, text[0]) for job, text in told if "joined with" in text} == {("first", "a"), ("second", "b")}
    assert of_the_process() == before
    assert capfd.readouterr() == ("", "")
    assert current_job.get() == ""
    assert [sorted(each.told) for each in (one, two)] == [
        [("released", "a"), ("released", "m-0")], [("released", "b"), ("released", "m-0")],
    ]  # fmt: skip


async def test_a_slow_listener_loses_the_oldest_and_is_told_how_many():
    feed = Feed(deque(), limit=3)
    for number in range(5):
        feed.put(Said(str(number)))
    assert (await feed.next()).count == 2
    assert [(await feed.next()).text for _ in range(3)] == ["2", "3", "4"]


async def test_a_late_listener_gets_what_was_told_before_but_for_progress():
    narrator = JobNarrator(lambda state: None)
    with narrator.phase("generate"):
        narrator.show({"finished": 1, "target": 2})
    narrator.say("x")
    assert not narrator.has_bars
    late = narrator.listen()
    assert narrator.has_bars
    assert [type(await late.next()).__name__ for _ in range(2)] == ["Phase", "Said"]
    narrator.leave(late)
    assert not narrator.has_bars


def test_events_are_plain_for_json():
    assert Said("x", at=1.0).plain() == {"event": "Said", "text": "x", "at": 1.0}
    plain = Ended("failed", JobBroke("it broke"), at=1.0).plain()
    assert plain["error"]["code"] == "E-JOB-008"
